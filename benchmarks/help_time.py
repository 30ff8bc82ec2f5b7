"""Time of ``rlgf --help`` and of every command's help, against the help of an empty typer program.

    python benchmarks/help_time.py [--runs 15] [--limit 1.5]

The two are run in turn, with one interpreter, and the ratio is taken pair by pair, so that a machine that
speeds up or slows down does not decide. Times are CPU seconds of the process (both use one thread and wait
for nothing): on an idle machine they are the seconds that a user waits, on a busy one they stay the same.
Prints a table; exit code 1 where a median ratio is above the limit.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlgf_cli.cli.commands import COMMANDS
from rlgf_cli.console import table

EMPTY = '''\
import typer

app = typer.Typer()


@app.command()
def hello(name: str = "you") -> None:
    """Say hello."""
    print(name)


app()
'''


def seconds(command: list[str]) -> float:
    """CPU time of one run, user and system; its output is thrown away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env={**os.environ, "COLUMNS": "100"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def compare(ours: list[str], empty: list[str], runs: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the paired ratios."""
    seconds(ours), seconds(empty)  # a first run each, to warm the disk's cache
    pairs = []
    for n in range(runs):
        first = seconds(ours) if n % 2 else None
        base = seconds(empty)
        pairs.append((seconds(ours) if first is None else first, base))
    ratios = [mine / base for mine, base in pairs]
    return (*(statistics.median(column) for column in zip(*pairs, strict=True)), statistics.median(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="pairs per command")
    parser.add_argument("--limit", type=float, default=1.5, help="the largest median ratio that passes")
    options = parser.parse_args()
    start = "import sys; from rlgf_cli.cli.app import main; main(sys.argv[1:])"
    rows, over = [], []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "empty.py"
        program.write_text(EMPTY, encoding="utf-8")
        for name in ("", *COMMANDS):
            words = [name, "--help"] if name else ["--help"]
            mine, base, ratio = compare(
                [sys.executable, "-c", start, *words], [sys.executable, str(program), "--help"], options.runs
            )
            rows.append([" ".join(["rlgf", *words]), f"{mine:.3f}", f"{base:.3f}", f"{ratio:.2f}"])
            if ratio > options.limit:
                over.append(rows[-1][0])
    print(table(["command", "CPU seconds", "empty program", "ratio"], rows))
    if over:
        print(f"above {options.limit}: {', '.join(over)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
