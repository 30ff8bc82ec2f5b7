"""The whole way on a pretrained chat model: conversations with a system prompt, SmolLM2-135M-Instruct behind a real
server as guide, LoRA as policy, three algorithms, and what is said of them at the end. A few short episodes each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import Result, toy_examples, write_rows
from real_server import RealServer, real_server

pytestmark = pytest.mark.slow  # several minutes: 135 million parameters, ten loads

SYSTEM = {"role": "system", "content": "Write one short sentence that holds all the given words."}
REWARD = '''
def words(text, prompt, messages):
    """The share of the asked words that a text holds; the system prompt has to be there."""
    assert messages[0]["role"] == "system" and messages[-1]["content"] == prompt
    return sum(word in text.lower() for word in prompt.split()) / len(prompt.split())
'''
LENGTHS = ("--device", "cpu", "--max-new-tokens", 8)
ADAPTER = ("--use-peft", "--lora-r", 4)
STEPS = ("--episodes", 4, "--minibatch-size", 4, "--epochs", 1, "--max-steps", 1, "--learning-rate", 1e-4)


@pytest.fixture(scope="module")
def server(smollm2_folder: Path) -> Iterator[RealServer]:
    with real_server(smollm2_folder) as running:
        yield running


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def conversations(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}],
            "references": [{"role": "assistant", "content": row["references"][0]}],
        }
        for row in toy_examples(count, seed)
    ]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_from_conversations_to_a_report(
    run_cli: Callable[..., Result], smollm2_folder: Path, server: RealServer, tmp_path: Path
) -> None:
    def ok(*arguments: object) -> Result:
        done = run_cli(*arguments)
        assert done.exit_code == 0, done.stderr + server.log[-2000:]
        return done

    data = write_rows(tmp_path / "train.jsonl", conversations(4, seed=0))
    test = write_rows(tmp_path / "test.jsonl", conversations(3, seed=1))
    (tmp_path / "mine.py").write_text(REWARD)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)

    # a starting policy
    sft = tmp_path / "sft"
    shown = ok("sft", "--model", smollm2_folder, "--data", data, *LENGTHS, *ADAPTER, "--max-steps", 2, "--batch-size",
               2, "-o", sft)  # fmt: skip
    assert "text: the tokenizer's chat template; a response ends with '<|im_end|>'" in shown.stderr
    assert f"  prompt    '<|im_start|>system\\n{SYSTEM['content']}<|im_end|>\\n<|im_start|>user\\n" in shown.stderr
    assert json.loads((sft / "rlgf_text.json").read_text())["chat"] is True

    # the guide's texts, of conversations as they were sent
    asked = ("--guide", f"openai:{server.model}", "--base-url", server.url)
    guide = tmp_path / "guide.jsonl"
    ok("collect-guide", *asked, "--data", data, "--max-new-tokens", 12, "-o", guide)
    texts = lines(guide)
    assert [row["prompt"] for row in texts] and all(row["prompt"][0] == SYSTEM for row in texts)
    for row in texts:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert row["usage"]["prompt_tokens"] == len(ids)  # the server rendered the system prompt and the question
        assert row["completion"].strip()
    requests = len(server.asked())

    # three algorithms from one start
    runs = {
        "ppopp": ("ppo++", "--guide", guide),
        "aggrevated": ("aggrevated", *asked),
        "grpo": ("grpo", "--set", "algorithm.group_size=2"),
    }
    for name, (algorithm, *more) in runs.items():
        shown = ok("train", "--alg", algorithm, "--model", sft, "--data", data, "--reward",
                   f"{tmp_path / 'mine.py'}:words", *more, *LENGTHS, *ADAPTER, *STEPS, "--set", "rollout.save_every=1",
                   "-o", tmp_path / name)  # fmt: skip
        assert "as stored with the checkpoint; a response ends with '<|im_end|>'" in shown.stderr
        (row,) = lines(tmp_path / name / "metrics.jsonl")
        assert 0 <= row["score/mean"] <= 1
        (rollouts,) = (tmp_path / name / "rollouts").iterdir()
        assert all(episode["prompt"][0] == SYSTEM for episode in lines(rollouts))
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() != (
            sft / "adapter_model.safetensors"
        ).read_bytes()
    assert len(server.asked()) > requests  # aggrevated had the guide finish texts

    # what came of it
    for name in ("sft", *runs):
        ok("eval", "--model", tmp_path / name, "--data", test, "--metrics", "rouge,coverage", *LENGTHS, "--temperature",
           0, "-o", tmp_path / f"eval-{name}")  # fmt: skip
        predictions = lines(tmp_path / f"eval-{name}" / "predictions.jsonl")
        assert [p["prompt"] for p in predictions] == [row["prompt"] for row in conversations(3, seed=1)]
        assert all("<|im_end|>" not in p["prediction"] for p in predictions)
    evaluations = [tmp_path / f"eval-{name}" for name in ("sft", *runs)]
    compared = ok("compare", *evaluations)
    assert "eval-ppopp" in compared.stdout and "rouge" in compared.stdout
    ok("report", *(tmp_path / name for name in runs), *evaluations, "-o", tmp_path / "page.html")
    assert f"[system]\n{SYSTEM['content']}\n\n[user]\n" in (tmp_path / "page.html").read_text(encoding="utf-8")
