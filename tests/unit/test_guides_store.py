"""The store: texts, leases, the books, several processes, and what a kill leaves."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.ledger import store as store_module
from rlgf_cli.ledger.leases import boot, is_dead, this_process
from rlgf_cli.ledger.meter import NANO, Meter, Totals
from rlgf_cli.ledger.store import Store, StoredText
from stores import key, text


def another(path: Path, owner: str) -> Store:
    opened = Store(path)
    opened.owner = owner
    return opened


def ended_process() -> str:
    """The name of a process of this machine that has ended and was waited for."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return f"{this_process().split(':')[0]}:{process.pid}:1.00"


# texts


def test_more_texts_than_one_statement_takes(store: Store) -> None:
    wanted = {key(i): text(f"text {i}", created=1000 + i, prompt_tokens=i, nano_usd=i * 7) for i in range(1203)}
    store.put(wanted.items())
    assert store.texts([*wanted, key(9999)]) == wanted
    assert store.texts([]) == {}
    assert store.count() == 1203
    assert dict(store.each()) == wanted  # each goes through several pages


def test_the_first_text_of_a_key_stays(store: Store) -> None:
    store.put([(key(1), text("first", created=1)), (key(1), text("second", created=2))])
    store.put([(key(1), text("third", created=3))])
    assert store.texts([key(1)])[key(1)].text == "first"


def test_a_text_without_a_time_gets_one(store: Store) -> None:
    store.put([(key(1), text())])
    assert abs(store.texts([key(1)])[key(1)].created - time.time()) < 60


def test_texts_are_there_when_the_file_is_opened_again(store: Store, store_path: Path) -> None:
    store.put([(key(1), text("kept 🐈"))])
    with closing(Store(store_path)) as again:
        assert again.texts([key(1)])[key(1)].text == "kept 🐈"


def test_each_prune_samples_and_summary_by_guide_and_age(store: Store) -> None:
    store.put((key(i), text(guide="a" if i % 2 else "b", created=100 + i, nano_usd=2)) for i in range(10))
    assert [int.from_bytes(k, "big") for k, _ in store.each("a")] == [1, 3, 5, 7, 9]
    assert len(store.samples("a", limit=3)) == 3
    first = store.summary()[0]
    assert (first["guide"], first["texts"], first["nano_usd"], first["first"], first["last"]) == ("a", 5, 10, 101, 109)
    assert store.prune(before=105, guide="a") == 2
    assert store.prune(before=105) == 3  # the three of b that are older
    assert store.prune(guide="b") == 2
    assert [int.from_bytes(k, "big") for k, _ in store.each()] == [5, 7, 9]


# leases


def test_a_claim_is_good_against_everybody_until_it_is_given_back(store: Store, store_path: Path) -> None:
    with closing(Store(store_path)) as other:  # the same process: it lives
        assert store.claim([key(1), key(2)], 60) == ({}, {key(1), key(2)})
        assert other.claim([key(1), key(2), key(3)], 60) == ({}, {key(3)})
        assert store.claim([key(1)], 60) == ({}, set())  # not even its owner claims twice
        store.release([key(1)])
        assert other.claim([key(1)], 60) == ({}, {key(1)})


def test_nobody_gives_back_what_another_has_claimed(store: Store, store_path: Path) -> None:
    with closing(another(store_path, "elsewhere:1:1.0")) as other:
        store.claim([key(1)], 60)
        other.release([key(1)])
        assert other.claim([key(1)], 60) == ({}, set())


def test_a_lease_is_renewed_by_its_owner_alone(store: Store, store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        closing(another(store_path, "elsewhere:1:1.0")) as far,
        closing(another(store_path, "far away:1:1.0")) as third,
    ):
        far.claim([key(1), key(2)], 30)
        far.renew([key(1)], 90)
        third.renew([key(2)], 90)
        real = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + 60)
        assert store.claim([key(1), key(2)], 60) == ({}, {key(2)})


def test_a_text_ends_its_lease_whoever_brings_it(store: Store, store_path: Path) -> None:
    with closing(another(store_path, "elsewhere:1:1.0")) as other:
        other.claim([key(1)], 60)
        store.put([(key(1), text("mine"))])
        found, ours = other.claim([key(1)], 60)
        assert found[key(1)].text == "mine" and not ours
        assert store._db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


