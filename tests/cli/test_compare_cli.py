"""``rlgf compare``: paired differences, and systems that cannot be compared."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.metrics.bootstrap import mean_interval, paired_interval


@pytest.fixture
def evaluated(examples_file: Path, tmp_path: Path, run_cli):
    """``evaluated(name, keep)``: an eval folder of texts that keep each reference word with that probability."""

    def make(
        name: str, keep: float, *, metrics: str = "rouge,coverage", limit: int = 40, data: Path | None = None
    ) -> Path:
        rng = random.Random(name)
        texts = tmp_path / f"{name}.jsonl"
        rows = []
        for example in read_examples(examples_file):
            words = [word for word in example.references[0].split() if rng.random() < keep]
            rows.append({"id": example.id, "text": " ".join(words)})
        texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / name / "eval"
        arguments = ["--predictions", texts, "--data", data or examples_file, "--metrics", metrics, "-L", limit]
        result = run_cli("eval", *arguments, "-o", out)
        assert result.exit_code == 0, result.stderr
        return out

    return make


def values(folder: Path, name: str) -> list[float]:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    return [json.loads(line)["scores"][name] for line in lines]


class TestTable:
    def test_means_differences_and_the_mark(self, evaluated, run_cli):
        poor, same, good = evaluated("poor", 0.4), evaluated("same", 0.4), evaluated("good", 0.9)
        result = run_cli("compare", poor, same.parent, f"the best={good}", "--metrics", "rouge.rougeL")
        assert result.exit_code == 0, result.stderr
        head, _, _, base, second, third = result.stdout.splitlines()
        assert head == "rouge.rougeL (n = 40)"
        assert base.startswith("| poor") and second.startswith("| same") and third.startswith("| the best")
        assert [row.rstrip("| ").endswith("*") for row in (base, second, third)] == [False, False, True]

    def test_json_holds_the_paired_bootstrap(self, evaluated, tmp_path, run_cli):
        base, other = evaluated("base", 0.5), evaluated("other", 0.8)
        out = tmp_path / "comparison.json"
        result = run_cli("compare", base, other, "--json", "-o", out, "--level", 0.9, "--resamples", 2000, "--seed", 3)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert found == json.loads(out.read_text())
        assert json.loads((tmp_path / "comparison.json.run.json").read_text())["command"] == "compare"
        assert found["base"] == "base" and set(found["figures"]) >= {"rouge.rouge1", "coverage"}
        a, b = values(base, "coverage"), values(other, "coverage")
        settings = {"level": 0.9, "resamples": 2000, "seed": 3}
        row = found["figures"]["coverage"]["rows"][1]
        assert (row["value"], row["low"], row["high"]) == tuple(mean_interval(b, **settings))
        expected = paired_interval(b, a, **settings)
        difference = row["difference"]
        assert (difference["value"], difference["low"], difference["high"]) == tuple(expected)
        assert difference["value"] == pytest.approx(row["value"] - found["figures"]["coverage"]["rows"][0]["value"])
        assert difference["excludes_zero"] is expected.excludes_zero is True

    def test_a_system_does_not_differ_from_itself(self, evaluated, run_cli):
        folder = evaluated("one", 0.5)
        found = json.loads(run_cli("compare", f"a={folder}", f"b={folder}", "--json").stdout)
        for figure in found["figures"].values():
            assert figure["rows"][1]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0, "excludes_zero": False}

    def test_a_figure_that_one_system_lacks_is_left_out_and_named(self, evaluated, run_cli):
        result = run_cli("compare", evaluated("a", 0.5), evaluated("b", 0.5, metrics="coverage,length"), "--json")
        assert result.exit_code == 0 and list(json.loads(result.stdout)["figures"]) == ["coverage"]
        assert "left out: rouge.rougeL, which b does not have" in result.stderr

    def test_prompts_that_one_system_skipped_are_left_out_for_all(self, evaluated, run_cli):
        a, b = evaluated("a", 0.5), evaluated("b", 0.8)
        path = b / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[0]["scores"]["coverage"] = None
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        figure = json.loads(run_cli("compare", a, b, "--json").stdout)["figures"]["coverage"]
        assert (figure["n"], figure["n_skipped"]) == (39, 1)
        assert figure["rows"][0]["value"] == pytest.approx(sum(values(a, "coverage")[1:]) / 39)


class TestRefused:
    def test_other_signatures_unless_forced(self, evaluated, tmp_path, run_cli):
        a = evaluated("a", 0.5, metrics="rouge")
        recipe = tmp_path / "plain.yaml"
        recipe.write_text("metrics: [{name: rouge, params: {stemmer: false}}]")
        texts, data = tmp_path / "a.jsonl", a / "predictions.jsonl"
        b = tmp_path / "b"
        assert run_cli("eval", "--predictions", texts, "--data", data, "-c", recipe, "-o", b).exit_code == 0
        refused = run_cli("compare", a, b)
        assert refused.exit_code == 2 and "computed in different ways" in refused.stderr
        assert "stemmer=yes" in refused.stderr and "stemmer=no" in refused.stderr and "--force" in refused.stderr
        assert refused.stdout == ""
        forced = run_cli("compare", a, b, "--force")
        assert forced.exit_code == 0 and "warning" in forced.stderr

    def test_other_ids_unless_forced(self, evaluated, run_cli):
        a, b = evaluated("a", 0.5), evaluated("b", 0.5, limit=30)
        refused = run_cli("compare", a, b)
        assert refused.exit_code == 2 and "10 ids only in a, 0 only in b (first: 'toy-0-30')" in refused.stderr
        forced = run_cli("compare", a, b, "--force", "--json")
        assert forced.exit_code == 0 and json.loads(forced.stdout)["figures"]["coverage"]["n"] == 30

    def test_other_references(self, evaluated, examples_file, tmp_path, run_cli):
        other = tmp_path / "other.jsonl"
        other.write_text(examples_file.read_text().replace('"references": ["the', '"references": ["that'))
        refused = run_cli("compare", evaluated("a", 0.5), evaluated("b", 0.5, data=other))
        assert refused.exit_code == 2 and "equal ids with different references" in refused.stderr

    def test_names_of_figures(self, evaluated, run_cli):
        a, b = evaluated("a", 0.5), evaluated("b", 0.5, metrics="coverage")
        refused = run_cli("compare", a, b, "--metrics", "coverag")
        assert refused.exit_code == 2 and "did you mean 'coverage'" in refused.stderr
        refused = run_cli("compare", a, b, "--metrics", "rouge")
        assert refused.exit_code == 2 and "b was not scored with 'rouge'" in refused.stderr
        refused = run_cli("compare", a, evaluated("c", 0.5, metrics="length"))
        assert refused.exit_code == 2 and "no figure in common" in refused.stderr

    def test_folders(self, evaluated, tmp_path, run_cli):
        a = evaluated("a", 0.5)
        (tmp_path / "empty").mkdir()
        for other, message in ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "no evaluation in it")):
            refused = run_cli("compare", a, other)
            assert refused.exit_code == 2 and message in refused.stderr and str(other) in refused.stderr
        (a / "scores.json").unlink()
        refused = run_cli("compare", a, a.parent)
        assert refused.exit_code == 2 and "did not finish" in refused.stderr

    def test_how_many_and_whose_names(self, evaluated, run_cli):
        a = evaluated("a", 0.5)
        assert "one system alone" in run_cli("compare", a).stderr
        assert run_cli("compare").exit_code == 2
        refused = run_cli("compare", f"x={a}", f"x={a}")
        assert refused.exit_code == 2 and "two systems have the name 'x'" in refused.stderr

    def test_a_used_output(self, evaluated, tmp_path, run_cli):
        a, out = evaluated("a", 0.5), tmp_path / "c.json"
        arguments = ["compare", f"x={a}", f"y={a}", "-o", out]
        assert run_cli(*arguments).exit_code == 0
        assert run_cli(*arguments).exit_code == 2
        assert run_cli(*arguments, "--overwrite").exit_code == 0
