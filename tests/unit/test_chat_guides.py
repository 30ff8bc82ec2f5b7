"""Conversations at guides and scorers: what is sent, rendered, keyed and read."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

from chats import chat_checkpoint
from fake_openai import FakeOpenAI
from public_templates import public_tokenizer
from rlgf_cli.config.common import PartConfig, TextConfig
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.guides.openai.endpoint import endpoint_of
from rlgf_cli.guides.openai.request import RequestBuilder
from rlgf_cli.models import classification
from rlgf_cli.models.text import FILE
from rlgf_cli.protocols import Example, GuideRequest, Message
from rlgf_cli.scorers.classifier import ClassifierReward, RewardModelReward
from rlgf_cli.scorers.judge import JudgeMetric, JudgeReward
from rlgf_cli.scorers.perplexity import PerplexityMetric
from rlgf_cli.scorers.weighted_sum import make_reward

TALK = (
    Message("system", "Be brief."), Message("user", "the cat ?"), Message("assistant", "the cat sees it ."),
    Message("user", "the dog ?"),
)  # fmt: skip
EXAMPLE = Example.of("a", TALK)
TURNS = [{"role": m.role, "content": m.content} for m in TALK]
LOCAL = "http://127.0.0.1:1/v1"


def builder(**changes: Any) -> RequestBuilder:
    config = GuideConfig.model_validate({"name": "openai:m", "base_url": LOCAL, **changes})
    return RequestBuilder(endpoint_of(config), config, 0)


def messages(prefix: str = "", example: Example = EXAMPLE, **changes: Any) -> list[dict[str, str]]:
    return builder(**changes).prompt(GuideRequest(example, prefix=prefix))["messages"]


# --- chat APIs


def test_a_conversation_is_sent_as_its_messages() -> None:
    assert messages() == TURNS
    assert messages(system="You are a poet.")[0] == {"role": "system", "content": "You are a poet.\n\nBe brief."}
    assert messages(system="You are a poet.")[1:] == TURNS[1:]
    bare = Example.of("b", TALK[1:])
    assert messages(system="S", example=bare) == [{"role": "system", "content": "S"}, *TURNS[1:]]
    filled = messages(prompt_template="Q: {prompt}")
    assert filled[:-1] == TURNS[:-1] and filled[-1] == {"role": "user", "content": "Q: the dog ?"}
    begun = messages("the d", prompt_template="Q: {prompt}", continue_template="{prompt}|{prefix}")
    assert begun[:-1] == TURNS[:-1] and begun[-1]["content"] == "Q: the dog ?|the d"
    prefilled = messages("the d", continuation="prefill")
    assert prefilled == [*TURNS, {"role": "assistant", "content": "the d"}]


def test_plain_prompts_are_sent_and_keyed_as_before() -> None:
    """The stored request and the settings decide a text's cache key: these are those of texts that were bought."""
    plain = GuideRequest(Example("x", "cat tree"), max_new_tokens=7)
    made = builder(system="S", prompt_template="Q: {prompt}")
    assert json.dumps(made.fields(plain), ensure_ascii=False) == (
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q: cat tree"}], '
        '"max_tokens": 7, "sample_index": 0}'
    )
    assert set(made.identity()) == {
        "kind", "base_url", "model", "api", "temperature", "top_p", "top_k", "stop", "seed", "prefill",
    }  # fmt: skip
    assert not {"tokenizer", "chat_template_kwargs"} & set(GuideConfig(name="openai:m").settings())


def test_two_conversations_with_one_last_turn_are_two_texts() -> None:
    with closing(make_live_guide(GuideConfig(name="openai:m", base_url=LOCAL), seed=0)) as guide:
        other = Example.of("a", (Message("system", "Be verbose."), *TALK[1:]))
        keys = {guide.key(GuideRequest(e)) for e in (EXAMPLE, other, Example("a", "the dog ?"))}  # type: ignore[attr-defined]
    assert len(keys) == 3


def test_the_templates_variables_reach_a_chat_server() -> None:
    made = builder(chat_template_kwargs={"enable_thinking": False})
    assert made.body(GuideRequest(EXAMPLE))["extra_body"] == {"chat_template_kwargs": {"enable_thinking": False}}
    assert made.identity()["chat_template_kwargs"] == {"enable_thinking": False}
    with FakeOpenAI() as server:
        config = GuideConfig(name="openai:m", base_url=server.url, chat_template_kwargs={"enable_thinking": False})
        with closing(make_live_guide(config, seed=0)) as guide:
            guide.complete([GuideRequest(EXAMPLE, max_new_tokens=4)])
        (seen,) = server.requests
    assert seen.body["messages"] == TURNS and seen.body["chat_template_kwargs"] == {"enable_thinking": False}


