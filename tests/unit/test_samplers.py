"""What samples the policy's tokens: which engine a config names, what is refused, and the requests to vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from configured import config_of, trainer_of
from rl import loaded_from, prompts_for
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import SamplerConfig, TrainConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.models.generate import Generated, sample
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers import engine
from rlgf_cli.models.samplers.base import Distribution, OwnSampler, Sampler, SampleRequest
from rlgf_cli.models.samplers.engine import EngineSampler
from rlgf_cli.models.samplers.vllm_requests import requests_of
from rlgf_cli.runs.build import make_trainer
from rlgf_cli.training.parallel.processes import Processes


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def test_the_own_sampler_is_the_decoding_loop(gpt2: Loaded) -> None:
    prompts = [p.ids for p in prompts_for(gpt2, 5)]
    prefixes: list[list[int]] = [[], [40], [41, 42], [], [43]]
    limits, uniforms = [6, 5, 4, 3, 2], np.random.default_rng(0).random((5, 8))
    distribution = Distribution(temperature=0.7, top_k=50, top_p=0.9, min_new_tokens=3, ban_control=True)
    batches: list[list[int]] = []
    rows = OwnSampler(gpt2).sample(
        SampleRequest(prompts, prefixes, limits, uniforms, distribution),
        batch_size=2,
        on_batch=lambda batch, _: batches.append(batch),
    )
    expected = sample(
        gpt2.model, prompts, prefixes=prefixes, max_new_tokens=limits, uniforms=uniforms, eos_ids=gpt2.eos_ids,
        pad_id=gpt2.pad_id, banned_ids=gpt2.control_ids, temperature=0.7, top_k=50, top_p=0.9, min_new_tokens=3,
    )  # fmt: skip
    assert rows == expected and [len(b) for b in batches] == [2, 2, 1]
    assert not OwnSampler.separate and all(row.logprobs is None for row in rows)


def test_a_row_is_a_request_with_its_own_limit_and_seed(gpt2: Loaded) -> None:
    uniforms = np.array([[0.25, 0.5, 0.75, 0.0], [0.5, 0.125, 0.0, 0.0]])
    distribution = Distribution(temperature=0.5, top_k=7, top_p=0.9, min_new_tokens=3)
    first, second = requests_of(gpt2, SampleRequest([[5, 6], [7]], [[40, 41], []], [2, 4], uniforms, distribution))
    assert first.ids == [5, 6, 40, 41] and second.ids == [7]
    shared = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "logprobs": 0, "stop_token_ids": sorted(gpt2.eos_ids)}
    assert first.params == {**shared, "max_tokens": 2, "min_tokens": 1, "seed": int(0.75 * (1 << 31))}
    assert second.params == {**shared, "max_tokens": 4, "min_tokens": 3, "seed": int(0.5 * (1 << 31))}
    (greedy,) = requests_of(gpt2, SampleRequest([[5]], [[]], [4], None, Distribution(ban_control=True)))
    assert greedy.params["temperature"] == 0 and "seed" not in greedy.params
    assert greedy.params["logit_bias"] == dict.fromkeys(gpt2.control_ids, -100.0)


def test_a_step_sends_the_weights_samples_and_sleeps(gpt2: Loaded) -> None:
    calls: list[str] = []

    class Recorder(OwnSampler):
        separate = True

        def send(self) -> None:
            calls.append("send")

        def sample(self, *given: Any, **more: Any) -> list[Generated]:
            calls.append("sample")
            return super().sample(*given, **more)

        def sleep(self) -> None:
            calls.append("sleep")

    trainer = trainer_of(gpt2)
    trainer.generator.sampler = Recorder(gpt2)
    row, _ = trainer.step()
    trainer.step()
    assert calls == ["send", "sample", "sleep"] * 2 and row["time/sync"] >= 0


def test_a_run_closes_its_engine_also_where_it_fails(
    tiny_gpt2: Path, examples_file: Path, tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Sampler] = []
    monkeypatch.setattr(OwnSampler, "close", lambda self: closed.append(self))
    (tmp_path / "broken.py").write_text("def broken(text):\n    raise OSError\n")
    for reward, code in (("coverage", 0), (f"{tmp_path / 'broken.py'}:broken", 1)):
        command = ("train", "--alg", "ppo", "--model", tiny_gpt2, "--data", examples_file, "--reward", reward)
        sizes = ("--max-steps", 1, "--episodes", 4, "--batch-size", 4, "--max-new-tokens", 4)
        assert run_cli(*command, *sizes, "-o", tmp_path / f"run{code}").exit_code == code
        assert len(closed) == 1
        closed.clear()


# --- the config


def test_a_url_alone_means_the_server() -> None:
    assert config_of().sampler.engine == "own"
    assert config_of(sampler={"url": "http://x"}).sampler.engine == "server"
    flags: dict[str, Any] = {"model": "m", "data": "d", "output": "o", "reward": "rouge"}
    for given, expected in (({"sampler.url": "http://x"}, "server"), ({"sampler": "vllm"}, "vllm")):
        assert resolve(TrainConfig, flags={**flags, **given}).config.sampler.engine == expected


@pytest.mark.parametrize(
    ("sections", "reason", "way_out"),
    [
        ({"sampler": {"engine": "vllm", "url": "http://x"}}, "sampler.url is http://x", "engine: server"),
        ({"sampler": {"engine": "server"}}, "sampler.url is None", "needs one"),
        ({"sampler": {"correction": "truncate"}}, "own loop", "correction: none"),
        ({"sampler": {"engine": "vllm"}, "parallel": {"strategy": "fsdp"}}, "whole weights", "engine: own"),
        ({"sampler": {"url": "http://x"}, "model": {"name": "m", "load_in_4bit": True}}, "4-bit", "engine: own"),
        ({"sampler": {"engine": "vllm"}, "rollout": {"temperature": 2.5}}, "from 0.01 to 2", "engine: own"),
        ({"sampler": {"url": "http://x"}, "rollout": {"temperature": 0.001}}, "from 0.01 to 2", "engine: own"),
        ({"sampler": {"engine": "vllm"}, "parallel": {"num_processes": 2}}, "one process", "engine: server"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], reason: str, way_out: str) -> None:
    with pytest.raises(ValidationError, match=reason) as caught:
        config_of(**sections)
    assert way_out in (caught.value.errors()[0]["ctx"]["error"].hint or "")


def build(loaded: Loaded, processes: Processes | None = None, **sampler: Any) -> Sampler:
    sections = {"sampler": sampler}
    if processes is None:
        return trainer_of(loaded, **sections).generator.sampler
    trainer = make_trainer(
        config_of(**sections), loaded, prompts_for(loaded, 2), processes, guide=None, covered=None, scorer=None,
        scorer_at=None, prefetch=None, evaluate=None, warn=print,
    )  # fmt: skip
    return trainer.generator.sampler


def test_vllm_takes_no_encoder_decoder(tiny_t5: Path) -> None:
    for sampler in ({"engine": "vllm"}, {"url": "http://x"}):
        with pytest.raises(UserError, match="decoder-only") as caught:
            build(loaded_from(tiny_t5), **sampler)
        assert "engine: own" in (caught.value.hint or "")


# --- the engine in this process, over a stand-in for vllm.LLM that records what it is asked


class Engine:
    """``fails``: the call that raises."""

    def __init__(self, fails: str = "", **settings: Any) -> None:
        self.settings, self.calls, self.fails = settings, [], fails
        self.config = json.loads((Path(settings["model"]) / "config.json").read_text())
        self.weights: dict[str, torch.Tensor] = {}

    def _called(self, name: str, *given: Any) -> None:
        self.calls.append((name, *given))
        if name == self.fails:
            raise ValueError("the engine broke")

    def collective_rpc(self, name: str, kwargs: dict[str, Any]) -> None:
        self._called(name)
        self.weights = dict(kwargs["weights_iterator"])

    def apply_model(self, function: Any) -> None:
        self._called(function.__name__)

    def sleep(self, level: int) -> None:
        self._called("sleep", level)

    def wake_up(self, tags: list[str]) -> None:
        self._called("wake_up", *tags)

    def reset_prefix_cache(self) -> None:
        self._called("reset_prefix_cache")

    def generate(self, prompts: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self._called("generate")
        answers = []
        for prompt, asked in zip(prompts, params, strict=True):
            ids = [40, asked.stop_token_ids[0]][: asked.max_tokens] if prompt["prompt_token_ids"] else []
            logprobs = [{token: SimpleNamespace(logprob=-token / 10)} for token in ids]
            answers.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=logprobs)]))
        return answers


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module in vLLM's place."""
    module, platforms = ModuleType("vllm"), ModuleType("vllm.platforms")
    module.LLM, module.SamplingParams = Engine, lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    platforms.current_platform = SimpleNamespace(device_type="cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    for name in (*engine.ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "as it was")
    return module


def test_the_engine_starts_from_the_config_and_is_sent_the_weights(gpt2: Loaded, vllm: ModuleType) -> None:
    sampler = EngineSampler.start(SamplerConfig(engine="vllm", memory_share=0.4), gpt2, longest=40)
    settings, model = sampler.llm.settings, sampler.llm.config
    assert settings["max_model_len"] == 40 and settings["gpu_memory_utilization"] == 0.4
    assert settings["dtype"] == "float32" and not settings["enable_sleep_mode"]
    assert model["architectures"] == ["GPT2LMHeadModel"] and model["n_layer"] == gpt2.model.config.n_layer
    sampler.send()
    assert [name for name, *_ in sampler.llm.calls] == ["reload_weights", "_pack_again", "reset_prefix_cache"]
    assert all(torch.equal(p, sampler.llm.weights[name]) for name, p in gpt2.model.named_parameters())
    first, second = sampler.sample(SampleRequest([[5], [6]], [[], [7]], [4, 1], np.full((2, 4), 0.5)))
    eos = min(gpt2.eos_ids)
    assert first.ids == [40, eos] and first.finished and first.logprobs == [-4.0, -eos / 10]
    assert second.ids == [40] and not second.finished


def test_the_engine_sleeps_from_rollout_to_rollout(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, vllm: Any) -> None:
    """On a GPU: the weights' memory comes back before they are handed over, the cache's after that."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    llm = EngineSampler.start(SamplerConfig(engine="vllm"), gpt2, longest=9).llm
    sampler = EngineSampler(llm, lambda **_: None, gpt2, sleeps=True)
    sampler.send()
    llm.calls.clear()
    sampler.sleep()
    sampler.sleep()
    assert llm.calls == [("sleep", 2)]
    sampler.send()
    assert llm.calls[1:] == [
        ("wake_up", "weights"), ("reload_weights",), ("_pack_again",), ("wake_up", "kv_cache"), ("reset_prefix_cache",)
    ]  # fmt: skip


def test_what_vllm_raises_names_the_way_out(gpt2: Loaded, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EngineSampler.start(SamplerConfig(engine="vllm"), gpt2, longest=9)
    with pytest.raises(AssertionError, match="send"):
        sampler.sample(SampleRequest([[5]], [[]], [1], None))
    sampler.llm.fails = "reload_weights"
    with pytest.raises(RlgfError, match="the engine broke") as failed:
        sampler.send()
    assert "--resume" in (failed.value.hint or "")
    monkeypatch.setattr(vllm, "LLM", lambda **_: (_ for _ in ()).throw(ValueError("no memory")))
    with pytest.raises(UserError, match="no memory") as refused:
        EngineSampler.start(SamplerConfig(engine="vllm"), gpt2, longest=9)
    assert "memory_share" in (refused.value.hint or "")
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "device_type", "cuda")
    with pytest.raises(UserError, match="cuda"):
        EngineSampler.start(SamplerConfig(engine="vllm"), gpt2, longest=9)


def test_several_processes_have_no_engine_in_them(gpt2: Loaded, vllm: Any) -> None:
    """Also where a launcher started them, of which the config says nothing."""

    class Two(Processes):
        def raise_together(self, work: Any) -> Any:
            return work()

        def spread(self, model: Any) -> None:
            pass

    with pytest.raises(UserError, match="there are 2") as caught:
        build(gpt2, Two(0, 2), engine="vllm")
    assert "server" in (caught.value.hint or "")


def test_without_vllm_the_hint_says_how_to_install_it(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError) as caught:
        build(gpt2, engine="vllm")
    assert "rlgf-cli[vllm]" in (caught.value.hint or "")
