"""``rlgf eval --metrics membership``: what it writes and counts, what it refuses, and what reads it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import Result, toy_examples, write_rows
from rlgf_cli.artifacts.jsonl import read_records
from rlgf_cli.artifacts.records import EvaluatedRecord


def held_out(count: int = 20) -> list[dict]:
    """Rows of which none is a member: the toy task is so small that some come again."""
    return [{**row, "references": [row["references"][0] + " today"]} for row in toy_examples(count, 2)]


FIGURES = ["membership.loss", "membership.loss_tpr", "membership.min_k", "membership.min_k_tpr"]


@pytest.fixture
def evaluate(tiny_gpt2: Path, tmp_path: Path, run_cli: Callable[..., Result]) -> Callable[..., Result]:
    """Test a model on made members and held-out rows; ``out`` is below ``tmp_path``."""

    def run(
        *more: object,
        members: Any = None,
        data: Any = None,
        model: Path = tiny_gpt2,
        out: str = "out",
        metrics: str | None = "membership:{}",
    ) -> Result:
        train = write_rows(tmp_path / "train.jsonl", toy_examples(30, 1) if members is None else members)
        test = write_rows(tmp_path / "test.jsonl", held_out() if data is None else data)
        arguments = ["eval", "--model", model, "--data", test, "--device", "cpu", "-o", tmp_path / out]
        arguments += ["--max-new-tokens", 30]
        named = ["--metrics", metrics.format(train)] if metrics is not None else []
        return run_cli(*arguments, *named, *more)

    return run


def scores_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text())


def records_of(folder: Path) -> list[EvaluatedRecord]:
    return list(read_records(folder / "predictions.jsonl", EvaluatedRecord))


def of(params: str) -> list[str]:
    return ["--set", f"metrics=[{{name: membership, params: {{{params}}}}}]"]


def test_figures_intervals_and_no_text(evaluate, tmp_path):
    result = evaluate("--set", "interval.level=0.9")
    assert result.exit_code == 0, result.stderr
    scores = scores_of(tmp_path / "out")
    assert list(scores["metrics"]) == FIGURES
    for name, entry in scores["metrics"].items():
        assert entry["low"] <= entry["value"] <= entry["high"] and entry["low"] < entry["high"]
        assert (entry["n"], entry["n_skipped"], entry["aggregate"]) == (20, 0, None)
        assert f"{entry['value']:.4f} | {entry['low']:.4f} to {entry['high']:.4f}" in result.stdout, name
        assert "k=20" in entry["signature"] and "n=20" in entry["signature"]
    assert scores["metrics"]["membership.loss"]["method"].startswith("Wilson's")
    assert "generating" not in result.stderr and scores["decoding"] is None
    assert scores["counts"] | {"texts": 0, "membership.members": 30, "membership.non_members": 20} == scores["counts"]
    records = records_of(tmp_path / "out")
    assert len(records) == 20 and {record.prediction for record in records} == {None}
    assert evaluate(out="wider").exit_code == 0
    wider, narrow = scores_of(tmp_path / "wider")["metrics"]["membership.loss"], scores["metrics"]["membership.loss"]
    assert wider["low"] < narrow["low"] and wider["value"] == narrow["value"]


def test_a_metric_of_texts_beside_it_has_them_written(evaluate, tmp_path):
    result = evaluate(metrics="length,membership:{}")
    assert result.exit_code == 0, result.stderr
    assert all(isinstance(record.prediction, str) for record in records_of(tmp_path / "out"))
    assert scores_of(tmp_path / "out")["counts"]["texts"] == 20
    assert set(FIGURES) < set(scores_of(tmp_path / "out")["metrics"])


def test_resume_writes_texts_once_a_metric_reads_them_and_then_keeps_them(evaluate, tmp_path):
    assert evaluate().exit_code == 0
    more = evaluate("--resume", metrics="length,membership:{}")
    assert more.exit_code == 0, more.stderr
    texts = [record.prediction for record in records_of(tmp_path / "out")]
    assert None not in texts and "are there already" not in more.stderr
    alone = evaluate("--resume")
    assert alone.exit_code == 0 and "20 texts are there already" in alone.stderr
    assert [record.prediction for record in records_of(tmp_path / "out")] == texts
    assert list(scores_of(tmp_path / "out")["metrics"]) == FIGURES


def test_texts_of_some_examples_alone_are_not_gone_on_with(evaluate, tmp_path):
    assert evaluate(metrics="length").exit_code == 0
    path = tmp_path / "out" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = write_rows(
        path, [{**row, "prediction": None} if i == 3 else row for i, row in enumerate(rows)]
    ).read_text()
    result = evaluate("--resume", metrics="length")
    assert result.exit_code == 2 and "1 of 20 texts are missing" in result.stderr and "\nhint: " in result.stderr
    assert path.read_text() == before


def test_what_is_counted_and_left_out(evaluate, tmp_path):
    """Held-out examples that are members, or have no reference; texts and prompts that do not fit."""
    members, data = toy_examples(30, 1), held_out()
    long = " ".join(["garden"] * 40)
    data[0] = {**data[0], "prompt": members[4]["prompt"], "references": members[4]["references"]}
    data[1] = {**data[1], "prompt": members[4]["prompt"]}  # the same prompt with another reference is no member
    data[2].pop("references")
    data[7] = {**data[7], "references": members[9]["references"]}  # a member's text for another prompt
    data[3]["references"], members[5]["references"], members[6]["prompt"] = [long + " river"], [long], f"{long} {long}"
    result = evaluate("--on-overlong", "skip", members=members, data=data)
    assert result.exit_code == 0, result.stderr
    scores = scores_of(tmp_path / "out")
    expected = {
        "members": 29, "non_members": 18, "overlap": 1, "without_references": 1,
        "shared_references": 1, "members_cut": 1, "non_members_cut": 1, "members_skipped": 1,
    }  # fmt: skip
    found = {key.partition(".")[2]: n for key, n in scores["counts"].items() if key.startswith("membership.")}
    assert found == expected and "membership.overlap 1" in result.stderr
    assert (scores["metrics"]["membership.loss"]["n"], scores["metrics"]["membership.loss"]["n_skipped"]) == (18, 2)


def test_a_model_whose_likelihoods_are_no_numbers_is_an_error(evaluate, tmp_path, tiny_gpt2):
    """NaN is sorted like a number: all of them would tie, and the AUC be 0.5 with an interval."""
    model = Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    broken = {name: w * float("nan") if "ln_f" in name else w for name, w in weights.items()}
    save_file(broken, model / "model.safetensors", metadata={"format": "pt"})
    result = evaluate(model=model)
    assert result.exit_code == 1 and "nan" in result.stderr and str(model) in result.stderr, result.stderr
    assert not (tmp_path / "out" / "scores.json").exists()


def test_members_are_drawn_with_a_seed(evaluate, tmp_path):
    train = tmp_path / "train.jsonl"
    found = {}
    for name, params in {
        "all": "limit: null", "one": "limit: 8", "again": "limit: 8", "other": "limit: 8, seed: 1", "k": "k: 50",
    }.items():  # fmt: skip
        result = evaluate(*of(f'members: "{train}", {params}'), out=name, metrics=None)
        assert result.exit_code == 0, result.stderr
        found[name] = scores_of(tmp_path / name)
    assert found["all"]["counts"]["membership.members"] == 30 and found["one"]["counts"]["membership.members"] == 8
    figures = {name: {key: entry["value"] for key, entry in s["metrics"].items()} for name, s in found.items()}
    assert figures["one"] == figures["again"] != figures["other"]
    assert figures["k"]["membership.loss"] == figures["all"]["membership.loss"]
    assert figures["k"]["membership.min_k"] != figures["all"]["membership.min_k"]
    signatures = {s["metrics"]["membership.loss"]["signature"] for s in found.values()}
    assert len(signatures) == 4


class TestRefused:
    def refused(self, result: Result, tmp_path: Path, *said: str, hint: bool = True) -> None:
        assert result.exit_code == 2, result.stderr
        assert result.stdout == "" and not (tmp_path / "out").exists() and "Traceback" not in result.stderr
        assert "\nhint: " in result.stderr or not hint
        for part in said:
            assert part in result.stderr, result.stderr

    @pytest.mark.parametrize(
        ("metrics", "said"),
        [
            ("membership", "needs one file of training examples"),
            ("membership:no.jsonl", "no such file"),
            ("membership:..", "it is a folder"),
        ],
    )
    def test_no_members(self, evaluate, tmp_path, metrics, said):
        self.refused(evaluate(metrics=metrics), tmp_path, said)

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            ([{"prompt": "a", "references": ["b"]}, {"prompt": "a"}], "train.jsonl:2: this record has no references"),
            ([{"prompt": "a", "references": ["b"]}], "2 members are needed"),
            ([], "holds no records"),
            ([{"text": "a"}], "the field 'prompt' is missing"),
            ([{"prompt": "cat " * 90, "references": ["b"]}] * 2, "the prompt of example 'line-1' has"),
        ],
    )
    def test_members_that_cannot_be_scored(self, evaluate, tmp_path, members, said):
        self.refused(evaluate(members=members), tmp_path, said, "train.jsonl")

    @pytest.mark.parametrize(
        ("params", "said"),
        [("k: 0", "greater than 0"), ("k: 101", "less than or equal to 100"), ("limit: 1", "limit"), ("kk: 3", "'k'")],
    )
    def test_parameters(self, evaluate, tmp_path, params, said):
        members = write_rows(tmp_path / "train.jsonl", toy_examples(5))
        metrics = f'{{name: membership, params: {{members: "{members}", {params}}}}}'
        self.refused(evaluate("--set", f"metrics=[{metrics}]", metrics=None), tmp_path, said, hint=False)

    def test_held_out_texts_that_are_all_members(self, evaluate, tmp_path):
        rows = toy_examples(20, 1)
        self.refused(evaluate(members=rows, data=rows), tmp_path, "0 of 20 held-out examples", "not trained on")

    def test_held_out_texts_without_references(self, evaluate, tmp_path):
        rows = [{"id": row["id"], "prompt": row["prompt"]} for row in toy_examples(20, 2)]
        self.refused(evaluate(data=rows), tmp_path, "needs references")

    def test_texts_made_elsewhere(self, tmp_path, run_cli):
        train = write_rows(tmp_path / "train.jsonl", toy_examples(5))
        texts = write_rows(tmp_path / "texts.jsonl", [{"id": "a", "prompt": "b", "text": "c", "references": ["d"]}])
        result = run_cli("eval", "--predictions", texts, "--metrics", f"membership:{train}", "-o", tmp_path / "out")
        self.refused(result, tmp_path, "tests a model", "--model FOLDER")

    def test_a_model_without_a_likelihood(self, evaluate, tmp_path, tiny_classifier):
        result = evaluate(model=tiny_classifier)
        self.refused(result, tmp_path, "GPT2ForSequenceClassification", "no likelihood")


def test_compare_and_report_show_the_intervals(evaluate, tmp_path, run_cli, tiny_llama):
    assert evaluate(out="a").exit_code == evaluate(out="b", model=tiny_llama).exit_code == 0
    told = {name: scores_of(tmp_path / name)["metrics"]["membership.loss"] for name in "ab"}
    shown = {name: f"{e['value']:.4f} | {e['low']:.4f} to {e['high']:.4f}" for name, e in told.items()}
    result = run_cli("compare", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "comparison.json")
    assert result.exit_code == 0, result.stderr
    assert shown["a"] in result.stdout and shown["b"] in result.stdout
    assert "membership.loss, membership.min_k: a figure of the set as one" in result.stdout
    assert "is that of rlgf eval at the same level (Wilson's" in result.stdout and "no test" in result.stdout
    assert "prompts are few" not in result.stdout  # of a bootstrap that there is not
    other = run_cli("compare", tmp_path / "a", tmp_path / "b", "--level", 0.8)
    assert other.exit_code == 0 and shown["a"].partition(" | ")[0] in other.stdout and shown["a"] not in other.stdout

    page = tmp_path / "page.html"
    result = run_cli("report", tmp_path / "a", tmp_path / "b", "--comparison", tmp_path / "comparison.json", "-o", page)
    assert result.exit_code == 0, result.stderr
    html = page.read_text()
    rounded = f"<small>{told['b']['low']:.3f} to {told['b']['high']:.3f}</small>"
    assert html.count(rounded) == 2  # beside its evaluation, and in the comparison
    assert "Wilson" in html and "bootstrap interval over prompts" not in html


def test_other_members_are_not_compared(evaluate, tmp_path, run_cli):
    assert evaluate(out="a").exit_code == evaluate(out="b", members=toy_examples(30, 5)).exit_code == 0
    result = run_cli("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2 and "membership.loss was computed in different ways" in result.stderr


def test_prompts_cut_elsewhere_are_not_compared(evaluate, tmp_path, run_cli):
    short = ["--set", "lengths.max_prompt_tokens=1", "--on-overlong", "truncate"]
    assert evaluate(out="a").exit_code == evaluate(*short, out="b").exit_code == 0
    values = [scores_of(tmp_path / name)["metrics"]["membership.loss"]["value"] for name in "ab"]
    assert values[0] != values[1] and scores_of(tmp_path / "b")["counts"]["membership.members_truncated"] == 30
    result = run_cli("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2 and "membership.loss was computed in different ways" in result.stderr


def test_an_evaluation_without_texts_is_no_file_of_texts(evaluate, tmp_path, run_cli):
    assert evaluate().exit_code == 0
    result = run_cli("eval", "--predictions", tmp_path / "out" / "predictions.jsonl", "-o", tmp_path / "again")
    assert result.exit_code == 2 and "is None, not a text" in result.stderr
    assert "hint: no metric of that evaluation read texts, and none were written" in result.stderr
