#!/usr/bin/env bash
# The whole chain on two cores without an API model: the guide is a script behind an OpenAI-compatible endpoint
# (scripted_server.py), the seeds are real. The script's rewrites have no meaning; the chain is what runs.
#   RLGF_REAL_DATA=data bash recipes/teams_rl/small.sh [FOLDER] [SEED]
# $RLGF_REAL_DATA/alpaca holds train and validation.jsonl.gz. RLGF_QUICK=1 runs every stage for a few steps only.
# Logs are in FOLDER/log. Finished stages are kept: the same command continues an interrupted run.
source "$(dirname "$0")/../common.sh"
recipe=recipes/teams_rl/small out=${1:-runs/teams_rl-small} seed=${2:-0}
data=${RLGF_REAL_DATA:?names the folder that holds alpaca/train.jsonl.gz}/alpaca
train='--limit 200' seeds='--limit 150' fit='' score=''
if [ -n "${RLGF_QUICK:-}" ]; then
    train='--limit 16 --iterations 2 --batch-size 8' seeds='--limit 12' fit='--max-steps 5' score='--limit 8'
fi

mkdir -p "$out/log"
coproc SCRIPTED { exec python recipes/teams_rl/scripted_server.py; }
trap 'kill "$SCRIPTED_PID" 2>/dev/null || true' EXIT
read -r url <&"${SCRIPTED[0]}"
export OPENAI_API_KEY=unused # the local server needs none
guide="--guide openai:scripted --base-url $url"

echo "== evolve train: which rewrite to request" >&2
rlgf evolve train -c $recipe/evolve_train.yaml $guide --data "$data/train.jsonl.gz" $train --seed "$seed" --resume \
    -o "$out/policy" 2>>"$out/log/policy.log"

echo "== evolve generate: the learned policy, and every operation equally often" >&2
for name in policy random; do
    policy=$([ $name = policy ] && echo "$out/policy" || echo random)
    rlgf evolve generate -c $recipe/evolve_generate.yaml $guide --policy "$policy" --data "$data/validation.jsonl.gz" \
        $seeds --seed "$seed" --resume -o "$out/set_$name" 2>>"$out/log/set_$name.log"
done
rlgf evolve stats "$out/set_policy" "$out/set_random" --overwrite -o "$out/stats" 2>"$out/log/stats.log"

echo "== sft: on half of the policy's set; the other half is held out" >&2
python recipes/teams_rl/halves.py "$out/set_policy/instructions.jsonl" "$out/halves"
rlgf sft -c $recipe/sft.yaml --data "$out/halves/a.jsonl" $fit --seed "$seed" --resume -o "$out/sft" 2>>"$out/log/sft.log"

echo "== eval: its answers, and whether membership in its training data can be detected" >&2
rlgf eval -c $recipe/eval.yaml --model "$out/sft" --data "$out/halves/b.jsonl" \
    --metrics "rouge,length,membership:$out/halves/a.jsonl" $score --seed "$seed" --overwrite -o "$out/sft/eval" 2>>"$out/log/eval.log"
print_seconds ''
