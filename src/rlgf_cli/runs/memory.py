"""The memory of ``rlgf train`` on one device: an estimate from the config before anything is loaded, and what a run
took."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.models.device import DTYPES, pick_device
from rlgf_cli.models.packing import PromptGroup, saves
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.models.sizes import (
    ModelSizes,
    PassShape,
    TracedBytes,
    chunk_bytes,
    model_without_weights,
    sizes_of,
    trace,
    with_adapter,
)
from rlgf_cli.runs.build import needs_ref_model
from rlgf_cli.training.parallel.processes import Processes, concluded

Trained = Literal["full", "lora", "4bit"]

_NF4 = 0.5 + 4 / 64
"""Bytes of a quantised weight: four bits, and a float32 scale for each 64 of them."""
_LOGITS = 3
"""Float32 tensors of a chunk of logits at a time: the logits, their softmax, and the gradient."""
_DRAW = 24
"""Bytes of one logit while a token is drawn: float32 logits and softmax, float64 softmax and its cumulative sum."""

_CPU_SLACK = 0.5
"""Share of the working memory that a CPU's heap takes in addition, as freed blocks into which no later tensor fits;
measured with glibc (docs/scaling.md)."""


class ParameterBytes(NamedTuple):
    """Bytes for each parameter of the policy's plain weights. ``gradient`` and ``adamw`` are of a parameter that learns
    (the adapter's alone under LoRA); ``critic``: of a separate critic, all its states together."""

    weights: float
    gradient: float
    adamw: float
    ref_model: float
    critic: float


def parameter_bytes(trained: Trained, *, bfloat16: bool, separate_critic: bool) -> ParameterBytes:
    """What is held for a parameter of a matrix product (docs/scaling.md). What learns is float32; what is frozen has
    the type of the computations. Under LoRA the reference model is the base itself."""
    frozen = 2.0 if bfloat16 else 4.0
    weights = {"full": 4.0, "lora": frozen, "4bit": _NF4}[trained]
    return ParameterBytes(weights, 4.0, 8.0, frozen if trained == "full" else 0.0, 16.0 if separate_critic else 0.0)


@dataclass(frozen=True)
class MemoryPlan:
    """What of a config decides the memory. ``critics``: how many there are; ``passes``: of the policy and of separate
    critics that are differentiated together; ``cache_rows`` x ``cache_columns``: tokens in the key-value cache;
    ``shards``: devices that divide the states; ``guide``: bytes of a local guide's weights on the same device."""

    trained: Trained
    bfloat16: bool
    ref_model: bool
    critics: int
    separate_critic: bool
    passes: int
    shape: PassShape
    response: int
    cache_rows: int
    cache_columns: int
    shards: int
    cpu: bool
    guide: int = 0


def estimate(sizes: ModelSizes, traced: TracedBytes, plan: MemoryPlan) -> dict[str, int]:
    """Bytes on one device at the peak, by what they are for; their sum is the estimate.

    States are held all the time. ``activations`` and ``logits`` are those of the update; where a rollout takes more
    (its cache, the draws, and weights that fsdp gathers), they are 0 and ``rollout`` is there. ``allocator``: what a
    CPU's heap holds beyond them.
    """
    each = parameter_bytes(plan.trained, bfloat16=plan.bfloat16, separate_critic=plan.separate_critic)
    tables = sizes.parameters - sizes.matrices - sizes.vectors - (0 if sizes.tied else sizes.head)
    head = 0 if sizes.tied else sizes.head
    learned = sizes.parameters if plan.trained == "full" else sizes.adapter
    # of a base in 4 bits, embeddings and head stay in bfloat16
    outside = {"full": 4.0, "lora": each.weights, "4bit": 2.0}[plan.trained]
    weights = each.weights * sizes.matrices + outside * (tables + head) + 4 * (sizes.vectors + sizes.adapter)
    ref_model = 0.0
    if plan.ref_model and each.ref_model:
        # in bfloat16 the head has weights of its own; sharded weights are float32
        per = 4.0 if plan.shards > 1 else each.ref_model
        shared = sizes.head if sizes.tied and per != 4 else 0
        ref_model = per * (sizes.matrices + head + shared) + 4 * (tables + sizes.vectors)
    critic = each.critic * (sizes.parameters - head) if plan.separate_critic else 16 * (3 * sizes.hidden + 1)
    states = {
        "weights": weights,
        "gradients": each.gradient * learned,
        "adamw": each.adamw * learned,
        "ref_model": ref_model,
        "critics": critic * plan.critics,
    }
    whole = 0.0
    if plan.shards > 1:
        whole = (states["weights"] + states["ref_model"] + states["critics"] / 4) * (1 - 1 / plan.shards)
        states = {name: value / plan.shards for name, value in states.items()}
    states["guide"] = plan.guide
    # autocast keeps bfloat16 copies of weights that learn, to the end of a rollout's batch
    copies = 2 * (sizes.matrices + sizes.head) if plan.bfloat16 and plan.trained == "full" else 0
    cache = traced.cached * plan.cache_rows * plan.cache_columns
    rollout = whole + copies + cache + _DRAW * plan.cache_rows * sizes.vocabulary
    activations = traced.saved * plan.passes
    if plan.shards > 1:  # a layer at a time, beside embeddings and head
        activations += 4 * (tables + head + sizes.matrices // sizes.layers)
    logits = _LOGITS * chunk_bytes(plan.shape.responses * plan.response, sizes.vocabulary)
    if rollout > activations + logits:
        work = {"activations": 0.0, "logits": 0.0, "rollout": rollout}
    else:
        work = {"activations": activations, "logits": logits, "rollout": 0.0}
    work["allocator"] = _CPU_SLACK * sum(work.values()) if plan.cpu else 0.0
    return {name: round(value) for name, value in {**states, **work}.items()}


def plan_of(
    config: TrainConfig, *, prompt: int, processes: int, hidden: int, encoder_decoder: bool, adapter: bool
) -> MemoryPlan:
    """The plan of a config for prompts of at most ``prompt`` tokens."""
    spec, ppo = config.algorithm.spec(), config.ppo
    separate = ppo.critic == "separate"
    trained: Trained = "4bit" if config.model.load_in_4bit else "lora" if adapter else "full"
    episodes = math.ceil(config.rollout.episodes / processes)
    rows = math.ceil(ppo.minibatch_size / (processes * ppo.gradient_accumulation_steps))
    return MemoryPlan(
        trained=trained,
        bfloat16=config.model.dtype == "bfloat16",
        ref_model=needs_ref_model(config),
        critics=len(spec.critics),
        separate_critic=separate,
        passes=1 + (len(spec.critics) if separate else 0) + (config.aux.reference_nll > 0),
        shape=pass_shape(
            rows, max(1, config.rollout.episodes // spec.group_size), prompt, config.lengths.max_new_tokens,
            limit=ppo.max_tokens_per_batch, hidden=hidden, encoder_decoder=encoder_decoder,
        ),
        response=config.lengths.max_new_tokens,
        cache_rows=min(config.rollout.batch_size, episodes) if config.sampler.engine == "own" else 0,
        cache_columns=prompt + config.lengths.max_new_tokens,
        shards=processes if config.parallel.strategy == "fsdp" else 1,
        cpu=(pick_device("auto").type if config.model.device == "auto" else config.model.device) == "cpu",
        guide=_guide_bytes(config),
    )  # fmt: skip


def _guide_bytes(config: TrainConfig) -> int:
    """The weights of a local guide on the policy's device."""
    guide = config.guide
    if guide is None or not config.algorithm.spec().needs_guide or not guide.name.startswith("hf:"):
        return 0
    if guide.device not in ("auto", config.model.device):
        return 0
    model, _ = model_without_weights(ModelConfig(name=guide.name.removeprefix("hf:")))
    return sizes_of(model).parameters * DTYPES[guide.dtype].itemsize


def pass_shape(
    rows: int, groups: int, prompt: int, response: int, *, limit: int, hidden: int, encoder_decoder: bool
) -> PassShape:
    """The largest pass over ``rows`` responses of at most ``groups`` prompts, within ``limit`` tokens, as
    :func:`rlgf_cli.training.microbatches.split_by_tokens` cuts it; all texts have the most tokens that they may."""
    groups = min(groups, rows)
    of_a_group = math.ceil(rows / groups)
    alone = prompt + response - 1
    if encoder_decoder:
        fitting = max(1, min(rows, limit // alone))
        return PassShape(fitting, response, fitting, prompt, math.ceil(fitting / of_a_group))
    own = max(1, min(of_a_group, (limit - prompt) // max(1, response - 1)))
    if own > 1 and saves([PromptGroup(list(range(own)), prompt, 0)], [response] * own, hidden):
        columns = prompt + own * (response - 1)
        packed = max(1, min(math.ceil(rows / own), limit // columns))
        return PassShape(packed, columns, min(rows, packed * own), prompt, packed)
    fitting = max(1, min(rows, limit // alone))
    return PassShape(fitting, alone, fitting, prompt, fitting)


def training_memory(
    config: TrainConfig, prompts: Sequence[Encoded], processes: int, *, log: Callable[[str], None]
) -> dict[str, int] | None:
    """The parts of the estimate for a run on ``prompts``. None, and the reason to ``log``, for an architecture that
    cannot be traced."""
    # a fresh adapter, which nobody trains, must not move the numbers that the run draws
    with torch.random.fork_rng(devices=[]):
        model = with_adapter(model_without_weights(config.model)[0], config.model, config.lora)
    sizes = sizes_of(model)
    plan = plan_of(
        config, prompt=max(len(prompt.ids) for prompt in prompts), processes=processes, hidden=sizes.hidden,
        encoder_decoder=model.config.is_encoder_decoder, adapter=sizes.adapter > 0,
    )  # fmt: skip
    dtype = DTYPES[config.model.dtype]
    try:
        traced = trace(model, plan.shape, dtype, checkpointing=config.gradient_checkpointing)
    except (RuntimeError, TypeError, AttributeError) as error:  # of torch or of the model's own code, without weights
        reason = str(error).strip().split("\n")[0]
        log(f"the memory is not known: a forward pass of this architecture cannot be traced ({reason})")
        return None
    return estimate(sizes, traced, plan)


def gigabytes(parts: Mapping[str, int] | None) -> dict[str, float] | None:
    """The sum and the parts in GB (10^9 bytes), to three digits; parts of no bytes are left out."""
    if parts is None:
        return None
    shown = {"total": sum(parts.values()), **{name: value for name, value in parts.items() if value}}
    return {name: float(f"{value / 1e9:.3g}") for name, value in shown.items()}


class PeakMemory:
    """The most memory that this process takes on a device from now on, beyond what it holds now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held, self._before = 0, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._held = torch.cuda.memory_allocated(device)
        elif device.type == "cpu":
            self._before = _peak_resident()
            self._held = _resident() or self._before

    def bytes(self) -> int | None:
        """None where it is not known: on a device that does not count, and where this process held more before."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._held
        if self.device.type != "cpu" or (peak := _peak_resident()) <= self._before:
            return None
        return peak - self._held


def record(
    parts: Mapping[str, int] | None, peak: int | None, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """``memory`` of run.json. Of a run that was resumed it is that of the session with the larger peak."""
    total = sum(parts.values()) if parts else None
    ratio = round(peak / total, 3) if peak is not None and total else None
    now = {"estimated_bytes": total, "parts": dict(parts) if parts else None, "peak_bytes": peak, "ratio": ratio}
    return dict(before) if before and (before["peak_bytes"] or 0) > (peak or 0) else now


@contextmanager
def recorded_peak(
    peak: PeakMemory, parts: Mapping[str, int] | None, folder: RunDir | None, processes: Processes
) -> Iterator[None]:
    """Write into run.json, however the block ends, what the device that took most has taken, beside the estimate."""

    def write(together: Processes) -> None:
        known = [taken for taken in together.gather(peak.bytes()) if taken is not None]
        if folder is not None:
            before = folder.manifest.data.get("memory")
            folder.manifest.save(memory=record(parts, max(known, default=None), before))

    with concluded(processes, write):
        yield


def _resident() -> int | None:
    """Bytes that this process holds now; None where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.is_file() else None


def _peak_resident() -> int:
    """The most bytes that this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
