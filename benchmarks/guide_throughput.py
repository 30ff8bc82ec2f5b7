"""Speed and memory of ``rlgf collect-guide`` against a minimal program with the same result.

    python benchmarks/guide_throughput.py [--parts calls,replay,memory] [--requests 6400] [--cached 200000] ...

calls    requests a second from a local endpoint with 200 ms latency and 64 places, from one process with 64
         requests at once and from two with 32 each. The other side is the bare openai client in as many
         processes. The endpoint's clock decides: from the first request to the last answer.
replay   cached records that are written to a file in a second, all of the command counted. The other side reads
         the same records from the same cache and writes them as they are.
memory   peak resident memory for many prompts: replayed, and asked of the endpoint. The other side is the same
         for few prompts.

Both sides run in turn on the same machine; prints a table, and exit code 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from rlgf_cli.console import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from server_process import server_process

NOWHERE = "http://127.0.0.1:9/v1"
"""The address that the cached records are kept under; nobody listens there."""
CHILD = """
import json, resource, sys, time
began = time.perf_counter()
from rlgf_cli.cli.app import main
code = 0
try:
    main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
peak = used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
if sys.platform == "linux":  # where ru_maxrss is no less than that of the process that started this one
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10
found = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "mb": peak}
print(json.dumps(found), file=sys.__stdout__)
sys.exit(code)
"""
Row = list[str]


class Report:
    """The rows of the table, and the missed targets."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.missed: list[str] = []

    def add(self, what: str, ours: float, other: float, target: float, unit: str, *, most: bool = False) -> None:
        """``most``: the target is an upper limit, not a lower one."""
        sign = "<" if most else ">="
        self.rows.append(
            [what, f"{ours:,.0f} {unit}", f"{other:,.0f} {unit}", f"{ours / other:.2f}", f"{sign} {target:,.0f}"]
        )
        if (ours >= target) if most else (ours < target):
            self.missed.append(what)
        print(f"{what}: {ours:,.0f} {unit}, the other side {other:,.0f}", file=sys.stderr)


# --- the other sides ---


async def bare(url: str, count: int, concurrency: int) -> None:
    """``count`` requests with the openai client and nothing else."""
    import openai

    left = iter(range(count))

    async def work(client: openai.AsyncOpenAI) -> None:
        for n in left:
            answer = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": prompt(n)}], max_tokens=64, temperature=1.0, seed=n
            )
            assert answer.choices[0].message.content

    async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))


def copy_texts(cache: Path, out: Path) -> int:
    """All texts of a cache as JSON lines, in the order of their keys; returns how many."""
    import sqlite3

    count = 0
    with contextlib.closing(sqlite3.connect(cache / "guide.sqlite")) as db, out.open("w", encoding="utf-8") as file:
        for request, text, model in db.execute("SELECT request, text, model FROM texts ORDER BY key"):
            file.write(json.dumps({"request": request, "text": text, "model": model}) + "\n")
            count += 1
    return count


# --- processes ---


def endpoint(latency: float, limit: int) -> contextlib.AbstractContextManager[str]:
    program = Path(__file__).with_name("fake_endpoint.py")
    return server_process(program, "--latency", str(latency), "--limit", str(limit))


