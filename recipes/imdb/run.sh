#!/usr/bin/env bash
# IMDB with the paper's settings, for one GPU and access to the hub (a few hours).
#   bash recipes/imdb/run.sh [ALGORITHM ...]      ppo, ppo++, aggrevated, lols, d2lols; all of them without an argument
# OUT (runs/imdb): where everything goes. SEED (0). RLGF_GUIDE: the guide, by default the starting policy itself, sampled with
# top-p as in the paper's second version; gpt-3.5 or another name of `rlgf ls guides` buys its text. RLGF_IMDB_REWARD: a
# sentiment classifier that exists, instead of training one. Finished stages are kept: run it again to continue.
recipe=recipes/imdb
source "$(dirname "$0")/../paper_start.sh"
reward=${RLGF_IMDB_REWARD:-$out/classifier}
test=$data/test.jsonl
train_flags=(--reward "classifier:$reward") eval_flags=(--metrics "reward:classifier:$reward,rouge,length")

python $recipe/positive.py "$data/train.jsonl" "$out/positive.jsonl"
rlgf sft -c $recipe/sft.yaml --data "$out/positive.jsonl" --seed "$seed" --resume -o "$out/sft"
if [ "$reward" = "$out/classifier" ]; then
    rlgf train-reward -c $recipe/train_reward.yaml --data "$data/train.jsonl" --eval-data "$data/validation.jsonl" \
        --seed "$seed" --resume -o "$reward"
fi
source recipes/paper_systems.sh
