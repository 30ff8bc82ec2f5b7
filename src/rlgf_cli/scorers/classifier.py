"""Sequence-classification checkpoints as rewards: a label's probability, or a reward model's scalar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlgf_cli.artifacts.rundir import model_signature
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.models import classification
from rlgf_cli.models.device import DTYPES, pick_device, warn_of_slow_bfloat16
from rlgf_cli.models.load import check_checkpoint_name
from rlgf_cli.noise import short_hash
from rlgf_cli.protocols import Example, Reward, Score

Chat = Literal["auto"] | bool
"""Whether a model reads prompt and text as a conversation in its tokenizer's chat template. ``auto``: as a model of
``rlgf train-reward`` was trained; of any other, where there is a template and the prompt is read."""
Dtype = Literal["float32", "bfloat16"] | None
"""The number type of a model's computations; None: the type of its weights on disk."""


class _SequenceScorer(Reward):
    """Logits of a sequence-classification checkpoint for many texts, in batches of similar length.

    ``include_prompt``: the model reads the prompt and the text; otherwise the text alone. The two are a conversation in
    the chat template (``chat``), or the raw prompt and the text joined by a space where neither side of the boundary
    has white space; a prompt that is a conversation needs the template. What is longer than ``max_tokens`` (by default
    what the model allows) loses its beginning with the prompt, its end without, and nothing of the template;
    ``counts["truncated"]`` says how often. ``chat_template_kwargs`` are the template's variables; None: those that the
    model was trained with.
    """

    kind: str
    reports_rows = True
    objective: str
    """The objective of ``rlgf train-reward`` that makes such a checkpoint."""

    def __init__(
        self,
        path: str | None,
        include_prompt: bool,
        batch_size: int,
        max_tokens: int | None,
        chat: Chat,
        chat_template_kwargs: Mapping[str, Any] | None,
        dtype: Dtype,
        device: str,
    ) -> None:
        if path is None:
            raise UserError(f"{self.kind!r} needs a checkpoint", hint=f"write {self.kind}:PATH")
        self.path = path
        self.name = self.kind
        self.include_prompt = include_prompt
        self.batch_size = batch_size
        self.counts: dict[str, int] = {"truncated": 0}
        needed = f"train one with `rlgf train-reward --objective {self.objective}`"
        self.model, self.tokenizer = load_scorer(path, no_head=needed, dtype=dtype)
        self.model.to(pick_device(device)).eval()
        warn_of_slow_bfloat16(self.model.device, self.model.dtype)
        self.chat = self._reads_chat(chat)
        given = chat_template_kwargs
        self.kwargs = dict(classification.stored_kwargs(self.model) if given is None else given)
        self.max_tokens = classification.token_limit(self.model, self.tokenizer, max_tokens)
        self.tokenizer.truncation_side = "left" if include_prompt else "right"
        self.signature = (
            f"{self.kind},transformers={version('transformers')},{model_signature(path)}"
            f",include_prompt={'yes' if include_prompt else 'no'},max_tokens={self.max_tokens}"
        )
        if self.chat:
            self.signature += f",chat={short_hash(str(self.tokenizer.chat_template))}"
            self.signature += f",chat_template_kwargs={self.kwargs}" if self.kwargs else ""
        if self.model.dtype != torch.float32:
            self.signature += f",dtype={str(self.model.dtype).removeprefix('torch.')}"

    def _reads_chat(self, chat: Chat) -> bool:
        known = bool(self.tokenizer.chat_template)
        if chat == "auto":
            stored = classification.stored_chat(self.model, self.path)
            return known and self.include_prompt and stored is not False
        if chat and not known:
            raise UserError("chat: true, and the tokenizer has no chat template", where=self.path, hint="chat: auto")
        if chat and not self.include_prompt:
            raise UserError(
                "chat: true, and include_prompt: false: an answer without its prompt is no conversation",
                where=self.path,
                hint="leave one of them out",
            )
        return chat

    def check(self, examples: Sequence[Example]) -> None:
        if self.chat or not self.include_prompt:
            return
        for example in examples:
            if example.messages:
                raise UserError(
                    f"{self.kind} reads plain text, and the prompt of example {example.id!r} is a conversation",
                    where=self.path,
                    hint="a model whose tokenizer has a chat template (chat: true), or include_prompt: false",
                )

    def logits(self, examples: Sequence[Example], texts: Sequence[str]) -> torch.Tensor:
        """[N, labels], float32, on the CPU."""
        self.check(examples)
        rows = []
        for example, text in zip(examples, texts, strict=True):
            if self.chat:
                ids, cut = classification.encode_chat(self.tokenizer, example.given, text, self.max_tokens, self.kwargs)
            else:
                read = classification.join(example.prompt, text) if self.include_prompt else text
                ids, cut = classification.encode(self.tokenizer, read, self.max_tokens)
            self.counts["truncated"] += cut
            rows.append(ids)
        return classification.logits(self.model, rows, self.batch_size, on_rows=self.on_rows)


