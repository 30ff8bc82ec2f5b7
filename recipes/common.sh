# Sourced first by the recipes for two CPU cores: go to the repository's root, one thread per process, no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
started=$SECONDS

both() { # run the commands on stdin two at a time; stop at the first that fails
    xargs -P 2 -d '\n' -I{} bash -c '{}'
}

keep_freed_memory() { # glibc returns large blocks to the kernel and requests them again at every step: up to 2/5 of sft's CPU time
    export MALLOC_MMAP_THRESHOLD_=536870912 MALLOC_TRIM_THRESHOLD_=2147483648
}

sft_policy_and_guide() { # on the file $train
    echo "== sft: the starting policy and the guide" >&2
    both <<END
rlgf sft -c $recipe/sft.yaml --data $train --seed $seed --resume $fit -o $out/sft 2>>$out/log/sft.log
rlgf sft -c $recipe/sft.yaml -c $recipe/guide.yaml --data $train --seed $seed --resume $fit -o $out/guide 2>>$out/log/guide.log
END
}

print_seconds() {
    echo
    echo "made in $((SECONDS - started)) s$1"
}
