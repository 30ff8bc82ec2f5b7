#!/usr/bin/env bash
# Last-mile fine-tuning on one GPU with access to the hub: synthetic failures, a reward model trained on them, PPO (and PPO++
# with a guide) against it, and, to compare with, rules that repair the same texts at no cost.
#   bash recipes/lastmile/run.sh dialogsum|scitldr
# OUT (runs/lastmile-TASK): where everything goes. SEED (0). RLGF_GUIDE: a guide for ppo++, such as hf:FOLDER with a larger
# model trained on the task, or a name of `rlgf ls guides`. RLGF_LASTMILE_MODEL, RLGF_LASTMILE_REWARD_MODEL: other
# models than the recipe's. Finished stages are kept: run it again to continue.
set -euo pipefail
cd "$(dirname "$0")/../.."
task=${1:?dialogsum or scitldr}
recipe=recipes/lastmile
out=${OUT:-runs/lastmile-$task}
seed=${SEED:-0}
data=$out/data
case $task in
    dialogsum) source=(--dataset knkarthick/dialogsum --map prompt=dialogue,references=summary,id=id) ;;
    scitldr) source=(--dataset allenai/scitldr --subset Abstract --map prompt=source,references=target,id=paper_id) ;;
    *) echo "error: no recipe for $task" >&2 && exit 2 ;;
esac

if [ ! -e "$data" ]; then rlgf prepare "${source[@]}" --seed "$seed" -o "$data"; fi
rlgf sft -c $recipe/sft.yaml --data "$data/train.jsonl" --seed "$seed" --resume -o "$out/sft"
if [ ! -e "$out/samples.jsonl" ]; then
    rlgf generate -c $recipe/generate.yaml --model "$out/sft" --data "$data/train.jsonl" --seed "$seed" -o "$out/samples.jsonl"
fi
if [ ! -e "$out/negatives.jsonl" ]; then
    rlgf make-negatives -c $recipe/make_negatives.yaml --data "$data/train.jsonl" --samples "$out/samples.jsonl" \
        --seed "$seed" -o "$out/negatives.jsonl"
fi
rlgf train-reward -c $recipe/train_reward.yaml --data "$out/negatives.jsonl" --seed "$seed" --resume -o "$out/rm"

reward="[{name: \"rm:$out/rm\", clip: [-4, 4]}, {name: length, params: {ratio: 1, to: reference, tolerance: 0.2, form: log_ratio, cap: 2}}]"
systems=("SFT=$out/sft")
algorithms=(ppo)
if [ -n "${RLGF_GUIDE:-}" ]; then
    algorithms+=(ppo++)
    rlgf collect-guide -c $recipe/collect_guide.yaml --guide "$RLGF_GUIDE" --data "$data/train.jsonl" --seed "$seed" \
        --resume -o "$out/guide.jsonl"
fi
for algorithm in "${algorithms[@]}"; do
    with=()
    if [ "$algorithm" = ppo++ ]; then with=(--guide "$out/guide.jsonl"); fi
    rlgf train -c $recipe/train.yaml --alg "$algorithm" --model "$out/sft" --data "$data/train.jsonl" \
        --eval-data "$data/validation.jsonl" --watch rouge --set "reward=$reward" "${with[@]}" --seed "$seed" --resume \
        -o "$out/$algorithm"
    systems+=("$algorithm=$out/$algorithm")
done

metrics=failures,flagged:$out/rm,rouge_adjusted,rouge,length,reward:rm:$out/rm
for system in "${systems[@]}"; do
    rlgf eval -c $recipe/eval.yaml --model "${system#*=}" --data "$data/test.jsonl" --metrics "$metrics" --seed "$seed" --resume
done
rlgf postprocess "$out/sft/eval/predictions.jsonl" --overwrite -o "$out/mended.jsonl"
rlgf eval -c $recipe/eval.yaml --predictions "$out/mended.jsonl" --metrics "$metrics" --overwrite -o "$out/mended"
rlgf compare "${systems[@]}" "SFT mended=$out/mended" --overwrite -o "$out/table.json"
rlgf report "${systems[@]}" --comparison "$out/table.json" -o "$out/report.html"
