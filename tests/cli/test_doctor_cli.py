"""`rlgf doctor`: what it says of a guide and a policy, each figure against one counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import make_tokenizer, toy_examples, write_rows
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.checks.guide_probe import GuideProbe
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Check
from rlgf_cli.stages import doctor as stage

TEXTS = [
    "the cat sees the river .",
    "in the house a dog finds it .",
    "👩\u200d👩\u200d👧 日本 café naïve",
    "the queen",
    "a",
]
"""One per prompt: known words, and characters of several bytes each; the last is too short to be cut without an EOS."""
NUDGE = "Go on exactly where it stops."
"""Words of the template by which a chat model is asked to continue."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "train.jsonl", toy_examples(6))


def recorded(path: Path, *, ends: str = "stop", texts: list[str] = TEXTS) -> Path:
    rows = [
        {"id": e["id"], "prompt": e["prompt"], "completion": text, "finish_reason": ends}
        for e, text in zip(toy_examples(6), texts, strict=False)
    ]
    return write_rows(path, rows)


@pytest.fixture
def doctor(run_cli, data: Path, tiny_gpt2: Path):
    """``doctor(guide, *flags)`` with the tiny GPT-2 as policy, unless a model is given."""

    def run(guide: object, *flags: object, model: object = tiny_gpt2):
        if "--max-new-tokens" not in flags:
            flags = (*flags, "--max-new-tokens", 50)  # the tiny models have 64 positions
        return run_cli("doctor", "--guide", guide, "--model", model, "--data", data, *flags)

    return run


def checks(done: Any) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    assert report["schema_version"] == 1
    return {check["name"]: check for check in report["checks"]}


def bytes_bpe(text: str) -> list[int]:
    return make_tokenizer()(" " + text, add_special_tokens=False)["input_ids"]


# --- a recorded guide


def test_a_recorded_guide_counted_by_hand(doctor, tmp_path: Path) -> None:
    guide = recorded(tmp_path / "guide.jsonl")
    with guide.open("a") as file:
        file.write(json.dumps({"id": "x", "prompt": "other", "completion": "  "}) + "\n")
    done = doctor(guide, "--max-new-tokens", 9, "--json")
    assert done.exit_code == 0, done.stderr
    found = checks(done)
    answers = found["guide.answers"]
    assert (answers["status"], answers["numbers"]["texts"]) == ("warn", 5)
    assert answers["finding"] == "1 of 6 prompts have no text in the file"
    assert found["guide.endings"]["numbers"] == {"stop": 5, "length": 0}
    assert (found["guide.empty"]["status"], found["guide.empty"]["numbers"]) == ("warn", {"empty": 1})
    sizes = sorted(len(bytes_bpe(text)) + 1 for text in TEXTS)
    over = sum(size > 9 for size in sizes)
    assert 0 < over < 5
    assert found["guide.length"]["numbers"] == {
        "min": sizes[0], "median": sizes[2], "max": sizes[4], "over": over, "short": 0,
    }  # fmt: skip
    assert found["tokens.round_trip"]["numbers"] == {"exact": 5, "lost": {}}  # byte-level: nothing can be lost
    cuts = found["tokens.cuts"]["numbers"]
    assert cuts["seams"] == cuts["exact"] == sum(len(bytes_bpe(text)) - 1 for text in TEXTS)
    assert (cuts["lost_by_tokenizer"], cuts["lost_at_seam"]) == (0, 0)
    assert 0 < found["tokens.stability"]["numbers"]["stable"] < 1
    assert "where a word ends" in found["tokens.stability"]["finding"]
    assert "guide.continuations" not in found  # recorded text goes on from nothing


def test_texts_that_were_cut_get_no_eos(doctor, tmp_path: Path) -> None:
    found = checks(doctor(recorded(tmp_path / "guide.jsonl", ends="length"), "--json"))
    assert (found["guide.endings"]["status"], found["guide.endings"]["numbers"]) == ("warn", {"stop": 0, "length": 5})
    sizes = [len(bytes_bpe(text)) for text in TEXTS]
    assert found["guide.length"]["numbers"]["max"] == max(sizes)
    assert found["guide.length"]["numbers"]["short"] == sum(size < 2 for size in sizes) == 1
    assert found["guide.length"]["numbers"]["over"] == 0  # of 50