# --- completion APIs


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    public_tokenizer("llama3").save_pretrained(folder)
    return folder


def test_a_completion_api_gets_the_rendered_conversation(llama_tokenizer: Path) -> None:
    made = builder(api="completion", tokenizer=str(llama_tokenizer), prompt_template="Q: {prompt}")
    sent = made.prompt(GuideRequest(EXAMPLE, prefix="the d"))["prompt"]
    assert sent.startswith("<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>")  # BOS is the server's
    assert sent.endswith("Q: the dog ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nthe d")
    plain = made.prompt(GuideRequest(Example("x", "cat")))["prompt"]
    assert plain.startswith("<|start_header_id|>user<|end_header_id|>\n\nQ: cat<|eot_id|>")


def test_without_a_tokenizer_it_refuses_before_it_pays(llama_tokenizer: Path) -> None:
    with closing(make_live_guide(GuideConfig(name="openai:m", base_url=LOCAL, api="completion"), seed=0)) as guide:
        guide.check([Example("x", "cat")], 8)
        with pytest.raises(UserError, match="example 'a': the prompt is a conversation, and a completion API") as error:
            guide.check([Example("x", "cat"), EXAMPLE], 8)
    assert "guide.api: chat" in (error.value.hint or "") and "guide.tokenizer" in (error.value.hint or "")
    for wrong in ({"api": "chat", "tokenizer": "x"}, {"api": "completion", "chat_template_kwargs": {"a": 1}}):
        with pytest.raises(UserError, match=r"guide\.(tokenizer|chat_template_kwargs) is"):
            make_live_guide(GuideConfig.model_validate({"name": "openai:m", "base_url": LOCAL, **wrong}), seed=0)


