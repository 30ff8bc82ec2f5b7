"""``rlgf train-reward`` on conversations: pairs and labelled texts as TRL has them, in the chat template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from conftest import toy_examples, write_rows
from public_templates import public_tokenizer
from rlgf_cli.models.classification import encode_chat
from rlgf_cli.protocols import Example, Message
from rlgf_cli.scorers.classifier import RewardModelReward

SYSTEM = {"role": "system", "content": "the queen ."}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("chat"), "chatml")


def make(folder: Path, template: str | None) -> Path:
    tokenizer = public_tokenizer(template or "chatml")
    if template is None:
        tokenizer.chat_template = None
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talks(count: int) -> list[list[dict[str, str]]]:
    return [[SYSTEM, {"role": "user", "content": row["prompt"] + f" {i}"}] for i, row in enumerate(toy_examples(count))]


def said(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


def pairs(form: str, count: int = 12) -> list[dict[str, Any]]:
    good, bad = said("the cat sees it ."), said("it it it")
    if form == "explicit":
        return [{"prompt": talk, "chosen": [good], "rejected": [bad]} for talk in talks(count)]
    return [{"chosen": [*talk, good], "rejected": [*talk, bad]} for talk in talks(count)]


def train(run_cli: Any, model: Path, data: Path, out: Path, *more: object) -> Any:
    return run_cli(
        "train-reward", "--objective", "pairwise", "--model", model, "--data", data, "--max-steps", 2, "--batch-size",
        4, "--device", "cpu", *more, "-o", out,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_pairs_of_conversations_are_read_in_the_template(
    form: str, base: Path, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs(form))
    done = train(run_cli, base, data, tmp_path / "rm")
    assert done.exit_code == 0, done.stderr
    assert "text: prompt and response as a conversation in the tokenizer's chat template\n" in done.stderr
    shown = next(line for line in done.stderr.splitlines() if line.startswith("  chosen"))
    assert shown.startswith("  chosen    '<|im_start|>system\\nthe queen .<|im_end|>\\n<|im_start|>user\\n")
    assert shown.endswith("<|im_start|>assistant\\nthe cat sees it .<|im_end|>\\n'")
    assert done.stderr.index("an example as the model") < done.stderr.index("accuracy")
    assert AutoConfig.from_pretrained(tmp_path / "rm").rlgf_chat is True
    assert json.loads((tmp_path / "rm" / "evaluation.json").read_text())["reads"]["chat"] is True
    assert json.loads((tmp_path / "rm" / "run.json").read_text())["text"] == {"chat": True}

    reward = RewardModelReward(str(tmp_path / "rm"), device="cpu")
    assert reward.chat
    talk = tuple(Message(**message) for message in talks(1)[0])
    ids, _ = encode_chat(AutoTokenizer.from_pretrained(tmp_path / "rm"), talk, "the cat sees it .", None)
    expected = reward.model(torch.tensor([ids])).logits[0, 0].item()
    assert reward.score([Example.of("x", talk)], ["the cat sees it ."])[0].value == pytest.approx(expected, abs=1e-5)


def test_plain_text_where_the_user_or_the_tokenizer_says_so(base: Path, tmp_path: Path, run_cli: Any) -> None:
    plain = write_rows(
        tmp_path / "plain.jsonl", [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    )
    done = train(run_cli, base, plain, tmp_path / "chat")
    assert "conversation in the tokenizer's chat template" in done.stderr  # a text is one message of the user
    done = train(run_cli, base, plain, tmp_path / "off", "--no-chat")
    assert done.exit_code == 0 and "warning: this model has a chat template, and --no-chat leaves it out" in done.stderr
    assert "  chosen    '<bos>p " in done.stderr and AutoConfig.from_pretrained(tmp_path / "off").rlgf_chat is False
    assert not RewardModelReward(str(tmp_path / "off"), device="cpu").chat
    alone = write_rows(tmp_path / "alone.jsonl", [{"chosen": f"a {i}", "rejected": "b"} for i in range(8)])
    done = train(run_cli, base, alone, tmp_path / "alone")
    assert done.exit_code == 0 and "text: the response alone, without a template" in done.stderr
    done = train(run_cli, base, alone, tmp_path / "refused", "--chat")
    assert done.exit_code == 2
    assert re.search(r"alone\.jsonl:\d: text\.chat is true, and this record has no prompt", done.stderr)


def test_conversations_without_a_template_are_refused(base: Path, tmp_path: Path, run_cli: Any) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", pairs("implicit"))
    done = train(run_cli, make(tmp_path / "bare", None), data, tmp_path / "rm")
    assert done.exit_code == 2 and not (tmp_path / "rm").exists()
    assert "pairs.jsonl:1: the prompt is a conversation, and the tokenizer has no chat template" in done.stderr
    done = train(run_cli, base, data, tmp_path / "rm", "--no-chat")
    assert done.exit_code == 2 and "pairs.jsonl:1: the prompt is a conversation, and text.chat is false" in done.stderr
    bad = write_rows(tmp_path / "bad.jsonl", [*pairs("implicit", 2), {"chosen": [SYSTEM, said("x")], "rejected": "y"}])
    done = train(run_cli, base, bad, tmp_path / "rm")
    assert done.exit_code == 2 and "bad.jsonl:3: the field 'rejected': it is str, not a list of messages" in done.stderr


@pytest.mark.parametrize("keys", ["messages", "prompt,completion"])
def test_labelled_conversations(keys: str, base: Path, tmp_path: Path, run_cli: Any) -> None:
    rows: list[dict[str, Any]] = []
    for i, talk in enumerate(talks(12)):
        answer, label = (said("the cat sees it ."), "good") if i % 2 else (said("it it it"), "bad")
        texts = {"messages": [*talk, answer]} if keys == "messages" else {"prompt": talk, "completion": [answer]}
        rows.append({**texts, "label": label})
    data = write_rows(tmp_path / "labelled.jsonl", rows)
    done = run_cli(
        "train-reward", "--model", base, "--data", data, "--text-key", keys, "--max-steps", 2, "--device", "cpu",
        "--good-label", "good", "-o", tmp_path / "rm",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    shown = next(line for line in done.stderr.splitlines() if line.startswith("  text "))
    assert "<|im_start|>system\\nthe queen ." in shown and shown.endswith("it it it<|im_end|>\\n'")
    figures = run_cli(
        "eval", "--predictions", write_rows(tmp_path / "p.jsonl", [{"prompt": talks(1)[0], "text": "it"}]),
        "--metrics", f"flagged:{tmp_path / 'rm'}", "-o", tmp_path / "eval", "--json",
    )  # fmt: skip
    known = json.loads((tmp_path / "rm" / "evaluation.json").read_text())
    assert known["reads"] == {"prompt": True, "max_tokens": 128, "chat": True}
    assert (figures.exit_code == 0) == (known["threshold"] is not None), figures.stderr
