"""No tensor is left on the CPU: steps of training on a pretended device, with the CPU's figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

from device_checks import FAMILIES, PLANTED, STEPS, label

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """The error of every check, or None, from one process."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot make a device in Python (2.13 can)")
    checkpoints = {name: str(request.getfixturevalue(f"tiny_{name}")) for name in FAMILIES}
    paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "device_checks.py"), json.dumps(checkpoints)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", STEPS)
def test_a_step_runs_on_the_device(results: dict[str, str | None], name: str) -> None:
    assert results[name] is None, results[name]


@pytest.mark.parametrize("name", [label(*fault) for fault in PLANTED])
def test_a_tensor_left_on_the_cpu_fails(results: dict[str, str | None], name: str) -> None:
    assert "Expected all tensors to be on the same device" in str(results[name])
