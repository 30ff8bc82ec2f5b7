# Sourced by small recipes: SFT of the starting policy and of the guide on the file $train.
echo "== sft: the starting policy and the guide" >&2
both <<END
rlgf sft -c $recipe/sft.yaml --data $train --seed $seed --resume $fit -o $out/sft 2>>$out/log/sft.log
rlgf sft -c $recipe/sft.yaml -c $recipe/guide.yaml --data $train --seed $seed --resume $fit -o $out/guide 2>>$out/log/guide.log
END
