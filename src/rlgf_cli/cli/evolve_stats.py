"""The command ``rlgf evolve stats``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation
from rlgf_cli.cli.numbers import interval, number, percent


def evolve_stats(invocation: Invocation) -> None:
    """Measure a set of instructions, or compare two.

    Diversity (distinct n-grams, self-BLEU, spread, Vendi score, clusters), length and complexity, and of a folder of
    rlgf evolve generate the operations, outcomes and cost of every step. Two sets are compared at the same number of
    texts, with intervals over seeds (docs/evolve.md).

    ```
    rlgf evolve stats runs/evolved
    rlgf evolve stats runs/evolved -o runs/evolved_stats --encoder models/minilm
    rlgf evolve stats runs/learned runs/random
    rlgf evolve stats runs/evolved data/seeds.jsonl --json
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import evolve_stats as stage

    result = stage.run(resolved, existing=existing)
    if invocation.as_json:
        console.result_json(result.stats)
        return
    _print(result.stats)
    if result.folder is not None:
        console.result(str(result.folder))


def _print(stats: Mapping[str, Any]) -> None:
    for measured in stats["sets"]:
        _print_set(measured)
        console.result()
    if (comparison := stats["comparison"]) is not None:
        _print_comparison(comparison)
        console.result()
    console.result(f"space: {stats['space']}; clusters from cosine {stats['cosine']:g}")


def _print_set(measured: Mapping[str, Any]) -> None:
    left_out = f"; {measured['wordless']} without a word left out" if measured["wordless"] else ""
    console.result(f"{measured['path']}: {measured['texts']} texts from {measured['seeds']} seeds{left_out}")
    for note in measured["notes"]:
        console.result(f"  {note}")
    rows = [[name, number(value)] for name, value in measured["figures"].items()]
    if (rewrites := measured["rewrites"]) is not None:
        for name in ("kept_share", "novelty", "queries_per_kept", "cost_usd"):
            rows.append([name, number(rewrites[name])])
    console.result(console.table(["figure", "all texts"], rows))
    if measured["by_step"] is not None:
        _print_steps(measured["by_step"])
    if rewrites is not None:
        outcomes = ", ".join(f"{name} {count}" for name, count in rewrites["outcomes"].items())
        unpriced = f"; {rewrites['unpriced']} without a price" if rewrites["unpriced"] else ""
        console.result(f"{rewrites['rewrites']} rewrites, {rewrites['queries']} queries: {outcomes}{unpriced}")


def _print_steps(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of the steps, without the figures that no step has."""
    names = ("texts", "words", "sentences", "conjunctions", "type_token_ratio")
    of_rewrites = ("rewrites", "kept_share", "novelty", "queries_per_kept", "cost_usd")
    shown = [name for name in (*names, *of_rewrites) if any(row.get(name) is not None for row in rows)]
    lines = [[str(row["step"]), *(_cell(row.get(name)) for name in shown)] for row in rows]
    console.result(console.table(["step", *shown], lines))
    operations = sorted({name for row in rows for name in row.get("operations", ())})
    chosen = [
        [str(row["step"]), *(percent(round(row["operations"].get(name, 0), 3)) for name in operations)]
        for row in rows
        if "operations" in row
    ]
    if chosen:
        console.result(console.table(["step", *operations], chosen))


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else number(value)


def _print_comparison(comparison: Mapping[str, Any]) -> None:
    level = f"{percent(comparison['level'])} interval"
    rows = [
        [
            name,
            number(row["first"]),
            number(row["second"]),
            number(row["difference"], signed=True),
            interval(row["low"], row["high"], signed=True),
        ]
        for name, row in comparison["figures"].items()
    ]
    console.result(console.table(["figure", "first", "second", "first - second", level], rows))
    first, second = comparison["of_seeds"]
    whose = f"the same in both, of {first}" if comparison["paired"] else f"of {first} and of {second}"
    console.result(
        f"{comparison['texts']} texts from {comparison['seeds']} seeds in each of {comparison['draws']} draws "
        f"({whose}); intervals over other seeds"
    )
