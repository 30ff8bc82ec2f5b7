"""The set's files: blocks that are whole, whatever a kill leaves of the last one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolving import OPERATIONS, SEEDS, environment_of, number_of
from evolving_server import rows
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.answers import InstructionAnswer
from rlgf_cli.evolve.dataset import Rows, Tally, blocks, kept_instructions
from rlgf_cli.evolve.environment import Chain
from rlgf_cli.evolve.policies import RoundRobinPolicy, rollout

STEPS, SIZE = 3, 2


def rewrite(request):
    return "" if "rain" in request.example.prompt and request.example.id == "rain" else number_of(request)


def evolved():
    """All blocks, walked, with answers: some rewrites are rejected, and some answers."""
    environment = environment_of(rewrite)
    for block in blocks(SEEDS, 2, SIZE):
        rollout(environment, block, RoundRobinPolicy(OPERATIONS), STEPS, seed=0)
        places = kept_instructions(block)
        answers = {
            place: InstructionAnswer("refusal" if i % 3 == 1 else "kept", f"answer {i}", 0.5)
            for i, place in enumerate(places)
        }
        yield block, answers


BLOCKS = list(evolved())


FILES = ("instructions.jsonl", "steps.jsonl")


def written(folder: Path) -> tuple[dict[str, list[bytes]], list[tuple[int, int]]]:
    """The lines of both files, and how many of each there are after every block."""
    files, ends = [folder / name for name in FILES], [(0, 0)]
    out = Rows(*files)
    for block, answers in BLOCKS:
        out.append(block, answers)
        ends.append(tuple(len(file.read_bytes().splitlines()) for file in files))
    return {file.name: file.read_bytes().splitlines(keepends=True) for file in files}, ends


with TemporaryDirectory() as somewhere:
    LINES, ENDS = written(Path(somewhere))


def test_blocks_are_chains_of_all_seeds_pass_by_pass():
    found = [[(chain.seed.id, chain.visit) for chain in block] for block in blocks(SEEDS, 2, SIZE)]
    ids = [seed.id for seed in SEEDS]
    assert [pair for block in found for pair in block] == [(name, visit) for visit in (0, 1) for name in ids]
    assert [len(block) for block in found] == [2, 2, 2]


@given(st.data())
def test_what_was_left_is_gone_on_with_and_ends_the_same(data):
    """Any part of either file, the last line torn: a kill leaves one of them ahead, a loss of power either."""
    with TemporaryDirectory() as name:
        folder, there = Path(name), []
        for file in FILES:
            whole = data.draw(st.integers(0, len(LINES[file])))
            torn = LINES[file][whole][: data.draw(st.integers(0, 40))] if whole < len(LINES[file]) else b""
            (folder / file).write_bytes(b"".join(LINES[file][:whole]) + torn)
            there.append(whole)
        out, done = Rows(*(folder / file for file in FILES)), []
        for block, answers in BLOCKS:
            fresh = [Chain(chain.seed, chain.visit) for chain in block]
            found = out.finished(fresh, STEPS)
            done.append(found is not None)
            if found is None:
                out.append(block, answers)
            else:
                assert [row.text for row in found] == [step.text for chain in block for step in chain.steps]
        assert done == [end[0] <= there[0] and end[1] <= there[1] for end in ENDS[1:]]
        assert {file: (folder / file).read_bytes().splitlines(keepends=True) for file in FILES} == LINES


def test_rows_of_other_chains_are_refused(tmp_path):
    for file in FILES:
        (tmp_path / file).write_bytes(b"".join(LINES[file]))
    out = Rows(*(tmp_path / file for file in FILES))
    with pytest.raises(UserError, match="not those of this run"):
        out.finished(BLOCKS[1][0], STEPS)


def test_the_sums_are_those_of_the_rows(tmp_path):
    tally, out = Tally(), Rows(tmp_path / "i.jsonl", tmp_path / "s.jsonl")
    for block, answers in BLOCKS:
        tally.add(out.append(block, answers))
    found, steps, kept = tally.summary(OPERATIONS), rows(tmp_path / "s.jsonl"), rows(tmp_path / "i.jsonl")
    assert found["rewrites"] == len(steps) == 18
    assert found["instructions"] == len(kept) == sum(r["answer"] == "kept" for r in steps)
    assert found["kept"] == found["answers"] == sum(r["outcome"] == "kept" for r in steps)
    assert found["answers_rejected"] == {"refusal": found["answers"] - len(kept)}
    assert sum(found["rejected"].values()) == len(steps) - found["kept"] > 0
    assert found["queries"] == sum(r["queries"] for r in steps) == 18 + found["answers"]
    costs = [r[k] for r in steps for k in ("cost_usd", "answer_cost_usd") if r[k] is not None]
    assert found["cost_usd"] == pytest.approx(sum(costs))
    assert found["queries_per_instruction"] == pytest.approx(found["queries"] / len(kept), abs=1e-4)
    assert {name: n["asked"] for name, n in found["operations"].items()} == {"wide": 6, "deep": 6, "long": 6}


def test_a_chain_goes_on_from_an_instruction_whose_answer_was_rejected(tmp_path):
    out = Rows(tmp_path / "i.jsonl", tmp_path / "s.jsonl")
    for block, answers in BLOCKS:
        out.append(block, answers)
    steps = {f"{r['seed_id']}/{r['visit']}.{r['step']}": r for r in rows(tmp_path / "s.jsonl")}
    ids = {r["id"] for r in rows(tmp_path / "i.jsonl")}
    orphans = 0
    for record in rows(tmp_path / "i.jsonl"):
        chain = record["meta"]["chain"]
        assert len(chain) == len(record["operations"]) and record["operations"][-1] == record["operation"]
        assert chain[-1] == steps[record["id"]]["instruction"]
        if record["parent"] in steps:
            assert steps[record["parent"]]["text"] == chain[-1]
            orphans += record["parent"] not in ids
    assert orphans > 0