class ClassifierReward(_SequenceScorer):
    """``classifier:PATH``: the probability (or logit) of one label.

    ``label`` is a name of the checkpoint's ``id2label`` or an index; the last label by default, which is the
    positive one of a negative/positive classifier. The probability is the softmax over labels, or the
    sigmoid of the label's logit where the checkpoint's ``problem_type`` is multi-label.
    """

    kind = "classifier"
    objective = "classification"

    def __init__(
        self,
        path: str | None,
        *,
        label: int | str | None = None,
        output: Literal["prob", "logit"] = "prob",
        include_prompt: bool = True,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        max_tokens: Annotated[int, Field(ge=8)] | None = None,
        chat: Chat = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        dtype: Dtype = None,
        device: str = "auto",
    ) -> None:
        super().__init__(path, include_prompt, batch_size, max_tokens, chat, chat_template_kwargs, dtype, device)
        config = self.model.config
        if config.num_labels < 2:
            raise UserError(
                "this checkpoint has one output; a classifier has two labels or more",
                where=self.path,
                hint=f"as a reward model it is named rm:{self.path}",
            )
        self.label = _label_index(config, label, self.path)
        self.output = output
        self.multi_label = config.problem_type == "multi_label_classification"
        self.signature += f",label={config.id2label[self.label]},output={output}"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        logits = self.logits(examples, texts)
        if self.output == "prob":
            logits = logits.sigmoid() if self.multi_label else logits.softmax(-1)
        return [Score(value) for value in logits[:, self.label].tolist()]


class RewardModelReward(_SequenceScorer):
    """``rm:PATH``: the single output of a reward model (``num_labels`` 1), as it is."""

    kind = "rm"
    objective = "pairwise"

    def __init__(
        self,
        path: str | None,
        *,
        include_prompt: bool = True,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        max_tokens: Annotated[int, Field(ge=8)] | None = None,
        chat: Chat = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        dtype: Dtype = None,
        device: str = "auto",
    ) -> None:
        super().__init__(path, include_prompt, batch_size, max_tokens, chat, chat_template_kwargs, dtype, device)
        if (labels := self.model.config.num_labels) != 1:
            raise UserError(
                f"this checkpoint has {labels} labels; a reward model has one output",
                where=self.path,
                hint=f"as a classifier it is named classifier:{self.path}",
            )

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return [Score(value) for value in self.logits(examples, texts)[:, 0].tolist()]


def load_scorer(path: str, *, no_head: str, dtype: Dtype = None) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer, which pads on the right. A head that the checkpoint lacks is an error,
    with the hint ``no_head``: a fresh one gives random scores. ``dtype`` None: the type of the weights on disk.

    The config keeps its padding id, by which a decoder's head finds the last token: the tokenizer's may be an EOS that
    ends a conversation. It is None where the config has none that is a token.
    """
    check_checkpoint_name(path)
    try:
        config = AutoConfig.from_pretrained(path)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=DTYPES[dtype] if dtype else "auto", output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no text classifier can be loaded: {reason}",
            where=path,
            hint="a sequence-classification checkpoint with its tokenizer is needed",
        ) from None
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"this checkpoint has no head that scores texts ({missing[0]} is missing)",
            where=path,
            hint=no_head,
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise UserError("the tokenizer has no pad, EOS or unknown token to pad with", where=path)
    tokenizer.padding_side = "right"
    own = getattr(model.config, "pad_token_id", None)
    rows = getattr(model.config, "vocab_size", None) or len(tokenizer)
    model.config.pad_token_id = own if own is not None and 0 <= own < rows else None
    return model, tokenizer


def _label_index(config: Any, label: int | str | None, path: str) -> int:
    names = {int(i): str(name) for i, name in config.id2label.items()}
    if label is None:
        return max(names)
    if isinstance(label, str):
        for i, name in names.items():
            if name.lower() == label.lower():
                return i
        raise UserError(f"this classifier has no label {label!r}", where=path, hint=did_you_mean(label, names.values()))
    if label not in names:
        raise UserError(f"this classifier has no label {label}; it has {len(names)}", where=path)
    return label
