"""LocalGuide: guides whose model runs in this process."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlgf_cli.artifacts.rundir import now, parent_of
from rlgf_cli.config.common import TextConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.cleanup import cut_at_stop, split_thinking
from rlgf_cli.guides.conversation import refuse_turns, with_turns
from rlgf_cli.guides.stream import Outcome
from rlgf_cli.ledger.store import StoredText
from rlgf_cli.protocols import Completion, Example, GuideAbilities, GuideRequest
from rlgf_cli.protocols.messages import to_json

if TYPE_CHECKING:
    from rlgf_cli.models.text import Origin, TextFormat

_OF_ENDPOINTS = ("provider", "api_key_env", "headers", "extra_body", "reasoning_effort", "reasoning_tokens")
_USAGE = ("prompt_tokens", "completion_tokens")


class LocalGuide(LiveGuide):
    """The texts of a batch of requests are written together. They cost nothing; calls are counted."""

    kind: str
    tokenizer: Any
    """The checkpoint's own: a policy that has the same one may be cut inside a word."""
    text: TextFormat

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.path = config.name.partition(":")[2]
        self._seed = seed
        self._config = config
        self._pending: list[tuple[GuideRequest, bytes | None, Future[Outcome]]] = []
        self.settings["weights_sha256"] = (parent_of(self.path) or {}).get("sha256")

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        text_config(config)
        if config.prompt_template is not None or config.api == "completion":
            key = "prompt_template" if config.prompt_template is not None else "api: completion"
            why = f"guide.{key} leaves out the chat template, which has them"
            refuse_turns(config, why, f"leave guide.{key} out, or write them into guide.prompt_template as text")
        if config.tokenizer is not None:
            raise UserError("guide.tokenizer is for completion APIs; a local checkpoint has its own")
        for key in _OF_ENDPOINTS:
            if getattr(config, key):
                raise UserError(
                    f"guide.{key} is for endpoints; {config.name} is a local checkpoint", hint="leave it out"
                )
        for key in ("temperature", "top_p"):
            if getattr(config.sampling, key) is None:
                raise UserError(
                    f"guide.sampling.{key} is null, and the checkpoint {config.name} has no default of a server",
                    hint="1 leaves the model's distribution as it is",
                )
        return GuideAbilities(live=True, continues=True, at_once=config.batch_size)

    @abstractmethod
    def _write(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """The texts of a batch, in order, with their token counts."""

    def _use(self, text: TextFormat, origin: Origin) -> None:
        """Take the checkpoint's text format. A chat template by default is a setting of its own: texts that were
        bought before it was the default are of other prompts."""
        from rlgf_cli.models.formats import describe_format

        if not text.chat:
            why = f"{self.name} reads prompts without a chat template ({describe_format(text, origin)})"
            hint = "use a chat model, or --set guide.api=chat where its tokenizer has a chat template"
            refuse_turns(self._config, why, hint)
        self.text = text
        self.notes = [f"{self.name}: text: {describe_format(text, origin)}"]
        if not text.chat and origin != "stored" and self.tokenizer.chat_template:
            self.notes += [f"warning: {self.name} has a chat template, and it is NOT used"]
        if text.chat and origin == "default":
            self.settings["text"] = "chat template"

    def _given(self, request: GuideRequest) -> Example:
        """The request's example with the turns of ``guide.system`` and ``guide.examples``: what the model is given."""
        example = request.example
        given = with_turns(self._config, example.given)
        return example if given is example.given else Example.of(example.id, given, example.references, example.meta)

    def prompt_bytes(self, request: GuideRequest) -> int:
        return super().prompt_bytes(replace(request, example=self._given(request)))

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.settings}

    def request_fields(self, request: GuideRequest) -> dict[str, Any]:
        return {
            "id": request.example.id,  # the noise is drawn for it
            "prompt": to_json(request.example.given),
            "prefix": request.prefix,
            "max_tokens": request.max_new_tokens,
            "sample_index": request.sample_index,
        }

    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Outcome]:
        future: Future[Outcome] = Future()
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
        completions = self._write([request for request, _, _ in pending])
        seconds = round((time.monotonic() - began) / len(pending), 3)
        for (request, key, future), call, written in zip(pending, calls, completions, strict=True):
            usage = {name: written.usage[name] for name in _USAGE if name in written.usage}
            completion = replace(written, usage=usage, seconds=seconds, created=now())
            stored = StoredText.of(self.name, self.request_json(request), self.prompt_bytes(request), completion)
            self.meter.settle(call, 0, usage, [(key, stored)] if key is not None else [])
            future.set_result(completion)

    def clean(self, request: GuideRequest, completion: Completion) -> Completion:
        repaired = []
        thinking, text = ("", completion.text) if self._config.clean == "none" else split_thinking(completion.text)
        if thinking:
            repaired.append("thinking_removed")
        text, stopped = cut_at_stop(text, self._config.sampling.stop)
        if stopped:
            repaired.append("cut_at_stop")
            text = text.rstrip()
        if text[:1].isspace() and self._space_was_lost(request.prefix):
            repaired.append("space_removed")
            text = text[1:]
        finish = "stop" if stopped else completion.finish_reason
        return replace(completion, text=text, finish_reason=finish, repaired=tuple(repaired))

    def _space_was_lost(self, prefix: str) -> bool:
        """Whether the prefix ends with a space that the guide's tokenizer dropped, so that it wrote one again."""
        if not prefix[-1:].isspace():
            return False
        ids = self.text.encode_response(self.tokenizer, prefix)
        return not self.text.decode_response(self.tokenizer, ids, strip=False)[-1:].isspace()


def text_config(config: GuideConfig) -> TextConfig | None:
    """The text format stored with the checkpoint, with the changes of the guide's config."""
    if config.api == "chat" and config.prompt_template is not None:
        raise UserError(
            "a local guide takes api: chat (the tokenizer's chat template) or a prompt_template, not both",
            hint="leave one of guide.api and guide.prompt_template out",
        )
    chat = None if config.api is None and config.prompt_template is None else config.api == "chat"
    if chat is None and config.chat_template_kwargs is None:
        return None
    return TextConfig(template=config.prompt_template, chat=chat, chat_template_kwargs=config.chat_template_kwargs)
