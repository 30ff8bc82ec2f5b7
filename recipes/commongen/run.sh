#!/usr/bin/env bash
# CommonGen with the paper's settings, for one GPU (about a day) and access to the hub.
#   bash recipes/commongen/run.sh [ALGORITHM ...]      ppo, ppo++, aggrevated, lols, d2lols; all of them without an argument
# OUT (runs/commongen): where everything goes. SEED (0). RLGF_GUIDE: the guide, by default the starting policy itself, sampled
# with top-p as in the paper's second version; gpt-3.5 or another name of `rlgf ls guides` buys its text.
# Finished stages are kept: run it again to continue.
recipe=recipes/commongen
source "$(dirname "$0")/../paper_start.sh"
test=$data/validation.jsonl

rlgf sft -c $recipe/sft.yaml --data "$data/train.jsonl" --seed "$seed" --resume -o "$out/sft"
source recipes/paper_systems.sh
