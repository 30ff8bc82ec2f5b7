"""The policy on a vLLM server: TRL's client requests responses and sends the weights.

The training model computes the log-probabilities of the loss, so a server that computes in another type, or with other
kernels, changes only by its rounding which tokens are sampled. The gap between its log-probabilities and the training
model's is in every row of metrics.jsonl (``sampler/gap``) and is checked by the invariants of step 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from rlgf_cli.config.train import ServerConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.loaded import Loaded

T = TypeVar("T")

START = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\''
"""The command that starts the server; without its development endpoints it takes no weights."""


class PolicyServer:
    """A server that generates responses with the weights it was sent last. ``client``: TRL's ``VLLMClient``."""

    def __init__(self, client: Any, config: ServerConfig, loaded: Loaded) -> None:
        self.client, self.config, self.loaded = client, config, loaded

    @classmethod
    def connect(cls, config: ServerConfig, loaded: Loaded, *, sends: bool) -> PolicyServer:
        """Connect to the server; ``sends``: this process will send the weights. Raises UserError."""
        from rlgf_cli.models.trl_primitives import vllm_client

        assert config.url is not None
        if loaded.encoder_decoder:
            raise UserError("vLLM serves decoder-only models", hint="leave rollout.vllm out for this one")
        try:
            client = vllm_client(config.url, config.group_port, config.timeout)
            if sends:
                client.init_communicator(device=loaded.device)
        except ImportError as error:
            raise UserError(str(error), hint="pip install 'rlgf-cli[vllm]'") from None
        except Exception as error:  # noqa: BLE001 - the client raises Exception itself
            raise UserError(
                f"no weights can be sent to the vLLM server: {error}", where=config.url, hint=START
            ) from None
        return cls(client, config, loaded)

    def send(self) -> None:
        """Send the policy's weights, adapter merged in, and reset the server's prefix cache."""

        def update() -> None:
            described = [_described(*pair) for pair in policy_weights(self.loaded)]  # names and shapes are sent first
            self.client.update_named_params(described, policy_weights(self.loaded))
            self.client.reset_prefix_cache()

        self._call(update)

    def sample(
        self,
        _: Any,
        prompts: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        uniforms: np.ndarray,
        temperature: float,
        top_k: int,
        top_p: float,
        min_new_tokens: int,
        **__: Any,
    ) -> list[Generated]:
        """As ``models.generate.sample``, with the same arguments. One request a row, so that each has its own limit,
        and its own seed from the row's draw for its next token; the server makes the batches."""

        def one(row: int) -> Generated:
            prefix, limit = prefixes[row], max_new_tokens[row]
            answer = self.client.generate(
                [[*prompts[row], *prefix]],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_tokens=limit,
                logprobs=0,
                generation_kwargs={
                    "seed": int(uniforms[row][len(prefix)] * (1 << 31)),
                    "min_tokens": min(limit, max(0, min_new_tokens - len(prefix))),
                    "stop_token_ids": sorted(self.loaded.eos_ids),
                },
            )
            ids = [int(token) for token in answer["completion_ids"][0]]
            logprobs = [float(token[0]) for token in answer["logprobs"][0]]
            return Generated(ids, bool(ids) and ids[-1] in self.loaded.eos_ids, logprobs)

        def all_rows() -> list[Generated]:
            with ThreadPoolExecutor(max_workers=self.config.concurrency) as pool:
                return list(pool.map(one, range(len(prompts))))

        return self._call(all_rows)

    def _call(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except Exception as error:  # noqa: BLE001 - as above
            raise RlgfError(
                f"the vLLM server failed: {error}",
                where=self.config.url,
                hint="see the server's own log; --resume goes on from the newest checkpoint",
            ) from None


def _described(name: str, weight: torch.Tensor) -> tuple[str, str, list[int]]:
    return name, str(weight.dtype).removeprefix("torch."), list(weight.shape)


def policy_weights(loaded: Loaded) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights by their names in the checkpoint, in the type of its computations.

    An adapter's change is added to a copy, one layer at a time: merging it into the weights and out again would leave
    rounding errors in them, and in the ref_model.
    """
    model = loaded.model
    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            yield name, parameter.detach().to(loaded.dtype)
        return
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        owner, _, rest = name.rpartition(".base_layer.")
        weight = parameter.detach()
        if owner in layers and rest == "weight":
            layer: Any = layers[owner]
            weight = weight + layer.get_delta_weight("default").detach()
        yield name.replace(".base_layer.", "."), weight.to(loaded.dtype)
