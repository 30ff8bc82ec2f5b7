"""The account: a run's charges, and its batch jobs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from rlgf_cli.artifacts.jsonl import write_json
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.ledger.account_file import AccountFile
from rlgf_cli.ledger.batch_jobs import BatchJobs
from rlgf_cli.ledger.meter import NANO, Meter, Totals
from rlgf_cli.ledger.spend import charged_usd
from rlgf_cli.ledger.store import FILE, Store
from stores import key, text


def account(store: Store, run: str = "run", nano: int | None = None, calls: int | None = None) -> Meter:
    """A run's account; its caps in billionths of a US dollar and in calls."""
    return Meter(store, run, BudgetConfig(max_cost_usd=None if nano is None else nano / NANO, max_calls=calls))


AMOUNTS = st.integers(0, 40)


class Accounts(RuleBasedStateMachine):
    """Any order of calls by two stores of one file: the account is the sum of what stands, and no cap is passed."""

    open_calls: Bundle[tuple[int, int, int]] = Bundle("open_calls")

    @initialize(max_nano=st.none() | st.integers(0, 120), max_calls=st.none() | st.integers(0, 9))
    def begin(self, max_nano: int | None, max_calls: int | None) -> None:
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / FILE
        self.stores = [Store(path), Store(path)]
        self.accounts = [account(store, nano=max_nano, calls=max_calls) for store in self.stores]
        self.caps = (max_nano, max_calls)
        self.settled: list[tuple[int, int | None, int]] = []
        self.open: dict[int, tuple[int, int]] = {}
        self.ended: list[int] = []
        self.tokens = 0

    @rule(target=open_calls, who=st.integers(0, 1), amount=AMOUNTS, calls=st.integers(1, 4))
    def reserve(self, who: int, amount: int, calls: int) -> tuple[int, int, int]:
        before = self.expected()
        id_ = self.accounts[who].reserve(amount, calls)
        assert id_ not in self.ended  # or what ends late would end another call
        nano, count = self.caps
        fits = (nano is None or before.nano_usd + amount <= nano) and (count is None or before.calls + calls <= count)
        assert (id_ is not None) == fits
        if id_ is None:
            return -1, 0, 0
        self.open[id_] = (amount, calls)
        return id_, amount, calls

    @rule(who=st.integers(0, 1), call=consumes(open_calls), share=st.floats(0, 1), priced=st.booleans())
    def settle(self, who: int, call: tuple[int, int, int], share: float, priced: bool) -> None:
        id_, amount, calls = call
        if id_ < 0:
            return
        real, answered = (int(amount * share) if priced else None), round(calls * share)
        usage = {"prompt_tokens": 2, "completion_tokens": 1}
        self.accounts[who].settle(id_, real, usage, calls=calls, answered=answered)
        del self.open[id_]
        self.ended.append(id_)
        self.settled.append((answered, real, calls))
        self.tokens += 2

    @rule(who=st.integers(0, 1), call=consumes(open_calls))
    def refund(self, who: int, call: tuple[int, int, int]) -> None:
        id_, _, calls = call
        if id_ >= 0:
            self.accounts[who].refund(id_, calls)
            del self.open[id_]
            self.ended.append(id_)

    @rule(who=st.integers(0, 1), data=st.data())
    def end_again(self, who: int, data: st.DataObject) -> None:
        """A call that has ended ends no second time."""
        if self.ended:
            id_ = data.draw(st.sampled_from(self.ended))
            self.accounts[who].refund(id_)
            self.accounts[who].settle(id_, 5, {})

    def expected(self) -> Totals:
        waiting = sum(calls for _, calls in self.open.values())
        return Totals(
            calls=sum(answered for answered, _, _ in self.settled) + waiting,
            nano_usd=sum(real or 0 for _, real, _ in self.settled) + sum(amount for amount, _ in self.open.values()),
            unknown=waiting,
            unpriced=sum(answered for answered, real, _ in self.settled if real is None),
            prompt_tokens=self.tokens,
            completion_tokens=self.tokens // 2,
        )

    @invariant()
    def the_account_is_the_sum(self) -> None:
        if not hasattr(self, "stores"):
            return
        totals = self.accounts[0].totals()
        nano, count = self.caps
        assert totals == self.accounts[1].totals() == self.expected()
        assert nano is None or totals.nano_usd <= nano
        assert count is None or totals.calls <= count
        assert account(self.stores[0], "another run").totals() == Totals()

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for opened in self.stores:
                opened.close()
            self.folder.cleanup()


TestAccounts = Accounts.TestCase


def test_a_settled_call_keeps_its_texts_in_the_same_transaction(store: Store) -> None:
    meter = account(store)
    call = meter.reserve(10)
    assert call is not None
    meter.settle(call, 4, {}, [(key(1), text("bought"))])
    assert meter.totals().nano_usd == 4 and key(1) in store.texts([key(1)])
    meter.settle(call, 4, {}, [(key(2), text("again"))])  # it has ended: nothing of this is kept
    assert meter.totals() == Totals(calls=1, nano_usd=4) and store.texts([key(2)]) == {}


@given(st.integers(0, 9), st.integers(0, 99), st.integers(0, 9), st.integers(0, 99))
def test_at_least(calls: int, nano: int, more_calls: int, more_nano: int) -> None:
    with closing(Store()) as store:
        meter = account(store)
        for call in range(calls):
            meter.settle(meter.reserve(0) or 0, nano if call == 0 else 0, {})
        meter.at_least({"calls": more_calls, "charged_usd": more_nano / NANO})
        found = meter.totals()
        assert found.calls == max(calls, more_calls)
        assert found.nano_usd == max(nano if calls else 0, more_nano)


