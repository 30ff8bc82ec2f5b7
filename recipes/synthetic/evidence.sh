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

all() { # a system's name and its runs, one per seed
    echo "$1=$(printf "$root/seed_%s/$2\n" $seeds | paste -sd ,)"
}
systems=("$(all SFT sft)" "$(all guide guide)" "$(all clone clone)" "$(all PPO ppo)" "$(all GRPO grpo)" "$(all RLOO rloo)"
    "$(all clone+PPO clone_ppo)" "$(all clone+GRPO clone_grpo)" "$(all PPO++ ppopp)" "$(all AggreVaTeD aggrevated)"
    "$(all LOLS lols)" "$(all D2LOLS d2lols)")
for baseline in PPO GRPO clone+PPO guide; do
    echo
    echo "all seeds, differences to $baseline"
    first=() others=()
    for system in "${systems[@]}"; do
        if [ "${system%%=*}" = "$baseline" ]; then first=("$system"); else others+=("$system"); fi
    done
    rlgf compare "${first[@]}" "${others[@]}" --metrics score --overwrite -o "$root/table_$baseline.json"
done
