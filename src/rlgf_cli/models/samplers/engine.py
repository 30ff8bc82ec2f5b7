"""The policy in vLLM, in this process and on the training model's device (the extra ``vllm``)."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from peft import PeftModel

from rlgf_cli.config.train import SamplerConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers.base import OnBatch, Sampler, SampleRequest
from rlgf_cli.models.samplers.vllm_requests import generated, requests_of
from rlgf_cli.models.samplers.weights import policy_weights

T = TypeVar("T")

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # stdout is the result's
    "VLLM_NO_USAGE_STATS": "1",
}
"""Settings of vLLM that the user's environment may override; they are read when vllm is imported."""


class EngineSampler(Sampler):
    """vLLM's engine, with weights that are handed over in memory.

    The engine starts from the model's config with random weights (``load_format: dummy``), so it samples nothing before
    the first :meth:`send`. On a GPU it sleeps between :meth:`sleep` and :meth:`send` (vLLM's sleep mode, level 2: the
    memory of weights and cache is given back, and nothing is copied).
    """

    def __init__(self, llm: Any, params: Callable[..., Any], loaded: Loaded, *, sleeps: bool) -> None:
        self.llm, self.params, self.loaded, self.sleeps = llm, params, loaded, sleeps
        self.asleep = self.sent = False

    @classmethod
    def start(cls, config: SamplerConfig, loaded: Loaded, *, longest: int) -> EngineSampler:
        """Start the engine for texts of at most ``longest`` tokens, prompt and response. Raises UserError."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the weights are handed over as tensors, not pickled
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UserError(
                f"sampler.engine: vllm needs vLLM: {error}", hint="pip install 'rlgf-cli[vllm]', or sampler.engine: own"
            ) from None
        device = loaded.device
        if current_platform.device_type != device.type or device.index not in (None, 0):
            raise UserError(
                f"the policy is on {device}, and vLLM would be on the first {current_platform.device_type} device",
                hint="set CUDA_VISIBLE_DEVICES to the one device of the run, or sampler.engine: own",
            )
        sleeps = device.type == "cuda" and config.sleep
        with TemporaryDirectory() as folder:
            _write_config(loaded, folder)
            try:
                llm = vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=str(loaded.dtype).removeprefix("torch."),
                    max_model_len=longest,
                    gpu_memory_utilization=config.memory_share,
                    enable_sleep_mode=sleeps,
                    enforce_eager=device.type == "cpu",  # compiling takes longer than it saves there
                    logprobs_mode="processed_logprobs",  # of the distribution that is sampled from
                )
            except Exception as error:
                raise UserError(
                    f"vLLM did not start: {error}",
                    hint="sampler.memory_share is its share of the device's memory; VLLM_LOGGING_LEVEL=INFO shows its "
                    "log; sampler.engine: own needs no vLLM",
                ) from error
        return cls(llm, vllm.SamplingParams, loaded, sleeps=sleeps)

    def send(self) -> None:
        """Hand over the policy's weights, adapter merged in, and reset the prefix cache."""

        def reload() -> None:
            if self.asleep:
                torch.cuda.empty_cache()  # what training freed and torch kept is vLLM's now
                self.llm.wake_up(tags=["weights"])
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy_weights(self.loaded)})
            if self.loaded.device.type == "cpu":
                self.llm.apply_model(_pack_again)
            if self.asleep:
                self.llm.wake_up(tags=["kv_cache"])
            self.llm.reset_prefix_cache()

        _call(reload)
        self.asleep, self.sent = False, True

    def sleep(self) -> None:
        if self.sleeps and not self.asleep:
            _call(lambda: self.llm.sleep(level=2))
            self.asleep = True

    def sample(
        self, request: SampleRequest, *, batch_size: int = 64, on_batch: OnBatch | None = None
    ) -> list[Generated]:
        assert self.sent and not self.asleep, "the engine has no weights: send() comes first"
        requests = requests_of(self.loaded, request)
        outputs = _call(
            lambda: self.llm.generate(
                [{"prompt_token_ids": row.ids} for row in requests],
                [self.params(**row.params, detokenize=False) for row in requests],
                use_tqdm=False,
            )
        )
        rows = [output.outputs[0] for output in outputs]
        return [generated(self.loaded, row.token_ids, _logprobs(row)) for row in rows]

    def close(self) -> None:
        """Stop the engine and free its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _write_config(loaded: Loaded, folder: str) -> None:
    """The model's config.json: all that vLLM reads before the weights come."""
    model: Any = loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


def _pack_again(model: torch.nn.Module) -> None:
    """Pack the weights of layers that reloading passed over.

    On a CPU vLLM multiplies by packed copies of the weights. Reloading packs the layers that weights came for, and an
    LM head that is tied to the embeddings is not one of them: it would go on with the old weights (seen with 0.32).
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "cpu_linear") and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


def _logprobs(row: Any) -> list[float]:
    """The log-probability (nats) of each sampled token."""
    return [position[token].logprob for token, position in zip(row.token_ids, row.logprobs, strict=True)]


def _call(work: Callable[[], T]) -> T:
    try:
        return work()
    except Exception as error:
        raise RlgfError(
            f"vLLM failed: {error}",
            hint="VLLM_LOGGING_LEVEL=INFO shows its log; --resume goes on from the newest checkpoint",
        ) from error
