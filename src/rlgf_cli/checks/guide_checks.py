"""Checks of a guide's texts, as a :class:`~.guide_probe.GuideProbe` has collected them, for training with that guide.

A failed check breaks something that training relies on; a warning stops nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

from rlgf_cli.checks.guide_probe import GuideProbe
from rlgf_cli.guides.unanswered import REMEDIES
from rlgf_cli.models.token_boundaries import BoundaryAudit, tokenizer_loss
from rlgf_cli.protocols import Check, CheckStatus

_SAMPLES = 3
_REPAIRS = {
    "thinking_removed": "thinking before it",
    "prefix_removed": "prefix repeated",
    "quotes_removed": "quoted",
    "chatter_removed": "chatter around it",
    "space_added": "space missing",
    "cut_at_stop": "ran on behind a stop text",
}


def answers(probe: GuideProbe) -> Check:
    """Whether the guide has a text for every prompt."""
    prompts, missing = len(probe.examples), probe.failed.total()
    numbers: dict[str, Any] = {"prompts": prompts, "texts": len(probe.texts), "asked": probe.requests}
    numbers["failed"] = dict(probe.failed)
    status: CheckStatus = "ok"
    finding, remedy = f"{len(probe.texts)} texts for {prompts} prompts", ""
    if not probe.guide.abilities.live:
        explanation = "a prompt without a text is trained on without the guide"
        numbers["id_mismatch"] = mismatched = probe.guide.counts["id_mismatch"]
        if missing:
            status = "warn" if probe.texts else "fail"
            other = f"; {mismatched} have their id in the file with another prompt" if mismatched else ""
            finding = f"{missing} of {prompts} prompts have no text in the file{other}"
            remedy = "run collect-guide on this data; texts are joined to prompts by id and prompt"
    else:
        explanation = (
            "a request that fails for good leaves a text out of a collection; in training its episode goes on without "
            "the guide, and more than half of a batch failing ends the training"
        )
        if missing:
            status = "fail"
            kinds = ", ".join(f"{kind}: {count}" for kind, count in probe.failed.most_common())
            finding = f"{missing} of {probe.requests} requests failed ({kinds}); the first: {probe.first_error}"
            remedy = "correct what the message names; with the cache, the same command requests only the missing texts"
    return Check("guide.answers", status, finding, explanation, remedy, numbers)


def endings(probe: GuideProbe) -> Check | None:
    """The ends of the texts: by themselves, with an EOS, or at the limit, without one."""
    texts = probe.texts
    if not texts:
        return None
    stops = sum(text.ends for text in texts)
    cut = len(texts) - stops
    mostly_cut = 2 * cut > len(texts)
    spelled = f"; {probe.spelled} answers spelled their ending, which is left out" if probe.spelled else ""
    return Check(
        "guide.endings",
        "warn" if mostly_cut else "ok",
        f"{stops} of {len(texts)} texts ended by themselves (stop), {cut} ran out of tokens (length){spelled}",
        "a text that stopped gets an EOS, a text that was cut gets none: texts without an EOS teach no ending",
        "a higher --max-new-tokens, or a prompt_template that asks for shorter texts" if mostly_cut else "",
        {"stop": stops, "length": cut, **({"spelled": probe.spelled} if probe.spelled else {})},
    )


def empty(probe: GuideProbe) -> Check | None:
    """Empty texts."""
    if not probe.texts and probe.guide.abilities.live:
        return None
    if not probe.guide.abilities.live:
        count, of = probe.guide.counts["empty"], "texts of the file are empty"
    else:
        count, of = sum(not text.ids for text in probe.texts), f"of {len(probe.texts)} texts are empty"
    return Check(
        "guide.empty",
        "warn" if count else "ok",
        f"{count} {of}",
        "an empty text is kept and never used",
        "check the guide's request (prompt_template, stop texts), and that it is no encoder-decoder behind an API"
        if count
        else "",
        {"empty": count},
    )


def repairs(probe: GuideProbe) -> Check | None:
    """The repairs of whole texts; None where there are none."""
    repaired = [text.completion for text in probe.texts if text.completion.repaired]
    if not repaired:
        return None
    kinds = Counter(kind for completion in repaired for kind in completion.repaired)
    shown = ", ".join(f"{words}: {kinds[kind]}" for kind, words in _REPAIRS.items() if kinds[kind])
    thinks = bool(kinds["thinking_removed"])
    return Check(
        "guide.repairs",
        "warn" if thinks else "ok",
        f"{len(repaired)} of {len(probe.texts)} texts were repaired; {shown}",
        "the repairs follow rules, which may be wrong: look at the samples; thinking is paid for, counts towards "
        "max_new_tokens, and is no part of the text",
        f"less of it costs less: {REMEDIES['reasoning']}; guide.clean: none leaves it in" if thinks else "",
        {"mended": dict(kinds)},
        [{"came": c.raw, "used": c.text} for c in repaired[:_SAMPLES] if c.raw is not None],
    )


def lengths(probe: GuideProbe) -> Check | None:
    """Tokens per text, in the policy's tokens."""
    if not probe.nonempty:
        return None
    limit = probe.limit
    sizes = [text.length for text in probe.nonempty]
    over, short = sum(size > limit for size in sizes), sum(size < 2 for size in sizes)
    numbers = {"min": min(sizes), "median": median(sizes), "max": max(sizes), "over": over, "short": short}
    return Check(
        "guide.length",
        "warn" if over or short else "ok",
        f"{min(sizes)} to {max(sizes)} of the policy's tokens a text, EOS counted, median {median(sizes):g}; "
        f"{over} of {len(sizes)} longer than {limit}, {short} too short to be cut",
        "the guide counts other tokens: a text within its limit may be beyond the policy's, and loses its end there",
        "a higher max_new_tokens in training, or a lower one for the guide"
        if over
        else "a text of one token cannot be a roll-in: have the guide write more"
        if short
        else "",
        numbers,
    )


