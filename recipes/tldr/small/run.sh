#!/usr/bin/env bash
# SciTLDR in the place of TL;DR, small enough for two CPU cores: abstract to one-sentence summary, models from scratch.
#   RLGF_REAL_DATA=data bash recipes/tldr/small/run.sh [FOLDER] [SEED]
# $RLGF_REAL_DATA/scitldr holds train and test.jsonl.gz. It shows that the pipeline works on an encoder-decoder and real
# text; nobody learns to summarise from 2,000 abstracts.
# RLGF_QUICK=1 runs every stage for a few steps only. Logs are in FOLDER/log.
# What is there already is kept: the same command goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "$0")/../../.."
out=${1:-runs/tldr-small}
seed=${2:-0}
recipe=recipes/tldr/small
data=${RLGF_REAL_DATA:?names the folder that holds scitldr/train.jsonl.gz}/scitldr
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
# glibc gives large blocks back to the kernel and asks for them again at every step: up to two fifths of sft's CPU time
export MALLOC_MMAP_THRESHOLD_=536870912 MALLOC_TRIM_THRESHOLD_=2147483648
started=$SECONDS
fit='' few='' roll='' score=''
if [ -n "${RLGF_QUICK:-}" ]; then
    fit='--max-steps 10 --limit 64' few='--limit 16' score='--limit 8'
    roll='--max-steps 1 --limit 16 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

both() { # run the commands on stdin two at a time; stop at the first that fails
    xargs -P 2 -d '\n' -I{} bash -c '{}'
}

mkdir -p "$out/log"

echo "== sft: the starting policy and the guide" >&2
both <<END
rlgf sft -c $recipe/sft.yaml --data $data/train.jsonl.gz --seed $seed --resume $fit -o $out/sft 2>>$out/log/sft.log
rlgf sft -c $recipe/sft.yaml -c $recipe/guide.yaml --data $data/train.jsonl.gz --seed $seed --resume $fit -o $out/guide 2>>$out/log/guide.log
END

echo "== collect-guide: what the guide writes for the training prompts" >&2
rlgf collect-guide -c $recipe/collect_guide.yaml --guide "hf:$out/guide" --data "$data/train.jsonl.gz" --seed "$seed" --resume $few \
    -o "$out/guide.jsonl" 2>>"$out/log/collect_guide.log"

echo "== train: PPO and PPO++" >&2
common="-c $recipe/train.yaml --model $out/sft --data $data/train.jsonl.gz --eval-data $data/validation.jsonl.gz --seed $seed --resume $roll"
both <<END
rlgf train --alg ppo $common -o $out/ppo 2>>$out/log/ppo.log
rlgf train --alg ppo++ --guide $out/guide.jsonl $common -o $out/ppopp 2>>$out/log/ppopp.log
END

echo "== eval: the test split" >&2
for name in sft guide ppo ppopp; do
    echo "rlgf eval -c $recipe/eval.yaml --model $out/$name --data $data/test.jsonl.gz --seed $seed --resume $score -o $out/$name/eval >$out/log/eval_$name.txt 2>&1"
done | both

echo
rlgf compare "SFT=$out/sft" "guide=$out/guide" "PPO=$out/ppo" "PPO++=$out/ppopp" \
    --metrics rouge.rouge1,rouge.rougeL,length --overwrite -o "$out/table.json"
echo
echo "made in $((SECONDS - started)) s"
