#!/usr/bin/env bash
# The demonstration with three seeds, and AggreVaTeD's cut as earlier code had it (cut: inner) beside the default.
#   bash recipes/demo/evidence.sh [FOLDER] [SEED ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
root=${1:-runs/evidence}
shift $(($# > 0 ? 1 : 0))
seeds=${*:-0 1 2}
recipe=recipes/demo
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

for seed in $seeds; do
    bash "$recipe/run.sh" "$root/seed_$seed" "$seed"
done

echo "== train: AggreVaTeD with cut: inner" >&2
for seed in $seeds; do
    out=$root/seed_$seed
    echo "rlgf train --alg aggrevated --cut inner --guide hf:$out/guide -c $recipe/train.yaml --model $out/sft" \
        "--data $out/data/train.jsonl --eval-data $out/data/test.jsonl --seed $seed -o $out/inner 2>$out/log/inner.log"
done | xargs -P 2 -d '\n' -I{} bash -c '{}'

for seed in $seeds; do
    out=$root/seed_$seed
    rlgf eval -c "$recipe/eval.yaml" --model "$out/inner" --data "$out/data/test.jsonl" -o "$out/inner/eval" \
        >"$out/log/eval_inner.txt" 2>&1
    echo
    echo "seed $seed, differences to the guide"
    rlgf compare "guide=$out/guide" "SFT=$out/sft" "PPO=$out/ppo" "PPO++=$out/ppopp" "AggreVaTeD=$out/aggrevated" \
        "LOLS=$out/lols" "D2LOLS=$out/d2lols" "cut:inner=$out/inner" --metrics score -o "$out/guide_table.json"
    echo
    echo "seed $seed, differences to PPO"
    rlgf compare "PPO=$out/ppo" "SFT=$out/sft" "PPO++=$out/ppopp" "AggreVaTeD=$out/aggrevated" "LOLS=$out/lols" \
        "D2LOLS=$out/d2lols" --metrics score -o "$out/ppo_table.json"
done

all() { # the runs of one name, with commas between
    printf "$root/seed_%s/$1\n" $seeds | paste -sd ,
}
echo
echo "all seeds, differences to PPO"
rlgf compare "PPO=$(all ppo)" "SFT=$(all sft)" "PPO++=$(all ppopp)" "AggreVaTeD=$(all aggrevated)" "LOLS=$(all lols)" \
    "D2LOLS=$(all d2lols)" --metrics score -o "$root/ppo_table.json"
