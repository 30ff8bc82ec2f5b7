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

show_progress() { # every ten seconds, until stop_progress or the end, the last lines of the logs in folder $1 that have grown
    while sleep 10; do
        for log in $(find "$1" -name '*.log' -newermt '-10 seconds' | sort); do
            printf '%5d s  %-16s %s\n' $((SECONDS - started)) "$(basename "$log" .log)" "$(grep . "$log" | tail -n 1 | cut -c 1-100)" >&2
        done
    done &
    progress=$!
    trap stop_progress EXIT
}

stop_progress() {
    kill "$progress" 2>/dev/null || true
}

print_seconds() {
    echo
    echo "made in $((SECONDS - started)) s$1"
}
