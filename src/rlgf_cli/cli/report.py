"""The command ``rlgf report``."""

from __future__ import annotations

from rlgf_cli.cli.invocation import Invocation


def report(invocation: Invocation) -> None:
    """Show runs and evaluations on one HTML page.

    Learning curves, evaluations with their intervals, texts side by side, who wrote which words, spend and
    configuration: one file that needs no network. The plots lie beside it in plots/ as SVG and PNG. A training
    that is still going on can be looked at too.

    ```
    rlgf report runs/ppopp
    rlgf report SFT=runs/sft PPO=runs/ppo PPO++=runs/ppopp -o report.html
    rlgf report PPO++=runs/a PPO++=runs/b PPO++=runs/c --comparison comparison.json -o seeds.html
    ```
    """
    resolved = invocation.resolve()
    from rlgf_cli.stages import report as stage

    made = stage.run(resolved)
    invocation.print({"path": str(made.path), "plots": [str(path) for path in made.plots]}, made.path)