def test_the_leases_of_a_dead_process_of_this_machine_are_free_at_once(store: Store, store_path: Path) -> None:
    with closing(another(store_path, ended_process())) as gone:
        gone.claim([key(1)], 1e6)
    assert store.claim([key(1)], 60) == ({}, {key(1)})


def test_the_leases_of_another_machine_are_free_when_they_end(
    store: Store, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = ended_process().split(":")[1]
    monkeypatch.setattr(store_module, "boot", lambda: "another boot")
    with closing(another(store_path, f"elsewhere:{pid}:1.00")) as far:
        far.claim([key(1)], 30)
    monkeypatch.undo()
    assert store.claim([key(1)], 60) == ({}, set())
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 29)
    assert store.claim([key(1)], 60) == ({}, set())
    monkeypatch.setattr(time, "time", lambda: real() + 31)
    assert store.claim([key(1)], 60) == ({}, {key(1)})


@pytest.mark.skipif(boot() is None, reason="this system names no boot")
def test_a_clock_that_is_set_ends_no_lease_of_this_boot(
    store: Store, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Store(store_path)) as other:  # its owner is this process, which lives
        other.claim([key(1)], 30)
    real, ticks = time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: real() + 1e6)
    assert store.claim([key(1)], 60) == ({}, set())
    monkeypatch.setattr(time, "time", lambda: real() - 1e6)
    monkeypatch.setattr(time, "monotonic", lambda: ticks() + 31)
    assert store.claim([key(1)], 60) == ({}, {key(1)})


CLAIM = """
import sys; from pathlib import Path
from rlgf_cli.ledger.store import Store
print(*Store(Path(sys.argv[1])).claim([bytes.fromhex(sys.argv[2])], 600)[1])
"""


def test_a_process_of_another_container_is_not_taken_for_dead(store_path: Path) -> None:
    """Two containers with one host name: the number of the other's process is unknown, or somebody else's, here."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if shutil.which("unshare") is None or subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of process ids need unshare and its permission")
    claim = [sys.executable, "-c", CLAIM, str(store_path), key(1).hex()]
    waiting = [sys.executable, "-c", f"{CLAIM}\nsys.stdout.flush(); input()", *claim[3:]]
    with subprocess.Popen([*apart, *waiting], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline().strip()  # it has the lease, and lives
        for where in (apart, []):
            second = subprocess.run([*where, *claim], capture_output=True, text=True, check=True)
            assert second.stdout.strip() == ""
        first.communicate("\n")


def test_a_cache_of_version_1_goes_on(store_path: Path) -> None:
    with closing(Store(store_path)) as new:
        new.put([(key(1), text("old"))])
        new.claim([key(2)], 600)
        new._db.executescript(
            "ALTER TABLE leases DROP COLUMN boot; ALTER TABLE leases DROP COLUMN ticks; PRAGMA user_version = 1;"
        )
    with closing(another(store_path, "elsewhere:1:1.00")) as again:
        assert again.texts([key(1)])[key(1)].text == "old"
        assert again.claim([key(2), key(3)], 60)[1] == {key(3)}
        assert again._db.execute("PRAGMA user_version").fetchone() == (2,)


# permissions


def test_the_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "cache" / "guide.sqlite"
    with closing(Store(path)) as new:
        new.put([(key(1), text())])
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert set(modes.values()) == {0o600} and len(modes) > 1  # the files that SQLite adds, too


def test_a_cache_that_cannot_be_written_is_read(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Store(store_path)) as new:
        new.put([(key(1), text("there", guide="g"))])
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = {file.name: file.read_bytes() for file in store_path.parent.iterdir()}
    with closing(Store(store_path, make=False)) as store:
        assert store.texts([key(1)])[key(1)].text == "there"
        assert store.count() == 1 and [key for key, _ in store.each("g")] == [key(1)]
        assert store.summary()[0]["texts"] == 1 and len(store.samples("g")) == 1
        meter = Meter(store, "run")
        call = meter.reserve(5)  # accounts are in memory
        assert call is not None and meter.totals().nano_usd == 5
    assert {name: content for name, content in before.items() if not name.endswith(("-wal", "-shm"))} == {
        "guide.sqlite": store_path.read_bytes()
    }


READ = """
import os, sys; from pathlib import Path
from rlgf_cli.ledger.store import Store
os.getuid() or os.setuid(65534)  # root may write everywhere, nobody may not
store = Store(Path(sys.argv[1]), make=False)
print(store.texts([bytes.fromhex(sys.argv[2])])[bytes.fromhex(sys.argv[2])].text)
"""


def test_a_cache_in_a_folder_that_cannot_be_written_is_read() -> None:
    """SQLite can make none of the files there that it shares with other processes."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cache" / "guide.sqlite"
        with closing(Store(path)) as new:
            new.put([(key(1), text("there"))])
        for folder, mode in ((path, 0o444), (path.parent, 0o555), (Path(name), 0o755)):
            folder.chmod(mode)
        done = subprocess.run([sys.executable, "-c", READ, str(path), key(1).hex()], capture_output=True, text=True)
        path.parent.chmod(0o755)
    assert done.stdout.strip() == "there", done.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_folder_that_is_a_file(tmp_path: Path, inside: bool) -> None:
    (tmp_path / "file").write_text("no folder")
    folder = tmp_path / "file" / "below" if inside else tmp_path / "file"
    with pytest.raises(UserError, match="cannot be written") as error:
        Store(folder / "guide.sqlite")
    assert "RLGF_CACHE_DIR" in (error.value.hint or "")


