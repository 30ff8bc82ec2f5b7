"""``rlgf sft --guide``: the pairs are what the guide's file holds, in the tokens that bc-guide learns on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from conftest import write_rows
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.models.load import load
from rlgf_cli.models.prompts import encode_target
from rlgf_cli.stages import sft

PROMPTS = [{"id": name, "prompt": f"{name} cat sees garden"} for name in "abcde"]
LONG = "the dog likes the river . " * 5


def text(name: str, completion: str, index: int = 0, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": f"{name} cat sees garden", "completion": completion, "sample_index": index, **more}


TEXTS = [
    text("a", "in the garden a cat", 1, finish_reason="length"),
    text("a", "the cat sees the garden .", 0, finish_reason="stop"),
    text("b", LONG, finish_reason="stop"),
    text("b", "a <eos> cat", 1, finish_reason="length"),  # spells EOS
    text("b", f"{LONG} it .", 2, finish_reason="length"),
    text("c", " "),
    text("d", "sees it .", prefix="the cat"),
    text("e", "it .") | {"prompt": "another prompt"},
    text("x", "the bird ."),
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_rows(tmp_path / "train.jsonl", PROMPTS)
    write_rows(tmp_path / "guide.jsonl", TEXTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[sft.Pair]:
    """The pairs of the last run."""
    seen: list[sft.Pair] = []
    plain = sft.make_trainer

    def make_trainer(loaded: Any, config: Any, folder: Path, pairs: Any, eval_pairs: Any) -> Any:
        seen[:] = pairs
        return plain(loaded, config, folder, pairs, eval_pairs)

    monkeypatch.setattr(sft, "make_trainer", make_trainer)
    return seen


def clone(run_cli: Any, model: object, *more: object, folder: str = "run") -> Any:
    arguments = ("--data", "train.jsonl", "--guide", "guide.jsonl", "--max-new-tokens", 16, "--max-steps", 1)
    return run_cli("sft", "--model", model, *arguments, "--device", "cpu", *more, "-o", folder)


def pairs_of(model: Path, **flags: Any) -> list[sft.Pair]:
    """The pairs without the training."""
    given = {"model": str(model), "data": "train.jsonl", "output": "x", "lengths.max_new_tokens": 16}
    config = resolve(SftConfig, flags=given | flags).config
    loaded = load(ModelConfig(name=str(model), device="cpu"))
    return sft.make_pairs(loaded, read_examples("train.jsonl"), config, RecordedGuide("guide.jsonl"))[0]


def test_every_text_is_a_pair_and_the_rest_is_counted(
    run_cli: Any, work: Path, tiny_gpt2: Path, trained_on: list[sft.Pair]
) -> None:
    shown = clone(run_cli, tiny_gpt2, "--json")
    assert shown.exit_code == 0, shown.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)

    def ids(words: str) -> list[int]:
        return tokenizer(words, split_special_tokens=True)["input_ids"]

    eos = tokenizer.eos_token_id
    a, b = (ids(f"{name} cat sees garden") for name in "ab")
    expected = [
        sft.Pair(a, [*ids(" the cat sees the garden ."), eos]),  # by sample index
        sft.Pair(a, ids(" in the garden a cat")),
        sft.Pair(b, ids(f" {LONG}")[:16]),
        sft.Pair(b, ids(" a <eos> cat")),
        sft.Pair(b, ids(f" {LONG}")[:16]),
    ]
    assert trained_on == expected
    result = json.loads(shown.stdout)
    counts = {
        "examples": 5, "pairs": 5, "truncated_responses": 2, "unfinished": 2, "dropped": 3, "guide_texts": 5,
        "guide_unmatched": 2, "guide_id_mismatch": 1, "guide_empty": 1, "guide_with_prefix": 1,
    }  # fmt: skip
    assert {name: result[name] for name in counts} == counts
    for said in (
        "responses cut at max_new_tokens, which teach no ending: 2",
        "texts that the guide did not end, which teach no ending: 2",
        "prompts without a text of the guide, left out: 3",
        "texts of the guide that belong to no prompt that was read: 2",
        "prompts whose id is another prompt's in the guide's file: 1",
        "empty texts of the guide, left out: 1",
        "texts of the guide that go on from a prefix, left out: 1",
        "5 texts of guide.jsonl are cloned",
    ):
        assert said in shown.stderr
    manifest = json.loads((work / "run/run.json").read_text())
    assert {Path(parent["path"]).name for parent in manifest["parents"]} == {
        "train.jsonl", "guide.jsonl", tiny_gpt2.name
    }  # fmt: skip
    card = (work / "run/README.md").read_text()
    assert "| guide | guide.jsonl |" in card and "| distinct texts used | 5 |" in card
    assert "The guide's texts shaped these weights" in card


@pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_t5"])
def test_the_tokens_are_those_that_bc_guide_learns_on(
    run_cli: Any, work: Path, request: pytest.FixtureRequest, model: str
) -> None:
    checkpoint = request.getfixturevalue(model)
    shown = run_cli(
        "train", "--alg", "bc-guide", "--model", checkpoint, "--data", "train.jsonl", "--guide", "guide.jsonl",
        "--max-new-tokens", 16, "--max-steps", 1, "--episodes", 24, "--batch-size", 24, "--epochs", 1,
        "--set", "rollout.on_uncovered=drop", "--set", "rollout.save_count=24", "--set", "rollout.save_every=1",
        "--device", "cpu", "-o", "bc",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    episodes = [json.loads(line) for line in (work / "bc/rollouts/step_1.jsonl").read_text().splitlines()]
    learned = {tuple(segment["ids"]) for episode in episodes for segment in episode["segments"]}
    assert learned == {tuple(pair.response) for pair in pairs_of(checkpoint)} and len(learned) == 4


@pytest.mark.parametrize(("more", "cut"), [(-1, True), (0, False), (1, False)])
def test_a_text_that_the_guide_did_not_end_and_the_limit(tiny_gpt2: Path, more: int, cut: bool) -> None:
    loaded = load(ModelConfig(name=str(tiny_gpt2), device="cpu"))
    ids = loaded.text.encode_response(loaded.tokenizer, "in the garden a cat")
    limit = len(ids) + more
    assert encode_target(loaded, "in the garden a cat", limit, "length") == (ids[:limit], cut)


def test_references_choose_among_the_guides_texts(work: Path, tiny_gpt2: Path) -> None:
    every = pairs_of(tiny_gpt2)
    assert pairs_of(tiny_gpt2, references="first") == [every[0], every[2]]
    drawn = [pairs_of(tiny_gpt2, references="random", seed=seed) for seed in range(6)]
    assert all([pair.prompt for pair in pairs] == [every[0].prompt, every[2].prompt] for pairs in drawn)
    assert {tuple(pair.response) for pairs in drawn for pair in pairs} == {tuple(pair.response) for pair in every}


def test_a_small_model_from_scratch_knows_the_guides_words_and_resumes_with_the_same_file(
    run_cli: Any, work: Path, trained_on: list[sft.Pair]
) -> None:
    (work / "small.yaml").write_text("architecture: gpt2\nhidden: 16\nmax_positions: 96\ntokenizer: word\n")
    assert clone(run_cli, "small.yaml").exit_code == 0
    loaded = load(ModelConfig(name="run", device="cpu"))
    assert loaded.text.decode_response(loaded.tokenizer, trained_on[0].response) == "the cat sees the garden ."

    manifest = work / "run/run.json"
    manifest.write_text(manifest.read_text().replace('"status": "done"', '"status": "failed"'))
    write_rows(work / "guide.jsonl", TEXTS[:3])
    shown = clone(run_cli, "small.yaml", "--resume")
    assert shown.exit_code == 2 and "guide.jsonl: this file changed since the run began" in shown.stderr


def test_a_guide_without_a_text_for_these_prompts_or_in_the_output(run_cli: Any, work: Path, tiny_gpt2: Path) -> None:
    write_rows(work / "guide.jsonl", TEXTS[-1:])
    shown = clone(run_cli, tiny_gpt2)
    assert shown.exit_code == 2 and "the guide file covers none of the 5 prompts" in shown.stderr
    write_rows(work / "run/guide.jsonl", TEXTS)
    shown = clone(run_cli, tiny_gpt2, "--guide", "run/guide.jsonl", "--overwrite")
    assert shown.exit_code == 2 and "this input lies in the output" in shown.stderr
