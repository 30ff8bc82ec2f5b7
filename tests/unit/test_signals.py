"""Signals that end a command: the first one asks, the second one ends; forked processes are left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from rlgf_cli import signals
from rlgf_cli.errors import Interrupted, Signalled, StoppedEarly

HANDLED = (signal.SIGINT, *signals.ENDING)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of a shell's foreground job; every test leaves them as they are."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in HANDLED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = [signal.getsignal(number) for number in HANDLED]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after in ([signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL], [signal.SIG_IGN] * 3)
    assert signals.received() is None


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", HANDLED)
def test_the_first_signal_is_noted_and_the_second_ends(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(signals, "_REPEAT_S", -1.0)
    announced: list[str] = []
    name = signal.Signals(number).name
    with pytest.raises(KeyboardInterrupt) as caught, signals.stoppable(announced.append) as stop:
        assert not stop.is_set() and signals.received() is None
        send(number)
        assert stop.is_set() and stop.received == signals.received() == name and announced == [name]
        send(number)
        pytest.fail("the second signal did nothing")
    assert isinstance(caught.value, Signalled) == (number != signal.SIGINT)
    assert signals.error_of(caught.value).exit_code == (130 if number == signal.SIGINT else 3)


def test_a_sigterm_that_comes_twice_at_once_is_one() -> None:
    """A scheduler sends it to all processes of a job, and a launcher to its own."""
    with signals.stoppable(lambda name: None) as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.received == "SIGTERM"


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, Interrupted), (signal.SIGUSR1, StoppedEarly)])
def test_what_was_saved_is_the_error_of_the_signal(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="step 7 is saved") as caught, signals.stoppable(lambda name: None):
        send(number)
        error = Interrupted("step 7 is saved", hint="go on")
        error.shared = True
        raise error
    assert caught.value.shared and caught.value.hint == "go on"  # type: ignore[attr-defined]
    assert ("SIGUSR1" in str(caught.value)) == (kind is StoppedEarly)


def test_a_signal_of_another_process_of_the_run_counts() -> None:
    with pytest.raises(StoppedEarly, match="SIGTERM"), signals.stoppable(lambda name: None) as stop:
        assert not stop.note(None) and not stop.is_set()
        assert stop.note("SIGTERM") and stop.is_set()
        raise Interrupted("saved")


def test_what_is_ignored_stays_ignored() -> None:
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
    with signals.stoppable(lambda name: None, heed_ignored=True) as stop, signals.ending():
        for number in HANDLED:
            send(number)
        assert not stop.is_set()


def test_outside_it_ends_at_once() -> None:
    with pytest.raises(Signalled) as caught, signals.ending():
        send(signal.SIGTERM)
    assert caught.value.name == "SIGTERM"


def test_a_forked_process_ends_by_the_signal() -> None:
    """A pool ends its processes so."""
    with signals.stoppable(lambda name: None) as stop:
        if (child := os.fork()) == 0:
            send(signal.SIGTERM)
            os._exit(7)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.is_set()
