"""The built-in tasks: for each a dataset, and the mapping of its rows to examples."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlgf_cli.protocols import ColumnMap, Task

IMDB_PROMPT_WORDS = 64
_FIRST_WORDS = re.compile(rf"\s*\S+(?:\s+\S+){{{IMDB_PROMPT_WORDS - 1}}}(?=\s)")
_TLDR_SUFFIX = re.compile(r"\s*TL;DR:?\s*$")


def _imdb_row(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first 64 words, and the rest; joined they are the unchanged review."""
    text = row["text"]
    if not isinstance(text, str) or (head := _FIRST_WORDS.match(text)) is None or not text[head.end() :].strip():
        return None
    return {**row, "start": head.group(), "rest": text[head.end() :]}


def _tldr_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The post without its "TL;DR:", which belongs into the prompt template."""
    summary = row.get("completion", row.get("label"))  # trl-lib/tldr; CarperAI/openai_summarize_tldr
    post = _TLDR_SUFFIX.sub("", row["prompt"] or "")
    return {**row, "post": post, "summary": (summary or "").strip()}


COMMONGEN = Task(
    name="commongen",
    summary="concept words to a sentence",
    dataset="allenai/common_gen",
    needs=("concept_set_idx", "concepts", "target"),
    columns=ColumnMap(prompt="concepts", references=("target",), meta={"concepts": "concepts"}),
    group_by="concept_set_idx",
    no_references=frozenset({"test"}),  # its targets are empty texts on the hub
)

IMDB = Task(
    name="imdb",
    summary="the first words of a film review to its continuation",
    dataset="stanfordnlp/imdb",
    needs=("text", "label"),
    columns=ColumnMap(prompt="start", references=("rest",), meta={"label": "label"}),
    preprocess=_imdb_row,
    skips=f"reviews that end within {IMDB_PROMPT_WORDS} words",
)

TLDR = Task(
    name="tldr",
    summary="a forum post to its summary",
    dataset="trl-lib/tldr",
    needs=("prompt",),
    columns=ColumnMap(prompt="post", references=("summary",)),
    preprocess=_tldr_row,
)
