"""The rules of form: what guides say in the place of a task or an answer, and what they must not take for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import NOUNS
from rlgf_cli.evolve.operations import read_operations
from rlgf_cli.evolve.rules import Limits, broken_by_answer, broken_by_rewrite, is_refusal
from rlgf_cli.evolve.words import essence, is_garbled, words

BUILTIN = read_operations(None)
LIMITS = Limits(max_words=150, max_answer_words=150)
INSTRUCTION = "Name five animals that live in the sea."
PROMPT = BUILTIN[1].prompt


def rewrite(text, *, finish="stop", instruction=INSTRUCTION, prompt=PROMPT):
    return broken_by_rewrite(text.strip(), finish, instruction=instruction, prompt=prompt, limits=LIMITS)


def answer(text, *, finish="stop", instruction=INSTRUCTION):
    return broken_by_answer(text.strip(), finish, instruction=instruction, limits=LIMITS)


REFUSALS = """I'm sorry, but I can't assist with that.
I’m sorry, but I can’t help with this request.
I am truly sorry, but I cannot do this.
Sorry, I can't do that.
Sorry, this is not possible.
I apologize, but I am unable to rewrite this task.
I'm afraid I can't do that.
Unfortunately, I cannot fulfill this request.
Hello! I'm sorry, but I cannot help with that.
As an AI language model, I do not have feelings.
I cannot assist with creating this content.
I can't rewrite this task, because it is harmful.
I won't help with this.
I must decline.
I'm not able to help with that.
I do not feel comfortable rewriting this task.
This request violates the usage policy.
I'm just an AI and have no access to it.
My apologies, but I am not able to generate that.
Thank you for asking, but I cannot provide this.
I'm sorry.
We are unable to comply with this request.
I would like to decline this.
I'd rather decline.""".splitlines()


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert is_refusal(text)
    assert rewrite(text) == answer(text) == "refusal"
    assert rewrite(text + " Write something else.", instruction=text) != "refusal"  # the task was like that before


@pytest.mark.parametrize(
    "text",
    [
        "I can't sleep. Give me five ideas that could help me and that need no medicine.",
        "Write an apology that begins with the words I am sorry, and name the reason.",
        "I am sorry that I was late yesterday. The train stood still for an hour and my phone was empty all the while.",
        "Unfortunately, my cat does not eat the new food. What should I do about it, and whom should I ask?",
        "I have to write a letter to my landlord. Draft it in a friendly tone.",
        "I need help with my garden: plan the beds for spring.",
        "I would like to write a poem about rain; give me a first line.",
        "Explain why a language model can make mistakes, as an AI researcher would.",
        "As an aid for teachers, list five games.",
        "No, because the sum of two odd numbers is even.",
    ],
)
def test_what_is_no_refusal(text):
    assert not is_refusal(text)
    assert rewrite(text) is None and answer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Sure! Here is the rewritten task: Name five blue animals of the sea.",
        "Sure, here's a new task:\n\nName five blue animals.",
        "Certainly! Name five blue animals.",
        "Task: Name five blue animals of the sea.",
        "Task:\nName five blue animals of the sea.",
        "**Task:** Name five blue animals of the sea.",
        "### New instruction\nName five blue animals of the sea.",
        "Instruction 2: Name five blue animals.",
        "The rewritten instruction is:\nName five blue animals.",
        "Here's a more complex version of the task: Name five blue animals.",
        "I have rewritten the task. Name five blue animals.",
        '"Name five blue animals of the sea."',
        "“Name five blue animals of the sea.”",
        "```\nName five blue animals\n```",
        "<task>Name five blue animals</task>",
        '{"task": "Name five blue animals"}',
        "Name five blue animals of the sea.\n\nLet me know if you want more.",
        "Name five blue animals of the sea.\n\nNote: I added the colour.",
        "Name five blue animals of the sea.\n\n**Explanation:** the colour is added.",
        "No.",
        "N/A",
        "I can't.",
    ],
)
def test_chatter_around_a_task(text):
    assert rewrite(text) == "chatter"
    assert rewrite(f"{text} And more", instruction=text) != "chatter"  # it was part of the task before


@pytest.mark.parametrize(
    "text",
    [
        "Name five blue animals that live in the sea, and say what each eats.",
        'Given the sentence "I am here", name its verb.',
        "Write a task list for a team of five: who does what by Friday?",
        "The instructions of a game are given below. Rewrite them for children.\n\nRules: roll the dice.",
        "Translate to French:\n\nWhere is the station?",
        "Create a question about the sea for a quiz of ten year olds.",
        "Below is a question about chemistry. Answer it in one line, and name a source.\n\nWhat is salt?",
        "Here is a list of animals. Sort it: cat, dog, bird.",
        "Answer the question: who was the first king of Rome?",
        'What is the difference between "affect" and "effect"?',
        '"Know thyself" is an old saying. Explain "thyself" to a child.',
        'In Python, what does print("a") do?',
        "请写一首关于春天的诗,并且使用七个字。",
        "बारिश पर एक छोटी कविता लिखिए।",
        "Arrange these chords: C, F, G and A",
        "I have created a list of rivers. Sort it by length.",
    ],
)
def test_tasks_of_all_kinds_break_no_rule(text):
    assert rewrite(text) is None


