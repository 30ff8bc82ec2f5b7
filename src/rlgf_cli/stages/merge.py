"""``rlgf merge``: a LoRA adapter into plain weights."""

from __future__ import annotations

from pathlib import Path

from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.merge import MergeConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.device import DTYPES
from rlgf_cli.models.load import check_checkpoint_name, load, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.merging import probe_logits, refuse_different, refuse_tied
from rlgf_cli.stages.session import StageSession


def run(resolved: Resolved[MergeConfig], *, existing: Existing = "refuse") -> Path:
    """Write a checkpoint without PEFT that gives the adapter's logits; tokenizer and text format are kept.

    The logits are compared in float32, before the weights are cast to ``dtype`` and before anything is written.
    """
    config = resolved.config
    check_checkpoint_name(config.model)
    if not (Path(config.model) / "adapter_config.json").is_file():
        plain = Path(config.model).is_dir()
        raise UserError(
            "this checkpoint has plain weights already: there is no adapter to merge"
            if plain
            else "a folder with a LoRA adapter is needed, not a hub name",
            where=config.model,
            hint="--model is the output folder of `rlgf sft --use-peft` or of `rlgf train --use-peft`",
        )
    session = StageSession("merge", resolved, existing, can_resume=False)
    session.open(config.model)
    loaded = load(ModelConfig(name=config.model, device="cpu", trust_remote_code=config.trust_remote_code))
    base = loaded.base.name if loaded.base else ""
    _merge(loaded)
    loaded.model.to(DTYPES[config.dtype])  # after the merge: bfloat16 would round a small update away
    with session.running(config.model) as run_dir:
        run_dir.write_files(lambda folder: save(folder, loaded))
        session.write_card(base_model=base, data=[], metrics={"adapter": Path(config.model).name})
        session.finish({"base": base, "dtype": config.dtype})
    return run_dir.path


def _merge(loaded: Loaded) -> None:
    """Merge the adapter into its base, in float32; raises UserError where the result is another model."""
    adapted, name = loaded.model, loaded.name
    if getattr(adapted, "is_quantized", False):
        raise UserError(
            "the adapter's base has quantized weights, which an update cannot be added to",
            where=name,
            hint="set base_model_name_or_path in adapter_config.json to the same model in full precision",
        )
    refuse_tied(adapted, where=name)
    expected = probe_logits(loaded)
    try:
        loaded.model = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # weights that are not numbers
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the adapter cannot be merged: {reason}", where=name) from None
    refuse_different(probe_logits(loaded), expected, name)
