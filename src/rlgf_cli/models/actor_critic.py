"""The policy, the frozen ref_model and the critics as one module, with their log-probabilities and values.

One critic per roll-out author: V of the policy and V of the guide are different functions of the same state.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlgf_cli.functional.logprobs import (
    chosen_logprobs,
    chosen_logprobs_and_entropies,
    in_chunks,
    process_logits,
)
from rlgf_cli.models.device import autocast
from rlgf_cli.models.forward import States, TokenBatch, response_states, sharing_problem
from rlgf_cli.models.head import find_finish
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.trl_primitives import entropy_from_logits, selective_log_softmax

if TYPE_CHECKING:
    from typing_extensions import NotRequired, Unpack  # typing has both from Python 3.11


class ValueHead(nn.Module):
    """Hidden states [..., H] to values [...] in the reward's units: mean + unit * (w . norm(h) + b).

    At first all values are ``mean``, which :meth:`calibrate` sets. The norm removes the scale of an architecture's last
    hidden state (T5 divides by the square root of H).
    """

    mean: torch.Tensor
    unit: torch.Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("unit", torch.ones(()))

    @torch.no_grad()
    def calibrate(self, mean: float, spread: float, *, keep: bool) -> None:
        """Set the units of the values from the returns' mean and standard deviation (0: 1 is taken).

        ``keep``: change the weights so that every value stays what it was (PopArt, van Hasselt et al. 2016, arXiv
        1602.07714, proposition 1).
        """
        unit = spread if spread > 0 else 1.0
        if keep:
            ratio = float(self.unit) / unit
            self.out.weight.mul_(ratio)
            self.out.bias.mul_(ratio).add_((float(self.mean) - mean) / unit)
        self.mean.fill_(mean)
        self.unit.fill_(unit)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # a bfloat16 value has three digits: advantages are differences of values
        with torch.autocast(hidden.device.type, enabled=False):
            return self.mean + self.unit * self.out(self.norm(hidden.float())).squeeze(-1)


class _NoHead(nn.Module):
    """Replaces the LM head of a separate critic, whose logits are not used."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., :1]


class SeparateCritic(nn.Module):
    """A copy of the policy's backbone with a value head of its own."""

    def __init__(self, model: Any, hidden: int) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(model)
        self.backbone.set_output_embeddings(_NoHead())
        self.head = ValueHead(hidden)

    def forward(self, batch: TokenBatch, share_prompts: bool) -> torch.Tensor:
        return self.head(response_states(self.backbone, batch, share_prompts=share_prompts).every())


class ScoredDistribution(TypedDict):
    """The distribution whose log-probabilities are computed: the full one at a temperature, without EOS before
    ``min_new_tokens``, and without control tokens (``ban_control``)."""

    temperature: float
    min_new_tokens: int
    ban_control: NotRequired[bool]


@dataclass(frozen=True)
class TokenOutputs:
    """Per response token, all [B, T]: log-probabilities (nats, 0 where not selected), entropies where requested, and
    each critic's values."""

    logprobs: torch.Tensor
    entropies: torch.Tensor | None
    values: dict[str, torch.Tensor]