@pytest.mark.parametrize(
    ("text", "finish", "rule"),
    [
        ("", "stop", "empty"),
        (" \n\t", "stop", "empty"),
        ("...!?", "stop", "empty"),
        ("Name five\x00 animals", "stop", "garbled"),
        ("Name \ud83d animals", "stop", "garbled"),
        ("Name \ufffd\ufffd animals", "stop", "garbled"),
        ("Name \u202esix animals", "stop", "garbled"),
        ("w " * 151, "stop", "too_long"),
        ("x" * 2000, "stop", "too_long"),
        ("海" * 2000, "stop", "too_long"),
        ("Name five animals that", "length", "cut"),
    ],
)
def test_rules_of_every_text(text, finish, rule):
    assert rewrite(text, finish=finish) == answer(text, finish=finish) == rule


@pytest.mark.parametrize("text", ["Name five animals, ", "Name five animals and", "Name five of the", "Name (", "A -"])
def test_a_rewrite_that_ends_in_the_middle_is_cut_whatever_the_server_says(text):
    assert rewrite(text) == "cut"


@pytest.mark.parametrize(
    "text",
    [
        "Name five animals that live in the sea",
        "  name FIVE\n\nanimals that live in the sea!! ",
        "Na\u200bme five animals that live in the sea.",
        "Name-five-animals that live in the sea",
        "Ｎａｍｅ five animals that live in the sea.",
    ],
)
def test_the_same_in_other_clothes_is_unchanged(text):
    assert rewrite(text) == "unchanged"
    assert answer(text) == "echo"


def test_a_sign_or_a_number_more_is_a_change():
    assert rewrite("Compute 2 + 3", instruction="Compute 2 = 3") is None
    assert rewrite("Compute 2 + 4", instruction="Compute 2 + 3") is None


@pytest.mark.parametrize("operation", BUILTIN, ids=lambda operation: operation.name)
def test_a_parrot_is_found_for_every_operation(operation):
    asked = operation.prompt_for(INSTRUCTION)
    middle = " ".join(asked.split()[4:14])
    for text in (asked, asked.replace("\n", " ").upper(), f"Name a fish. {middle}", asked.split("\n\n")[1]):
        assert rewrite(text, prompt=operation.prompt) == "template"


def test_a_short_prompt_that_is_repeated_is_a_leak_too():
    assert rewrite(f"Make harder: {INSTRUCTION}", prompt="Make harder: {instruction}") == "template"
    assert rewrite("Make a harder list of six fish", prompt="Make harder: {instruction}") is None


def test_words_of_the_template_that_the_instruction_has_itself_are_its_own():
    own = "Here is a task that somebody gave to an assistant. Say what is odd in it."
    assert rewrite(own + " Use ten words.", instruction=own) is None


def test_a_loop_is_repetitive():
    assert rewrite("go home now and " * 12 + "rest") == "repetitive"


@pytest.mark.parametrize("label", ["", "Task: ", "Question: ", "Q: "])
def test_an_answer_that_repeats_the_question_is_an_echo(label):
    assert answer(f"{label}{INSTRUCTION}") == answer(f"{label}{INSTRUCTION}\nAnswer:") == "echo"
    assert answer(f"{label}{INSTRUCTION} Whale, crab, squid, seal, cod.") is None


MARKS = ["<think>\nWell.\n</think>\n{}", "{}<|im_end|>", "[INST] {} [/INST]", "<|start_header_id|>user\n{}", "{}</s>"]


@pytest.mark.parametrize("around", MARKS)
def test_marks_of_a_chat_template_are_no_part_of_a_text(around):
    text = around.format("Name five rivers and their lengths.")
    assert rewrite(text) == answer(text) == "template"
    asked = around.format("Say what these marks are for.")
    assert rewrite(text, instruction=asked) is None and answer(text, instruction=asked) is None


def test_marks_of_other_kinds_are_left_alone():
    for text in ("Explain what <b>bold</b> does in x<|y.", "Let a[i] be f |> g <| h.", "What does a [install] tag do?"):
        assert rewrite(text) is None and answer(text) is None


@pytest.mark.parametrize("text", ["No.", "Blue", "Sure, it is Paris.", '"Know thyself"', "Task: rest", "4", "{'a': 1}"])
def test_short_and_quoted_answers_are_answers(text):
    assert answer(text) is None


@given(st.text(max_size=80), st.lists(st.sampled_from(NOUNS), min_size=1, max_size=9))
def test_a_kept_text_has_words_and_no_odd_characters(text, nouns):
    instruction = " ".join(nouns)
    for rule in (rewrite(text, instruction=instruction), answer(text, instruction=instruction)):
        if rule is None:
            assert any(char.isalnum() for char in text)
            text.strip().encode("utf-8")
            assert "\x00" not in text
    if rewrite(text, instruction=instruction) is None:
        assert essence(text) != essence(instruction)


@given(st.text(max_size=60))
def test_words_are_pieces_of_the_essence(text):
    assert "".join(words(text)) == essence(text)
    assert is_garbled(text) or not is_garbled(text + " a")
