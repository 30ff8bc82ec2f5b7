"""Reading the files of ``rlgf train`` runs, and comparing two runs: every point, and the mean of the residuals.

A point-by-point tolerance lets a small drift pass that all points share; their mean does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SESSION = ("time/", "guide/cached", "guide/mended")
"""Figures that are counted since the run was started or resumed, and times."""


def rows_of(run: Path, *, without: tuple[str, ...] = SESSION) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(without)} for row in found]


def last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"), key=lambda f: int(f.name.removeprefix("step_")))


def assert_figures(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], *, point: float = 0.0, mean: float = 0.0
) -> None:
    """Every figure of every row within ``point``, and the mean of each figure's residuals within ``mean`` (both
    absolute, and relative to figures above 1)."""
    assert len(a) == len(b) > 0
    residuals: dict[str, list[float]] = {}
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if isinstance(value, str):
                assert other[name] == value, (one["step"], name)
            else:
                residual = (other[name] - value) / max(1.0, abs(value))
                assert abs(residual) <= point, (one["step"], name, value, other[name])
                residuals.setdefault(name, []).append(residual)
    for name, found in residuals.items():
        assert abs(sum(found) / len(found)) <= mean, name


def assert_tensors(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], *, point: float = 0.0, mean: float = 0.0
) -> None:
    """The same for named tensors, absolute; without tolerances they must be equal to the bit, NaN included."""
    assert a.keys() == b.keys() and a
    for name, one in a.items():
        other = b[name]
        assert one.shape == other.shape and one.dtype == other.dtype, name
        if point == 0:
            assert one.numpy().tobytes() == other.numpy().tobytes(), name
        residual = other.double() - one.double()
        if residual.numel():
            assert float(residual.abs().max()) <= point, name
            assert abs(float(residual.mean())) <= mean, name


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested states, by their path."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}")
    else:
        yield name, value


def assert_same_run(run: Path, whole: Path) -> None:
    """Two runs are equal to the bit: rows, weights, critics, optimizer, schedule, trainer's state, rollouts, best/."""
    assert_figures(rows_of(whole), rows_of(run))
    one, other = last_checkpoint(whole), last_checkpoint(run)
    assert one.name == other.name
    for folder, twin in ((whole, run), (one, other)):
        names = sorted(p.name for p in folder.glob("*.safetensors"))
        assert names and names == sorted(p.name for p in twin.glob("*.safetensors"))
        for name in names:
            assert_tensors(load_file(folder / name), load_file(twin / name))
    states = [dict(_tensors(torch.load(f / "optimizer.pt", weights_only=True))) for f in (one, other)]
    assert states[0].keys() == states[1].keys()
    moments = [{k: v for k, v in state.items() if isinstance(v, torch.Tensor)} for state in states]
    assert_tensors(*moments)
    assert all(states[1][k] == v for k, v in states[0].items() if not isinstance(v, torch.Tensor))
    assert (one / "state.json").read_text() == (other / "state.json").read_text()
    rollouts = [{p.name: p.read_text() for p in (f / "rollouts").iterdir()} for f in (whole, run)]
    assert rollouts[0] == rollouts[1] and rollouts[0]
    kept = [{p.name: p.read_bytes() for p in (f / "best").glob("*")} for f in (whole, run)]
    assert kept[0].keys() == kept[1].keys() and all(kept[1][name] == content for name, content in kept[0].items())
