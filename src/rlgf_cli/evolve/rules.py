"""Rules that a rewrite, or the answer to an instruction, must keep to be part of the set.

Each has a name by which it is counted. They test the form of a text alone. A rule that an instruction itself breaks is
not applied to its rewrite and its answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rlgf_cli.evolve.operations import PLACEHOLDER
from rlgf_cli.evolve.words import essence, is_garbled, words
from rlgf_cli.protocols import FinishReason
from rlgf_cli.scorers.repetition import repeated_share

_GREETING = re.compile(
    r"\A\W*(?:(?:hello|hi|hey|oh|hm+|well|okay|ok|sure|no|thank you|thanks)\b[^.!?,\n]{0,40}[.!?,]+\s*)?"
    r"(?:but |however,? )?",
    re.IGNORECASE,
)
_UNABLE = (
    r"(?: ?can ?not| ?can't| could not| couldn't| won't| will not| would not| wouldn't| must| don't| do not| refuse"
    r"|(?: am| are|'m|'re) (?:unable|not))"
)
_HELP = (
    r"(?:help|assist|comply|decline|do (?:that|this|so|it)|provide|fulfill?|create|rewrite|generate|write|answer|engage"
    r"|continue|complete|support|produce|discuss|participate|offer|respond|process|perform|feel comfortable"
    r"|comfortable|have (?:access|the ability|personal|feelings|enough))"
)
_REFUSALS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # sorry, but I cannot
        r"[^.!?\n]{0,25}\b(?:sorry|afraid|apologi[sz]e|apologies|unfortunately|regret)\b"
        rf"[^!?\n]{{0,60}}\b(?:i|we){_UNABLE}\b",
        # I cannot help
        rf"(?:i|we){_UNABLE} (?:to )?(?:\w+ ){{0,2}}{_HELP}\b",
        r"(?:i|we)(?:'d| would)? (?:have|need|like|prefer|rather)(?: not)? (?:to )?decline\b",
        r"(?:(?:i am|i'm) (?:just |only )?|as )an? (?:ai|artificial intelligence|(?:large )?language model)\b",
        r"(?:this|that|the|your|such an?)(?: \w+)? (?:request|task|prompt|instruction|content|question|topic) "
        r"(?:violates|goes against|is (?:against|inappropriate|not appropriate|harmful)|(?:cannot|can't) be)\b",
    )
]
"""Beginnings of refusals, after a greeting. Instructions rarely begin with these words."""
_SORRY = re.compile(r"(?:(?:i am|i'm|we are|we're) (?:\w+ )?)?(?:sorry|(?:my )?apologies)\b", re.IGNORECASE)
_FEW = 12
"""A text of at most so many words that begins with an apology is a refusal."""

_NOUN = r"(?:task|instruction|prompt|question|version|request|rewrite|problem|exercise)"
_KIND = (
    r"(?:(?:the|a|an|my|your|this|that|is|are|new|changed|rewritten|revised|modified|updated|evolved|improved|harder"
    r"|different|another|more|complex|difficult|specific|concrete|deeper|created|given|final|original|possible)\s+)"
)
_CHATTER = re.compile(
    r"\A[\s*_#>`\"'-]*(?:"
    r"(?:sure|certainly|of course|absolutely|okay|ok|great|got it|understood)\b(?: thing)?[!.,:]"
    r"|(?:here|below)(?:'s| is| are| you go| you are)?\b[^\n]{0,60}?\b" + _NOUN + r"s?\b[^\n:.]{0,60}(?::|\n)"
    r"|(?:i have|i've|i|we have|we've) (?:re-?written|changed|created|modified|added|made|revised|come up with)"
    r"\b[^.\n]{0,40}\b" + _NOUN + r"|" + _KIND + r"{0,5}" + _NOUN + r"\s?\d{0,2}(?: is| reads)?\s?[*_]*\s*(?::|\n)"
    r")",
    re.IGNORECASE,
)
"""Beginnings of texts that announce a task before they give it."""
_AFTERWORD = re.compile(
    r"\n\s*(?:let me know|i hope|hope this|feel free|is there anything|would you like me|note that i"
    r"|\W{0,3}(?:note|explanation|changes(?: made)?|rationale|reasoning|answer|solution|response)\W{0,3}:)"
    r"[^\n]*(?:\n|\Z)",
    re.IGNORECASE,
)
"""Words about the rewrite, or its answer, behind it."""
_WRAPPED = re.compile(
    r"\A(?:\"[^\"]*\"|'[^']*'|“[^“”]*”|«[^«»]*»|‘[^‘’]*’|„[^„“”]*[“”]|```.*```|<(\w+)>.*</\1>|\{\s*\".*\})\Z", re.DOTALL
)
"""Quotes, a fence, tags or JSON braces around the whole text."""
_NO_TASK = re.compile(
    r"\W*(?:no|nope|never|yes|ok|okay|sure|done|none|nothing|null|nan|undefined|error|n/a|i (?:can't|cannot|won't))\W*",
    re.IGNORECASE,
)
"""Texts in the place of a task."""
_UNFINISHED = re.compile(r"(?:[,;(\[{–—-]|\b(?:and|or|the|an?|of|with|because|including|such as|between|from))\Z")
_MARK = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?think(?:ing)?>|</s>")
"""Markers of the turns of a chat template, or of a model's reasoning."""
_LABELS = {"task", "instruction", "prompt", "question", "answer", "input", "output", "response", "q", "a"}
_LEAK = 6
"""A run of so many words of the operation's prompt that is not the instruction's was copied."""
_LONG_WORD = 12
"""Characters that count as at least one word, for scripts that do not separate words."""
_LOOP, _LOOP_FROM = 0.5, 24
"""A rewrite of at least 24 words is repetitive if this share of its word 4-grams are repetitions."""


