"""StageSession: the output of a stage, from the first check of its folder to the result in run.json.

A stage that writes a folder calls, in this order:
1. ``open``: refuse a used folder, an input inside it, changed settings; find a result that is already finished;
2. its own loading and checks, while nothing is written;
3. ``running``: claim the folder, write config.resolved.json, record the inputs, charge the guides to the run;
4. its work, then ``finish`` with the summary.
``running`` marks run.json as done, failed, stopped or interrupted, however the work ends. A stage that writes a single
file has ``writing_file`` in the place of ``running``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlgf_cli import console
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.artifacts.rundir import Existing, Manifest, RunDir
from rlgf_cli.artifacts.runfile import claim_file
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.ledger.account_file import account_path
from rlgf_cli.ledger.spend import charge_guides
from rlgf_cli.models import card
from rlgf_cli.protocols import Guide

if TYPE_CHECKING:
    from rlgf_cli.models.loaded import Loaded


@dataclass(frozen=True)
class FolderResult:
    """The folder of a finished stage, the summary in its run.json, and what its guides cost (empty without guides)."""

    folder: Path
    summary: dict[str, Any]
    spend: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileResult:
    """The file of a finished stage, the summary in its manifest, and what its guides cost (empty without guides)."""

    path: Path
    summary: dict[str, Any]
    spend: dict[str, Any] = field(default_factory=dict)


class Account(NamedTuple):
    """Whom guides charge: the id of the run, and what its earlier sessions spent (``spend`` of run.json)."""

    run_id: str
    spend: dict[str, Any]


class StageSession:
    """One call of a stage. ``output`` is the config's unless given; ``can_resume``: the command has ``--resume``."""

    def __init__(
        self,
        command: str,
        resolved: Resolved[Any],
        existing: Existing,
        *,
        output: str | Path | None = None,
        can_resume: bool = True,
    ) -> None:
        self.command, self.resolved, self.existing, self.can_resume = command, resolved, existing, can_resume
        self.output = Path(resolved.config.output if output is None else output)
        self.run: RunDir
        """The claimed folder, once :meth:`claim` was called."""
        self.manifest: Manifest
        """The manifest of the claimed folder or file."""

    def open(
        self,
        *inputs: str | None,
        push_to_hub: str | None = None,
        free: Collection[str] = (),
        weights: Collection[str | None] = (),
        reopen: bool = False,
    ) -> FolderResult | None:
        """Check the output folder before anything is loaded; the result of a run that ``--resume`` finds done.

        ``inputs`` must not lie in the output. ``push_to_hub`` is the repository to push to. ``free`` and ``weights``
        are those of :func:`resume.refuse_changed`. ``reopen``: work on a run that is done, too. Raises UserError;
        nothing is written.
        """
        output = str(self.output)
        resume.refuse_used(output, self.command, self.existing, can_resume=self.can_resume)
        resume.refuse_own_input(output, *inputs)
        if push_to_hub:
            from rlgf_cli.models import hub

            hub.check(push_to_hub)
        if not reopen and (summary := resume.finished_result(output, self.existing)) is not None:
            console.log(f"{self.output} is done already")
            return FolderResult(self.output, summary, read_json(self.output / "run.json").get("spend", {}))
        if self.existing == "resume":
            resume.refuse_changed(output, self.resolved.to_json(), free=free, weights=weights)
        return None

    @property
    def chat_default(self) -> bool:
        """Whether a tokenizer's chat template is used where nothing says otherwise. A resumed run that began before
        that was so, and has no ``text`` in its run.json, goes on with plain text."""
        manifest = self.output / "run.json"
        return self.existing != "resume" or not manifest.is_file() or "text" in read_json(manifest)

    def claim(self) -> RunDir:
        """Take the output folder for this run."""
        self.run = RunDir.claim(
            self.output,
            self.command,
            existing=self.existing,
            seed=self.resolved.config.seed,
            can_resume=self.can_resume,
        )
        self.manifest = self.run.manifest
        return self.run

    def begin(self, *parents: str | Path | None, **facts: Any) -> Account:
        """Write config.resolved.json, and the inputs and ``facts`` (``device``) into run.json."""
        self.run.write_config(self.resolved.to_json())
        for parent in parents:
            self.manifest.add_parent(parent)
        if facts:
            self.manifest.save(**facts)
        return self.account

    @property
    def account(self) -> Account:
        data = self.manifest.data
        return Account(data["run_id"], data["spend"])

    @contextmanager
    def running(self, *parents: str | Path | None, guides: Sequence[Guide] = (), **facts: Any) -> Iterator[RunDir]:
        """Claim the folder and :meth:`begin`; ``guides`` charge the run. run.json says how the block ended."""
        with self.claim().running() as run:
            self.begin(*parents, **facts)
            if guides:
                self.charge(guides)
            yield run

    def charge(self, guides: Sequence[Guide], account: Account | None = None, *, shared: bool = False) -> None:
        """Let guides charge this run, under the cap of the config's budget.

        ``account`` is the run's in a process that has not claimed the folder; ``shared``: several processes charge it.
        """
        run_id, spend = account or self.account
        if hasattr(self, "manifest"):
            manifest = self.manifest.path
            self.manifest.lists(account_path(manifest).name)
        else:  # one of several processes of a run, and not the one that has its folder
            manifest = self.output / "run.json"
        charge_guides(guides, run_id, self.resolved.config.budget, spend, manifest=manifest, shared=shared)

    def write_card(
        self,
        *,
        base_model: str,
        data: Sequence[str],
        metrics: Mapping[str, Any],
        guide: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model card, README.md of the run."""
        folder = self.run.file("README.md").parent
        title = self.run.path.name
        card.write_card(
            folder, title=title, command=self.command, base_model=base_model, data=data, metrics=metrics, guide=guide
        )

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the summary as the run's result."""
        self.manifest.save(result=summary)

    def result(self) -> FolderResult:
        """The result as run.json holds it now."""
        data = self.manifest.data
        return FolderResult(self.run.path, data["result"], data["spend"])

    def claim_file(self, *, seed: int | None = None, beside: Sequence[Path] = ()) -> Manifest:
        """Take the output as a single file of this run, and files ``beside`` it; returns its manifest
        (``<file>.run.json``), not yet written."""
        self.manifest = claim_file(
            self.output, self.command, existing=self.existing, seed=seed, can_resume=self.can_resume, beside=beside
        )
        return self.manifest

    @contextmanager
    def writing_file(
        self, *parents: str | Path | None, seed: int | None = None, config: bool = True
    ) -> Iterator[Manifest]:
        """Claim the output as a single file, and record the config and the inputs in its manifest."""
        manifest = self.claim_file(seed=seed)
        if config:
            manifest.data["config"] = self.resolved.to_json()
        with manifest.running():
            for parent in parents:
                manifest.add_parent(parent)
            yield manifest


def prepare_guides(guides: Sequence[Guide], budget: BudgetConfig) -> None:
    """Let guides warn on the console, say their notes, and refuse a cap that they cannot hold."""
    for guide in guides:
        for line in guide.notes:
            console.log(line)
        guide.notify = console.warn
        guide.check_budget(budget)


def report_text(loaded: Loaded, example: Sequence[str] = ()) -> None:
    """Say what was loaded, how prompts become text and what ends a response, and warn of what is unusual in that; then
    the lines of an ``example``."""
    from rlgf_cli.models.formats import describe, warnings

    for line in (*loaded.notes, describe(loaded)):
        console.log(line)
    for warning in warnings(loaded):
        console.warn(warning)
    for line in example:
        console.log(line)


def pushed(result: FolderResult, repo_id: str | None) -> FolderResult:
    """The result, after its folder was pushed to the hub where a repository is given."""
    if repo_id:
        from rlgf_cli.models import hub

        console.log(f"pushed to {hub.push(result.folder, repo_id)}")
    return result