def test_what_a_manifest_says_of_the_spend() -> None:
    with closing(Store()) as store:
        meter = Meter(store, "priced")
        assert meter.to_json()["charged_usd"] is None
        call = meter.reserve(2 * NANO)
        assert call is not None and meter.to_json()["charged_usd"] == 2.0
        assert meter.to_json()["unknown_outcome"] == 1
        meter.settle(call, NANO // 2, {"prompt_tokens": 3, "completion_tokens": 4})
        said = meter.to_json()
        assert said["charged_usd"] == 0.5 and said["calls"] == 1 and said["unknown_outcome"] == 0
        assert said["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    with closing(Store()) as store:  # the cache is gone, the manifest is not
        again = Meter(store, "priced", BudgetConfig(max_cost_usd=0.6, max_calls=3))
        again.at_least(said)
        assert again.to_json()["charged_usd"] == 0.5 and again.to_json()["calls"] == 1
        assert again.reserve(NANO // 5) is None and again.room() == (NANO // 10, 2)
        assert "0.5000 of 0.6 USD, 1 of 3 calls" in again.spent().message


def test_a_guide_without_a_price_is_never_said_to_cost_nothing() -> None:
    with closing(Store()) as store:
        meter = Meter(store, "unpriced")
        meter.settle(meter.reserve(0) or 0, None, {})
        meter.reserve(0)  # its outcome is never known
        said = meter.to_json()
        assert said["calls"] == 2 and said["unknown_outcome"] == 1 and said["charged_usd"] is None
    with closing(Store()) as store:
        again = Meter(store, "unpriced")
        again.at_least({**said, "calls": 1, "unknown_outcome": 0})
        assert again.to_json()["charged_usd"] is None


# batches


def test_a_batch_job_is_charged_and_recorded_at_once_or_not_at_all(store: Store, store_path: Path) -> None:
    asked = [(key(i), f'{{"n": {i}}}', 10 + i) for i in range(3)]
    meter = account(store, nano=100, calls=3)
    jobs = BatchJobs(meter)
    assert not BatchJobs(account(store, nano=99)).place("b1", 100, asked, 60)
    assert not BatchJobs(account(store, calls=2)).place("b1", 100, asked, 60)
    assert jobs.open() == [] and meter.totals() == Totals()
    assert store.claim([key(0)], 60)[1] == {key(0)}  # and nothing is leased
    assert jobs.place("b1", 100, asked, 60)
    ((id_, server_id, call, requests),) = jobs.open()
    assert (id_, server_id, requests) == ("b1", None, 3)
    assert meter.totals() == Totals(calls=3, nano_usd=100, unknown=3)
    assert BatchJobs(account(store, "another")).open() == []
    jobs.confirm("b1", "server-1")
    assert jobs.open()[0][1] == "server-1"
    assert jobs.requests("b1", [key(1), key(7)]) == {key(1): ('{"n": 1}', 11)}
    with closing(Store(store_path)) as other:
        assert other.claim([key(0), key(1)], 60) == ({}, set())
    meter.refund(call, calls=3)
    jobs.end("b1")
    assert jobs.open() == [] and meter.totals() == Totals()
    assert store.claim([key(0), key(1), key(2)], 60)[1] == {key(0), key(1), key(2)}


def test_the_account_in_the_folder_outlives_the_cache(tmp_path: Path) -> None:
    """Written with every charge, before the call is sent; open calls stay charged; that of another run is not read."""
    path = tmp_path / "spend.json"
    with closing(Store(tmp_path / "one.sqlite")) as store:
        meter = account(store, calls=3)
        meter.keep_in(path)
        assert not path.exists() and not meter.begun
        answered, _, refused = (meter.reserve(100) for _ in range(3))
        assert AccountFile(path, "run").read() == Totals(3, 300, 3)
        assert answered is not None and refused is not None and not meter.begun
        meter.settle(answered, 40, {"prompt_tokens": 5})
        meter.refund(refused)
        assert AccountFile(path, "run").read() == meter.totals() == Totals(2, 140, 1, 0, 5)
    with closing(Store(tmp_path / "two.sqlite")) as store:  # the cache is lost
        meter = account(store, calls=3)
        meter.keep_in(path)
        assert meter.totals() == Totals(2, 140, 1, 0, 5) and meter.begun
        assert meter.reserve(1) is not None and meter.reserve(1) is None
        other = account(store, "other")
        other.keep_in(path)
        assert other.totals() == Totals() and not other.begun
    path.write_text('{"run_id": "run", "cal')  # the disk was full
    assert AccountFile(path, "run").read() is None


def test_the_spend_of_runs_counts_what_their_folders_have(tmp_path: Path, guide_cache: Path) -> None:
    with closing(Store.default()) as store:
        account(store, "a").reserve(NANO)
        account(store, "b").reserve(4 * NANO)
    for run, dollars in (("a", 3.0), ("b", 1.0), ("c", 9.0)):
        (tmp_path / run).mkdir()
        write_json(tmp_path / run / "run.json", {"run_id": run, "spend": {"calls": 1, "charged_usd": dollars}})
    AccountFile(tmp_path / "a" / "spend.json", "a").write(Totals(2, 5 * NANO))
    folders = [tmp_path / name for name in ("a", "b", "c", "none")]
    assert charged_usd(["a", "b"]) == 5.0
    assert charged_usd(["a", "b"], folders) == 9.0
