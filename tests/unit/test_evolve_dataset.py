"""The set's files: blocks that are whole, whatever a kill leaves of the last one."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolving import OPERATIONS, SEEDS, number_of, world_of
from evolving_server import rows
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.answers import Answered
from rlgf_cli.evolve.dataset import Rows, Tally, blocks, kept_in
from rlgf_cli.evolve.policies import RoundRobinPolicy, walk

STEPS, SIZE = 3, 2


def rewrite(request):
    return "" if "rain" in request.example.prompt and request.example.id == "rain" else number_of(request)


def evolved():
    """All blocks, walked, with answers: some rewrites are rejected, and some answers."""
    world = world_of(rewrite)
    for block in blocks(SEEDS, 2, SIZE):
        walk(world, block, RoundRobinPolicy(OPERATIONS), STEPS, seed=0)
        places = kept_in(block)
        answers = {
            place: Answered("refusal" if i % 3 == 1 else "kept", f"answer {i}", 0.5) for i, place in enumerate(places)
        }
        yield block, answers


BLOCKS = list(evolved())


def written(folder: Path) -> list[tuple[str, bytes]]:
    """Everything that is written, in its order: (file, line)."""
    files = [folder / "instructions.jsonl", folder / "steps.jsonl"]
    out, log, sizes = Rows(*files), [], [0, 0]
    for block, answers in BLOCKS:
        out.append(block, answers)
        for n, file in enumerate(files):
            data = file.read_bytes() if file.exists() else b""
            log += [(file.name, line) for line in data[sizes[n] :].splitlines(keepends=True)]
            sizes[n] = len(data)
    return log


with TemporaryDirectory() as somewhere:
    LOG = written(Path(somewhere))
WHOLE = {name: b"".join(line for file, line in LOG if file == name) for name in ("instructions.jsonl", "steps.jsonl")}


def test_blocks_are_chains_of_all_seeds_pass_by_pass():
    found = [[(chain.seed.id, chain.visit) for chain in block] for block in blocks(SEEDS, 2, SIZE)]
    ids = [seed.id for seed in SEEDS]
    assert [pair for block in found for pair in block] == [(name, visit) for visit in (0, 1) for name in ids]
    assert [len(block) for block in found] == [2, 2, 2]


@given(lines=st.integers(0, len(LOG)), part=st.floats(0, 1, exclude_max=True))
def test_what_a_kill_left_is_gone_on_with_and_ends_the_same(lines, part):
    """Any prefix of what is written, its last line torn."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for n, (file, line) in enumerate(LOG[: lines + 1]):
            with (folder / file).open("ab") as stream:
                stream.write(line if n < lines else line[: int(part * len(line))])
        out = Rows(folder / "instructions.jsonl", folder / "steps.jsonl")
        done, before = 0, 0
        for block, answers in BLOCKS:
            fresh = [type(chain)(chain.seed, chain.visit) for chain in block]
            before += len(block) * STEPS
            if (found := out.finished(fresh, STEPS)) is not None:
                assert [row.text for row in found] == [step.text for chain in block for step in chain.steps]
                done += 1
            else:
                out.append(block, answers)
        complete = sum(file == "steps.jsonl" for file, _ in LOG[:lines]) // (SIZE * STEPS)
        assert done == complete
        assert {file: (folder / file).read_bytes() for file in WHOLE} == WHOLE


def test_a_block_whose_instructions_are_missing_is_made_again(tmp_path):
    """As a machine may leave it that lost its power: the second file is ahead of the first."""
    (tmp_path / "steps.jsonl").write_bytes(WHOLE["steps.jsonl"])
    (tmp_path / "instructions.jsonl").write_bytes(WHOLE["instructions.jsonl"][:-10])
    out = Rows(tmp_path / "instructions.jsonl", tmp_path / "steps.jsonl")
    done = [out.finished(block, STEPS) is not None for block, _ in BLOCKS]
    assert done == [True, True, False]
    assert WHOLE["steps.jsonl"].startswith((tmp_path / "steps.jsonl").read_bytes())


def test_rows_of_other_chains_are_refused(tmp_path):
    (tmp_path / "steps.jsonl").write_bytes(WHOLE["steps.jsonl"])
    (tmp_path / "instructions.jsonl").write_bytes(WHOLE["instructions.jsonl"])
    out = Rows(tmp_path / "instructions.jsonl", tmp_path / "steps.jsonl")
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