def test_who_is_dead() -> None:
    me = this_process()
    assert not is_dead(me)
    assert not is_dead("batch:5")
    assert is_dead(me.rpartition(":")[0] + ":1.00")  # another process had this number
    assert is_dead(ended_process())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        child = psutil.Process(process.pid)
        name = f"{this_process().split(':')[0]}:{process.pid}:{child.create_time() - psutil.boot_time():.2f}"
        assert not is_dead(name)
        process.kill()
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert is_dead(name)  # nobody has waited for it, and it will never ask for anything again


def test_a_clock_that_is_set_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux the times of starts are counted from that of the machine, which moves with the clock."""
    me, then = this_process(), psutil.boot_time()
    linux = pytest.importorskip("psutil._pslinux")
    monkeypatch.setattr(linux, "boot_time", lambda: then + 3600.0)
    assert psutil.boot_time() == then + 3600.0
    assert not is_dead(me)


# files that cannot be used


def test_a_damaged_file_and_one_of_a_newer_version_give_a_letter(store_path: Path) -> None:
    store_path.parent.mkdir(parents=True)
    store_path.write_bytes(b"this is no database, and long enough to show it" * 50)
    with pytest.raises(RlgfError, match="cannot be used") as caught:
        Store(store_path)
    assert caught.value.where == str(store_path) and "move it away" in (caught.value.hint or "")
    store_path.unlink()
    with closing(sqlite3.connect(store_path)) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(UserError, match="has version 7; this rlgf reads 2") as caught:
        Store(store_path)
    assert "RLGF_CACHE_DIR" in (caught.value.hint or "")


def test_a_file_damaged_in_the_middle_gives_a_letter(store: Store, store_path: Path) -> None:
    store.put((key(i), text("x" * 500)) for i in range(300))
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with store_path.open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(40000))
    with closing(Store(store_path)) as again, pytest.raises(RlgfError, match="cannot be used") as caught:
        again.texts([key(i) for i in range(300)])
    assert "move it away" in (caught.value.hint or "")


def test_a_lock_that_does_not_go_is_no_damage(store: Store, store_path: Path) -> None:
    store._db.execute("PRAGMA busy_timeout = 50")
    with closing(sqlite3.connect(store_path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(RlgfError, match="locked") as caught:
            store.put([(key(1), text())])
        assert "another process" in (caught.value.hint or "") and "away" not in (caught.value.hint or "")
        db.execute("ROLLBACK")
    store.put([(key(1), text())])  # and the store goes on


def test_an_error_in_a_transaction_takes_all_of_it_back(store: Store) -> None:
    def texts() -> Iterator[tuple[bytes, StoredText]]:
        yield key(1), text()
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        store.put(texts())
    assert store.count() == 0
    store.put([(key(2), text())])
    assert store.count() == 1


def test_where_nothing_may_be_made_nothing_is(store_path: Path) -> None:
    with closing(Store(store_path, make=False)) as nothing:
        assert nothing.texts([key(1)]) == {} and nothing.path == store_path
    assert not store_path.parent.exists()
    with closing(Store(store_path)) as real:
        real.put([(key(1), text())])
    with closing(Store(store_path, make=False)) as there:
        assert key(1) in there.texts([key(1)])


FULL = """
import resource, signal, sys
from pathlib import Path
from rlgf_cli.errors import RlgfError
from rlgf_cli.ledger.store import Store, StoredText

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store(Path(sys.argv[1]))
def texts(start, size):
    text = StoredText("g", "{}", "x" * size, "stop", "m", 3)
    return [(i.to_bytes(32, "big"), text) for i in range(start, start + 20)]
