"""Names of rewards, metrics, aggregates, tasks and guides, and where their code lives.

A builtin is a ``"module:attribute"`` string that is imported when it is used, so that listing names
imports nothing heavy. Other packages add names through entry-point groups, ``rlgf.`` and the kind
(``rlgf.rewards``); the same name twice is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlgf_cli.errors import RlgfError, UserError, did_you_mean
from rlgf_cli.protocols import Metric, Reward, Task


@dataclass(frozen=True)
class Entry:
    """The module and attribute of a name, and the line that ``rlgf ls`` prints for it."""

    target: str
    summary: str


BUILTIN: dict[str, dict[str, Entry]] = {
    "rewards": {
        "rouge": Entry("rlgf_cli.scorers.rouge:Rouge", "mean of ROUGE-1, -2 and -L F1, best reference"),
        "rouge1": Entry("rlgf_cli.scorers.rouge:Rouge1", "ROUGE-1 F1, best reference"),
        "rouge2": Entry("rlgf_cli.scorers.rouge:Rouge2", "ROUGE-2 F1, best reference"),
        "rougeL": Entry("rlgf_cli.scorers.rouge:RougeL", "ROUGE-L F1, best reference"),
        "bleu": Entry("rlgf_cli.scorers.bleu:Bleu", "sentence BLEU in [0, 1], all references (sacrebleu)"),
        "cider": Entry("rlgf_cli.scorers.cider:Cider", "a tenth of CIDEr-D; needs references: FILE (captions)"),
        "bertscore": Entry("rlgf_cli.scorers.bertscore:BertScore", "BERTScore F1, best reference (bert-score)"),
        "coverage": Entry("rlgf_cli.scorers.coverage:Coverage", "share of the concepts that the text holds"),
        "classifier": Entry(
            "rlgf_cli.scorers.classifier:ClassifierReward",
            "classifier:PATH, probability of a label (positive)",
        ),
        "rm": Entry("rlgf_cli.scorers.classifier:RewardModelReward", "rm:PATH, a reward model's scalar score"),
        "judge": Entry("rlgf_cli.scorers.judge:JudgeReward", "judge:GUIDE, an LLM's rating of the text, 0 to 1"),
        "length": Entry("rlgf_cli.scorers.length:Length", "penalty for leaving a range of words (<= 0)"),
        "repetition": Entry("rlgf_cli.scorers.repetition:Repetition", "minus the share of repeated n-grams"),
        "ending": Entry("rlgf_cli.scorers.ending:Ending", "-1 for a text that does not end in an end mark"),
        "failures": Entry("rlgf_cli.scorers.failures:Failures", "minus the number of failures found by rule"),
    },
    "metrics": {
        "rouge": Entry("rlgf_cli.scorers.rouge:Rouge", "ROUGE-1, -2, -L, -Lsum F1 (rouge-score)"),
        "bleu": Entry("rlgf_cli.scorers.bleu:Bleu", "corpus BLEU and mean sentence BLEU (sacrebleu)"),
        "chrf": Entry("rlgf_cli.scorers.chrf:ChrfMetric", "corpus chrF2 or chrF2++ and mean sentence chrF (sacrebleu)"),
        "cider": Entry("rlgf_cli.scorers.cider:Cider", "CIDEr-D (pycocoevalcap; extra captions)"),
        "meteor": Entry("rlgf_cli.scorers.meteor:MeteorMetric", "METEOR 1.5 (pycocoevalcap; extra captions, Java)"),
        "spice": Entry("rlgf_cli.scorers.spice:SpiceMetric", "SPICE (pycocoevalcap; extra captions, Java, its models)"),
        "rouge_adjusted": Entry(
            "rlgf_cli.scorers.rouge:AdjustedRouge",
            "ROUGE F1 times exp(1 - max(n/m, m/n)) of the lengths",
        ),
        "failures": Entry("rlgf_cli.scorers.failures:Failures", "share of texts that break a rule of form"),
        "flagged": Entry(
            "rlgf_cli.scorers.flagged:FlaggedMetric",
            "flagged:PATH, share of texts that a trained reward model calls bad, at its held-out threshold",
        ),
        "bertscore": Entry("rlgf_cli.scorers.bertscore:BertScore", "BERTScore F1 (bert-score)"),
        "bleurt": Entry(
            "rlgf_cli.scorers.bleurt:BleurtMetric",
            "bleurt:PATH, a BLEURT checkpoint of BERT in PyTorch (bleurt:Elron/bleurt-base-512)",
        ),
        "coverage": Entry("rlgf_cli.scorers.coverage:Coverage", "share of the concepts that the text holds"),
        "distinct": Entry("rlgf_cli.scorers.distinct:DistinctMetric", "distinct-1, -2, -3 per text and of the set"),
        "self_bleu": Entry("rlgf_cli.scorers.self_bleu:SelfBleuMetric", "BLEU of each text against all others"),
        "novel": Entry("rlgf_cli.scorers.novel:NovelMetric", "share of n-grams that are not in the prompt"),
        "repetition": Entry("rlgf_cli.scorers.repetition:Repetition", "repeated n-grams and loops within a text"),
        "length": Entry("rlgf_cli.scorers.length:Length", "words, characters, ratio to the references"),
        "judge": Entry(
            "rlgf_cli.scorers.judge:JudgeMetric",
            "judge:GUIDE, win rate against references or another system, as an LLM judges, in both orders",
        ),
        "membership": Entry(
            "rlgf_cli.scorers.membership:MembershipMetric",
            "membership:TRAIN.jsonl, how well likelihoods tell training examples from held-out ones (AUC)",
        ),
        "kl": Entry("rlgf_cli.scorers.kl:KLMetric", "kl:START, KL of the evaluated model from START, in nats per text"),
        "perplexity": Entry("rlgf_cli.scorers.perplexity:PerplexityMetric", "perplexity:PATH, under a language model"),
        "reward": Entry(
            "rlgf_cli.scorers.reward_metric:RewardMetric", "reward:SPEC, any reward; several add up to one total"
        ),
    },
    "aggregates": {
        "exp_mean": Entry("rlgf_cli.stats.aggregates:exp_mean", "e to the power of the mean"),
        "mean": Entry("rlgf_cli.stats.aggregates:mean", "sum of values by their number"),
        "bleu": Entry("rlgf_cli.stats.aggregates:bleu", "corpus BLEU of n-gram counts, exponential smoothing"),
        "chrf": Entry("rlgf_cli.stats.aggregates:chrf", "corpus chrF2 or chrF2++ of n-gram counts"),
    },
    "failures": {
        "random_words": Entry("rlgf_cli.failures.kinds:random_words", "words of the references in any order"),
        "irrelevant": Entry("rlgf_cli.failures.kinds:irrelevant", "another example's reference"),
        "shuffled_words": Entry("rlgf_cli.failures.kinds:shuffled_words", "the good text's words in another order"),
        "shuffled_sentences": Entry(
            "rlgf_cli.failures.kinds:shuffled_sentences", "the good text's sentences in another order"
        ),
        "repetition": Entry(
            "rlgf_cli.failures.kinds:repetition", "the good text up to a word, then 1 to 8 words repeated"
        ),
        "cut_off": Entry("rlgf_cli.failures.kinds:cut_off", "the good text, cut in the middle"),
        "run_on": Entry("rlgf_cli.failures.kinds:run_on", "the good text, then words of another example's reference"),
        "copied_input": Entry("rlgf_cli.failures.kinds:copied_input", "a run of words of the prompt"),
        "swapped_facts": Entry("rlgf_cli.failures.kinds:swapped_facts", "numbers and names replaced by others"),
    },
    "tasks": {
        "commongen": Entry("rlgf_cli.tasks.builtin:COMMONGEN", "concept words to a sentence"),
        "imdb": Entry("rlgf_cli.tasks.builtin:IMDB", "the first words of a film review to its continuation"),
        "tldr": Entry("rlgf_cli.tasks.builtin:TLDR", "a forum post to its summary"),
    },
    "guides": {
        "hf": Entry("rlgf_cli.guides.hf:HFGuide", "hf:PATH, a local Hugging Face checkpoint"),
        "vllm": Entry("rlgf_cli.guides.vllm:VLLMGuide", "vllm:PATH, a checkpoint in vLLM's engine (extra vllm)"),
        "openai": Entry("rlgf_cli.guides.openai.guide:OpenAIGuide", "openai:MODEL, any OpenAI-compatible endpoint"),
    },
}


_BASES: dict[str, Any] = {"rewards": Reward, "metrics": Metric, "tasks": Task}
"""The base class of each kind; a task is an instance of it."""


def entries(kind: str) -> dict[str, Entry]:
    """All names of a kind: builtins and entry points of installed packages."""
    known = dict(BUILTIN[kind])
    for point in metadata.entry_points(group=f"rlgf.{kind}"):
        if point.name in known:
            raise UserError(
                f"the name {point.name!r} is taken twice among the {kind}",
                where=point.value,
                hint="uninstall one of the packages, or have its author choose another name",
            )
        known[point.name] = Entry(point.value, f"from {point.dist.name if point.dist else 'an installed package'}")
    return known


def load(kind: str, name: str) -> Any:
    """Import what ``name`` stands for. Unknown names are refused with the nearest known ones."""
    known = entries(kind)
    if name not in known:
        hint = did_you_mean(name, known)
        if kind in ("rewards", "metrics"):
            hint += "; a function of your own is named as file.py:function"
        raise UserError(f"unknown {kind[:-1]} {name!r}", hint=hint)
    target = known[name].target
    module, _, attribute = target.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in BUILTIN[kind]:
            raise
        raise RlgfError(
            f"the {kind[:-1]} {name!r} of an installed package cannot be loaded: {error}",
            where=target,
            hint="install what it needs, or ask its author",
        ) from error
    _refuse_other_base(kind, name, target, loaded)
    return loaded


def _refuse_other_base(kind: str, name: str, target: str, loaded: Any) -> None:
    """Refuse an entry point's object that does not derive from the base class of its kind."""
    what, hint = f"the {kind[:-1]} {name!r}", "docs/extensions.md has a complete example"
    base = _BASES.get(kind)
    if base is Task and not isinstance(loaded, Task):
        raise UserError(f"{what} is no Task of rlgf_cli.protocols", where=target, hint=hint)
    if base is None or base is Task:
        return
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise UserError(f"{what} is no class derived from rlgf_cli.protocols.{base.__name__}", where=target, hint=hint)
    if inspect.isabstract(loaded):
        missing = min(vars(loaded)["__abstractmethods__"])
        raise UserError(f"{what} does not define {missing}", where=target, hint=hint)


