"""The text that a reward model reads: a conversation in the chat template, or prompt and response joined; as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf_cli.config.common import ChatConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models import classification
from rlgf_cli.supervised.reward_data import RewardData, Sample

Rows = list[tuple[list[int], ...]]
"""Per sample the ids of its text, or of the chosen and the rejected one."""


@dataclass(frozen=True)
class RewardText:
    """Whether prompt and response are a conversation in the chat template, with its variables; ``joined``: there are
    prompts. ``ignored``: the tokenizer has a template, and the config says not to use it."""

    chat: bool
    kwargs: Mapping[str, Any]
    joined: bool
    ignored: bool = False

    def encode(self, tokenizer: Any, samples: Sequence[Sample], limit: int | None) -> tuple[Rows, int]:
        """Ids of every sample's texts, and how many texts were cut."""
        rows, truncated = [], 0
        for sample in samples:
            encoded = [self._ids(tokenizer, sample, i, limit) for i in range(len(sample.responses))]
            truncated += sum(cut for _, cut in encoded)
            rows.append(tuple(ids for ids, _ in encoded))
        return rows, truncated

    def _ids(self, tokenizer: Any, sample: Sample, i: int, limit: int | None) -> tuple[list[int], bool]:
        if self.chat:
            return classification.encode_chat(tokenizer, sample.prompt, sample.responses[i], limit, self.kwargs)
        return classification.encode(tokenizer, sample.texts[i], limit)

    def describe(self) -> str:
        """One line for the beginning of a run."""
        if self.chat:
            own = f" with {dict(self.kwargs)}" if self.kwargs else ""
            return f"text: prompt and response as a conversation in the tokenizer's chat template{own}"
        return f"text: {'prompt and response joined' if self.joined else 'the response alone'}, without a template"

    def to_json(self) -> dict[str, Any]:
        return {"chat": self.chat, **({"chat_template_kwargs": dict(self.kwargs)} if self.kwargs else {})}


def reward_text(config: ChatConfig | None, data: RewardData, tokenizer: Any, *, chat_default: bool) -> RewardText:
    """How the model reads the data: as the config says, else in the chat template where the tokenizer has one and every
    record a prompt. Raises UserError for conversations without a template, and for a template without prompts."""
    samples = [*data.train, *data.held_out]
    known = bool(getattr(tokenizer, "chat_template", None))
    bare = next((s for s in samples if not s.prompt), None)
    given = config.chat if config is not None else None
    chat = (chat_default and known and bare is None) if given is None else given
    if chat and not known:
        raise UserError("text.chat is true, and the tokenizer has no chat template", hint="leave --chat out")
    if chat and bare is not None:
        hint = "a response without a prompt is no conversation: leave --chat out, or name the prompt's field"
        raise UserError("text.chat is true, and this record has no prompt", where=bare.where, hint=hint)
    talk = next((s for s in samples if not isinstance(s.prompt, str)), None)
    if talk is not None and not chat:
        why = "text.chat is false" if known else "the tokenizer has no chat template"
        hint = (
            "leave --no-chat out"
            if known
            else "use a model whose tokenizer has one; prompt_key null reads the texts alone"
        )
        raise UserError(f"the prompt is a conversation, and {why}", where=talk.where, hint=hint)
    kwargs = (config.chat_template_kwargs if config is not None else None) or {}
    if kwargs and not chat:
        raise UserError("text.chat_template_kwargs is given, and no chat template is used", hint="leave it out")
    return RewardText(chat, kwargs, data.joined, ignored=known and given is False)
