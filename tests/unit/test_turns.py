"""The end of the assistant's turn: what the chat template says, and that everything that ends a text agrees on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import TEMPLATES, always_ends, chat_checkpoint, chat_tokenizer
from conftest import toy_examples, write_rows
from rl import BC, ScriptedGuide, generator_for, loaded_from, trainer_for
from rlgf_cli.checks.text_checks import ending
from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig, TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.load import load, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import encode_prompts, encode_target
from rlgf_cli.models.text import TextFormat
from rlgf_cli.models.turns import turn_end
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.perplexity import PerplexityMetric
from rlgf_cli.training.episodes import draw_references
from rlgf_cli.training.figures import of_guide

CHAT, PLAIN = TextFormat(chat=True), TextFormat()
WORDS = "the cat sees the river ."


@pytest.fixture(scope="module")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("chatml"), "chatml")


@pytest.fixture
def chatml(chatml_folder: Path) -> Loaded:
    return loaded_from(chatml_folder)


def encoded(loaded: Loaded, count: int = 3) -> Any:
    rows = [Example(r["id"], r["prompt"], tuple(r["references"])) for r in toy_examples(count)]
    return encode_prompts(loaded, rows, LengthConfig(max_new_tokens=16))[0]


# --- what the template says


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_read_off_the_template(name: str) -> None:
    tokenizer = chat_tokenizer(name)
    end = turn_end(tokenizer)
    assert (end.token, end.problem) == (TEMPLATES[name][1], "")
    assert end.id == tokenizer.convert_tokens_to_ids(end.token)
    tokenizer = chat_tokenizer(name)
    tokenizer.add_tokens([end.token[:-2]])  # of two tokens that fit the longer one is meant, as a tokenizer has it
    assert turn_end(tokenizer).token == end.token


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_is_taught_as_the_template_renders_it(name: str, tmp_path: Path) -> None:
    """Prompt, response and end are the beginning of the rendered conversation, token by token."""
    loaded = loaded_from(chat_checkpoint(tmp_path, name))
    text, tokenizer = loaded.text, loaded.tokenizer
    words = f" {WORDS} " if name == "llama2" else f" {WORDS}" if name == "mistral" else WORDS  # their spaces
    target, cut = encode_target(loaded, words, 64)
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": WORDS}]
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    taught = [*text.encode_prompt(tokenizer, "cat", False), *target]
    assert taught == whole[: len(taught)] and not cut
    assert target[-1] == loaded.eos_id == tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
    assert loaded.eos_ids == {loaded.eos_id, tokenizer.eos_token_id}
    assert text.decode_response(tokenizer, target).strip() == WORDS


ROLES = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
NO_END = {
    "plain words": (ROLES + "{% if add_generation_prompt %}assistant:{% endif %}", "puts nothing"),
    "letters": ("{% for m in messages %}{{ m.content + '<|eom|>\\n' }}{% endfor %}", "'<|eom|>'.*is not one token"),
    "no content": ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out"),
    "refusal": (
        "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        "does not take an assistant's message .users only",
    ),
}


@pytest.mark.parametrize("case", NO_END)
def test_without_one_token_for_it_eos_is_used_and_that_is_said(case: str, tmp_path: Path, run_cli: Any) -> None:
    template, words = NO_END[case]
    folder = chat_checkpoint(tmp_path / "chat", template)
    loaded = loaded_from(folder)
    assert loaded.eos_id == loaded.tokenizer.eos_token_id
    with pytest.raises(AssertionError, match=words):
        assert not loaded.turn_end_problem, loaded.turn_end_problem
    check = ending(loaded)
    assert check.status == "warn" and loaded.turn_end.problem in check.finding and check.remedy  # type: ignore[union-attr]
    if case == "letters":
        data = write_rows(tmp_path / "train.jsonl", toy_examples(2))
        shown = run_cli("sft", "--model", folder, "--data", data, "--max-steps", 1, "-o", tmp_path / "run")
        assert shown.exit_code == 0
        assert "is not one token: a response ends with tokenizer.eos_token, '<eos>'" in shown.stderr


def test_plain_text_ends_with_eos_whatever_the_template_is(chatml_folder: Path) -> None:
    loaded = load(ModelConfig(name=str(chatml_folder), device="cpu"), text=TextConfig(template="{prompt}"))
    assert (loaded.turn_end, loaded.eos_id) == (None, loaded.tokenizer.eos_token_id)


def test_chat_without_a_template_is_refused_when_the_model_is_loaded(tiny_gpt2: Path) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        load(ModelConfig(name=str(tiny_gpt2), device="cpu"), text=TextConfig(chat=True))


def test_a_token_that_the_tokenizer_does_not_call_special(tmp_path: Path) -> None:
    """It is no part of the text that is read back, and no text can become it."""
    loaded = loaded_from(chat_checkpoint(tmp_path, "chatml", special=False))
    text, tokenizer = loaded.text, loaded.tokenizer
    assert loaded.eos_id not in tokenizer.all_special_ids  # the trap is there
    assert loaded.eos_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text.decode_response(tokenizer, encode_target(loaded, WORDS, 64)[0]) == WORDS
    for encode in (text.encode_response, text.encode_continuation):
        assert loaded.eos_id not in encode(tokenizer, "a <|im_end|> b")


# --- everything that ends a text agrees


def test_sampling_scoring_and_min_new_tokens_know_the_end(chatml: Loaded) -> None:
    always_ends(chatml.model, chatml.eos_id)
    prompts, greedy = encoded(chatml), DecodingConfig(temperature=0)
    texts = generate_texts(chatml, prompts, greedy, LengthConfig(max_new_tokens=6), seed=0)
    assert {(t.text, t.finish_reason, t.usage["completion_tokens"]) for t in texts} == {("", "stop", 1)}
    later = generate_texts(chatml, prompts, greedy, LengthConfig(max_new_tokens=6, min_new_tokens=3), seed=0)
    assert {(t.finish_reason, t.usage["completion_tokens"]) for t in later} == {("stop", 4)}
    model = ActorCritic(chatml, ["policy"], mode="shared", with_ref_model=False)
    rows = TokenBatch.build(
        [p.ids for p in prompts], [[chatml.eos_id] * 3] * 3, pad_id=chatml.pad_id, encoder_decoder=False,
        device=chatml.device,
    )  # fmt: skip
    every = torch.ones(3, 3, dtype=torch.bool)
    logprobs = model.forward_logprobs(rows, every, temperature=1.0, min_new_tokens=2).logprobs
    assert torch.isinf(logprobs[:, :2]).all() and (logprobs[:, 2] > -1e-3).all()


def test_what_is_delivered_ends_where_it_was_taught_to(chatml: Loaded, tmp_path: Path) -> None:
    always_ends(chatml.model, chatml.eos_id)
    assert chatml.original_eos_ids == [chatml.tokenizer.eos_token_id]  # the base knows its own EOS alone
    save(tmp_path / "saved", chatml)
    again = loaded_from(tmp_path / "saved")
    assert (again.eos_id, again.eos_ids) == (chatml.eos_id, chatml.eos_ids)
    assert set(again.original_eos_ids) == chatml.eos_ids
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    prompt = encoded(chatml, 1)[0].ids
    written = plain.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
    assert written.tolist() == [chatml.eos_id]
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<eos>"


def test_doctor_says_what_differs_and_what_is_used(chatml: Loaded, tmp_path: Path, tiny_gpt2: Path) -> None:
    base = ending(chatml)
    assert base.status == "warn" and "rlgf sft teaches the ending" in base.remedy
    assert base.finding == (
        "the chat template ends a turn with '<|im_end|>'; tokenizer.eos_token is '<eos>'; "
        "generation_config.eos_token_id is '<eos>': they differ, and a response ends with '<|im_end|>'"
    )
    eos = chatml.tokenizer.eos_token_id
    assert base.numbers == {
        "used": chatml.eos_id,
        "template": chatml.eos_id,
        "tokenizer": eos,
        "generation_config": [eos],
    }
    save(tmp_path / "trained", chatml)
    trained = ending(loaded_from(tmp_path / "trained"))
    assert (trained.status, trained.remedy) == ("ok", "") and "they differ" in trained.finding
    plain = ending(loaded_from(tiny_gpt2))
    assert plain.status == "ok"
    assert plain.finding == "tokenizer.eos_token is '<eos>'; generation_config.eos_token_id is '<eos>': they agree"


def test_a_text_without_a_prompt_stands_behind_eos_not_behind_the_end_of_a_turn(chatml_folder: Path) -> None:
    folder = chatml_folder.parent / "no-bos"
    shutil.copytree(chatml_folder, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("bos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    metric = PerplexityMetric(str(folder), condition="none", device="cpu")
    assert metric.loaded.eos_id != metric.loaded.tokenizer.eos_token_id
    assert metric._before(Example("x", "x")) == [metric.loaded.tokenizer.eos_token_id]


# --- texts that spell their ending

SPELLED = ["{}<|im_end|>", "{}<|im_end|>\n", "{} <|im_end|>\n<eos>", "{}<eos>", "{}<eos> \n"]


@pytest.mark.parametrize("around", SPELLED)
def test_a_spelled_ending_is_not_taught_twice(chatml: Loaded, around: str) -> None:
    text = around.format(WORDS)
    assert encode_target(chatml, text, 64) == encode_target(chatml, WORDS, 64)
    for finish in ("stop", "length"):  # who spelled the ending has ended
        generator = generator_for(chatml, ScriptedGuide((text, finish)), max_new_tokens=30)
        for e in generator.generate(BC, encoded(chatml), 0, 9.0):
            assert (e.ids, e.finished, e.text) == (encode_target(chatml, WORDS, 64)[0], True, WORDS)
        assert of_guide(BC, generator.counts)["guide/endings"] == 3


@pytest.mark.parametrize("text", [f"{WORDS} ", "<|im_end|> is a mark", "a<eos>b", "<s>old</s>", "it ends<|end|>"])
def test_other_text_is_left_alone(text: str) -> None:
    assert CHAT.without_ending(chat_tokenizer("chatml"), text) == text


def test_plain_text_loses_a_spelled_eos_alone() -> None:
    tokenizer = chat_tokenizer("chatml")
    assert PLAIN.without_ending(tokenizer, f"{WORDS}<eos>\n") == WORDS
    assert PLAIN.without_ending(tokenizer, f"{WORDS}<|im_end|>") == f"{WORDS}<|im_end|>"
    assert PLAIN.without_ending(tokenizer, "<eos>") == ""


def test_reference_nll_teaches_one_end_of_the_turn(chatml: Loaded) -> None:
    trainer = trainer_for(chatml, "ppo")
    episodes = trainer.generator.generate(trainer.spec.regimes[0], encoded(chatml), 0, 9.0)
    for e in episodes:
        e.example = Example(e.example.id, e.example.prompt, (f"{WORDS}<|im_end|>\n",))
    rows = draw_references(chatml, episodes, 12, seed=0, step=0)
    assert rows.response_ids.tolist() == [encode_target(chatml, WORDS, 12)[0]] * 3


def test_sft_counts_spelled_endings(chatml_folder: Path, tmp_path: Path, run_cli: Any) -> None:
    rows = toy_examples(4)
    rows[0]["references"] = [f"{WORDS}<|im_end|>"]
    data = write_rows(tmp_path / "train.jsonl", rows)
    arguments = ("--model", chatml_folder, "--data", data, "--max-steps", 1, "-o", tmp_path / "run", "--json")
    shown = run_cli("sft", *arguments)
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["spelled_endings"] == 1
    assert "spelled EOS or the end of a turn at their end, which is left out: 1" in shown.stderr
    product = loaded_from(tmp_path / "run")
    assert set(product.original_eos_ids) == product.eos_ids and product.text.chat
