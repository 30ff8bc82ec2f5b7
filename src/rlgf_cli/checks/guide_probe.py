"""GuideProbe: a guide's texts for a few prompts, and its continuations of prefixes, in a policy's tokens."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rlgf_cli import noise
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.token_boundaries import BoundaryAudit, TokenBoundary, append_text, cut_in_tokens, same_tokens
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest

_CUTS_PER_TEXT = 64


@dataclass(frozen=True)
class Text:
    """A guide's text with its ids in the policy's tokens, without EOS."""

    example: Example
    completion: Completion
    ids: list[int]

    @property
    def ends(self) -> bool:
        """Whether the text gets an EOS."""
        return self.completion.finish_reason == "stop"

    @property
    def length(self) -> int:
        """L: tokens, EOS counted."""
        return len(self.ids) + self.ends


@dataclass(frozen=True)
class Continuation:
    """The guide's continuation of a prefix that ends at a token boundary, and both as tokens."""

    prefix: str
    completion: Completion
    boundary: TokenBoundary


@dataclass
class GuideProbe:
    """The texts that are checked, once :meth:`request_texts` or :meth:`read_texts` has been called.

    ``limit``: new tokens of a whole response. ``requests`` counts requests (of a recorded guide: prompts), ``failed``
    those without a text, by kind; ``first_error`` is the message of the first failure. ``on_answer`` is called for
    each answer.
    """

    examples: Sequence[Example]
    loaded: Loaded
    guide: Guide
    limit: int
    seed: int
    on_answer: Callable[[], object] = lambda: None
    requests: int = 0
    spelled: int = 0
    """Answers that spelled EOS or the end of a turn at their end."""
    failed: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    texts: list[Text] = field(default_factory=list)
    continuations: list[Continuation] = field(default_factory=list)

    @property
    def nonempty(self) -> list[Text]:
        """The texts that are not empty."""
        return [text for text in self.texts if text.ids]

    @property
    def whole_words(self) -> bool:
        """Whether the guide is given prefixes that end where a word ends: it has another tokenizer."""
        return not same_tokens(self.guide.tokenizer, self.loaded.tokenizer)

    @cached_property
    def cuts(self) -> BoundaryAudit:
        """The guide's texts, cut wherever training may cut them."""
        audit = BoundaryAudit()
        for text in self.nonempty:
            places = list(range(1, len(text.ids)))
            if len(places) > _CUTS_PER_TEXT:
                draw = noise.generator(self.seed, "doctor", text.example.id)
                places = sorted(int(n) for n in draw.choice(places, _CUTS_PER_TEXT, replace=False))
            for n in places:
                audit.add(self.cut(text, n))
        return audit

    def cut(self, text: Text, n: int) -> TokenBoundary:
        loaded, whole = self.loaded, text.completion.text
        return cut_in_tokens(loaded.text, loaded.tokenizer, whole, n, whole_words=self.whole_words)

    def read_texts(self, guide: Guide) -> None:
        """Read all texts that a recorded guide has for the prompts."""
        for example in self.examples:
            completions = [self._as_trained(completion) for completion in guide.samples(example)]
            self.requests += 1
            if not completions:
                self.failed["no text in the file"] += 1
            self.texts += [self._text(example, completion) for completion in completions]

    def request_texts(self, guide: Guide) -> None:
        """One text per prompt and, if the guide can, a continuation of each from a place where training may cut it."""
        requests = [GuideRequest(example, max_new_tokens=self.limit) for example in self.examples]
        for request, completion in zip(requests, self._completions(guide, requests), strict=True):
            if completion is not None:
                self.texts.append(self._text(request.example, completion))
        if guide.abilities.continues:
            self._request_continuations(guide)

    def _request_continuations(self, guide: Guide) -> None:
        loaded = self.loaded
        requests, prefixes = [], []
        for text in self.nonempty:
            longest = min(len(text.ids), self.limit) - 1
            if longest < 1:
                continue
            draw = float(noise.uniforms(1, self.seed, "doctor", "continue", text.example.id)[0])
            boundary = self.cut(text, 1 + int(draw * longest))
            room = self.limit - len(boundary.first)
            prefix = loaded.text.decode_response(loaded.tokenizer, boundary.first, strip=False)
            if boundary.second and room > 0 and prefix.strip():
                requests.append(GuideRequest(text.example, prefix, max_new_tokens=room))
                prefixes.append(boundary.first)
        for request, first, completion in zip(requests, prefixes, self._completions(guide, requests), strict=True):
            if completion is not None:
                boundary = append_text(loaded.text, loaded.tokenizer, first, completion.text)
                self.continuations.append(Continuation(request.prefix, completion, boundary))

    def _completions(self, guide: Guide, requests: Sequence[GuideRequest]) -> list[Completion | None]:
        """In the order of the requests; failures are counted and None."""
        completions: list[Completion | None] = [None] * len(requests)
        self.requests += len(requests)
        with contextlib.closing(guide.stream(requests)) as answers:
            for answer in answers:
                if isinstance(answer.outcome, Failure):
                    self.failed[answer.outcome.kind] += 1
                    self.first_error = self.first_error or answer.outcome.message
                else:
                    completions[answer.index] = self._as_trained(answer.outcome)
                self.on_answer()
        return completions

    def _text(self, example: Example, completion: Completion) -> Text:
        loaded = self.loaded
        ids = loaded.text.encode_response(loaded.tokenizer, completion.text) if completion.text.strip() else []
        return Text(example, completion, ids)

    def _as_trained(self, completion: Completion) -> Completion:
        """A completion as training uses it: an ending that the text spells is removed, and becomes an EOS."""
        text = self.loaded.text.without_ending(self.loaded.tokenizer, completion.text)
        if text == completion.text:
            return completion
        self.spelled += 1
        return replace(completion, text=text, finish_reason="stop")
