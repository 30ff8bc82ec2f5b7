"""A local Hugging Face checkpoint as guide: ``hf:PATH``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig, TextConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.base import Failure, LiveGuide
from rlgf_cli.guides.store import Text
from rlgf_cli.guides.texts import cut_at_stop
from rlgf_cli.protocols import Completion, Example, GuideAbilities, GuideRequest

if TYPE_CHECKING:
    from rlgf_cli.models.load import Loaded
    from rlgf_cli.models.prompts import Encoded


class HFGuide(LiveGuide):
    """Decoder-only models go on after prompt and prefix; encoder-decoders have the prefix in their decoder.

    The noise of a text is a function of (seed, example id, sample index), so neither the batch nor the order
    of the requests changes it.
    """

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        from rlgf_cli.artifacts.rundir import parent_of
        from rlgf_cli.models.load import load

        path = config.name.partition(":")[2]
        self._loaded: Loaded = load(
            ModelConfig(name=path, dtype=config.dtype, device=config.device), text=_text_config(config)
        )
        self._seed = seed
        self._pending: list[tuple[GuideRequest, bytes | None, Future[Text | Failure]]] = []
        self._config = config
        self._decoding = DecodingConfig(
            temperature=config.sampling.temperature,
            top_k=config.sampling.top_k,
            top_p=config.sampling.top_p,
            num_beams=config.sampling.num_beams,
            batch_size=config.batch_size,
        )
        self.device = str(self._loaded.device)
        self.settings["weights_sha256"] = (parent_of(path) or {}).get("sha256")

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        _text_config(config)
        if config.system is not None:
            raise UserError("guide.system is for chat APIs; a local checkpoint has no system message")
        return GuideAbilities(live=True, continues=True, at_once=config.batch_size)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer: a policy that has the same one may be cut inside a word."""
        return self._loaded.tokenizer

    def identity(self) -> dict[str, Any]:
        return {"kind": "hf", **self.settings}

    def asked(self, request: GuideRequest) -> dict[str, Any]:
        return {
            "id": request.example.id,  # the noise is drawn for it
            "prompt": request.example.prompt,
            "prefix": request.prefix,
            "max_tokens": request.max_new_tokens,
            "sample_index": request.sample_index,
        }

    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Text | Failure]:
        future: Future[Text | Failure] = Future()
        self._pending.append((request, key, future))
        return future

    def work(self) -> None:
        pending, self._pending = self._pending, []
        calls = []
        for _, _, future in pending:
            if (call := self.meter.reserve(0)) is None:
                future.set_exception(self.meter.spent())
            else:
                calls.append(call)
        pending = pending[: len(calls)]
        if not pending:
            return
        began = time.monotonic()
        texts = self._write([request for request, _, _ in pending])
        seconds = round((time.monotonic() - began) / len(pending), 3)
        for (request, key, future), call, text in zip(pending, calls, texts, strict=True):
            kept = Text(
                guide=self.name,
                request=self.request_json(request),
                text=text.text,
                finish_reason=text.finish_reason,
                model=text.model,
                prompt_bytes=len(request.example.prompt.encode()) + len(request.prefix.encode()),
                prompt_tokens=text.usage.get("prompt_tokens"),
                completion_tokens=text.usage.get("completion_tokens"),
                nano_usd=None,
                seconds=seconds,
                created=int(time.time()),
            )
            self.meter.settle(call, 0, text.usage, [(key, kept)] if key is not None else [])
            future.set_result(kept)

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:
        for example in examples:
            self._encode(GuideRequest(example, max_new_tokens=max_new_tokens))

    def _encode(self, request: GuideRequest) -> tuple[Encoded, int]:
        """The request's prompt in tokens, and how many of its tokens had to go (0 or 1: whether)."""
        from rlgf_cli.models.prompts import encode_prompts

        loaded = self._loaded
        written = loaded.text.encode_response(loaded.tokenizer, request.prefix) if request.prefix else []
        lengths = LengthConfig(
            max_prompt_tokens=self._config.max_prompt_tokens,
            max_new_tokens=len(written) + request.max_new_tokens,
            on_overlong=self._config.on_overlong,
        )
        # One by one: room depends on the request alone, never on what else is in its batch.
        encoded, counts = encode_prompts(loaded, [request.example], lengths)
        return encoded[0], counts["truncated"]

    def _write(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        from rlgf_cli.models.generate import generate_texts

        encoded = []
        for request in requests:
            prompt, truncated = self._encode(request)
            encoded.append(prompt)
            if truncated:
                self.counts["prompts_truncated"] += 1
        texts = generate_texts(
            self._loaded,
            encoded,
            self._decoding,
            LengthConfig(max_new_tokens=max(request.max_new_tokens for request in requests)),
            seed=self._seed,
            sample_index=[request.sample_index for request in requests],
            prefixes=[request.prefix for request in requests],
            limits=[request.max_new_tokens for request in requests],
        )
        return texts

    def read(self, request: GuideRequest, text: Text) -> Completion:
        before, stopped = cut_at_stop(text.text, self._config.sampling.stop)
        if stopped:
            return Completion(before.rstrip(), "stop", text.model, mended=("cut_at_stop",))
        return Completion(text.text, text.finish_reason, text.model)


def _text_config(config: GuideConfig) -> TextConfig | None:
    """What the guide's config says over the text format that is stored with the checkpoint."""
    if config.api == "chat" and config.prompt_template is not None:
        raise UserError(
            "a local guide takes api: chat (the tokenizer's chat template) or a prompt_template, not both",
            hint="leave one of guide.api and guide.prompt_template out",
        )
    if config.api is None and config.prompt_template is None:
        return None
    return TextConfig(template=config.prompt_template, chat=config.api == "chat")
