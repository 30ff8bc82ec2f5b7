"""A scripted guide: its rewrite of an instruction is a pure function of the operation, the instruction and a seed.

All that it knows of the past it reads from the instruction itself, by the words that its own sentences begin with:

| operation | what it does | when it does no more |
|---|---|---|
| breadth | another task of the field: one of five, worded always alike | the set holds it already |
| constraints | one more condition | after two: the instruction comes back as it was |
| concretizing | a case, with names and numbers | after one: the instruction comes back as it was |
| deepening | what follows for the case, at length | without a case it refuses; after one: as it was |
| reasoning | steps that build on the conditions | without a condition, or after one: as it was |
| complicate_input | a table to work on | the second one is far too long |

So conditions saturate, a deeper treatment pays only after a case, reasoning only after a condition, and breadth only
while the set still lacks what it gives; but breadth begins the instruction anew, and then all else pays again. What is
added to a long instruction changes it little, so that the order matters too. Whether a rewrite does anything depends on
the state alone; the seed draws its words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

CONDITION, CASE, DEEPER, STEPS, MATERIAL = "Condition:", "The case:", "Go deeper:", "In this order:", "Material:"
TOPICS = 5
"""Tasks of a field that breadth knows."""

FIELDS = (
    "beekeeping astronomy carpentry navigation pottery chess meteorology brewing weaving archaeology sailing baking"
)
_VERBS = "Describe Compare Outline Summarise Criticise Explain Sketch Classify Estimate Defend Translate Review"
_THINGS = (
    "kites clocks rivers lanterns violins orchards bridges letters mirrors tunnels carpets engines islands ladders "
    "maps pebbles saddles telescopes umbrellas windmills candles barrels feathers gloves hammers kettles magnets "
    "needles pulleys ropes shells tickets valves wheels anchors baskets coins drums fences gardens helmets jars keys "
    "looms"
)
_QUALITIES = (
    "brittle crimson drowsy enormous fragile gloomy hollow icy jagged lively mellow narrow oval polished quiet rusty "
    "silver timid uneven velvet woven yellow amber blunt curved dusty elastic faded glossy humid"
)
_NAMES = "Amina Boris Chandra Dmitri Elena Farid Greta Hiro Ines Jonas Keiko Lars Mbali Nadia Omar Priya Quentin Rosa"
_JOBS = "surgeon librarian plumber diver baker judge pilot tailor farmer teacher chemist guard painter miner broker"
_PLACES = "Lisbon Nairobi Osaka Quito Riga Sydney Tunis Utrecht Vienna Warsaw Xian Yerevan Zagreb Bergen Cairo Delhi"
_ACTS = (
    "borrow bury catch deliver exchange fold gather hide inspect join knock lift measure notice obtain paint question "
    "repair scatter trade unload visit weigh wrap assemble balance collect divide"
)
_TIMES = "dawn midnight harvest winter monsoon noon carnival Easter autumn sunset Monday twilight spring Lent"
_READERS = "beginners auditors children rivals sceptics nurses voters tourists engineers grandparents sailors editors"


def rewrite(operation: str, instruction: str, seed: int) -> str:
    """The rewrite of ``instruction`` by an operation of the six; another operation's is the instruction as it was."""
    draw = _Draw(operation, instruction, seed)
    if operation == "breadth":
        return task(field_of(instruction), draw.below(TOPICS))
    if operation == "constraints" and instruction.count(CONDITION) < 2:
        return f"{instruction} {CONDITION} {_condition(draw)}"
    if operation == "concretizing" and CASE not in instruction:
        return f"{instruction} {CASE} {_case(draw)}"
    if operation == "deepening" and CASE not in instruction:
        return "I'm sorry, but nothing in this task can be treated more deeply."
    if operation == "deepening" and DEEPER not in instruction:
        return f"{instruction} {DEEPER} {_deeper(draw)}"
    if operation == "reasoning" and CONDITION in instruction and STEPS not in instruction:
        return f"{instruction} {STEPS} {_steps(draw)}"
    if operation == "complicate_input":
        return f"{instruction}\n{MATERIAL}\n{_table(draw, 100 if MATERIAL in instruction else 8)}"
    return instruction


def answer(prompt: str, seed: int) -> str:
    """An answer to an instruction: a few sentences in words of its own."""
    draw = _Draw("answer", prompt, seed)
    sentences = [
        f"The {draw(_QUALITIES)} {draw(_THINGS)} that {draw(_READERS)} {draw(_ACTS)} before {draw(_TIMES)} are best "
        f"kept near the {draw(_QUALITIES)} {draw(_THINGS)}."
        for _ in range(1 + draw.below(4))
    ]
    return " ".join(sentences)


def task(field: str, topic: int) -> str:
    """The wording of a field's task."""
    draw = _Draw("task", field, topic)
    return (
        f"{draw(_VERBS)} how {draw(_READERS)} in {field} {draw(_ACTS)} {draw(_QUALITIES)} {draw(_THINGS)} "
        f"with {draw(_QUALITIES)} {draw(_THINGS)} by {draw(_TIMES)}."
    )


def field_of(instruction: str) -> str:
    """The field that an instruction names, or, where it names none, the one that its first words stand for."""
    words = instruction.split()
    named = [field for field in FIELDS.split() if field in words[:12]]
    return named[0] if named else _Draw("field", " ".join(words[:8]), 0)(FIELDS)


class _Draw:
    """Words in a row, fixed by what they are drawn for."""

    def __init__(self, *key: object) -> None:
        self._key, self._count = repr(key), 0

    def below(self, n: int) -> int:
        self._count += 1
        return int.from_bytes(hashlib.sha256(f"{self._key} {self._count}".encode()).digest()[:8], "big") % n

    def __call__(self, words: str | Sequence[str]) -> str:
        choices = words.split() if isinstance(words, str) else words
        return choices[self.below(len(choices))]


def _condition(draw: _Draw) -> str:
    return (
        f"{draw(_ACTS)} no {draw(_QUALITIES)} {draw(_THINGS)}, mention {2 + draw.below(40)} {draw(_THINGS)} and write "
        f"for {draw(_READERS)}."
    )


def _case(draw: _Draw) -> str:
    return (
        f"{draw(_NAMES)}, {draw(_JOBS)} of {draw(_PLACES)}, has {2 + draw.below(90)} {draw(_QUALITIES)} "
        f"{draw(_THINGS)} since {draw(_TIMES)} {1900 + draw.below(120)}."
    )


def _deeper(draw: _Draw) -> str:
    return (
        f"which {draw(_QUALITIES)} {draw(_THINGS)} make {draw(_READERS)} {draw(_ACTS)} their {draw(_THINGS)}, what "
        f"{draw(_READERS)} at {draw(_TIMES)} lose by {draw(_QUALITIES)} {draw(_THINGS)}, and whether {draw(_PLACES)} "
        f"could {draw(_ACTS)} every {draw(_QUALITIES)} {draw(_THINGS)}?"
    )


def _steps(draw: _Draw) -> str:
    return (
        f"{draw(_ACTS)} the {draw(_THINGS)}, derive {draw(_QUALITIES)} {draw(_THINGS)} from that, then {draw(_ACTS)} "
        f"{draw(_READERS)} against {draw(_QUALITIES)} {draw(_THINGS)}."
    )


def _table(draw: _Draw, rows: int) -> str:
    return "\n".join(f"{draw(_NAMES)} | {draw(_THINGS)} | {draw.below(1000)} | {draw(_PLACES)}" for _ in range(rows))
