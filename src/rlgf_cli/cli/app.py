"""The program ``rlgf``: its global flags, how it calls a command, and how it prints an error."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer

from rlgf_cli import __version__, console, signals
from rlgf_cli.cli.commands import FAMILIES, SETTINGS, LazyGroup, called, family, load, spelled
from rlgf_cli.errors import RlgfError, RlgfWarning, Signalled, UserError, is_disk_full

_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)

app = typer.Typer(
    name="rlgf",
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings=SETTINGS,
    help="Train a small text generator with reinforcement learning and a black-box LLM as guide.\n\n"
    "```\n"
    "rlgf sft --model gpt2 --data train.jsonl -o runs/sft\n"
    "rlgf train --alg ppo --model runs/sft --data train.jsonl --reward rouge -o runs/ppo\n"
    "rlgf eval --model runs/ppo --data test.jsonl --metrics rouge -o runs/ppo/eval\n"
    "```",
    epilog="`--debug` and `--offline` work before and after every command.",
)


def _version(show: bool) -> None:
    if show:
        console.result(f"rlgf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Forbid the model and data hub.")] = False,
) -> None:
    """Declares ``--debug`` and ``--offline`` for the help; ``main`` has removed them from the arguments before."""


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point: global flags, one-line errors, exit codes (see errors.py). Always raises SystemExit."""
    arguments, flags = _take_global(list(sys.argv[1:] if argv is None else argv))
    debug = "--debug" in flags or bool(os.environ.get("RLGF_DEBUG"))
    if "--offline" in flags:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not debug:  # a user cannot act on the deprecation warnings of libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|datasets)\b")
    _show_own_warnings()
    code = _guarded(arguments, debug)
    if "RLGF_EXIT_CODE" in os.environ:
        from rlgf_cli.cli.launch import leave_exit_code

        leave_exit_code(code)
    sys.exit(code)


def _show_own_warnings() -> None:
    """Print an RlgfWarning as the console prints warnings, and those of libraries as Python does."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
        if issubclass(category, RlgfWarning):
            console.warn(str(message))
        else:
            others(message, category, *place, **options)

    warnings.showwarning = show
    warnings.filterwarnings("once", category=RlgfWarning)


def _guarded(arguments: list[str], debug: bool) -> int:
    """Run a command line, print its error if there is one, and return the exit code."""
    try:
        with signals.ending():
            return _call(arguments)
    except console.OutputClosed:
        return 0  # `rlgf ... | head`: head has closed the pipe
    except Signalled as signalled:
        shown = signals.error_of(signalled)
        console.render_error(shown)
        return shown.exit_code
    except (KeyboardInterrupt, typer.Abort):
        console.log("interrupted")
        return 130
    except Exception as error:  # noqa: BLE001 - the last resort: no traceback without --debug
        if debug:
            traceback.print_exc()
        if _is_usage_error(error):
            return _usage(error)
        shown = _as_rlgf_error(error)
        console.render_error(shown)
        return shown.exit_code


def _call(arguments: list[str]) -> int:
    """Run the command that the first argument names, or ``rlgf`` itself: its flags, its help, completion.

    A command is called without the group around it: to go through the flags of the group, typer loads
    pydantic, and that would take longer than all the rest of a command's help.
    """
    if (name := called(arguments)) is not None:
        code = load(name)(args=arguments[len(name.split()) :], prog_name=f"rlgf {name}", standalone_mode=False)
    elif arguments and (word := spelled(arguments[0])) in FAMILIES:
        code = family(word)(args=arguments[1:], prog_name=f"rlgf {word}", standalone_mode=False)
    else:
        code = app(args=arguments, prog_name="rlgf", standalone_mode=False)
    return code if isinstance(code, int) else 0


def _take_global(raw: list[str]) -> tuple[list[str], set[str]]:
    """The arguments without ``--debug`` and ``--offline``, wherever before a ``--`` they stand."""
    end = raw.index("--") if "--" in raw else len(raw)
    flags = {argument for argument in raw[:end] if argument in ("--debug", "--offline")}
    return [argument for argument in raw[:end] if argument not in flags] + raw[end:], flags


def _as_rlgf_error(error: Exception) -> RlgfError:
    """An error of any kind as one with a message and a hint; the user can fix those of the file system."""
    if isinstance(error, RlgfError):
        return error
    where = str(error.filename) if isinstance(error, OSError) and error.filename else None
    if is_disk_full(error):
        hint = "free some space and run it again; no incomplete file was left"
        shown: RlgfError = UserError("no space left on the disk", where=where, hint=hint)
    elif isinstance(error, OSError) and error.errno in _REFUSED:
        shown = UserError((error.strerror or str(error)).lower(), where=where, hint="choose another path")
    else:
        shown = RlgfError(
            f"{type(error).__name__}: {error}",
            hint="rlgf does not expect this error; --debug shows its traceback",
        )
    shown.shared = getattr(error, "shared", False)
    return shown


def _is_usage_error(error: Exception) -> bool:
    # typer brings a copy of click or leans on the installed one, by version; both have this method
    return type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message")


def _usage(error: Exception) -> int:
    """Print what is wrong with the command line. ``rlgf`` alone prints the help and no error."""
    if type(error).__name__ != "NoArgsIsHelpError":
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "rlgf"
        console.log(f"error: {error.format_message()}")  # type: ignore[attr-defined]
        console.log(f"hint: `{command} --help` lists what it takes")
    return 2
