"""examples/loop.py learns, and stays short enough to be read in one sitting."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from statistics import fmean

import torch

PATH = Path(__file__).parents[2] / "examples" / "loop.py"


def test_the_score_rises_and_the_function_fits_on_a_page() -> None:
    spec = importlib.util.spec_from_file_location("example_loop", PATH)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert len(inspect.getsourcelines(example.train)[0]) <= 80
    prompts = torch.tensor([[1], [3]])
    assert example.reward(prompts, example.guide(prompts)).tolist() == [1.0, 1.0]
    scores = example.train()
    assert fmean(scores[-10:]) > fmean(scores[:3]) + 0.15
