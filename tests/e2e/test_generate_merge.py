"""``rlgf generate`` and ``rlgf merge`` on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from conftest import toy_examples, write_rows
from rl import of_responses
from rlgf_cli.artifacts.predictions import read_predictions
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.models.load import load
from runs import assert_figures, assert_tensors


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.split("\n") if line]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", [{k: row[k] for k in ("id", "prompt")} for row in toy_examples(6)])


COMMON = ("--max-new-tokens", 8, "--device", "cpu")


def test_text_for_a_prompt_and_jsonl_for_data(run_cli: Any, tiny_llama: Path, prompts: Path) -> None:
    row = toy_examples(1)[0]
    shown = run_cli("generate", "--model", tiny_llama, "--data", prompts, "--temperature", 0, *COMMON)
    assert shown.exit_code == 0, shown.stderr
    records = lines_of(shown.stdout)
    assert [r["id"] for r in records] == [f"toy-0-{i}" for i in range(6)]
    assert {r["finish_reason"] for r in records} <= {"stop", "length"}
    alone = run_cli("generate", "--model", tiny_llama, "--prompt", row["prompt"], "--temperature", 0, *COMMON)
    assert alone.stdout == records[0]["prediction"] + "\n"
    as_json = run_cli(
        "generate", "--model", tiny_llama, "--prompt", row["prompt"], "--temperature", 0, "--json", *COMMON
    )
    assert lines_of(as_json.stdout)[0]["prediction"] == records[0]["prediction"]


def test_samples_differ_by_seed_and_index_not_by_batch(
    run_cli: Any, tmp_path: Path, any_model: Path, prompts: Path
) -> None:
    def texts(*more: object) -> list[str]:
        shown = run_cli("generate", "--model", any_model, "--data", prompts, "-n", 3, *COMMON, *more)
        assert shown.exit_code == 0, shown.stderr
        return [r["prediction"] for r in lines_of(shown.stdout)]

    first = texts()
    assert len(first) == 18
    assert first == texts("--batch-size", 1)
    assert first != texts("--seed", 1)
    assert any(first[3 * i] != first[3 * i + 1] for i in range(6))


def test_decoding_flags_reach_the_decoder(run_cli: Any, tiny_gpt2: Path, prompts: Path) -> None:
    def texts(*more: object) -> list[str]:
        shown = run_cli("generate", "--model", tiny_gpt2, "--data", prompts, "--device", "cpu", *more)
        assert shown.exit_code == 0, shown.stderr
        return [r["prediction"] for r in lines_of(shown.stdout)]

    greedy = texts("--temperature", 0, "--max-new-tokens", 8)
    assert texts("--top-k", 1, "--max-new-tokens", 8) == greedy
    assert texts("--top-p", 1e-6, "--max-new-tokens", 8) == greedy
    assert texts("--max-new-tokens", 8) != greedy
    assert texts("--num-beams", 3, "--max-new-tokens", 8) != greedy
    assert len(texts("-L", 2, "--max-new-tokens", 2)) == 2
    longer = texts("--max-new-tokens", 20, "--min-new-tokens", 20)
    assert all(len(a) > len(b) for a, b in zip(longer, texts("--max-new-tokens", 2), strict=True))


def test_a_file_with_its_manifest(run_cli: Any, tmp_path: Path, tiny_gpt2: Path, prompts: Path) -> None:
    out = tmp_path / "texts.jsonl"
    arguments = ("generate", "--model", tiny_gpt2, "--data", prompts, "-n", 2, *COMMON, "-o", out)
    shown = run_cli(*arguments)
    assert (shown.exit_code, shown.stdout) == (0, f"{out}\n")
    assert len(lines_of(out.read_text())) == 12
    records, counts = read_predictions(out)
    assert len(records) == 6 and counts["other_samples"] == 6
    manifest = json.loads(out.with_name("texts.jsonl.run.json").read_text())
    assert (manifest["status"], manifest["result"]["records"]) == ("done", 12)
    assert [p["path"] for p in manifest["parents"]] == [str(tiny_gpt2), str(prompts)]

    shown = run_cli(*arguments)
    assert shown.exit_code == 2 and "--overwrite" in shown.stderr and "--resume" not in shown.stderr
    assert run_cli(*arguments, "--seed", 3, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give either data"),
        (("--prompt", "x", "--data", "y.jsonl"), "give either data"),
        (("--prompt", " "), "the prompt is empty"),
        (("--data", "none.jsonl"), "no such file"),
        (("--prompt", "x", "-n", 2, "--temperature", 0), "samples must be 1"),
        (("--prompt", "x", "--num-beams", 2, "--top-k", 3), "beam search takes no top_k"),
        (("--prompt", "word " * 100), "there is room for"),
        (("--prompt", "x", "--max-new-tokens", 100), "64 positions"),
    ],
)
def test_bad_requests(run_cli: Any, tmp_path: Path, tiny_gpt2: Path, arguments: tuple[object, ...], words: str) -> None:
    out = tmp_path / "new/texts.jsonl"
    shown = run_cli("generate", "--model", tiny_gpt2, *COMMON, *arguments, "-o", out)
    assert shown.exit_code == 2 and words in shown.stderr
    assert not out.parent.exists()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_merged_weights_give_the_adapters_logits(
    run_cli: Any, tmp_path: Path, request: pytest.FixtureRequest, examples_file: Path, family: str
) -> None:
    base = request.getfixturevalue(f"tiny_{family}")
    shown = run_cli(
        "sft", "--model", base, "--data", examples_file, "--use-peft", "--max-steps", 3, "--learning-rate", "1e-2",
        "--max-new-tokens", 24, "--template", "say {prompt}", "--device", "cpu", "-o", tmp_path / "lora",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    shown = run_cli("merge", "--model", tmp_path / "lora", "-o", tmp_path / "merged")
    assert (shown.exit_code, shown.stdout) == (0, f"{tmp_path / 'merged'}\n")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    plain, adapted, merged = (
        load(ModelConfig(name=str(name), device="cpu")) for name in (base, tmp_path / "lora", tmp_path / "merged")
    )
    assert merged.text == adapted.text and merged.text.template == "say {prompt}"
    ids = merged.text.encode_prompt(merged.tokenizer, "cat sees garden", merged.encoder_decoder)
    inputs = {"input_ids": torch.tensor([ids])}
    if merged.encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[merged.pad_id, 5, 6]])
    with torch.no_grad():
        logits = [loaded.model(**inputs).logits for loaded in (plain, adapted, merged)]
    torch.testing.assert_close(logits[2], logits[1], rtol=1e-5, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 1e-2
    manifest = json.loads((tmp_path / "merged/run.json").read_text())
    assert manifest["status"] == "done" and manifest["parents"][0]["path"] == str(tmp_path / "lora")

    shown = run_cli("merge", "--model", tmp_path / "lora", "-o", tmp_path / "merged")
    assert shown.exit_code == 2 and "already holds a run" in shown.stderr
    shown = run_cli(
        "merge", "--model", tmp_path / "lora", "--dtype", "bfloat16", "-o", tmp_path / "merged", "--overwrite"
    )
    assert shown.exit_code == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_an_adapter_is_evaluated_as_its_merged_weights_are(
    request: pytest.FixtureRequest, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Trained by `train`, merged by `merge`, both scored by `eval`: the texts, the scores, the probabilities. Trained
    with the base's relative name, and used from another folder."""
    base = request.getfixturevalue(f"tiny_{family}")
    monkeypatch.chdir(base.parent)
    data = write_rows(tmp_path / "train.jsonl", toy_examples(12))
    (tmp_path / "reward.py").write_text("def letters(text):\n    return sum(c in 'abcdefghijklm' for c in text) / 10\n")
    done = run_cli(
        "train", "--alg", "ppo", "--model", base.name, "--data", data, "--max-steps", 3,
        "--reward", f"{tmp_path / 'reward.py'}:letters",
        "--episodes", 8, "--batch-size", 4, "--max-new-tokens", 8, "--lr", "1e-2", "--device", "cpu",
        "--use-peft", "--lora-r", 4, "-o", tmp_path / "lora",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert run_cli("merge", "--model", "lora", "-o", tmp_path / "merged").exit_code == 0
    for name in ("lora", "merged"):
        assert GenerationConfig.from_pretrained(tmp_path / name).max_new_tokens == 8
    predictions = []
    for name in ("lora", "merged"):
        scored = run_cli(
            "eval", "--model", tmp_path / name, "--data", data, "--metrics", "rouge,coverage", "--max-new-tokens", 8,
            "--temperature", 0, "--device", "cpu", "-o", tmp_path / f"eval_{name}",
        )  # fmt: skip
        assert scored.exit_code == 0, scored.stderr
        lines = (tmp_path / f"eval_{name}" / "predictions.jsonl").read_text().splitlines()
        predictions.append([json.loads(line) for line in lines])
    texts = [[p["prediction"] for p in found] for found in predictions]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert_figures(*([p["scores"] for p in found] for found in predictions), point=1e-9, mean=1e-9)
    plain, adapted, merged = (
        of_responses(load(ModelConfig(name=str(name), device="cpu")))
        for name in (base, tmp_path / "lora", tmp_path / "merged")
    )
    assert_tensors({"logprobs": adapted}, {"logprobs": merged}, point=1e-4, mean=1e-5)
    assert float((adapted - plain).abs().max()) > 1e-2, "the adapter does nothing"
    assert torch.isfinite(adapted).all()


def test_merging_what_is_no_adapter(run_cli: Any, tmp_path: Path, tiny_gpt2: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, words in (
        (tiny_gpt2, "no adapter to merge"),
        (tmp_path / "empty", "no model checkpoint"),
        (tmp_path / "none", "no such checkpoint folder"),
        ("gpt2", "not a hub name"),
    ):
        shown = run_cli("merge", "--model", name, "-o", tmp_path / "out")
        assert shown.exit_code == 2 and words in shown.stderr, shown.stderr
        assert not (tmp_path / "out").exists()
