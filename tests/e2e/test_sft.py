"""``rlgf sft`` on tiny models: the loss it trains on, what it leaves, how it resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from conftest import toy_examples, write_rows
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.config.common import DecodingConfig, ModelConfig
from rlgf_cli.config.loader import Resolved, resolve
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly
from rlgf_cli.models import hub, scratch
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.load import load
from rlgf_cli.models.prompts import encode_prompts
from rlgf_cli.stages import sft
from rlgf_cli.supervised import callback

SMALL = {"lengths.max_new_tokens": 24, "batch_size": 8, "model.device": "cpu", "logging_steps": 2}


def configure(output: Path, **flags: Any) -> Resolved[SftConfig]:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return resolve(SftConfig, flags={"output": str(output), **SMALL, **dotted})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def describe(tmp_path: Path, **keys: Any) -> str:
    """A YAML file for a model from scratch."""
    path = tmp_path / "small.yaml"
    tokenizer = keys.pop("tokenizer", "word")
    lines = {"architecture": "gpt2", "hidden": 32, "tokenizer": tokenizer, **keys}
    path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    return str(path)


@torch.no_grad()
def negative_log_likelihood(loaded: Any, pair: sft.Pair) -> tuple[float, int]:
    """Summed over the response's tokens, EOS included, without padding or batches; and how many they are."""
    response = torch.tensor([pair.response])
    if loaded.encoder_decoder:
        start = loaded.model.config.decoder_start_token_id
        logits = loaded.model(
            input_ids=torch.tensor([pair.prompt]), decoder_input_ids=torch.tensor([[start, *pair.response[:-1]]])
        ).logits
    else:
        logits = loaded.model(input_ids=torch.tensor([pair.prompt + pair.response])).logits
        logits = logits[:, len(pair.prompt) - 1 : -1]
    picked = logits.log_softmax(-1).gather(-1, response[..., None])
    return -float(picked.sum()), len(pair.response)


FAMILIES = ["gpt2", "llama", "qwen3", "bart", "t5"]
PADS = [(a, p) for a in FAMILIES for p in ("distinct", "eos") if (a, p) != ("t5", "eos")]


@pytest.mark.parametrize(("architecture", "pad"), PADS)
def test_the_first_loss_is_the_likelihood_of_the_responses_alone(
    tmp_path: Path, examples_file: Path, architecture: str, pad: str
) -> None:
    """Prompt tokens in the loss, padding in it, a wrong mask or a hidden EOS (pad = eos) would all show.

    The byte-level tokenizer gives prompts and responses of many lengths.
    """
    resolved = configure(
        tmp_path / "run",
        model=describe(tmp_path, architecture=architecture, pad=pad, tokenizer="{kind: bpe, vocab_size: 280}"),
        lengths__max_new_tokens=60,
        data=str(examples_file),
        batch_size=40,
        max_steps=1,
        logging_steps=1,
    )
    sft.run(resolved)
    start = load(ModelConfig(name=str(tmp_path / "run/checkpoints/start"), device="cpu"))
    pairs, _ = sft.make_pairs(start, read_examples(examples_file), resolved.config)
    assert all(pair.response[-1] == start.eos_id for pair in pairs)
    assert len({len(pair.prompt) for pair in pairs}) > 3 and len({len(pair.response) for pair in pairs}) > 3
    sums, counts = zip(*(negative_log_likelihood(start, pair) for pair in pairs), strict=True)
    assert rows_of(tmp_path / "run")[0]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_eos_is_among_the_labels_when_pad_is_eos(tmp_path: Path, tiny_gpt2_pad_eos: Path, examples_file: Path) -> None:
    config = configure(tmp_path / "run", model=str(tiny_gpt2_pad_eos), data=str(examples_file)).config
    loaded = load(config.model, for_training=True)
    assert loaded.pad_id == loaded.eos_id
    pairs, _ = sft.make_pairs(loaded, read_examples(examples_file), config)
    trainer = sft.make_trainer(loaded, config, tmp_path / "checkpoints", pairs, [])
    rows = [trainer.train_dataset[i] for i in range(6)]
    batch = trainer.data_collator(rows)
    for row, labels, pair in zip(rows, batch["labels"].tolist(), pairs, strict=False):
        learned = [label for label in labels if label != -100]
        assert learned == pair.response
        assert learned.count(loaded.eos_id) == 1
        assert labels.index(loaded.eos_id) == len(row["input_ids"]) - 1


