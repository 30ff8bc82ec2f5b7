#!/usr/bin/env bash
# Last-mile fine-tuning of small models on short examples: failures made on purpose, a reward model that knows them, PPO
# and PPO++ against it, and rules that mend the same texts for nothing, to compare with.
#   RLGF_REAL_DATA=data bash recipes/lastmile/small.sh dialogsum|scitldr [FOLDER] [SEED]
# $RLGF_REAL_DATA/TASK holds train, validation and test.jsonl.gz. RLGF_QUICK=1 runs every stage for a few steps only.
# RLGF_ENCODER: a pretrained encoder (a folder) for the reward model, instead of one from scratch: much better, and slower.
# Logs are in FOLDER/log. What is there already is kept: the same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/../.."
task=${1:?dialogsum or scitldr}
out=${2:-runs/lastmile-$task-small}
seed=${3:-0}
recipe=recipes/lastmile/small
data=${RLGF_REAL_DATA:?names the folder that holds TASK/train.jsonl.gz}/$task
case $task in
    dialogsum) words='120 25' ;;
    scitldr) words='220 30' ;;
    *) echo "error: no small recipe for $task" >&2 && exit 2 ;;
esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
# glibc gives large blocks back to the kernel and asks for them again at every step: up to two fifths of sft's CPU time
export MALLOC_MMAP_THRESHOLD_=536870912 MALLOC_TRIM_THRESHOLD_=2147483648
started=$SECONDS
fit='' few='' roll='' score=''
encoder=${RLGF_ENCODER:+-c $recipe/encoder.yaml --model $RLGF_ENCODER}
if [ -n "${RLGF_QUICK:-}" ]; then
    fit='--max-steps 10 --limit 96' few='--limit 24' score='--limit 8'
    roll='--max-steps 1 --limit 16 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

both() { # run the commands on stdin two at a time; stop at the first that fails
    xargs -P 2 -d '\n' -I{} bash -c '{}'
}

mkdir -p "$out/log"
[ -e "$out/data/test.jsonl" ] || python recipes/lastmile/short.py "$data" "$out/data" $words
train=$out/data/train.jsonl

echo "== sft: the starting policy and the guide" >&2
both <<END
rlgf sft -c $recipe/sft.yaml --data $train --seed $seed --resume $fit -o $out/sft 2>>$out/log/sft.log
rlgf sft -c $recipe/sft.yaml -c $recipe/guide.yaml --data $train --seed $seed --resume $fit -o $out/guide 2>>$out/log/guide.log
END

echo "== generate, collect-guide: what both write for the training prompts" >&2
both <<END
[ -e $out/samples.jsonl ] || rlgf generate -c $recipe/generate.yaml --model $out/sft --data $train --seed $seed $few -o $out/samples.jsonl 2>>$out/log/generate.log
rlgf collect-guide -c $recipe/collect_guide.yaml --guide hf:$out/guide --data $train --seed $seed --resume $few -o $out/guide.jsonl 2>>$out/log/collect_guide.log
END

echo "== make-negatives, train-reward: what not to do" >&2
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
echo
echo "made in $((SECONDS - started)) s"
