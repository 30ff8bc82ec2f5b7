#!/usr/bin/env bash
# Instruction data that evolves, with an API model as the guide: a policy learns which rewrite to request, the guide rewrites
# seed instructions accordingly, and a small model is fine-tuned once on the result.
#   OPENAI_API_KEY=... bash recipes/teams_rl/run.sh
#   GUIDE_MODE=replay bash recipes/teams_rl/run.sh      from the cache alone, once it is recorded: no request is sent
# OUT (runs/teams_rl): where everything goes. SEED (0). RLGF_GUIDE (gpt-4o-mini): the guide. RLGF_SEEDS: a folder with
# train.jsonl and validation.jsonl instead of the hub's Alpaca. MAX_COST_USD (5): the budget of each of the two commands
# that call the guide. ENCODER: a text encoder's folder for measuring novelty; without it words are compared.
# RLGF_TEAMS_MODEL (gpt2): the small model. Finished stages are kept: run it again to continue.
set -euo pipefail
cd "$(dirname "$0")/../.."
recipe=recipes/teams_rl
out=${OUT:-runs/teams_rl}
seed=${SEED:-0}
guide=${RLGF_GUIDE:-gpt-4o-mini}
data=${RLGF_SEEDS:-$out/data}
cap=${MAX_COST_USD:-5}
mode=${GUIDE_MODE:-record}
space=()
if [ -n "${ENCODER:-}" ]; then space=(--encoder "$ENCODER"); fi

if [ ! -e "$data" ]; then rlgf prepare -c $recipe/prepare.yaml --seed "$seed" -o "$data"; fi
rlgf evolve train -c $recipe/evolve_train.yaml --guide "$guide" --guide-mode "$mode" --max-cost-usd "$cap" --limit 500 \
    --data "$data/train.jsonl" "${space[@]}" --seed "$seed" --resume -o "$out/policy"
rlgf evolve generate -c $recipe/evolve_generate.yaml --guide "$guide" --guide-mode "$mode" --max-cost-usd "$cap" \
    --limit 1000 --data "$data/train.jsonl" --policy "$out/policy" "${space[@]}" --seed "$seed" --resume -o "$out/set"
rlgf evolve stats "$out/set" "$data/train.jsonl" "${space[@]}" --overwrite -o "$out/stats"

rlgf sft -c $recipe/sft.yaml --data "$out/set/instructions.jsonl" --seed "$seed" --resume -o "$out/sft"
rlgf sft -c $recipe/sft.yaml --data "$data/train.jsonl" --limit 1000 --seed "$seed" --resume -o "$out/sft_seeds"
for name in sft sft_seeds; do
    rlgf eval -c $recipe/eval.yaml --model "$out/$name" --data "$data/validation.jsonl" --limit 500 \
        --metrics rouge,length,repetition --seed "$seed" --resume
done
rlgf compare "evolved=$out/sft" "seeds=$out/sft_seeds" --overwrite -o "$out/table.json"