# --- local checkpoints


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model from elsewhere: no text format is stored with it."""
    folder = chat_checkpoint(tmp_path_factory.mktemp("hf"), "chatml")
    (folder / FILE).unlink()
    return folder


def test_a_local_guide_uses_the_template_by_default(chat_model: Path, tiny_gpt2: Path) -> None:
    def guide(path: Path, **changes: Any) -> Any:
        return make_live_guide(GuideConfig.model_validate({"name": f"hf:{path}", "device": "cpu", **changes}), seed=0)

    with closing(guide(chat_model)) as default, closing(guide(chat_model, prompt_template="{prompt}")) as plain:
        assert default.text.chat and not plain.text.chat
        assert list(default.notes) == [f"hf:{chat_model}: text: the tokenizer's chat template"]
        assert plain.notes[1] == f"warning: hf:{chat_model} has a chat template, and it is NOT used"
        prompt, _ = default._encode(GuideRequest(EXAMPLE, max_new_tokens=8))
        shown = default.tokenizer.decode(prompt.ids)
        assert shown.startswith("<|im_start|>system\nBe brief.<|im_end|>") and shown.endswith("assistant\n")
        # a text that was bought of the bare prompt is not taken for one of the conversation
        assert default.identity()["text"] == "chat template" and "text" not in plain.identity()
        default.check([EXAMPLE], 8)
        assert default.request_fields(GuideRequest(EXAMPLE))["prompt"] == TURNS
        assert plain.request_fields(GuideRequest(Example("x", "cat")))["prompt"] == "cat"
        with pytest.raises(UserError, match="leaves out the chat template"):
            plain.check([EXAMPLE], 8)
        assert len(default.complete([GuideRequest(EXAMPLE, max_new_tokens=4)])) == 1
    with closing(guide(tiny_gpt2)) as stored, pytest.raises(UserError, match="has no chat template"):
        stored.check([EXAMPLE], 8)


# --- judges


def test_a_judge_reads_the_whole_conversation() -> None:
    judge = JudgeReward("openai:m", guide={"base_url": LOCAL, "mode": "replay"})
    question = judge._question(EXAMPLE, text="no")
    assert "[system]\nBe brief.\n\n[user]\nthe cat ?\n\n[assistant]\nthe cat sees it .\n\n[user]\nthe dog ?" in question
    assert "### Prompt\ncat\n" in judge._question(Example("x", "cat"), text="no")


def test_an_opponent_for_another_conversation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    for prompt, refused in ((TURNS[1:], True), (TURNS, False)):
        path.write_text(json.dumps({"id": "a", "prompt": prompt, "text": "x"}) + "\n")
        metric = JudgeMetric("openai:m", against=str(path), guide={"base_url": LOCAL, "mode": "replay"})
        if refused:
            with pytest.raises(UserError, match="answers another prompt"):
                metric.check_set([EXAMPLE])
        else:
            metric.check_set([EXAMPLE])


def test_a_local_judge_with_a_template_is_asked_in_it(chat_model: Path, tiny_gpt2: Path) -> None:
    judge = JudgeReward(f"hf:{chat_model}", device="cpu").judge
    assert judge.config.api == "chat" and judge.settings.endswith(",chat")
    shown = judge.guide._encode(GuideRequest(judge._prompt(EXAMPLE, "Is it ?"), max_new_tokens=8))[0]  # type: ignore[attr-defined]
    assert judge.guide.tokenizer.decode(shown.ids).startswith("<|im_start|>user\nIs it ?")
    plain = JudgeReward(f"hf:{tiny_gpt2}", device="cpu").judge
    assert plain.config.api is None and not plain.settings.endswith(",chat")
    explicit = JudgeReward(f"hf:{chat_model}", guide={"api": "completion"}, device="cpu").judge
    assert not explicit.settings.endswith(",chat") and not explicit.guide.text.chat  # type: ignore[attr-defined]


def test_perplexity_reads_the_whole_conversation(chat_model: Path) -> None:
    metric = PerplexityMetric(str(chat_model), device="cpu")
    before = metric.loaded.tokenizer.decode(metric._before(EXAMPLE))
    assert before.startswith("<|im_start|>system\nBe brief.<|im_end|>") and before.endswith("assistant\n")


# --- Python rewards


@pytest.mark.parametrize(
    "code",
    [
        "def f(prompt, messages, text):\n"
        "    return len(prompt) + 100 * len(messages) + (messages[-1]['role'] == 'user')",
        "def f(prompts, messages, texts):\n"
        "    return [len(p) + 100 * len(m) + (m[-1]['content'] == p) for p, m in zip(prompts, messages)]",
    ],
)
def test_python_rewards_get_text_and_conversation(tmp_path: Path, code: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    reward = make_reward([PartConfig(name=f"{tmp_path / 'mine.py'}:f")])
    assert [s.value for s in reward.score([EXAMPLE, Example("x", "cat")], ["t", "t"])] == [410.0, 104.0]


# --- classifiers and reward models


def scorer_folder(folder: Path, template: str | None, labels: int = 1) -> Path:
    tokenizer = public_tokenizer(template or "chatml")
    if template is None:
        tokenizer.chat_template = None
    torch.manual_seed(1)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    config = GPT2Config(**sizes, num_labels=labels, pad_token_id=tokenizer.pad_token_id)
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_by(reward: Any, example: Example, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    rows: list[list[int]] = []
    with monkeypatch.context() as patched:
        patched.setattr(classification, "logits", lambda model, ids, *_, **__: rows.extend(ids) or torch.zeros(1, 2))
        reward.score([example], [text])
    return reward.tokenizer.decode(rows[0])


def test_a_reward_model_reads_the_whole_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModelReward(str(scorer_folder(tmp_path, "llama3")), device="cpu")
    whole = reward.tokenizer.apply_chat_template([*TURNS, {"role": "assistant", "content": "no ."}], tokenize=False)
    assert read_by(reward, EXAMPLE, "no .", monkeypatch) == whole
    short = RewardModelReward(
        str(tmp_path), device="cpu", max_tokens=reward.tokenizer(whole)["input_ids"].__len__() - 2
    )
    shown = read_by(short, EXAMPLE, "no .", monkeypatch)  # the first question went, with its answer
    assert "the cat" not in shown and "Be brief." in shown and "the dog ?" in shown and short.counts["truncated"] == 1
    with pytest.raises(UserError, match="the chat template and the system message alone have"):
        RewardModelReward(str(tmp_path), device="cpu", max_tokens=10).score([EXAMPLE], ["no ."])


def test_a_reward_models_template_has_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = scorer_folder(tmp_path, "chatml")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ note | default('') }}")
    reward = RewardModelReward(str(folder), device="cpu", chat_template_kwargs={"note": "the queen"})
    assert read_by(reward, EXAMPLE, "no", monkeypatch).endswith("the queen")
    assert "chat_template_kwargs={'note': 'the queen'}" in reward.signature


def test_a_plain_text_scorer_refuses_conversations_before_the_run(tmp_path: Path) -> None:
    reward = ClassifierReward(str(scorer_folder(tmp_path, None, labels=2)), device="cpu")
    with pytest.raises(UserError, match="reads plain text, and the prompt of example 'a' is a conversation") as error:
        reward.check([Example("x", "cat"), EXAMPLE])
    assert "include_prompt: false" in (error.value.hint or "")
    ClassifierReward(str(tmp_path), device="cpu", include_prompt=False).check([EXAMPLE])


def test_a_guides_template_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="rlgf sets it"):
        GuideConfig(name="openai:m", chat_template_kwargs={"messages": []})
    assert TextConfig(chat_template_kwargs={"x": [1, {"y": None}]}).chat_template_kwargs == {"x": [1, {"y": None}]}
