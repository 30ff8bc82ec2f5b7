"""bfloat16 on a CPU without units for it: who decides, and that the user is told once."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgf_cli.errors import RlgfWarning
from rlgf_cli.models import device
from rlgf_cli.models.device import has_bfloat16_units, warn_of_slow_bfloat16
from rlgf_cli.scorers.classifier import ClassifierReward

AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "has"),
    [
        (AVX2, False),
        (AVX2 | {"avx512_f": True}, False),
        (AVX2 | {"avx512_bf16": True}, True),
        (AVX2 | {"amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({"architecture": "arm64", "bf16": False, "sve_bf16": True}, True),
        ({"architecture": "ppc64le"}, None),
        ({}, None),
    ],
)
def test_the_units_that_a_cpu_has(capabilities: dict[str, Any], has: bool | None) -> None:
    assert has_bfloat16_units(capabilities) is has


def test_this_torch_says_what_this_cpu_has() -> None:
    """A name that torch does not know would make every CPU one without units, or an unknown one."""
    known = device.cpu_capabilities()
    if known.get("architecture") not in ("x86_64", "arm64"):
        pytest.skip(f"torch says nothing of bfloat16 here: {known.get('architecture')!r}")
    assert has_bfloat16_units(known) is not None


@pytest.mark.parametrize(
    ("place", "dtype", "capabilities", "warned"),
    [
        ("cpu", torch.bfloat16, AVX2, True),
        ("cpu", torch.float32, AVX2, False),
        ("cuda", torch.bfloat16, AVX2, False),
        ("cpu", torch.bfloat16, {"bf16": True}, False),
        ("cpu", torch.bfloat16, {}, False),
    ],
)
def test_when_it_is_warned(
    place: str, dtype: torch.dtype, capabilities: dict[str, Any], warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "cpu_capabilities", lambda: capabilities)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warn_of_slow_bfloat16(torch.device(place), dtype)
    assert [w.category for w in shown] == [RlgfWarning] * warned


@pytest.mark.parametrize(("capabilities", "times"), [(AVX2, 1), ({"avx512_bf16": True}, 0)])
def test_a_command_warns_once(
    capabilities: dict[str, Any],
    times: int,
    run_cli: Any,
    tiny_gpt2: Path,
    examples_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy and a metric that both compute in bfloat16."""
    monkeypatch.setattr(device, "cpu_capabilities", lambda: capabilities)
    result = run_cli(
        "eval", "--model", tiny_gpt2, "--data", examples_file, "--device", "cpu", "--dtype", "bfloat16",
        "--limit", 2, "--max-new-tokens", 6,
        "--set", f'metrics=[{{name: "perplexity:{tiny_gpt2}", params: {{dtype: bfloat16, device: cpu}}}}]',
        "-o", tmp_path / "eval",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "bfloat16 units" in line]
    assert len(lines) == times and all(line.startswith("warning: ") for line in lines)


def test_a_reward_warns_too(tiny_classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_capabilities", lambda: AVX2)
    with pytest.warns(RlgfWarning, match="bfloat16 units"):
        ClassifierReward(str(tiny_classifier), dtype="bfloat16", device="cpu")


@pytest.mark.parametrize(("capabilities", "shown"), [(AVX2, "no"), ({"bf16": True}, "yes"), ({}, "unknown")])
def test_env_says_it(capabilities: dict[str, Any], shown: str, run_cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_capabilities", lambda: capabilities)
    assert json.loads(run_cli("env", "--json").stdout)["machine"]["cpu bfloat16 units"] == shown
