# Sourced by commongen/small and tldr/small after their data: SFT of the policy and of the guide, the guide's texts, PPO and PPO++,
# evaluation, and a table. The caller sets recipe, out, seed, train, held_out, test, eval_of, metrics and the limits fit, few, roll, score.
source recipes/small_sft.sh

echo "== collect-guide: the guide's texts for the training prompts" >&2
rlgf collect-guide -c $recipe/collect_guide.yaml --guide "hf:$out/guide" --data "$train" --seed "$seed" --resume $few \
    -o "$out/guide.jsonl" 2>>"$out/log/collect_guide.log"

echo "== train: PPO and PPO++" >&2
common="-c $recipe/train.yaml --model $out/sft --data $train --eval-data $held_out --seed $seed --resume $roll"
both <<END
rlgf train --alg ppo $common -o $out/ppo 2>>$out/log/ppo.log
rlgf train --alg ppo++ --guide $out/guide.jsonl $common -o $out/ppopp 2>>$out/log/ppopp.log
END

echo "== eval: $eval_of" >&2
for name in sft guide ppo ppopp; do
    echo "rlgf eval -c $recipe/eval.yaml --model $out/$name --data $test --seed $seed --resume $score -o $out/$name/eval >$out/log/eval_$name.txt 2>&1"
done | both

echo
rlgf compare "SFT=$out/sft" "guide=$out/guide" "PPO=$out/ppo" "PPO++=$out/ppopp" \
    --metrics "$metrics" --overwrite -o "$out/table.json"
print_seconds ''
