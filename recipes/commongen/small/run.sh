#!/usr/bin/env bash
# CommonGen, small enough for two CPU cores: three to five words to a sentence with all of them, models from scratch.
#   RLGF_REAL_DATA=data bash recipes/commongen/small/run.sh [FOLDER] [SEED]
# $RLGF_REAL_DATA/commongen holds train.jsonl.gz, of which data.py takes the concept sets of frequent words.
# RLGF_QUICK=1 runs every stage for a few steps only. Logs are in FOLDER/log.
# Finished stages are kept: the same command continues an interrupted run.
source "$(dirname "$0")/../../common.sh"
recipe=recipes/commongen/small out=${1:-runs/commongen-small} seed=${2:-0}
keep_freed_memory
source=${RLGF_REAL_DATA:?names the folder that holds commongen/train.jsonl.gz}/commongen
data=$out/data
fit='' few='' roll='' score=''
if [ -n "${RLGF_QUICK:-}" ]; then
    fit='--max-steps 2 --limit 64' few='--limit 16' score='--limit 8'
    roll='--max-steps 1 --limit 16 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

mkdir -p "$out/log"
python "$recipe/data.py" "$source" "$data"

train=$data/train.jsonl held_out=$data/test.jsonl test=$data/test.jsonl eval_of='held-out concept sets, one sampled text each'
metrics=reward.total,reward.coverage,reward.rouge
source recipes/small.sh
