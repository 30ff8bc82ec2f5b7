"""Where the time went: laps that add up, and a table made of rows."""

from __future__ import annotations

import itertools

import pytest

from rlgf_cli.runs.metric_names import known
from rlgf_cli.training import timing
from rlgf_cli.training.timing import ALWAYS, PARTS, Clock, profile


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock will read, one reading after the other."""
    readings: list[float] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_a_lap_is_its_parts_and_the_rest(seconds: list[float]) -> None:
    """Waiting for the guide is taken out of the part that it happened in; saving is part of the next lap."""
    waits = itertools.chain([0.0, 0.0], [0.0, 2.0], itertools.repeat(2.0))
    clock = Clock(lambda: next(waits))
    seconds += [10.0, 11.0, 12.0, 12.5, 17.5, 18.0]
    clock.begin()
    with clock.timed("reward"):
        pass
    with clock.timed("rollout"):
        pass
    first = clock.lap()
    assert first == {
        "time/rollout": 3.0, "time/guide": 2.0, "time/reward": 1.0, "time/annotate": 0.0, "time/update": 0.0,
        "time/other": 2.0,
    }  # fmt: skip
    seconds += [18.5, 20.0, 20.0, 21.0, 21.0]
    with clock.timed("save"):
        pass
    with clock.timed("rollout"):
        pass
    second = clock.lap()
    assert second["time/save"] == 1.5 and second["time/rollout"] == 1.0 and second["time/other"] == 0.5
    assert sum(second.values()) == 21.0 - 18.0
    assert all(known(name) for name in (f"time/{part}" for part in PARTS))


def test_the_first_lap_begins_once(seconds: list[float]) -> None:
    clock = Clock(lambda: 0.0)
    seconds += [1.0, 5.0]
    clock.begin()
    clock.begin()
    assert clock.lap()["time/other"] == 4.0


def row(**seconds: float) -> dict[str, float]:
    figures = {"episodes": 10, "length/mean": 8.0, "tokens/policy": 0.75}
    return {**figures, **{f"time/{name}": value for name, value in seconds.items()}}


def test_the_table_is_made_of_the_rows() -> None:
    zero = dict.fromkeys(ALWAYS, 0.0)
    rows = [
        row(**{**zero, "rollout": 1.0, "update": 2.0, "other": 1.0}),
        row(**{**zero, "rollout": 2.0, "update": 4.0, "other": 1.0, "eval": 3.0}),
        row(**{**zero, "rollout": 6.0, "update": 3.0, "other": 1.0, "guide": 5.0, "save": 0.5}),
    ]
    table = {line[0]: line[1:] for line in profile(rows, 0.5, epochs=4)}
    assert list(table) == ["rollout", "guide", "update", "eval", "save", "other", "all"]
    assert table["rollout"] == ["3", "3.0000", "2.0000", "30.0%", "20"]  # 180 of the policy's tokens in 9 s
    assert table["guide"] == ["1", "5.0000", "5.0000", "16.7%", "12"]
    assert table["update"] == ["3", "3.0000", "3.0000", "30.0%", "107"]  # 240 tokens, 4 times, in 9 s
    assert table["eval"] == ["1", "3.0000", "3.0000", "10.0%", ""]
    assert table["save"] == ["1", "1.0000", "1.0000", "3.3%", ""]  # with what came after the last row
    assert table["all"] == ["3", "10.0000", "10.0000", "100.0%", "8"]


def test_rows_of_earlier_versions_lack_what_was_not_measured() -> None:
    table = profile([row(rollout=1.0), row(rollout=3.0, update=4.0)], epochs=1)
    assert [line[0] for line in table] == ["rollout", "update", "all"]
    assert table[-1][2] == "4.0000"
