"""Providers of endpoints: the requests that they are sent, and the keys that they get."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collecting import no_endpoint
from fake_openai import FakeOpenAI, Reply
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import describe, kind_of
from rlgf_cli.guides.openai import presets
from rlgf_cli.guides.openai.connection import Connection
from rlgf_cli.guides.openai.endpoint import Endpoint, endpoint_of
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.guides.openai.keys import NO_KEY, api_key, refuse_unnamed_hosts, variable_of
from rlgf_cli.guides.openai.request import RequestBuilder
from rlgf_cli.protocols import Completion, Example, Failure, GuideRequest
from rlgf_cli.scorers.judge import JudgeReward

AZURE = "https://mine.openai.azure.com"
ASKED = GuideRequest(Example("a", "cat tree"), max_new_tokens=7)
BEGUN = GuideRequest(Example("a", "cat tree"), prefix="A cat", max_new_tokens=7)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", AZURE + "/")


def config(name: str = "openai:m", **changes: Any) -> GuideConfig:
    return GuideConfig.model_validate({"name": name, **changes})


def endpoint(name: str = "openai:m", **changes: Any) -> Endpoint:
    return endpoint_of(config(name, **changes))


def builder(name: str = "openai:m", **changes: Any) -> RequestBuilder:
    return RequestBuilder(endpoint(name, **changes), config(name, **changes), 0)


def body(name: str = "openai:m", request: GuideRequest = ASKED, **changes: Any) -> dict[str, Any]:
    return builder(name, **changes).body(request)


# --- what is sent


@pytest.mark.parametrize(
    ("name", "url", "variable", "limit", "sent", "prefill"),
    [
        ("openai:m", "https://api.openai.com/v1", "OPENAI_API_KEY", "max_completion_tokens", {"seed"}, None),
        ("azure:m", f"{AZURE}/openai/v1", "AZURE_OPENAI_API_KEY", "max_completion_tokens", {"seed"}, None),
        ("openrouter:a/m", "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "max_tokens",
         {"temperature", "top_p", "seed"}, {}),
        ("together:a/m", "https://api.together.ai/v1", "TOGETHER_API_KEY", "max_tokens",
         {"temperature", "top_p", "seed"}, None),
        ("gemini:m", "https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY", "max_tokens",
         {"temperature", "top_p"}, None),
        ("anthropic:m", "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY", "max_tokens", {"seed"}, None),
        ("deepseek:m", "https://api.deepseek.com", "DEEPSEEK_API_KEY", "max_tokens",
         {"temperature", "top_p", "seed"}, {"prefix": True}),
        ("mistral:m", "https://api.mistral.ai/v1", "MISTRAL_API_KEY", "max_tokens",
         {"temperature", "top_p", "random_seed"}, {"prefix": True}),
        ("vllm-server:m", "http://127.0.0.1:8000/v1", "VLLM_API_KEY", "max_tokens",
         {"temperature", "top_p", "seed"}, {}),
        ("llama.cpp:m", "http://127.0.0.1:8080/v1", "LLAMA_API_KEY", "max_tokens",
         {"temperature", "top_p", "seed"}, {}),
        ("ollama:m:7b", "http://127.0.0.1:11434/v1", None, "max_tokens", {"temperature", "top_p", "seed"}, None),
    ],
)  # fmt: skip
def test_the_request_to_each_provider(
    name: str, url: str, variable: str | None, limit: str, sent: set[str], prefill: dict[str, Any] | None
) -> None:
    assert kind_of(name) == "openai" and describe(config(name)).remote
    at = endpoint(name)
    assert (at.base_url, at.model, at.limit_key) == (url, name.partition(":")[2], limit)
    assert variable_of(at) == variable
    made = body(name)
    flat = {**made.pop("extra_body", {}), **made}
    assert flat.pop("messages") == [{"role": "user", "content": "cat tree"}] and flat.pop("model") == at.model
    assert set(flat) == sent
    if prefill is None:
        with pytest.raises(UserError, match="does not say that it goes on") as caught:
            describe(config(name, continuation="prefill"))
        assert "prefill_style" in (caught.value.hint or "")
    else:
        last = body(name, BEGUN, continuation="prefill")["messages"][-1]
        assert last == {"role": "assistant", "content": "A cat", **prefill}


def test_every_provider_is_in_the_table_above_and_has_a_source() -> None:
    mark = next(m for m in test_the_request_to_each_provider.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    assert {case[0].partition(":")[0] for case in mark.args[1]} == set(presets.providers())
    for provider in presets.providers().values():
        assert provider.source and provider.noted, provider.name


def test_the_host_tells_the_provider() -> None:
    for url, name in (
        ("https://api.mistral.ai/v1", "mistral"), ("https://api.together.xyz/v1", "together"),
        ("https://other.services.ai.azure.com/openai/v1", "azure"), ("https://api.deepseek.com/v1", "deepseek"),
    ):  # fmt: skip
        found = endpoint(base_url=url).provider
        assert found is not None and found.name == name
    for url in ("http://127.0.0.1:8000/v1", "https://api.mistral.ai.example.org/v1", "https://evilopenai.azure.com/v1"):
        assert endpoint(base_url=url).provider is None
    assert "random_seed" in body(base_url="https://api.mistral.ai/v1")["extra_body"]


def test_a_provider_is_named_by_the_config_or_by_the_name() -> None:
    assert endpoint("openai:m", provider="deepseek").base_url == "https://api.deepseek.com"
    assert endpoint("mistral:m", base_url="https://proxy.example.org/v1").provider.name == "mistral"  # type: ignore[union-attr]
    with pytest.raises(UserError, match="two providers"):
        endpoint("mistral:m", provider="deepseek")
    with pytest.raises(UserError, match="unknown provider 'deepsek'") as caught:
        endpoint("openai:m", provider="deepsek")
    assert "'deepseek'" in (caught.value.hint or "")
    with pytest.raises(UserError, match="unknown guide 'deepsek:m'") as caught:
        kind_of("deepsek:m")
    assert "'deepseek'" in (caught.value.hint or "")


def test_azure_needs_a_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_OPENAI_ENDPOINT")
    with pytest.raises(UserError, match="no base URL that holds for everyone"):
        endpoint("azure:m")
    assert endpoint("azure:m", base_url=f"{AZURE}/openai/v1").provider.name == "azure"  # type: ignore[union-attr]


def test_a_partial_text_goes_to_the_address_that_takes_it() -> None:
    assert endpoint("deepseek:m", continuation="prefill").base_url == "https://api.deepseek.com/beta"
    own = "https://api.deepseek.com/v1"
    assert endpoint("deepseek:m", continuation="prefill", base_url=own).base_url == own


@pytest.mark.parametrize(
    ("style", "mark", "flags"),
    [
        (None, {}, {"add_generation_prompt": False, "continue_final_message": True}),
        ("vllm", {}, {"add_generation_prompt": False, "continue_final_message": True}),
        ("prefix", {"prefix": True}, {}),
        ("plain", {}, {}),
    ],
)
def test_the_styles_of_a_prefill(style: str | None, mark: dict[str, Any], flags: dict[str, Any]) -> None:
    settings = {"base_url": "http://127.0.0.1:1/v1", "continuation": "prefill", "prefill_style": style}
    made = body(request=BEGUN, **settings)
    assert made["messages"][-1] == {"role": "assistant", "content": "A cat", **mark}
    assert made.get("extra_body", {}) == flags
    told = builder(**settings).identity()
    assert told.get("prefill_style") == (style if style != "vllm" else None) and told["prefill"] is True
    whole = body(**settings)
    assert len(whole["messages"]) == 1 and "extra_body" not in whole


@pytest.mark.parametrize(
    ("name", "style", "written"),
    [
        ("llama.cpp:m", None, " sat"),  # its server repeats the message that was begun
        ("openai:m", "plain", " sat"),
        ("openai:m", "vllm", "A sat"),  # here the model wrote it
        ("vllm-server:m", None, "A sat"),
    ],
)
def test_a_beginning_that_the_server_repeats_is_no_part_of_the_text(name: str, style: str | None, written: str) -> None:
    with FakeOpenAI(lambda n, seen: Reply(text="A sat")) as server:
        settings = {"base_url": server.url, "continuation": "prefill", "prefill_style": style, "mode": "live"}
        for clean, stop in (("continuation", []), ("none", []), ("none", ["A"])):
            made = config(name, **settings, clean=clean, sampling={"stop": stop})
            with closing(OpenAIGuide(made, seed=0)) as guide:
                whole, rest = guide.complete([ASKED, GuideRequest(ASKED.example, prefix="A", max_new_tokens=7)])
            assert isinstance(rest, Completion) and isinstance(whole, Completion)
            assert whole.text == ("" if stop else "A sat")
            assert rest.text == ("" if stop and written == "A sat" else written)


def test_null_is_left_out_and_is_another_text() -> None:
    at = {"base_url": "http://h/v1"}
    plain, default = body(**at), builder(**at).identity()
    for key in ("temperature", "top_p"):
        made = body(sampling={key: None}, **at)
        assert set(plain) - set(made) == {key}
        assert builder(sampling={key: None}, **at).identity() == {**default, key: None}
    same = {"top_k": None, "stop": None, "num_beams": None}  # these are not sent at their defaults either
    assert body(sampling=same, **at) == plain and builder(sampling=same, **at).identity() == default
    assert "seed" not in body(sampling={"send_seed": None}, **at)


def test_what_a_model_refuses_is_left_out_at_its_default_and_refused_otherwise() -> None:
    made = body("claude-opus-5-5")
    assert not {"temperature", "top_p"} & set(made)
    for sampling, key in (({"temperature": 0.5}, "temperature"), ({"top_p": 0.9}, "top_p"), ({"top_k": 5}, "top_k")):
        with pytest.raises(UserError, match=f"claude-opus-5-5 takes no {key}") as caught:
            describe(config("claude-opus-5-5", sampling=sampling))
        assert f"guide.sampling.{key}=null" in (caught.value.hint or "")
    assert endpoint("anthropic:claude-opus-5-5").refuses == endpoint("claude-opus-5-5").refuses
    assert body("anthropic:m", sampling={"top_p": 0.9})["top_p"] == 0.9  # one alone is taken by earlier models


def test_the_body_of_a_reasoning_model() -> None:
    settings = {"reasoning_effort": "low", "reasoning_tokens": 100, "extra_body": {"thinking": {"type": "enabled"}}}
    made, told = body("deepseek:m", **settings), builder("deepseek:m", **settings)
    assert made["reasoning_effort"] == "low" and made["extra_body"] == {"thinking": {"type": "enabled"}}
    assert told.limit(ASKED) == 107
    assert {key: told.identity()[key] for key in settings} == settings
    assert told.fields(ASKED)["max_tokens"] == 7
    assert body("ollama:m", extra_body={"temperature": 0.3})["extra_body"] == {"temperature": 0.3}


def test_the_reasoning_budget_counts_in_the_price_and_in_the_length() -> None:
    price = {"usd_per_million_input": 0.0, "usd_per_million_output": 1.0, "context_length": 100}
    settings = config(base_url="http://127.0.0.1:1/v1", reasoning_tokens=90, mode="replay", **price)
    with closing(OpenAIGuide(settings, seed=0)) as guide:
        assert guide.max_price(ASKED) == 97 * 1000 and guide.answer_tokens(ASKED) == 97
        with pytest.raises(UserError, match=r"max_new_tokens and guide.reasoning_tokens is 100"):
            guide.check([ASKED.example], 10)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"extra_body": {"n": 2}}, "'n' is set by rlgf itself"),
        ({"extra_body": {"max_tokens": 2}}, "'max_tokens' is set by rlgf itself"),
        ({"headers": {"Authorization": "Bearer abc"}}, "made of the key"),
        ({"headers": {"a b": "c"}}, "no name of a header"),
        ({"headers": {"a": "b\nc: d"}}, "characters that a header cannot have"),
        ({"api_key_env": "sk-planted"}, "the name of an environment variable"),
    ],
)
def test_settings_that_no_request_can_have(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        resolve(GuideConfig, flags={"name": "openai:m", **changes})
    assert "sk-planted" not in str(caught.value) and "abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("openai:m", {"api": "completion", "reasoning_effort": "low"}, "is for chat APIs"),
        ("hf:x", {"extra_body": {"a": 1}}, "is for endpoints"),
        ("hf:x", {"reasoning_tokens": 5}, "is for endpoints"),
        ("hf:x", {"sampling": {"top_p": None}}, "no default of a server"),
    ],
)
def test_settings_that_a_guide_cannot_have(name: str, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        describe(config(name, **changes))


def test_settings_of_texts_that_were_bought_before_are_as_they_were() -> None:
    added = {
        "provider",
        "api_key_env",
        "headers",
        "extra_body",
        "prefill_style",
        "reasoning_effort",
        "reasoning_tokens",
    }
    assert not added & set(config().settings())
    assert set(config(extra_body={"a": 1}, reasoning_tokens=1, headers={"a": "b"}).settings()) & added == {
        "extra_body", "reasoning_tokens",
    }  # fmt: skip
    assert builder(base_url="http://h/v1").identity() == {
        "kind": "openai", "base_url": "http://h/v1", "model": "m", "api": "chat", "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "stop": [], "seed": 0, "prefill": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("why", "hint"),
    [
        ("`temperature` and `top_p` cannot both be specified", "guide.sampling.temperature=null"),
        ("Unsupported value: 'top_p'", "guide.sampling.top_p=null"),
        ('Unknown name "seed": Cannot find field', "guide.sampling.send_seed=false"),
        ("no such luck", "check the guide's settings"),
    ],
)
def test_a_server_that_refuses_all_says_what_to_leave_out(why: str, hint: str) -> None:
    with FakeOpenAI(lambda n, seen: Reply(status=400, error={"message": why})) as server:
        guide = OpenAIGuide(config(base_url=server.url, concurrency=1, mode="live"), seed=0)
        with closing(guide), pytest.raises(UserError, match="refused all of the first") as caught:
            guide.complete([GuideRequest(Example(str(i), f"p{i}")) for i in range(12)])
    assert hint in (caught.value.hint or "")


def test_a_judge_does_not_send_what_its_model_refuses() -> None:
    def sampling(name: str, **given: Any) -> Any:
        guide = {"mode": "replay", **({"sampling": given} if given else {})}
        reward = JudgeReward(name, guide=guide)
        with closing(reward.judge.guide):
            return reward.judge.config.sampling, reward.settings

    at_rest, told = sampling("claude-opus-5-5")
    assert at_rest.temperature is None and "temperature=default" in told
    assert sampling("openai:m")[0].temperature == 0.0
    assert sampling("openai:m", temperature=None)[0].temperature is None
    with pytest.raises(UserError, match="takes no temperature"):
        sampling("claude-opus-5-5", temperature=0.5)


def test_a_judge_s_signature_has_what_is_sent_besides() -> None:
    def told(**guide: Any) -> str:
        reward = JudgeReward("openai:m", guide={"mode": "replay", **guide})
        with closing(reward.judge.guide):
            return reward.settings

    assert "request=" not in told() and "request=" not in told(headers={"a": "b"})
    assert told(reasoning_effort="low") != told(reasoning_effort="high") != told()
    assert told(extra_body={"a": 1}) != told(extra_body={"a": 2})


# --- keys


@pytest.mark.parametrize(
    ("name", "changes", "variable"),
    [
        ("openai:m", {}, "OPENAI_API_KEY"),
        ("openai:m", {"base_url": "http://127.0.0.1:1/v1"}, "OPENAI_API_KEY"),
        ("openai:m", {"base_url": "https://own.example.org/v1"}, "OPENAI_API_KEY"),  # a recipe's is refused, see below
        ("openai:m", {"base_url": "https://own.example.org/v1", "api_key_env": "OWN_KEY"}, "OWN_KEY"),
        ("openai:m", {"base_url": "https://api.mistral.ai/v1"}, "MISTRAL_API_KEY"),
        ("openai:m", {"base_url": "https://api.mistral.ai/v1", "api_key_env": "OPENAI_API_KEY"}, "OPENAI_API_KEY"),
        ("openai:m", {"provider": "deepseek"}, "DEEPSEEK_API_KEY"),
        ("deepseek:m", {"base_url": "https://proxy.example.org/v1"}, "DEEPSEEK_API_KEY is the key of deepseek"),
        ("deepseek:m", {"base_url": "https://proxy.example.org/v1", "api_key_env": "OWN_KEY"}, "OWN_KEY"),
        ("deepseek:m", {"base_url": "http://127.0.0.1:1/v1"}, None),
        ("vllm-server:m", {"base_url": "http://gpu:8000/v1"}, "VLLM_API_KEY is the key of vllm-server"),
        ("ollama:m", {"base_url": "http://gpu:11434/v1"}, None),
        ("claude-opus-5-5", {}, "ANTHROPIC_API_KEY"),
        ("gpt-4o", {}, "OPENAI_API_KEY"),
    ],
)
def test_whose_key_goes_where(name: str, changes: dict[str, Any], variable: str | None) -> None:
    if variable is not None and " " in variable:
        with pytest.raises(UserError, match=variable) as caught:
            variable_of(endpoint(name, **changes))
        assert "guide.api_key_env" in (caught.value.hint or "")
    else:
        assert variable_of(endpoint(name, **changes)) == variable


def test_a_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(UserError, match="ANTHROPIC_API_KEY is not set"):
        api_key(endpoint("claude-opus-5-5"))
    with pytest.raises(UserError, match="OWN_KEY is not set"):  # it was named: a server here or not
        api_key(endpoint(base_url="http://127.0.0.1:1/v1", api_key_env="OWN_KEY"))
    assert api_key(endpoint("ollama:m")) == (NO_KEY, None)
    assert api_key(endpoint("vllm-server:m")) == (NO_KEY, "VLLM_API_KEY")


def test_the_key_of_an_alias_stays_with_its_host(tmp_path: Path) -> None:
    own = tmp_path / "config" / "aliases.yaml"
    own.parent.mkdir()
    own.write_text(
        "providers:\n  - name: ours\n    base_url: https://ours.example.org/v1\n    api_key_env: OURS\n    seed: null\n"
        "aliases:\n  - name: mine\n    model: m\n    base_url: https://own.example.org/v1\n    api_key_env: OWN_KEY\n"
        "    usd_per_million_input: 1\n    usd_per_million_output: 1\n"
    )
    assert variable_of(endpoint("mine")) == "OWN_KEY" and endpoint("mine").nano_usd_per_token == (1000, 1000)
    elsewhere = endpoint("mine", base_url="https://else.example.org/v1")
    assert variable_of(elsewhere) == "OPENAI_API_KEY" and elsewhere.nano_usd_per_token is None
    assert variable_of(endpoint("ours:m")) == "OURS" and "seed" not in body("ours:m")


ELSEWHERE = "https://elsewhere.example.org/v1"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: d.jsonl\noutput: o\n" + text + ("" if "reward:" in text else "reward: length\n"))
    return path


GUIDE = f"guide:\n  name: openai:m\n  base_url: {ELSEWHERE}\n"
JUDGE = f"reward:\n  - name: judge:openai:m\n    params:\n      guide:\n        base_url: {ELSEWHERE}\n"


@pytest.mark.parametrize(
    ("text", "sets", "flags", "refused"),
    [
        (GUIDE, (), {}, "guide.base_url:6"),
        (JUDGE, (), {}, "reward.0.params.guide.base_url:8"),
        (JUDGE.replace("openai:m", "gpt-4o"), (), {}, "reward.0.params.guide.base_url:8"),
        (GUIDE + "  api_key_env: OPENAI_API_KEY\n", (), {}, None),
        (JUDGE + "        api_key_env: OWN_KEY\n", (), {}, None),
        (GUIDE + "  mode: replay\n", (), {}, None),
        (GUIDE, (), {"guide.base_url": ELSEWHERE}, None),
        (GUIDE, (), {"guide.api_key_env": "OPENAI_API_KEY"}, None),
        (GUIDE, (f"guide.base_url={ELSEWHERE}",), {}, None),
        (GUIDE + JUDGE, (f"guide.base_url={ELSEWHERE}",), {}, None),  # the host was named once
        (GUIDE + JUDGE, ("guide.base_url=https://third.example.org/v1",), {}, "reward.0.params.guide.base_url:11"),
        (GUIDE.replace(ELSEWHERE, "http://127.0.0.1:1/v1"), (), {}, None),
        (GUIDE.replace(ELSEWHERE, "https://api.openai.com/v1"), (), {}, None),
        (GUIDE.replace(ELSEWHERE, "https://api.mistral.ai/v1"), (), {}, None),  # OPENAI_API_KEY does not go there
        (GUIDE.replace(ELSEWHERE, "http://gpu:11434/v1").replace("openai:m", "ollama:m"), (), {}, None),
        (GUIDE + "  provider: openai\n", (), {}, "guide.base_url:6"),
        (JUDGE.replace("judge:openai:m", "judge:hf:x"), (), {}, None),
    ],
)
def test_a_recipe_alone_sends_the_default_key_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    sets: tuple[str, ...],
    flags: dict[str, Any],
    refused: str | None,
) -> None:
    path = recipe(tmp_path, text)
    resolved = resolve(TrainConfig, files=[path], sets=sets, flags=flags)
    refuse_unnamed_hosts(resolved)  # without a key there is nothing to send
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    if refused is None:
        refuse_unnamed_hosts(resolved)
        return
    key, line = refused.split(":")
    with pytest.raises(UserError, match=f"{key} names .*example.org") as caught:
        refuse_unnamed_hosts(resolved)
    assert caught.value.where == f"{path}:{line}" and "api_key_env" in (caught.value.hint or "")
    monkeypatch.setenv("OPENAI_BASE_URL", ELSEWHERE)
    refuse_unnamed_hosts(resolved)


# --- what reaches a server


def headers_at(server: FakeOpenAI, **changes: Any) -> dict[str, str]:
    with closing(OpenAIGuide(config(base_url=server.url, mode="live", **changes), seed=0)) as guide:
        guide.complete([ASKED])
    return dict(server.requests[-1].headers)


def test_openai_s_own_headers_go_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("OPENAI_API_KEY", "sk-of-openai"), ("OWN_KEY", "sk-own"), ("OPENAI_ORG_ID", "org-1"),
        ("OPENAI_PROJECT_ID", "proj-1"), ("OPENAI_CUSTOM_HEADERS", "X-Gateway: secret\nAuthorization: Bearer other"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    with FakeOpenAI() as server:
        seen = headers_at(server, api_key_env="OWN_KEY")
        assert seen["authorization"] == "Bearer sk-own"
        assert not {"openai-organization", "openai-project", "x-gateway"} & set(seen)
        assert headers_at(server)["authorization"] == "Bearer sk-of-openai"
    client = Connection(endpoint(), timeout_s=1.0)
    try:
        assert client.client.default_headers["OpenAI-Organization"] == "org-1"
    finally:
        client.close()


def test_headers_of_the_config_are_filled_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", "s3cret-of-the-gateway")
    headers = {"X-Title": "rlgf", "X-Gateway": "Token ${GATEWAY_TOKEN}", "X-Count": 3}
    with FakeOpenAI() as server:
        seen = headers_at(server, headers=headers)
    assert (seen["x-title"], seen["x-gateway"], seen["x-count"]) == ("rlgf", "Token s3cret-of-the-gateway", "3")
    monkeypatch.delenv("GATEWAY_TOKEN")
    with FakeOpenAI() as server, pytest.raises(UserError, match="GATEWAY_TOKEN is not set, and the header 'X-Gateway'"):
        headers_at(server, headers=headers)


def test_a_server_that_quotes_a_header_does_not_give_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_TOKEN", "s3cret-of-the-gateway")
    reply = Reply(status=400, error={"message": "bad X-Gateway: s3cret-of-the-gateway"})
    settings = {"headers": {"X-Gateway": "${GATEWAY_TOKEN}"}, "mode": "live", "max_retries": 0}
    with FakeOpenAI(lambda n, seen: reply) as server:
        guide = OpenAIGuide(config(base_url=server.url, **settings), seed=0)
        with closing(guide):
            outcome = next(guide.stream([ASKED])).outcome
    assert isinstance(outcome, Failure) and "***" in outcome.message and "s3cret" not in outcome.message


def test_a_redirect_is_not_followed() -> None:
    """A client would send the headers on to a host that nobody named."""
    with FakeOpenAI() as other, FakeOpenAI() as server:
        where = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        server.plan = lambda n, seen: Reply(status=307, headers={"Location": where})
        settings = {"mode": "live", "max_retries": 0, "headers": {"X-Gateway": "secret"}}
        with closing(OpenAIGuide(config(base_url=server.url, **settings), seed=0)) as guide:
            assert isinstance(next(guide.stream([ASKED])).outcome, Failure)
        assert server.requests and not other.requests


@pytest.mark.parametrize(
    ("variable", "proxy"), [("HTTP_PROXY", "http://127.0.0.1:9"), ("ALL_PROXY", "http://127.0.0.1:9")]
)
def test_this_machine_is_reached_without_a_proxy(monkeypatch: pytest.MonkeyPatch, variable: str, proxy: str) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(variable, proxy)
    with FakeOpenAI() as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            guide = OpenAIGuide(config(base_url=url, mode="live", max_retries=0), seed=0)
            with closing(guide):
                assert isinstance(next(guide.stream([ASKED])).outcome, Completion)


@pytest.mark.parametrize(
    ("variables", "why", "hint"),
    [
        ({"ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY speaks SOCKS", "pip install socksio"),
        ({"HTTPS_PROXY": "ftp://someone:hidden@h"}, "HTTPS_PROXY is not a URL", "http://proxy:3128"),
        ({"SSL_CERT_FILE": "/no/such/file.pem"}, "SSL_CERT_FILE cannot be read", "PEM"),
        ({"SSL_CERT_FILE": __file__}, "SSL_CERT_FILE cannot be read", "PEM"),
    ],
)
def test_a_proxy_or_a_certificate_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], why: str, hint: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=why) as caught:
        OpenAIGuide(config(mode="live"), seed=0)
    assert hint in (caught.value.hint or "") and "hidden" not in str(caught.value)
