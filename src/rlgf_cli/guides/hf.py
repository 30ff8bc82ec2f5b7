"""A local Hugging Face checkpoint as guide: ``hf:PATH``."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlgf_cli.config.common import DecodingConfig, LengthConfig, ModelConfig, TextConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.base import Answer, LiveGuide
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
        return GuideAbilities(live=True, continues=True)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer: a policy that has the same one may be cut inside a word."""
        return self._loaded.tokenizer

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        source = enumerate(requests)
        while window := list(itertools.islice(source, self._config.batch_size)):
            texts = self._write([request for _, request in window])
            for (index, request), text in zip(window, texts, strict=True):
                yield Answer(index, request, text)

    def check(self, examples: Sequence[Example], max_new_tokens: int) -> None:
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
        return [self._until_stop(text) for text in texts]

    def _until_stop(self, completion: Completion) -> Completion:
        text, stopped = cut_at_stop(completion.text, self._config.sampling.stop)
        if not stopped:
            return completion
        self.counts["cut_at_stop"] += 1
        return Completion(text.rstrip(), "stop", completion.model, completion.usage, completion.cost_usd)


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