@pytest.mark.parametrize("pad", ["distinct", "eos"])
def test_the_model_learns_to_write_and_to_end(tmp_path: Path, pad: str) -> None:
    data = write_rows(tmp_path / "train.jsonl", toy_examples(200))
    resolved = configure(
        tmp_path / "run",
        model=describe(tmp_path, pad=pad),
        data=str(data),
        max_steps=60,
        batch_size=16,
        optim__learning_rate=5e-3,
    )
    result = sft.run(resolved)
    assert rows_of(result.folder)[-1]["loss"] < 0.5 * rows_of(result.folder)[0]["loss"]
    trained = load(ModelConfig(name=str(result.folder), device="cpu"))
    encoded, _ = encode_prompts(trained, read_examples(data, limit=30), resolved.config.lengths)
    decoding = DecodingConfig(temperature=0)
    texts = generate_texts(trained, encoded, decoding, resolved.config.lengths, seed=0)
    assert sum(text.finish_reason == "stop" for text in texts) >= 28
    assert sum(text.text.endswith(" .") for text in texts) >= 28


def test_every_family_leaves_a_whole_run(tmp_path: Path, any_model: Path, examples_file: Path) -> None:
    held_out = write_rows(tmp_path / "val.jsonl", toy_examples(10, seed=1))
    resolved = configure(
        tmp_path / "run",
        model=str(any_model),
        data=str(examples_file),
        eval_data=str(held_out),
        max_steps=3,
        eval_steps=2,
    )
    result = sft.run(resolved)
    manifest = json.loads((result.folder / "run.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["result"] == result.summary
    assert result.summary["examples"] == 40 and result.summary["steps"] == 3
    rows = rows_of(result.folder)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 3]
    assert result.summary["eval_loss"] == rows[-1]["eval_loss"] > 0
    assert [parent["path"] for parent in manifest["parents"]] == [str(examples_file), str(held_out), str(any_model)]
    assert "Made by `rlgf sft`" in (result.folder / "README.md").read_text()
    before, after = weights_of(any_model), weights_of(result.folder)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trained = load(ModelConfig(name=str(result.folder), device="cpu"))
    assert trained.text.response_prefix == " "
    assert trained.model.config.use_cache is True
    assert trained.model.generation_config.max_new_tokens == 24
    assert not list((result.folder / "checkpoints").iterdir())


def test_the_text_format_is_stored(tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> None:
    resolved = configure(
        tmp_path / "run", model=str(tiny_gpt2), data=str(examples_file), max_steps=1, text__template="say {prompt}:"
    )
    stored = json.loads((sft.run(resolved).folder / "rlgf_text.json").read_text())
    assert (stored["template"], stored["response_prefix"]) == ("say {prompt}:", " ")


def test_layer_norms_and_biases_are_not_decayed(tmp_path: Path, any_model: Path, examples_file: Path) -> None:
    config = configure(tmp_path / "run", model=str(any_model), data=str(examples_file)).config
    loaded = load(config.model, for_training=True)
    pairs, _ = sft.make_pairs(loaded, read_examples(examples_file), config)
    decayed = set(sft.make_trainer(loaded, config, tmp_path / "c", pairs, []).get_decay_parameter_names(loaded.model))
    vectors = {name for name, parameter in loaded.model.named_parameters() if parameter.dim() < 2}
    matrices = {n for n, p in loaded.model.named_parameters() if p.dim() >= 2 and "bias" not in n}
    assert vectors and not decayed & vectors
    assert matrices <= decayed


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_accumulated_batches_are_one_batch(tmp_path: Path, examples_file: Path, architecture: str) -> None:
    ends = []
    for size, parts in ((8, 1), (2, 4)):
        run = tmp_path / f"{size}"
        resolved = configure(
            run,
            model=describe(tmp_path, architecture=architecture),
            data=str(examples_file),
            max_steps=2,
            batch_size=size,
            gradient_accumulation_steps=parts,
            optim__learning_rate=1e-3,
        )
        sft.run(resolved)
        ends.append((weights_of(run), rows_of(run)[0]["loss"]))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    for name, value in ends[0][0].items():
        torch.testing.assert_close(value, ends[1][0][name], rtol=0, atol=2e-5)


def test_lora_trains_the_adapter_alone(tmp_path: Path, tiny_llama: Path, examples_file: Path) -> None:
    resolved = configure(
        tmp_path / "run", model=str(tiny_llama), data=str(examples_file), max_steps=2, lora__enabled=True, lora__r=4
    )
    folder = sft.run(resolved).folder
    assert not (folder / "model.safetensors").exists()
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and adapter["base_model_name_or_path"] == str(tiny_llama)
    assert all(".lora_" in name for name in weights_of(folder))
    assert any(value.abs().sum() > 0 for name, value in weights_of(folder).items() if "lora_B" in name)
    base = load(ModelConfig(name=str(tiny_llama), device="cpu")).model.state_dict()
    trained = load(ModelConfig(name=str(folder), device="cpu")).model.unload().state_dict()
    assert base.keys() == trained.keys()
    for name, value in base.items():
        assert torch.equal(value, trained[name]), name


def test_bfloat16_computes_in_it_and_keeps_the_weights(tmp_path: Path, examples_file: Path) -> None:
    losses = {}
    for dtype in ("float32", "bfloat16"):
        resolved = configure(
            tmp_path / dtype,
            model=describe(tmp_path),
            data=str(examples_file),
            max_steps=1,
            logging_steps=1,
            model__dtype=dtype,
            gradient_checkpointing=dtype == "bfloat16",
        )
        sft.run(resolved)
        losses[dtype] = rows_of(tmp_path / dtype)[0]["loss"]
        assert {value.dtype for value in weights_of(tmp_path / dtype).values()} == {torch.float32}
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)


def test_references_and_truncated_responses(tmp_path: Path, tiny_gpt2: Path) -> None:
    rows = [
        {"id": "a", "prompt": "cat sees garden", "references": ["the cat sees the garden .", "a cat ."]},
        {"id": "b", "prompt": "dog", "references": ["the dog likes the river . " * 5]},
    ]
    examples = read_examples(write_rows(tmp_path / "train.jsonl", rows))
    loaded = load(ModelConfig(name=str(tiny_gpt2), device="cpu"))

    def pairs(references: str, seed: int = 0, limit: int = 24) -> tuple[list[sft.Pair], dict[str, int]]:
        given = configure(
            tmp_path / "x", model="x", data="x", references=references, seed=seed, lengths__max_new_tokens=limit
        )
        return sft.make_pairs(loaded, examples, given.config)

    every, counts = pairs("all")
    assert len(every) == 3
    assert counts == {"truncated": 0, "skipped": 0, "truncated_responses": 1, "spelled_endings": 0}
    assert [len(pair.response) for pair in every][2] == 24
    assert [pair.response[-1] == loaded.eos_id for pair in every] == [True, True, False]
    assert every[0].prompt == loaded.tokenizer("cat sees garden")["input_ids"]
    assert every[0].response[:-1] == loaded.tokenizer(" the cat sees the garden .")["input_ids"]
    assert pairs("first")[0] == [every[0], every[2]]
    whole = every[0].response
    assert pairs("first", limit=len(whole))[0][0].response == whole
    assert pairs("first", limit=len(whole) - 1)[0][0].response == whole[:-1]
    drawn = {tuple(pairs("random", seed)[0][0].response) for seed in range(20)}
    assert drawn == {tuple(every[0].response), tuple(every[1].response)}


class _Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Any) -> None:
    """Let ``act()`` happen when the trainer has finished ``step``, before it saves."""
    plain = callback.ProgressCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == step:
            act()
        plain(self, args, state, control, **given)

    monkeypatch.setattr(callback.ProgressCallback, "on_step_end", on_step_end)


