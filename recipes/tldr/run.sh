#!/usr/bin/env bash
# TL;DR with the paper's settings, for one GPU of 80 GB (days) and access to the hub.
#   bash recipes/tldr/run.sh [ALGORITHM ...]      ppo, ppo++, aggrevated, lols, d2lols; all of them without an argument
# OUT (runs/tldr): where everything goes. SEED (0). RLGF_GUIDE: the guide, by default the starting policy itself, sampled
# with top-p as in the paper's second version; gpt-3.5 or another name of `rlgf ls guides` buys its text.
# RLGF_TLDR_REWARD: a reward model with one output. RLGF_TLDR_MODEL: the model under the LoRA.
# What is there already is kept: run it again to go on.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=recipes/tldr
out=${OUT:-runs/tldr}
seed=${SEED:-0}
guide=${RLGF_GUIDE:-hf:$out/sft}
data=$out/data
test=$data/test.jsonl
if [ $# -eq 0 ]; then set -- ppo ppo++ aggrevated lols d2lols; fi

if [ ! -e "$data" ]; then rlgf prepare -c $recipe/prepare.yaml --seed "$seed" -o "$data"; fi
rlgf sft -c $recipe/sft.yaml --data "$data/train.jsonl" --seed "$seed" --resume -o "$out/sft"
if [[ " $* " == *" ppo++ "* ]]; then # the only one that goes by recorded text alone
    rlgf collect-guide -c $recipe/collect_guide.yaml --guide "$guide" --data "$data/train.jsonl" --seed "$seed" --resume \
        -o "$out/guide.jsonl"
fi

rlgf eval -c $recipe/eval.yaml --model "$out/sft" --data "$test" --seed "$seed" --resume
systems=("SFT=$out/sft")
for algorithm in "$@"; do
    case $algorithm in
        ppo) with=() ;;
        ppo++) with=(--guide "$out/guide.jsonl") ;;
        *) with=(--guide "$guide") ;;
    esac
    rlgf train -c $recipe/train.yaml -c "$recipe/alg/$algorithm.yaml" --model "$out/sft" --data "$data/train.jsonl" \
        --eval-data "$data/validation.jsonl" "${with[@]}" --seed "$seed" --resume -o "$out/$algorithm"
    rlgf eval -c $recipe/eval.yaml --model "$out/$algorithm" --data "$test" --seed "$seed" --resume
    systems+=("$algorithm=$out/$algorithm")
done
rlgf compare "${systems[@]}" --overwrite -o "$out/table.json"
