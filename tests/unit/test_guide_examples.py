"""``guide.examples`` and ``guide.system``: the turns that a guide is given before a prompt, what they cost, and which
texts they identify."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_guides_vllm import engine  # noqa: F401 - a fixture

from chats import chat_checkpoint
from collecting import environment, lines, prompts_file
from fake_openai import FakeOpenAI
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError
from rlgf_cli.guides.conversation import with_turns
from rlgf_cli.guides.make import describe, make_guide, make_live_guide
from rlgf_cli.guides.openai.endpoint import endpoint_of
from rlgf_cli.guides.openai.request import RequestBuilder
from rlgf_cli.models.text import FILE, TextFormat
from rlgf_cli.protocols import Example, GuideRequest, Message
from rlgf_cli.protocols.messages import Prompt, with_system
from rlgf_cli.scorers.judge import JudgeReward

LOCAL = "http://127.0.0.1:1/v1"
EXAMPLES = [{"prompt": "the cat ?", "completion": "the cat sees it ."}, {"prompt": "it ?", "completion": "no ."}]
TURNS = [
    {"role": "user", "content": "the cat ?"}, {"role": "assistant", "content": "the cat sees it ."},
    {"role": "user", "content": "it ?"}, {"role": "assistant", "content": "no ."},
]  # fmt: skip
SYSTEM = {"role": "system", "content": "the queen ."}
PLAIN = Example("x", "the dog ?")
TALK = Example.of(
    "t",
    (
        Message("system", "Be brief."),
        Message("user", "dog ?"),
        Message("assistant", "yes ."),
        Message("user", "river ?"),
    ),
)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def config(**changes: Any) -> GuideConfig:
    return GuideConfig.model_validate({"name": "openai:m", "base_url": LOCAL, "examples": EXAMPLES, **changes})


def sent(example: Example = PLAIN, prefix: str = "", **changes: Any) -> dict[str, Any]:
    made = config(**changes)
    return RequestBuilder(endpoint_of(made), made, 0).prompt(GuideRequest(example, prefix))


# --- what is sent


def test_a_chat_guide_gets_the_examples_as_earlier_turns() -> None:
    assert sent()["messages"] == [*TURNS, user("the dog ?")]
    assert sent(system="the queen .")["messages"] == [SYSTEM, *TURNS, user("the dog ?")]
    own = [{"role": "system", "content": "the queen .\n\nBe brief."}, *TURNS, user("dog ?")]
    assert sent(TALK, system="the queen .")["messages"][:6] == own
    assert sent(TALK)["messages"][0]["content"] == "Be brief." and sent(TALK)["messages"][1:5] == TURNS


def test_the_prompt_template_is_filled_with_the_prompts_of_examples_too() -> None:
    found = sent(prompt_template="Q: {prompt}{prefix}!")["messages"]
    assert [m["content"] for m in found] == ["Q: the cat ?!", "the cat sees it .", "Q: it ?!", "no .", "Q: the dog ?!"]


def test_a_continuation_has_whole_examples_before_it() -> None:
    found = sent(prefix="the d", continue_template="{prompt}|{prefix}")["messages"]
    assert found == [*TURNS, user("the dog ?|the d")]
    found = sent(prefix="the d", continuation="prefill")["messages"]
    assert found == [*TURNS, user("the dog ?"), {"role": "assistant", "content": "the d"}]


PROMPTS = st.one_of(
    st.text(min_size=1),
    st.lists(st.text(min_size=1), min_size=1, max_size=2).map(lambda t: tuple(Message("user", x) for x in t)),
    st.text(min_size=1).map(lambda t: (Message("system", t), Message("user", t))),
)


@given(PROMPTS, st.none() | st.text(min_size=1), st.lists(st.text(min_size=1), max_size=3))
def test_the_examples_are_all_that_the_conversation_gains(prompt: Prompt, system: str | None, shown: list[str]) -> None:
    made = GuideConfig.model_validate(
        {"name": "openai:m", "system": system, "examples": [{"prompt": x, "completion": x} for x in shown]}
    )
    found = with_turns(made, prompt)
    if system is None and not shown:
        assert found is prompt
        return
    whole = with_system(system, prompt)
    at = sum(m.role == "system" for m in whole)
    assert found[:at] + found[at + 2 * len(shown) :] == whole
    assert [m.content for m in found[at : at + 2 * len(shown)]] == [x for x in shown for _ in (0, 1)]  # type: ignore[union-attr]


# --- guides whose prompts a chat template renders


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model from elsewhere: no text format is stored with it."""
    folder = chat_checkpoint(tmp_path_factory.mktemp("hf"), "chatml")
    (folder / FILE).unlink()
    return folder


