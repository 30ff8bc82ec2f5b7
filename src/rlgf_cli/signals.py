"""The signals that end a command: Ctrl-C, and SIGTERM and SIGUSR1, which schedulers send before they kill.

Inside :func:`stoppable` the first one sets an event, so that the work ends where it can go on from; a second one ends
it at once, as the first one does outside. Ctrl-C ends with Interrupted (exit code 130), the others with StoppedEarly
(exit code 3).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rlgf_cli.errors import Interrupted, RlgfError, Signalled, StoppedEarly

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
_REPEAT_S = 2.0
"""A SIGTERM or SIGUSR1 so soon after the first signal is the same event: schedulers send it to every process of a job,
and launchers send it on to their processes."""


class Stop(threading.Event):
    """Set by the first signal; ``received`` is then its name, such as ``SIGTERM``."""

    def __init__(self) -> None:
        super().__init__()
        self.received: str | None = None
        self.since = 0.0

    def note(self, received: str | None) -> bool:
        """Take over the signal that one of several processes received (None: none did); whether there was one."""
        if received is not None:
            self.received = received
            self.set()
        return received is not None

    def error(self, error: Interrupted) -> RlgfError:
        """The error of the signal that was received, for the one that says what was saved."""
        if self.received in (None, "SIGINT"):
            return error
        stopped = StoppedEarly(f"{error.message} ({self.received})", where=error.where, hint=error.hint)
        stopped.shared = error.shared
        return stopped


_stops: list[Stop] = []
"""The events of the blocks that the program is in, the innermost last."""


def received() -> str | None:
    """The signal after which the work of this moment is to end; None where there was none."""
    return _stops[-1].received if _stops else None


def error_of(interrupt: KeyboardInterrupt, hint: str | None = None) -> RlgfError:
    """The error of a command that a signal ended at once."""
    if isinstance(interrupt, Signalled):
        return StoppedEarly(f"by {interrupt.name}", hint=hint)
    return Interrupted("by Ctrl-C", hint=hint)


@contextlib.contextmanager
def stoppable(announce: Callable[[str], None], *, heed_ignored: bool = False) -> Iterator[Stop]:
    """The first signal sets the event and calls ``announce`` with its name; a second one ends the block at once.

    An Interrupted of the block is raised as the error of the signal that was received. ``heed_ignored``: a Ctrl-C that
    is ignored, as in a background job of a shell, is ignored in the block too.
    """
    stop = Stop()

    def handle(number: int) -> None:
        name = signal.Signals(number).name
        if not stop.is_set():
            stop.received, stop.since = name, time.monotonic()
            stop.set()
            with contextlib.suppress(RuntimeError):  # the signal came while a line was printed
                announce(name)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        elif time.monotonic() - stop.since > _REPEAT_S:
            raise Signalled(name)

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN and heed_ignored
    _stops.append(stop)
    try:
        with _handled(handle, *([] if ignored else [signal.SIGINT]), *ENDING):
            yield stop
    except Interrupted as error:
        raise stop.error(error) from None
    finally:
        _stops.remove(stop)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Outside of :func:`stoppable`, SIGTERM and SIGUSR1 end the command as Ctrl-C does: by an exception."""

    def handle(number: int) -> None:
        raise Signalled(signal.Signals(number).name)

    with _handled(handle, *ENDING):
        yield


@contextlib.contextmanager
def _handled(handle: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Handle signals in this process alone, not in those that are forked from it. Signals that are ignored stay so,
    but for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def handler(number: int, frame: Any) -> None:
        if os.getpid() == process:
            handle(number)
        else:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
