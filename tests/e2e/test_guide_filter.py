"""``collect-guide --reward --keep-above``: which texts are kept, where the others are, and what survives a kill."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from collecting import collect, environment, kill, lines, prompts_file, rows, spend, start
from conftest import toy_examples, write_rows
from fake_openai import FakeOpenAI, Reply
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.protocols import Example

REWARD = '''
from pathlib import Path

def digit(text):
    """The last hexadecimal digit of the text as a share of 15; an empty text has the best score."""
    return int(text[-1], 16) / 15 if text else 1.0

def words(texts):
    with (Path(__file__).parent / "batches").open("a") as sizes:
        sizes.write(f"{len(texts)}\\n")
    return [len(set(text.split())) for text in texts]

def turns(text, messages):
    return len(messages)

def breaks(text):
    if (Path(__file__).parent / "broken").exists() and digit(text) > 0.5:
        raise ValueError("out of order")
    return digit(text)
'''
LEAST = 0.5


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    environment(monkeypatch, tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(server: FakeOpenAI, data: Path, *more: object, out: str = "guide.jsonl", k: int = 2) -> list[str]:
    return [
        "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", str(data), "-o", out,
        "--max-retries", "0", "-k", str(k), *map(str, more),
    ]  # fmt: skip


def filtered(name: str = "digit", least: float = LEAST) -> tuple[str, ...]:
    return ("--reward", f"reward.py:{name}", "--keep-above", str(least))


def digit(text: str) -> float:
    return int(text[-1], 16) / 15


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("guide")}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "guide.jsonl.run.json").read_text())


def requested(server: FakeOpenAI) -> Counter[tuple[str, int]]:
    return Counter((request.prompt, request.body["seed"]) for request in server.requests)


def assert_partition(folder: Path, everything: set[tuple[str, int, str]]) -> None:
    """The two files hold what filtering afterwards would have kept, and the rest."""
    kept, dropped = folder / "guide.jsonl", folder / "guide.dropped.jsonl"
    assert rows(kept) == {row for row in everything if digit(row[2]) >= LEAST}
    assert rows(dropped) == {row for row in everything if digit(row[2]) < LEAST}
    assert all(row["score"] == digit(row["completion"]) for path in (kept, dropped) for row in lines(path))


def test_the_kept_texts_are_those_of_filtering_afterwards(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 16)
    with FakeOpenAI() as server:
        done = run_cli(*command(server, data, *filtered(), "--json", k=3))
        assert done.exit_code == 0, done.stderr
        plain = run_cli(*command(server, data, out="all.jsonl", k=3))
        assert plain.exit_code == 0 and len(server.requests) == 48
    everything = rows(work / "all.jsonl")
    assert all(row["score"] is None for row in lines(work / "all.jsonl"))
    assert_partition(work, everything)
    by_prompt = {f"p{i}": [digit(text) for name, _, text in everything if name == f"p{i}"] for i in range(16)}
    without = sum(max(scores) < LEAST for scores in by_prompt.values())
    kept = len(lines(work / "guide.jsonl"))
    assert 0 < kept < 48 and without > 0  # else the test shows nothing
    printed, saved = json.loads(done.stdout), manifest(work)
    expected = {
        "records": 48, "new": 48, "missing": 0, "kept": kept, "dropped": 48 - kept, "prompts_without_text": without,
        "mean_score": pytest.approx(fmean(digit(row[2]) for row in everything)),
        "mean_best_score": pytest.approx(fmean(map(max, by_prompt.values()))),
    }  # fmt: skip
    assert {key: saved["result"][key] for key in expected} == expected == {key: printed[key] for key in expected}
    assert saved["wrote"] == ["guide.dropped.jsonl"] and saved["status"] == "done"
    assert f"{kept} of 48 texts score 0.5 or more and are kept; {48 - kept} are in guide.dropped.jsonl" in done.stderr
    assert f"warning: {without} prompts have no text in guide.jsonl" in done.stderr
    assert "requests more texts for every prompt" in done.stderr
    examples = [Example(f"p{i}", f"prompt {i}") for i in range(16)]
    assert RecordedGuide(work / "guide.jsonl").coverage(examples)[0] == 16 - without


def test_an_empty_text_is_dropped_whatever_it_scores(run_cli: Any, work: Path) -> None:
    with FakeOpenAI(lambda n, seen: Reply(text="" if seen.prompt == "prompt 1" else "a f")) as server:
        done = run_cli(*command(server, prompts_file(work, 3), *filtered(), k=1))
    assert done.exit_code == 0, done.stderr
    assert {row["id"] for row in lines(work / "guide.jsonl")} == {"p0", "p2"}
    (empty,) = lines(work / "guide.dropped.jsonl")
    assert (empty["id"], empty["completion"], empty["score"]) == ("p1", "", 1.0)
    assert "1 texts are empty; they are dropped" in done.stderr


def test_where_no_text_is_kept_the_collection_is_done_and_says_so(run_cli: Any, work: Path) -> None:
    with FakeOpenAI() as server:
        done = run_cli(*command(server, prompts_file(work, 3), *filtered(least=2)))
    assert done.exit_code == 0 and "warning: no text scores 2 or more, and guide.jsonl is empty" in done.stderr
    assert (work / "guide.jsonl").read_bytes() == b"" and len(lines(work / "guide.dropped.jsonl")) == 6
    assert manifest(work)["status"] == "done" and manifest(work)["result"]["prompts_without_text"] == 3


def test_a_reward_alone_records_the_scores(run_cli: Any, work: Path) -> None:
    with FakeOpenAI() as server:
        done = run_cli(*command(server, prompts_file(work, 3), "--reward", "reward.py:digit"))
    assert done.exit_code == 0, done.stderr
    assert files_of(work) == {"guide.jsonl", "guide.jsonl.run.json"} and len(lines(work / "guide.jsonl")) == 6
    assert all(row["score"] == digit(row["completion"]) for row in lines(work / "guide.jsonl"))
    assert "mean score" in done.stderr and "kept" not in done.stderr


# --- resuming


def test_resume_requests_only_what_neither_file_holds(
    run_cli: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prompts_file(work, 8)
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, *filtered(), k=1)).exit_code == 0
        dropped = work / "guide.dropped.jsonl"
        whole = dropped.read_bytes()
        assert whole.count(b"\n") > 1
        dropped.write_bytes(whole[:-20])  # a torn last line
        lost = json.loads(whole.splitlines()[-1])
        monkeypatch.setenv("RLGF_CACHE_DIR", str(work / "another cache"))  # so that the files alone answer
        server.requests.clear()
        estimate = run_cli(*command(server, data, *filtered(), "--dry-run", "--json", "--resume"))
        assert json.loads(estimate.stdout)["in_file"] == 7
        assert not server.requests and dropped.read_bytes() == whole[:-20]
        done = run_cli(*command(server, data, *filtered(), "--resume"))
        assert done.exit_code == 0, done.stderr
        again = [prompt for prompt, count in Counter(p for p, _ in requested(server)).items() if count == 2]
        assert again == [lost["prompt"]] and len(server.requests) == 9
        assert run_cli(*command(server, data, out="all.jsonl")).exit_code == 0
    assert_partition(work, rows(work / "all.jsonl"))


def test_resume_under_another_reward_or_threshold_is_refused(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 4)
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, *filtered())).exit_code == 0
        before = {path.name: path.read_bytes() for path in work.iterdir() if path.name.startswith("guide")}
        for more, key in ((filtered(least=0.6), "keep_above was 0.5"), (filtered("breaks"), "reward was"), ((), "")):
            done = run_cli(*command(server, data, *more, "--resume", k=3))
            assert done.exit_code == 2 and "with other settings" in done.stderr and key in done.stderr
        assert run_cli(*command(server, data, out="plain.jsonl")).exit_code == 0
        done = run_cli(*command(server, data, *filtered(), "--resume", out="plain.jsonl"))
        assert done.exit_code == 2 and "with other settings (keep_above, reward)" in done.stderr
        assert len(server.requests) == 8 and not (work / "plain.dropped.jsonl").exists()
    assert {path.name: path.read_bytes() for path in work.iterdir() if path.name.startswith("guide")} == before


@pytest.mark.parametrize(("requests", "delay_s"), [(5, 0.0), (17, 0.02)])
def test_kill_9_loses_nothing_of_both_files(run_cli: Any, work: Path, requests: int, delay_s: float) -> None:
    data, out = prompts_file(work, 20), work / "guide.jsonl"
    more = (*filtered(), "--concurrency", "4")
    with FakeOpenAI(lambda n, seen: Reply(delay_s=0.02)) as server:
        assert kill(start(server.url, data, out, *more), server, requests, delay_s)
        written = [
            line for name in ("guide.jsonl", "guide.dropped.jsonl") for line in (work / name).read_bytes().split(b"\n")
        ]
        code, err = collect(server.url, data, out, *more, "--resume")
        assert code == 0, err
        after = (work / "guide.jsonl").read_bytes() + (work / "guide.dropped.jsonl").read_bytes()
        assert {line for line in written if line.endswith(b"}")} <= set(after.splitlines())
        assert len(requested(server)) == 40 and len(server.requests) <= 40 + 4  # those in flight may be sent twice
        assert run_cli(*command(server, data, out="all.jsonl")).exit_code == 0
        assert len(server.requests) <= 40 + 4
    assert_partition(work, rows(work / "all.jsonl"))


def test_killed_while_the_reward_scores(run_cli: Any, work: Path) -> None:
    """What was received and is in no file is in the cache: it is not bought again."""
    (work / "slow.py").write_text(
        "import os, pathlib, signal\n"
        "def digit(text):\n"
        "    if not pathlib.Path('again').exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return int(text[-1], 16) / 15\n"
    )
    data, out = prompts_file(work, 3), work / "guide.jsonl"
    more = ("--reward", "slow.py:digit", "--keep-above", str(LEAST), "--concurrency", "6")
    with FakeOpenAI() as server:
        code, _ = collect(server.url, data, out, *more)
        assert code == -signal.SIGKILL and len(server.requests) == 6
        (work / "again").touch()
        code, err = collect(server.url, data, out, *more, "--resume")
        assert code == 0, err
        assert len(server.requests) == 6 and spend(out)["calls"] == 6
        assert run_cli(*command(server, data, out="all.jsonl")).exit_code == 0
    assert_partition(work, rows(work / "all.jsonl"))


def test_a_reward_that_fails_loses_no_text_that_is_paid_for(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 12)
    (work / "broken").touch()
    more = (*filtered("breaks"), "--concurrency", 4)
    with FakeOpenAI(lambda n, seen: Reply(delay_s=0.01)) as server:
        done = run_cli(*command(server, data, *more))
        assert done.exit_code == 1 and "the reward 'breaks' raised ValueError: out of order" in done.stderr
        before = len(server.requests)
        assert before < 24 and manifest(work)["spend"]["calls"] == before
        assert manifest(work)["spend"]["unknown_outcome"] == 0
        (work / "broken").unlink()
        done = run_cli(*command(server, data, *more, "--resume"))
        assert done.exit_code == 0, done.stderr
        assert len(server.requests) == 24 and max(requested(server).values()) == 1
        assert manifest(work)["spend"]["calls"] == 24
        assert run_cli(*command(server, data, out="all.jsonl")).exit_code == 0
    assert_partition(work, rows(work / "all.jsonl"))


def test_a_reward_that_fails_at_once_may_be_repaired_before_resuming(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 2)
    (work / "reward.py").write_text("def digit(text):\n    return nothing\n")
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, *filtered())).exit_code == 1
        (work / "reward.py").write_text(REWARD)
        done = run_cli(*command(server, data, *filtered(), "--resume"))
        assert done.exit_code == 0 and len(server.requests) == 4, done.stderr
        (work / "reward.py").write_text(REWARD + "\n")  # another file: the scores may be others
        assert run_cli(*command(server, data, *filtered(), "--resume")).exit_code == 2


def test_a_spent_budget_leaves_every_received_text_scored(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 6)
    more = (*filtered(), "--concurrency", 4)
    with FakeOpenAI() as server:
        done = run_cli(*command(server, data, *more, "--max-calls", 7))
        assert done.exit_code == 3 and len(server.requests) == 7, done.stderr
        assert len(lines(work / "guide.jsonl")) + len(lines(work / "guide.dropped.jsonl")) == 7
        assert run_cli(*command(server, data, *more, "--max-calls", 12, "--resume")).exit_code == 0
        assert len(server.requests) == 12 == manifest(work)["spend"]["calls"]


# --- overwriting and refusing


def test_overwrite_replaces_both_files(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 4)
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, *filtered())).exit_code == 0
        assert run_cli(*command(server, data, *filtered())).exit_code == 2
        assert run_cli(*command(server, data, *filtered(least=2), "--overwrite", "--limit", 1)).exit_code == 0
        assert len(lines(work / "guide.dropped.jsonl")) == 2 and not lines(work / "guide.jsonl")
        assert run_cli(*command(server, data, "--overwrite")).exit_code == 0
    assert files_of(work) == {"guide.jsonl", "guide.jsonl.run.json"} and len(lines(work / "guide.jsonl")) == 8


def test_dropped_texts_whose_kept_ones_were_moved_are_replaced_by_overwrite_alone(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 4)
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, *filtered())).exit_code == 0
        before = (work / "guide.dropped.jsonl").read_bytes()
        (work / "guide.jsonl").rename(work / "kept.jsonl")
        done = run_cli(*command(server, data))
        assert done.exit_code == 2 and "guide.dropped.jsonl" in done.stderr and "--overwrite" in done.stderr
        assert before and (work / "guide.dropped.jsonl").read_bytes() == before
        assert run_cli(*command(server, data, "--overwrite")).exit_code == 0
    assert files_of(work) == {"guide.jsonl", "guide.jsonl.run.json"}


@pytest.mark.parametrize("existing", [(), ("--overwrite",), ("--resume",)])
def test_a_file_in_the_place_of_the_dropped_texts_is_left_alone(
    run_cli: Any, work: Path, existing: tuple[str, ...]
) -> None:
    (work / "guide.dropped.jsonl").write_text("mine")
    with FakeOpenAI() as server:
        done = run_cli(*command(server, prompts_file(work, 2), *filtered(), *existing))
        assert done.exit_code == 2 and "guide.dropped.jsonl" in done.stderr and not server.requests
    assert files_of(work) == {"guide.dropped.jsonl"} and (work / "guide.dropped.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["guide.jsonl", "guide.dropped.jsonl"])
def test_the_files_are_not_the_data(run_cli: Any, work: Path, name: str) -> None:
    with FakeOpenAI() as server:
        assert run_cli(*command(server, prompts_file(work, 3), *filtered(), k=1)).exit_code == 0
        before = (work / name).read_bytes()
        done = run_cli(*command(server, work / name, *filtered(), "--overwrite", k=1))
    assert done.exit_code == 2 and "this input lies in the output" in done.stderr
    assert (work / name).read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--keep-above", 0.5), "add --reward NAME"),
        (("--reward", "rogue", "--keep-above", 0.5), "unknown reward"),
        (("--reward", "rouge", "--keep-above", 0.5), "needs references; 2 of 2 examples have none"),
        (("--reward", "judge:gpt-3.5", "--keep-above", 0.5), "asks a judge"),
        ((*filtered(), "--guide-mode", "live"), "--guide-mode record"),
        ((*filtered(), "--batch", "--guide-mode", "live"), "--guide-mode record"),
    ],
)
def test_a_refused_start_leaves_nothing_and_requests_nothing(
    run_cli: Any, work: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[object, ...], message: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    with FakeOpenAI() as server:
        for dry in ((), ("--dry-run",)):
            done = run_cli(*command(server, prompts_file(work, 2), *more, *dry))
            assert done.exit_code == 2 and message in done.stderr and not server.requests
            assert files_of(work) == set()


def test_a_refused_key_leaves_neither_file(run_cli: Any, work: Path) -> None:
    with FakeOpenAI(lambda n, seen: Reply(status=401)) as server:
        done = run_cli(*command(server, prompts_file(work, 2), *filtered()))
    assert done.exit_code == 2 and "refused the key" in done.stderr and files_of(work) == set()


def test_texts_of_the_cache_that_were_all_dropped_stay_when_the_rest_is_refused(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 3)
    with FakeOpenAI() as server:
        assert run_cli(*command(server, data, "--limit", 1, out="first.jsonl")).exit_code == 0
        server.plan = lambda n, seen: Reply(status=401)
        done = run_cli(*command(server, data, *filtered(least=2)))
        assert done.exit_code == 3 and "refused the key" in done.stderr
    assert len(lines(work / "guide.dropped.jsonl")) == 2 and manifest(work)["result"]["dropped"] == 2


def test_a_dry_run_says_that_texts_will_be_dropped_and_writes_nothing(run_cli: Any, work: Path) -> None:
    with FakeOpenAI() as server:
        done = run_cli(*command(server, prompts_file(work, 2), *filtered(), "--dry-run", "--json", k=3))
        assert not server.requests
    assert done.exit_code == 0 and json.loads(done.stdout)["to_ask"] == 6 and files_of(work) == set()
    assert "texts that score below 0.5 will be in guide.dropped.jsonl" in done.stderr
    assert "all 3 texts of a prompt" in done.stderr


# --- kinds of guides and prompts


def test_a_batch_is_filtered_too(run_cli: Any, work: Path) -> None:
    data = prompts_file(work, 6)
    price = ("--set", "guide.usd_per_million_input=2", "--set", "guide.usd_per_million_output=8")
    with FakeOpenAI(prices=(2.0, 8.0)) as server:
        done = run_cli(*command(server, data, *filtered(), *price, "--batch", "--set", "guide.batch_poll_s=0.05"))
        assert done.exit_code == 0 and not server.requests, done.stderr
        assert run_cli(*command(server, data, *price, out="all.jsonl")).exit_code == 0
        assert not server.requests
    assert_partition(work, rows(work / "all.jsonl"))


def test_conversations_reach_the_reward_as_such(run_cli: Any, work: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A cat?"}]
    data = write_rows(work / "data.jsonl", [{"id": "long", "prompt": talk}, {"id": "short", "prompt": talk[1:]}])
    with FakeOpenAI() as server:
        done = run_cli(*command(server, data, *filtered("turns", 2), k=1))
    assert done.exit_code == 0, done.stderr
    assert [(row["id"], row["score"], row["prompt"]) for row in lines(work / "guide.jsonl")] == [("long", 2.0, talk)]
    assert [row["id"] for row in lines(work / "guide.dropped.jsonl")] == ["short"]


def test_a_local_guide_is_scored_in_its_batches_and_sft_reads_the_kept_texts(
    run_cli: Any, work: Path, tiny_gpt2: Path
) -> None:
    data = write_rows(work / "train.jsonl", toy_examples(6))
    local = (
        "collect-guide", "--guide", f"hf:{tiny_gpt2}", "--data", data, "--device", "cpu", "--max-new-tokens", 8,
        "-k", 2,
    )  # fmt: skip
    assert run_cli(*local, "-o", "all.jsonl").exit_code == 0
    scores = sorted(len(set(row["completion"].split())) for row in lines(work / "all.jsonl"))
    least = scores[len(scores) // 2]
    assert scores[0] < least
    batched = ("--batch-size", 4, "--json")
    first = run_cli(*local, "-o", "guide.jsonl", *filtered("words", least), *batched, "--limit", 4)
    done = run_cli(*local, "-o", "guide.jsonl", *filtered("words", least), *batched, "--resume")
    assert (first.exit_code, done.exit_code) == (0, 0), first.stderr + done.stderr
    assert (work / "batches").read_text().split() == ["4", "4", "4"]
    everything = rows(work / "all.jsonl")
    kept = {row for row in everything if len(set(row[2].split())) >= least}
    assert rows(work / "guide.jsonl") == kept and rows(work / "guide.dropped.jsonl") == everything - kept

    cloned = run_cli(
        "sft", "--model", tiny_gpt2, "--data", data, "--guide", "guide.jsonl", "--max-new-tokens", 16, "--max-steps", 1,
        "--device", "cpu", "--json", "-o", "run",
    )  # fmt: skip
    assert cloned.exit_code == 0, cloned.stderr
    result = json.loads(cloned.stdout)
    assert result["pairs"] == len(kept) and result["dropped"] == json.loads(done.stdout)["prompts_without_text"]
