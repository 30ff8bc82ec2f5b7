"""Prompts that are too long: the user's words are cut, and the template's own stay."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_boundaries import trained_t5
from test_token_boundaries_property import MAKERS, any_text, family

from chats import TEMPLATES, chat_checkpoint, chat_tokenizer
from conftest import make_tokenizer, toy_examples, write_rows
from rl import loaded_from
from rlgf_cli.config.common import LengthConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.prompts import encode_prompts
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.perplexity import PerplexityMetric

ASKED = TextFormat(template="the cat: {prompt} it ?")
LONG = "the queen calls the river . " * 12


@cache
def format_and_tokenizer(name: str) -> tuple[TextFormat, Any]:
    if name in TEMPLATES:
        return TextFormat(chat=True), chat_tokenizer(name)
    return ASKED, family(name)[1]


@pytest.mark.parametrize("encoder_decoder", [False, True], ids=["decoder", "encoder"])
@pytest.mark.parametrize("name", [*MAKERS, *TEMPLATES])
@given(prompt=any_text, more=st.integers(-2, 12))
def test_a_cut_prompt_fits_and_the_template_stays(name: str, encoder_decoder: bool, prompt: str, more: int) -> None:
    """What is left is the rendering of the prompt's end (an encoder: of its beginning), in whole characters."""
    text, tokenizer = format_and_tokenizer(name)
    alone = len(text.encode_prompt(tokenizer, "", encoder_decoder))
    limit = alone + more
    if more < 0:
        with pytest.raises(UserError, match=f"the template alone has {alone} tokens; there is room for {limit} "):
            text.cut_prompt(tokenizer, prompt, encoder_decoder, limit)
        return
    found = text.cut_prompt(tokenizer, prompt, encoder_decoder, limit)
    assert len(found) <= limit
    kept = [prompt[:n] if encoder_decoder else prompt[len(prompt) - n :] for n in range(len(prompt) + 1)]
    assert any(found == text.encode_prompt(tokenizer, part, encoder_decoder) for part in kept)


def test_no_more_is_cut_than_has_to_be() -> None:
    """A word at the cut may have one token more than it had behind its space."""
    for text, tokenizer in (
        (TextFormat(chat=True), chat_tokenizer("chatml")),
        (TextFormat(chat=True), chat_tokenizer("llama3")),
        (ASKED, make_tokenizer()),
        (TextFormat(), make_tokenizer()),
    ):
        for limit in (30, 31, 40):
            assert limit - 2 < len(text.cut_prompt(tokenizer, LONG, False, limit)) <= limit


def test_beginning_and_end_of_a_chat_are_its_own(tmp_path: Path) -> None:
    loaded = loaded_from(chat_checkpoint(tmp_path, "llama3"))
    lengths = LengthConfig(max_prompt_tokens=24, on_overlong="truncate")
    found, counts = encode_prompts(loaded, [Example("x", LONG)], lengths)
    assert counts == {"truncated": 1, "skipped": 0}
    begin, end = loaded.text.render_prompt(loaded.tokenizer, "@").split("@")
    assert begin.startswith("<bos><|start_header_id|>") and "assistant" in end
    read = loaded.tokenizer.decode(found[0].ids)
    kept = read.removeprefix(begin).removesuffix(end)
    assert read == begin + kept + end
    assert kept and LONG.strip().endswith(kept)  # the end of what was asked, as it stands


def test_an_encoder_keeps_the_beginning_and_its_eos() -> None:
    tokenizer = trained_t5()
    text = TextFormat(template="find: {prompt}")
    found = text.cut_prompt(tokenizer, LONG, True, 12)
    assert found[-1] == tokenizer.eos_token_id and len(found) == 12
    whole = text.encode_prompt(tokenizer, LONG, True)
    assert found[:-1] == whole[:11]


def test_a_limit_below_one_character_is_said() -> None:
    with pytest.raises(UserError, match="there is room for 1 tokens in a prompt, and no character of '日本' fits"):
        TextFormat().cut_prompt(make_tokenizer(), "日本", False, 1)


def test_a_template_that_does_not_fit_is_said_by_the_stages(tmp_path: Path, run_cli: Any) -> None:
    loaded = loaded_from(chat_checkpoint(tmp_path / "chat", "chatml"))
    lengths = LengthConfig(max_prompt_tokens=4, on_overlong="truncate")
    with pytest.raises(UserError, match="the template alone has") as caught:
        encode_prompts(loaded, [Example("x", LONG)], lengths)
    assert "raise max_prompt_tokens" in (caught.value.hint or "")
    data = write_rows(tmp_path / "train.jsonl", toy_examples(3))
    limit = ("--set", "lengths.max_prompt_tokens=4", "--on-overlong", "truncate")
    shown = run_cli("doctor", "--model", tmp_path / "chat", "--data", data, *limit)
    assert shown.exit_code == 1 and "fail  data.prompts: the template alone has" in shown.stdout


def test_perplexity_cuts_the_prompt_and_not_the_template(tmp_path: Path) -> None:
    metric = PerplexityMetric(str(chat_checkpoint(tmp_path, "chatml")), device="cpu")
    counts: Counter[str] = Counter()
    before, _ = metric._row(Example("x", LONG * 4), "the cat sees it .", counts)
    assert counts["prompts_cut"] == 1
    ids = metric.loaded.tokenizer.convert_ids_to_tokens(before)
    assert ids[0] == "<|im_start|>" and ids[-1] == "Ċ" and ids.count("<|im_start|>") == 2
