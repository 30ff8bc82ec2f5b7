"""A local checkpoint as guide."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_token_boundaries import trained_t5

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.hf import HFGuide
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.protocols import Completion, Example, GuideRequest

EXAMPLES = [Example(f"e{i}", prompt) for i, prompt in enumerate(["cat sees garden", "dog", "the queen calls it"])]


def guide_for(path: Path, seed: int = 0, **changes: Any) -> LiveGuide:
    return make_live_guide(GuideConfig.model_validate({"name": f"hf:{path}", **changes}), seed=seed)


def write(path: Path, requests: list[GuideRequest], seed: int = 0, **changes: Any) -> list[Completion]:
    with closing(guide_for(path, seed, **changes)) as guide:
        return guide.complete(requests)


def test_texts_do_not_depend_on_batch_or_order(any_model: Path) -> None:
    requests = [
        GuideRequest(example, prefix=prefix, sample_index=index, max_new_tokens=4 + 3 * index)
        for example in EXAMPLES
        for prefix in ("", "the cat")
        for index in (0, 1)
    ]
    together = write(any_model, requests)
    assert [text.text for text in together] == [text.text for text in write(any_model, requests, batch_size=1)]
    backwards = write(any_model, requests[::-1], batch_size=5)[::-1]
    assert [text.text for text in together] == [text.text for text in backwards]
    for request, text in zip(requests, together, strict=True):
        assert 1 <= text.usage["completion_tokens"] <= request.max_new_tokens
        assert text.finish_reason == "stop" or text.usage["completion_tokens"] == request.max_new_tokens
        assert text.nano_usd is None and text.model == str(any_model)


def test_samples_differ_and_seeds_repeat(tiny_gpt2: Path) -> None:
    requests = [GuideRequest(EXAMPLES[0], sample_index=i, max_new_tokens=12) for i in range(4)]
    texts = [text.text for text in write(tiny_gpt2, requests)]
    assert len(set(texts)) > 1
    assert [text.text for text in write(tiny_gpt2, requests)] == texts
    assert [text.text for text in write(tiny_gpt2, requests, seed=1)] != texts


def continued_by_hand(path: Path, prompt: str, prefix: str, limit: int) -> str:
    """The greedy continuation, one forward pass per token on the plain Hugging Face model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    encoder_decoder = any(kind in path.name for kind in ("t5", "bart"))
    kind = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = kind.from_pretrained(path).eval()
    source = tokenizer(prompt)["input_ids"]
    # the space is the checkpoints' response_prefix
    begun = tokenizer(" " + prefix, add_special_tokens=False)["input_ids"] if prefix else []
    written: list[int] = []
    while len(written) < limit:
        with torch.no_grad():
            if encoder_decoder:
                decoder = [model.config.decoder_start_token_id, *begun, *written]
                out = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([decoder]))
            else:
                out = model(input_ids=torch.tensor([[*source, *begun, *written]]))
        written.append(int(out.logits[0, -1].argmax()))
        if written[-1] == tokenizer.eos_token_id:
            break
    before, whole = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (begun, [*begun, *written]))
    return whole.removeprefix(before).rstrip()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "t5", "bart"])
def test_a_continuation_follows_prompt_and_prefix(architecture: str, request: pytest.FixtureRequest) -> None:
    """The prefix is prefilled: behind the prompt, or in the decoder of an encoder-decoder."""
    path = request.getfixturevalue(f"tiny_{architecture}")
    prefixes = ["", "the", "in the garden a"]
    requests = [GuideRequest(e, prefix=p, max_new_tokens=6) for e in EXAMPLES for p in prefixes]
    texts = write(path, requests, sampling={"temperature": 0.0})
    expected = [continued_by_hand(path, r.example.prompt, r.prefix, r.max_new_tokens) for r in requests]
    expected = [text if r.prefix else text.removeprefix(" ") for text, r in zip(expected, requests, strict=True)]
    assert [text.text for text in texts] == expected
    assert len(set(expected)) > len(EXAMPLES)  # or the prefixes would not matter


