"""A local Hugging Face checkpoint as guide: ``hf:PATH``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.guides.local import LocalGuide, text_config
from rlgf_cli.protocols import Completion, Example, GuideRequest

if TYPE_CHECKING:
    from rlgf_cli.models.loaded import Loaded
    from rlgf_cli.models.prompts import Encoded


class HFGuide(LocalGuide):
    """Decoder-only models go on after prompt and prefix; encoder-decoders have the prefix in their decoder.

    The noise of a text is a function of (seed, example id, sample index), so neither the batch nor the order
    of the requests changes it.
    """

    kind = "hf"

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        from rlgf_cli.models.load import load

        model = ModelConfig(name=self.path, dtype=config.dtype, device=config.device)
        self._loaded: Loaded = load(model, text=text_config(config))
        sampling = config.sampling.model_dump(include={"temperature", "top_k", "top_p", "num_beams"})
        self._decoding = DecodingConfig(**sampling, batch_size=config.batch_size)
        self.tokenizer = self._loaded.tokenizer
        self._use(self._loaded.text, self._loaded.text_origin)
        self.device = str(self._loaded.device)

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
        encoded, counts = encode_prompts(loaded, [self._given(request)], lengths)
        return encoded[0], counts["truncated"]

    def _write(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        from rlgf_cli.models.completions import generate_texts

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
        return list(texts)
