"""Builds the training loop's objects from a run's config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlgf_cli.checks import policy_probe
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.precision import cast_matrices
from rlgf_cli.models.prompts import Encoded, reference_length
from rlgf_cli.models.samplers.base import OwnSampler, Sampler
from rlgf_cli.models.samplers.engine import EngineSampler
from rlgf_cli.models.samplers.server import ServerSampler
from rlgf_cli.models.token_boundaries import same_tokens
from rlgf_cli.protocols import Example, Guide
from rlgf_cli.training.advantages import AdvantageSettings
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.critics import CriticSettings
from rlgf_cli.training.loop import HeldOutEvaluator, Scorer, ScorerAt, Trainer
from rlgf_cli.training.minibatches import UpdateSettings
from rlgf_cli.training.optimizer import make_optimizer, make_scheduler
from rlgf_cli.training.parallel.processes import Processes
from rlgf_cli.training.rollout import RolloutGenerator, Sampling


def needs_ref_model(config: TrainConfig) -> bool:
    """Whether a run charges or measures a KL: otherwise there is no reference model in memory."""
    return config.algorithm.spec().has_policy_gradient and (config.kl.coef > 0 or config.kl.where == "log")


HEAD_RATE = 1e-3
"""Learning rate of a value head: its weights start at 0 on normalised states, whatever rate suits the policy."""


def critic_rate(config: TrainConfig) -> float:
    """The learning rate of the critics' own parameters."""
    if config.ppo.critic_learning_rate is not None:
        return config.ppo.critic_learning_rate
    return config.optim.learning_rate if config.ppo.critic == "separate" else HEAD_RATE


def make_trainer(
    config: TrainConfig,
    loaded: Loaded,
    prompts: Sequence[Encoded],
    processes: Processes,
    *,
    guide: Guide | None,
    covered: frozenset[str] | None,
    scorer: Scorer | None,
    scorer_at: ScorerAt | None,
    prefetch: Callable[[Sequence[Example], Sequence[str]], None] | None,
    evaluate: HeldOutEvaluator | None,
    warn: Callable[[str], None],
) -> Trainer:
    """The loop at its first step. ``covered``: ids of the prompts that the guide has a text for; None: all.

    ``warn`` is called for a broken invariant of step 0 where that should not end the run, and for groups whose prompt
    cannot be shared.
    """
    spec, ppo = config.algorithm.spec(), config.ppo
    # shards are gathered in a network's forward pass, and shared prompts run the encoder outside of it
    share = not (processes.lockstep and loaded.encoder_decoder)
    model = ActorCritic(
        loaded, spec.critics, mode=ppo.critic, with_ref_model=needs_ref_model(config), share_prompts=share
    )
    if model.sharing_problem and spec.group_size > 1:
        warn(f"the prompt of a group is computed once for each response, which takes longer: {model.sharing_problem}")
    if model.ref_model is not None and not processes.lockstep:  # FSDP needs one dtype in each group of shards
        cast_matrices(model.ref_model, loaded.dtype)
    if config.gradient_checkpointing:
        model.enable_checkpointing()
    processes.spread(model)
    processes.prepare(model)
    optimizer = make_optimizer(
        model.trainable(), config.optim.learning_rate, config.optim.weight_decay, critic_rate(config)
    )
    sampling = Sampling.of(config.rollout, config.lengths)
    generator = RolloutGenerator(
        loaded,
        sampling,
        config.seed,
        guide=guide,
        covered=covered,
        whole_words=guide is not None and not same_tokens(guide.tokenizer, loaded.tokenizer),
        sampler=processes.raise_together(lambda: _make_sampler(config, loaded, prompts, processes)),
        prefetch=prefetch,
    )
    return Trainer(
        spec=spec,
        model=model,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, config.optim, config.max_steps),
        prompts=prompts,
        generator=generator,
        scorer=scorer,
        advantage=AdvantageSettings.of(ppo),
        update=UpdateSettings.of(ppo, config.kl, config.aux, config.optim),
        kl=config.kl,
        state=TrainerState(
            kl_coef=config.kl.coef, typical_length=reference_length(loaded, prompts, sampling.max_new_tokens)
        ),
        seed=config.seed,
        episodes=config.rollout.episodes,
        missing_eos_penalty=config.rollout.missing_eos_penalty,
        critic=CriticSettings(ppo.critic_warmup_steps, ppo.critic_warmup_explained, ppo.critic_min_explained),
        resample_groups=config.rollout.resample_groups,
        correction_cap=config.sampler.correction_cap if config.sampler.correction == "truncate" else None,
        eval_every=config.eval.every,
        scorer_at=scorer_at,
        evaluate=evaluate,
        patience=config.watch.patience if config.watch is not None else 1,
        probe=policy_probe.make_probe(model, sampling, seed=config.seed, warn=warn if config.step0 == "warn" else None),
        processes=processes,
    )


def _make_sampler(config: TrainConfig, loaded: Loaded, prompts: Sequence[Encoded], processes: Processes) -> Sampler:
    """The engine that the config names. Raises UserError where it cannot hold this policy."""
    engine = config.sampler.engine
    if engine == "own":
        return OwnSampler(loaded)
    if loaded.encoder_decoder:
        raise UserError("vLLM takes decoder-only models", hint="sampler.engine: own for this one")
    if engine == "server":
        return ServerSampler.connect(config.sampler, loaded, sends=processes.main)
    if processes.size > 1:
        raise UserError(
            f"vLLM inside the training process is for one process, and there are {processes.size}",
            hint="sampler.engine: server",
        )
    longest = max(len(prompt.ids) for prompt in prompts) + config.lengths.max_new_tokens
    return EngineSampler.start(config.sampler, loaded, longest=longest)
