#!/usr/bin/env bash
# All systems of run.sh with three seeds: more iterations and requests, references, and the differences to plain RL and to cloning
# followed by RL.
#   bash recipes/sentences/evidence.sh [FOLDER] [SEED ...]
# COMMONGEN=SOURCE: CommonGen's concept sets and GPT-4's recorded texts (commongen.py) in the place of the recipe's own words.
# Finished stages are kept: the same command goes on.
source "$(dirname "$0")/../common.sh"
root=${1:-runs/sentences_evidence} recipe=recipes/sentences
shift $(($# > 0 ? 1 : 0))
seeds=${*:-0 1 2}
figures=(natural plain repeated listed)
METRICS=coverage$(printf ",$recipe/data.py:%s" "${figures[@]}"),perplexity:smollm2,kl:smollm2,length,rouge
export STEPS=${STEPS:-16} EVERY=${EVERY:-4} METRICS
if [ -n "${COMMONGEN:-}" ]; then
    export TRAIN=300 TEST=100 TOKENS=32 METRICS=$METRICS,cider
    export SYSTEMS=${SYSTEMS:-grpo clone_grpo ppo++ grpo++}
else
    # aggrevated asks for about 400 texts of the live guide: as many more as more_grpo's clone has been chosen from
    export TRAIN=100 TEST=200 MORE=12
    export SYSTEMS=${SYSTEMS:-grpo ppo clone_grpo more_grpo clone_ppo ppo++ grpo++ aggrevated d2lols clone_grpo++ clone_aggrevated}
fi

for seed in $seeds; do
    out=$root/seed_$seed
    if [ -n "${COMMONGEN:-}" ]; then
        [ -e "$out/data/test.jsonl" ] || python "$recipe/commongen.py" "$COMMONGEN" "$out"
    elif [ ! -e "$out/data/test.jsonl" ]; then # references for the held-out requests: texts of the guide that use all words
        python "$recipe/data.py" "$root/requests"
        rlgf collect-guide -c $recipe/fewshot.yaml --max-new-tokens 24 --data "$root/requests/test.jsonl" -k 4 --seed 1000 --resume \
            --reward coverage --keep-above 1 -o "$root/references.jsonl"
        mkdir -p "$out/data"
        cp "$root/requests/train.jsonl" "$out/data/"
        python "$recipe/data.py" "$root/requests/test.jsonl" "$root/references.jsonl" "$out/data/test.jsonl"
    fi
    bash $recipe/run.sh "$out" "$seed"
done

systems=("$(of_all_seeds start start/eval)" "$(of_all_seeds guide guide/eval)" "$(of_all_seeds clone clone)")
case " $SYSTEMS" in *' more_'*) systems+=("$(of_all_seeds clone_more clone_more)") ;; esac
for name in $SYSTEMS; do systems+=("$(of_all_seeds "$(shown_name "$name")" "$name")"); done
for name in grpo clone_grpo more_grpo; do
    case " $SYSTEMS " in *" $name "*) compare_with "$(shown_name "$name")" --texts 4 ;; esac
done
folders=() # the report takes NAME=FOLDER, a seed each
for system in "${systems[@]}"; do
    for folder in $(tr , ' ' <<<"${system#*=}"); do folders+=("${system%%=*}=$folder"); done
done
rlgf report "${folders[@]}" --guide "$root/seed_${seeds%% *}/guide/eval" --comparison "$root/table_grpo.json" --title "Sentences with given words, three seeds" -o "$root/report.html"
