"""Rules that a rewrite, or the answer to an instruction, has to keep to be part of the set.

Each has a name that it is counted by. They look at form alone and never at what somebody thinks of a text. A rule that
an instruction breaks itself is not held against what was made from it.
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
"""How a text begins that refuses, behind a greeting. An instruction speaks of itself rarely enough in these words."""
_SORRY = re.compile(r"(?:(?:i am|i'm|we are|we're) (?:\w+ )?)?(?:sorry|(?:my )?apologies)\b", re.IGNORECASE)
_FEW = 12
"""An apology of so few words has nothing else in it."""

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
"""How a text begins that announces a task before it gives it."""
_AFTERWORD = re.compile(
    r"\n\s*(?:let me know|i hope|hope this|feel free|is there anything|would you like me|note that i"
    r"|\W{0,3}(?:note|explanation|changes(?: made)?|rationale|reasoning|answer|solution|response)\W{0,3}:)"
    r"[^\n]*(?:\n|\Z)",
    re.IGNORECASE,
)
"""Words about the rewrite behind it, or its answer."""
_WRAPPED = re.compile(
    r"\A(?:\"[^\"]*\"|'[^']*'|“[^“”]*”|«[^«»]*»|‘[^‘’]*’|„[^„“”]*[“”]|```.*```|<(\w+)>.*</\1>|\{\s*\".*\})\Z", re.DOTALL
)
"""Quotes, a fence, tags or braces of JSON around all of a text."""
_NO_TASK = re.compile(
    r"\W*(?:no|nope|never|yes|ok|okay|sure|done|none|nothing|null|nan|undefined|error|n/a|i (?:can't|cannot|won't))\W*",
    re.IGNORECASE,
)
"""What is said in the place of a task."""
_UNFINISHED = re.compile(r"(?:[,;(\[{–—-]|\b(?:and|or|the|an?|of|with|because|including|such as|between|from))\Z")
_MARK = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>|</?think(?:ing)?>|</s>")
"""What stands between the turns of a chat template, or around what a model thinks."""
_LABELS = {"task", "instruction", "prompt", "question", "answer", "input", "output", "response", "q", "a"}
_LEAK = 6
"""So many words in a row of what the guide was asked, and not of the instruction, were copied."""
_LONG_WORD = 12
"""Characters that count as a word at least, where nothing separates words."""
_LOOP, _LOOP_FROM = 0.5, 24
"""A rewrite of so many words repeats itself where this share of its runs of four words were there before."""


@dataclass(frozen=True)
class Limits:
    """The longest rewrite and the longest answer, in words. Twelve characters count as one word at least."""

    max_words: int = 300
    max_answer_words: int = 1000


def broken_by_rewrite(text: str, finish: FinishReason, *, instruction: str, prompt: str, limits: Limits) -> str | None:
    """The rule that a rewrite of ``instruction`` breaks, or None. ``prompt``: the operation's, with its placeholder.

    ``empty``: no letter or digit. ``garbled``: characters that no text has. ``too_long``: more than
    ``limits.max_words`` words. ``refusal``: it begins as refusals do. ``cut``: the guide ran out of tokens, or it ends
    in the middle. ``template``: it has six words in a row of what the guide was asked, or marks of a chat template
    (``<|im_end|>``, ``<think>``). ``chatter``: words about the
    rewrite, quotes and the like around it, or no task at all. ``unchanged``: the instruction's own characters but for
    space, case and punctuation. ``repetitive``: it says the same again and again.
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
    found = words(text)
    return "repetitive" if len(found) >= _LOOP_FROM and repeated_share(found, 4) >= _LOOP else None


def broken_by_answer(text: str, finish: FinishReason, *, instruction: str, limits: Limits) -> str | None:
    """The rule that an answer to ``instruction`` breaks, or None: ``empty``, ``garbled``, ``too_long``, ``refusal``,
    ``cut`` (by tokens alone) and ``template`` (by marks alone) as for rewrites; ``echo``: the instruction itself, and
    labels at most.
    """
    if (rule := _broken(text, finish, instruction, limits.max_answer_words)) is not None:
        return rule
    asked, said = essence(instruction), essence(text)
    rest = set(words(text)) - set(words(instruction))
    return "echo" if asked and asked in said and rest <= _LABELS else None


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
    """Whether a text begins as refusals do, or is no more than an apology."""
    plain = _GREETING.sub("", text.replace("’", "'"), count=1)
    brief = len(plain.split()) <= _FEW and _SORRY.match(plain) is not None
    return brief or any(pattern.match(plain) for pattern in _REFUSALS)


def leaks(text: str, prompt: str, instruction: str) -> bool:
    """Whether the text has a run of words of the operation's prompt that is not the instruction's own, or all of it."""
    if not (_runs(text) & _asked(prompt)).issubset(_runs(instruction)):
        return True
    asked = essence(prompt.replace(PLACEHOLDER, instruction))
    return asked != essence(instruction) and asked in essence(text)


@lru_cache(maxsize=64)
def _asked(prompt: str) -> frozenset[tuple[str, ...]]:
    return frozenset(run for part in prompt.split(PLACEHOLDER) for run in _runs(part))


def _runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + _LEAK]) for i in range(len(found) - _LEAK + 1)}
