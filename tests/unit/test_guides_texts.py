"""Templates, stop texts, and the repair of a chat model's continuation."""

from __future__ import annotations

from collections import Counter

import pytest

from rlgf_cli.guides.cleanup import clean_continuation, clean_text, cut_at_stop, fill, without_chatter


def test_templates_are_filled_at_once() -> None:
    assert fill("Q: {prompt}\nA: {prefix}", "what is {prefix}?", "{prompt} {x}") == (
        "Q: what is {prefix}?\nA: {prompt} {x}"
    )


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\ntwo", ["\n"], ("one", True)),
        ("one two", ["\n"], ("one two", False)),
        ("a END b STOP", ["STOP", "END"], ("a ", True)),
        ("anything", [], ("anything", False)),
    ],
)
def test_stop_texts(text: str, stops: list[str], expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stops) == expected


@pytest.mark.parametrize(
    ("prefix", "text", "repaired", "repairs"),
    [
        # a word follows a word: the space that chat models drop
        ("the dog", "runs home.", " runs home.", {"space_added": 1}),
        ("the dog,", "which runs", " which runs", {"space_added": 1}),
        ("the dog ", "runs home.", "runs home.", {}),
        ("the dog", ", which runs", ", which runs", {}),
        ("the dog", ".", ".", {}),
        ("twenty-", "one", "one", {}),
        ("犬は", "走る", "走る", {}),
        # the whole text again
        ("the dog", "the dog runs home.", " runs home.", {"prefix_removed": 1}),
        ("the dog ", "The  dog runs home.", "runs home.", {"prefix_removed": 1}),
        ("the dog", "the dogs run", "s run", {"prefix_removed": 1}),
        ("the", "the dog", " the dog", {"space_added": 1}),
        # quotes around it
        ("the dog", '"runs home."', " runs home.", {"quotes_removed": 1, "space_added": 1}),
        ("the dog", "“the dog runs”", " runs", {"quotes_removed": 1, "prefix_removed": 1}),
        ("he said", '"no" and "yes"', '"no" and "yes"', {}),
        ("the dog", "", "", {}),
        # a space of its own is none of ours
        ("the dog", " runs home.", " runs home.", {}),
        # talk about the answer
        (
            "the dog",
            "Sure! Here is the continuation:\n\nruns home.",
            " runs home.",
            {"chatter_removed": 1, "space_added": 1},
        ),
        ("the dog", "Certainly.\n\nthe dog runs", " runs", {"chatter_removed": 1, "prefix_removed": 1}),
        ("the dog", "...runs home.", " runs home.", {"chatter_removed": 1, "space_added": 1}),
        ("the dog", "sure of itself, runs home", " sure of itself, runs home", {"space_added": 1}),
        ("he", "said: go\nLet me know if you need more!", " said: go", {"chatter_removed": 1, "space_added": 1}),
    ],
)
def test_continuations_are_repaired_and_counted(prefix: str, text: str, repaired: str, repairs: dict[str, int]) -> None:
    counts: Counter[str] = Counter()
    assert clean_continuation(prefix, text, counts) == repaired
    assert counts == repairs


@pytest.mark.parametrize(
    ("prefix", "text", "joined"),
    [
        ("the d", "og runs ", "og runs"),  # no space is put into a word
        ("the dog", " runs", " runs"),
        ("the dog", "\nIt runs", "\nIt runs"),
        ("the dog ", " runs", "runs"),  # templates cut white space off the end of a message
        ("wait", "... what", "... what"),
        ("the dog", " \n", ""),
    ],
)
def test_the_model_s_own_message_goes_on_as_it_wrote_it(prefix: str, text: str, joined: str) -> None:
    counts: Counter[str] = Counter()
    assert clean_continuation(prefix, text, counts, begun=True) == joined
    assert not counts


def test_chatter_alone_is_an_answer() -> None:
    counts: Counter[str] = Counter()
    assert without_chatter("Sure!", counts) == "Sure!"
    assert without_chatter("Here is the thing about dogs", counts) == "Here is the thing about dogs"
    assert not counts


def test_whole_answers_are_cleaned_where_asked_for() -> None:
    text = 'Sure, here you go:\n"The dog runs." STOP more'
    plain = clean_text(text, prefix="", stops=["STOP"], finish="length", chat=True, chatter=False)
    assert plain == ('Sure, here you go:\n"The dog runs."', "stop", ("cut_at_stop",))
    clean = clean_text(text, prefix="", stops=["STOP"], finish="length", chat=True, chatter=True)
    assert clean == ("The dog runs.", "stop", ("chatter_removed", "cut_at_stop", "quotes_removed"))
