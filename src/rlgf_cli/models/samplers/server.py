"""The policy on a vLLM server: TRL's client requests responses and sends the weights."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from rlgf_cli.config.train import SamplerConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers.base import OnBatch, Sampler, SampleRequest
from rlgf_cli.models.samplers.vllm_requests import VllmRequest, generated, requests_of
from rlgf_cli.models.samplers.weights import policy_weights

T = TypeVar("T")

START = 'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\''
"""The command that starts the server; without its development endpoints it takes no weights."""


class ServerSampler(Sampler):
    """A server that generates responses with the weights it was sent last. ``client``: TRL's ``VLLMClient``;
    ``sends``: this process sends the weights."""

    def __init__(self, client: Any, config: SamplerConfig, loaded: Loaded, *, sends: bool = True) -> None:
        self.client, self.config, self.loaded, self.sends = client, config, loaded, sends

    @classmethod
    def connect(cls, config: SamplerConfig, loaded: Loaded, *, sends: bool) -> ServerSampler:
        """Connect to the server. Raises UserError."""
        from rlgf_cli.models.trl_primitives import vllm_client

        assert config.url is not None
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
        return cls(client, config, loaded, sends=sends)

    def send(self) -> None:
        """Send the policy's weights, adapter merged in, and reset the server's prefix cache."""

        def update() -> None:
            described = [_described(*pair) for pair in policy_weights(self.loaded)]  # names and shapes are sent first
            self.client.update_named_params(described, policy_weights(self.loaded))
            self.client.reset_prefix_cache()

        if self.sends:
            self._call(update)

    def sample(
        self, request: SampleRequest, *, batch_size: int = 64, on_batch: OnBatch | None = None
    ) -> list[Generated]:
        requests = requests_of(self.loaded, request)

        def all_rows() -> list[Generated]:
            with ThreadPoolExecutor(max_workers=self.config.concurrency) as pool:
                return list(pool.map(self._answer, requests))

        return self._call(all_rows)

    def _answer(self, request: VllmRequest) -> Generated:
        answer = self.client.generate([request.ids], generation_kwargs=request.params)
        return generated(self.loaded, answer["completion_ids"][0], [token[0] for token in answer["logprobs"][0]])

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
