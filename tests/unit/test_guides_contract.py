"""The contract of ``protocols.Guide``: a guide of another package that only has ``complete`` works in every stage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conftest import write_rows
from rlgf_cli import registry
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import describe, make_guide, make_live_guide
from rlgf_cli.ledger.spend import charge_guides, spend_of
from rlgf_cli.protocols import Completion, Example, Guide, GuideAbilities, GuideRequest
from rlgf_cli.stages import collect_guide


class Upper(Guide):
    """Answers with the prompt in capitals, and continues a prefix with a full stop."""

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config.name, self.describe(config))

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        return [Completion("." if r.prefix else r.example.prompt.upper(), "stop", "upper") for r in requests]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.BUILTIN["guides"], "upper", registry.Entry(f"{__name__}:Upper", "capitals"))
    yield


CONFIG = GuideConfig(name="upper:x")
REQUESTS = [GuideRequest(Example(str(i), f"prompt {i}")) for i in range(5)]


def test_complete_alone_is_enough_to_answer() -> None:
    assert describe(CONFIG) == GuideAbilities(live=True, continues=True)
    with closing(make_live_guide(CONFIG, seed=0)) as guide:
        texts = [f"PROMPT {i}" for i in range(5)]
        assert [c.text for c in guide.complete(REQUESTS)] == texts
        assert [c.text for c in guide.attempt(REQUESTS) if c] == texts
        answers = list(guide.stream(iter(REQUESTS)))
        assert [(a.index, a.request) for a in answers] == list(enumerate(REQUESTS))
        assert [getattr(a.outcome, "text", None) for a in answers] == texts
        assert guide.cached(REQUESTS) == [False] * 5 and guide.samples(REQUESTS[0].example) == []


def test_a_stream_draws_no_more_requests_than_it_answers() -> None:
    drawn = 0

    def requests() -> Iterator[GuideRequest]:
        nonlocal drawn
        for request in REQUESTS:
            drawn += 1
            yield request

    answers = make_guide(CONFIG, seed=0).stream(requests())
    for answered in range(1, 4):
        next(answers)
        assert drawn == answered


def test_without_an_account_there_is_no_cap_and_no_charge() -> None:
    guide = make_guide(CONFIG, seed=0)
    charge_guides([guide], "run", BudgetConfig())
    guide.complete(REQUESTS)
    assert spend_of([guide])["calls"] == 0 and spend_of([guide])["charged_usd"] is None
    for cap in ({"max_calls": 1}, {"max_cost_usd": 1.0}):
        with pytest.raises(UserError, match="keeps no account"):
            charge_guides([guide], "run", BudgetConfig(**cap))  # type: ignore[arg-type]


def test_a_guide_without_an_account_hides_no_charge_of_another() -> None:
    class Paid(Upper):
        def spend(self) -> dict[str, Any]:
            return {**super().spend(), "calls": 3, "cached": 1, "charged_usd": 0.5}

    free, paid = make_guide(CONFIG, seed=0), Paid(CONFIG, seed=0)
    expected = {**paid.spend(), "cached": 1}
    assert spend_of([free, paid]) == spend_of([paid, free]) == expected


def test_batches_are_refused() -> None:
    with pytest.raises(UserError, match="no batch API"):
        make_guide(CONFIG, seed=0).check_batch()


def test_a_collection(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"id": str(i), "prompt": f"prompt {i}"} for i in range(3)])
    flags: dict[str, Any] = {"guide": "upper:x", "data": str(data), "output": str(tmp_path / "guide.jsonl")}
    result = collect_guide.run(resolve(CollectGuideConfig, flags=flags))
    lines = [json.loads(line) for line in result.path.read_text().splitlines()]
    assert {(line["id"], line["completion"], line["cost_usd"]) for line in lines} == {
        (str(i), f"PROMPT {i}", None) for i in range(3)
    }
    assert result.summary["new"] == 3 and result.spend["calls"] == 0
    again = collect_guide.run(resolve(CollectGuideConfig, flags=flags), existing="resume")
    assert again.summary["new"] == 0 and again.summary["records"] == 3