def _kill() -> None:
    raise _Killed


RESUMED = {"max_steps": 9, "save_steps": 3, "save_total_limit": 1, "optim.learning_rate": 1e-3, "batch_size": 16,
           "logging_steps": 4}  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "t5", "lora", "scratch"])
def test_a_killed_run_resumes_to_the_same_end(
    tmp_path: Path, request: pytest.FixtureRequest, examples_file: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Dropout is on in these models: random state, order of the data, optimizer and schedule all count."""
    held_out = write_rows(tmp_path / "val.jsonl", toy_examples(10, seed=1))
    if kind == "scratch":
        model = describe(tmp_path, dropout=0.1, tokenizer="unigram")
    else:
        model = str(request.getfixturevalue("tiny_t5" if kind == "t5" else "tiny_gpt2"))
    more = {"lora.enabled": kind == "lora", "lora.dropout": 0.1 if kind == "lora" else None}
    common = {"model": model, "data": str(examples_file), "eval_data": str(held_out), **RESUMED, **more}
    whole = sft.run(configure(tmp_path / "whole", **common))

    resolved = configure(tmp_path / "killed", **common)
    with monkeypatch.context() as patch:
        _at_step(patch, 8, _kill)
        with pytest.raises(_Killed):
            sft.run(resolved)
    checkpoints = tmp_path / "killed/checkpoints"
    assert [c.name for c in checkpoints.glob("checkpoint-*")] == ["checkpoint-6"]
    torn = checkpoints / "checkpoint-7"  # what a killed save leaves
    shutil.copytree(checkpoints / "checkpoint-6", torn)
    (torn / callback.COMPLETE).unlink()

    done: list[int] = []
    plain = callback.ProgressCallback.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        done.append(state.global_step)
        plain(self, args, state, control, **given)

    with monkeypatch.context() as patch:
        patch.setattr(callback.ProgressCallback, "on_step_end", on_step_end)
        patch.setattr(scratch, "build", lambda *_, **__: pytest.fail("the start was made anew"))
        resumed = sft.run(resolved, existing="resume")
    assert done == [7, 8, 9]
    assert not torn.exists()
    assert rows_of(resumed.folder) == rows_of(whole.folder)
    assert resumed.summary == whole.summary
    first, second = weights_of(whole.folder), weights_of(resumed.folder)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert json.loads((resumed.folder / "run.json").read_text())["resumed"] == 1


@pytest.fixture
def ctrl_c() -> Iterator[Any]:
    """Python's own handler of Ctrl-C, also where the tests run as a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "kind", "status"),
    [(signal.SIGINT, Interrupted, "interrupted"), (signal.SIGTERM, StoppedEarly, "stopped")],
)
def test_a_signal_saves_and_resumes(
    tmp_path: Path,
    tiny_gpt2: Path,
    examples_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    ctrl_c: Any,
    number: int,
    kind: type[RlgfError],
    status: str,
) -> None:
    common = {"model": str(tiny_gpt2), "data": str(examples_file), "max_steps": 6, "save_steps": None}
    sft.run(configure(tmp_path / "whole", **common))
    resolved = configure(tmp_path / "stopped", **common)
    with monkeypatch.context() as patch:
        _at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        with pytest.raises(kind, match="at step 4 of 6") as caught:
            sft.run(resolved)
    assert "--resume" in str(caught.value.hint)
    assert json.loads((tmp_path / "stopped/run.json").read_text())["status"] == status
    assert not (tmp_path / "stopped/model.safetensors").exists()
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    sft.run(resolved, existing="resume")
    for name, value in weights_of(tmp_path / "whole").items():
        assert torch.equal(value, weights_of(tmp_path / "stopped")[name]), name


