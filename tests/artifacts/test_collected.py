"""The figures of a collection whose texts have scores."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import write_rows
from rlgf_cli.artifacts.collected import CollectedTexts
from rlgf_cli.artifacts.guide_files import GuideFiles
from rlgf_cli.artifacts.jsonl import dump_line
from rlgf_cli.artifacts.records import GuideRecord
from rlgf_cli.errors import UserError

PROMPTS = 5
TEXTS = st.lists(
    st.tuples(
        st.integers(0, PROMPTS - 1), st.floats(-3, 3, allow_subnormal=False) | st.none(), st.booleans(), st.booleans()
    ),
    max_size=20,
)
"""Prompt, score, whether it is kept, and whether it is in a file already."""


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=TEXTS)
def test_scores_are_those_of_both_files_and_of_this_session(tmp_path: Path, texts: list) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(PROMPTS)])
    files = GuideFiles(tmp_path / "guide.jsonl", drops=True)
    records = [
        (GuideRecord(id=f"p{i}", prompt=f"prompt {i}", sample_index=n, completion="x", score=score), keep, before)
        for n, (i, score, keep, before) in enumerate(texts)
    ]
    for file, kept in ((files.path, True), (files.beside, False)):
        file.write_text("".join(dump_line(record) for record, keep, before in records if before and keep == kept))
    with closing(CollectedTexts()) as collected:
        list(collected.examples(data))
        collected.read(files.path, files.dropped)
        for record, keep, before in records:
            if not before:
                collected.add(record, dropped=not keep)
        summary = collected.score_summary()
    of_prompt = defaultdict(list)
    for i, score, _, _ in texts:
        if score is not None:
            of_prompt[i].append(score)
    scores = [score for values in of_prompt.values() for score in values]
    assert summary == {
        "kept": sum(keep for _, _, keep, _ in texts),
        "dropped": sum(not keep for _, _, keep, _ in texts),
        "prompts_without_text": PROMPTS - len({i for i, _, keep, _ in texts if keep}),
        "mean_score": pytest.approx(fmean(scores)) if scores else None,
        "mean_best_score": pytest.approx(fmean(map(max, of_prompt.values()))) if scores else None,
    }


def test_texts_of_either_file_are_not_missing(tmp_path: Path) -> None:
    files = GuideFiles(tmp_path / "guide.jsonl", drops=True)
    with files.appending() as write:
        write(GuideRecord(id="a", prompt="A", sample_index=0, completion="x"), True)
        write(GuideRecord(id="a", prompt="A", sample_index=2, completion="y"), False)
    data = write_rows(tmp_path / "data.jsonl", [{"id": "a", "prompt": "A"}])
    for dropped, missing in ((files.dropped, [1, 3]), (None, [1, 2, 3])):
        with closing(CollectedTexts()) as collected:
            (example,) = collected.examples(data)
            collected.read(files.path, dropped)
            assert collected.missing(example, 4) == missing


def test_the_files_of_an_output(tmp_path: Path) -> None:
    assert GuideFiles.of("runs/guide.jsonl", drops=True).dropped == Path("runs/guide.dropped.jsonl")
    assert GuideFiles.of("runs/guide.jsonl", drops=False).dropped is None
    with pytest.raises(UserError, match=r"cannot be \.gz"):
        GuideFiles.of("guide.jsonl.gz", drops=True)
    files = GuideFiles(tmp_path / "guide.jsonl", drops=True)
    with files.appending() as write:
        assert not files.hold_texts()
        write(GuideRecord(prompt="A", completion="y"), False)
    assert files.hold_texts() and files.path.read_bytes() == b""
    files.remove()
    assert list(tmp_path.iterdir()) == []