@dataclass(frozen=True)
class Limits:
    """The longest rewrite and the longest answer, in words. Twelve characters count as at least one word."""

    max_words: int = 300
    max_answer_words: int = 1000


def broken_by_rewrite(text: str, finish: FinishReason, *, instruction: str, prompt: str, limits: Limits) -> str | None:
    """The rule that a rewrite of ``instruction`` breaks, or None. ``prompt``: the operation's, with its placeholder.

    ``empty``: no letter or digit. ``garbled``: characters that no text has. ``too_long``: more than
    ``limits.max_words`` words. ``refusal``: it begins like a refusal. ``cut``: the guide ran out of tokens, or the text
    ends in the middle. ``template``: it has six consecutive words of the operation's prompt, or markers of a chat
    template (``<|im_end|>``, ``<think>``). ``chatter``: words about the rewrite, quotes and the like around it, or no
    task at all. ``unchanged``: equal to the instruction but for space, case and punctuation. ``repetitive``: half of
    its word 4-grams are repetitions.
    """
    if (rule := _broken(text, finish, instruction, limits.max_words)) is not None:
        return rule
    if leaks(text, prompt, instruction):
        return "template"
    if essence(text) == essence(instruction):
        return "unchanged"
    if _NO_TASK.fullmatch(text.replace("’", "'")) or any(
        pattern.search(text) and not pattern.search(instruction) for pattern in (_CHATTER, _AFTERWORD, _WRAPPED)
    ):
        return "chatter"
    if _UNFINISHED.search(text) and not _UNFINISHED.search(instruction):
        return "cut"
    tokens = words(text)
    return "repetitive" if len(tokens) >= _LOOP_FROM and repeated_share(tokens, 4) >= _LOOP else None


def broken_by_answer(text: str, finish: FinishReason, *, instruction: str, limits: Limits) -> str | None:
    """The rule that an answer to ``instruction`` breaks, or None: ``empty``, ``garbled``, ``too_long``, ``refusal``,
    ``cut`` (by tokens alone) and ``template`` (by markers alone) as for rewrites; ``echo``: the instruction itself, and
    at most labels.
    """
    if (rule := _broken(text, finish, instruction, limits.max_answer_words)) is not None:
        return rule
    same = essence(instruction)
    rest = set(words(text)) - set(words(instruction))
    return "echo" if same and same in essence(text) and rest <= _LABELS else None


def _broken(text: str, finish: FinishReason, instruction: str, max_words: int) -> str | None:
    if not any(char.isalnum() for char in text):
        return "empty"
    if is_garbled(text):
        return "garbled"
    if max(len(text.split()), len(text) / _LONG_WORD) > max_words:
        return "too_long"
    if is_refusal(text) and not is_refusal(instruction):
        return "refusal"
    if finish == "length":
        return "cut"
    return None if {*_MARK.findall(text)} <= {*_MARK.findall(instruction)} else "template"


def is_refusal(text: str) -> bool:
    """Whether a text begins like a refusal, or is no more than an apology."""
    plain = _GREETING.sub("", text.replace("’", "'"), count=1)
    brief = len(plain.split()) <= _FEW and _SORRY.match(plain) is not None
    return brief or any(pattern.match(plain) for pattern in _REFUSALS)


def leaks(text: str, prompt: str, instruction: str) -> bool:
    """Whether the text has a word run of the operation's prompt but not of the instruction, or the whole prompt."""
    if not (_runs(text) & _prompt_runs(prompt)).issubset(_runs(instruction)):
        return True
    whole = essence(prompt.replace(PLACEHOLDER, instruction))
    return whole != essence(instruction) and whole in essence(text)


@lru_cache(maxsize=64)
def _prompt_runs(prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(run for part in prompt.split(PLACEHOLDER) for run in _runs(part))


def _runs(text: str) -> set[tuple[str, ...]]:
    tokens = words(text)
    return {tuple(tokens[i : i + _LEAK]) for i in range(len(tokens) - _LEAK + 1)}
