"""The policy's writing on a vLLM server, over a stand-in for TRL's client: weights by name, tokens with their
log-probabilities, one request at a time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import toy_examples, write_rows
from rl import loaded_from
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.config.train import SamplerConfig
from rlgf_cli.models import trl_primitives
from rlgf_cli.models.load import add_lora
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers.server import ServerSampler


class StandIn:
    """A server with a model of its own. ``deaf``: it forgets what it is sent; ``fails_at``: the request that it drops.

    As vLLM does, it stops at the given tokens and gives them with the text, and says the log-probability of each token
    under the temperature-scaled distribution.
    """

    def __init__(self, model: Any, *, deaf: bool = False, fails_at: int | None = None) -> None:
        self.model, self.deaf, self.fails_at = model, deaf, fails_at
        self.requests: list[dict[str, Any]] = []
        self.updates = 0
        self.stale = True
        self.joined: Any = None
        self._lock = threading.Lock()

    def init_communicator(self, device: Any) -> None:
        self.joined = device

    def update_named_params(
        self, described: list[tuple[str, str, list[int]]], weights: Iterator[tuple[str, torch.Tensor]]
    ) -> None:
        mine = dict(self.model.named_parameters())
        assert [name for name, _, _ in described] == list(mine)
        for (name, dtype, shape), (sent, tensor) in zip(described, weights, strict=True):
            assert (name, dtype, shape) == (sent, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
            if not self.deaf:
                mine[name].data.copy_(tensor)
        self.updates += 1
        self.stale = True

    def reset_prefix_cache(self) -> None:
        self.stale = False

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], *, generation_kwargs: dict[str, Any]) -> dict[str, Any]:
        assert not self.stale, "the server was asked before its cache was reset"
        asked = generation_kwargs
        assert asked["top_k"] == 0 and asked["top_p"] == 1.0 and asked["logprobs"] == 0
        with self._lock:
            self.requests.append({"prompt": prompts[0], **asked})
            if self.fails_at is not None and len(self.requests) > self.fails_at:
                raise ConnectionError("the server went away")
            generator = torch.Generator().manual_seed(asked["seed"])
            ids, said = list(prompts[0]), []
            for written in range(asked["max_tokens"]):
                logits = self.model(torch.tensor([ids])).logits[0, -1].double() / asked["temperature"]
                if written < asked["min_tokens"]:
                    logits[asked["stop_token_ids"]] = -torch.inf
                for token, bias in asked.get("logit_bias", {}).items():
                    logits[token] += bias
                logprobs = logits.log_softmax(-1)
                token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
                ids.append(token)
                said.append([float(logprobs[token])])
                if token in asked["stop_token_ids"]:
                    break
        return {"completion_ids": [ids[len(prompts[0]) :]], "logprobs": [said]}


def plain_model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def random_lora(loaded: Loaded) -> Loaded:
    loaded = add_lora(loaded, LoraConfig(enabled=True, r=4))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return loaded


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_server_gets_the_policys_weights(architecture: str, lora: bool, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(f"tiny_{architecture}")
    loaded = loaded_from(path)
    server = StandIn(plain_model(path))
    if lora:
        loaded = random_lora(loaded)
    else:
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(0.05)
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    ids = torch.tensor([[5, 9, 20, 31]])
    with torch.no_grad():
        assert not torch.allclose(server.model(ids).logits, loaded.model(ids).logits, atol=1e-2)
        ServerSampler(server, SamplerConfig(url="http://x"), loaded).send()
        torch.testing.assert_close(server.model(ids).logits, loaded.model(ids).logits, atol=2e-5, rtol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in loaded.model.named_parameters())


@pytest.fixture
def task(tmp_path: Path) -> Path:
    write_rows(tmp_path / "train.jsonl", toy_examples(12))
    return tmp_path


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch):
    """``serve(stand_in)``: what a run that names a server reaches."""

    def use(found: StandIn | Exception) -> None:
        def connect(url: str, group_port: int, timeout: float) -> StandIn:
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(trl_primitives, "vllm_client", connect)

    return use


def arguments(alg: str, model: Path, folder: Path, *more: str) -> Sequence[str]:
    guide = ["--guide", f"hf:{model}"] if alg != "ppo" else []
    return [
        "train", "--alg", alg, "--model", str(model), "--data", str(folder / "train.jsonl"), "--reward", "coverage",
        "--max-steps", "4", "--episodes", "8", "--batch-size", "4", "--max-new-tokens", "8", "--lr", "1e-2",
        "--set", "sampler.url=http://127.0.0.1:8000", "--save-steps", "1",
        *guide, "-o", str(folder / "run"), *more,
    ]  # fmt: skip


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("alg", ["ppo", "aggrevated"])
def test_training_writes_on_the_server_with_the_newest_weights(
    alg: str, task: Path, tiny_gpt2: Path, serve, run_cli
) -> None:
    """Whatever a cut moved: what the server said of a token is what the scorer says of it, in every step."""
    server = StandIn(plain_model(tiny_gpt2))
    serve(server)
    assert run_cli(*arguments(alg, tiny_gpt2, task)).exit_code == 0
    rows = rows_of(task / "run")
    assert len(rows) == server.updates == 4
    assert all(row["sampler/gap"] < 1e-4 for row in rows)
    assert server.joined is not None and server.requests
    assert len({r["seed"] for r in server.requests}) > len(server.requests) * 0.9


def test_a_server_that_keeps_its_old_weights_is_seen(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    serve(StandIn(plain_model(tiny_gpt2), deaf=True))
    assert run_cli(*arguments("ppo", tiny_gpt2, task)).exit_code == 0
    gaps = [row["sampler/gap"] for row in rows_of(task / "run")]
    assert gaps[0] < 1e-4 and min(gaps[1:]) > 10 * gaps[0] and gaps[-1] > 1e-2


def test_the_gap_to_old_weights_is_corrected(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    """The first update is as without the correction (weights of 1, up to rounding); later tokens have other weights."""
    reward = task / "short.py"
    reward.write_text("def short(text):\n    return -len(text) / 10\n")
    runs = {}
    for correction in ("none", "truncate"):
        serve(StandIn(plain_model(tiny_gpt2), deaf=True))
        more = ("--set", f"sampler.correction={correction}", "-o", str(task / correction))
        assert run_cli(*arguments("ppo", tiny_gpt2, task, "--reward", f"{reward}:short", *more)).exit_code == 0
        runs[correction] = rows_of(task / correction)
    plain, corrected = runs["none"], runs["truncate"]
    assert "sampler/weight" not in plain[0] and plain[0]["sampler/gap_max"] < 1e-3
    assert corrected[0]["sampler/weight"] == pytest.approx(1.0, abs=1e-4) and corrected[0]["sampler/truncated"] == 0
    assert corrected[0]["loss/policy"] == pytest.approx(plain[0]["loss/policy"], abs=1e-4)
    assert abs(corrected[-1]["sampler/weight"] - 1) > 1e-3
    assert any(abs(a["loss/policy"] - b["loss/policy"]) > 1e-3 for a, b in zip(plain, corrected, strict=True))
    assert all(row["sampler/gap_max"] > row["sampler/gap"] for row in plain)


def test_a_server_with_another_model_stops_training_at_step_0(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    other = plain_model(tiny_gpt2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    serve(StandIn(other, deaf=True))
    result = run_cli(*arguments("ppo", tiny_gpt2, task))
    assert result.exit_code == 1
    assert "policy.sampler" in result.stderr and "vLLM and policy" in result.stderr


def test_min_new_tokens_and_limits_reach_the_server(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    server = StandIn(plain_model(tiny_gpt2))
    serve(server)
    more = ("--max-steps", "1", "--set", "lengths.min_new_tokens=5", "--temperature", "0.7")
    assert run_cli(*arguments("ppo", tiny_gpt2, task, *more)).exit_code == 0
    assert {r["min_tokens"] for r in server.requests} == {5}
    assert {r["max_tokens"] for r in server.requests} == {8}
    row = rows_of(task / "run")[0]
    assert row["length/mean"] >= 5 and row["sampler/gap"] < 1e-4


def test_control_tokens_are_banned_by_a_bias(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    """Both sides score without them, so there is no gap."""
    server = StandIn(plain_model(tiny_gpt2))
    control = loaded_from(tiny_gpt2).control_ids
    assert control
    serve(server)
    more = ("--max-steps", "2", "--set", "rollout.ban_control_tokens=true", "--temperature", "2")
    assert run_cli(*arguments("ppo", tiny_gpt2, task, *more)).exit_code == 0
    assert all(set(r["logit_bias"]) == control for r in server.requests)
    rows = rows_of(task / "run")
    assert all(row["tokens/control"] == 0 and row["sampler/gap"] < 1e-4 for row in rows)


def test_a_server_that_goes_away_ends_the_run_which_goes_on_later(task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    serve(StandIn(plain_model(tiny_gpt2), fails_at=20))
    result = run_cli(*arguments("ppo", tiny_gpt2, task))
    assert result.exit_code == 1
    assert "went away" in result.stderr and "--resume" in result.stderr
    serve(StandIn(plain_model(tiny_gpt2)))
    assert run_cli(*arguments("ppo", tiny_gpt2, task, "--resume")).exit_code == 0
    rows = rows_of(task / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sampler/gap"] < 1e-4 for row in rows)


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (ConnectionError("can't be reached"), "can't be reached"),
        (ImportError("vLLM is not installed."), "rlgf-cli[vllm]"),
    ],
)
def test_no_server(problem: Exception, said: str, task: Path, tiny_gpt2: Path, serve, run_cli) -> None:
    serve(problem)
    result = run_cli(*arguments("ppo", tiny_gpt2, task))
    assert result.exit_code == 2 and said in result.stderr


@pytest.mark.parametrize("setting", ["parallel.strategy=fsdp", "model.load_in_4bit=true"])
def test_what_cannot_be_sent_is_refused(setting: str, task: Path, tiny_gpt2: Path, run_cli) -> None:
    result = run_cli(*arguments("ppo", tiny_gpt2, task, "--set", setting))
    assert result.exit_code == 2 and "whole weights" in result.stderr


def test_an_encoder_decoder_is_refused(task: Path, tiny_t5: Path, serve, run_cli) -> None:
    serve(StandIn(None))
    result = run_cli(*arguments("ppo", tiny_t5, task))
    assert result.exit_code == 2 and "decoder-only" in result.stderr
