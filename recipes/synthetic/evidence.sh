#!/usr/bin/env bash
# The synthetic task with three seeds, and the differences to plain RL at its best and to cloning followed by plain RL.
#   bash recipes/synthetic/evidence.sh [FOLDER] [SEED ...]
source "$(dirname "$0")/../common.sh"
root=${1:-runs/synthetic_evidence}
shift $(($# > 0 ? 1 : 0))
seeds=${*:-0 1 2}

for seed in $seeds; do
    [ -e "$root/seed_$seed/table.json" ] || bash recipes/synthetic/run.sh "$root/seed_$seed" "$seed"
done

systems=("$(of_all_seeds SFT sft)" "$(of_all_seeds guide guide)" "$(of_all_seeds clone clone)" "$(of_all_seeds PPO ppo)"
    "$(of_all_seeds GRPO grpo)" "$(of_all_seeds RLOO rloo)"
    "$(of_all_seeds clone+PPO clone_ppo)" "$(of_all_seeds clone+GRPO clone_grpo)" "$(of_all_seeds PPO++ ppopp)"
    "$(of_all_seeds AggreVaTeD aggrevated)"
    "$(of_all_seeds LOLS lols)" "$(of_all_seeds D2LOLS d2lols)")
for baseline in PPO GRPO clone+PPO guide; do
    compare_with "$baseline" --metrics score
done
