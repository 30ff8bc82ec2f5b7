"""``file.py:function`` as a reward: plain Python with the parameters it wants, by name."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlgf_cli import registry
from rlgf_cli.artifacts.rundir import file_sha256
from rlgf_cli.errors import RlgfError, UserError, did_you_mean
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.protocols.messages import as_messages
from rlgf_cli.scorers.checked import describe, refusal, to_score

_ONE = ("prompt", "messages", "text", "completion", "references", "meta", "id")
_MANY = ("prompts", "messages", "texts", "completions", "references", "metas", "ids")
_MARKS_BATCHED = {"texts", "completions"}


class PythonReward(Reward):
    """A function called once per text, or once per batch where it has a parameter ``texts``.

    Per text it may ask for ``prompt`` (a text; of a conversation the last message), ``messages`` (the conversation as a
    list of ``role`` and ``content``; of a plain prompt the one message of the user), ``text``, ``references`` (list),
    ``meta`` (dict) and ``id``, and returns a number, or a dict with ``score`` and further parts to log. Per batch the
    same in the plural (``prompts, messages, texts, references, metas, ids``, lists in equal order; ``messages`` is a
    list of conversations), and it returns a list. ``completion`` and ``completions`` are other
    names of ``text`` and ``texts``. Other parameters are given in the config's ``params``; ``**kwargs`` receives all
    known names and all of ``params``.
    """

    def __init__(self, target: str, params: Mapping[str, Any]) -> None:
        self.function = registry.load_python_target(target)
        path, _, self.name = target.rpartition(":")
        self.path = Path(path)
        self.params = dict(params)
        self.batched, self.wants = _read_signature(self.function, target, params)
        settings = "".join(f",{key}={value!r}" for key, value in sorted(self.params.items()))
        self.signature = f"{self.path.name}:{self.name},sha256={file_sha256(self.path)[:12]}{settings}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        if self.batched:
            given = self._values(
                prompts=[e.prompt for e in examples],
                messages=[_messages(e) for e in examples],
                texts=list(texts),
                completions=list(texts),
                references=[list(e.references) for e in examples],
                metas=[dict(e.meta) for e in examples],
                ids=[e.id for e in examples],
            )
            returned = self._call(given, examples, texts)
            if isinstance(returned, str | Mapping) or not isinstance(returned, Iterable):
                reason = f"returned {type(returned).__name__} instead of a list of numbers"
                raise refusal(self.name, reason, examples, texts, where=str(self.path))
            values = list(returned)
            if len(values) != len(texts):
                reason = f"returned {len(values)} scores for {len(texts)} texts"
                raise refusal(self.name, reason, examples, texts, where=str(self.path))
        else:
            values = [
                self._call(
                    self._values(
                        prompt=e.prompt,
                        messages=_messages(e),
                        text=text,
                        completion=text,
                        references=list(e.references),
                        meta=dict(e.meta),
                        id=e.id,
                    ),
                    [e],
                    [text],
                )
                for e, text in zip(examples, texts, strict=True)
            ]
        return [self._to_score(v, e, t) for v, e, t in zip(values, examples, texts, strict=True)]

    def _values(self, **known: Any) -> dict[str, Any]:
        return {**{name: known[name] for name in self.wants}, **self.params}

    def _call(self, given: dict[str, Any], examples: Sequence[Example], texts: Sequence[str]) -> Any:
        try:
            return self.function(**given)
        except RlgfError:
            raise
        except Exception as error:  # the user's function may raise any exception, and the error must name the function
            here = self.path.resolve()
            frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == here]
            where = f"{self.path}:{frames[-1].lineno}" if frames else str(self.path)
            raise refusal(self.name, f"raised {describe(error)}", examples, texts, where=where) from error

    def _to_score(self, value: Any, example: Example, text: str) -> Score:
        try:
            return to_score(value)
        except ValueError as error:
            raise refusal(self.name, f"returned {error}", [example], [text], where=str(self.path)) from None


def _messages(example: Example) -> list[dict[str, Any]]:
    return [asdict(message) for message in as_messages(example.given)]


def _read_signature(function: Any, target: str, params: Mapping[str, Any]) -> tuple[bool, list[str]]:
    """Whether the function takes batches, and which of the known names it asks for."""
    if not callable(function) or isinstance(function, type):
        raise UserError(f"{target} is not a function", hint="a reward is a function: def score(text): return ...")
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(f"{target} has no signature that Python can read", hint="wrap it in a def") from None
    batched = bool(_MARKS_BATCHED & set(parameters))
    known = _MANY if batched else _ONE
    if clash := sorted(set(params) & set(known)):
        raise UserError(f"{clash[0]!r} cannot be a parameter of {target}: rlgf passes it", hint="rename it")
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    if (extra := sorted(set(params) - set(named))) and not everything:
        raise UserError(f"{target} has no parameter {extra[0]!r}", hint=did_you_mean(extra[0], named))
    for name, parameter in named.items():
        needed = parameter.default is parameter.empty
        if parameter.kind is parameter.POSITIONAL_ONLY or (needed and name not in known and name not in params):
            raise UserError(
                f"{target} asks for {name!r}, which rlgf does not know",
                hint=f"rlgf passes by name: {', '.join(known)}; all else comes from params, or has a default",
            )
    return batched, list(known) if everything else [name for name in known if name in named]