class ActorCritic(nn.Module):
    """The trained ``policy``, the frozen ref_model, and ``critics``, a value function for each roll-out author.

    ``mode``: a critic is a head on the policy's hidden states whose error reaches the policy's weights (``shared``) or
    not (``head``), or a model of its own (``separate``). ``with_ref_model`` false: no ref_model is held or run. The
    ref_model is: under LoRA on plain weights, the weights with the adapter switched off; under LoRA that goes on from
    an adapter checkpoint, a frozen second adapter with that checkpoint's weights; else a frozen copy (``ref_model``).
    ``share_prompts``: what episodes with the same prompt have in common is computed once, where the model's attention
    can do it; ``sharing_problem`` says why it cannot (empty: it can).
    """

    eos: torch.Tensor
    control: torch.Tensor

    def __init__(
        self,
        loaded: Loaded,
        critics: Iterable[str],
        *,
        mode: str,
        with_ref_model: bool,
        share_prompts: bool = True,
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.policy = loaded.model
        _disable_dropout(self.policy)
        self.policy.eval()
        self._checkpointing = False
        with autocast(loaded.device, loaded.dtype):
            self._finish = find_finish(self.policy)
            self.sharing_problem = sharing_problem(self.policy) if share_prompts else ""
        self.share_prompts = share_prompts and not self.sharing_problem
        base: Any = self.policy.get_base_model() if isinstance(self.policy, PeftModel) else self.policy
        hidden = base.get_output_embeddings().weight.shape[-1]
        self.separate, self._detached = mode == "separate", mode == "head"
        frozen = _without_adapters(self.policy) if self.separate and isinstance(self.policy, PeftModel) else base
        self.critics = nn.ModuleDict(
            {name: SeparateCritic(frozen, hidden) if self.separate else ValueHead(hidden) for name in critics}
        ).to(loaded.device)
        if self.separate:
            self.critics.requires_grad_(True)
        self.has_ref_model = with_ref_model
        self.ref_model: Any = None
        self._ref_adapter: str | None = None
        if with_ref_model:
            self._make_ref_model()
        eos = torch.tensor(sorted(loaded.eos_ids), device=loaded.device)
        self.register_buffer("eos", eos, persistent=False)
        control = torch.tensor(sorted(loaded.control_ids), dtype=torch.long, device=loaded.device)
        self.register_buffer("control", control, persistent=False)

    def _make_ref_model(self) -> None:
        if not isinstance(self.policy, PeftModel):
            self.ref_model = copy.deepcopy(self.policy).eval().requires_grad_(False)
        elif _adapter_is_trained(self.policy):
            self._ref_adapter = "ref_model"
            config = copy.deepcopy(self.policy.peft_config["default"])
            config.inference_mode = True
            self.policy.add_adapter("ref_model", config)
            weights = {n: p for n, p in self.policy.named_parameters() if ".default." in n}
            twins = dict(self.policy.named_parameters())
            with torch.no_grad():
                for name, parameter in weights.items():
                    twins[name.replace(".default.", ".ref_model.")].copy_(parameter)
            self._use_adapter("default")

    @property
    def packing_hidden(self) -> int | None:
        """The hidden size of a decoder whose rows are packed; None for a model whose rows are computed one by one."""
        packs = self.share_prompts and not self.loaded.encoder_decoder
        return int(self.policy.config.get_text_config().hidden_size) if packs else None

    @property
    def ref_model_is_frozen_adapter(self) -> bool:
        """Whether the ref_model is a second, frozen adapter: training goes on from an adapter checkpoint."""
        return self._ref_adapter is not None

    def _use_adapter(self, name: str) -> None:
        """Switch adapters; only ``default`` ever learns."""
        self.policy.set_adapter(name)
        for parameter_name, parameter in self.policy.named_parameters():
            if "lora_" in parameter_name:
                parameter.requires_grad_(".default." in parameter_name)

    def enable_checkpointing(self) -> None:
        """Recompute activations in the backward pass of :meth:`forward_logprobs` instead of keeping them."""
        critics = [critic.backbone for critic in self.critics.values() if isinstance(critic, SeparateCritic)]
        for network in (self.policy, *critics):
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._checkpointing = True

    @contextlib.contextmanager
    def _layers_checkpoint(self, network: nn.Module) -> Iterator[None]:
        """Set the layers' training mode for a differentiated forward pass: a layer checkpoints in that mode only, but
        ignores the key-value cache in it, which sampling needs."""
        if not (self._checkpointing and torch.is_grad_enabled()):
            yield
            return
        layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def head(self, critic: str) -> ValueHead:
        """A critic's value head."""
        module: Any = self.critics[critic]
        return module.head if self.separate else module

    def value_unit(self, critic: str) -> torch.Tensor:
        """The unit of a critic's errors, a scalar tensor."""
        return self.head(critic).unit

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that learn, by name: the policy's, then the critics'."""
        policy = [(f"policy.{n}", p) for n, p in self.policy.named_parameters() if p.requires_grad]
        return policy + [(f"critics.{n}", p) for n, p in self.critics.named_parameters() if p.requires_grad]

    def logits(self, hidden: torch.Tensor, network: Any = None) -> torch.Tensor:
        """The logits of hidden states [N, H] under the policy, or another network of its kind. [N, V] float32"""
        with autocast(self.loaded.device, self.loaded.dtype):
            return self._finish((network or self.policy).get_output_embeddings()(hidden)).float()

    def forward_logprobs(
        self,
        batch: TokenBatch,
        select: torch.Tensor,
        *,
        values: Iterable[str] = (),
        entropy: bool = False,
        policy_frozen: bool = False,
        **distribution: Unpack[ScoredDistribution],
    ) -> TokenOutputs:
        """Log-probabilities, entropies and values of the selected tokens under the policy.

        ``select`` [B, T] bool; ``values``: which critics to evaluate, on all positions. ``policy_frozen``: no gradient
        reaches the policy, not even that of a value head on its hidden states.
        """
        with autocast(self.loaded.device, self.loaded.dtype):
            names = list(values)
            states = None
            if bool(select.any()) or (names and not self.separate):
                learns = torch.is_grad_enabled() and not policy_frozen
                with torch.set_grad_enabled(learns), self._layers_checkpoint(self.policy):
                    states = response_states(self.policy, batch, share_prompts=self.share_prompts)
            critic_values = {}
            hidden = states.every() if states is not None and names and not self.separate else None
            for name in names:
                critic = self.critics[name]
                if self.separate:
                    with self._layers_checkpoint(critic):
                        critic_values[name] = critic(batch, self.share_prompts)
                else:
                    assert hidden is not None
                    critic_values[name] = critic(hidden.detach() if self._detached else hidden)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not policy_frozen):
            logprobs, entropies = self._score(self.policy, states, batch, select, entropy, **distribution)
        return TokenOutputs(logprobs, entropies, critic_values)

    @torch.no_grad()
    def ref_logprobs(
        self, batch: TokenBatch, select: torch.Tensor, **distribution: Unpack[ScoredDistribution]
    ) -> torch.Tensor:
        """Log-probabilities [B, T] of the selected tokens under the ref_model, 0 elsewhere."""
        if not bool(select.any()):
            return torch.zeros(select.shape, device=select.device)
        network = self.policy if self.ref_model is None else self.ref_model
        with self._as_ref_model():
            with autocast(self.loaded.device, self.loaded.dtype):
                states = response_states(network, batch, share_prompts=self.share_prompts)
            return self._score(network, states, batch, select, False, **distribution)[0]

    @contextlib.contextmanager
    def _as_ref_model(self) -> Iterator[None]:
        """Within it, the policy's adapters are those of the ref_model, where that is not a network of its own."""
        if self._ref_adapter is not None:
            self._use_adapter(self._ref_adapter)
            try:
                yield
            finally:
                self._use_adapter("default")
        elif self.ref_model is None:
            with self.policy.disable_adapter():
                yield
        else:
            yield

    def _score(
        self,
        network: Any,
        states: States | None,
        batch: TokenBatch,
        select: torch.Tensor,
        entropy: bool,
        *,
        temperature: float,
        min_new_tokens: int,
        ban_control: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probabilities and entropies [B, T] of the selected tokens from a network's states (None: no token is
        selected)."""
        zeros = torch.zeros(select.shape, device=select.device)
        if states is None or not bool(select.any()):
            return zeros, zeros if entropy else None
        banned = self.control if ban_control else None

        def score(hidden: torch.Tensor, tokens: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self.logits(hidden, network)
            logits = process_logits(logits, temperature, position < min_new_tokens, self.eos, banned)
            if not logits.is_cuda:
                return chosen_logprobs_and_entropies(logits, tokens) if entropy else (chosen_logprobs(logits, tokens),)
            # TRL's functions have kernels for GPUs; elsewhere they compute row by row
            chosen = selective_log_softmax(logits, tokens)
            if not entropy:
                return (chosen,)
            return chosen, entropy_from_logits(logits.clamp_min(torch.finfo(logits.dtype).min))  # 0 x -inf is NaN

        position = torch.arange(select.shape[1], device=select.device).expand_as(select)[select]
        vocabulary = network.config.get_text_config().vocab_size
        outputs = in_chunks(score, (states.at(select), batch.response_ids[select], position), vocabulary)
        placed = [zeros.to(values.dtype).masked_scatter(select, values) for values in outputs]
        return placed[0], placed[1] if entropy else None


def _disable_dropout(model: Any) -> None:
    """Set all dropout to 0: in modules, and as the rates that layers pass to the functional form (BART, Llama)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def _adapter_is_trained(model: PeftModel) -> bool:
    """Whether the adapter changes the base (a fresh adapter has lora_B = 0 and changes nothing)."""
    return any("lora_B" in name and bool(p.detach().abs().max() > 0) for name, p in model.named_parameters())


def _without_adapters(model: PeftModel) -> Any:
    """The policy as plain float32 weights with its adapter merged in, from which a separate critic starts."""
    merged = copy.deepcopy(model).float().merge_and_unload()
    return merged.requires_grad_(True)
