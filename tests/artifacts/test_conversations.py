"""Conversations in data files: the formats of TRL and of chat APIs, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import write_rows
from rlgf_cli.artifacts.check import check
from rlgf_cli.artifacts.collected import CollectedTexts
from rlgf_cli.artifacts.conversations import split_pair
from rlgf_cli.artifacts.jsonl import dump_line, read_examples
from rlgf_cli.artifacts.predictions import answers_to
from rlgf_cli.artifacts.records import ExampleRecord, GuideRecord, prompt_hash
from rlgf_cli.errors import UserError
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.protocols import Example, Message
from rlgf_cli.protocols.messages import transcript

S, Q1, A1, Q2, A2 = (
    {"role": role, "content": content}
    for role, content in [
        ("system", "Be brief."), ("user", "A cat?"), ("assistant", "An animal."), ("user", "A dog?"),
        ("assistant", "Another one."),
    ]
)  # fmt: skip
CONVERSATION = [S, Q1, A1, Q2]
MESSAGES = tuple(Message(**message) for message in CONVERSATION)


def read(tmp_path: Path, *rows: dict[str, Any], **how: Any) -> list[Example]:
    return read_examples(write_rows(tmp_path / "x.jsonl", rows), **how)


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"prompt": CONVERSATION}, ()),
        ({"prompt": CONVERSATION, "references": ["Another one."]}, ("Another one.",)),
        ({"prompt": CONVERSATION, "references": [A2, [A1]]}, ("Another one.", "An animal.")),
        ({"prompt": CONVERSATION, "completion": [A2]}, ("Another one.",)),  # TRL: prompt-completion
        ({"messages": [*CONVERSATION, A2]}, ("Another one.",)),  # TRL: language modeling
        ({"messages": CONVERSATION}, ()),  # it waits for an answer
        ({"chosen": [*CONVERSATION, A2], "rejected": [*CONVERSATION, A1]}, ()),  # TRL: preference, implicit prompt
        ({"prompt": CONVERSATION, "chosen": [A2], "rejected": [A1]}, ()),
        ({"prompt": CONVERSATION, "messages": "mine", "completion": "a guide's text"}, ()),
    ],
)
def test_every_format_becomes_one_example(tmp_path: Path, row: dict[str, Any], references: tuple[str, ...]) -> None:
    (example,) = read(tmp_path, row)
    assert example == Example("line-1", "A dog?", references, {}, MESSAGES)
    assert example.given == MESSAGES


def test_a_plain_prompt_beside_messages_is_the_prompt(tmp_path: Path) -> None:
    (example,) = read(tmp_path, {"prompt": "dog", "messages": [Q1, A1], "references": ["x"]})
    assert (example.given, example.messages, example.references) == ("dog", (), ("x",))


def test_a_completion_that_is_a_text_is_no_reference(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no references") as caught:
        read(tmp_path, {"prompt": "dog", "completion": "a guide's"}, need_references=True)
    assert "--guide" in (caught.value.hint or "")


def test_references_are_left_unread_where_none_are_wanted(tmp_path: Path) -> None:
    assert read(tmp_path, {"messages": [Q1, A1], "references": 7}, references=False)[0].references == ()


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        ({"prompt": []}, "'prompt': it holds no message", "drop the record"),
        ({"prompt": ["a", "b"]}, "'prompt': message 1 is str", "a conversation is a list of"),
        ({"prompt": [{"role": "user"}]}, "message 1 has no 'content'", "a conversation is"),
        ({"prompt": [{"from": "human", "value": "x"}]}, "message 1 has no 'role'", "from and value are called role"),
        ({"prompt": [S, {"role": "tool", "content": "x"}]}, "message 2 has the role 'tool'", "system, user, assistant"),
        ({"prompt": [S, {"role": "user", "content": " \n"}]}, "message 2 (user) is empty", "drop the message"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "content of message 1 is list", "one text"),
        ({"prompt": [S, S, Q1]}, "it has 2 system messages", "join them"),
        ({"prompt": [Q1, S]}, "its system message is message 2", "the first one"),
        ({"prompt": [S]}, "it has no message of the user", "ends with a message of the user"),
        ({"prompt": [Q1, A1]}, "it ends with a message of the assistant", "stands in references"),
        ({"prompt": [Q1, {**A1, "tool_calls": [{}]}, Q2]}, "message 2 calls a tool", "drop such"),
        ({"messages": [S, A1]}, "'messages': it has no message of the user before its last turn", "answers"),
        ({"messages": [Q1, A1], "references": ["x"]}, "and there are references too", "leave the references out"),
        ({"prompt": "x", "references": [Q1]}, "'references': it is a message of the user", "of the assistant"),
        ({"prompt": "x", "references": [[Q1, A1]]}, "it holds 2 messages", "belong to the prompt"),
        ({"prompt": [Q1], "completion": [A1, Q2]}, "'completion': it holds 2 messages", "belong to the prompt"),
        ({"chosen": [Q1, A1], "rejected": [Q2, A2]}, "'rejected': it differs from 'chosen' before", "same messages"),
        ({"chosen": [Q1, A1], "rejected": [Q1]}, "'rejected': it ends with a message of the user", "the assistant's"),
    ],
)
def test_what_is_wrong_is_said_with_line_and_remedy(
    tmp_path: Path, row: dict[str, Any], message: str, hint: str
) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"prompt": "good", "references": ["b"]}, row])
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert caught.value.where == f"{path}:2"
    assert message in caught.value.message and hint in (caught.value.hint or "")
    (error,) = check(path, "examples").errors
    assert (error.where, error.message) == (f"{path}:2", caught.value.message)


def test_check_knows_the_formats(tmp_path: Path) -> None:
    for row in ({"messages": [Q1, A1]}, {"prompt": [Q1], "completion": [A1]}, {"prompt": [Q1]}):
        found = check(write_rows(tmp_path / "x.jsonl", [row]))
        assert (found.kind, found.records, found.errors) == ("examples", 1, [])
    assert check(write_rows(tmp_path / "x.jsonl", [{"prompt": [Q1], "completion": "a"}])).kind == "guide"


def test_a_stage_of_single_texts_refuses_conversations(tmp_path: Path, run_cli: Any) -> None:
    path = write_rows(tmp_path / "seeds.jsonl", [{"prompt": "a"}, {"prompt": CONVERSATION}])
    with pytest.raises(UserError, match=r"x\.jsonl:2: the prompt is a conversation, and this command works on single"):
        read(tmp_path, {"prompt": "a"}, {"prompt": CONVERSATION}, conversations=False)
    result = run_cli("evolve", "stats", path, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "seeds.jsonl:2: the prompt is a conversation" in result.stderr


# --- pairs


def test_pairs_in_every_form() -> None:
    rejected = {"role": "assistant", "content": "No."}
    expected = (MESSAGES, "Another one.", "No.")
    assert split_pair(MESSAGES, [A2], [rejected]) == expected
    assert split_pair(None, [*CONVERSATION, A2], [*CONVERSATION, rejected]) == expected
    assert split_pair(MESSAGES, [*CONVERSATION, A2], [*CONVERSATION, rejected]) == expected
    assert split_pair("A dog?", [*CONVERSATION, A2], [*CONVERSATION, rejected]) == expected  # its last question
    assert split_pair("x", [A2], [rejected]) == ("x", "Another one.", "No.")
    assert split_pair(None, [A2], [rejected]) == ("", "Another one.", "No.")
    with pytest.raises(UserError, match="it begins with messages that are not those of the prompt"):
        split_pair("A cow?", [*CONVERSATION, A2], [*CONVERSATION, rejected])


# --- the prompt on disk, and what it is matched by


def test_plain_prompts_have_the_hash_that_they_had() -> None:
    assert prompt_hash("dog") == "cd6357efdd966de8c0cb2f876cc89ec74ce35f0968e11743987084bd42fb8944"


def test_conversations_with_an_equal_last_turn_are_told_apart(tmp_path: Path) -> None:
    other = (Message("system", "Be verbose."), *MESSAGES[1:])
    hashes = {prompt_hash(p) for p in (MESSAGES, other, MESSAGES[1:], MESSAGES[3:], "A dog?", transcript(MESSAGES))}
    assert len(hashes) == 6
    rows = [
        {"prompt": CONVERSATION, "completion": "brief"},
        {"prompt": [{"role": "system", "content": "Be verbose."}, *CONVERSATION[1:]], "completion": [A2]},
        {"prompt": "A dog?", "completion": "plain"},
    ]
    path = write_rows(tmp_path / "guide.jsonl", rows)
    guide = RecordedGuide(path)
    texts = [guide.samples(Example.of(str(i), p))[0].text for i, p in enumerate((MESSAGES, other, "A dog?"))]
    assert texts == ["brief", "Another one.", "plain"]
    assert guide.samples(Example.of("x", MESSAGES[3:])) == []

    collected = CollectedTexts()
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": CONVERSATION}, {"prompt": [Q2]}])
    examples = list(collected.examples(data))
    collected.read(path)
    assert [collected.missing(example, 1) for example in examples] == [[], [0]]
    collected.close()

    with pytest.raises(UserError, match="belong to no example"):
        answers_to([Example.of("a", MESSAGES)], path)


def test_predictions_join_by_the_whole_conversation(tmp_path: Path) -> None:
    other = (Message("system", "Be verbose."), *MESSAGES[1:])
    rows = [
        {"prompt": [{"role": "system", "content": "Be verbose."}, *CONVERSATION[1:]], "text": "verbose"},
        {"prompt": CONVERSATION, "completion": [A2]},
    ]
    answers, _ = answers_to([Example.of("a", MESSAGES), Example.of("b", other)], write_rows(tmp_path / "p.jsonl", rows))
    assert [answer.text for answer in answers] == ["Another one.", "verbose"]


def test_records_hold_the_prompt_as_it_was_given() -> None:
    record = GuideRecord(prompt=MESSAGES, completion="x")
    line = json.loads(dump_line(record))
    assert line["prompt"] == CONVERSATION
    assert GuideRecord.model_validate(line) == record
    assert json.loads(dump_line(ExampleRecord(prompt="dog")))["prompt"] == "dog"
    assert transcript(MESSAGES[:2]) == "[system]\nBe brief.\n\n[user]\nA cat?"


# --- prepare


def test_prepare_reads_conversations(tmp_path: Path, run_cli: Any) -> None:
    rows = [
        {"messages": [*CONVERSATION, A2]},
        {"messages": [S, Q2, A2]},  # another conversation with the same last turn
        {"messages": [*CONVERSATION, A2]},  # the first one again
        {"prompt": [Q1], "completion": [A1]},
    ]
    data = write_rows(tmp_path / "chat.jsonl", rows)
    result = run_cli("prepare", "--dataset", data, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    written = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["references"]) for row in written] == [
        (CONVERSATION, ["Another one."]), ([S, Q2], ["Another one."]), ([Q1], ["An animal."]),
    ]  # fmt: skip

    named = write_rows(tmp_path / "named.jsonl", [{"talk": [Q1, A1]}, {"talk": [Q1, S]}])
    result = run_cli("prepare", "--dataset", named, "--map", "prompt=talk", "--drop-bad", "-o", tmp_path / "mapped")
    assert result.exit_code == 0, result.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "mapped" / "train.jsonl").read_text().splitlines()]
    assert (row["prompt"], row["references"]) == ([Q1], ["An animal."])
    result = run_cli("prepare", "--dataset", named, "--map", "prompt=talk", "-o", tmp_path / "refused")
    assert result.exit_code == 2
    assert "named.jsonl:2: the field 'talk': its system message is message 2" in result.stderr
