"""The config of ``rlgf train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlgf_cli.algorithms.base import Algorithm
from rlgf_cli.algorithms.catalog import PPO
from rlgf_cli.algorithms.spec import AlgorithmSpec
from rlgf_cli.config.common import (
    COMMON,
    GUIDE,
    MODEL,
    PRICE,
    RUN,
    SPEND,
    LengthConfig,
    Limit,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    Parts,
    ReportTo,
    StageConfig,
    TextConfig,
)
from rlgf_cli.config.guide import TRANSPORT, BudgetConfig, GuideConfig
from rlgf_cli.section import Flag, Refused, Strict

FREE_ON_RESUME = {
    "step0",
    "ppo.max_tokens_per_batch",
    "eval.every",
    "rollout.save_every",
    "rollout.show_count",
    "budget.max_cost_usd",
    "budget.max_calls",
    "save_best",
    "parallel.num_processes",
    "parallel.strategy",
    *(f"sampler.{key}" for key in ("memory_share", "sleep", "url", "group_port", "timeout", "concurrency")),
    *(f"guide.{key}" for key in TRANSPORT),
}
"""Keys that may differ when a run is resumed: they do not change the policy."""


class RolloutConfig(Strict):
    """The settings of rollouts. ``episodes`` per step; ``batch_size`` rows are generated at a time.

    ``ban_control_tokens``: the policy never writes a special token other than its ending, or an id without a token. No
    text shows them and no reward sees them; ``tokens/control`` in metrics.jsonl counts them (docs/algorithms.md).
    ``resample_groups``: how often a step replaces groups whose scores are all equal by those of other prompts (0:
    it keeps them). Every ``save_every`` steps (0: never) ``save_count`` episodes are saved; ``show_count`` are shown on
    stderr.
    """

    episodes: Annotated[int, Flag("Episodes per iteration.")] = Field(128, ge=1)
    batch_size: int = Field(64, ge=1)
    temperature: Annotated[float, Flag("Of the rollouts.")] = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    ban_control_tokens: bool = False
    missing_eos_penalty: float = Field(0.0, ge=0)
    on_uncovered: Annotated[Literal["unguided", "drop"], Flag("Prompts without guide text: unguided or drop.")] = (
        "unguided"
    )
    resample_groups: int = Field(0, ge=0)
    save_every: int = Field(10, ge=0)
    save_count: int = Field(16, ge=0)
    show_count: int = Field(1, ge=0)


class SamplerConfig(Strict):
    """What samples the policy's tokens in rollouts (docs/scaling.md).

    ``engine``: ``own``: the training model in a decoding loop of the project's own; ``vllm``: vLLM in this process and
    on the same device; ``server``: a vLLM server at ``url`` (a ``url`` alone means this one). vLLM gets the policy's
    weights before every step. Of ``vllm``: ``memory_share``: its share of the device's memory; ``sleep``: it frees that
    memory between rollouts, on a GPU. Of ``server``: ``timeout``: seconds to wait for it at the start;
    ``concurrency``: requests at once; ``group_port``: where the weights go.
    ``correction``: ``truncate`` multiplies the policy loss of each token that vLLM sampled by min(pi / mu,
    ``correction_cap``), the training model's probability over vLLM's (truncated importance sampling).
    """

    scalar_key: ClassVar[str | None] = "engine"
    engine: Annotated[
        Literal["own", "vllm", "server"], Flag("Samples for the policy: own loop, vllm or server.", "--sampler")
    ] = "own"
    memory_share: float = Field(0.3, gt=0, le=1)
    sleep: bool = True
    url: Annotated[str | None, Flag("A vLLM server that samples for the policy.", "--vllm-server-base-url")] = None
    group_port: int = Field(51216, ge=1, le=65535)
    timeout: float = Field(240.0, ge=0)
    concurrency: int = Field(256, ge=1)
    correction: Literal["none", "truncate"] = "none"
    correction_cap: float = Field(2.0, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _url_means_server(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("url") and "engine" not in data:
            return {**data, "engine": "server"}
        return data

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if (self.engine == "server") != bool(self.url):
            raise Refused(
                f"sampler.engine is {self.engine} and sampler.url is {self.url}",
                "a url is for engine: server, which needs one (--vllm-server-base-url)",
            )
        if self.engine == "own" and self.correction != "none":
            raise Refused(
                "sampler.correction is for an engine beside the training model, and the own loop samples from the "
                "training model itself",
                "sampler.correction: none, or sampler.engine: vllm or server",
            )
        return self


AdvantageScale = Literal["auto", "none", "running", "batch", "group"]


class PPOConfig(Strict):
    """Advantages and losses. See docs/algorithms.md for each formula and each default.

    ``advantage_scale``: what advantages are divided by; ``auto``: the group's standard deviation for grpo, nothing for
    rloo, else the standard deviation of the scores of the run so far. ``critic_min_explained``: the share of the
    returns' variance that a critic must explain before its values are the baseline. ``critic_warmup_explained``: the
    critic's warm-up of at most ``critic_warmup_steps`` ends at this share. ``critic_learning_rate`` null: 1e-3 for
    a head, the policy's for a separate critic.
    ``value_clip_range`` is in units of the returns' standard deviation. ``max_tokens_per_batch``: tokens of one forward
    pass, padding included, in scoring and in the update; it bounds the memory and changes no result beyond rounding.
    """

    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    adaptive_lambda: float | None = Field(None, gt=0)
    guide_lambda: float = Field(1.0, ge=0, le=1)
    critic_lambda: float = Field(1.0, ge=0, le=1)
    advantage_scale: AdvantageScale = "auto"
    epochs: Annotated[int, Flag("Passes over an iteration's episodes.", "--epochs", "--num-ppo-epochs")] = Field(
        4, ge=1
    )
    minibatch_size: Annotated[int, Flag("Episodes per optimizer step.", "--batch-size", "--minibatch-size")] = Field(
        32, ge=1
    )
    gradient_accumulation_steps: Annotated[int, Flag("Parts of a minibatch.")] = Field(1, ge=1)
    max_tokens_per_batch: Annotated[int, Flag("Tokens of one forward pass.")] = Field(8192, ge=1)
    clip_range: float = Field(0.2, gt=0)
    clip_range_high: float | None = Field(None, gt=0)
    loss_average: Literal["tokens", "sequences", "constant"] = "tokens"
    mask_truncated: bool = False
    value_clip_range: float | None = Field(None, gt=0)
    value_coef: float = Field(0.5, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    critic: Literal["head", "shared", "separate"] = "head"
    critic_learning_rate: float | None = Field(None, gt=0)
    critic_min_explained: float = Field(0.05, le=1)
    critic_warmup_steps: int = Field(0, ge=0)
    critic_warmup_explained: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _check(self) -> PPOConfig:
        if self.critic_warmup_explained is not None and not self.critic_warmup_steps:
            raise Refused(
                "critic_warmup_explained ends the critic's warm-up early, and there is no warm-up",
                "set ppo.critic_warmup_steps to the steps that it may take at most",
            )
        return self


class KLConfig(Strict):
    """The penalty for divergence from the ref model, on the policy's tokens.

    ``where``: ``loss``: loss += coef * the mean of ``estimator`` per token; ``reward``: reward_t -= coef * (log pi -
    log pi_ref); ``log``: measured and not charged. With coef 0 there is no ref model, unless ``where`` is ``log``.
    ``adaptive`` moves the coefficient towards ``target`` (nats per episode).
    """

    scalar_key: ClassVar[str | None] = "coef"
    coef: Annotated[float, Flag("Weight of the KL to the reference (kl.where).", "--kl-coef")] = Field(0.02, ge=0)
    where: Literal["loss", "reward", "log"] = "loss"
    estimator: Literal["k1", "k2", "k3"] = "k3"
    adaptive: bool = False
    target: float = Field(6.0, gt=0)
    horizon: int = Field(10000, ge=1)

    @model_validator(mode="after")
    def _check(self) -> KLConfig:
        if self.adaptive and (self.coef == 0 or self.where == "log"):
            raise Refused("an adaptive coefficient needs one to start from that is charged", "set kl.coef above 0")
        return self


class AuxConfig(Strict):
    """Auxiliary losses. ``reference_nll``: weight of the likelihood of one reference per episode."""

    reference_nll: float = Field(0.0, ge=0)


class EvalConfig(Strict):
    """The policy alone on held-out prompts, every ``every`` steps, sampled at the rollouts' temperature."""

    data: Annotated[str | None, Flag("Held-out prompts, scored along the way.", "--eval-data")] = None
    every: int = Field(25, ge=1)
    limit: int | None = Field(200, ge=1)


