#!/usr/bin/env bash
# The pipeline in bfloat16 on a device, and rollouts and updates of a model of 1.5B parameters, with one table at the end.
#   bash benchmarks/gpu.sh [--device cuda|cpu] [FOLDER]
# SmolLM2-135M-Instruct (smollm2): sft, collect-guide from the result, train ppo++ and grpo with LoRA, eval. Random weights of Qwen2's 1.5B
# config: train grpo with LoRA and with all weights. On a GPU less than ten minutes; on a CPU everything is small, to see that it runs.
# PYTHON names the interpreter that rlgf is installed in (default: python3).
set -euo pipefail
device=cuda
if [ "${1:-}" = --device ]; then
    device=$2
    shift 2
fi
out=${1:-runs/gpu}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=false
if [ -e "$out" ]; then
    echo "error: $out is already there; remove it or name another folder" >&2
    exit 2
fi

case $device in
cuda*)
    layers=28 width=1536 steps=5 episodes=128 minibatch=32 tokens=64 long=128 texts=256 sft_steps=20
    ;;
*)
    echo "no GPU: $device, and everything is small; the figures say only that it runs" >&2
    layers=2 width=64 steps=2 episodes=16 minibatch=16 tokens=8 long=8 texts=16 sft_steps=2
    ;;
esac

mkdir -p "$out"
"$python" "$here/../recipes/synthetic/grammar.py" "$out/grammar"
"$python" "$here/gpu.py" prepare "$out" --device "$device" --layers "$layers" --width "$width"
"$python" "$here/gpu.py" ceilings "$out" --device "$device"

stage() { # NAME ARGUMENTS...: rlgf with these arguments; seconds and peak memory into FOLDER/NAME.stage.json
    local name=$1
    shift
    echo "== $name" >&2
    "$python" "$here/gpu.py" stage "$out" "$name" -- "$@" --device "$device" --dtype bfloat16 -o "$out/$name" 2>"$out/$name.log" || {
        tail -n 20 "$out/$name.log" >&2
        exit 1
    }
}

data="--data $out/train.jsonl"
# the first step of a training is not counted
train="$data --epochs 1 --max-steps $steps --set rollout.episodes=$episodes --set rollout.batch_size=$episodes
    --batch-size $minibatch --set rollout.save_every=0 --set save_best=false"
stage sft sft --model smollm2 $data --batch-size 16 --max-steps "$sft_steps" --max-new-tokens "$tokens"
stage guide.jsonl collect-guide --guide "hf:$out/sft" $data --limit "$texts" --max-new-tokens "$tokens" --temperature 1 --batch-size 64
stage ppopp train --alg ppo++ --model smollm2 --reward coverage --guide "$out/guide.jsonl" $train --limit "$texts" --max-new-tokens "$tokens"
stage grpo_lora train --alg grpo --group-size 8 --model smollm2 --reward coverage --use-peft --lora-r 16 --lora-target-modules all-linear $train \
    --max-new-tokens "$tokens"
stage eval eval --model "$out/grpo_lora" --data "$out/test.jsonl" --limit "$texts" --metrics reward:coverage --max-new-tokens "$tokens"
qwen2="--alg grpo --group-size 8 --model $out/qwen2 --reward $here/gpu.py:letters $train --max-new-tokens $long"
stage qwen2_lora train $qwen2 --use-peft --lora-r 16 --lora-target-modules all-linear
stage qwen2_full train $qwen2
"$python" "$here/gpu.py" table "$out"