def local(path: Path, kind: str = "hf", **changes: Any) -> Any:
    fields = {"name": f"{kind}:{path}", "device": "cpu", "base_url": None, **changes}
    return make_live_guide(config(**fields), seed=0)


def test_a_completion_api_gets_them_rendered(chat_model: Path) -> None:
    made = sent(api="completion", tokenizer=str(chat_model), system="the queen .", prefix="the d")
    turns = [SYSTEM, *TURNS, user("the dog ?")]
    with closing(local(chat_model)) as guide:
        whole = guide.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert made["prompt"] == whole + "the d"


@pytest.mark.usefixtures("engine")
def test_a_local_guide_gets_them_in_its_template(chat_model: Path) -> None:
    request = GuideRequest(PLAIN, "the cat", max_new_tokens=5)
    with (
        closing(local(chat_model, system="the queen .")) as hf,
        closing(local(chat_model, "vllm", system="the queen .")) as vllm,
    ):
        whole = hf.tokenizer.apply_chat_template(
            [SYSTEM, *TURNS, user("the dog ?")], add_generation_prompt=True, return_dict=False
        )
        assert hf._encode(request)[0].ids == whole
        assert vllm._ids(request) == [*whole, *hf.text.encode_response(hf.tokenizer, "the cat")]
        (text,) = hf.complete([request])
        assert text.usage["prompt_tokens"] == len(vllm._ids(request))
        assert hf.prompt_bytes(request) > sum(len(m["content"]) for m in [SYSTEM, *TURNS])
        # the prompt of the request, its key and the guide file stay the user's own
        assert hf.request_fields(request)["prompt"] == "the dog ?"


def test_the_limit_of_the_prompt_counts_the_examples(chat_model: Path) -> None:
    request = GuideRequest(PLAIN, max_new_tokens=5)
    with closing(local(chat_model)) as guide:
        whole = len(guide._encode(request)[0].ids)
    with closing(local(chat_model, max_prompt_tokens=whole)) as fits:
        fits.check([PLAIN], 5)
    with (
        closing(local(chat_model, max_prompt_tokens=whole - 1)) as strict,
        pytest.raises(UserError, match=f"'x' has {whole} tokens; there is room for {whole - 1}"),
    ):
        strict.check([PLAIN], 5)
    with closing(local(chat_model, max_prompt_tokens=whole - 1, on_overlong="truncate")) as cut:
        shown = cut.tokenizer.decode(cut._encode(request)[0].ids)
    assert "the cat ?" not in shown and "it ?" in shown and "the dog ?" in shown  # the first example went


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("kind", ["hf", "vllm", "openai"])
def test_a_template_without_a_system_message_refuses_one_as_that_of_a_conversation(tmp_path: Path, kind: str) -> None:
    no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    folder = chat_checkpoint(tmp_path, no_system + "<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>")

    def guide(**changes: Any) -> Any:
        if kind == "openai":
            return make_live_guide(config(api="completion", tokenizer=str(folder), **changes), seed=0)
        return local(folder, kind, **changes)

    with closing(guide()) as shown:
        shown.check([PLAIN], 5)
    with closing(guide(system="the queen .")) as refusing, pytest.raises(UserError) as error:
        refusing.check([PLAIN], 5)
    assert "refuses a conversation of system, user, assistant" in str(error.value) and "no system" in str(error.value)


# --- refused


@pytest.mark.parametrize("key", ["examples", "system"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"api": "completion"}, "this guide uses the completion API"),
        ({"name": "hf:x", "api": "completion"}, r"guide\.api: completion leaves out the chat template"),
        ({"name": "hf:x", "prompt_template": "Q: {prompt}"}, r"guide\.prompt_template leaves out the chat template"),
        ({"name": "vllm:x", "prompt_template": "Q: {prompt}"}, r"guide\.prompt_template leaves out the chat template"),
    ],
)
def test_a_guide_without_turns_refuses_them_before_anything_is_loaded(
    key: str, changes: dict[str, Any], why: str
) -> None:
    given_ = {"system": "S", "examples": []} if key == "system" else {}
    with pytest.raises(UserError, match=rf"guide\.{key} makes turns of a conversation, and {why}"):
        describe(config(**given_, **changes))


def test_a_checkpoint_that_reads_plain_text_refuses_them(chat_model: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"guide\.examples makes .* without a chat template \(the prompt as it is"):
        local(tiny_gpt2)
    stored = chat_checkpoint(tmp_path, "chatml")
    TextFormat(template="Q: {prompt}").save(stored)
    with pytest.raises(UserError, match=r"guide\.system makes .* 'Q: \{prompt\}', as stored"):
        local(stored, system="S", examples=[])
    local(stored, api="chat").close()