def stats(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats", timeout=30) as answer:
        return json.load(answer)


def collect(cache: Path, data: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = ["collect-guide", "--guide", "openai:m", "--data", str(data), "-o", str(out), *more]
    variables = {**os.environ, "RLGF_CACHE_DIR": str(cache), "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    variables.pop("OPENAI_API_KEY", None)
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The measurements of a process of :func:`collect`."""
    out, err = process.communicate()
    if process.returncode:
        sys.exit(f"collect-guide failed:\n{err}")
    return json.loads(out.splitlines()[-1])


# --- data ---


def prompt(n: int) -> str:
    return f"Write a sentence with these words: cat {n} tree garden"


def write_prompts(path: Path, count: int, first: int = 0) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for n in range(first, first + count):
            file.write(json.dumps({"id": f"p{n}", "prompt": prompt(n)}) + "\n")
    return path


def fill_cache(cache: Path, count: int) -> None:
    """Put an answer for each of the first ``count`` prompts into a cache."""
    from rlgf_cli.config.guide import GuideConfig
    from rlgf_cli.guides.make import make_live_guide
    from rlgf_cli.ledger.store import FILE, Store, StoredText
    from rlgf_cli.protocols import Example, GuideRequest

    config = GuideConfig(name="openai:m", base_url=NOWHERE, mode="replay")
    with (
        contextlib.closing(make_live_guide(config, seed=0)) as guide,
        contextlib.closing(Store(cache / FILE)) as store,
    ):
        for start in range(0, count, 5000):
            texts = []
            for n in range(start, min(count, start + 5000)):
                request = GuideRequest(Example(f"p{n}", prompt(n)), sample_index=0, max_new_tokens=64)
                text = StoredText(
                    guide="openai:m", request=guide.request_json(request), text=f"the cat sits in tree {n} .",
                    finish_reason="stop", model="m-0613", prompt_bytes=70, prompt_tokens=12, completion_tokens=8,
                )  # fmt: skip
                texts.append((guide.key(request), text))
            store.put(texts)


# --- the parts ---


def measure_calls(options: argparse.Namespace, folder: Path, report: Report) -> None:
    possible = options.limit / options.latency
    for processes, target in ((1, 200 / 320 * possible), (2, 0.9 * possible)):
        each, at_once = options.requests // processes, options.limit // processes
        data = [write_prompts(folder / f"data-{n}.jsonl", each, n * each) for n in range(processes)]
        with endpoint(options.latency, options.limit) as url:
            program = [sys.executable, __file__, "--bare", url, "--requests", str(each), "--limit", str(at_once)]
            for process in [subprocess.Popen(program) for _ in range(processes)]:
                if process.wait():
                    sys.exit("the bare client failed")
            other = stats(url)
            cache = folder / f"cache-{processes}"  # of both
            running = [
                collect(
                    cache, data[n], folder / f"guide-{processes}-{n}.jsonl", "--base-url", url,
                    "--concurrency", str(at_once),
                )
                for n in range(processes)
            ]  # fmt: skip
            measured = [ended(process) for process in running]
            ours = stats(url)
        assert ours["answered"] == other["answered"] == each * processes
        what = f"requests/s, {processes} x {at_once} at once"
        rates = [found["answered"] / found["seconds"] for found in (ours, other)]
        report.add(what, rates[0], rates[1], target, "/s")
        cpu = 1000 * sum(found["cpu"] for found in measured) / ours["answered"]
        print(f"  {cpu:.2f} ms of CPU a request; at most {ours['most_in_flight']} in flight", file=sys.stderr)


def replay(folder: Path, count: int) -> dict[str, Any]:
    data, out = folder / "prompts.jsonl", folder / "replayed.jsonl"
    write_prompts(data, count)
    found = ended(collect(folder / "cache", data, out, "--base-url", NOWHERE, "--guide-mode", "replay", "--overwrite"))
    with out.open("rb") as file:
        assert sum(1 for _ in file) == count
    out.unlink()
    return found


def measure_replay(options: argparse.Namespace, folder: Path, report: Report) -> None:
    fill_cache(folder / "cache", options.cached)
    seconds = min(replay(folder, options.cached)["seconds"] for _ in range(options.runs))
    floor = []
    for _ in range(options.runs):
        began = time.perf_counter()
        count = copy_texts(folder / "cache", folder / "copied.jsonl")
        floor.append(time.perf_counter() - began)
    assert count == options.cached
    report.add("cached records/s, start and end included", count / seconds, count / min(floor), 20_000, "/s")
    start = replay(folder, 1)["seconds"]
    print(f"  {count / (seconds - start):,.0f}/s without the {start:.2f} s that one record takes", file=sys.stderr)


def measure_memory(options: argparse.Namespace, folder: Path, report: Report) -> None:
    few, many = options.memory
    fill_cache(folder / "cache", many)
    peaks = [replay(folder, count)["mb"] for count in (few, many)]
    what = f"MB for {many:,} prompts and for {few:,}, replayed"
    report.add(what, peaks[1], peaks[0], peaks[0] + 50, "MB", most=True)
    few, many = options.memory_asked
    peaks = []
    with endpoint(0.0, options.limit) as url:
        for count in (few, many):
            data = write_prompts(folder / "prompts.jsonl", count)
            running = collect(
                folder / f"asked-{count}", data, folder / f"asked-{count}.jsonl",
                "--base-url", url, "--concurrency", str(options.limit),
            )  # fmt: skip
            peaks.append(ended(running)["mb"])
    what = f"MB for {many:,} prompts and for {few:,}, asked"
    report.add(what, peaks[1], peaks[0], peaks[0] + 50, "MB", most=True)


PARTS = {"calls": measure_calls, "replay": measure_replay, "memory": measure_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--requests", type=int, default=6400, help="of calls, in all")
    parser.add_argument("--latency", type=float, default=0.2, help="of the endpoint, in seconds")
    parser.add_argument("--limit", type=int, default=64, help="requests that the endpoint works on at a time")
    parser.add_argument("--cached", type=int, default=200_000, help="records of replay")
    parser.add_argument("--runs", type=int, default=2, help="of replay; the fastest counts, on both sides")
    parser.add_argument("--memory", type=int, nargs=2, default=(10_000, 1_000_000), metavar=("FEW", "MANY"))
    parser.add_argument("--memory-asked", type=int, nargs=2, default=(1_000, 20_000), metavar=("FEW", "MANY"))
    parser.add_argument("--folder", help="where the files go for the time being; default: the system's")
    parser.add_argument("--bare", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        asyncio.run(bare(options.bare, options.requests, options.limit))
        return
    report = Report()
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            PARTS[part](options, Path(folder), report)
    print(table(["what", "rlgf", "other side", "ratio", "target"], report.rows))
    if report.missed:
        print(f"missed: {', '.join(report.missed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
