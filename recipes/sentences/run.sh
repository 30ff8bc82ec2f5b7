#!/usr/bin/env bash
# Sentences with given words: a pretrained chat model (SmolLM2, 135M parameters) learns from a reward that can be gamed, with and
# without a guide's texts. The guide is the same model with four examples in its prompt; of eight texts for a request those are kept
# that use all words.
#   bash recipes/sentences/run.sh [FOLDER] [SEED]
# Two processes side by side, one thread each; ten minutes on two cores. Logs are in FOLDER/log. Finished stages are kept: the same
# command goes on. From the environment:
#   SYSTEMS     the trainings (grpo clone_grpo grpo++; also ppo, grpo++, aggrevated, lols, d2lols, and each of them after clone_, or
#               after more_: from a clone that MORE texts for a request (12) were requested for, and not eight)
#   STEPS, EVERY, TRAIN, TEST   iterations (12), those between held-out evaluations (4), requests for training (48), held-out ones (60)
#   METRICS     of the evaluation, in the place of eval.yaml's
#   RLGF_GUIDE  another guide, as for rlgf collect-guide --guide: gpt-4o-mini, openai:MODEL, hf:FOLDER
# data/, guide.jsonl and guide_test.jsonl that are in FOLDER already are used (commongen.py writes them with GPT-4's texts).
source "$(dirname "$0")/../common.sh"
keep_freed_memory
export out=${1:-runs/sentences} seed=${2:-0} recipe=recipes/sentences
export STEPS=${STEPS:-12} EVERY=${EVERY:-4} TRAIN=${TRAIN:-48} TEST=${TEST:-60} TOKENS=${TOKENS:-24} RLGF_GUIDE=${RLGF_GUIDE:-} METRICS=${METRICS:-}
systems=${SYSTEMS:-grpo clone_grpo grpo++}

case $out in *[[:space:]]*) echo "error: $out: a folder without spaces, please" >&2 && exit 2 ;; esac
mkdir -p "$out/log"
echo "== $out: write one sentence that uses three given words; the reward is the share of the words that are used" >&2
show_progress "$out/log"
[ -e "$out/data/test.jsonl" ] || python "$recipe/data.py" "$out/data"

collect() { # collect-guide with its words, unless the texts were recorded elsewhere
    local file=$1
    shift
    if [ ! -e "$out/$file.jsonl" ] || [ -e "$out/$file.jsonl.run.json" ]; then
        rlgf collect-guide -c $recipe/fewshot.yaml ${RLGF_GUIDE:+--guide "$RLGF_GUIDE"} --max-new-tokens "$TOKENS" --seed "$seed" --resume \
            "$@" -o "$out/$file.jsonl" >/dev/null 2>>"$out/log/$file.log"
    fi
}
clone() { # the start is fine-tuned on the guide's texts: those of $2 for a request that use all words, in file $1; the clone is $3
    collect "$1" --data "$out/data/train.jsonl" --limit "$TRAIN" -k "$2" --reward coverage --keep-above 1 &&
        rlgf sft -c $recipe/sft.yaml --data "$out/data/train.jsonl" --limit "$TRAIN" --guide "$out/$1.jsonl" --max-new-tokens "$TOKENS" \
            --seed "$seed" --resume -o "$out/$3" >/dev/null 2>>"$out/log/$3.log"
}
train() { # one system: an algorithm from the start or, as clone_* and more_*, from a clone
    local alg=${1#clone_} from=smollm2 guide=''
    alg=${alg#more_}
    case $1 in
        clone_*) from="$out/clone --lr 1e-4" ;;
        more_*) from="$out/clone_more --lr 1e-4" ;;
    esac
    case $alg in
        ppo++ | grpo++) guide="--guide $out/guide.jsonl" ;;
        aggrevated | lols | d2lols) guide="-c $recipe/fewshot.yaml ${RLGF_GUIDE:+--guide $RLGF_GUIDE}" ;;&
        d2lols) guide+=" --switch-step $((STEPS / 2))" ;;
    esac
    rlgf train -c $recipe/train.yaml --alg "$alg" --model $from $guide --data "$out/data/train.jsonl" --limit "$TRAIN" \
        --eval-data "$out/data/test.jsonl" --set eval.every="$EVERY" --watch $recipe/data.py:plain \
        --max-new-tokens "$TOKENS" --max-steps "$STEPS" --seed "$seed" --resume -o "$out/$1" >/dev/null 2>>"$out/log/$1.log"
}
evaluate() { # one system's texts for the held-out requests
    local whose="--model $out/$1" figures=$METRICS
    case $1 in
        start) whose="--model smollm2" ;;
        guide) # its texts have no policy whose KL could be measured
            whose="--predictions $out/guide_test.jsonl" figures=$(tr , '\n' <<<"$METRICS" | grep -v '^kl:' | paste -sd ,)
            collect guide_test --data "$out/data/test.jsonl" --limit "$TEST" || return
            ;;
    esac
    rlgf eval -c $recipe/eval.yaml ${figures:+--metrics "$figures"} $whose --data "$out/data/test.jsonl" --limit "$TEST" --max-new-tokens "$TOKENS" --seed "$seed" \
        --resume -o "$out/$1/eval" >"$out/log/eval_$1.log" 2>&1
}
export -f collect clone train evaluate
trainings() { # the lines "train SYSTEM" of the systems that need the guide's texts (guided), or of those that do not (plain)
    for name in $systems; do
        case $name in
            clone_* | more_* | ppo++ | grpo++ | aggrevated | lols | d2lols) [ "$1" = guided ] && echo "train $name" ;;
            *) [ "$1" = plain ] && echo "train $name" ;;
        esac
    done || true
}

echo "== collect-guide, sft: the guide's texts, cloned; train: RL without a guide" >&2
clones=clone
case " $systems" in *' more_'*) clones='clone clone_more' ;; esac
(
    echo clone guide 8 clone
    [ "$clones" = clone ] || echo clone guide_more "${MORE:-12}" clone_more
    trainings plain
) | both
echo "== train: RL with the guide's texts" >&2
trainings guided | both
echo "== eval: held-out requests, one sampled text each" >&2
printf 'evaluate %s\n' start guide $clones $systems | both

stop_progress
first=${systems%% *} # the first training is what the others are compared with
folders=("$first=$out/$first" "start=$out/start/eval" "guide=$out/guide/eval")
for name in $clones ${systems#"$first"}; do folders+=("$(shown_name "$name")=$out/$name"); done
echo
shown=''
[ -n "$METRICS" ] || shown="--metrics coverage,natural,repeated"
rlgf compare "${folders[@]}" $shown --texts 4 --overwrite -o "$out/table.json"
rlgf report "${folders[@]}" --guide "$out/guide/eval" --comparison "$out/table.json" --title "Sentences with given words" -o "$out/report.html" >/dev/null
print_seconds ": figures above; curves, texts and figures in $out/report.html"
