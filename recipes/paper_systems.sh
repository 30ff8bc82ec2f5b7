# Sourced by the run.sh of commongen, imdb and tldr after SFT: the guide's texts, each algorithm with the paper's settings, evaluation,
# and a table. The caller sets test, and in train_flags and eval_flags more flags of both commands, if any.
if [ $# -eq 0 ]; then set -- ppo ppo++ aggrevated lols d2lols; fi
if [[ " $* " == *" ppo++ "* ]]; then # the only algorithm that uses recorded text alone
    rlgf collect-guide -c $recipe/collect_guide.yaml --guide "$guide" --data "$data/train.jsonl" --seed "$seed" --resume \
        -o "$out/guide.jsonl"
fi

rlgf eval -c $recipe/eval.yaml --model "$out/sft" --data "$test" "${eval_flags[@]}" --seed "$seed" --resume
systems=("SFT=$out/sft")
for algorithm in "$@"; do
    case $algorithm in
        ppo) with=() ;;
        ppo++) with=(--guide "$out/guide.jsonl") ;;
        *) with=(--guide "$guide") ;;
    esac
    rlgf train -c $recipe/train.yaml -c "$recipe/alg/$algorithm.yaml" --model "$out/sft" --data "$data/train.jsonl" \
        --eval-data "$data/validation.jsonl" "${train_flags[@]}" "${with[@]}" --seed "$seed" --resume -o "$out/$algorithm"
    rlgf eval -c $recipe/eval.yaml --model "$out/$algorithm" --data "$test" "${eval_flags[@]}" --seed "$seed" --resume
    systems+=("$algorithm=$out/$algorithm")
done
rlgf compare "${systems[@]}" --overwrite -o "$out/table.json"