def test_a_finished_run_is_not_trained_again(tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> None:
    resolved = configure(tmp_path / "run", model=str(tiny_gpt2), data=str(examples_file), max_steps=2)
    first = sft.run(resolved)
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert sft.run(resolved, existing="resume").summary == first.summary
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> None:
    resolved = configure(
        tmp_path / "run", model=str(tiny_gpt2), data=str(examples_file), max_steps=8, optim__learning_rate=1e30
    )
    with pytest.raises(RlgfError, match="diverged"):
        sft.run(resolved)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run/model.safetensors").exists()


def test_a_full_disk_leaves_nothing_half_made(
    tmp_path: Path, tiny_gpt2: Path, examples_file: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save says nothing of the disk; the free space tells."""

    def torn(*_: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 266496 vs 266384")

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", torn)
    arguments = ("sft", "--model", tiny_gpt2, "--data", examples_file, "--max-new-tokens", 24, "--max-steps", 4)
    shown = run_cli(*arguments, "--save-steps", 2, "-o", tmp_path / "run")
    assert shown.exit_code == 1 and "unexpected pos" in shown.stderr
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    shown = run_cli(*arguments, "--save-steps", 2, "-o", tmp_path / "run")
    assert shown.exit_code == 2 and "no space left on the disk" in shown.stderr
    assert not (tmp_path / "run").exists()


def test_the_result_is_pushed_also_by_a_second_try(
    tmp_path: Path, tiny_gpt2: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[str, bool]] = []

    def push(folder: Path, repo_id: str) -> str:
        pushed.append((repo_id, (folder / "model.safetensors").exists() and (folder / "README.md").exists()))
        if len(pushed) == 1:
            raise RlgfError("the hub is down")
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(hub, "check", lambda _: None)
    monkeypatch.setattr(hub, "push", push)
    resolved = configure(
        tmp_path / "run", model=str(tiny_gpt2), data=str(examples_file), max_steps=1, push_to_hub="user/model"
    )
    with pytest.raises(RlgfError, match="the hub is down"):
        sft.run(resolved)
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "done"
    sft.run(resolved, existing="resume")
    assert pushed == [("user/model", True), ("user/model", True)]
