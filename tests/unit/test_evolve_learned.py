"""The learned policy: what it draws, and that its folder gives back the same one or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evolving import BUILTIN, OPERATIONS, SEEDS, environment_of, number_of
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.environment import Chain
from rlgf_cli.evolve.features import feature_names
from rlgf_cli.evolve.learned import LearnedPolicy, PolicyNet, load_policy
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.evolve.policies import PaperPolicy, rollout


@pytest.fixture
def policy() -> LearnedPolicy:
    net = PolicyNet(len(feature_names(OPERATIONS)), len(OPERATIONS), 8, seed=3)
    torch.nn.init.normal_(net.logits.weight, generator=torch.Generator().manual_seed(0))
    return LearnedPolicy(net, OPERATIONS, 6, "words")


def test_it_begins_with_every_operation_equally_likely():
    net = PolicyNet(5, 3, 8, seed=0)
    logprobs, values = net(torch.randn(2, 4, 5))
    assert torch.allclose(logprobs, torch.full((2, 4, 3), -np.log(3)))
    assert values.shape == (2, 4)
    twin = PolicyNet(5, 3, 8, seed=0).state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in net.state_dict().items())
    assert not torch.equal(net.value.weight, PolicyNet(5, 3, 8, seed=1).value.weight)


def test_draws_choose_by_the_probabilities(policy: LearnedPolicy):
    chain = Chain(SEEDS[0])
    draws = (np.arange(3000) + 0.5) / 3000
    chosen = policy.choose([chain] * len(draws), draws)
    logprobs, _ = policy.net(torch.from_numpy(policy.observations(chain)[0]))
    shares = np.bincount(chosen, minlength=3) / len(draws)
    assert shares == pytest.approx(logprobs.exp().detach().numpy(), abs=1e-3)
    assert len(set(shares)) == 3 and chosen == sorted(chosen)
    assert policy.choose([chain], np.array([np.nextafter(1, 0)])) == [2]


def test_the_observations_of_a_rollout_are_those_of_its_choices(policy: LearnedPolicy):
    chains = [Chain(seed) for seed in SEEDS]
    rollout(environment_of(number_of), chains, policy, 4, seed=5)
    for chain in chains:
        seen = policy.observations(chain)
        assert seen.shape == (5, len(feature_names(OPERATIONS)))
        now = Chain(chain.seed)
        for t, step in enumerate(chain.steps):
            assert (policy.observations(now)[-1] == seen[t]).all()
            now.steps.append(step)


def test_the_folder_gives_the_same_policy(policy: LearnedPolicy, tmp_path: Path):
    policy.save(tmp_path)
    again = load_policy(str(tmp_path), OPERATIONS)
    assert isinstance(again, LearnedPolicy) and (again.steps_per_chain, again.space) == (6, "words")
    for name, value in policy.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name])
    saved = json.loads((tmp_path / "policy.json").read_text())
    assert saved["features"] == feature_names(OPERATIONS)
    assert [operation["name"] for operation in saved["operations"]] == ["wide", "deep", "long"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (BUILTIN, "trained with the operations wide, deep, long; these are breadth,"),
        (OPERATIONS[::-1], "these are long, deep, wide"),
        (
            [*OPERATIONS[:2], Operation(name="long", prompt="Another wording: {instruction}")],
            "another prompt of the operation 'long'",
        ),
        ([OPERATIONS[0].model_copy(update={"breadth": False}), *OPERATIONS[1:]], "of the operation 'wide'"),
    ],
)
def test_other_operations_are_refused(policy: LearnedPolicy, tmp_path: Path, others, said):
    policy.save(tmp_path)
    with pytest.raises(UserError) as caught:
        load_policy(str(tmp_path), others)
    assert said in caught.value.message and caught.value.where == str(tmp_path / "policy.json")


@pytest.mark.parametrize("missing", ["operations", "features", "horizon", "hidden", "space"])
def test_a_description_that_lacks_a_part_is_refused(policy: LearnedPolicy, tmp_path: Path, missing: str):
    policy.save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    del description[missing]
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="no policy that this rlgf reads"):
        load_policy(str(tmp_path), OPERATIONS)


def test_what_is_no_policy_is_refused(policy: LearnedPolicy, tmp_path: Path):
    with pytest.raises(UserError, match="no policy 'rondom'") as caught:
        load_policy("rondom", OPERATIONS)
    assert "'random'" in (caught.value.hint or "")
    with pytest.raises(UserError, match="holds no learned policy"):
        load_policy(str(tmp_path), OPERATIONS)
    policy.save(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        load_policy(str(tmp_path), OPERATIONS)
    (tmp_path / "policy.json").write_text("[]")
    with pytest.raises(UserError, match="no policy that this rlgf reads"):
        load_policy(str(tmp_path), OPERATIONS)


def test_baselines_by_name():
    assert isinstance(load_policy("paper", OPERATIONS), PaperPolicy)
    for operations in (OPERATIONS[:1] * 2, OPERATIONS[1:]):
        with pytest.raises(UserError, match="needs an operation with breadth"):
            load_policy("paper", operations)
