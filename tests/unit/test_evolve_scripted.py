"""The scripted guide does what its table says: the dynamics that the benchmark's policies are held against."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolving import BUILTIN, environment_of
from rlgf_cli.evolve.environment import Chain
from rlgf_cli.evolve.rules import Limits
from teams_rl import says, scripted, scripted_server, seeds

SEED = seeds(1)[0].prompt


def told(prompt: str, index: int) -> str:
    return scripted_server.text_for(prompt, index, BUILTIN)


def outcomes(*chosen: str) -> list[str]:
    """What becomes of operations, one after the other, in a chain of the real environment."""
    prompts = seeds(1)
    place, chain = environment_of(says, seeds=prompts, operations=BUILTIN, limits=Limits()), Chain(prompts[0])
    names = [operation.name for operation in BUILTIN]
    for name in chosen:
        place.step([chain], [names.index(name)])
    return [step.outcome for step in chain.steps]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["constraints"] * 3, ["kept", "kept", "unchanged"]),
        (["concretizing"] * 2, ["kept", "unchanged"]),
        (["deepening"], ["refusal"]),
        (["concretizing", "deepening", "deepening"], ["kept", "kept", "unchanged"]),
        (["reasoning"], ["unchanged"]),
        (["constraints", "reasoning", "reasoning"], ["kept", "kept", "unchanged"]),
        (["complicate_input"] * 2, ["kept", "too_long"]),
        (["constraints", "constraints", "breadth", "constraints"], ["kept"] * 4),  # breadth begins anew
        (["concretizing", "breadth", "deepening"], ["kept", "kept", "refusal"]),
    ],
)
def test_dynamics(chosen, expected):
    assert outcomes(*chosen) == expected


def test_breadth_is_spent_when_the_set_holds_the_tasks_of_the_field():
    assert outcomes(*["breadth"] * 40).count("kept") == scripted.TOPICS


@given(st.sampled_from(BUILTIN), st.text(max_size=300), st.integers(0, 2**31 - 1))
def test_a_rewrite_is_fixed_by_operation_instruction_and_seed(operation, instruction, seed):
    said = scripted.rewrite(operation.name, instruction, seed)
    assert said == scripted.rewrite(operation.name, instruction, seed)
    assert scripted_server.text_for(operation.prompt_for(instruction), seed, BUILTIN) == said


def test_the_seed_draws_the_words():
    assert len({scripted.rewrite("concretizing", SEED, seed) for seed in range(20)}) == 20


def test_another_prompt_is_answered():
    said = told("What is a river?", 1)
    assert said == scripted.answer("What is a river?", 1) and len(said.split()) > 5
    body = {"model": "m", "messages": [{"role": "user", "content": SEED}], "seed": 1}
    reply = scripted_server.reply("/v1/chat/completions", body, told)
    assert reply["choices"][0]["message"]["content"] == told(SEED, 1)
    assert reply["usage"]["total_tokens"] == len(SEED.split()) + len(told(SEED, 1).split())