def build(kind: str, spec: str, params: Mapping[str, Any], **offered: Any) -> Any:
    """Make the reward or metric that ``NAME`` or ``NAME:TARGET`` stands for: ``class(TARGET, **params)``.

    The parameters after the first are its config keys: unknown ones are refused with the nearest known ones,
    values are checked against their annotations. ``offered`` values are passed where the class takes them
    and ``params`` does not give them. A package that is not installed is a UserError.
    """
    try:
        return _build(kind, spec, params, offered)
    except ImportError as error:
        raise missing_package(error, f"the {kind[:-1]} {spec!r}") from error


def _build(kind: str, spec: str, params: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    name, _, target = spec.partition(":")
    made = load(kind, name)
    refused = made.metric_only if kind == "rewards" else made.reward_only
    parameters = list(inspect.signature(made, eval_str=True).parameters.items())[1:]
    accepted = {key: parameter for key, parameter in parameters if key not in refused}
    values = {key: value for key, value in offered.items() if key in accepted}
    for key, value in params.items():
        if key not in accepted:
            hint = did_you_mean(key, accepted) if accepted else "it takes no parameters"
            raise UserError(f"unknown parameter {key!r} of the {kind[:-1]} {spec!r}", hint=hint)
        values[key] = _checked(value, accepted[key], f"the parameter {key!r} of the {kind[:-1]} {spec!r}")
    scorer = made(target or None, **values)
    if not scorer.name:  # a name of its own may be a property
        scorer.name = name
    return scorer


def missing_package(error: ImportError, what: str) -> Exception:
    """A UserError for a package that ``what`` needs and that cannot be imported; our own import errors as they are."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "rlgf_cli"):
        return error
    try:
        needs = metadata.requires("rlgf-cli") or []
    except metadata.PackageNotFoundError:
        needs = []
    plain = re.compile(re.escape(package).replace("_", "[-_.]") + r"\b[^;]*; *extra *== *\"([\w-]+)\"", re.IGNORECASE)
    extra = next((match[1] for match in map(plain.match, needs) if match and match[1] not in ("test", "dev")), None)
    wanted = f"'rlgf-cli[{extra}]'" if extra else package
    return UserError(f"{what} needs the package {package!r}: {error}", hint=f"pip install {wanted}")


def _checked(value: Any, parameter: inspect.Parameter, what: str) -> Any:
    from pydantic import TypeAdapter, ValidationError

    if parameter.annotation is inspect.Parameter.empty:
        return value
    try:
        return TypeAdapter(parameter.annotation).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise UserError(f"{what}: {reason} (given: {value!r})") from None


def is_python_target(name: str) -> bool:
    """Whether a name has the form ``file.py:function``."""
    path, colon, attribute = name.rpartition(":")
    return bool(colon) and path.endswith(".py") and attribute.isidentifier()


def load_python_target(name: str) -> Any:
    """The function that ``file.py:function`` names. The file is imported by its path, and may import its neighbours."""
    path_text, _, attribute = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"no such file: {path}", hint="the form is path/to/file.py:function")
    module_name = f"rlgf_user_{path.stem}_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if (folder := str(path.resolve().parent)) not in sys.path:
        sys.path.append(folder)  # at the end: nothing that is installed is hidden by it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"importing it failed: {type(error).__name__}: {error}", where=str(path)) from error
    if not hasattr(module, attribute):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(f"no function {attribute!r} in it", where=str(path), hint=did_you_mean(attribute, functions))
    return getattr(module, attribute)
