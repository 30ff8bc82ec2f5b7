# Sourced first by the run.sh of commongen, imdb and tldr, which set recipe: go to the repository's root, set the defaults, prepare the data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-${recipe/recipes/runs}}
seed=${SEED:-0}
guide=${RLGF_GUIDE:-hf:$out/sft}
data=$out/data
train_flags=() eval_flags=()
if [ ! -e "$data" ]; then rlgf prepare -c $recipe/prepare.yaml --seed "$seed" -o "$data"; fi
