"""``rlgf report``: what the page says of runs, also of unfinished, odd and very long ones, and what is refused."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from conftest import toy_examples, write_rows
from reporting import NASTY, comparison, episode, evaluate, rows, write_run


class Text(HTMLParser):
    """The words of a page, the tags in it, and its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)

    def __str__(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def report(run_cli, tmp_path):
    """``report(arguments)`` writes a page and parses it."""

    def make(*arguments: object) -> Text:
        done = run_cli("report", *arguments, "-o", tmp_path / "out" / "page.html")
        assert done.exit_code == 0, done.stderr
        assert done.stdout == f"{tmp_path / 'out' / 'page.html'}\n" and done.stderr == ""
        return Text((tmp_path / "out" / "page.html").read_text())

    return make


@pytest.fixture
def study(tmp_path, run_cli) -> Path:
    """A start and a guide that were evaluated, and two seeds of a training from the one by the other."""
    for name, keep in (("start", 0.3), ("guide", 0.6)):
        write_run(tmp_path / name, metrics=[], flags={"output": name})
        evaluate(run_cli, tmp_path / name / "eval", keep=keep)
    for seed in (0, 1):
        flags = {
            "model": str(tmp_path / "start"), "algorithm.name": "aggrevated", "guide.name": f"hf:{tmp_path / 'guide'}",
        }  # fmt: skip
        some = [episode("the prompt", ("policy", "we began"), ("guide", " and it ended"))]
        metrics = rows(40, lift=0.02, seed=seed)
        result = {"warning/negative-kl": 3}
        spend = {"calls": 120, "cached": 7, "charged_usd": 0.25, "usage": {"prompt_tokens": 900}}
        folder = write_run(
            tmp_path / f"run{seed}",
            metrics=metrics,
            episodes={1: some},
            flags=flags,
            seed=seed,
            result=result,
            spend=spend,
        )
        evaluate(run_cli, folder / "eval", keep=0.9)
    return tmp_path


class TestPage:
    def test_a_study_with_seeds_levels_texts_and_a_comparison(self, study, report):
        (study / "c.json").write_text(comparison(["start", "A"]))
        page = report(f"A={study / 'run0'}", f"A={study / 'run1'}", "--comparison", study / "c.json", "--texts", 5)
        said = str(page)
        guide = json.loads((study / "guide/eval/scores.json").read_text())["metrics"]["coverage"]["value"]
        assert 0.4 < guide < 0.75
        step = next(s for s in range(4, 41, 4) if 0.02 * s > guide)
        assert f"Level of the guide: {guide:.3f} (coverage, n = 20, from {study / 'guide' / 'eval'})" in said
        assert f"{step}, {step} " in said  # the step from which on it is above the guide, per seed
        assert "band: from the lowest to the highest seed" in said
        assert "The rows “ guide ”" in said.replace("“", "“ ").replace("”", " ”") or "“guide”" in said
        assert "5 of the 20 prompts that all evaluations have, drawn at random with seed 0, not chosen by hand" in said
        assert page.tags.count("article") == 5
        assert "guide and it ended" in said and "policy we began" in said  # the author's name stands before the words
        assert "seed 0: negative-kl (3 steps); A, seed 1: negative-kl (3 steps)." in said
        assert "0.2500" in said and "900" in said and "120" in said
        assert "+0.200" in said and "< 0.0001" in said and "Comparison with start" in said
        assert "Intervals of 95 %, 10000 resamples, seed 0." in said and '"resamples"' not in said  # words, no JSON
        assert "rouge.rougeL" in said and "coverage|" in said  # figures, and their signatures
        assert "torch" in said and "max_steps" in said and "flag" in said
        assert page.tags.count("svg") > 8 and page.tags.count("title") == page.tags.count("desc") + 1

    def test_the_same_prompts_for_the_same_seed(self, study, report):
        one, same, other = (report(study / "run0", "--texts", 4, "--seed", s) for s in (1, 1, 2))
        chosen = [[w for w in page.words if w.startswith("prompt toy")] for page in (one, same, other)]
        assert len(chosen[0]) == 4 and chosen[0] == chosen[1] != chosen[2]

    def test_plots_lie_beside_it(self, study, run_cli):
        done = run_cli("report", study / "run0", "--json")
        found = json.loads(done.stdout)
        assert found["path"] == str(study / "run0" / "report.html")
        names = {Path(p).name for p in found["plots"]}
        assert {"report-held-out.svg", "report-held-out.png", "report-score-kl.svg", "report-evaluation.png"} <= names
        assert names == {p.name for p in (study / "run0" / "plots").iterdir()}
        assert all(p.stat().st_size > 1000 for p in (study / "run0" / "plots").iterdir())

    def test_the_score_against_the_watched_figure_follows_the_held_out_score(self, study, run_cli):
        watched = rows(40)
        for row in watched:
            if "eval/score" in row:
                row["eval/watch"] = 0.6 - row["eval/score"] / 2
        flags = {"model": str(study / "start"), "watch": "coverage", "reward": "rougeL", "eval.data": "test.jsonl"}
        run = write_run(study / "watched", metrics=watched, flags=flags)
        other = evaluate(run_cli, study / "clone" / "eval", keep=0.5, metrics="coverage,reward:rougeL")
        done = run_cli("report", run, f"clone={other}", "-o", study / "page.html", "--json")
        assert done.exit_code == 0, done.stderr
        plots = [Path(path).name for path in json.loads(done.stdout)["plots"] if path.endswith(".svg")]
        assert plots[:3] == ["page-held-out.svg", "page-score-watched.svg", "page-training.svg"]
        html = (study / "page.html").read_text()
        ids = [html.index(f'<figure class="card" id="{name}">') for name in ("held-out", "score-watched", "training")]
        assert ids == sorted(ids)
        scores = json.loads((other / "scores.json").read_text())["metrics"]
        x, y = (scores[name]["value"] for name in ("reward.rougeL", "coverage"))
        said = str(Text(html))
        assert f"to 0.8 and 0.2; clone is at {x:.3g} and {y:.3g}." in said and "has gamed its reward" in said
        assert run_cli("report", study / "run0", "-o", study / "p.html").exit_code == 0
        assert "has gamed its reward" not in (study / "p.html").read_text()

    def test_evaluations_by_two_figures(self, study, report):
        said = str(report(study / "run0", "--score", "coverage", "--against", "rouge.rougeL"))
        assert "coverage against rouge.rougeL" in said and "rouge.rougeL (up) and coverage (to the right)" in said
        assert "coverage against" not in str(report(study / "run0", "--score", "coverage"))

    def test_a_report_is_replaced_and_another_file_is_not(self, study, run_cli):
        assert run_cli("report", study / "run0").exit_code == 0
        assert run_cli("report", study / "run0", "--title", "Anew").exit_code == 0
        page = study / "run0" / "report.html"
        assert "<h1><bdi>Anew</bdi></h1>" in page.read_text()
        page.write_text("mine")
        refused = run_cli("report", study / "run0")
        assert refused.exit_code == 2 and "was not written by rlgf report" in refused.stderr
        assert page.read_text() == "mine"

    def test_other_signatures_are_not_comparable(self, study, report, run_cli, tmp_path):
        recipe = tmp_path / "plain.yaml"
        recipe.write_text("metrics: [{name: rouge, params: {stemmer: false}}]")
        texts, data = study / "guide/eval-data/texts.jsonl", study / "guide/eval-data/test.jsonl"
        other = tmp_path / "other"
        done = run_cli("eval", "--predictions", texts, "--data", data, "-c", recipe, "-o", other)
        assert done.exit_code == 0, done.stderr
        assert "not comparable" not in str(report(study / "guide"))
        said = str(report(study / "guide", other))
        assert said.count("not comparable") >= 8 and "stemmer=no" in said and "stemmer=yes" in said

    def test_texts_of_a_guide_file(self, study, report):
        some = [{"prompt": e["prompt"], "completion": f"bought {i}"} for i, e in enumerate(toy_examples(20))]
        page = report(study / "run0", "--guide", write_rows(study / "guide.jsonl", some), "--texts", 3)
        assert sum(word.startswith("bought ") for word in page.words) == 3
        assert "has no text for any" in str(
            report(study / "run0", "--guide", write_rows(study / "g.jsonl", [{"prompt": "x", "completion": "y"}]))
        )

    def test_the_guides_level_from_a_folder(self, study, report):
        said = str(report(study / "run0", "--guide", study / "start"))
        assert f"from {study / 'start' / 'eval'}" in said and "Level of the guide" in said

    def test_a_start_that_was_made_anew_is_no_level(self, study, report):
        run = study / "run0" / "run.json"
        manifest = json.loads(run.read_text())
        manifest["parents"] = [{"path": str(study / "start"), "run_id": "another", "sha256": None}]
        run.write_text(json.dumps(manifest))
        said = str(report(study / "run0"))
        assert "Level of the start" not in said and "Level of the guide" in said

    def test_the_start_of_some_trainings_is_named_by_its_system(self, study, report):
        write_run(study / "other", flags={"model": "a-model-of-a-hub"})
        said = str(report(f"GRPO={study / 'other'}", study / "run0", f"clone={study / 'start'}"))
        assert "Level of the start: clone:" in said and "Level of the start:" not in said.replace("start: clone", "")

    def test_each_trainings_start_is_a_level_also_that_of_a_model_without_a_folder(self, study, report):
        write_run(study / "other", flags={"model": "a-model-of-a-hub"})
        evaluated = study / "start_eval"
        shutil.copytree(study / "guide" / "eval", evaluated)
        config = json.loads((evaluated / "config.resolved.json").read_text())
        config["values"]["model"] = {"name": "a-model-of-a-hub"}
        (evaluated / "config.resolved.json").write_text(json.dumps(config))
        said = str(report(f"GRPO={study / 'other'}", study / "run0", f"clone={study / 'start'}", f"start={evaluated}"))
        assert "Level of the start: clone:" in said
        assert f"n = 20, from {evaluated})" in said.partition("Level of the start: ")[2]

    def test_a_start_alone_is_no_guide(self, study, report):
        write_run(study / "other", flags={"model": "a-model-of-a-hub"})
        write_run(study / "third", flags={"model": str(study / "guide")})
        said = str(report(study / "other", study / "third"))
        assert "Level of the start: guide" in said
        assert "Passes the guide" not in said and "guide's level is not known" in said


class TestUnfinished:
    def test_a_run_in_progress(self, tmp_path, report):
        folder = write_run(tmp_path / "run", metrics=rows(12), status="running")
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 13, "sco')
        said = str(report(folder))
        assert "running, step 12 of 40" in said and "a killed run says “running” too" in said
        assert "not there: an evaluation" in said and "No rollouts were saved" in said
        assert "The guide's level is not known" in said

    @pytest.mark.parametrize("status", ["failed", "interrupted", "stopped"])
    def test_other_ends(self, tmp_path, report, status):
        assert f"{status}, step 3 of 40" in str(report(write_run(tmp_path / "run", metrics=rows(3), status=status)))

    def test_seeds_that_have_come_to_different_steps(self, tmp_path, report):
        a = write_run(tmp_path / "a", metrics=rows(20))
        b = write_run(tmp_path / "b", metrics=rows(8), seed=1, status="running")
        assert "have come to different steps (8, 20)" in str(report(f"x={a}", f"x={b}"))

    def test_seeds_without_a_common_step(self, tmp_path, report):
        a = write_run(tmp_path / "a", metrics=[row for row in rows(20) if row["step"] > 10])
        b = write_run(tmp_path / "b", metrics=rows(5), seed=1)
        assert "x" in str(report(f"x={a}", f"x={b}"))

    def test_an_evaluation_alone(self, tmp_path, report, run_cli):
        said = str(report(evaluate(run_cli, tmp_path / "m" / "eval", keep=0.5)))
        assert "coverage of rlgf eval" in said and "Learning" not in said and "Training episodes" not in said

    def test_a_training_without_held_out_data(self, tmp_path, report):
        bare = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows(5)]
        assert "There is no held-out score" in str(report(write_run(tmp_path / "r", metrics=bare)))


