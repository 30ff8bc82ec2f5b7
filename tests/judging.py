"""Judges by rule: a fake endpoint's answers to the requests of ``judge``."""

from __future__ import annotations

import re
from collections.abc import Callable

from fake_openai import Plan, Reply, Request

PAIR = re.compile(r"### Answer A\n(.*?)\n\n### Answer B\n(.*?)\n\n### What a good answer", re.DOTALL)
ONE = re.compile(r"### Answer\n(.*?)\n\n### What a good answer", re.DOTALL)


def texts_in(request: Request) -> tuple[str, str]:
    """The two texts that a question compares."""
    found = PAIR.search(request.prompt)
    assert found is not None, request.prompt
    return found[1], found[2]


def verdict(rule: Callable[[str, str], str]) -> Plan:
    """A judge whose verdict is a function of the two texts."""
    return lambda n, request: Reply(text=f"They differ.\n\nVerdict: {rule(*texts_in(request))}\n")


def longer(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def rating(rule: Callable[[str], object]) -> Plan:
    """A judge that rates a text by a function of it."""

    def plan(n: int, request: Request) -> Reply:
        found = ONE.search(request.prompt)
        assert found is not None, request.prompt
        return Reply(text=f"It is an answer.\nRating: {rule(found[1])}")

    return plan
