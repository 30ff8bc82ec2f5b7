"""Packed rows: a group's prompt and common prefix are computed once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl
from families import FAMILIES, family_checkpoint
from rlgf_cli.errors import UserError
from rlgf_cli.functional import logprobs
from rlgf_cli.models import forward
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch, sharing_problem
from rlgf_cli.models.generate import pad_rows, sample
from rlgf_cli.models.head import find_finish
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.packing import groups_of, pack, saves
from rlgf_cli.training.microbatches import split_by_tokens

SCORED = {"temperature": 0.8, "min_new_tokens": 1}
PROMPTS = [[*range(20, 38)], [*range(50, 62)], [90, 91, 92]]
ROWS = [
    # (prompt, response): two groups whose responses begin alike for two tokens and for none, and a row by itself
    (0, [40, 41, 42, 43, 44, 1]), (1, [60, 61, 1]), (0, [40, 41, 70]), (0, [40, 41, 42, 43, 99, 98, 97, 96, 1]),
    (2, [80, 81, 82, 83]), (1, [71, 72, 73, 74]), (0, [40, 41, 1]), (1, [77]),
]  # fmt: skip


@pytest.fixture(scope="module", params=[*FAMILIES, "tiny_gpt2", "tiny_t5", "tiny_bart"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name = request.param
    if name.startswith("tiny"):
        return rl.loaded_from(request.getfixturevalue(name))
    return rl.loaded_from(family_checkpoint(tmp_path_factory.mktemp(name), name))


def rows_batch(loaded: Loaded, rows: Sequence[tuple[int, list[int]]] = ROWS) -> TokenBatch:
    return rl.token_batch(loaded, [PROMPTS[p] for p, _ in rows], [r for _, r in rows])


def scored(model: ActorCritic, batch: TokenBatch, weights: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Log-probabilities, entropies, values and the gradients of a weighted sum of all of them."""
    model.zero_grad()
    out = model.forward_logprobs(batch, rl.real_mask(batch), values=["policy"], entropy=True, **options)
    assert out.entropies is not None
    real = rl.real_mask(batch)
    (weights * (out.logprobs + 0.3 * out.entropies + out.values["policy"]))[real].sum().backward()
    found = {"logprobs": out.logprobs[real], "entropies": out.entropies[real], "values": out.values["policy"][real]}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found["reference"] = model.ref_logprobs(batch, real, **options)[real]
    return {name: tensor.detach() for name, tensor in found.items()}


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_packed_and_separate_rows_are_equal(loaded: Loaded, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rl.actor_critic(loaded, mode=mode)
    assert model.share_prompts and model.sharing_problem == ""
    widths: list[tuple[int, ...]] = []
    network = loaded.model.get_encoder() if loaded.encoder_decoder else loaded.model
    hook = network.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    batch = rows_batch(loaded)
    weights = torch.randn(batch.response_ids.shape, generator=torch.Generator().manual_seed(0))
    packed = scored(model, batch, weights, **SCORED)
    together = sum(rows * columns for rows, columns in widths)
    model.share_prompts = False
    widths.clear()
    separate = scored(model, batch, weights, **SCORED)
    hook.remove()
    assert together < 0.7 * sum(rows * columns for rows, columns in widths)
    assert set(packed) == set(separate) and any("critics" in name for name in packed) and len(packed) > 15
    for name, expected in separate.items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((packed[name] - expected).abs().max()) < 1e-5 * scale, name


def test_a_sliding_window_is_of_positions_not_of_columns(tmp_path: Path) -> None:
    """The last response of a packed row is far from the prompt in columns, and near to it in positions."""
    model = rl.actor_critic(rl.loaded_from(family_checkpoint(tmp_path, "phi3")))  # a window of 5
    rows = [(1, [100 + 10 * i, 3, 4, 5]) for i in range(8)]
    batch = rows_batch(model.loaded, rows)
    mask = rl.real_mask(batch)
    found = model.forward_logprobs(batch, mask, **SCORED).logprobs
    for (prompt, response), row in zip(rows, found, strict=True):
        alone = rl.plain_logprobs(model.loaded, PROMPTS[prompt], response, **SCORED)
        assert torch.allclose(row.double(), alone, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_packed_token_sees_its_own_row_and_nothing_else(data: st.DataObject) -> None:
    """Read off the mask: what is visible where a token is predicted, by position, is the row before it."""
    prompts = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=3))
    rows = data.draw(
        st.lists(
            st.tuples(st.sampled_from(range(len(prompts))), st.lists(st.integers(0, 2), min_size=1, max_size=5)),
            min_size=1,
            max_size=7,
        )
    )
    ids, mask = pad_rows([prompts[p] for p, _ in rows], 3, left=data.draw(st.booleans()))
    responses, real = pad_rows([r for _, r in rows], 3, left=False)
    tensors = (ids, mask, responses, real.sum(-1))
    groups = groups_of(*tensors)
    assert len(groups) == len({tuple(prompts[p]) for p, _ in rows})
    assert sorted(i for g in groups for i in g.rows) == list(range(len(rows)))
    packed = pack(groups, *tensors)
    width = packed.ids.shape[1]
    assert width == max(g.columns(real.sum(-1).tolist()) for g in groups)
    for i, (prompt, response) in enumerate(rows):
        for t in range(len(response)):
            r, column = divmod(int(packed.index[i, t]), width)
            visible = packed.allowed[r, column].nonzero()[:, 0]
            places = packed.positions[r, visible]
            assert sorted(places.tolist()) == list(range(len(prompts[prompt]) + t))
            assert packed.ids[r, visible[places.argsort()]].tolist() == [*prompts[prompt], *response[:t]]
            for window in (1, 3):
                seen = packed.within(window)[r, 0, column].nonzero()[:, 0]
                assert sorted(packed.positions[r, seen].tolist()) == sorted(places.tolist())[-window:]


