"""The scripted guide of recipes/teams_rl for tests: in this process, and as a plan of the fake server."""

from __future__ import annotations

import sys
from pathlib import Path

from evolving import BUILTIN
from fake_openai import Reply, Request
from rlgf_cli.protocols import Example, GuideRequest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "teams_rl"))

import scripted
import scripted_server

__all__ = ["plan", "says", "scripted", "scripted_server", "seeds"]

_WORDS = [
    "gravel",
    "pollen",
    "copper",
    "thunder",
    "nectar",
    "granite",
    "saffron",
    "velour",
    "quartz",
    "timber",
    "lichen",
    "amethyst",
]


def seeds(count: int) -> list[Example]:
    """Seed instructions that name no field of the scripted guide."""
    return [
        Example(f"s{i}", f"List {i + 2} uses of {_WORDS[i % 12]} beside {_WORDS[(5 * i + 3) % 12]} number {i}.")
        for i in range(count)
    ]


def says(request: GuideRequest) -> str:
    """The scripted guide's answer to a request, whose index is the seed."""
    return scripted_server.text_for(request.example.prompt, request.sample_index, BUILTIN)


def plan(n: int, request: Request) -> Reply:
    """The scripted guide behind the fake server, with its ledger."""
    return Reply(text=scripted_server.text_for(request.prompt, request.body.get("seed") or 0, BUILTIN))