def test_an_ending_that_a_text_spells_is_its_eos(doctor, tmp_path: Path) -> None:
    spelled = [TEXTS[0] + "<eos>", TEXTS[1] + " <eos>\n", *TEXTS[2:]]
    found = checks(doctor(recorded(tmp_path / "guide.jsonl", ends="length", texts=spelled), "--json"))
    assert found["guide.endings"]["numbers"] == {"stop": 2, "length": 3, "spelled": 2}
    assert "2 answers spelled their ending" in found["guide.endings"]["finding"]
    plain = checks(doctor(recorded(tmp_path / "plain.jsonl", ends="length"), "--json"))
    assert found["tokens.cuts"] == plain["tokens.cuts"]


def test_people_get_every_finding_with_its_reason_and_its_remedy(doctor, tmp_path: Path) -> None:
    guide = recorded(tmp_path / "guide.jsonl", ends="length")
    done = doctor(guide)
    assert done.exit_code == 0 and done.stderr == ""  # nobody was asked
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{guide} and ") and "on 6 prompts of" in lines[0]
    start = next(i for i, line in enumerate(lines) if line.startswith("warn  guide.endings: 0 of 5 texts ended"))
    assert lines[start + 1] == (
        "      a text that stopped gets an EOS, a text that was cut gets none: texts without an EOS teach no ending"
    )
    assert lines[start + 2].startswith("      remedy: a higher --max-new-tokens")
    for check in checks(doctor(guide, "--json")).values():
        assert f"{check['name']}: {check['finding']}" in done.stdout and check["explanation"] in done.stdout
        assert bool(check["remedy"]) == (check["status"] != "ok")


def test_limit_takes_the_first_prompts(doctor, tmp_path: Path) -> None:
    found = checks(doctor(recorded(tmp_path / "guide.jsonl"), "-L", 2, "--json"))
    assert found["guide.answers"]["numbers"]["prompts"] == found["guide.answers"]["numbers"]["texts"] == 2


def test_a_file_for_other_prompts_breaks_the_first_truth(doctor, tmp_path: Path) -> None:
    rows = [{"id": e["id"], "prompt": "other", "completion": "a text"} for e in toy_examples(6)]
    done = doctor(write_rows(tmp_path / "guide.jsonl", rows))
    assert done.exit_code == 1
    assert "error: 1 of 13 checks failed: guide.answers" in done.stderr and "hint: run collect-guide" in done.stderr
    assert "6 of 6 prompts have no text in the file; 6 have their id in the file with another prompt" in done.stdout


# --- a policy that loses something


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a SentencePiece-like vocabulary that knows the letters of the toy sentences alone."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from rlgf_cli.config.scratch import ScratchConfig
    from rlgf_cli.models.scratch import build_tokenizer

    folder = tmp_path_factory.mktemp("unigram")
    config = ScratchConfig(architecture="gpt2", tokenizer={"kind": "unigram", "vocab_size": 200})
    tokenizer = build_tokenizer(config, [e["references"][0] for e in toy_examples(200)])
    torch.manual_seed(0)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128, **ends)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_what_the_tokenizer_loses_is_its_own_and_shown(doctor, unigram: Path, tmp_path: Path) -> None:
    done = doctor(recorded(tmp_path / "guide.jsonl"), "--json", model=unigram)
    assert done.exit_code == 0, done.stderr
    found = checks(done)
    assert found["tokens.round_trip"]["numbers"] == {"exact": 4, "lost": {"unknown characters": 1}}
    assert found["tokens.round_trip"]["status"] == "warn"
    (sample,) = found["tokens.round_trip"]["samples"]
    assert (sample["lost"], sample["text"]) == ("by the tokenizer (unknown characters)", TEXTS[2])
    assert "日" not in sample["read back"] and "caf" in sample["read back"]
    cuts = found["tokens.cuts"]
    assert cuts["status"] == "ok" and cuts["numbers"]["lost_at_seam"] == 0
    assert cuts["numbers"]["lost_by_tokenizer"] > 0 and cuts["numbers"]["exact"] > 0
    assert [sample["lost"] for sample in cuts["samples"]] == ["by the tokenizer"]


