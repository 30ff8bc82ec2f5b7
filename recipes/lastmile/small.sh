#!/usr/bin/env bash
# Last-mile fine-tuning of small models on short examples: synthetic failures, a reward model trained on them, PPO and PPO++
# against it, and, to compare with, rules that repair the same texts at no cost.
#   RLGF_REAL_DATA=data bash recipes/lastmile/small.sh dialogsum|scitldr [FOLDER] [SEED]
# $RLGF_REAL_DATA/TASK holds train, validation and test.jsonl.gz. RLGF_QUICK=1 runs every stage for a few steps only.
# RLGF_ENCODER: a pretrained encoder (a folder) for the reward model, much better and slower than one from scratch.
# Logs are in FOLDER/log. Finished stages are kept: the same command continues an interrupted run.
source "$(dirname "$0")/../common.sh"
keep_freed_memory
task=${1:?dialogsum or scitldr}
recipe=recipes/lastmile/small out=${2:-runs/lastmile-$task-small} seed=${3:-0}
data=${RLGF_REAL_DATA:?names the folder that holds TASK/train.jsonl.gz}/$task
case $task in
    dialogsum) words='120 25' ;;
    scitldr) words='220 30' ;;
    *) echo "error: no small recipe for $task" >&2 && exit 2 ;;
esac
fit='' few='' roll='' score=''
encoder=${RLGF_ENCODER:+-c $recipe/encoder.yaml --model $RLGF_ENCODER}
if [ -n "${RLGF_QUICK:-}" ]; then
    fit='--max-steps 10 --limit 96' few='--limit 24' score='--limit 8'
    roll='--max-steps 1 --limit 16 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

mkdir -p "$out/log"
[ -e "$out/data/test.jsonl" ] || python recipes/lastmile/short.py "$data" "$out/data" $words
train=$out/data/train.jsonl

source recipes/small_sft.sh

echo "== generate, collect-guide: texts of both for the training prompts" >&2
both <<END
[ -e $out/samples.jsonl ] || rlgf generate -c $recipe/generate.yaml --model $out/sft --data $train --seed $seed $few -o $out/samples.jsonl 2>>$out/log/generate.log
rlgf collect-guide -c $recipe/collect_guide.yaml --guide hf:$out/guide --data $train --seed $seed --resume $few -o $out/guide.jsonl 2>>$out/log/collect_guide.log
END

echo "== make-negatives, train-reward: texts with failures, and the reward model" >&2
[ -e "$out/negatives.jsonl" ] ||
    rlgf make-negatives -c $recipe/make_negatives.yaml --data "$train" --samples "$out/samples.jsonl" --seed "$seed" $few \
        -o "$out/negatives.jsonl" 2>"$out/log/negatives.log"
rlgf train-reward -c $recipe/train_reward.yaml $encoder --data "$out/negatives.jsonl" --seed "$seed" --resume $fit -o "$out/rm" \
    2>>"$out/log/rm.log"

echo "== train: PPO and PPO++ against the reward model" >&2
reward="[{name: \"rm:$out/rm\", clip: [-4, 4]}, {name: length, params: {ratio: 1, to: reference, tolerance: 0.2, form: log_ratio, cap: 2}}]"
common="-c $recipe/train.yaml --model $out/sft --data $train --eval-data $out/data/validation.jsonl --watch rouge --seed $seed --resume $roll"
both <<END
rlgf train --alg ppo $common --set 'reward=$reward' -o $out/ppo 2>>$out/log/ppo.log
rlgf train --alg ppo++ --guide $out/guide.jsonl $common --set 'reward=$reward' -o $out/ppopp 2>>$out/log/ppopp.log
END

echo "== eval: the test split, raw texts and SFT's after postprocess" >&2
metrics=failures,flagged:$out/rm,rouge_adjusted,rouge,length,repetition,reward:rm:$out/rm
for name in sft guide ppo ppopp; do
    echo "rlgf eval -c $recipe/eval.yaml --metrics $metrics --model $out/$name --data $out/data/test.jsonl --seed $seed --resume $score -o $out/$name/eval >$out/log/eval_$name.txt 2>&1"
done | both
rlgf postprocess "$out/sft/eval/predictions.jsonl" --overwrite -o "$out/mended.jsonl" 2>>"$out/log/mended.log"
rlgf eval -c $recipe/eval.yaml --metrics "$metrics" --predictions "$out/mended.jsonl" --overwrite -o "$out/mended" \
    >"$out/log/eval_mended.txt" 2>&1

echo
rlgf compare "SFT=$out/sft" "SFT mended=$out/mended" "guide=$out/guide" "PPO=$out/ppo" "PPO++=$out/ppopp" \
    --metrics failures,flagged,rouge_adjusted.rougeL,rouge.rougeL,length.words,reward.rm --overwrite -o "$out/table.json"
rlgf report "SFT=$out/sft" "guide=$out/guide" "PPO=$out/ppo" "PPO++=$out/ppopp" --comparison "$out/table.json" -o "$out/report.html"
print_seconds ''