def test_what_would_cost_more_is_not_packed() -> None:
    """Few columns in common: one long row with a mask costs more than separate ones. The other way round it is worth
    it, and rows without an equal prompt are never packed."""
    ids = torch.ones((4, 8), dtype=torch.long)
    response = torch.arange(4 * 400).reshape(4, 400)
    lengths = torch.full((4,), 400)
    groups = groups_of(ids, torch.ones_like(ids), response, lengths)
    assert not saves(groups, lengths.tolist(), hidden=16)
    short = torch.full((4,), 4)
    assert saves(groups_of(ids, torch.ones_like(ids), response, short), short.tolist(), hidden=16)
    alone = groups_of(torch.arange(32).reshape(4, 8), torch.ones_like(ids), response, short)
    assert not saves(alone, short.tolist(), hidden=16)


def test_a_model_that_takes_no_such_mask_is_computed_row_by_row(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = rl.loaded_from(tiny_llama)
    run = type(loaded.model).forward

    def blind(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        four = attention_mask is not None and attention_mask.dim() == 4
        return run(self, *args, attention_mask=None if four else attention_mask, **kwargs)

    def strict(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("a mask of shape [B, L] is needed\nand no other")
        return run(self, *args, attention_mask=attention_mask, **kwargs)

    for replaced, words in ((blind, "other hidden states"), (strict, r"a mask of shape \[B, L\] is needed")):
        monkeypatch.setattr(type(loaded.model), "forward", replaced)
        model = rl.actor_critic(loaded)
        assert not model.share_prompts
        with pytest.raises(AssertionError, match=words):
            raise AssertionError(model.sharing_problem)
        batch = rows_batch(loaded)
        found = model.forward_logprobs(batch, rl.real_mask(batch), **SCORED).logprobs
        monkeypatch.undo()
        alone = rl.plain_logprobs(loaded, PROMPTS[0], ROWS[0][1], **SCORED)
        assert torch.allclose(found[0, : len(alone)].double(), alone, atol=2e-5)
    loaded.model.config.attention_types = [[["global", "local"], 1]]  # GPT-Neo's windows are of columns
    assert "no custom attention mask" in sharing_problem(loaded.model)
    del loaded.model.config.attention_types
    loaded.model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in sharing_problem(loaded.model)


def test_eager_attention_takes_the_mask_too(tiny_llama: Path) -> None:
    loaded = rl.loaded_from(tiny_llama)
    loaded.model.set_attn_implementation("eager")
    assert sharing_problem(loaded.model) == ""


# --- the LM head


def test_chunks_change_neither_log_probabilities_nor_gradients(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three rows, against all at once."""
    model = rl.actor_critic(loaded)
    batch = rows_batch(loaded)
    weights = torch.randn(batch.response_ids.shape, generator=torch.Generator().manual_seed(0))
    whole = scored(model, batch, weights, **SCORED)
    sizes: list[int] = []
    finish = model._finish
    model._finish = lambda logits: (sizes.append(len(logits)), finish(logits))[1]
    vocabulary = loaded.model.config.get_text_config().vocab_size
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 3 * 4 * vocabulary + 5)
    parts = scored(model, batch, weights, **SCORED)
    assert max(sizes) == 3 and len(sizes) > 10
    for name, expected in whole.items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((parts[name] - expected).abs().max()) < 1e-5 * scale, name


def test_a_head_that_is_finished_in_an_unknown_way_is_refused(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = rl.loaded_from(tiny_llama)
    run = type(loaded.model).forward

    def squared(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = run(self, *args, **kwargs)
        out.logits = out.logits.square()
        return out

    monkeypatch.setattr(type(loaded.model), "forward", squared)
    with pytest.raises(UserError, match="changes the output of its LM head"):
        find_finish(loaded.model)


# --- budgets of tokens


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_parts_hold_every_row_once_within_the_budget(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    prompts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=count, max_size=count))
    responses = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=count, max_size=count))
    limit, packing_hidden = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([None, 1, 64]))
    tokens = TokenBatch.build(prompts, responses, pad_id=0, encoder_decoder=False, device=torch.device("cpu"))
    rows = torch.tensor(data.draw(st.permutations(range(count))))[: data.draw(st.integers(1, count))]
    parts = split_by_tokens(tokens, rows, limit, packing_hidden=packing_hidden)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(rows)))
    if len(parts) == 1:
        assert parts[0].tolist() == list(range(len(rows)))
    for part in parts:
        own = tokens.rows(rows[part])
        groups = groups_of(own.prompt_ids, own.prompt_mask, own.response_ids, own.lengths)
        if packing_hidden is not None and saves(groups, own.lengths.tolist(), packing_hidden):
            size = len(groups) * max(g.columns(own.lengths.tolist()) for g in groups)
        else:
            longest = max(int(m.sum()) + int(n) for m, n in zip(own.prompt_mask, own.lengths, strict=True)) - 1
            size = len(part) * longest
        assert size <= limit or len(part) == 1
    assert split_by_tokens(tokens, rows, None, packing_hidden=packing_hidden)[0].tolist() == list(range(len(rows)))


# --- sampling


def test_equal_prompts_are_prefilled_once_and_each_row_keeps_its_own_text(loaded: Loaded) -> None:
    owners = [0, 1, 0, 2, 0, 1]
    uniforms = torch.rand((6, 12), generator=torch.Generator().manual_seed(2)).numpy()
    sizes: list[int] = []
    network = loaded.model.get_encoder() if loaded.encoder_decoder else loaded.model
    hook = network.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    options: dict[str, Any] = {"max_new_tokens": 8, "eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id}
    prefixes = [[5, 6], [7], [5, 6], [8], [5, 6], [9]]
    together = sample(loaded.model, [PROMPTS[i] for i in owners], prefixes=prefixes, uniforms=uniforms, **options)
    hook.remove()
    assert sizes[0] == {"bart": 2}.get(loaded.model.config.model_type, 3 if loaded.encoder_decoder else 4)
    for i, row in enumerate(together):
        alone = sample(
            loaded.model, [PROMPTS[owners[i]]], prefixes=[prefixes[i]], uniforms=uniforms[i : i + 1], **options
        )
        assert alone[0].ids == row.ids
    assert len({tuple(row.ids) for row in together}) == 6


def test_states_of_a_group_of_one_are_those_of_its_row(tiny_llama: Path) -> None:
    """`pack` on rows without company: used where one group of a batch is packed and another has a single row."""
    loaded = rl.loaded_from(tiny_llama)
    batch = rows_batch(loaded)
    packed = forward._packed_states(loaded.model, batch)
    assert packed is not None
    alone = forward.response_states(loaded.model, batch.rows(torch.tensor([4])), share_prompts=False).every()
    assert torch.allclose(packed.every()[4, :4], alone[0], atol=1e-5)
    one = forward._packed_states(loaded.model, replace(batch, prompt_ids=batch.prompt_ids + torch.arange(8)[:, None]))
    assert one is None


def test_entropies_and_log_probabilities_by_definition_with_their_gradients() -> None:
    """In float64, with a logit of minus infinity, against autograd through log_softmax."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((5, 7), generator=generator, dtype=torch.float64) * 3
    logits[:, 2] = float("-inf")
    tokens, weights = torch.tensor([0, 1, 3, 6, 4]), torch.randn((2, 5), generator=generator, dtype=torch.float64)
    own, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    chosen, entropies = logprobs.chosen_logprobs_and_entropies(own, tokens)
    (weights[0] * chosen + weights[1] * entropies).sum().backward()
    logp = plain[:, [0, 1, 3, 4, 5, 6]].log_softmax(-1)
    expected = logp[torch.arange(5), torch.tensor([0, 1, 2, 5, 3])], -(logp.exp() * logp).sum(-1)
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()
    assert torch.allclose(chosen, expected[0]) and torch.allclose(entropies, expected[1])
    assert own.grad is not None and torch.allclose(own.grad, plain.grad)


@pytest.mark.parametrize(("prompt", "response"), [(30, 20), (6, 30), (36, 2)])
def test_no_forward_pass_exceeds_the_budget(tiny_llama: Path, prompt: int, response: int) -> None:
    """Read off the model's inputs: also where a part is not packed after all, because that would cost more."""
    model = rl.actor_critic(rl.loaded_from(tiny_llama))
    rows = [[20 + i, *range(30, 29 + response)] for i in range(16)]
    batch = rl.token_batch(model.loaded, [[7] * prompt] * 16, rows)
    sizes: list[int] = []
    hook = model.policy.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    everything, limit = torch.arange(16), 150
    for part in split_by_tokens(batch, everything, limit, packing_hidden=model.packing_hidden):
        own = batch.rows(part)
        model.forward_logprobs(own, rl.real_mask(own), **SCORED)
    hook.remove()
    assert max(sizes) <= limit and sum(sizes) <= 16 * (prompt + response - 1)
