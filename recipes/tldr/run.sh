#!/usr/bin/env bash
# TL;DR with the paper's settings, for one GPU of 80 GB (days) and access to the hub.
#   bash recipes/tldr/run.sh [ALGORITHM ...]      ppo, ppo++, aggrevated, lols, d2lols; all of them without an argument
# OUT (runs/tldr): where everything goes. SEED (0). RLGF_GUIDE: the guide, by default the starting policy itself, sampled
# with top-p as in the paper's second version; gpt-3.5 or another name of `rlgf ls guides` buys its text.
# RLGF_TLDR_REWARD: a reward model with one output. RLGF_TLDR_MODEL: the model under the LoRA.
# Finished stages are kept: run it again to continue.
recipe=recipes/tldr
source "$(dirname "$0")/../paper_start.sh"
test=$data/test.jsonl

rlgf sft -c $recipe/sft.yaml --data "$data/train.jsonl" --seed "$seed" --resume -o "$out/sft"
source recipes/paper_systems.sh