class WatchConfig(Strict):
    """A second figure of the held-out texts, which is not trained on (docs/lastmile.md).

    ``name``: a reward, or a metric and, where it has several, the ``figure``. Where the score rises and the figure
    falls for ``patience`` evaluations in a row, training warns; with ``stop`` it ends, and the run's model is then the
    one with the best watched figure.
    """

    scalar_key: ClassVar[str | None] = "name"
    name: str
    figure: str | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    patience: int = Field(2, ge=1)
    stop: Annotated[
        bool,
        Flag(
            "End where the score rises and --watch falls; keep the best model by --watch.",
            "--stop-on-divergence/--no-stop-on-divergence",
        ),
    ] = False


class ParallelConfig(Strict):
    """Several processes, one per device. ``num_processes`` null: as many as the launcher started. ``strategy``: ``ddp``
    holds all states on every device, ``fsdp`` a shard of them (FSDP2)."""

    scalar_key: ClassVar[str | None] = "num_processes"
    strategy: Literal["ddp", "fsdp"] = "ddp"
    num_processes: Annotated[int | None, Flag("Processes, one per device; started here.")] = Field(None, ge=1)


class TrainConfig(StageConfig):
    """Reinforcement learning with or without a guide.

    ``step0``: the reaction to an invariant that is broken before the first update (see docs/doctor.md).
    ``reward_workers``: processes in which each Python function of the reward scores, one text at a time; 0: in the
    training's own. ``save_best``: with ``eval.data``, keep the policy with the best held-out score in
    ``<output>/best``, and with ``watch`` the one with the best watched figure in ``<output>/best_watched``.
    """

    reward_needed: ClassVar[bool] = True
    panels: ClassVar[Mapping[str, str]] = {
        COMMON: (
            "algorithm model guide data reward eval.data watch watch.stop output --config --set seed limit max_steps"
        ),
        "Algorithm options": "algorithm.* rollout.on_uncovered",
        GUIDE: "guide.base_url guide.api_key_env",
        SPEND: f"budget.max_cost_usd budget.max_calls {PRICE} guide.mode",
        "Rollout and update options": (
            "optim.learning_rate kl.coef rollout.episodes ppo.minibatch_size ppo.gradient_accumulation_steps "
            "ppo.max_tokens_per_batch ppo.epochs lengths.max_new_tokens lengths.max_prompt_tokens "
            "lengths.on_overlong rollout.temperature reward_workers sampler.engine sampler.url text.chat"
        ),
        MODEL: (
            "lora.enabled lora.r lora.alpha lora.target_modules model.load_in_4bit gradient_checkpointing "
            "model.device model.dtype model.trust_remote_code"
        ),
        RUN: (
            "parallel.num_processes --accelerate-config save_steps save_total_limit report_to push_to_hub "
            "--profile --dry-run --resume --overwrite --print-config --json"
        ),
    }
    flags: ClassVar[Mapping[str, Flag]] = {
        "lengths.max_prompt_tokens": Flag("Longest prompt.", "--max-prompt-tokens", "--max-prompt-length"),
        "lengths.max_new_tokens": Flag("Longest response.", "--max-new-tokens", "--max-completion-length"),
        "lengths.on_overlong": Flag("Longer prompts: error, truncate or skip."),
        "lora.enabled": Flag("Train a LoRA adapter.", "--use-peft"),
        "model.load_in_4bit": Flag("Quantise the base (needs bitsandbytes)."),
    }
    model: Annotated[ModelConfig, Flag("The policy to start from.", "--model", "--model-name-or-path")]
    data: Annotated[str, Flag("Prompts (JSONL).")]
    limit: Limit = None
    algorithm: Annotated[Algorithm, Flag("`rlgf ls algorithms` lists them.", "--alg", "--algorithm")] = PPO()
    guide: Annotated[GuideConfig | None, Flag("FILE.jsonl, hf:PATH, openai:MODEL or an alias.")] = None
    budget: BudgetConfig = BudgetConfig()
    reward: Annotated[Parts, Flag("Names from `rlgf ls rewards`, file.py:function; several with commas.")] = Field(
        default_factory=list
    )
    reward_workers: Annotated[int, Flag("Processes for a Python reward that takes long.")] = Field(0, ge=0)
    text: TextConfig = TextConfig()
    lengths: LengthConfig = LengthConfig()
    lora: LoraConfig = LoraConfig()
    rollout: RolloutConfig = RolloutConfig()
    sampler: SamplerConfig = SamplerConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    aux: AuxConfig = AuxConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    watch: Annotated[WatchConfig | None, Flag("A figure of the held-out texts to compare with the score.")] = None
    parallel: ParallelConfig = ParallelConfig()
    max_steps: Annotated[int, Flag("Iterations.")] = Field(100, ge=1)
    gradient_checkpointing: Annotated[bool, Flag("Less memory, more time.")] = False
    step0: Literal["stop", "warn"] = "stop"
    save_steps: Annotated[int, Flag("Iterations between checkpoints.")] = Field(50, ge=1)
    save_total_limit: Annotated[int | None, Flag("Checkpoints to keep.")] = Field(2, ge=1)
    save_best: bool = True
    report_to: ReportTo = "none"
    push_to_hub: Annotated[str | None, Flag("Repository to upload the result to.")] = None

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        spec = self.algorithm.spec()
        if self.parallel.strategy == "fsdp" and (self.lora.enabled or self.model.load_in_4bit):
            raise Refused(
                "fsdp shards plain weights, not an adapter or 4-bit ones", "parallel.strategy: ddp goes with them"
            )
        if self.sampler.engine != "own" and (self.parallel.strategy == "fsdp" or self.model.load_in_4bit):
            raise Refused(
                "vLLM is sent whole weights, not shards or 4-bit ones",
                "sampler.engine: own, or parallel.strategy: ddp and no load_in_4bit",
            )
        if self.sampler.engine != "own" and not 0.01 <= self.rollout.temperature <= 2:
            raise Refused(
                f"vLLM samples at temperatures from 0.01 to 2, and rollout.temperature is {self.rollout.temperature}",
                "another rollout.temperature, or sampler.engine: own",
            )
        if self.sampler.engine == "vllm" and (self.parallel.num_processes or 1) > 1:
            raise Refused(
                "vLLM inside the training process is for one process",
                "sampler.engine: server with several processes, or parallel.num_processes: 1",
            )
        if self.reward_needed and not self.reward and spec.has_policy_gradient:
            raise ValueError("at least one reward is needed")
        if spec.needs_guide and self.guide is None:
            raise ValueError(f"the algorithm {spec.name!r} needs a guide: give --guide FILE, hf:PATH or openai:MODEL")
        if self.rollout.episodes % spec.group_size:
            raise ValueError(
                f"rollout.episodes ({self.rollout.episodes}) is not a multiple of the group size ({spec.group_size})"
            )
        if self.ppo.minibatch_size > self.rollout.episodes:
            raise ValueError(
                f"ppo.minibatch_size ({self.ppo.minibatch_size}) is larger than "
                f"rollout.episodes ({self.rollout.episodes})"
            )
        self._check_scale(spec)
        if self.watch is not None:
            self._check_watch(self.watch)
        return self

    def _check_scale(self, spec: AlgorithmSpec) -> None:
        """Refuse divisors that do not fit an estimator, and a KL that would be divided together with the score."""
        scale, where = self.ppo.advantage_scale, self.kl.where
        fitting = {"group_mean": ("auto", "group", "none"), "leave_one_out": ("auto", "none"), "likelihood": (scale,)}
        for estimator in dict.fromkeys(regime.estimator for regime in spec.regimes):
            allowed = fitting.get(estimator, ("auto", "running", "batch", "none"))
            if scale not in allowed:
                raise Refused(
                    f"ppo.advantage_scale: {scale} does not go with {spec.name!r} ({estimator})",
                    f"it takes {', '.join(allowed)}",
                )
            if estimator == "group_mean" and scale != "none" and where == "reward" and self.kl.coef:
                raise Refused(
                    "kl.where: reward puts the KL into scores that are divided by their group's standard deviation: "
                    "where scores are equal, only the KL's noise would be left, scaled up to standard deviation 1",
                    "kl.where: loss, or ppo.advantage_scale: none",
                )
        if self.rollout.resample_groups and spec.group_size == 1:
            raise Refused(
                f"rollout.resample_groups replaces groups, and {spec.name!r} has none", "grpo and rloo have them"
            )
        if self.rollout.resample_groups and any(regime.adds_texts for regime in spec.regimes):
            raise Refused(
                f"rollout.resample_groups replaces groups, and {spec.name!r} adds the guide's texts to them",
                "rollout.resample_groups: 0",
            )

    def _check_watch(self, watch: WatchConfig) -> None:
        if self.eval.data is None:
            raise Refused("watch needs held-out texts, and there is no held-out data", "give --eval-data")
        if not self.reward:
            raise Refused(
                "watch compares a figure with the reward, and there is no reward", "give --reward, or no --watch"
            )
        if watch.figure is None and watch.name in {part.name for part in self.reward}:
            raise Refused(
                f"the watched figure {watch.name!r} is trained on: it rises with the score",
                "watch another one",
            )
        if watch.stop and not self.save_best:
            raise Refused("watch.stop goes back to the best policy, and save_best: false keeps none", "leave one out")
