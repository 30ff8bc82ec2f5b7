"""``rlgf eval`` on the command line: what it writes, prints and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlgf_cli.artifacts.jsonl import read_examples, read_records
from rlgf_cli.artifacts.records import PredictionRecord

GENERATE = ["--max-new-tokens", 8, "--device", "cpu"]


def rows_of(path: Path) -> list[dict]:
    return [record.model_dump() for record in read_records(path, PredictionRecord)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def copies(examples_file: Path, tmp_path: Path) -> Path:
    """Predictions that copy each reference, but for an empty one."""
    examples = read_examples(examples_file)
    rows = [{"id": e.id, "text": e.references[0]} for e in examples]
    rows[0]["text"] = ""
    return write(tmp_path / "copies.jsonl", rows)


class TestModel:
    def test_greedy_evaluation(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        out = tmp_path / "eval"
        arguments = ["eval", "--model", tiny_gpt2, "--data", examples_file, "--metrics", "rouge,reward:coverage,length"]
        result = run_cli(*arguments, "-o", out, "-L", 12, *GENERATE)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith("| metric") and "95% interval" in result.stdout
        assert "reward.total" in result.stdout and "wrote" in result.stderr
        scores = json.loads((out / "scores.json").read_text())
        predictions = rows_of(out / "predictions.jsonl")
        assert [p["id"] for p in predictions] == [f"toy-0-{i}" for i in range(12)]
        for name, entry in scores["metrics"].items():
            values = [p["scores"][name] for p in predictions]
            assert entry["value"] == pytest.approx(sum(values) / 12)
            assert entry["low"] <= entry["value"] <= entry["high"]
            assert (entry["n"], entry["n_skipped"]) == (12, 0) and entry["signature"].endswith("n=12")
        assert scores["decoding"]["temperature"] == 0 and scores["decoding"]["max_new_tokens"] == 8
        assert scores["decoding"]["text"]["response_prefix"] == " "
        counts = scores["counts"]
        assert counts["texts"] == 12 and counts["truncated"] == counts["skipped"] == 0
        assert counts["cut"] == sum(p["finish_reason"] == "length" for p in predictions) > 0
        assert counts["empty"] == sum(not p["prediction"].strip() for p in predictions)
        run = json.loads((out / "run.json").read_text())
        assert run["command"] == "eval" and run["status"] == "done" and run["device"] == "cpu"
        assert {parent["sha256"] for parent in run["parents"]} == {
            scores["dataset"]["sha256"],
            scores["model"]["sha256"],
        }
        assert run["result"]["reward.total"] == scores["metrics"]["reward.total"]["value"]

    def test_the_default_output_lies_in_the_model_and_json_is_the_scores(
        self, tiny_gpt2, examples_file, tmp_path, run_cli
    ):
        model = shutil.copytree(tiny_gpt2, tmp_path / "model")
        result = run_cli("eval", "--model", model, "--data", examples_file, "-L", 3, *GENERATE, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout) == json.loads((model / "eval" / "scores.json").read_text())

    def test_same_texts_whatever_the_batch(self, any_model, examples_file, tmp_path, run_cli):
        texts = []
        for size in (1, 8):
            out = tmp_path / str(size)
            arguments = ["eval", "--model", any_model, "--data", examples_file, "-o", out, "-L", 6, *GENERATE]
            assert run_cli(*arguments, "--temperature", 1, "--batch-size", size).exit_code == 0
            texts.append([p["prediction"] for p in rows_of(out / "predictions.jsonl")])
        assert texts[0] == texts[1] and len(set(texts[0])) > 1

    def test_prompts_that_are_too_long_are_skipped_and_counted(self, tiny_gpt2, tmp_path, run_cli):
        rows = [{"id": "short", "prompt": "cat", "references": ["a cat"]}]
        rows.append({"id": "long", "prompt": "garden " * 100, "references": ["a garden"]})
        data = write(tmp_path / "data.jsonl", rows)
        arguments = ["eval", "--model", tiny_gpt2, "--data", data, "-o", tmp_path / "out", *GENERATE]
        refused = run_cli(*arguments)
        assert refused.exit_code == 2 and "'long'" in refused.stderr and not (tmp_path / "out").exists()
        assert run_cli(*arguments, "--on-overlong", "skip").exit_code == 0
        counts = json.loads((tmp_path / "out" / "scores.json").read_text())["counts"]
        assert (counts["skipped"], counts["texts"]) == (1, 1)

    def test_one_text_has_no_interval(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        out = tmp_path / "out"
        result = run_cli("eval", "--model", tiny_gpt2, "--data", examples_file, "-o", out, "-L", 1, *GENERATE)
        assert result.exit_code == 0, result.stderr
        entry = json.loads((out / "scores.json").read_text())["metrics"]["rouge.rougeL"]
        assert entry["low"] is entry["high"] is None and "nan" not in result.stdout.lower()


class TestResume:
    def test_a_failed_metric_does_not_lose_the_texts(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        function = tmp_path / "mine.py"
        function.write_text("def f(text): return 1 / 0")
        out = tmp_path / "out"
        arguments = ["eval", "--model", tiny_gpt2, "--data", examples_file, "-o", out, "-L", 4, *GENERATE]
        failed = run_cli(*arguments, "--metrics", f"rouge,{function}:f")
        assert failed.exit_code == 1 and "ZeroDivisionError" in failed.stderr
        assert json.loads((out / "run.json").read_text())["status"] == "failed"
        assert not (out / "scores.json").exists()
        rows = rows_of(out / "predictions.jsonl")
        assert len(rows) == 4
        rows[1]["prediction"] = "not what the model would write again"
        write(out / "predictions.jsonl", rows)
        resumed = run_cli(*arguments, "--metrics", "length", "--resume")
        assert resumed.exit_code == 0 and "4 texts are there already" in resumed.stderr
        assert [p["prediction"] for p in rows_of(out / "predictions.jsonl")] == [row["prediction"] for row in rows]
        found = json.loads((out / "scores.json").read_text())["metrics"]
        assert list(found) == ["length.words", "length.characters", "length.ratio"]

    def test_a_failed_metric_does_not_lose_what_was_scored_before(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        function = tmp_path / "mine.py"
        function.write_text("def f(text): return 1 / 0")
        out = tmp_path / "out"
        arguments = ["eval", "--model", tiny_gpt2, "--data", examples_file, "-o", out, "-L", 4, *GENERATE]
        assert run_cli(*arguments, "--metrics", "rouge,bleu").exit_code == 0
        before = (out / "predictions.jsonl").read_bytes(), (out / "scores.json").read_bytes()
        assert run_cli(*arguments, "--metrics", f"rouge,{function}:f", "--resume").exit_code == 1
        assert ((out / "predictions.jsonl").read_bytes(), (out / "scores.json").read_bytes()) == before

    def test_texts_of_other_weights_or_other_data_are_not_kept(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        import torch
        from safetensors.torch import load_file, save_file

        model, out = shutil.copytree(tiny_gpt2, tmp_path / "model"), tmp_path / "out"
        arguments = ["eval", "--model", model, "--data", examples_file, "-o", out, "-L", 4, *GENERATE]
        assert run_cli(*arguments).exit_code == 0
        rows = rows_of(out / "predictions.jsonl")
        write(out / "predictions.jsonl", rows[:3])
        refused = run_cli(*arguments, "--resume")
        assert refused.exit_code == 2 and "not for this data" in refused.stderr
        write(out / "predictions.jsonl", rows)
        weights = load_file(model / "model.safetensors")
        weights["transformer.ln_f.bias"] += torch.ones(32)
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        refused = run_cli(*arguments, "--resume")
        assert refused.exit_code == 2 and "the model changed" in refused.stderr
        assert run_cli(*arguments, "--overwrite").exit_code == 0

    def test_other_decoding_is_refused(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        arguments = ["eval", "--model", tiny_gpt2, "--data", examples_file, "-o", tmp_path / "out", "-L", 4, *GENERATE]
        assert run_cli(*arguments).exit_code == 0
        refused = run_cli(*arguments, "--resume", "--temperature", 0.5)
        assert refused.exit_code == 2 and "decoding.temperature" in refused.stderr

    def test_a_used_folder(self, copies, examples_file, tmp_path, run_cli):
        arguments = ["eval", "--predictions", copies, "--data", examples_file, "-o", tmp_path / "out"]
        assert run_cli(*arguments).exit_code == 0
        refused = run_cli(*arguments)
        assert refused.exit_code == 2 and "--overwrite" in refused.stderr
        assert run_cli(*arguments, "--overwrite", "--metrics", "length").exit_code == 0


class TestPredictions:
    def test_scored_with_the_datas_references(self, copies, examples_file, tmp_path, run_cli):
        out = tmp_path / "out"
        result = run_cli("eval", "--predictions", copies, "--data", examples_file, "-o", out)
        assert result.exit_code == 0, result.stderr
        scores = json.loads((out / "scores.json").read_text())
        assert scores["metrics"]["rouge.rougeL"]["value"] == pytest.approx(39 / 40)
        assert scores["counts"]["empty"] == 1 and "empty 1" in result.stderr
        assert scores["decoding"] is None and scores["predictions"]["sha256"]

    def test_its_own_output_is_input_again(self, copies, examples_file, tmp_path, run_cli):
        first, second = tmp_path / "one", tmp_path / "two"
        assert run_cli("eval", "--predictions", copies, "--data", examples_file, "-o", first).exit_code == 0
        assert run_cli("eval", "--predictions", first / "predictions.jsonl", "-o", second).exit_code == 0
        means = [json.loads((f / "scores.json").read_text())["metrics"] for f in (first, second)]
        assert means[0] == means[1]

    def test_limit_counts_answers_of_the_data(self, copies, examples_file, tmp_path, run_cli):
        out = tmp_path / "out"
        assert run_cli("eval", "--predictions", copies, "--data", examples_file, "-o", out, "-L", 5).exit_code == 0
        assert [p["id"] for p in rows_of(out / "predictions.jsonl")] == [f"toy-0-{i}" for i in range(5)]

    def test_a_recipe_with_a_weighted_reward(self, copies, examples_file, tmp_path, run_cli):
        recipe = tmp_path / "eval.yaml"
        recipe.write_text(
            "metrics:\n  - reward:coverage\n"
            "  - {name: 'reward:length', weight: 0.5, params: {max_words: 0}}\n"
            "interval: {level: 0.9, resamples: 500}\n"
        )
        out = tmp_path / "out"
        result = run_cli("eval", "-c", recipe, "--predictions", copies, "--data", examples_file, "-o", out)
        assert result.exit_code == 0, result.stderr
        assert "90% interval" in result.stdout
        for row in rows_of(out / "predictions.jsonl"):
            s = row["scores"]
            assert s["reward.total"] == pytest.approx(s["reward.coverage"] + 0.5 * s["reward.length"])


class TestBadInput:
    """Exit code 2 (1 for a broken reward), a clear message, nothing left behind."""

    @pytest.mark.parametrize(
        ("metrics", "message", "hint"),
        [
            ("rogue", "unknown metric 'rogue'", "'rouge'"),
            ("reward:coverag", "unknown reward 'coverag'", "'coverage'"),
            ("rouge,none.py:f", "no such file", None),
            (" , ", "no metric", None),
        ],
    )
    def test_metrics(self, copies, examples_file, tmp_path, run_cli, metrics, message, hint):
        out = tmp_path / "out"
        arguments = ["eval", "--predictions", copies, "--data", examples_file, "--metrics", metrics, "-o", out]
        result = run_cli(*arguments)
        assert result.exit_code == 2 and message in result.stderr and (hint or "") in result.stderr
        assert result.stdout == "" and not out.exists()

    def test_ids_that_do_not_match(self, copies, examples_file, tmp_path, run_cli):
        lines = copies.read_text().splitlines(keepends=True)
        out = tmp_path / "out"
        cases = {
            "2 of 40 examples have no prediction: 'toy-0-0', 'toy-0-1'": lines[2:],
            "1 of 41 predictions belong to no example": [*lines, '{"id": "other", "text": "x"}\n'],
            "1 of 41 predictions are for an example that has one already": [*lines, lines[0]],
            "holds no predictions": [],
        }
        for message, content in cases.items():
            copies.write_text("".join(content))
            result = run_cli("eval", "--predictions", copies, "--data", examples_file, "-o", out)
            assert result.exit_code == 2 and message in result.stderr
            assert not out.exists()
        copies.write_text("".join(lines[2:]))
        arguments = ["eval", "--predictions", copies, "--data", examples_file, "-o", out, "--on-missing", "skip"]
        assert run_cli(*arguments).exit_code == 0
        assert json.loads((out / "scores.json").read_text())["counts"]["missing"] == 2

    def test_no_references_at_all(self, tmp_path, run_cli):
        texts = write(tmp_path / "texts.jsonl", [{"prompt": "p", "text": "t"}])
        result = run_cli("eval", "--predictions", texts, "-o", tmp_path / "out")
        assert result.exit_code == 2 and "needs references" in result.stderr and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("def f(text): return float('nan') if not text else 1.0", "nan"),
            ("def f(text): return 1 / len(text)", "ZeroDivisionError"),
            ("def f(texts): return [1.0] * 39", "39 scores for 40 texts"),
        ],
    )
    @pytest.mark.parametrize("prefix", ["", "reward:"])
    def test_a_broken_reward_is_exit_1_with_the_example(
        self, copies, examples_file, tmp_path, run_cli, body, reason, prefix
    ):
        (tmp_path / "mine.py").write_text(body)
        arguments = ["--predictions", copies, "--data", examples_file, "--metrics", f"{prefix}{tmp_path}/mine.py:f"]
        result = run_cli("eval", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 1
        assert reason in result.stderr and "example 'toy-0-0'" in result.stderr and "text: (empty)" in result.stderr
        assert not (tmp_path / "out" / "scores.json").exists()

    def test_model_and_predictions(self, tiny_gpt2, copies, examples_file, tmp_path, run_cli):
        for arguments in (
            ["--model", tiny_gpt2, "--predictions", copies, "--data", examples_file],
            ["--data", examples_file],
        ):
            result = run_cli("eval", *arguments, "-o", tmp_path / "out")
            assert result.exit_code == 2 and "one of the two" in result.stderr

    def test_what_has_no_default(self, tiny_gpt2, copies, examples_file, run_cli):
        result = run_cli("eval", "--predictions", copies, "--data", examples_file)
        assert result.exit_code == 2 and "-o" in result.stderr
        result = run_cli("eval", "--model", tiny_gpt2)
        assert result.exit_code == 2 and "--data" in result.stderr

    def test_the_input_is_not_overwritten(self, copies, examples_file, run_cli):
        before = copies.read_text()
        result = run_cli("eval", "--predictions", copies, "--data", examples_file, "-o", copies.parent)
        assert result.exit_code == 2 and "this input lies in the output" in result.stderr
        assert copies.read_text() == before

    def test_top_k_without_a_temperature_would_do_nothing(self, tiny_gpt2, examples_file, tmp_path, run_cli):
        arguments = ["eval", "--model", tiny_gpt2, "--data", examples_file, "-o", tmp_path / "out", "--top-k", 50]
        result = run_cli(*arguments)
        assert result.exit_code == 2 and "need a temperature above 0" in result.stderr

    def test_an_unknown_key(self, copies, tmp_path, run_cli):
        result = run_cli("eval", "--predictions", copies, "-o", tmp_path / "out", "--set", "decodin.temperature=1")
        assert result.exit_code == 2 and "'decoding'" in result.stderr


def test_print_config_shows_defaults_and_origins(tiny_gpt2, examples_file, run_cli):
    result = run_cli("eval", "--model", tiny_gpt2, "--data", examples_file, "--device", "cpu", "--print-config")
    assert result.exit_code == 0
    assert f"output: {tiny_gpt2}/eval" in result.stdout and "temperature: 0.0" in result.stdout
    assert "# model.name: flag" in result.stdout
    assert result.stdout.count("device: cpu") == 2