def test_a_loss_at_the_seam_breaks_a_truth(doctor, unigram: Path, tmp_path: Path, monkeypatch) -> None:
    """With the dummy space that SentencePiece puts before every text, a word is split at every cut inside it."""
    guide = recorded(tmp_path / "guide.jsonl", texts=TEXTS[:2])
    monkeypatch.setattr(TextFormat, "encode_continuation", TextFormat.encode_response)
    done = doctor(guide, model=unigram)
    assert done.exit_code == 1
    assert "error: 1 of 18 checks failed: tokens.cuts" in done.stderr and "hint: this tokenizer" in done.stderr
    shown = done.stdout.partition("fail  tokens.cuts")[2]
    assert "      lost at the boundary:\n" in shown and f"        text: {TEXTS[0]!r}" in shown
    assert json.loads(doctor(guide, "--json", model=unigram).stdout)["ok"] is False


# --- a live guide


def test_a_local_guide_is_asked_for_texts_and_to_go_on(doctor, tiny_llama: Path) -> None:
    """Its tokens are the policy's, so it may be cut inside a word."""
    done = doctor(f"hf:{tiny_llama}", "--max-new-tokens", 12, "--json")
    assert done.exit_code == 0, done.stderr
    assert f"at most 12 requests to hf:{tiny_llama} for 6 prompts" in done.stderr
    found = checks(done)
    continued = found["guide.continuations"]["numbers"]["continued"]
    assert found["guide.answers"]["numbers"]["asked"] == 6 + continued and 0 < continued <= 6
    assert found["tokens.continuations"]["numbers"]["seams"] == continued
    assert "where a character ends" in found["tokens.stability"]["finding"]
    assert len(found["guide.continuations"]["samples"]) == min(3, continued)


def continuing(request: Request) -> bool:
    return NUDGE in request.prompt


WHOLE = "the old farmer sees the wide river near the house ."


def talkative(n: int, request: Request) -> Reply:
    """Whole texts at first; then each kind of what chat models put around a continuation, by the prompt."""
    if not continuing(request):
        return Reply(text=WHOLE)
    prefix = request.prompt.rpartition("\n\n")[2]
    order = [e["prompt"] for e in toy_examples(6)]
    kind = next(i for i, prompt in enumerate(order) if request.prompt.startswith(prompt))
    plain = "and that is all of it ."
    return Reply(
        text=[f"{prefix} {plain}", f'"{plain}"', f"Sure, here is the continuation: {plain}", plain, " " + plain, ""][
            kind
        ]
    )


def by_an_api(doctor, server: FakeOpenAI, *flags: object):
    return doctor("openai:fake-model", "--base-url", server.url, *flags)


def test_what_a_chat_model_puts_around_a_continuation(doctor) -> None:
    assert len({e["prompt"] for e in toy_examples(6)}) == 6
    with FakeOpenAI(talkative) as server:
        done = by_an_api(doctor, server, "--json")
        assert done.exit_code == 0, done.stderr
        asked = len(server.requests)
        again = by_an_api(doctor, server, "--json")
        assert asked == len(server.requests) == 12  # two a prompt; the second time, all of it is in the cache
        people = by_an_api(doctor, server).stdout
    found = checks(done)
    assert checks(again) == found
    continued = found["guide.continuations"]
    assert continued["status"] == "warn" and "prefill" in continued["remedy"]
    mended = continued["numbers"]["mended"]
    assert (continued["numbers"]["continued"], continued["numbers"]["empty"]) == (6, 1)
    assert (mended["prefix_removed"], mended["quotes_removed"], mended["chatter_removed"]) == (1, 1, 1)
    assert mended["space_added"] == 3  # quoted, talked about, and bare; the fifth brought a space of its own
    for words in ("prefix repeated: 1", "quoted: 1", "chatter around it: 1", "space missing: 3", "empty: 1"):
        assert words in continued["finding"]
    assert len(continued["samples"]) == 3
    for sample in continued["samples"]:
        assert WHOLE.startswith(sample["prefix"]) and sample["came"] != sample["used"]
        assert sample["used"] == " and that is all of it ."
        assert f"        came: {sample['came']!r}" in people
    seams = found["tokens.continuations"]["numbers"]
    assert (seams["seams"], seams["exact"]) == (6, 6)