def round_trip(probe: GuideProbe) -> Check | None:
    """Whether a text survives the policy's tokenizer: encoded and decoded, it is the same."""
    if not probe.nonempty:
        return None
    text, tokenizer = probe.loaded.text, probe.loaded.tokenizer
    reasons: Counter[str] = Counter()
    samples = []
    for written in probe.nonempty:
        whole = written.completion.text
        why = tokenizer_loss(text, tokenizer, whole)
        reasons[why] += 1
        if why != "nothing" and reasons[why] == 1:
            samples.append(
                {
                    "lost": f"by the tokenizer ({why})",
                    "text": whole,
                    "read back": text.decode_response(tokenizer, written.ids, strip=False),
                }
            )
    exact = reasons.pop("nothing", 0)
    lost = ", ".join(f"{why}: {count}" for why, count in reasons.most_common())
    grave = reasons["unknown characters"] + reasons["normalisation"]
    return Check(
        "tokens.round_trip",
        "warn" if grave else "ok",
        f"{exact} of {len(probe.nonempty)} texts are read back exactly" + (f"; lost: {lost}" if lost else ""),
        "what the policy's tokenizer loses, the policy can never write, and the reward never sees",
        "a policy with a byte-level vocabulary loses nothing; or have the guide write plain text" if grave else "",
        {"exact": exact, "lost": dict(reasons)},
        samples,
    )


def cuts(probe: GuideProbe) -> Check | None:
    """Whether a text cut into two authors' tokens decodes to the same text."""
    if not probe.cuts.boundaries:
        return None
    return _boundaries("tokens.cuts", "cuts of the guide's texts", probe.cuts)


def stability(probe: GuideProbe) -> Check | None:
    """The share of cuts that stay where they are drawn."""
    report = probe.cuts.to_json()
    if not probe.cuts.boundaries:
        return None
    keys = ("stable", "moved", "moved_tokens_mean", "moved_tokens_max")
    far = f"; the others go on by {report['moved_tokens_mean']:.2g} tokens, {report['moved_tokens_max']} at most"
    return Check(
        "tokens.stability",
        "ok",
        f"{100 * report['stable']:.3g}% of the cuts are where {'a word' if probe.whole_words else 'a character'} ends"
        + (far if report["moved"] else ""),
        "a policy that rolls in goes on to the end of the word (of the character, with the guide's own tokens), "
        "and all tokens of it are one action",
        numbers={key: report[key] for key in keys},
    )


def continuations(probe: GuideProbe) -> Check | None:
    """The repairs of the guide's continuations of a prefix."""
    texts = probe.continuations
    if not texts:
        return None
    repaired: Counter[str] = Counter(kind for c in texts for kind in c.completion.repaired)
    blank = sum(not c.completion.text.strip() for c in texts)
    parts = [f"{words}: {repaired[kind]}" for kind, words in _REPAIRS.items() if repaired[kind]]
    parts += [f"empty: {blank}"] * bool(blank)
    odd = blank or any(repaired[kind] for kind in ("prefix_removed", "quotes_removed", "chatter_removed"))
    samples = []
    for one in sorted(texts, key=lambda c: not c.completion.repaired)[:_SAMPLES]:
        text, raw = one.completion.text, one.completion.raw
        samples.append({"prefix": one.prefix, "came": text if raw is None else raw, "used": text})
    return Check(
        "guide.continuations",
        "warn" if odd else "ok",
        f"{len(texts)} texts continued from a prefix; " + (", ".join(parts) or "nothing had to be repaired"),
        "chat models add remarks to an answer; the repairs find them by rules, which may be wrong: look at the samples",
        "continuation: prefill where the server takes it, api: completion, or another continue_template" if odd else "",
        {"continued": len(texts), "mended": dict(repaired), "empty": blank},
        samples,
    )


def continued_boundaries(probe: GuideProbe) -> Check | None:
    """The guide's real continuations behind the policy's tokens."""
    audit = BoundaryAudit()
    for continuation in probe.continuations:
        audit.add(continuation.boundary)
    return _boundaries("tokens.continuations", "continuations", audit) if audit.boundaries else None


def _boundaries(name: str, what: str, audit: BoundaryAudit) -> Check:
    report = audit.to_json()
    lost = report["lost_at_seam"]
    samples = [
        {
            "lost": "at the boundary" if loss == "boundary" else "by the tokenizer",
            "text": boundary.text,
            "read back": boundary.decoded,
        }
        for loss, boundary in audit.examples.items()
    ]
    return Check(
        name,
        "fail" if lost else "ok",
        f"{report['seams']} {what}: {report['exact']} exact, {report['lost_by_tokenizer']} with losses "
        f"by the tokenizer, {lost} with losses at the boundary",
        f"two authors' tokens ({report['tokens_first']} and {report['tokens_second']}) must read as the joined text",
        "this tokenizer cannot go on inside a text: train another policy with this guide, or only with recorded text "
        "and whole texts (bc-guide)"
        if lost
        else "",
        report,
        samples,
    )


CHECKS: list[Callable[[GuideProbe], Check | None]] = [
    answers,
    endings,
    empty,
    repairs,
    lengths,
    round_trip,
    cuts,
    stability,
    continuations,
    continued_boundaries,
]
"""In the order in which they are shown. A check returns None where there is no text to check."""
