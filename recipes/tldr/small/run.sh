#!/usr/bin/env bash
# SciTLDR in the place of TL;DR, small enough for two CPU cores: abstract to one-sentence summary, models from scratch.
#   RLGF_REAL_DATA=data bash recipes/tldr/small/run.sh [FOLDER] [SEED]
# $RLGF_REAL_DATA/scitldr holds train and test.jsonl.gz. It shows that the pipeline works on an encoder-decoder and real
# text; nobody learns to summarise from 2,000 abstracts.
# RLGF_QUICK=1 runs every stage for a few steps only. Logs are in FOLDER/log.
# Finished stages are kept: the same command continues an interrupted run.
source "$(dirname "$0")/../../common.sh"
recipe=recipes/tldr/small out=${1:-runs/tldr-small} seed=${2:-0}
keep_freed_memory
data=${RLGF_REAL_DATA:?names the folder that holds scitldr/train.jsonl.gz}/scitldr
fit='' few='' roll='' score=''
if [ -n "${RLGF_QUICK:-}" ]; then
    fit='--max-steps 10 --limit 64' few='--limit 16' score='--limit 8'
    roll='--max-steps 1 --limit 16 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

mkdir -p "$out/log"

train=$data/train.jsonl.gz held_out=$data/validation.jsonl.gz test=$data/test.jsonl.gz eval_of='the test split'
metrics=rouge.rouge1,rouge.rougeL,length
source recipes/small.sh