def test_recorded_texts_and_judges_refuse_examples(tmp_path: Path) -> None:
    path = tmp_path / "guide.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "completion": "c", "model": "m"}\n')
    for act in (describe, lambda made: make_guide(made, seed=0)):
        with pytest.raises(UserError, match=r"guide\.examples is for guides that write"):
            act(config(name=str(path), base_url=None))
    with pytest.raises(UserError, match=r"guide\.examples is not for a judge"):
        JudgeReward("openai:m", guide={"base_url": LOCAL, "examples": EXAMPLES})


def test_a_local_judge_may_have_a_system_message(chat_model: Path) -> None:
    judge = JudgeReward(f"hf:{chat_model}", guide={"system": "the queen ."}, device="cpu").judge
    encoded, _ = judge.guide._encode(GuideRequest(PLAIN, max_new_tokens=5))  # type: ignore[attr-defined]
    assert judge.guide.tokenizer.decode(encoded.ids).startswith("<|im_start|>system\nthe queen .<|im_end|>")


@pytest.mark.parametrize("wrong", ["{prompt: x}", "{prompt: '', completion: y}", "{prompt: x, completion: y, role: z}"])
def test_a_wrong_example_is_named_with_its_place(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "shots.yaml"
    path.write_text(f"guide:\n  examples:\n    - {wrong}\n")
    with pytest.raises(UserError, match=r"guide\.examples") as error:
        resolve(CollectGuideConfig, files=[str(path)], flags={"guide": "openai:m", "data": "d", "output": "o"})
    assert str(path) in str(error.value.where)


# --- identity


def test_examples_identify_a_text_and_no_examples_change_nothing(chat_model: Path) -> None:
    request = GuideRequest(PLAIN)
    assert "examples" not in config(examples=[]).settings() and config().settings()["examples"] == EXAMPLES
    for make in (lambda **c: make_live_guide(config(**c), seed=0), lambda **c: local(chat_model, **c)):
        keys = []
        for examples in ([], EXAMPLES, EXAMPLES[:1], EXAMPLES[::-1]):
            with closing(make(examples=examples)) as guide:
                keys.append(guide.key(request))
                assert ("examples" in guide.settings) == bool(examples)
                assert examples or "the cat ?" not in json.dumps([guide.identity(), guide.request_fields(request)])
        assert len(set(keys)) == 4


# --- through the command


@pytest.fixture
def shots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    environment(monkeypatch, tmp_path)
    path = tmp_path / "shots.yaml"
    path.write_text(json.dumps({"guide": {"examples": EXAMPLES}}))
    return path


def test_a_collection_with_examples(shots: Path, tmp_path: Path, run_cli: Any) -> None:
    data, out = prompts_file(tmp_path, 3), tmp_path / "guide.jsonl"
    with FakeOpenAI() as server:
        common = ("--guide", "openai:m", "--base-url", server.url, "--data", data, "-o", out)
        done = run_cli("collect-guide", *common, "-c", shots, "--limit", 2)
        assert done.exit_code == 0, done.stderr
        bodies = [asked.request.body for asked in server.ledger.all()]
        assert sorted(b["messages"][-1]["content"] for b in bodies) == ["prompt 0", "prompt 1"]
        assert all(b["messages"][:-1] == TURNS for b in bodies)
        assert {row["prompt"] for row in lines(out)} == {"prompt 0", "prompt 1"}
        other = run_cli("collect-guide", *common, "--resume")
        assert other.exit_code == 2 and "other settings (examples)" in other.stderr
        assert run_cli("collect-guide", *common, "-c", shots, "--resume").exit_code == 0
        assert len(server.ledger.all()) == 3 and len(lines(out)) == 3
        again = run_cli("collect-guide", *common[:-1], tmp_path / "again.jsonl", "-c", shots)
        assert again.exit_code == 0 and len(server.ledger.all()) == 3  # all texts are in the cache


def test_the_estimate_counts_the_examples(shots: Path, tmp_path: Path, run_cli: Any) -> None:
    data = prompts_file(tmp_path, 10)
    prices = ("--set", "guide.usd_per_million_input=1", "--set", "guide.usd_per_million_output=1")
    common = ("--guide", "openai:m", "--base-url", LOCAL, "--data", data, "-o", tmp_path / "o.jsonl", *prices)
    found = []
    for more in ((), ("-c", shots)):
        done = run_cli("collect-guide", *common, *more, "--dry-run", "--json")
        assert done.exit_code == 0, done.stderr
        found.append(json.loads(done.stdout))
    size = sum(len(turn["content"]) + 16 for turn in TURNS)
    assert found[1]["at_most_usd"] == pytest.approx(found[0]["at_most_usd"] + 10 * size / 1e6)
    assert all(a < b for a, b in zip(found[0]["prompt_tokens"], found[1]["prompt_tokens"], strict=True))
