"""``rlgf make-negatives`` and ``rlgf postprocess`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import toy_examples, write_rows


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestMakeNegatives:
    def test_labelled_texts_that_a_seed_fixes_to_the_byte(self, examples_file, tmp_path, run_cli):
        out = [tmp_path / f"{i}.jsonl" for i in range(3)]
        for path, seed in zip(out, (3, 3, 4), strict=True):
            done = run_cli("make-negatives", "--data", examples_file, "--per-reference", 3, "--seed", seed, "-o", path)
            assert done.exit_code == 0 and done.stdout.strip() == str(path), done.stderr
        assert out[0].read_bytes() == out[1].read_bytes() != out[2].read_bytes()
        found = rows(out[0])
        good = [row for row in found if row["label"] == "good"]
        bad = [row for row in found if row["label"] == "bad"]
        assert len(good) == 40 and len(bad) == 120
        assert len({row["id"] for row in found}) == len(found)
        assert all(row["kind"] == "reference" and row["text"] == row["reference"] for row in good)
        assert all(row["text"].split() != row["reference"].split() for row in bad)
        manifest = json.loads((tmp_path / "0.jsonl.run.json").read_text())
        assert manifest["result"]["rows"] == 160 and sum(manifest["result"]["made"].values()) == 120

    def test_a_kind_of_ones_own_and_weights(self, examples_file, tmp_path, run_cli):
        own = tmp_path / "own.py"
        own.write_text("def shout(case, rng):\n    return case.good.upper()\n")
        recipe = tmp_path / "r.yaml"
        recipe.write_text(
            f"kinds: [{{name: '{own}:shout', severity: 0.5}}, {{name: cut_off, weight: 0.001}}]\ngood: false\n"
        )
        out = tmp_path / "n.jsonl"
        assert run_cli("make-negatives", "-c", recipe, "--data", examples_file, "-o", out).exit_code == 0
        assert [row["kind"] for row in rows(out)].count("shout") >= 38
        assert all(row["text"].isupper() for row in rows(out) if row["kind"] == "shout")

    def test_two_kinds_of_one_name(self, examples_file, tmp_path, run_cli):
        own = tmp_path / "own.py"
        own.write_text("def reference(case, rng):\n    return 'bad'\ndef cut_off(case, rng):\n    return 'bad'\n")
        for kinds, name in ((f"{own}:reference", "reference"), (f"cut_off,{own}:cut_off", "cut_off")):
            out = tmp_path / "n.jsonl"
            done = run_cli("make-negatives", "--data", examples_file, "--kinds", kinds, "-o", out)
            assert done.exit_code == 2 and f"another kind is called '{name}'" in done.stderr, done.stderr
            assert not out.exists()

    def test_the_policys_own_failures_by_rule(self, tmp_path, run_cli):
        examples = toy_examples(4)
        data = write_rows(tmp_path / "data.jsonl", examples)
        texts = ["fine as it is .", "it goes on and on and", "we go we go we go .", "  "]
        write_rows(
            tmp_path / "samples.jsonl",
            [
                {"id": e["id"], "prompt": e["prompt"], "prediction": t, "finish_reason": "stop", "sample_index": 0}
                for e, t in zip(examples, texts, strict=True)
            ]
            + [{"id": examples[1]["id"], "prompt": examples[1]["prompt"], "prediction": "and", "sample_index": 1}]
            + [{"id": "else", "prompt": "else", "prediction": "x"}],
        )
        out = tmp_path / "n.jsonl"
        done = run_cli("make-negatives", "--data", data, "--samples", tmp_path / "samples.jsonl", "--json", "-o", out)
        assert done.exit_code == 0, done.stderr
        own = [row for row in rows(out) if row["kind"] == "on_policy"]
        assert [(row["text"], row["rules"]) for row in own] == [
            ("it goes on and on and", ["unfinished"]),
            ("we go we go we go .", ["loops"]),
        ]
        counts = json.loads(done.stdout)["on_policy"]
        assert counts == {"made": 2, "empty": 1, "no_rule_broken": 1, "left_over": 1}
        assert "1 texts answer no prompt" in done.stderr

    @pytest.mark.parametrize(
        ("lines", "arguments", "message"),
        [
            ([{"prompt": "a"}, {"prompt": "b"}], [], "no example has a reference"),
            ([{"prompt": "a", "references": ["x y."]}], [], "one example is not enough"),
            ([], [], "holds no records"),
            (toy_examples(3), ["--kinds", "cut_of"], "did you mean 'cut_off'"),
            (toy_examples(3), ["--kinds", "cut_off,cut_off"], "named twice"),
            (toy_examples(3), ["--per-reference", "99"], "there are 9 kinds"),
            (toy_examples(3), ["--set", "kinds=[{name: cut_off, severity: 2}]"], "severity must be"),
            (toy_examples(3), ["--kinds", "shuffled_sentences", "--set", "good=false"], "no kind of failure"),
        ],
    )
    def test_bad_input_is_a_letter_and_leaves_nothing(self, lines, arguments, message, tmp_path, run_cli):
        data = write_rows(tmp_path / "data.jsonl", lines)
        out = tmp_path / "n.jsonl"
        done = run_cli("make-negatives", "--data", data, *arguments, "-o", out)
        assert done.exit_code == 2 and message in done.stderr, done.stderr
        assert not out.exists()


class TestPostprocess:
    def test_predictions_in_predictions_out_with_every_rule_counted(self, tmp_path, run_cli):
        source = write_rows(
            tmp_path / "predictions.jsonl",
            [
                {"id": "a", "prompt": "p", "prediction": "It ends. And then", "references": ["It ends."],
                 "finish_reason": "length", "scores": {"rouge.rouge1": 0.5}},
                {"id": "b", "prompt": "q", "prediction": "It is fine.", "finish_reason": "stop"},
                {"id": "c", "prompt": "r", "prediction": "go go go go go", "references": ["go"]},
            ],
        )  # fmt: skip
        out = tmp_path / "mended.jsonl"
        done = run_cli("postprocess", source, "-o", out, "--json")
        assert done.exit_code == 0, done.stderr
        assert [row["prediction"] for row in rows(out)] == ["It ends.", "It is fine.", "go"]
        assert [row["finish_reason"] for row in rows(out)] == [None, "stop", None]
        assert rows(out)[0]["scores"] == {} and rows(out)[0]["references"] == ["It ends."]
        found = json.loads(done.stdout)
        assert found["changed"] == 2
        assert found["rules"] == {"end_mark": 0, "repetition": 1, "repeats": 0, "unfinished": 1}

    def test_raw_and_mended_texts_are_compared(self, examples_file, tmp_path, run_cli):
        texts = [
            {"id": row["id"], "prediction": row["references"][0] + (" and it" if i % 2 else "")}
            for i, row in enumerate(toy_examples(40))
        ]
        raw = write_rows(tmp_path / "raw.jsonl", texts)
        mended = tmp_path / "mended.jsonl"
        assert run_cli("postprocess", raw, "-o", mended).exit_code == 0
        for name, file in (("raw", raw), ("mended", mended)):
            done = run_cli(
                "eval",
                "--predictions",
                file,
                "--data",
                examples_file,
                "--metrics",
                "failures,rouge_adjusted",
                "-o",
                tmp_path / name,
            )
            assert done.exit_code == 0, done.stderr
        done = run_cli("compare", tmp_path / "raw", tmp_path / "mended", "--json")
        figures = json.loads(done.stdout)["figures"]
        assert [row["value"] for row in figures["failures.unfinished"]["rows"]] == [0.5, 0.0]
        first, second = figures["rouge_adjusted.rouge1"]["rows"]
        assert second["value"] == pytest.approx(1.0) and first["value"] < 0.9

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--rules", "trim"], "needs max_words"),
            (["--rules", "cut"], "rules"),
            (["--rules", "unfinished,unfinished"], "named twice"),
        ],
    )
    def test_bad_rules(self, arguments, message, tmp_path, run_cli):
        source = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prediction": "x"}])
        done = run_cli("postprocess", source, *arguments, "-o", tmp_path / "o.jsonl")
        assert done.exit_code == 2 and message in done.stderr, done.stderr
        assert not (tmp_path / "o.jsonl").exists()
