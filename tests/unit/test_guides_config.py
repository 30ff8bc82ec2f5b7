"""Which guide a name means, what it can do, and what is refused before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlgf_cli import registry
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.guide import CONTINUE_TEMPLATE, GuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import describe, make_guide, make_live_guide
from rlgf_cli.guides.openai import presets as aliases
from rlgf_cli.guides.openai.endpoint import OPENAI_URL, endpoint_of, same_model
from rlgf_cli.protocols import GuideAbilities


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RLGF_CONFIG_DIR", str(tmp_path / "config"))


def guide_file(folder: Path) -> Path:
    path = folder / "guide.jsonl"
    path.write_text('{"id": "a", "prompt": "p", "completion": "c", "model": "m"}\n')
    return path


def test_abilities_of_each_kind(tmp_path: Path) -> None:
    recorded = GuideAbilities(live=False, continues=False)
    live = GuideAbilities(live=True, continues=True, remote=True, at_once=16)
    assert describe(GuideConfig(name=str(guide_file(tmp_path)))) == recorded
    assert describe(GuideConfig(name="hf:no/such/folder/yet")) == GuideAbilities(live=True, continues=True, at_once=32)
    assert describe(GuideConfig(name="openai:some-model")) == live
    assert describe(GuideConfig(name="gpt-3.5")) == live
    assert describe(GuideConfig(name="gpt-3.5", continue_template=None)).continues is False
    assert describe(GuideConfig(name="openai:m", base_url="http://h/v1", continuation="prefill")) == live
    # the completion API needs no template: prompt and prefix are one text
    assert describe(GuideConfig(name="openai:m", api="completion", continue_template=None)) == live


def test_describing_a_guide_imports_neither_torch_nor_the_client() -> None:
    program = (
        "import sys\n"
        "from rlgf_cli.config.guide import GuideConfig\n"
        "from rlgf_cli.guides.make import describe\n"
        "assert describe(GuideConfig(name='hf:x')).live and describe(GuideConfig(name='gpt-3.5')).live\n"
        "print(sorted({'torch', 'transformers', 'openai'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("gpt-3.6", "unknown guide 'gpt-3.6'", "'gpt-3.5'"),
        ("opnai:gpt-4", "unknown guide 'opnai:gpt-4'", "'openai'"),
        ("hf:", "names nothing", "hf:PATH"),
        ("runs/guide", "unknown guide 'runs/guide'", "hf:runs/guide"),
        ("missing.jsonl", "no such guide file", "collect-guide"),
        ("missing.jsonl.gz", "no such guide file", "collect-guide"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        describe(GuideConfig(name=name))
    assert hint in (caught.value.hint or "")


def test_a_folder_is_named_with_its_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this guide is a folder") as caught:
        describe(GuideConfig(name=str(tmp_path)))
    assert f"hf:{tmp_path}" in (caught.value.hint or "")


def test_a_recorded_guide_has_nothing_new_to_give(tmp_path: Path) -> None:
    config = GuideConfig(name=str(guide_file(tmp_path)))
    assert not make_guide(config, seed=0).abilities.live
    with pytest.raises(UserError, match="recorded"):
        make_live_guide(config, seed=0)


def test_a_kind_of_another_package_must_be_a_guide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["guides"], "odd", registry.Entry("json:JSONDecoder", "no guide"))
    with pytest.raises(UserError, match=r"not a subclass of rlgf_cli\.protocols\.Guide"):
        describe(GuideConfig(name="odd:x"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_template": "no place"}, "prompt_template must hold"),
        ({"continue_template": "{prompt}"}, "continue_template must hold"),
        ({"base_url": "localhost:8000"}, "base_url is not an http"),
        ({"base_url": "http://h/v1?key=s3cret-key"}, "must end with the path"),
        ({"sampling": {"num_beams": 2, "top_k": 5}}, "beam search takes no"),
        ({"sampling": {"stop": [""]}}, "empty stop text"),
    ],
)
def test_refused_values(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve(
            CollectGuideConfig,
            flags={"output": "o", "data": "d", "guide": {"name": "gpt-3.5", **changes}},
        )
    assert "s3cret" not in str(caught.value)


def test_a_password_in_a_url_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://me:s3cret-key@example.org/v1"
    with pytest.raises(UserError, match="user name or password") as caught:
        resolve(CollectGuideConfig, flags={"output": "o", "data": "d", "guide": "gpt-3.5", "guide.base_url": url})
    assert "s3cret" not in f"{caught.value} {caught.value.hint}"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(UserError, match="OPENAI_BASE_URL holds a user name") as caught:
        describe(GuideConfig(name="gpt-3.5"))
    assert "s3cret" not in f"{caught.value} {caught.value.hint}"


def test_keys_that_a_kind_does_not_know_are_refused() -> None:
    with pytest.raises(UserError, match="has no beam search"):
        describe(GuideConfig.model_validate({"name": "gpt-3.5", "sampling": {"num_beams": 4}}))
    with pytest.raises(UserError, match=r"guide\.system makes turns .* uses the completion API"):
        describe(GuideConfig(name="openai:m", api="completion", system="be brief"))
    with pytest.raises(UserError, match=r"guide\.system makes turns .* leaves out the chat template"):
        describe(GuideConfig(name="hf:x", prompt_template="Q: {prompt}", system="be brief"))
    with pytest.raises(UserError, match="not both"):
        describe(GuideConfig(name="hf:x", api="chat", prompt_template="Q: {prompt}"))


def test_the_shorthand_and_flags_fill_one_section() -> None:
    resolved = resolve(
        CollectGuideConfig,
        sets=["guide.sampling.top_p=0.92"],
        flags={"output": "o", "data": "d", "guide": "gpt-3.5", "guide.base_url": "http://127.0.0.1:1/v1"},
    )
    guide = resolved.config.guide
    assert (guide.name, guide.base_url, guide.sampling.top_p) == ("gpt-3.5", "http://127.0.0.1:1/v1", 0.92)
    assert guide.continue_template == CONTINUE_TEMPLATE


def test_settings_hold_what_decides_the_text_and_nothing_of_the_transport() -> None:
    settings = GuideConfig(name="gpt-3.5", base_url="http://127.0.0.1:1/v1", concurrency=3).settings()
    assert set(settings) == {
        "name", "api", "system", "prompt_template", "continuation", "continue_template", "clean", "sampling", "dtype",
        "max_prompt_tokens", "on_overlong",
    }  # fmt: skip


def test_aliases_that_come_with_rlgf() -> None:
    alias = aliases.find("gpt-3.5")
    assert alias is not None and alias.model == "gpt-3.5-turbo"
    assert aliases.find("gpt-3.5-turbo") == alias
    assert aliases.find("gpt-3.5-turb") is None
    for name, known in aliases.known().items():
        priced = known.usd_per_million_input is not None
        assert priced == (known.noted is not None), f"{name}: a price and the day on which it was noted go together"
        assert known.provider in aliases.providers(), f"{name}: a price without a host that it is for"
        assert known.licence, f"{name}: no note on the terms of its texts"


def test_a_user_s_aliases_add_and_win(tmp_path: Path) -> None:
    own = tmp_path / "config" / "aliases.yaml"
    own.parent.mkdir()
    own.write_text(
        "aliases:\n"
        "  - name: local\n    model: qwen\n    base_url: http://127.0.0.1:8000/v1\n    api: completion\n"
        "  - name: gpt-3.5\n    model: gpt-3.5-turbo-0125\n"
    )
    endpoint = endpoint_of(GuideConfig(name="local"))
    assert (endpoint.model, endpoint.api, endpoint.base_url) == ("qwen", "completion", "http://127.0.0.1:8000/v1")
    assert endpoint_of(GuideConfig(name="local", api="chat")).api == "chat"
    assert endpoint_of(GuideConfig(name="gpt-3.5")).model == "gpt-3.5-turbo-0125"
    own.write_text("aliases:\n  - name: local\n    modl: qwen\n")
    with pytest.raises(UserError, match="unknown config key") as caught:
        endpoint_of(GuideConfig(name="local"))
    assert caught.value.where == f"{own}:3" and "'model'" in (caught.value.hint or "")
    own.write_text("aliases:\n  - name: local\n    model: a\n  - name: local\n    model: b\n")
    with pytest.raises(UserError, match="'local' is here twice"):
        endpoint_of(GuideConfig(name="local"))


def test_which_url_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint_of(GuideConfig(name="gpt-3.5")).base_url == OPENAI_URL
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert endpoint_of(GuideConfig(name="gpt-3.5")).base_url == "http://127.0.0.1:1/v1"
    assert endpoint_of(GuideConfig(name="gpt-3.5", base_url="http://h/v1")).base_url == "http://h/v1"


def test_prices_of_unnamed_models_are_openai_s_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint_of(GuideConfig(name="openai:gpt-4o-mini")).alias is not None
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert endpoint_of(GuideConfig(name="openai:gpt-4o-mini")).alias is None


def test_prices_and_context_of_the_config_win_over_the_alias_s() -> None:
    own = {"usd_per_million_input": 1.0, "usd_per_million_output": 2.0, "context_length": 100, "licence": "ours"}
    alias = endpoint_of(GuideConfig.model_validate({"name": "gpt-3.5", **own})).alias
    assert alias is not None and alias.model_dump(include=set(own)) == own and alias.model == "gpt-3.5-turbo"
    alias = endpoint_of(GuideConfig.model_validate({"name": "openai:mine", "base_url": "http://h/v1", **own})).alias
    assert alias is not None and alias.usd_per_million_output == 2.0
    with pytest.raises(UserError, match="go together"):
        resolve(GuideConfig, flags={"name": "gpt-3.5", "usd_per_million_input": 1.0})


@pytest.mark.parametrize(
    ("asked", "reported", "same"),
    [
        ("gpt-4o", "gpt-4o-2024-08-06", True),
        ("gpt-4o", "gpt-4o-mini", False),
        ("gpt-4o-mini", "gpt-4o", False),
        ("gpt-4", "gpt-4.1", False),
        ("gpt-4", "gpt-4-0613", True),
        ("gpt-4", "gpt-4-1106-preview", True),
        ("llama3", "llama3:latest", True),
        ("org/Model", "model", True),
        ("/models/tiny", "/models/tiny@main", True),
        ("m", "n", False),
    ],
)
def test_which_reported_names_mean_the_model_asked_for(asked: str, reported: str, same: bool) -> None:
    assert same_model(asked, reported) is same
