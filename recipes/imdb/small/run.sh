#!/usr/bin/env bash
# Film reviews and a sentiment classifier as the reward, small enough for two CPU cores; everything from scratch.
#   RLGF_REAL_DATA=data bash recipes/imdb/small/run.sh [FOLDER] [SEED]
# $RLGF_REAL_DATA/imdb holds train, validation and test.jsonl.gz (whole reviews, meta.label) and a recorded API guide.
# RLGF_QUICK=1 runs every stage for a few steps only, to see that it works. Logs are in FOLDER/log.
# Finished stages are kept: the same command continues an interrupted run.
source "$(dirname "$0")/../../common.sh"
recipe=recipes/imdb/small out=${1:-runs/imdb-small} seed=${2:-0}
keep_freed_memory
source=${RLGF_REAL_DATA:?names the folder that holds imdb/train.jsonl.gz}/imdb
api_guide=$source/guide_gpt-3.5-turbo-0613.continue.jsonl.gz
most='' fit='' roll='' score=''
if [ -n "${RLGF_QUICK:-}" ]; then
    most=40 fit='--max-steps 2' score='--limit 8'
    roll='--max-steps 1 --episodes 8 --batch-size 8 --set eval.limit=4'
fi

mkdir -p "$out/log"
data=$out/data
python "$recipe/data.py" "$source" "$data" $most

echo "== sft and train-reward: the starting policy, the reward's classifier, a second classifier as judge" >&2
both <<END
rlgf sft -c $recipe/sft.yaml --data $data/windows.jsonl --seed $seed --resume $fit -o $out/sft 2>>$out/log/sft.log
rlgf train-reward -c $recipe/train_reward.yaml --model $recipe/classifier.yaml --data $data/windows.jsonl --eval-data $data/validation.jsonl --seed $seed --resume $fit -o $out/classifier 2>>$out/log/classifier.log
rlgf train-reward -c $recipe/train_reward.yaml --model $recipe/judge.yaml --data $data/windows.jsonl --eval-data $data/validation.jsonl --seed $((seed + 1)) --resume $fit -o $out/judge 2>>$out/log/judge.log
END

echo "== the guide: the starting policy trained further on positive reviews; its texts for the training prompts" >&2
rlgf sft -c $recipe/sft.yaml -c $recipe/guide.yaml --model "$out/sft" --data "$data/positive.jsonl" --seed "$seed" --resume $fit \
    -o "$out/guide" 2>>"$out/log/guide.log"
rlgf collect-guide -c $recipe/collect_guide.yaml --guide "hf:$out/guide" --data "$data/train.jsonl" --seed "$seed" --resume \
    -o "$out/guide.jsonl" 2>>"$out/log/collect_guide.log"

echo "== train: PPO, PPO++ with the guide's text, D2LOLS with the guide live, PPO++ with the recorded API guide" >&2
common="-c $recipe/train.yaml --model $out/sft --reward classifier:$out/classifier --eval-data $data/test.jsonl --seed $seed --resume $roll"
both <<END
rlgf train --alg ppo $common --data $data/train.jsonl -o $out/ppo 2>>$out/log/ppo.log
rlgf train --alg ppo++ --rollin-prob 0.6 --guide $out/guide.jsonl $common --data $data/train.jsonl -o $out/ppopp 2>>$out/log/ppopp.log
rlgf train -c $recipe/live.yaml --alg d2lols --switch-step 20 --guide hf:$out/guide $common --data $data/train.jsonl -o $out/d2lols 2>>$out/log/d2lols.log
rlgf train --alg ppo++ --rollin-prob 0.6 --guide $api_guide $common --data $data/api.jsonl -o $out/ppopp-api 2>>$out/log/ppopp-api.log
END

echo "== eval: held-out prompts, one sampled text each, scored by the reward's classifier and by the judge" >&2
metrics=reward:classifier:$out/classifier,reward:classifier:$out/judge,rouge,length
for name in sft guide ppo ppopp d2lols ppopp-api; do
    echo "rlgf eval -c $recipe/eval.yaml --model $out/$name --data $data/test.jsonl --metrics $metrics --seed $seed --resume $score -o $out/$name/eval >$out/log/eval_$name.txt 2>&1"
done | both

echo
echo "reward.classifier: P(positive) of the classifier that was the reward; reward.classifier#2: of the judge"
rlgf compare "SFT=$out/sft" "guide=$out/guide" "PPO=$out/ppo" "PPO++=$out/ppopp" "D2LOLS=$out/d2lols" \
    "PPO++ API=$out/ppopp-api" --metrics "reward.classifier,reward.classifier#2,rouge.rougeL" --overwrite -o "$out/table.json"
print_seconds ''
