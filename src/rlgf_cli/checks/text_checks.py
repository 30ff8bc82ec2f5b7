"""Checks of ``rlgf doctor`` on prompts and on the ends of responses."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rlgf_cli.config.doctor import DoctorConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.formats import describe, ignored_template, unseen_lead
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import prompt_limit
from rlgf_cli.protocols import Check, Example
from rlgf_cli.training.episodes import Episode

_MOST_PROMPTS = 5000
"""Prompts whose length is measured."""


def prompt_lengths(config: DoctorConfig, loaded: Loaded, examples: Sequence[Example]) -> Check:
    """Prompts that are too long for the model or for ``max_prompt_tokens``."""
    name, lengths = "data.prompts", config.lengths
    explanation = "prompt and response share the model's positions; what does not fit is refused, cut or left out"
    try:
        limit = prompt_limit(loaded, lengths)
    except UserError as error:
        return Check(name, "fail", error.message, explanation, error.hint or "a model with more positions")
    measured = examples[:_MOST_PROMPTS]
    encoder = loaded.encoder_decoder
    sizes = [len(loaded.text.encode_prompt(loaded.tokenizer, e.given, encoder)) for e in measured]
    over = sum(size > limit for size in sizes) if limit is not None else 0
    if over and limit is not None and lengths.on_overlong == "truncate":
        try:  # the template is the same for all prompts: the longest one shows whether it fits
            loaded.text.cut_prompt(loaded.tokenizer, measured[sizes.index(max(sizes))].given, encoder, limit)
        except UserError as error:
            return Check(name, "fail", error.message, explanation, error.hint or "")
    finding = f"{min(sizes)} to {max(sizes)} tokens in {len(measured)} of {len(examples)} prompts"
    finding += f", room for {limit}; {over} are longer" if limit is not None else "; any number fits"
    return Check(
        name,
        "ok" if not over else "fail" if lengths.on_overlong == "error" else "warn",
        finding + (f" (on_overlong: {lengths.on_overlong})" if over else ""),
        explanation,
        "--on-overlong truncate or skip, a larger max_prompt_tokens, or a smaller max_new_tokens" if over else "",
        {"longest": max(sizes), "room": limit, "over": over, "looked_at": len(measured)},
    )


def template(loaded: Loaded) -> Check:
    """The text format: whether a model with a chat template is used with it."""
    ignored, lead = ignored_template(loaded), unseen_lead(loaded)
    remedy = "leave --no-chat and text.template out, or train the format with rlgf sft first" if ignored else ""
    if lead and not ignored:
        remedy = "set text.chat_template_kwargs, so that the generation prompt has all that stands before an answer"
    return Check(
        "text.template",
        "fail" if ignored else "warn" if lead else "ok",
        describe(loaded) + (f": {ignored or lead}" if remedy else ""),
        "an instruct model writes what it was trained to only behind the turns of its own template",
        remedy,
        loaded.text.to_json(),
    )


def ending(loaded: Loaded) -> Check:
    """The token that ends a response, and whether template, tokenizer and generation_config agree on it."""
    end, tokenizer, configured = loaded.turn_end, loaded.tokenizer, loaded.original_eos_ids
    numbers: dict[str, Any] = {
        "used": loaded.eos_id, "template": end.id if end is not None else None,
        "tokenizer": int(tokenizer.eos_token_id), "generation_config": configured,
    }  # fmt: skip
    sources = [f"tokenizer.eos_token is {tokenizer.eos_token!r}"]
    if end is not None:
        sources.insert(0, end.problem or f"the chat template ends a turn with {end.token!r}")
    if configured:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(configured)))
        sources.append(f"generation_config.eos_token_id is {names}")
    used = tokenizer.convert_ids_to_tokens(loaded.eos_id)
    same = {loaded.eos_id, numbers["tokenizer"], *configured} == {loaded.eos_id}
    finding = f"{'; '.join(sources)}: " + ("they agree" if same else f"they differ, and a response ends with {used!r}")
    unknown = bool(configured) and loaded.eos_id not in configured
    remedy = ""
    if loaded.turn_end_problem:
        remedy = "a chat template that ends a turn with a token of the tokenizer, or text.template"
    elif unknown:
        remedy = "rlgf sft teaches the ending; without it, see that the model's own ending is the one that is used"
    return Check(
        "text.ending",
        "warn" if remedy else "ok",
        finding,
        "sft, cloning and reference_nll teach one token as the end; sampling stops at each of them",
        remedy,
        numbers,
    )


def cut_texts(config: DoctorConfig, episodes: Sequence[Episode]) -> Check:
    """The share of the policy's own texts that end at the limit, without EOS."""
    share = fmean(not e.finished for e in episodes)
    may_end = config.lengths.min_new_tokens < config.lengths.max_new_tokens
    much = may_end and share > 0.5
    limit = config.lengths.max_new_tokens
    finding = f"{100 * share:.3g}% of the policy's {len(episodes)} texts ended at the limit of {limit} tokens"
    return Check(
        "policy.endings",
        "warn" if much else "ok",
        finding + ("" if may_end else ", as min_new_tokens wants it"),
        "a text that is cut has no EOS: its score is that of half a text, and nothing is learned about ending",
        "a higher max_new_tokens, a start that learned to end (sft), or rollout.missing_eos_penalty" if much else "",
        {"truncated": share, "mean_length": fmean(e.length for e in episodes)},
    )