def test_prefixes_end_where_a_word_ends(doctor) -> None:
    """The guide has other tokens than the policy: it is never given half a word."""
    with FakeOpenAI(talkative) as server:
        by_an_api(doctor, server)
        prefixes = [r.prompt.rpartition("\n\n")[2] for r in server.requests if continuing(r)]
    assert len(prefixes) == 6 and len(set(prefixes)) > 1
    words = WHOLE.split()
    assert all(prefix.split() == words[: len(prefix.split())] for prefix in prefixes)


def test_requests_that_fail_break_a_truth(doctor) -> None:
    def plan(n: int, request: Request) -> Reply:
        return Reply(text="the cat .") if "garden" in request.prompt else Reply(status=400)

    with FakeOpenAI(plan) as server:
        done = by_an_api(doctor, server, "--set", "guide.max_retries=0")
    assert done.exit_code == 1
    kept = sum("garden" in e["prompt"] for e in toy_examples(6))
    assert 0 < kept < 6
    assert f"fail  guide.answers: {6 - kept} of {6 + kept} requests failed (refused: {6 - kept})" in done.stdout
    assert "planned status 400" in done.stdout
    assert "checks failed: guide.answers" in done.stderr


def test_a_budget_stops_it(doctor) -> None:
    with FakeOpenAI(talkative) as server:
        done = by_an_api(doctor, server, "--max-calls", 4)
        assert len(server.requests) == 4
    assert done.exit_code == 3


def test_replay_asks_nobody(doctor) -> None:
    with FakeOpenAI(talkative) as server:
        assert by_an_api(doctor, server, "--guide-mode", "replay").exit_code == 2
        assert not server.requests


# --- the command


@pytest.mark.parametrize(
    ("guide", "flags", "words"),
    [
        ("missing.jsonl", [], ["no such guide file"]),
        ("hf:", [], ["names nothing behind the colon"]),
        ("hf:nowhere", [], ["nowhere"]),
        ("g.jsonl", ["--max-new-tokens", 1], ["max_new_tokens"]),
        ("g.jsonl", ["--set", "guide.nme=x"], ["unknown config key", "'name'"]),
    ],
)
def test_bad_input_is_a_letter(doctor, guide: str, flags: list, words: list[str]) -> None:
    done = doctor(guide, *flags)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_print_config_asks_nobody(doctor) -> None:
    done = doctor("gpt-3.5", "--print-config")
    assert done.exit_code == 0 and "# guide.name: flag" in done.stdout and "prompts: 20" in done.stdout


def test_a_check_of_ones_own_is_one_more_function(doctor, tmp_path: Path, monkeypatch) -> None:
    def brief(probe: GuideProbe) -> Check | None:
        return Check("own.brief", "fail", f"{len(probe.texts)} texts", "few are enough", "none")

    monkeypatch.setattr(stage, "CHECKS", [*stage.CHECKS, brief])
    done = doctor(recorded(tmp_path / "guide.jsonl"))
    assert done.exit_code == 1
    assert done.stdout.rstrip().endswith("fail  own.brief: 5 texts\n      few are enough\n      remedy: none")
    assert "own.brief" in done.stderr


def test_thinking_before_a_text_is_shown(doctor) -> None:
    def plan(n: int, request: Request) -> Reply:
        return Reply(text="<think>\nhm\n</think>\n\na cat sees it" if request.chat else None)

    with FakeOpenAI(plan) as server:
        done = by_an_api(doctor, server, "--json")
    check = checks(done)["guide.repairs"]
    assert check["status"] == "warn" and check["numbers"]["mended"] == {"thinking_removed": 6}
    assert check["finding"] == "6 of 6 texts were repaired; thinking before it: 6"
    assert check["samples"][0] == {"came": "<think>\nhm\n</think>\n\na cat sees it", "used": "a cat sees it"}
