"""The figures and prompts on which systems can be compared, and the checks that they are comparable."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlgf_cli.artifacts.evaluations import Evaluation, System, every
from rlgf_cli.errors import UserError, did_you_mean

Log = Callable[[str], object]
Refuse = Callable[[str, str, Evaluation], None]
"""``refuse(message, hint, evaluation)``: raises UserError; with ``--force`` it warns instead."""


def comparable(
    systems: Sequence[System], wanted: Sequence[str] | None, *, force: bool, log: Log, warn: Log
) -> tuple[list[str], list[str]]:
    """The figures that all systems have (of those ``wanted``) and the ids of the prompts on which they are compared.

    Raises UserError where the systems have different prompts, references or signatures, or one model as two seeds; with
    ``force`` these are warnings.
    """

    def refuse(message: str, hint: str, evaluation: Evaluation) -> None:
        if not force:
            raise UserError(message, where=str(evaluation.folder), hint=hint)
        warn(message)

    names = _choose_figures(systems, wanted, log)
    ids = _common_ids(systems, refuse)
    _check_same_examples(systems, ids, refuse)
    _check_seeds(systems, refuse)
    for name in names:
        _check_signatures(systems, name, refuse)
    _warn_of_settings(systems, warn)
    return _of_compared_prompts(systems, names, ids, log), ids


def _choose_figures(systems: Sequence[System], wanted: Sequence[str] | None, log: Log) -> list[str]:
    """The figures to compare, in the base's order."""
    scored = list(every(systems))
    common = [name for name in scored[0][1].figures if all(name in e.figures for _, e in scored)]
    everywhere = {name for _, evaluation in scored for name in evaluation.figures}
    if wanted is None:
        for name in sorted(everywhere - set(common)):
            without = ", ".join(label for label, e in scored if name not in e.figures)
            log(f"left out: {name}, which {without} does not have")
        if not common:
            hint = "run rlgf eval with the same --metrics"
            raise UserError("the systems have no figure in common", hint=hint)
        return common
    chosen: dict[str, None] = {}
    for want in wanted:
        matching = [name for name in common if _is_of(name, want)]
        if not matching:
            if any(_is_of(name, want) for name in everywhere):
                lacks = ((label, e) for label, e in scored if not any(_is_of(name, want) for name in e.figures))
                label, lacking = next(lacks, scored[0])
                raise UserError(f"{label} was not scored with {want!r}", where=str(lacking.folder))
            known = everywhere | {name.partition(".")[0] for name in everywhere}
            raise UserError(f"no system was scored with {want!r}", hint=did_you_mean(want, known))
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


def _is_of(figure: str, name: str) -> bool:
    """Whether ``name`` is the figure or its metric."""
    return figure == name or figure.startswith(f"{name}.")


def _common_ids(systems: Sequence[System], refuse: Refuse) -> list[str]:
    (base_name, base), *others = every(systems)
    for name, other in others:
        lacking = [i for i in base.records if i not in other.records]
        extra = [i for i in other.records if i not in base.records]
        if lacking or extra:
            message = (
                f"{name} and {base_name} were scored on other prompts: {len(lacking)} ids only in "
                f"{base_name}, {len(extra)} only in {name} (first: {(lacking + extra)[0]!r})"
            )
            refuse(message, "--force compares on the prompts that all systems have", other)
    common = [i for i in base.records if all(i in other.records for _, other in others)]
    if not common:
        raise UserError("the systems have no prompt in common")
    return common


def _check_same_examples(systems: Sequence[System], ids: Sequence[str], refuse: Refuse) -> None:
    (base_name, base), *others = every(systems)
    for name, evaluation in others:
        for what in ("prompt", "references"):
            other = [i for i in ids if getattr(evaluation.records[i], what) != getattr(base.records[i], what)]
            if other:
                refuse(
                    f"{name} and {base_name} have equal ids with different {what}: {len(other)} "
                    f"of {len(ids)} (first: {other[0]!r})",
                    "score both on the same data; --force compares all the same",
                    evaluation,
                )


def _check_seeds(systems: Sequence[System], refuse: Refuse) -> None:
    """Refuse one model under two seeds: seeds are different trainings, and their spread is what is measured."""
    for system in systems:
        seen: dict[str, Evaluation] = {}
        for evaluation in system.evaluations:
            weights = (evaluation.scores.model or {}).get("sha256")
            if weights and weights in seen:
                refuse(
                    f"two seeds of {system.label} are one model, that of {seen[weights].folder} too",
                    "give evaluations of different trainings; --force takes them as they are",
                    evaluation,
                )
            if weights:
                seen[weights] = evaluation


def _check_signatures(systems: Sequence[System], figure: str, refuse: Refuse) -> None:
    (base_name, base), *others = every(systems)
    first = base.figures[figure]
    for name, evaluation in others:
        other = evaluation.figures[figure]
        if other.aggregate != first.aggregate:
            raise UserError(
                f"{figure} is made in different ways: {first.aggregate} in {base_name}, {other.aggregate} in {name}",
                where=str(evaluation.folder),
                hint="run rlgf eval again with one version of rlgf",
            )
        if other.signature != first.signature:
            refuse(
                f"{figure} was computed in different ways\n  {base_name}: {first.signature}\n"
                f"  {name}: {other.signature}",
                "run rlgf eval again with equal settings; --force compares all the same",
                evaluation,
            )


def _warn_of_settings(systems: Sequence[System], warn: Log) -> None:
    """Warn of different decoding, which may be what is compared, and of files that differ with equal prompts."""
    (base_name, base), *others = every(systems)
    mine = base.scores.decoding
    for name, evaluation in others:
        theirs = evaluation.scores.decoding
        if mine is not None and theirs is not None:
            keys = [
                key for key in dict.fromkeys([*mine, *theirs]) if key != "seed" and mine.get(key) != theirs.get(key)
            ]
            if keys:
                values = [", ".join(f"{key} {decoding.get(key)}" for key in keys) for decoding in (mine, theirs)]
                warn(f"other decoding: {base_name} with {values[0]}; {name} with {values[1]}")
        data = [(e.scores.dataset or {}).get("sha256") for e in (base, evaluation)]
        if None not in data and data[0] != data[1]:
            warn(f"{name} and {base_name} were scored on files that differ (the prompts compared are equal)")


def _of_compared_prompts(systems: Sequence[System], names: Sequence[str], ids: Sequence[str], log: Log) -> list[str]:
    """``names`` without set-level figures, where an evaluation has other prompts than those that are compared."""
    whole = all(len(evaluation.records) == len(ids) for _, evaluation in every(systems))
    usable = [name for name in names if whole or systems[0].evaluations[0].figures[name].aggregate is not None]
    for name in names:
        if name not in usable:
            log(f"left out: {name}, a figure of all prompts of a system, of which only some are compared")
    if not usable:
        raise UserError("no figure can be compared on these prompts alone")
    return usable
