"""``vllm:PATH`` over a stand-in for the engine that answers by transformers, so that texts can be compared."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import chat_checkpoint
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import describe, make_live_guide
from rlgf_cli.protocols import Example, GuideRequest, Message


class Engine:
    """What the guide uses of ``vllm.LLM``: greedy, one request at a time."""

    def __init__(self, model: str, dtype: str, max_model_len: int | None) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.params: list[Any] = []

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, prompts: list[dict[str, list[int]]], params: list[Any], use_tqdm: bool) -> list[Any]:
        self.params += params
        return [self._one(prompt["prompt_token_ids"], given) for prompt, given in zip(prompts, params, strict=True)]

    def _one(self, ids: list[int], given: Any) -> Any:
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=given.max_tokens, do_sample=False)
        new = out[0, len(ids) :].tolist()
        ended = bool(new) and new[-1] == self.model.generation_config.eos_token_id
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        written = SimpleNamespace(text=text, token_ids=new, finish_reason="stop" if ended else "length")
        return SimpleNamespace(prompt_token_ids=ids, outputs=[written])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM = Engine  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def config(path: Path, kind: str = "vllm", **changes: Any) -> GuideConfig:
    return GuideConfig.model_validate({"name": f"{kind}:{path}", "sampling": {"temperature": 0}, **changes})


def requests(prefix: str = "") -> list[GuideRequest]:
    return [GuideRequest(Example(str(i), f"cat finds {word}"), prefix, 0, 7) for i, word in enumerate(["river", "it"])]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("prefix", ["", " the cat"])
def test_it_writes_what_the_checkpoint_writes(tiny_gpt2: Path, prefix: str) -> None:
    texts = []
    for kind in ("vllm", "hf"):
        with closing(make_live_guide(config(tiny_gpt2, kind), seed=0)) as guide:
            texts.append([(c.text.rstrip(), c.finish_reason, c.usage) for c in guide.complete(requests(prefix))])
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("engine")
def test_sampling_reaches_the_engine_and_each_request_has_its_seed(tiny_gpt2: Path) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "stop": ["zzz"]}
    with closing(make_live_guide(config(tiny_gpt2, sampling=sampling), seed=3)) as guide:
        guide.complete([*requests(), GuideRequest(Example("0", "cat finds river"), "", 1, 7)])
        params = guide._engine.params  # type: ignore[attr-defined]
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens, tuple(p.stop)) for p in params} == {
        (0.7, 0.9, -1, 7, ("zzz",))
    }
    assert len({p.seed for p in params}) == 3


@pytest.mark.usefixtures("engine")
def test_the_end_of_a_chats_turn_reaches_the_engine(tmp_path: Path) -> None:
    """Its own defaults are the checkpoint's generation_config, which may know EOS alone."""
    folder = chat_checkpoint(tmp_path, "chatml")
    for template, token in ((None, "<|im_end|>"), ("{prompt}", None)):
        with closing(make_live_guide(config(folder, prompt_template=template), seed=0)) as guide:
            guide.complete(requests())
            stops = [p.stop_token_ids for p in guide._engine.params]  # type: ignore[attr-defined]
            assert stops == [None if token is None else [guide.tokenizer.convert_tokens_to_ids(token)]] * 2


@pytest.mark.usefixtures("engine")
def test_a_conversation_is_rendered_as_for_the_checkpoint(tmp_path: Path, tiny_gpt2: Path) -> None:
    folder = chat_checkpoint(tmp_path, "chatml")
    talk = (Message("system", "the queen ."), Message("user", "cat finds river"))
    asked = GuideRequest(Example.of("x", talk), "the cat", 0, 7)
    with (
        closing(make_live_guide(config(folder), seed=0)) as vllm,
        closing(make_live_guide(config(folder, "hf"), seed=0)) as hf,
    ):
        encoded, _ = hf._encode(asked)  # type: ignore[attr-defined]
        ids = vllm._ids(asked)  # type: ignore[attr-defined]
    assert ids == [*encoded.ids, *hf.text.encode_response(hf.tokenizer, "the cat")]  # type: ignore[attr-defined]
    assert "the queen ." in vllm.tokenizer.decode(ids)
    with closing(make_live_guide(config(tiny_gpt2), seed=0)) as bare:
        bare.check([Example("y", "cat")], 7)
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            bare.check([Example.of("x", talk)], 7)


@pytest.mark.usefixtures("engine")
def test_overlong_prompts(tiny_gpt2: Path) -> None:
    strict = make_live_guide(config(tiny_gpt2, max_prompt_tokens=1), seed=0)
    with closing(strict), pytest.raises(UserError, match=r"max_prompt_tokens is 1"):
        strict.complete(requests())
    with closing(make_live_guide(config(tiny_gpt2, max_prompt_tokens=1, on_overlong="truncate"), seed=0)) as guide:
        guide.complete(requests())
        assert guide.counts["prompts_truncated"] == 2


def test_without_the_extra(tiny_gpt2: Path) -> None:
    assert describe(config(tiny_gpt2)).continues
    with pytest.raises(UserError, match="vLLM is not installed") as caught:
        make_live_guide(config(tiny_gpt2), seed=0)
    assert "rlgf-cli[vllm]" in (caught.value.hint or "")
    with pytest.raises(UserError, match="num_beams"):
        describe(config(tiny_gpt2, sampling={"num_beams": 2}))
