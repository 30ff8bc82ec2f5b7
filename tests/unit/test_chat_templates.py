"""Conversations in the chat templates of public models: rendering, BOS, the end of a turn, cutting, defaults."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from public_templates import ENDS, WRITES_BOS, public_tokenizer
from rlgf_cli.config.common import LengthConfig, ModelConfig, TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models import formats
from rlgf_cli.models.load import load, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import encode_prompts, encode_target
from rlgf_cli.models.text import TextFormat
from rlgf_cli.models.turns import turn_end
from rlgf_cli.protocols import Example, Message

CHAT = TextFormat(chat=True)
NO_THINKING = TextFormat(chat=True, chat_template_kwargs={"enable_thinking": False})
SYSTEM = Message("system", "the queen likes the river .")
TALK = (
    Message("user", "the cat ?"), Message("assistant", "the cat sees the river ."),
    Message("user", "the dog ?"), Message("assistant", "the dog likes it ."), Message("user", "a bird ?"),
)  # fmt: skip
ANSWER = "the bird finds the forest ."


@cache
def tokenizer_of(name: str) -> Any:
    return public_tokenizer(name)


def talk(name: str) -> tuple[Message, ...]:
    """The conversation, with a system message where the template takes one."""
    return TALK if name == "gemma" else (SYSTEM, *TALK)


def format_of(name: str) -> TextFormat:
    return NO_THINKING if name == "qwen3" else CHAT


def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    def make(name: str | None) -> Path:
        tokenizer = public_tokenizer(name or "chatml")
        if name is None:
            tokenizer.chat_template = None
        torch.manual_seed(1)
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
        GPT2LMHeadModel(GPT2Config(**sizes, **ids)).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


# --- rendering and the end of a turn


@pytest.mark.parametrize("name", ENDS)
def test_a_conversation_is_rendered_as_the_template_has_it(name: str) -> None:
    """Prompt, answer and end are the beginning of the rendered whole, token by token, with one BOS at most."""
    tokenizer, text = tokenizer_of(name), format_of(name)
    whole_text = tokenizer.apply_chat_template(
        [*turns(talk(name)), {"role": "assistant", "content": ANSWER}], tokenize=False, **text.chat_template_kwargs
    )
    whole = tokenizer(whole_text, add_special_tokens=False)["input_ids"]
    prompt = text.encode_prompt(tokenizer, talk(name), False)
    end = turn_end(tokenizer, text.chat_template_kwargs)
    assert (end.token, end.lead) == (ENDS[name], "")
    taught = [*prompt, *text.encode_response(tokenizer, ANSWER), end.id]
    assert taught == whole[: len(taught)]
    assert taught.count(tokenizer.bos_token_id) == (name in WRITES_BOS)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # the trap: the tokenizer would add another
    shown = tokenizer.decode(prompt)
    assert all(message.content in shown for message in talk(name))
    assert text.decode_response(tokenizer, taught[len(prompt) :]) == ANSWER


def test_qwen3_with_thinking_is_said_and_without_agrees() -> None:
    """Its template puts an empty thought before an answer; only without thinking is that in the generation prompt."""
    tokenizer = tokenizer_of("qwen3")
    assert turn_end(tokenizer).lead == "<think>\n\n</think>"
    thinking, other = (text.render_prompt(tokenizer, TALK) for text in (CHAT, NO_THINKING))
    assert other == thinking + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ENDS)
def test_a_text_is_one_message_of_the_user(name: str) -> None:
    tokenizer, text = tokenizer_of(name), format_of(name)
    assert text.render_prompt(tokenizer, "a bird ?") == text.render_prompt(tokenizer, (Message("user", "a bird ?"),))


def test_what_a_template_refuses_is_said_with_the_example(checkpoint: Any) -> None:
    loaded = load(ModelConfig(name=str(checkpoint("gemma")), device="cpu"))
    with pytest.raises(UserError) as caught:
        encode_prompts(loaded, [Example.of("x7", (SYSTEM, *TALK))], LengthConfig())
    assert str(caught.value).startswith("example 'x7': the chat template refuses a conversation of system, user")
    assert "System role not supported" in caught.value.message and "first message" in (caught.value.hint or "")
    twice = (Message("user", "a"), Message("user", "b"))
    with pytest.raises(UserError, match="of user, user: Conversation roles must alternate"):
        encode_prompts(loaded, [Example.of("x", twice)], LengthConfig())


def test_a_conversation_without_a_template_is_refused(checkpoint: Any) -> None:
    folder = checkpoint(None)
    loaded = load(ModelConfig(name=str(folder), device="cpu"))
    with pytest.raises(UserError, match=r"'x'.*the tokenizer has no chat template") as caught:
        encode_prompts(loaded, [Example.of("x", TALK)], LengthConfig())
    assert "instruct model" in (caught.value.hint or "")
    with pytest.raises(UserError, match="the text format leaves out the chat template"):
        TextFormat().render_prompt(tokenizer_of("chatml"), TALK)


# --- cutting


@pytest.mark.parametrize("encoder", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize("name", ENDS)
@given(limit=st.integers(1, 130))
def test_the_oldest_turns_go_first_then_the_last_message(name: str, encoder: bool, limit: int) -> None:
    """Of the last message a decoder keeps the end, an encoder the beginning."""
    tokenizer, text = tokenizer_of(name), format_of(name)
    system = talk(name)[: -len(TALK)]
    whole = text.encode_prompt(tokenizer, talk(name), False)
    alone = len(text.encode_prompt(tokenizer, (*system, Message("user", "")), False))
    if limit < alone:
        with pytest.raises(UserError, match=f"alone ha.* {alone} tokens; there is room for {limit} in a prompt"):
            text.cut_prompt(tokenizer, talk(name), encoder, limit)
        return
    if limit >= len(whole):
        return
    ids = text.cut_prompt(tokenizer, talk(name), encoder, limit)
    assert len(ids) <= limit
    shorter = [(*system, *TALK[2:]), (*system, *TALK[4:])]
    rendered = [text.encode_prompt(tokenizer, prompt, False) for prompt in shorter]
    fitting = next((r for r in rendered if len(r) <= limit), None)
    if fitting is not None:
        assert ids == fitting  # no more is left out than has to be
        return
    last = TALK[-1].content
    parts = [last[:n] if encoder else last[n:] for n in range(len(last) + 1)]
    assert ids in [text.encode_prompt(tokenizer, (*system, Message("user", part)), False) for part in parts]


def test_the_system_message_is_never_cut() -> None:
    tokenizer = tokenizer_of("llama3")
    prompt = (SYSTEM, Message("user", "the cat likes the dog . " * 20))
    alone = len(CHAT.encode_prompt(tokenizer, (SYSTEM, Message("user", "")), False))
    shown = tokenizer.decode(CHAT.cut_prompt(tokenizer, prompt, False, alone + 5))
    assert SYSTEM.content in shown and shown.count("the cat likes") <= 1
    with pytest.raises(UserError, match="the template and the system message alone have"):
        CHAT.cut_prompt(tokenizer, prompt, False, alone - 1)


def test_prompts_that_were_cut_are_counted(checkpoint: Any) -> None:
    loaded = load(ModelConfig(name=str(checkpoint("chatml")), device="cpu"))
    whole = len(encode_prompts(loaded, [Example.of("x", (SYSTEM, *TALK))], LengthConfig())[0][0].ids)
    lengths = LengthConfig(max_prompt_tokens=whole - 1, on_overlong="truncate")
    encoded, counts = encode_prompts(loaded, [Example.of("x", (SYSTEM, *TALK)), Example("y", "the cat")], lengths)
    assert counts == {"truncated": 1, "skipped": 0}
    shown = loaded.tokenizer.decode(encoded[0].ids)
    assert "the cat ?" not in shown and "the dog ?" in shown and SYSTEM.content in shown
    assert encoded[0].example.given == (SYSTEM, *TALK)  # scorers and guides have the whole


# --- the default, and what is stored


def loaded_with(folder: Path, **text: Any) -> Loaded:
    config = TextConfig(**text) if text else None
    return load(ModelConfig(name=str(folder), device="cpu"), text=config)


def test_a_template_is_used_where_nothing_says_otherwise(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint("qwen3")
    assert (loaded_with(folder).text, loaded_with(folder).text_origin) == (CHAT, "default")
    assert loaded_with(folder, response_prefix=" ").text == TextFormat(chat=True, response_prefix=" ")
    assert loaded_with(folder, template="Q: {prompt}").text == TextFormat("Q: {prompt}")
    plain = loaded_with(folder, chat=False)
    assert (plain.text, plain.text_origin) == (TextFormat(), "given")
    old_run = load(ModelConfig(name=str(folder), device="cpu"), chat_default=False)
    assert (old_run.text, old_run.text_origin) == (TextFormat(), "default")

    save(tmp_path / "plain", plain)
    stored = loaded_with(tmp_path / "plain")  # an old checkpoint stays what it is
    assert (stored.text, stored.text_origin) == (TextFormat(), "stored")
    assert loaded_with(tmp_path / "plain", chat=True).text == CHAT


def test_the_templates_variables_are_stored_with_the_checkpoint(checkpoint: Any, tmp_path: Path) -> None:
    folder = checkpoint("qwen3")
    loaded = loaded_with(folder, chat_template_kwargs={"enable_thinking": False})
    assert loaded.text == NO_THINKING
    save(tmp_path / "saved", loaded)
    assert loaded_with(tmp_path / "saved").text == NO_THINKING
    assert "<think>\n\n</think>" in loaded_with(tmp_path / "saved").text.render_prompt(loaded.tokenizer, "x")
    assert loaded_with(tmp_path / "saved", chat=False).text == TextFormat()
    save(tmp_path / "chat", loaded_with(folder))
    assert json.loads((tmp_path / "chat" / "rlgf_text.json").read_text()) == {
        "schema_version": 1, "template": "{prompt}", "chat": True, "response_prefix": "",
    }  # fmt: skip
    with pytest.raises(UserError, match="chat_template_kwargs is given, and no chat template is used"):
        loaded_with(folder, chat=False, chat_template_kwargs={"enable_thinking": False})


@pytest.mark.parametrize("wrong", [{"tokenize": True}, {"add_generation_prompt": False}, {"x": {1, 2}}])
def test_variables_that_rlgf_sets_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rlgf sets it|the values must be"):
        TextConfig(chat_template_kwargs=wrong)


def test_the_first_lines_say_what_is_used(checkpoint: Any) -> None:
    folder = checkpoint("qwen3")
    assert formats.describe(loaded_with(folder)) == (
        "text: the tokenizer's chat template; a response ends with '<|im_end|>'"
    )
    (warning,) = formats.warnings(loaded_with(folder))
    assert warning.startswith("the chat template puts '<think>\\n\\n</think>' between its generation prompt")
    quiet = loaded_with(folder, chat_template_kwargs={"enable_thinking": False})
    assert formats.warnings(quiet) == [] and "with {'enable_thinking': False}" in formats.describe(quiet)
    for text in ({"chat": False}, {"template": "Q: {prompt}"}):
        (warning,) = formats.warnings(loaded_with(folder, **text))
        assert "it is NOT used" in warning and "leave --no-chat" in warning
    assert formats.describe(loaded_with(folder, template="Q: {prompt}")) == (
        "text: the template 'Q: {prompt}', as the config says; a response ends with '<eos>'"
    )


def test_a_response_ends_as_the_template_ends_it(checkpoint: Any) -> None:
    loaded = loaded_with(checkpoint("gemma"))
    ids, cut = encode_target(loaded, ANSWER, 64)
    assert loaded.tokenizer.convert_ids_to_tokens(ids[-1]) == "<end_of_turn>" and not cut