def test_a_template_of_the_guide_s_own_wins(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlgf_cli.models.text import TextFormat

    seen = []
    render = TextFormat.render_prompt

    def spy(self: TextFormat, tokenizer: Any, prompt: str) -> str:
        seen.append(render(self, tokenizer, prompt))
        return seen[-1]

    monkeypatch.setattr(TextFormat, "render_prompt", spy)
    write(tiny_gpt2, [GuideRequest(EXAMPLES[1], max_new_tokens=2)], prompt_template="say: {prompt} .")
    write(tiny_gpt2, [GuideRequest(EXAMPLES[1], max_new_tokens=2)])
    assert seen == ["say: dog .", "dog"]


def test_beams_and_stop_texts(tiny_gpt2: Path) -> None:
    requests = [GuideRequest(example, max_new_tokens=10) for example in EXAMPLES]
    beams = write(tiny_gpt2, requests, sampling={"num_beams": 3})
    assert [text.text for text in beams] == [text.text for text in write(tiny_gpt2, requests, seed=5,
                                                                        sampling={"num_beams": 3})]  # fmt: skip
    plain = write(tiny_gpt2, requests)
    stop = next(text.text[3:5] for text in plain if len(text.text) > 6)
    with closing(guide_for(tiny_gpt2, sampling={"stop": [stop]})) as guide:
        cut = guide.complete(requests)
        assert guide.counts["cut_at_stop"] == sum(stop in text.text for text in plain) > 0
    for before, after in zip(plain, cut, strict=True):
        assert after.text == before.text.split(stop)[0].rstrip()
        assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)


def test_overlong_prompts_are_refused_beforehand_or_cut_and_counted(tiny_gpt2: Path) -> None:
    long = Example("long", "the cat sees the garden . " * 30)
    with closing(guide_for(tiny_gpt2)) as guide:
        guide.check(EXAMPLES, 8)
        with pytest.raises(UserError, match="'long'"):
            guide.check([*EXAMPLES, long], 8)
    with closing(guide_for(tiny_gpt2, on_overlong="truncate")) as guide:
        guide.check([*EXAMPLES, long], 8)
        first, _ = guide.complete([GuideRequest(long, max_new_tokens=8), GuideRequest(EXAMPLES[0], max_new_tokens=8)])
        assert guide.counts == {"prompts_truncated": 1}
        assert first.usage["prompt_tokens"] == 64 - 8
        (cut,) = guide.complete([GuideRequest(long, prefix="the cat", max_new_tokens=8)])
        assert cut.usage["prompt_tokens"] == 64 - 8  # prompt and prefix together leave room for the rest


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model checkpoint"):
        guide_for(tmp_path)


def test_settings_change_with_the_weights(tiny_gpt2: Path, tiny_llama: Path) -> None:
    digests = []
    for path in (tiny_gpt2, tiny_gpt2, tiny_llama):
        with closing(guide_for(path)) as guide:
            digests.append(guide.settings["weights_sha256"])
            assert guide.device
    assert digests[0] == digests[1] != digests[2]


def test_a_space_that_the_guide_s_tokenizer_drops_is_not_written_twice(tiny_gpt2: Path) -> None:
    """A prefix of a byte-level policy may end with a space; T5's tokenizer drops it and begins a word with its own."""
    for tokenizer, expected in ((trained_t5(), "sees"), (None, " sees")):
        with closing(make_live_guide(GuideConfig(name=f"hf:{tiny_gpt2}"), seed=0)) as guide:
            assert isinstance(guide, HFGuide)
            guide.tokenizer = tokenizer or guide.tokenizer
            behind = [GuideRequest(Example("e", "p"), prefix) for prefix in ("the dog ", "the dog", "")]
            texts = [guide.clean(request, Completion(" sees", "stop", "m")) for request in behind]
        assert [t.text for t in texts] == [expected, " sees", " sees"]
        assert texts[0].repaired == (() if expected[0] == " " else ("space_removed",))
