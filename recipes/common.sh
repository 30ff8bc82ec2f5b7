# Sourced first by the recipes for two CPU cores: go to the repository's root, one thread per process, no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
started=$SECONDS

if ((BASH_VERSINFO[0] < 4)) || ! xargs --version >/dev/null 2>&1; then
    echo "error: the recipes need bash 4 and GNU xargs and find (on macOS: brew install bash findutils, with gnubin on the PATH)" >&2
    exit 2
fi
trap finish EXIT

both() { # run the commands on stdin two at a time; after one that fails no other is begun
    xargs -P 2 -d '\n' -I'<>' bash -c '(<>) || exit 255' 2> >(grep -v '^xargs: ' >&2)
}

finish() { # where the script failed: the ends of the logs that hold an error
    local status=$? log
    stop_progress
    [ $status != 0 ] && [ -d "${out:-}/log" ] || return 0
    grep -lE '^(error|interrupted|Traceback)' "$out"/log/*.log 2>/dev/null | while read -r log; do
        printf '\n%s:\n' "$log"
        tail -n 5 "$log"
    done >&2
    echo "stopped; the logs are in $out/log" >&2
}

keep_freed_memory() { # glibc returns large blocks to the kernel and requests them again at every step: up to 2/5 of sft's CPU time
    export MALLOC_MMAP_THRESHOLD_=536870912 MALLOC_TRIM_THRESHOLD_=2147483648
}

show_progress() { # every ten seconds, until stop_progress or the end, the last lines of the logs in folder $1 that have grown
    while sleep 10 >/dev/null 2>&1; do
        find "$1" -name '*.log' -newermt '-10 seconds' | sort | while read -r log; do
            printf '%5d s  %-16s %s\n' $((SECONDS - started)) "$(basename "$log" .log)" "$(grep . "$log" | tail -n 1 | cut -c 1-100)" >&2
        done
    done &
    progress=$!
}

stop_progress() {
    [ -z "${progress:-}" ] || kill "$progress" 2>/dev/null || true
    progress=''
}

shown_name() { # of a system of the sentences: clone_grpo as clone+grpo, more_grpo as clone_more+grpo
    case $1 in
        more_*) echo "clone_more+${1#more_}" ;;
        clone_more) echo "$1" ;;
        *) echo "${1/#clone_/clone+}" ;;
    esac
}

of_all_seeds() { # a system's name and its runs under $root, one per seed of $seeds
    echo "$1=$(printf "$root/seed_%s/$2\n" $seeds | paste -sd ,)"
}

compare_with() { # a table of all "${systems[@]}" with their differences to the one called $1; further options of rlgf compare follow
    local base=$1 system first=() others=()
    shift
    for system in "${systems[@]}"; do
        if [ "${system%%=*}" = "$base" ]; then first=("$system"); else others+=("$system"); fi
    done
    echo
    echo "all seeds, differences to $base"
    rlgf compare "${first[@]}" "${others[@]}" "$@" --overwrite -o "$root/table_$base.json"
}

print_seconds() {
    echo
    echo "made in $((SECONDS - started)) s$1"
}
