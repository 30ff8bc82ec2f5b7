"""The command ``rlgf compare``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation
from rlgf_cli.cli.numbers import interval, number, p_value, percent, stars
from rlgf_cli.errors import UserError

if TYPE_CHECKING:
    from rlgf_cli.stages.compare import Comparison

_MARKUP = "\\`*_[]<>#|~$&"
"""Characters that are markup within a line of Markdown, as GitHub reads it."""


def compare(invocation: Invocation) -> None:
    """Compare evaluations.

    Each system is compared with the first on the same prompts: values, differences, their intervals, and p-values
    after Holm over all tests shown. With several seeds per system, intervals are over prompts and seeds
    (docs/significance.md).

    ```
    rlgf compare runs/sft runs/ppopp
    rlgf compare sft=runs/a/eval ppo=runs/b/eval --metrics reward.total,rouge
    rlgf compare SFT=runs/sft PPO=runs/ppo_0,runs/ppo_1,runs/ppo_2 --markdown
    rlgf compare SFT=s0,s1,s2 PPO=p0,p1,p2 --pair-seeds
    rlgf compare runs/sft runs/ppo runs/ppopp --json -o comparison.json
    ```
    """
    if len(invocation.keys.get("systems", ())) == 1:
        raise UserError("one system alone cannot be compared", hint="rlgf compare BASE OTHER [MORE ...]")
    if invocation.options["markdown"] and invocation.as_json:
        raise UserError("--markdown and --json exclude each other", hint="-o FILE writes the JSON besides")
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import compare as stage

    comparison = stage.run(resolved, existing=existing)
    if invocation.as_json:
        console.result_json(comparison.to_json())
    elif invocation.options["markdown"]:
        _print_markdown(comparison)
        _print_markdown_texts(comparison)
    else:
        _print_tables(comparison)
        _print_texts(comparison)


def _print_tables(comparison: Comparison) -> None:
    for name, figure in comparison.figures.items():
        console.result(f"{name} (n = {_prompts(figure)})")
        rows = [_cells(comparison, row) for row in figure["rows"]]
        console.result(console.table(_header(comparison), rows))
        console.result()
    for line in _footer(comparison):
        console.result(line)


def _print_texts(comparison: Comparison) -> None:
    """Print a few prompts, each with one line per system, below the prompt's last message."""
    width = max(map(len, comparison.systems))
    for shown in comparison.texts:
        console.result()
        console.result(_heading(shown))
        for label, text in shown["texts"].items():
            console.result(f"  {label:{width}}  {_shown(text)}")


def _heading(shown: dict[str, Any]) -> str:
    """The prompt or its last message as one line; its id where the predictions have no prompts."""
    prompt = shown["prompt"]
    words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return console.one_line(words.strip() or shown["id"])


def _shown(text: str | None) -> str:
    return "-" if text is None else console.one_line(text)


def _print_markdown(comparison: Comparison) -> None:
    """Print all figures in one table, each named in its first row, with an explanation of the numbers below."""
    rows = []
    for name, figure in comparison.figures.items():
        for i, row in enumerate(figure["rows"]):
            cells = [name if i == 0 else "", _prompts(figure) if i == 0 else "", *_cells(comparison, row)]
            rows.append([_escaped(cell, "|*") for cell in cells])
    header = [_escaped(cell, "|*") for cell in _header(comparison)]
    console.result(console.table(["figure", "n", *header], rows))
    console.result()
    console.result(_escaped(" ".join(f"{line}." for line in _footer(comparison)), "*"))


def _print_markdown_texts(comparison: Comparison) -> None:
    """Print a few prompts, each a heading with a list of the systems' texts below it."""
    for shown in comparison.texts:
        console.result()
        console.result(f"### {_escaped(_heading(shown), _MARKUP)}")
        console.result()
        for label, text in shown["texts"].items():
            console.result(f"- {_escaped(label, _MARKUP)}: {_escaped(_shown(text), _MARKUP)}")


def _escaped(text: str, characters: str) -> str:
    """The text with a backslash before each of the characters, which Markdown then prints as they are."""
    return re.sub(f"[{re.escape(characters)}]", r"\\\g<0>", text)


def _prompts(figure: dict[str, Any]) -> str:
    return f"{figure['n']}, {figure['n_skipped']} skipped" if figure["n_skipped"] else str(figure["n"])


def _header(comparison: Comparison) -> list[str]:
    level = f"{percent(comparison.tests['level'])} interval"
    return ["system", "seeds", "value", level, f"minus {comparison.base}", level, "p", "p (Holm)", ""]


def _cells(comparison: Comparison, row: dict[str, Any]) -> list[str]:
    cells = [row["system"], str(row["seeds"]), number(row["value"]), interval(row["low"], row["high"])]
    if (difference := row["difference"]) is None:
        return [*cells, "", "", "", "", ""]
    tests = comparison.tests
    p, adjusted = difference[f"p_{tests['test']}"], difference["p_holm"]
    # the smallest p-value of a resampling test only means that no resample was as extreme
    smallest = tests["smallest_p"] if max(row["seeds"], _base_seeds(comparison)) == 1 else 0.0
    return [
        *cells,
        number(difference["value"], signed=True),
        interval(difference["low"], difference["high"], signed=True),
        p_value(p, smallest),
        p_value(adjusted, smallest * tests["family_size"] if p is not None and p <= smallest else 0.0),
        stars(adjusted),
    ]


def _base_seeds(comparison: Comparison) -> int:
    return len(comparison.systems[comparison.base])


def _footer(comparison: Comparison) -> list[str]:
    tests = comparison.tests
    one, several = {
        "bootstrap": ("paired bootstrap", "Student's t"),
        "randomisation": (
            "approximate randomisation",
            "sides of the pairs swapped" if tests["pair_seeds"] else "permutation of the seeds",
        ),
    }[tests["test"]]
    kind = one if all(len(folders) == 1 for folders in comparison.systems.values()) else f"{one}, of seeds {several}"
    family = f"{tests['family_size']} test{'' if tests['family_size'] == 1 else 's'}"
    return [
        f"p: {kind}, two-sided, {tests['resamples']} resamples, seed {tests['seed']}; after Holm over "
        f"{family} (all systems and figures here): * p < 0.05, ** p < 0.01, *** p < 0.001",
        *tests["notes"],
    ]
