#!/usr/bin/env bash
# The whole pipeline on a synthetic task: data, starting policy and guide, guide text, its clone, plain and guided RL, evaluation,
# table, report.
#   bash recipes/synthetic/run.sh [FOLDER] [SEED]
# Two processes run side by side, one thread each; about six minutes on two cores. Logs are in FOLDER/log.
# The settings of ppo and grpo are the best of a sweep; rloo has the steadier of its two best (baselines.yaml, docs/results.md).
source "$(dirname "$0")/../common.sh"
seed=${2:-0}
out=${1:-runs/synthetic}
n=2
while [ $# -eq 0 ] && [ -e "$out" ]; do # an earlier run is kept
    out=runs/synthetic-$n
    n=$((n + 1))
done
recipe=recipes/synthetic

if [ -e "$out" ]; then
    echo "error: $out is already there; remove it or name another folder" >&2
    exit 2
fi
mkdir -p "$out/log"
python "$recipe/grammar.py" "$out/data"

echo "== sft: the starting policy and the guide" >&2
both <<END
rlgf sft -c $recipe/sft.yaml --data $out/data/start.jsonl --seed $seed -o $out/sft 2>$out/log/sft.log
rlgf sft -c $recipe/sft.yaml --data $out/data/guide.jsonl --seed $seed -o $out/guide 2>$out/log/guide.log
END

echo "== collect-guide: the guide's texts for the training prompts; sft: the starting policy is fine-tuned on them" >&2
rlgf collect-guide -c $recipe/collect_guide.yaml --guide hf:$out/guide --data $out/data/train.jsonl --seed $seed \
    -o $out/guide.jsonl 2>$out/log/collect_guide.log
rlgf sft -c $recipe/sft.yaml -c $recipe/clone.yaml --model $out/sft --data $out/data/train.jsonl --guide $out/guide.jsonl --seed $seed \
    -o $out/clone 2>$out/log/clone.log

echo "== train: plain RL from the start and from the clone, and the guided algorithms, the same number of episodes each" >&2
common="-c $recipe/train.yaml --data $out/data/train.jsonl --eval-data $out/data/test.jsonl --seed $seed"
start="--model $out/sft $common"
clone="--model $out/clone $common"
plain="--set ppo.advantage_scale=none"
both <<END
rlgf train --alg aggrevated --guide hf:$out/guide $start -o $out/aggrevated 2>$out/log/aggrevated.log
rlgf train --alg lols --guide hf:$out/guide $start -o $out/lols 2>$out/log/lols.log
rlgf train --alg d2lols --guide hf:$out/guide $start -o $out/d2lols 2>$out/log/d2lols.log
rlgf train --alg ppo++ --guide $out/guide.jsonl $start -o $out/ppopp 2>$out/log/ppopp.log
rlgf train --alg ppo $plain $start -o $out/ppo 2>$out/log/ppo.log
rlgf train --alg grpo $start -o $out/grpo 2>$out/log/grpo.log
rlgf train --alg rloo $start -o $out/rloo 2>$out/log/rloo.log
rlgf train --alg ppo $plain $clone -o $out/clone_ppo 2>$out/log/clone_ppo.log
rlgf train --alg grpo $clone -o $out/clone_grpo 2>$out/log/clone_grpo.log
END

echo "== eval: 400 held-out prompts, one sampled text each" >&2
for name in sft guide clone ppo grpo rloo clone_ppo clone_grpo ppopp aggrevated lols d2lols; do
    echo "rlgf eval -c $recipe/eval.yaml --model $out/$name --data $out/data/test.jsonl -o $out/$name/eval >$out/log/eval_$name.txt 2>&1"
done | both

# PPO is first: the others are compared with it
systems=("PPO=$out/ppo" "SFT=$out/sft" "guide=$out/guide" "clone=$out/clone" "GRPO=$out/grpo" "RLOO=$out/rloo"
    "clone+PPO=$out/clone_ppo" "clone+GRPO=$out/clone_grpo" "PPO++=$out/ppopp" "AggreVaTeD=$out/aggrevated"
    "LOLS=$out/lols" "D2LOLS=$out/d2lols")
echo
rlgf compare "${systems[@]}" -o "$out/table.json"
echo
echo "== report: all of it on one page" >&2
rlgf report "${systems[@]}" --comparison "$out/table.json" --title "The synthetic task" -o "$out/report.html"
print_seconds :
find "$out" -maxdepth 2 \( -name '*.jsonl' -o -name 'table.json' -o -name 'eval' -o -name 'model.safetensors' \) | sort
