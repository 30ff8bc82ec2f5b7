"""A checkpoint in vLLM's engine, in this process, as guide: ``vllm:PATH`` (the extra ``vllm``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.conversation import adds_turns
from rlgf_cli.guides.local import LocalGuide, text_config
from rlgf_cli.guides.openai.request import request_seed
from rlgf_cli.protocols import Completion, Example, FinishReason, GuideAbilities, GuideRequest


class VLLMGuide(LocalGuide):
    """Decoder-only models go on after prompt and prefix, as with ``hf:``, at vLLM's speed.

    Every request has a seed of its own, made from the run's seed, the prompt, the prefix and the sample index.
    Let ``guide.batch_size`` be large (256 and more): the engine makes its own batches of what it is given.
    """

    kind = "vllm"
    device = "cuda"

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        try:
            import vllm
        except ImportError:
            raise UserError(
                "vLLM is not installed",
                hint="pip install 'rlgf-cli[vllm]', or use hf:PATH or a server with openai:MODEL",
            ) from None
        from rlgf_cli.models.formats import text_format

        self._vllm = vllm
        self._engine = vllm.LLM(model=self.path, dtype=config.dtype, max_model_len=config.context_length)
        self.tokenizer = self._engine.get_tokenizer()
        self._use(*text_format(text_config(config), self.tokenizer, self.path))

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        if config.sampling.num_beams > 1:
            raise UserError("guide.sampling.num_beams is for hf: guides; this one samples")
        return super().describe(config)

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:
        for example in examples:
            if example.messages or adds_turns(self._config):
                self._ids(GuideRequest(example, max_new_tokens=max_new_tokens))

    def _write(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        prompts = [{"prompt_token_ids": self._ids(request)} for request in requests]
        outputs = self._engine.generate(prompts, [self._sampling(request) for request in requests], use_tqdm=False)
        return [self._completion(output) for output in outputs]

    def _ids(self, request: GuideRequest) -> list[int]:
        given = self._given(request).given
        ids = self.text.encode_prompt(self.tokenizer, given, False)
        written = self.text.encode_response(self.tokenizer, request.prefix) if request.prefix else []
        limit = self._config.max_prompt_tokens
        if limit is not None and len(ids) > limit:
            if self._config.on_overlong == "error":
                raise UserError(
                    f"the prompt {request.example.id!r} has {len(ids)} tokens; guide.max_prompt_tokens is {limit}",
                    hint="--on-overlong truncate cuts its beginning off",
                )
            self.counts["prompts_truncated"] += 1
            ids = self.text.cut_prompt(self.tokenizer, given, False, limit)
        return [*ids, *written]

    def _sampling(self, request: GuideRequest) -> Any:
        sampling, end = self._config.sampling, self.text.turn_end(self.tokenizer)
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=request.max_new_tokens,
            stop=sampling.stop or None,
            stop_token_ids=None if end is None or end.id is None else [end.id],
            seed=request_seed(self._seed, self.request_json(request)) if sampling.send_seed else None,
        )

    def _completion(self, output: Any) -> Completion:
        written = output.outputs[0]
        finish: FinishReason = "stop" if written.finish_reason == "stop" else "length"
        usage = {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(written.token_ids)}
        return Completion(written.text, finish, self.path, usage)
