"""``rlgf compare``: paired differences, and systems that cannot be compared."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlgf_cli import registry
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.cli import numbers
from rlgf_cli.stats.aggregates import mean
from rlgf_cli.stats.bootstrap import resampled
from rlgf_cli.stats.significance import Seeds, bootstrap_p, estimate, holm, p_value, randomised
from significance_cases import as_rows, bleu, bleu_rows, mean_interval


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
        head, _, _, base, second, third, _, footer, note, few = result.stdout.splitlines()
        assert head == "rouge.rougeL (n = 40)"
        assert base.startswith("| poor") and second.startswith("| same") and third.startswith("| the best")
        assert [row.rstrip("| ").endswith("***") for row in (base, second, third)] == [False, False, True]
        assert "<0.0001 |  <0.0002 | ***" in third
        assert "10000 resamples, seed 0" in footer and "Holm over 2 tests" in footer
        assert "these models" in note and "not for another training" in note
        assert few.startswith("40 prompts are few")
        exact = run_cli("compare", poor, good, "--metrics", "rouge.rougeL", "--test", "randomisation").stdout
        assert "approximate randomisation" in exact and "are few" not in exact

    def test_texts_of_a_few_prompts_stand_below_the_tables(self, evaluated, run_cli, tmp_path):
        poor, good, other = evaluated("poor", 0.4), evaluated("good", 0.9), evaluated("other", 0.8)
        out = tmp_path / "c.json"
        result = run_cli("compare", poor, f"the best={good},{other}", "--texts", 3, "--seed", 5, "-o", out)
        assert result.exit_code == 0, result.stderr
        shown = json.loads(out.read_text())["texts"]
        assert len({row["id"] for row in shown}) == 3
        below = result.stdout.splitlines()[-4 * len(shown) :]
        for row, lines in zip(shown, zip(*[iter(below)] * 4, strict=True), strict=True):
            of_prompt = [
                next(r for r in map(json.loads, (f / "predictions.jsonl").open()) if r["id"] == row["id"])
                for f in (poor, good)
            ]
            first, second = (record["prediction"] for record in of_prompt)
            assert row["prompt"] == of_prompt[0]["prompt"]
            assert row["texts"] == {"poor": first, "the best": second}
            assert lines == ("", row["prompt"], f"  poor      {first}", f"  the best  {second}")
        another = run_cli("compare", poor, good, "--texts", 3, "--seed", 6, "--json").stdout
        assert {row["id"] for row in json.loads(another)["texts"]} != {row["id"] for row in shown}
        assert "texts" not in run_cli("compare", poor, good).stdout

    @pytest.mark.parametrize("prompt", ["", " \n"])
    def test_texts_without_a_prompt_have_their_id(self, evaluated, run_cli, prompt):
        a, b = evaluated("a", 0.4), evaluated("b", 0.9)
        for folder in (a, b):
            rewrite(folder / "predictions.jsonl", lambda rows: [row.update(prompt=prompt) for row in rows])
        systems = ("compare", a, b, "--texts", 1, "--metrics", "coverage")
        (shown,) = json.loads(run_cli(*systems, "--json").stdout)["texts"]
        assert run_cli(*systems).stdout.splitlines()[-3] == shown["id"]
        assert f"### {shown['id']}" in run_cli(*systems, "--markdown").stdout.splitlines()

    def test_json_holds_the_paired_bootstrap(self, evaluated, tmp_path, run_cli):
        base, other = evaluated("base", 0.5), evaluated("other", 0.6)
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
        assert [row[key] for key in ("value", "low", "high")] == pytest.approx(mean_interval(b, **settings))
        expected = mean_interval(np.array(b) - np.array(a), **settings)
        difference = row["difference"]
        assert [difference[key] for key in ("value", "low", "high")] == pytest.approx(expected)
        assert difference["value"] == pytest.approx(row["value"] - found["figures"]["coverage"]["rows"][0]["value"])
        assert found["tests"]["family_size"] == len(found["figures"]) and found["tests"]["smallest_p"] == 1 / 2001
        rows = [as_rows(np.array(side)) for side in (b, a)]
        null = resampled(np.stack(rows), mean, resamples=2000, seed=3)
        assert difference["p_bootstrap"] == bootstrap_p(null[0] - null[1], np.array(difference["value"]))
        null = randomised(rows[0][None], rows[1], mean, resamples=2000, seed=3)
        assert difference["p_randomisation"] == p_value(null, np.array([difference["value"]]))[0]
        assert 0.001 < difference["p_randomisation"] < 0.9
        differences = [figure["rows"][1]["difference"] for figure in found["figures"].values()]
        assert [d["p_holm"] for d in differences] == holm([d["p_bootstrap"] for d in differences])

    def test_a_system_does_not_differ_from_itself(self, evaluated, run_cli):
        folder = evaluated("one", 0.5)
        found = json.loads(run_cli("compare", f"a={folder}", f"b={folder}", "--json").stdout)
        for figure in found["figures"].values():
            nothing = {"value": 0.0, "low": 0.0, "high": 0.0, "p_bootstrap": 1.0, "p_randomisation": 1.0, "p_holm": 1.0}
            assert figure["rows"][1]["difference"] == nothing

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


def rewrite(path: Path, change) -> None:
    """Let ``change(rows)`` edit a JSONL file's objects, or a JSON document's one."""
    if path.suffix == ".json":
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def with_bleu(monkeypatch):
    """``with_bleu(folder)``: an evaluation gets BLEU from summed rows, and a figure of the set as one."""
    monkeypatch.setitem(
        registry.BUILTIN["aggregates"], "bleu_of_the_test", registry.Entry("significance_cases:bleu", "")
    )

    def add(folder: Path) -> np.ndarray:
        records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        rows = bleu_rows([r["prediction"] for r in records], [r["references"] for r in records])

        def statistics(found):
            for record, row in zip(found, rows, strict=True):
                record["statistics"] = {"corpus": list(row)}

        def entries(scores):
            entry = {"signature": "corpus|n=40", "n": 40, "n_skipped": 0}
            value = float(bleu(rows.sum(axis=0)))
            scores["metrics"]["corpus"] = {**entry, "value": value, "aggregate": "bleu_of_the_test"}
            scores["metrics"]["variety"] = {**entry, "value": len(folder.parent.name) / 10, "aggregate": None}

        rewrite(folder / "predictions.jsonl", statistics)
        rewrite(folder / "scores.json", entries)
        return rows

    return add


class TestCorpusFigures:
    def test_are_tested_on_resampled_rows(self, evaluated, with_bleu, run_cli):
        base, other = evaluated("base", 0.8), evaluated("other", 0.9)
        a, b = with_bleu(base), with_bleu(other)
        result = run_cli(
            "compare", base, other, "--metrics", "corpus", "--json", "--resamples", 500, "--test", "randomisation"
        )
        assert result.exit_code == 0, result.stderr
        figure = json.loads(result.stdout)["figures"]["corpus"]
        assert (figure["n"], figure["aggregate"]) == (40, "bleu_of_the_test")
        found, observed = figure["rows"][1]["difference"], bleu(b.sum(axis=0)) - bleu(a.sum(axis=0))
        assert found["value"] == pytest.approx(observed)
        null = resampled(np.stack([b, a]), bleu, resamples=500, seed=0)
        assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(null[0] - null[1], [0.025, 0.975])))
        swapped = randomised(b[None], a, bleu, resamples=500, seed=0)
        assert found["p_randomisation"] == found["p_holm"] == p_value(swapped, np.array([observed]))[0]
        assert found["p_bootstrap"] == bootstrap_p(null[0] - null[1], np.array(observed))

    def test_of_the_set_as_one_have_values_alone(self, evaluated, with_bleu, run_cli):
        folders = [evaluated(name, 0.9) for name in ("one", "three", "eleven")]
        for folder in folders:
            with_bleu(folder)
        systems = [folders[0], f"x={folders[1]},{folders[2]}"]
        result = run_cli("compare", *systems, "--metrics", "variety,coverage", "--json")
        found = json.loads(result.stdout)
        rows = found["figures"]["variety"]["rows"]
        assert [row["value"] for row in rows] == pytest.approx([0.3, (0.5 + 0.6) / 2])
        assert all(row["low"] is row["high"] is row["difference"] is None for row in rows)
        assert found["tests"]["family_size"] == 1
        assert any(note.startswith("variety: ") and "no test" in note for note in found["tests"]["notes"])

    def test_of_the_set_as_one_are_left_out_where_the_prompts_are_others(self, evaluated, with_bleu, run_cli):
        a, b = evaluated("a", 0.9), evaluated("b", 0.9)
        for folder in (a, b):
            with_bleu(folder)
        rewrite(b / "predictions.jsonl", lambda rows: rows.pop())
        result = run_cli("compare", a, b, "--force", "--json")
        assert "variety" not in json.loads(result.stdout)["figures"] and "left out: variety" in result.stderr
        assert run_cli("compare", a, b, "--force", "--metrics", "variety").exit_code == 2

    def test_bad_rows(self, evaluated, with_bleu, run_cli):
        a, b = evaluated("a", 0.9), evaluated("b", 0.9)
        for folder in (a, b):
            with_bleu(folder)
        good = (b / "predictions.jsonl").read_text()

        def refused(change, message: str) -> None:
            (b / "predictions.jsonl").write_text(good)
            rewrite(b / "predictions.jsonl", change)
            result = run_cli("compare", a, b, "--metrics", "corpus")
            assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.stderr

        refused(lambda rows: rows[3]["statistics"]["corpus"].pop(), "different lengths: 10, and 9")
        refused(lambda rows: [row["statistics"]["corpus"].pop() for row in rows], "9 numbers in b, 10 in a")
        refused(lambda rows: [row["statistics"].update(corpus=[0.0] * 10) for row in rows], "corpus of b is not finite")
        refused(lambda rows: rows[2]["statistics"].clear(), "has no score corpus")

        def short(rows):
            for row in rows:
                row["statistics"]["corpus"] = row["statistics"]["corpus"][:1]

        rewrite(a / "predictions.jsonl", short)
        refused(short, "rows of 1 numbers do not make the figure corpus")

    def test_an_unknown_aggregate(self, evaluated, run_cli):
        a, b = evaluated("a", 0.9), evaluated("b", 0.9)
        for folder in (a, b):
            rewrite(folder / "scores.json", lambda scores: scores["metrics"]["coverage"].update(aggregate="maen"))
        refused = run_cli("compare", a, b)
        assert refused.exit_code == 2 and "unknown aggregate 'maen'" in refused.stderr and "'mean'" in refused.stderr


@pytest.mark.parametrize("name", ["table.md", "table.csv"])
def test_the_file_is_json_and_says_so(evaluated, run_cli, tmp_path, name):
    a, b = evaluated("a", 0.4), evaluated("b", 0.9)
    refused = run_cli("compare", a, b, "-o", tmp_path / name)
    assert refused.exit_code == 2 and "JSON is written" in refused.stderr and "--markdown > FILE.md" in refused.stderr
    assert not (tmp_path / name).exists()


class TestSeeds:
    @pytest.fixture
    def trained(self, evaluated) -> dict[str, list[Path]]:
        return {
            name: [evaluated(f"{name}{seed}", keep + 0.05 * seed, metrics="coverage") for seed in range(3)]
            for name, keep in (("a", 0.4), ("b", 0.6))
        }

    def test_both_ways_to_give_them(self, trained, run_cli):
        again = [f"{name}={folder}" for name, folders in trained.items() for folder in folders]
        commas = [f"{name}={','.join(map(str, folders))}" for name, folders in trained.items()]
        first, second = (run_cli("compare", *given, "--json") for given in (again, commas))
        assert first.exit_code == 0, first.stderr
        assert first.stdout == second.stdout
        found = json.loads(first.stdout)
        assert found["systems"] == {name: [str(f) for f in folders] for name, folders in trained.items()}
        rows = found["figures"]["coverage"]["rows"]
        assert [row["seeds"] for row in rows] == [3, 3]
        for row, folders in zip(rows, trained.values(), strict=True):
            assert row["value"] == pytest.approx(np.mean([values(folder, "coverage") for folder in folders]))

    def test_the_interval_is_over_prompts_and_seeds(self, trained, run_cli):
        commas = [f"{name}={','.join(map(str, folders))}" for name, folders in trained.items()]
        found = json.loads(run_cli("compare", *commas, "--json").stdout)
        difference = found["figures"]["coverage"]["rows"][1]["difference"]
        rows = [as_rows(np.array([values(f, "coverage") for f in folders])) for folders in trained.values()]
        seeds = [
            Seeds(mean(r.sum(axis=1)), draws)
            for r, draws in zip(
                rows, np.split(resampled(np.concatenate(rows), mean, resamples=10_000, seed=0), 2), strict=True
            )
        ]
        interval, p = estimate(seeds[1], seeds[0], prompts=40, level=0.95)
        assert [difference[key] for key in ("value", "low", "high")] == pytest.approx(interval)
        assert difference["p_bootstrap"] == pytest.approx(p)
        assert difference["p_randomisation"] == pytest.approx(0.1)
        notes = " ".join(found["tests"]["notes"])
        assert "p of the bootstrap test, over other prompts and other seeds" in notes
        assert "permuting 3 and 3 seeds gives no p-value below 0.1" in notes
        assert "prompts are few" not in notes
        shown = run_cli("compare", *commas).stdout
        assert "paired bootstrap, of seeds Student's t, two-sided" in shown
        assert "permutation of the seeds" in run_cli("compare", *commas, "--test", "randomisation").stdout

    def test_seeds_in_pairs(self, trained, run_cli):
        """The third seed of a comes first, so that the order decides what is a pair."""
        trained["a"] = [trained["a"][i] for i in (2, 0, 1)]
        commas = [f"{name}={','.join(map(str, folders))}" for name, folders in trained.items()]
        found = json.loads(run_cli("compare", *commas, "--pair-seeds", "--json").stdout)
        row = found["figures"]["coverage"]["rows"][1]
        rows = [as_rows(np.array([values(f, "coverage") for f in folders])) for folders in trained.values()]
        draws = resampled(rows[1], mean, resamples=10_000, seed=0) - resampled(rows[0], mean, resamples=10_000, seed=0)
        differences = mean(rows[1].sum(axis=1)) - mean(rows[0].sum(axis=1))
        interval, p = estimate(Seeds(differences, draws), prompts=40, level=0.95)
        assert [row["difference"][key] for key in ("value", "low", "high")] == pytest.approx(interval)
        assert row["difference"]["p_bootstrap"] == pytest.approx(p)
        assert row["difference"]["p_randomisation"] == pytest.approx(0.25)
        plain = json.loads(run_cli("compare", *commas, "--json").stdout)
        of_b = plain["figures"]["coverage"]["rows"][1]
        assert [row[key] for key in ("value", "low", "high")] == [of_b[key] for key in ("value", "low", "high")]
        assert row["difference"]["low"] != of_b["difference"]["low"]
        assert found["tests"]["pair_seeds"] is True and plain["tests"]["pair_seeds"] is False
        notes = " ".join(found["tests"]["notes"])
        assert "seeds in pairs, in the order given" in notes and "no p-value below 0.25" in notes
        shown = run_cli("compare", *commas, "--pair-seeds", "--test", "randomisation").stdout
        assert "of seeds sides of the pairs swapped" in shown

    def test_what_has_no_partner_is_refused(self, trained, tmp_path, run_cli):
        given = [f"a={','.join(map(str, trained['a']))}", f"b={','.join(map(str, trained['b'][:2]))}"]
        refused = run_cli("compare", *given, "--pair-seeds", "-o", tmp_path / "table.json")
        assert refused.exit_code == 2 and "seeds cannot be paired: b has 2, a has 3" in refused.stderr
        assert not list(tmp_path.glob("table.json*"))

    def test_a_bound_is_noted_where_every_permutation_is_counted(self, trained, tmp_path, run_cli):
        given = []
        for name, folders in trained.items():
            copies = [shutil.copytree(folders[n % 3], tmp_path / f"copy_{name}_{n}") for n in range(5)]
            given.append(f"{name}={','.join(map(str, copies))}")
        assert "permuting 5 and 5 seeds" in run_cli("compare", *given, "--resamples", 252).stdout
        assert "permuting 5 and 5 seeds" not in run_cli("compare", *given, "--resamples", 251).stdout

    def test_one_model_against_several_trainings(self, trained, run_cli):
        result = run_cli("compare", trained["a"][0], f"b={','.join(map(str, trained['b']))}", "--json")
        found = json.loads(result.stdout)
        assert found["figures"]["coverage"]["rows"][1]["difference"]["p_randomisation"] is None
        notes = " ".join(found["tests"]["notes"])
        assert "one seed: a0; its results hold for that one model" in notes and "no randomisation for b" in notes
        shown = run_cli("compare", trained["a"][0], f"b={','.join(map(str, trained['b']))}", "--test", "randomisation")
        assert shown.exit_code == 0 and "Holm over 0 tests" in shown.stdout
        assert [cell.strip() for cell in shown.stdout.splitlines()[4].split("|")[-4:-1]] == ["-", "-", ""]

    def test_one_model_twice_is_no_second_training(self, trained, run_cli):
        for folder in trained["b"][:2]:
            rewrite(folder / "scores.json", lambda scores: scores.update(model={"path": "m", "sha256": "ab"}))
        given = [trained["a"][0], f"b={','.join(map(str, trained['b']))}"]
        refused = run_cli("compare", *given)
        assert refused.exit_code == 2 and "two seeds of b are one model" in refused.stderr
        assert run_cli("compare", *given, "--force").exit_code == 0

    def test_a_seed_with_other_prompts(self, trained, evaluated, run_cli):
        short = evaluated("short", 0.5, metrics="coverage", limit=30)
        refused = run_cli("compare", trained["a"][0], f"b={trained['b'][0]}", f"b={short}")
        assert refused.exit_code == 2 and f"b ({short})" in refused.stderr and "10 ids only in a0" in refused.stderr


class TestMarkdown:
    def test_a_table_to_paste(self, evaluated, run_cli):
        a, b = evaluated("a", 0.4), evaluated("b", 0.9)
        result = run_cli(
            "compare",
            f"base|line={a}",
            f"b={b}",
            "--markdown",
            "--metrics",
            "coverage,rouge.rougeL",
            "--resamples",
            1000,
        )
        assert result.exit_code == 0, result.stderr
        *table, empty, footer = result.stdout.splitlines()
        assert empty == "" and len(table) == 6
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
        assert len({len(row) for row in rows}) == 1
        assert rows[0][:7] == ["figure", "n", "system", "seeds", "value", "95% interval", "minus base\\|line"]
        assert rows[2][:4] == ["coverage", "40", "base\\|line", "1"] and rows[3][:3] == ["", "", "b"]
        assert rows[3][-3:] == ["<0.001", "<0.002", "\\*\\*"] and rows[2][-3:] == ["", "", ""]
        assert "Holm over 2 tests" in footer and "1000 resamples, seed 0" in footer and "\\*\\* p < 0.01" in footer

    def test_the_texts_stand_below_it(self, evaluated, run_cli):
        a, b = evaluated("a", 0.4), evaluated("b", 0.9)

        def mark_up(rows):
            for row in rows:
                row["prompt"], row["prediction"] = "1 *star*\nand # <b>", "a_b_ [x](y) `c` \\| ~~z~~ &amp; $1$"

        for folder in (a, b):
            rewrite(folder / "predictions.jsonl", mark_up)
        systems = ("compare", f"b*s={a}", f"b={b}", "--markdown", "--metrics", "coverage")
        plain = run_cli(*systems)
        assert plain.exit_code == 0, plain.stderr
        result = run_cli(*systems, "--texts", 2)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(plain.stdout)
        text = r"a\_b\_ \[x\](y) \`c\` \\\| \~\~z\~\~ \&amp; \$1\$"
        shown = ["", r"### 1 \*star\* and \# \<b\>", "", rf"- b\*s: {text}", f"- b: {text}"]
        assert result.stdout[len(plain.stdout) :].splitlines() == 2 * shown

    def test_not_with_json(self, evaluated, run_cli):
        a, b = evaluated("a", 0.4), evaluated("b", 0.9)
        refused = run_cli("compare", a, b, "--json", "--markdown")
        assert refused.exit_code == 2 and "exclude each other" in refused.stderr


@pytest.mark.parametrize(
    ("p", "smallest", "shown"),
    [
        (0.0384, 1e-4, "0.0384"),
        (1 / 10_001, 1 / 10_001, "<0.0001"),
        (12 / 10_001, 12 / 10_001, "<0.0012"),
        (5 / 701, 5 / 701, "<0.0072"),
        (1 / 501, 1 / 501, "<0.002"),
        (3e-9, 0.0, "<0.0001"),
        (1.0, 1.2, "1.0000"),
        (None, 1e-4, "-"),
    ],
)
def test_how_a_p_value_looks(p, smallest, shown):
    assert numbers.p_value(p, smallest) == shown


class TestSettings:
    def test_other_decoding_and_other_data_are_warned_of(self, evaluated, run_cli):
        a, b = evaluated("a", 0.5), evaluated("b", 0.5)
        for folder, temperature, data in ((a, 0.0, "11"), (b, 0.7, "22")):
            about = {
                "decoding": {"temperature": temperature, "top_k": 0, "seed": temperature},
                "dataset": {"sha256": data},
            }
            rewrite(folder / "scores.json", lambda scores, about=about: scores.update(about))
        result = run_cli("compare", a, b)
        assert result.exit_code == 0
        assert "warning: other decoding: a with temperature 0.0; b with temperature 0.7" in result.stderr
        assert "b and a were scored on files that differ" in result.stderr
        assert "warning" not in run_cli("compare", a, f"again={a}").stderr


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
        refused = run_cli("compare")
        assert (
            refused.exit_code == 2 and "rlgf compare BASE OTHER" in refused.stderr and "--systems" not in refused.stderr
        )
        refused = run_cli("compare", a, "y=")
        assert refused.exit_code == 2 and "a folder is missing in 'y='" in refused.stderr
        refused = run_cli("compare", a, a / "predictions.jsonl")
        assert refused.exit_code == 2 and "this is a file" in refused.stderr and "--predictions" in refused.stderr
        refused = run_cli("compare", f"x={a}", f"x={a.parent}", f"y={a}")
        assert refused.exit_code == 2 and "'x' has this evaluation twice" in refused.stderr
        refused = run_cli("compare", f"x={a}", f"x={evaluated('b', 0.5)}")
        assert refused.exit_code == 2 and "all folders are seeds of 'x'" in refused.stderr

    def test_a_used_output(self, evaluated, tmp_path, run_cli):
        a, out = evaluated("a", 0.5), tmp_path / "c.json"
        arguments = ["compare", f"x={a}", f"y={a}", "-o", out]
        assert run_cli(*arguments).exit_code == 0
        refused = run_cli(*arguments)
        assert refused.exit_code == 2 and "--overwrite" in refused.stderr and "--resume" not in refused.stderr
        assert run_cli(*arguments, "--overwrite").exit_code == 0

    def test_folders_of_one_name_keep_their_paths(self, evaluated, tmp_path, run_cli):
        a, b = evaluated("a", 0.5), tmp_path / "other" / "a"
        shutil.copytree(a, b)
        done = run_cli("compare", a, b, "--json")
        assert done.exit_code == 0 and set(json.loads(done.stdout)["systems"]) == {str(a), str(b)}

    def test_damaged_files(self, evaluated, tmp_path, run_cli):
        """Each ends with an error message and exit code 2, and writes nothing."""
        a, b, out = evaluated("a", 0.5), evaluated("b", 0.5), tmp_path / "c.json"
        predictions, scores = b / "predictions.jsonl", b / "scores.json"
        good = {path: path.read_text() for path in (predictions, scores)}

        def refused(path: Path, text: str, message: str) -> None:
            for each, content in good.items():
                each.write_text(content)
            path.write_text(text)
            result = run_cli("compare", a, b, "-o", out)
            assert result.exit_code == 2 and message in result.stderr and result.stdout == "", result.stderr
            assert not out.exists() and not Path(f"{out}.run.json").exists()

        lines = good[predictions].splitlines(keepends=True)
        number = re.compile(r'"coverage": [\d.]+')
        refused(predictions, "", "the file holds no predictions")
        refused(predictions, number.sub('"coverage": NaN', good[predictions]), "NaN is not JSON")
        refused(predictions, number.sub('"coverage": 1e999', good[predictions]), "1e999 is too large for a number")
        refused(predictions, number.sub('"other": 1', good[predictions], count=1), "'toy-0-0' has no score coverage")
        refused(predictions, number.sub('"coverage": null', good[predictions]), "no prompt has a value of coverage")
        refused(predictions, lines[0] + good[predictions], "the id 'toy-0-0' is empty or here twice")
        refused(predictions, "".join(lines[1:]), "scored on other prompts: 1 ids only in a")
        refused(scores, good[scores][:-9], "not JSON")
        refused(scores, "[]", "these are no scores of rlgf eval")
        refused(scores, '{"metrics": {"coverage": {"value": 1}}}', "metrics.coverage.signature: field required")
        changed = json.loads(good[scores])
        changed["metrics"]["coverage"]["value"] = float("nan")
        refused(scores, json.dumps(changed), "metrics.coverage.value")
        changed["metrics"]["coverage"].update(value=0.5, aggregate=None)
        refused(scores, json.dumps(changed), "coverage is made in different ways: mean in a, None in b")
