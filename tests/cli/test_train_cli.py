"""`rlgf train` on bad input: exit 2 (1 where the user's own code fails), one clear message, nothing left behind."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from conftest import toy_examples, write_rows


@pytest.fixture
def task(tmp_path: Path) -> Path:
    examples = toy_examples(6)
    write_rows(tmp_path / "train.jsonl", examples)
    rows = [{"id": e["id"], "prompt": e["prompt"], "completion": e["references"][0]} for e in examples]
    write_rows(tmp_path / "guide.jsonl", rows)
    write_rows(tmp_path / "some.jsonl", rows[:2])
    write_rows(tmp_path / "none.jsonl", [{**row, "id": f"x{i}", "prompt": "other"} for i, row in enumerate(rows)])
    return tmp_path


@pytest.fixture
def train(run_cli, task: Path, tiny_gpt2: Path):
    """``train(key=value, ...)`` runs a short ppo; keys replace or add flags (None drops one)."""

    def run(*more: object, **flags: object):
        settings = {
            "alg": "ppo", "model": tiny_gpt2, "data": task / "train.jsonl", "reward": "coverage", "max-steps": 1,
            "episodes": 4, "batch-size": 4, "max-new-tokens": 6, "output-dir": task / "run",
            **{name.replace("_", "-"): value for name, value in flags.items()},
        }  # fmt: skip
        arguments = [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]
        return run_cli("train", *arguments, *more)

    return run


def refused(done, task: Path, *words: str, code: int = 2) -> None:
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert not (task / "run").exists(), "something was left behind"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"alg": "pppo"}, ["unknown algorithm 'pppo'", "did you mean 'ppo'"]),
        ({"reward": "ruge"}, ["unknown reward 'ruge'", "did you mean 'rouge'"]),
        ({"alg": "ppo++"}, ["'ppo++' needs a guide", "--guide"]),
        ({"rollin_prob": 0.5}, ["'ppo' has no parameter 'rollin_prob'"]),
        ({"alg": "grpo", "group_size": 3}, ["not a multiple of the group size"]),
        ({"batch_size": 8}, ["minibatch_size (8) is larger than rollout.episodes (4)"]),
        ({"model": "runs/missing"}, ["runs/missing", "no such checkpoint folder"]),
        ({"data": "missing.jsonl"}, ["missing.jsonl", "no such file"]),
        ({"max_new_tokens": 80}, ["the model has 64 positions"]),
        ({"device": "tpu9"}, ["tpu9"]),
    ],
)
def test_what_the_flags_ask_for_cannot_be(train, task, flags, words):
    refused(train(**flags), task, *words)


def test_a_config_key_that_does_not_exist_is_named_with_its_line(train, task):
    recipe = task / "r.yaml"
    recipe.write_text("ppo:\n  gamma: 1.0\n  clip_rnge: 0.2\n")
    refused(train("-c", recipe), task, "'ppo.clip_rnge'", f"{recipe}:3", "did you mean 'clip_range'")


@pytest.mark.parametrize("alg", ["aggrevated", "lols", "d2lols", "dagger"])
def test_a_recorded_guide_cannot_go_on_from_the_policys_text(train, task, alg, monkeypatch):
    import rlgf_cli.stages.train as stage

    monkeypatch.setattr(stage, "load", lambda *_, **__: pytest.fail("a model was loaded before the guide was checked"))
    refused(train(alg=alg, guide=task / "guide.jsonl"), task, "only has recorded text", "hf:PATH")


@pytest.mark.parametrize(("step", "warned"), [(1, False), (2, True)])
def test_a_switch_that_would_never_take_place(train, tiny_gpt2, step, warned):
    done = train("--switch-step", step, "--max-steps", 2, "--dry-run", alg="d2lols", guide=f"hf:{tiny_gpt2}")
    assert done.exit_code == 0, done.stderr
    assert (f"never switch to its second part: switch_step is {step}, and max_steps 2" in done.stderr) == warned


def test_a_guide_file_that_covers_no_prompt(train, task):
    refused(train(alg="ppo++", guide=task / "none.jsonl"), task, "covers none of the 6 prompts")


@pytest.mark.parametrize(("choice", "text"), [("unguided", "4 prompts have no guide text and run unguided"),
                                              ("drop", "4 prompts have no guide text and are left out")])  # fmt: skip
def test_a_guide_file_that_covers_some(train, task, choice, text):
    done = train(alg="ppo++", guide=task / "some.jsonl", on_uncovered=choice)
    assert done.exit_code == 0, done.stderr
    assert text in done.stderr
    row = json.loads((task / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["guide/requests"] <= 4
    if choice == "drop":
        rollouts = (task / "run" / "rollouts" / "step_1.jsonl").read_text().splitlines()
        assert {json.loads(line)["id"] for line in rollouts} <= {"toy-0-0", "toy-0-1"}


def test_bad_lines_of_the_data(train, task):
    data = task / "bad.jsonl"
    data.write_text('{"prompt": "cat sees"}\n{"prompt": \n')
    refused(train(data=data), task, f"{data}:2", "not JSON")
    data.write_text('{"prompt": "cat sees"}\n{"text": "x"}\n')
    refused(train(data=data), task, f"{data}:2", "'prompt' is missing")
    data.write_text('{"prompt": "  "}\n')
    refused(train(data=data), task, f"{data}:1", "'prompt' is empty")
    data.write_text("")
    refused(train(data=data), task, str(data), "no records")


def test_a_folder_that_is_no_checkpoint(train, task):
    (task / "empty").mkdir()
    refused(train(model=task / "empty"), task, "no model checkpoint")


def test_a_tokenizer_that_does_not_fit_the_model(train, task, tiny_gpt2):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_gpt2, task / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(20)])
    tokenizer.save_pretrained(task / "model")
    refused(train(model=task / "model"), task, "tokenizer and model do not fit")


def test_prompts_that_are_too_long(train, task):
    examples = toy_examples(4)
    examples[1]["prompt"] = "cat sees garden " * 30
    data = write_rows(task / "long.jsonl", examples)
    refused(train(data=data), task, "'toy-0-1'", "there is room for 58", "truncate or skip")
    for choice, text in (("truncate", "1 prompts were truncated"), ("skip", "1 prompts were too long")):
        done = train(data=data, on_overlong=choice, output_dir=task / choice)
        assert done.exit_code == 0, done.stderr
        assert text in done.stderr


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("return float('nan')", "nan"),
        ("return 'good'", "good"),
    ],
)
def test_a_reward_that_fails_is_an_error_with_its_example(train, task, body, reason):
    (task / "mine.py").write_text(f"def score(text):\n    {body}\n")
    done = train(reward=f"{task / 'mine.py'}:score")
    assert done.exit_code == 1
    assert "toy-0-" in done.stderr
    assert reason in done.stderr.lower() or reason in done.stderr
    assert json.loads((task / "run" / "run.json").read_text())["status"] == "failed"


def test_a_batched_reward_with_the_wrong_count(train, task):
    (task / "mine.py").write_text("def score(texts):\n    return [0.0]\n")
    done = train(reward=f"{task / 'mine.py'}:score")
    assert done.exit_code == 1
    assert "1" in done.stderr and "4" in done.stderr


def test_a_used_folder_is_refused_with_the_three_ways_out(train, task):
    assert train().exit_code == 0
    before = (task / "run" / "metrics.jsonl").read_bytes()
    done = train()
    assert done.exit_code == 2
    assert all(way in done.stderr for way in ("--resume", "--overwrite", "another -o"))
    assert (task / "run" / "metrics.jsonl").read_bytes() == before
    (task / "run" / "eval").mkdir()
    assert train("--overwrite").exit_code == 0
    assert (task / "run" / "eval").is_dir()


def test_a_full_disk(train, task, monkeypatch):
    import rlgf_cli.training.checkpoint as checkpoint

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(task / "run" / "x"))

    monkeypatch.setattr(checkpoint, "save_file", full)
    done = train()
    assert done.exit_code == 2
    assert "no space left" in done.stderr.lower()
    assert not list((task / "run").glob("checkpoints/step_*")), "a half-written checkpoint must not exist"
