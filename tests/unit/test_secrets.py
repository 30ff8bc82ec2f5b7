"""Values of headers: what files and messages hold of them."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path

import pytest

from collecting import no_endpoint
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.artifacts.secrets import filled, hidden, hidden_argument, refuse_written
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError
from rlgf_cli.guides.openai.estimate import Plan, estimate
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.protocols import Example, GuideRequest


def test_values_are_hidden_at_any_depth() -> None:
    section = {"name": "m", "headers": {"A": "planted", "B": "${NAME}", "C": "Token ${NAME}"}}
    shown = {"name": "m", "headers": {"A": "***", "B": "${NAME}", "C": "***"}}
    tree = {"guide": section, "reward": [{"name": "judge:m", "params": {"guide": section}}], "headers": None}
    assert hidden(tree) == {
        "guide": shown, "reward": [{"name": "judge:m", "params": {"guide": shown}}], "headers": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("guide.headers.X=planted", "guide.headers.X=***"),
        ("--set=guide.headers.X=planted=1", "--set=guide.headers.X=***"),
        ("guide.headers={X: planted}", "guide.headers=***"),
        ("guide={name: m, headers: {X: planted}}", "guide=***"),
        ("guide.headers.X=${NAME}", "guide.headers.X=${NAME}"),
        ("guide.base_url=http://h/v1", "guide.base_url=http://h/v1"),
        ("--headers", "--headers"),
    ],
)
def test_a_command_line_is_recorded_without_them(
    given: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hidden_argument(given) == shown
    monkeypatch.setattr(sys, "argv", ["rlgf", "collect-guide", given])
    with RunDir.claim(str(tmp_path / "run"), "collect-guide").running():
        pass
    assert json.loads((tmp_path / "run" / "run.json").read_text())["argv"] == ["collect-guide", shown]


def test_the_origin_of_a_header_does_not_hold_it() -> None:
    flags = {"output": "o", "data": "d", "guide": "openai:m"}
    resolved = resolve(CollectGuideConfig, flags=flags, sets=["guide.headers.X=planted"])
    assert resolved.config.guide.headers == {"X": "planted"} and "planted" not in json.dumps(resolved.to_json())
    with pytest.raises(UserError) as caught:
        resolve(CollectGuideConfig, flags=flags, sets=["guide.headers.a b=planted"])
    assert "planted" not in f"{caught.value} {caught.value.hint}"


def test_references_are_filled_when_they_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", " planted\n")
    assert filled({"A": "x", "B": "T ${GATEWAY_TOKEN}"}) == {"A": "x", "B": "T planted"}
    path = tmp_path / "r.yaml"
    path.write_text("output: o\ndata: d\nguide:\n  name: openai:m\n  headers:\n    B: T ${GATEWAY_TOKEN}\n")
    assert resolve(CollectGuideConfig, files=[path]).config.guide.headers == {"B": "T ${GATEWAY_TOKEN}"}


def test_a_copy_takes_references_alone() -> None:
    refuse_written({"guide": {"headers": {"A": "${NAME}"}}}, "base.yaml")
    with pytest.raises(UserError, match="is written out") as caught:
        refuse_written({"guide": {"headers": {"A": "planted"}}}, "base.yaml")
    assert caught.value.where == "base.yaml" and "planted" not in str(caught.value)


def test_an_estimate_has_the_tokens_of_the_reasoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_endpoint(monkeypatch, tmp_path)
    price = {"usd_per_million_input": 0.0, "usd_per_million_output": 1.0}
    config = GuideConfig.model_validate({"name": "openai:m", "mode": "replay", "reasoning_tokens": 93, **price})
    monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / "cache"))
    with closing(OpenAIGuide(config, seed=0)) as guide:
        plan = Plan(requests=1)
        plan.add(guide, GuideRequest(Example("a", "p"), max_new_tokens=7))
        assert plan.limit_tokens == 100
        figures = estimate(guide, plan)
    assert figures["at_most_usd"] == pytest.approx(100 / 1e6)