store.put(texts(0, 10))
now = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, now[1]))
try:
    store.put(texts(100, 50_000))
except RlgfError as error:
    print("letter", error.message)
resource.setrlimit(resource.RLIMIT_FSIZE, now)
store.put(texts(200, 10))
print(store.count())
"""


def test_a_disk_that_is_full_at_the_end_of_a_transaction_leaves_a_store_that_works(store_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(store_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("letter the guide cache cannot be used")
    assert done.stdout.splitlines()[1] == "40"


# several processes

WORKERS, EACH = 4, 300


def work(path: str, number: int, together: Any) -> None:
    """Claims, pays and puts every key that nobody else does."""
    together.wait()
    with closing(Store(Path(path))) as store:  # the file is not there yet: all of them make it
        together.wait()
        meter = Meter(store, "shared", BudgetConfig(max_cost_usd=7 * EACH / NANO, max_calls=EACH))
        for start in range(0, EACH, 3):
            keys = [key(i) for i in range(start, start + 3)]
            _, ours = store.claim(keys, 60)
            for each in ours:
                call = meter.reserve(7)
                assert call is not None
                meter.settle(call, 5, {}, [(each, text(f"by {number}"))])
            store.put([(key(100_000 + number * EACH + start), text())])
        while len(store.texts([key(i) for i in range(EACH)])) < EACH:
            time.sleep(0.01)


def test_processes_that_write_at_once_lose_nothing_and_pay_once(store_path: Path) -> None:
    context = get_context("spawn")
    together = context.Barrier(WORKERS, timeout=60)
    workers = [context.Process(target=work, args=(str(store_path), number, together)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    with closing(Store(store_path)) as store:
        assert store.count() == EACH + WORKERS * EACH // 3
        assert Meter(store, "shared").totals() == Totals(calls=EACH, nano_usd=5 * EACH)
        assert store._db.execute("SELECT count(*) FROM leases").fetchone() == (0,)
        assert store._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


WRITER = """
import sys
from pathlib import Path
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import Store, StoredText

meter = Meter(Store(Path(sys.argv[1])), "run")
for n in range(10**9):
    call = meter.reserve(3)
    texts = [((n * 5 + i).to_bytes(32, "big"), StoredText("g", "{}", "x" * 200, "stop", "m", 3)) for i in range(5)]
    meter.settle(call, 2, {}, texts)
    print(n, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 40, 153])
def test_kill_9_in_the_middle_of_writes(store_path: Path, lines: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(store_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    said = lines + len([line for line in process.communicate()[0].splitlines() if line])
    with closing(Store(store_path)) as store:
        assert store._db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        groups, rest = divmod(store.count(), 5)
        assert rest == 0 and groups >= said - 1  # whole transactions; the last line may be torn
        totals = Meter(store, "run").totals()
        assert totals.nano_usd == 2 * groups + 3 * totals.unknown and totals.unknown in (0, 1)
        assert totals.calls == groups + totals.unknown


def test_several_make_the_same_new_file(tmp_path: Path) -> None:
    """The change to WAL is refused at once where two processes make it: opening has to try again."""
    together = threading.Barrier(6)

    def opened(path: Path) -> int:
        together.wait()
        store = Store(path)
        meter = Meter(store, "run")
        meter.at_least({"calls": 3})
        calls = meter.totals().calls
        store.close()
        return calls

    with ThreadPoolExecutor(6) as pool:
        for number in range(15):
            assert list(pool.map(opened, [tmp_path / f"{number}.sqlite"] * 6)) == [3] * 6
