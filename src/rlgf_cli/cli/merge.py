"""``rlgf merge``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli.options import COMMON


def merge(
    model: Annotated[
        str | None, typer.Option("--model", help="Folder with a LoRA adapter.", rich_help_panel=COMMON)
    ] = None,
    output: options.Output = None,
    config: options.Config = None,
    set_: options.Set = None,
    dtype: options.DType = None,
    trust_remote_code: options.TrustRemoteCode = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
) -> None:
    """Merge LoRA into plain weights.

    ```
    rlgf merge --model runs/sft-lora -o runs/sft-merged
    rlgf merge --model runs/ppopp --dtype bfloat16 -o runs/ppopp-bf16
    rlgf merge --model runs/sft-lora -o runs/sft-merged --overwrite
    ```
    """
    flags = {"model": model, "output": output, "dtype": dtype, "trust_remote_code": trust_remote_code}
    resolved = options.resolve("merge:MergeConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import merge as stage

    console.result(str(stage.run(resolved, existing=options.existing(False, overwrite))))