class TestTextsOfModels:
    def test_nothing_that_a_model_wrote_is_obeyed(self, tmp_path, report, run_cli):
        some = [episode(NASTY, ("guide", NASTY), ("policy", NASTY))]
        folder = write_run(tmp_path / "run", metrics=rows(4), episodes={1: some})
        evaluate(run_cli, folder / "eval", keep=0.5, texts=[NASTY] * 20)
        page = report(f"{NASTY[:30]}={folder}", "--title", NASTY)
        assert "script" not in page.tags and "img" not in page.tags
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        said = str(page)
        assert "<script>alert(1)</script>" in said and "{{ 7*7 }}" in said and "49" not in NASTY
        raw = (tmp_path / "out" / "page.html").read_text()
        assert "\x1b" not in raw and "\u202e" not in raw and "⟨U+202E⟩" in raw
        assert "more characters)" in said

    def test_there_is_nothing_to_load(self, study, report):
        page = report(study / "run0")
        links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "action", "data", "poster")]
        assert links and all(link is not None and link.startswith("#") for link in links)
        assert not {"script", "link", "iframe", "object", "img", "form"} & set(page.tags)
        raw = (study / "out" / "page.html").read_text()
        assert "@import" not in raw and "@font-face" not in raw


def test_a_very_long_run_stays_small(tmp_path, report):
    """100,000 rows, many systems and long texts: thinned, and below 5 MB."""
    some = [episode("p " * 5000, ("guide", "g " * 9000), ("policy", "q " * 9000)) for _ in range(16)]
    long = write_run(
        tmp_path / "long",
        metrics=rows(100_000, lift=1e-5, every=100),
        episodes={1: some, 51: some, 99: some},
    )
    arguments = [f"long={long}"]
    for i in range(5):
        metrics = rows(400, seed=i, lift=0.002, full=True)
        flags = {"kl": 0.01 * i + 0.01}
        folder = write_run(tmp_path / f"r{i}", metrics=metrics, episodes={1: some, 2: some}, flags=flags)
        arguments.append(f"system {i}={folder}")
    said = str(report(*arguments))
    size = (tmp_path / "out" / "page.html").stat().st_size
    assert size < 5_000_000
    assert "Thinned: a point is the mean of up to" in said


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda p: p / "none", ["no such folder", "name folders that rlgf train"]),
            (lambda p: write_rows(p / "guide.jsonl", [{}]), ["this is a file", "--guide takes a file"]),
            (lambda p: (p / "empty").mkdir() or p / "empty", ["holds no run", "run.json"]),
            (lambda p: write_run(p / "new", metrics=[]), ["nothing to show", "wait for the first step"]),
        ],
    )
    def test_what_is_no_run(self, tmp_path, run_cli, make, words):
        refused = run_cli("report", make(tmp_path))
        assert refused.exit_code == 2 and refused.stdout == ""
        for word in words:
            assert word in refused.stderr
        assert not list(tmp_path.rglob("report.html"))

    @pytest.mark.parametrize("name", ["run.json", "config.resolved.json"])
    def test_a_damaged_file(self, tmp_path, run_cli, name):
        folder = write_run(tmp_path / "run")
        (folder / name).write_text("{")
        refused = run_cli("report", folder)
        assert refused.exit_code == 2 and name in refused.stderr and "hint:" in refused.stderr

    @pytest.mark.parametrize(("entry", "words"), [({"value": None}, "valid number"), ({}, "field required")])
    def test_a_figure_without_a_value(self, tmp_path, run_cli, entry, words):
        folder = write_run(tmp_path / "run")
        evaluate(run_cli, folder / "eval", keep=0.9)
        path = folder / "eval" / "scores.json"
        scores = json.loads(path.read_text())
        del scores["metrics"]["coverage"]["value"]
        scores["metrics"]["coverage"].update(entry)
        path.write_text(json.dumps(scores))
        refused = run_cli("report", folder)
        assert refused.exit_code == 2 and "metrics.coverage.value" in refused.stderr and words in refused.stderr
        assert str(path) in refused.stderr and "run rlgf eval again" in refused.stderr
        assert not (folder / "report.html").exists()

    def test_a_figure_without_an_interval_is_shown(self, tmp_path, run_cli, report):
        folder = write_run(tmp_path / "run")
        evaluate(run_cli, folder / "eval", keep=0.9)
        path = folder / "eval" / "scores.json"
        scores = json.loads(path.read_text())
        for bound in ("low", "high"):
            del scores["metrics"]["coverage"][bound]
        path.write_text(json.dumps(scores))
        assert f"{scores['metrics']['coverage']['value']:.3f}" in str(report(folder))

    def test_a_damaged_line_of_metrics(self, tmp_path, run_cli):
        folder = write_run(tmp_path / "run")
        path = folder / "metrics.jsonl"
        path.write_text("{broken\n" + path.read_text())
        refused = run_cli("report", folder)
        assert refused.exit_code == 2 and "metrics.jsonl:1" in refused.stderr

    def test_flags(self, study, run_cli):
        run = study / "run0"
        (study / "x.json").write_text('{"figures": {}}')
        for arguments, words in (
            (["--score", "coverag"], "did you mean 'coverage'"),
            (["--against", "coverag"], "did you mean 'coverage'"),
            (["--against", "coverage"], "'coverage' would be drawn against itself"),
            (["--comparison", study / "x.json"], "this is no comparison: base"),
            (["--comparison", study / "none.json"], "no such file"),
            (["--guide", study / "nowhere"], "no such file or folder"),
            (["--guide", study], "there is no evaluation in it"),
            (["-o", study / "page.pdf"], "a report is an HTML file"),
            (["-o", study], "the output is a folder"),
            ([run], "named twice"),
        ):
            refused = run_cli("report", run, *arguments)
            assert refused.exit_code == 2 and words in refused.stderr, (arguments, refused.stderr)
        assert run_cli("report").exit_code == 2
        assert not (run / "report.html").exists() and not (run / "plots").exists()
