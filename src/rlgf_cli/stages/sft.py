"""``rlgf sft``: prompt/references JSONL, or prompts and a guide's recorded texts, to a starting policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
from transformers import set_seed

from rlgf_cli import console
from rlgf_cli.artifacts.checkpoints import is_complete
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.scratch import is_scratch, read_scratch
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import RECORDED, kind_of
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.models import scratch
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.load import add_lora, load, save, set_generation_config
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.models.prompts import encode_prompts
from rlgf_cli.models.rendered import example_lines
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Example
from rlgf_cli.runs.guide_costs import covered_prompts, provenance
from rlgf_cli.stages.session import FolderResult, StageSession, pushed, report_text
from rlgf_cli.supervised import trainer as supervised
from rlgf_cli.supervised.callback import Reporter
from rlgf_cli.supervised.responses import Pair, Target, encode_pairs, make_trainer, refuse_head

datasets.disable_progress_bars()


def run(resolved: Resolved[SftConfig], *, existing: Existing = "refuse") -> FolderResult:
    """Train, save the policy at the run's root, and return the summary.

    All inputs are checked, the model loaded and the data tokenised before the output folder is touched.
    """
    config = resolved.config
    session = StageSession("sft", resolved, existing)
    inputs = (config.model.name, config.data, config.eval_data, config.guide)
    if (finished := session.open(*inputs, push_to_hub=config.push_to_hub)) is not None:
        return pushed(finished, config.push_to_hub)
    supervised.check_settings(config, pick_device(config.model.device))
    examples = read_examples(config.data, limit=config.limit, need_references=config.guide is None)
    guide = _guide(config.guide) if config.guide else None
    held_out = read_examples(config.eval_data, need_references=True) if config.eval_data else []
    checkpoints = session.output / "checkpoints"
    start = checkpoints / "start" if existing == "resume" else None
    loaded = _starting_model(config, examples, guide, start, chat_default=session.chat_default)
    refuse_head(loaded)
    set_generation_config(loaded, config.lengths)
    report_text(loaded)
    pairs, counts = make_pairs(loaded, examples, config, guide)
    eval_pairs = make_pairs(loaded, held_out, config)[0] if held_out else []
    _report_counts(counts)
    for line in example_lines(loaded, pairs[0].prompt, pairs[0].response):
        console.log(line)
    if guide is not None:
        console.log(f"{len(pairs)} texts of {guide.name} are cloned")

    keep_freed_memory()
    parents = (config.data, config.eval_data, config.guide, config.model.name)
    with session.running(*parents, device=str(loaded.device), text=loaded.text.to_json()) as run:
        run.file("checkpoints").mkdir(exist_ok=True)
        if is_scratch(config.model.name):
            supervised.save_start(checkpoints / "start", lambda folder: save(folder, loaded))
        fitted = supervised.fit(
            loaded.model,
            lambda: make_trainer(loaded, config, checkpoints, pairs, eval_pairs),
            checkpoints,
            metrics=run.file("metrics.jsonl"),
            keep=config.save_total_limit,
            reporter=Reporter("sft", console.progress, console.log),
        )
        summary = {**fitted, "examples": len(examples), "pairs": len(pairs), **counts}
        run.write_files(lambda folder: save(folder, loaded))
        shown_guide = provenance(guide, 0, counts["guide_texts"]) if guide is not None else None
        session.write_card(base_model=config.model.name, data=[config.data], metrics=summary, guide=shown_guide)
        session.finish(summary)
    return pushed(session.result(), config.push_to_hub)


def _guide(name: str) -> RecordedGuide:
    """The guide's file, read. Raises UserError for a live guide."""
    if kind_of(name) != RECORDED:
        raise UserError(
            "sft clones recorded texts of a guide, and this guide is a live one",
            where=name,
            hint=f"rlgf collect-guide --guide {name} -o guide.jsonl, then --guide guide.jsonl",
        )
    return RecordedGuide(name)


def _starting_model(
    config: SftConfig,
    examples: Sequence[Example],
    guide: RecordedGuide | None,
    start: Path | None,
    *,
    chat_default: bool,
) -> Loaded:
    """The model that training begins with: a checkpoint, or random weights (``start`` has those of a resumed run)."""
    set_seed(config.seed)
    if not is_scratch(config.model.name):
        lora = config.lora.enabled
        loaded = load(config.model, text=config.text, for_training=True, lora=lora, chat_default=chat_default)
        return add_lora(loaded, config.lora)
    described = read_scratch(config.model.name)
    if config.lora.enabled:
        raise UserError(
            "LoRA needs trained weights",
            where=config.model.name,
            hint="leave lora out, or use a checkpoint",
        )
    if start is not None and is_complete(start):
        stored = ModelConfig(**{**config.model.model_dump(), "name": str(start)})
        return load(stored, for_training=True)
    return scratch.build(
        described,
        model=config.model,
        prompts=[e.given for e in examples],
        responses=[text for e in examples for text, _ in _targets(e, guide)],
        text=TextFormat.from_config(config.text, TextFormat()),
        seed=config.seed,
    )


def make_pairs(
    loaded: Loaded, examples: Sequence[Example], config: SftConfig, guide: RecordedGuide | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """The training pairs of examples, and counts of what was cut or left out.

    Counts: ``truncated`` and ``skipped`` prompts, and those of :class:`EncodedPairs`. With a guide also ``dropped``
    (prompts that it has no text for), ``guide_texts`` (different ones among the pairs), and the texts of its file that
    were not used, as ``guide_*``.
    """
    encoded, counts = encode_prompts(loaded, examples, config.lengths)
    prompts, _ = covered_prompts(encoded, guide, "drop")
    made = encode_pairs(loaded, prompts, lambda example: _targets(example, guide), config)
    counts |= {"truncated_responses": made.truncated_responses, "spelled_endings": made.spelled_endings}
    if guide is not None:
        counts |= {
            "dropped": len(encoded) - len(prompts),
            "unfinished": made.unfinished,
            "guide_texts": made.texts,
            "guide_unmatched": guide.unmatched(examples),
            **{f"guide_{name}": count for name, count in guide.counts.items()},
        }
    return made.pairs, counts


def _targets(example: Example, guide: RecordedGuide | None) -> list[Target]:
    """The candidate responses to an example: its references, or the guide's texts by sample index."""
    if guide is None:
        return [(text, "stop") for text in example.references]
    return [(text.text, text.finish_reason) for text in guide.samples(example)]


def _report_counts(counts: dict[str, int]) -> None:
    for name, what in (
        ("truncated", "prompts cut to fit"),
        ("skipped", "prompts too long and left out"),
        ("truncated_responses", "responses cut at max_new_tokens, which teach no ending"),
        ("unfinished", "texts that the guide did not end, which teach no ending"),
        ("dropped", "prompts without a text of the guide, left out"),
        ("guide_unmatched", "texts of the guide that belong to no prompt that was read"),
        ("guide_id_mismatch", "prompts whose id is another prompt's in the guide's file"),
        ("guide_empty", "empty texts of the guide, left out"),
        ("guide_with_prefix", "texts of the guide that go on from a prefix, left out"),
        ("spelled_endings", "responses that spelled EOS or the end of a turn at their end, which is left out"),
    ):
        if counts.get(name):
            console.warn(f"{what}: {counts[name]}")
