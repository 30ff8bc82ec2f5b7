"""The estimate of a training's memory, and what run.json says of the peak."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.functional.logprobs import LOGITS_BYTES
from rlgf_cli.models.forward import TokenBatch, response_states
from rlgf_cli.models.packing import groups_of, saves
from rlgf_cli.models.sizes import (
    ModelSizes,
    PassShape,
    TracedBytes,
    model_without_weights,
    sizes_of,
    trace,
    with_adapter,
)
from rlgf_cli.runs import memory
from rlgf_cli.runs.memory import MemoryPlan, PeakMemory, estimate, gigabytes, parameter_bytes, pass_shape, record
from rlgf_cli.training.microbatches import split_by_tokens
from rlgf_cli.training.parallel.processes import SINGLE

SIZES = ModelSizes(
    parameters=1000, matrices=600, vectors=40, head=300, tied=True, adapter=0, hidden=10, layers=2, vocabulary=30
)
"""Embeddings and head share 300; 60 are a table of positions."""
SHAPE = PassShape(rows=2, columns=20, responses=4, prompt=8, prompts=2)
TRACED = TracedBytes(saved=5000, cached=80)


def plan(**changes: Any) -> MemoryPlan:
    values = {
        "trained": "full", "bfloat16": False, "ref_model": True, "critics": 0, "separate_critic": False, "passes": 1,
        "shape": SHAPE, "response": 6, "cache_rows": 1, "cache_columns": 14, "shards": 1, "cpu": False,
    }  # fmt: skip
    return MemoryPlan(**{**values, **changes})


def parts(sizes: ModelSizes = SIZES, **changes: Any) -> dict[str, int]:
    return {name: value for name, value in estimate(sizes, TRACED, plan(**changes)).items() if value}


LOGITS = 3 * 4 * 30 * 4 * 6  # three float32 tensors, of 30 logits for each of 4 x 6 tokens


def test_full_fine_tuning_by_hand() -> None:
    states = {"weights": 4000, "gradients": 4000, "adamw": 8000, "ref_model": 4000}
    assert parts() == {**states, "activations": 5000, "logits": LOGITS}
    assert parts(ref_model=False) == {
        "weights": 4000, "gradients": 4000, "adamw": 8000, "activations": 5000, "logits": LOGITS
    }  # fmt: skip
    # matrices and a head of its own in bfloat16; tables and vectors in float32
    assert parts(bfloat16=True)["ref_model"] == 2 * (600 + 300) + 4 * (360 + 40)
    assert parts(cpu=True)["allocator"] == (5000 + LOGITS) / 2


def test_critics_by_hand() -> None:
    assert parts(critics=2)["critics"] == 2 * 16 * (3 * 10 + 1)
    separate = parts(critics=1, separate_critic=True, passes=2)
    assert (separate["critics"], separate["activations"]) == (16 * 1000, 10000)
    untied = replace(SIZES, parameters=1300, tied=False)
    assert parts(untied, critics=1, separate_critic=True)["critics"] == 16 * 1000  # it has no LM head


def test_lora_and_four_bits_by_hand() -> None:
    work = {"activations": 5000, "logits": LOGITS}
    learned = {"gradients": 4 * 50, "adamw": 8 * 50}
    lora = replace(SIZES, adapter=50)
    assert parts(lora, trained="lora") == {"weights": 4 * 1050, **learned, **work}
    assert parts(lora, trained="lora", bfloat16=True) == {"weights": 2 * 960 + 4 * 40 + 4 * 50, **learned, **work}
    assert parts(lora, trained="4bit")["weights"] == round(0.5625 * 600 + 2 * 360 + 4 * (40 + 50))


def test_shards_and_a_rollout_that_takes_more_by_hand() -> None:
    assert parts(cache_rows=100)["rollout"] == 80 * 100 * 14 + 24 * 100 * 30
    assert "activations" not in parts(cache_rows=100)
    # in bfloat16 the weights that learn have copies in a rollout
    assert parts(cache_rows=100, bfloat16=True)["rollout"] == parts(cache_rows=100)["rollout"] + 2 * (600 + 300)
    sharded = parts(cache_rows=100, shards=4)
    assert [sharded[name] for name in ("weights", "gradients", "adamw", "ref_model")] == [1000, 1000, 2000, 1000]
    assert sharded["rollout"] == parts(cache_rows=100)["rollout"] + 0.75 * 8000
    # in the update, a layer and what is outside of the layers
    assert parts(shards=4, bfloat16=True, cache_rows=0)["activations"] == 5000 + 4 * (360 + 300)


def test_the_logits_of_one_chunk_are_the_most() -> None:
    many = PassShape(rows=1, columns=10, responses=10**9, prompt=8, prompts=1)
    assert estimate(SIZES, TRACED, plan(shape=many))["logits"] == 3 * LOGITS_BYTES


def test_the_table_in_the_docs_is_what_is_summed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    for label, trained in (("full fine-tuning", "full"), ("LoRA", "lora"), ("LoRA, `--load-in-4bit`", "4bit")):
        for dtype in ("float32", "bfloat16"):
            (row,) = re.findall(rf"^\| {re.escape(label)} \| {dtype} \| (.*) \|$", page, re.M)
            expected = parameter_bytes(trained, bfloat16=dtype == "bfloat16", separate_critic=True)  # type: ignore[arg-type]
            figures = [float(cell.split()[0]) for cell in row.split(" | ")]
            assert figures == pytest.approx([*expected], abs=0.05), row


# the model


def test_parameters_by_hand(tiny_llama: Path) -> None:
    model, base = model_without_weights(ModelConfig(name=str(tiny_llama)))
    vocabulary = model.config.vocab_size
    # two layers of width 32 with two heads of 16, one of keys and values, and 64 gated units
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    vectors = (2 * 2 + 1) * 32
    assert base.name == str(tiny_llama)
    assert sizes_of(model) == ModelSizes(
        matrices + vectors + vocabulary * 32, matrices, vectors, vocabulary * 32, True, 0, 32, 2, vocabulary
    )
    lora = LoraConfig(enabled=True, r=4, target_modules=["q_proj"])
    adapted = with_adapter(model, ModelConfig(name=str(tiny_llama)), lora)
    assert sizes_of(adapted).adapter == 2 * 4 * (32 + 32)
    assert sizes_of(adapted).parameters == matrices + vectors + vocabulary * 32


def batch(prompts: list[list[int]], responses: list[list[int]], encoder_decoder: bool = False) -> TokenBatch:
    return TokenBatch.build(prompts, responses, pad_id=0, encoder_decoder=encoder_decoder, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_a_pass_without_weights_keeps_what_a_real_one_keeps(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor.untyped_storage()
        return tensor

    tokens = batch([[5] * 9] * 4 + [[6] * 9] * 4, [[20 + i, 7, 8, 9, 10] for i in range(8)])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        response_states(model, tokens, share_prompts=True)
    expected = sum(storage.nbytes() for storage in kept.values())
    shape = pass_shape(8, 2, 9, 5, limit=8192, hidden=32, encoder_decoder=False)
    assert (shape.rows, shape.columns, shape.responses) == (2, 9 + 4 * 4, 8)
    empty, _ = model_without_weights(ModelConfig(name=str(folder)))
    traced = trace(empty, shape, torch.float32, checkpointing=False)
    assert traced.saved == pytest.approx(expected, rel=0.02)
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert traced.cached == 2 * 2 * heads * 16 * 4  # keys and values of two layers


@pytest.mark.parametrize("name", ["tiny_t5", "tiny_bart", "tiny_qwen3", "tiny_llama"])
def test_other_models_adapters_and_checkpointing_are_traced(name: str, request: pytest.FixtureRequest) -> None:
    config = ModelConfig(name=str(request.getfixturevalue(name)))

    def kept(dtype: torch.dtype, lora: bool = False, checkpointing: bool = False, times: int = 1) -> int:
        model = with_adapter(model_without_weights(config)[0], config, LoraConfig(enabled=lora, r=1))
        shape = PassShape(4 * times, 12, 4 * times, 9, 2 * times)
        return trace(model, shape, dtype, checkpointing=checkpointing).saved

    whole = kept(torch.float32)
    assert 0 < kept(torch.bfloat16, lora=True) < whole
    assert 0 < kept(torch.float32, checkpointing=True) < whole
    # no copies of a base that is bfloat16 already: all that is kept is of tokens
    assert kept(torch.bfloat16, lora=True, times=2) == pytest.approx(2 * kept(torch.bfloat16, lora=True), rel=0.03)


def test_an_architecture_that_cannot_be_traced_is_said(
    tiny_llama: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no shapes\nmore")

    monkeypatch.setattr(memory, "trace", fails)
    said: list[str] = []
    assert memory.training_memory(config, [prompt(5)], 1, log=said.append) is None
    assert said == ["the memory is not known: a forward pass of this architecture cannot be traced (no shapes)"]
    assert gigabytes(None) is None
    assert record(None, 7) == {"estimated_bytes": None, "parts": None, "peak_bytes": 7, "ratio": None}


# the pass


@pytest.fixture
def config(tiny_llama: Path) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"name": str(tiny_llama), "device": "cpu"}, "data": "x", "output": "o", "reward": "length",
            "algorithm": {"name": "grpo", "group_size": 4}, "rollout": {"episodes": 16}, "ppo": {"minibatch_size": 16},
        }
    )  # fmt: skip


def prompt(length: int) -> Any:
    return SimpleNamespace(ids=[0] * length)


@pytest.mark.parametrize("limit", [40, 100, 300, 8192])
@pytest.mark.parametrize(("rows", "groups"), [(16, 4), (16, 16), (6, 1)])
def test_the_shape_is_that_of_the_largest_part(rows: int, groups: int, limit: int) -> None:
    length, response = 20, 12
    prompts = [[g + 1] * length for g in range(groups) for _ in range(rows // groups)]
    tokens = batch(prompts, [[100 + i, *range(1, response)] for i in range(rows)])

    def columns(part: torch.Tensor) -> int:
        own = tokens.rows(part)
        found = groups_of(own.prompt_ids, own.prompt_mask, own.response_ids, own.lengths)
        if not saves(found, own.lengths.tolist(), 32):
            return len(part) * (length + response - 1)
        return len(found) * max(g.columns(own.lengths.tolist()) for g in found)

    split = split_by_tokens(tokens, torch.arange(rows), limit, packing_hidden=32)
    shape = pass_shape(rows, groups, length, response, limit=limit, hidden=32, encoder_decoder=False)
    assert shape.rows * shape.columns == max(map(columns, split))


# the peak


def test_the_peak_is_what_came_after(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, held = [900, 1500], 700
    monkeypatch.setattr(memory, "_peak_resident", lambda: peaks[0])
    monkeypatch.setattr(memory, "_resident", lambda: held)
    peak = PeakMemory(torch.device("cpu"))
    assert peak.bytes() is None  # the process held more before: it is not known what the run took
    peaks[0] = 1500
    assert peak.bytes() == 1500 - 700


def test_resident_memory_is_in_bytes() -> None:
    assert 50e6 < memory._peak_resident() < 100e9
    assert 50e6 < (memory._resident() or 50e6 + 1) <= memory._peak_resident() * 1.01


def test_a_resumed_run_keeps_its_largest_session(tmp_path: Path) -> None:
    first = record({"weights": 100, "logits": 50}, 120)
    assert first == {
        "estimated_bytes": 150, "parts": {"weights": 100, "logits": 50}, "peak_bytes": 120, "ratio": 0.8
    }  # fmt: skip
    assert record({"weights": 200}, 100, first) == first
    assert record({"weights": 200}, 300, first)["ratio"] == 1.5
    assert record({"weights": 200}, None, first) == first


def test_the_peak_is_recorded_however_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = SimpleNamespace(data={})
    manifest.save = manifest.data.update
    folder: Any = SimpleNamespace(manifest=manifest)
    peak: Any = SimpleNamespace(bytes=lambda: 30)
    with pytest.raises(KeyboardInterrupt), memory.recorded_peak(peak, {"weights": 20}, folder, SINGLE):
        raise KeyboardInterrupt
    assert manifest.data["memory"]["ratio"] == 1.5
