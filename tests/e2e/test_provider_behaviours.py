"""The table of docs/providers.md is that of the behaviours, and each of them costs what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from behaviours import BEHAVIOURS, Behaviour
from provider_behaviours import forks, run, wrong

PAGE = Path(__file__).parents[2] / "docs" / "providers.md"


def test_the_page_has_each_behaviour() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    shown = {row[0].removeprefix("| "): [int(n) for n in row[1:5]] for row in rows if len(row) > 5 and row[1].isdigit()}
    assert list(shown) == [behaviour.name for behaviour in BEHAVIOURS] and len(shown) >= 45
    for behaviour in BEHAVIOURS:
        calls, paid, texts, code = shown[behaviour.name]
        assert code == behaviour.exit
        assert behaviour.calls in (None, calls) and behaviour.paid in (None, paid) and behaviour.texts in (None, texts)


@pytest.fixture(scope="module")
def socket() -> Iterator[str]:
    with forks() as path:
        yield path


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_what_a_behaviour_costs(behaviour: Behaviour, socket: str, tmp_path: Path, tiny_gpt2: Path) -> None:
    found = run(socket, behaviour, tmp_path, tiny_gpt2)
    assert wrong(behaviour, found) == [], found.said
