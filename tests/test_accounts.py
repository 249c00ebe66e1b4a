"""Keys let in whom they should, and no key spends, runs or asks more than its limits."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest
from databases import database, database_url, postgres  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select

from dsv4.errors import ConfigError
from dsv4.server.accounts import Account, AccountError, Caller, Keys, is_loopback, open_to
from dsv4.server.database import LOCAL, MEMORY, Database
from dsv4.server.ledger import DEAD, Charge, Ledger, check, usage
from dsv4.server.prices import PICO, Price, PriceList, dollars, picodollars

FLASH, PRO = "deepseek-v4-flash", "deepseek-v4-pro"


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 5, 1, 12, 0, tzinfo=timezone.utc)

    def __call__(self) -> datetime:
        return self.now

    def pass_(self, **span: float) -> None:
        self.now += timedelta(**span)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(database: Database, clock: Clock) -> Keys:  # noqa: F811
    return Keys(database, clock)


@pytest.fixture
def ledger(keys: Keys, database: Database, clock: Clock) -> Ledger:  # noqa: F811
    return Ledger(database, PriceList(), clock)


@pytest.fixture
def spender(keys: Keys) -> Callable[..., Caller]:
    """A caller with the limits given."""

    def make(**limits: int) -> Caller:
        secret = keys.create("spender", **limits)
        caller = keys.recognise({"authorization": f"Bearer {secret}"})
        assert caller is not None
        return caller

    return make


def ask(ledger: Ledger, caller: Caller, request: str, **more: int) -> int:
    return ledger.reserve(caller, request=request, model=FLASH, served="x", **more).charge


def finish(ledger: Ledger, charge: int, *tokens: int) -> int:
    hit, miss, output = tokens or (0, 0, 0)
    return ledger.settle(charge, hit=hit, miss=miss, output=output, outcome="stop")


# ---------------------------------------------------------------------- keys


def test_a_key_is_stored_only_as_its_hash(database: Database, keys: Keys) -> None:  # noqa: F811
    secret = keys.create("laptop")
    (key,) = keys.list()
    assert secret.startswith("sk-") and len(secret) > 40
    stored = [str(v) for v in vars(key).values()]
    assert not any(secret[3:] in v or secret[:-4] in v for v in stored)
    assert key.ending == secret[-4:]


def test_both_ways_to_send_a_key_and_authorization_wins(keys: Keys) -> None:
    a, b = keys.create("a"), keys.create("b")
    for headers, name in (
        ({"authorization": f"Bearer {a}"}, "a"),
        ({"authorization": f"bearer  {a} "}, "a"),
        ({"x-api-key": b}, "b"),
        ({"authorization": f"Bearer {a}", "x-api-key": b}, "a"),
        ({"authorization": "Basic eDp5", "x-api-key": b}, "b"),
    ):
        caller = keys.recognise(headers)
        assert caller is not None and caller.name == name
    with pytest.raises(AccountError) as refused:
        keys.recognise({"authorization": f"Bearer {a}x", "x-api-key": b}, request_id="r1")
    assert refused.value.status == 401
    assert str(refused.value) == (
        f"Authentication Fails, Your api key: ****{a[-3:]}x is invalid (request_id: r1)"
    )


def test_a_short_guess_is_not_repeated_in_the_refusal(keys: Keys) -> None:
    keys.create("a")
    with pytest.raises(AccountError) as refused:
        keys.recognise({"x-api-key": "hunter2"})
    assert "ter2" not in str(refused.value)


def test_without_any_key_nobody_needs_one_and_with_one_everybody(keys: Keys) -> None:
    for headers in ({}, {"authorization": "Bearer none"}):
        assert keys.recognise(headers) is None
    keys.create("first")
    for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "Bearer \u00fc"}):
        with pytest.raises(AccountError) as refused:
            keys.recognise(headers)
        assert refused.value.status == 401
    assert keys.exist()
    keys.revoke("first")
    assert not keys.exist() and keys.recognise({}) is None


def test_a_key_beside_the_database_is_the_local_caller(keys: Keys) -> None:
    assert keys.recognise({"x-api-key": "sesame"}, also="sesame") == Caller(LOCAL, LOCAL)
    with pytest.raises(AccountError):
        keys.recognise({}, also="sesame")


def test_a_revoked_key_is_refused_and_its_name_is_free_again(keys: Keys) -> None:
    old = keys.create("phone")
    with pytest.raises(ConfigError, match="there is a key named phone"):
        keys.create("phone")
    keys.revoke("phone")
    new = keys.create("phone")
    with pytest.raises(AccountError):
        keys.recognise({"x-api-key": old})
    assert keys.recognise({"x-api-key": new}) is not None
    assert [k.revoked is None for k in keys.list()] == [False, True]
    with pytest.raises(ConfigError, match="no key desktop"):
        keys.revoke("desktop")


@pytest.mark.parametrize("name", ["", LOCAL, "a\nb", "x" * 65, "<b>"])
def test_names_are_readable(name: str) -> None:
    with Database(MEMORY) as memory, pytest.raises(ConfigError, match="name"):
        Keys(memory).create(name)


@pytest.mark.parametrize(
    ("headers", "fine"),
    [
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "localhost:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "192.168.1.5"}, True),
        ({"host": "evil.example:8000"}, False),
        ({"host": "127.0.0.1.evil.example"}, False),
        ({}, False),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, True),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, False),
        ({"host": "localhost:8000", "origin": "https://evil.example"}, False),
        ({"host": "localhost:8000", "origin": "null"}, False),
        ({"host": "localhost:8000", "origin": "https://chat.example"}, True),
    ],
)
def test_a_web_page_elsewhere_cannot_use_an_open_server(
    headers: dict[str, str], fine: bool
) -> None:
    if fine:
        open_to(headers, ("https://chat.example",))
    else:
        with pytest.raises(AccountError) as refused:
            open_to(headers, ("https://chat.example",))
        assert refused.value.status == 403


def test_what_only_this_machine_can_reach() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))


# ---------------------------------------------------------------------- prices


def test_the_launch_prices_to_the_picodollar() -> None:
    prices = PriceList()
    launch = datetime(2026, 4, 24, tzinfo=timezone.utc)
    flash, pro = prices.at(FLASH, launch), prices.at(PRO, launch)
    assert flash == Price(28_000, 140_000, 280_000) and pro == Price(145_000, 1_740_000, 3_480_000)
    million = 10**6
    assert dollars(flash.cost(million, 0, 0)) == "0.028"
    assert dollars(flash.cost(0, million, 0)) == "0.14"
    assert dollars(flash.cost(0, 0, million)) == "0.28"
    assert dollars(pro.cost(1, 1, 1)) == "0.000005365"
    assert prices.charged_as("gpt-4") == FLASH and prices.charged_as(PRO) == PRO
    with pytest.raises(ConfigError, match="no price for deepseek-v4-pro on 2026-04-23"):
        prices.at(PRO, launch - timedelta(seconds=1))


def test_a_price_holds_from_its_first_day_in_utc(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    entry = '[[price]]\nmodel = "m"\nfrom = {}\nhit = 0\nmiss = {}\noutput = 1\n'
    path.write_text(
        entry.format("2026-01-01", 1) + entry.format("2026-03-01\nuntil = 2026-03-31", 3)
    )
    prices = PriceList(path)

    def miss(*when: int) -> int:
        return prices.at("anything", datetime(*when, tzinfo=timezone.utc)).miss  # type: ignore[arg-type]

    assert miss(2026, 2, 28, 23, 59) == miss(2026, 4, 1) == 10**6
    assert miss(2026, 3, 1) == miss(2026, 3, 31, 23) == 3 * 10**6
    tokyo = datetime(2026, 3, 1, 8, tzinfo=timezone(timedelta(hours=9)))
    assert prices.at("m", tokyo).miss == 10**6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[price]", "cannot read"),
        ("", "no prices"),
        ("price = 3", "no prices"),
        ('default="x"\n[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=1\nmiss=1\noutput=1', "default"),
        ('[[price]]\nmodel="m"\nfrom="yesterday"\nhit=1\nmiss=1\noutput=1', "from"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01T00:00:00\nhit=1\nmiss=1\noutput=1', "from"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=1\nmiss=1', "output"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=1\nmiss=-1\noutput=1', "miss"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=1\nmiss=nan\noutput=1', "miss"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=0.0000001\nmiss=1\noutput=1', "hit"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=2\nmiss=1\noutput=1', "not more than miss"),
        ('[[price]]\nmodel="m"\nfrom=2026-01-01\nhit=1\nmiss=1\noutput=1\ncolour=1', "colour"),
    ],
)  # fmt: skip
def test_a_price_list_that_leaves_a_question_open_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        PriceList(tmp_path / "p.toml")


@given(st.integers(0, 9_000_000 * PICO))
def test_dollars_are_written_and_read_exactly(amount: int) -> None:
    assert picodollars(dollars(amount)) == amount


def test_an_amount_that_is_not_exact_is_refused() -> None:
    for wrong in ("-1", "0.0000000000001", "1e9", "nan", "a lot", 0.1):
        with pytest.raises(ConfigError, match="an amount of money"):
            picodollars(wrong)  # type: ignore[arg-type]
    assert dollars(-5 * PICO // 2) == "-2.50"


# ---------------------------------------------------------------------- limits


def test_requests_per_minute(
    ledger: Ledger, spender: Callable[..., Caller], clock: Clock
) -> None:  # fmt: skip
    caller = spender(requests_per_minute=2)
    finish(ledger, ask(ledger, caller, "a"))
    clock.pass_(seconds=20)
    finish(ledger, ask(ledger, caller, "b"))
    ask(ledger, caller, "b")  # another choice of the same request
    with pytest.raises(AccountError, match="RPM") as refused:
        ask(ledger, caller, "c")
    assert (refused.value.status, refused.value.retry_after) == (429, 40)
    clock.pass_(seconds=40)
    ask(ledger, caller, "c")
    with pytest.raises(AccountError):
        ask(ledger, caller, "d")


def test_tokens_per_minute(
    ledger: Ledger, spender: Callable[..., Caller], clock: Clock
) -> None:  # fmt: skip
    caller = spender(tokens_per_minute=100)
    finish(ledger, ask(ledger, caller, "a"), 50, 20, 29)
    finish(ledger, ask(ledger, caller, "b"), 0, 0, 1)
    clock.pass_(seconds=30)
    with pytest.raises(AccountError, match="Rate limit reached for TPM") as refused:
        ask(ledger, caller, "c")
    assert (refused.value.status, refused.value.retry_after) == (429, 30)
    clock.pass_(seconds=30)
    ask(ledger, caller, "c")


def test_concurrency_counts_requests_until_they_end(
    ledger: Ledger, spender: Callable[..., Caller]
) -> None:
    caller = spender(concurrency=2)
    first = ask(ledger, caller, "a")
    ask(ledger, caller, "a")
    ask(ledger, caller, "b")
    with pytest.raises(AccountError) as refused:
        ask(ledger, caller, "c")
    assert refused.value.status == 429 and refused.value.retry_after
    assert str(refused.value).startswith(
        "Your current concurrency is 3, which exceeds your concurrency limit of 2."
    )
    finish(ledger, first)
    with pytest.raises(AccountError):
        ask(ledger, caller, "c")
    ask(ledger, Caller(), "c")  # somebody else


def test_a_spend_limit_is_never_exceeded(
    ledger: Ledger, spender: Callable[..., Caller], keys: Keys
) -> None:
    caller = spender(spend_limit=1000 * 280_000)
    assert caller.limited and ledger.balance(caller) == 280_000_000
    # a prompt of 100 tokens (half the price) leaves 950 tokens of answer
    first = ledger.reserve(
        caller, request="a", model=FLASH, served="x", prompt_tokens=100, max_tokens=5000
    )
    assert first.max_tokens == 950
    with pytest.raises(AccountError) as busy:
        ask(ledger, caller, "b", prompt_tokens=1, max_tokens=1)
    assert busy.value.status == 429 and "limit of 1 based on your remaining balance" in str(
        busy.value
    )
    with pytest.raises(AccountError) as poor:
        ask(ledger, caller, "b", prompt_tokens=2000)
    assert poor.value.status == 402 and str(poor.value) == "Insufficient Balance"
    assert finish(ledger, first.charge, 40, 60, 899) == 40 * 28_000 + 60 * 140_000 + 899 * 280_000
    rest = 280_000_000 - 261_240_000
    assert ledger.balance(caller) == rest
    second = ledger.reserve(caller, request="b", model=FLASH, served="x", prompt_tokens=10)
    assert second.max_tokens == (rest - 1_400_000) // 280_000
    finish(ledger, second.charge, 0, 10, second.max_tokens or 0)
    assert 0 <= (ledger.balance(caller) or 0) < 280_000
    with pytest.raises(AccountError) as spent:
        ask(ledger, caller, "c", prompt_tokens=1)
    assert spent.value.status == 402
    keys.limit("spender", spend_limit=None)
    ask(ledger, caller, "c", prompt_tokens=1)


def test_callers_at_once_cannot_spend_the_same_money(
    ledger: Ledger, spender: Callable[..., Caller], database: Database  # noqa: F811
) -> None:  # fmt: skip
    caller = spender(spend_limit=20 * 280_000)

    def one(i: int) -> int:
        try:
            asked = ledger.reserve(caller, request=f"r{i}", model=FLASH, served="x", max_tokens=3)
        except AccountError as error:
            assert error.status in (402, 429)
            return 0
        finish(ledger, asked.charge, 0, 0, asked.max_tokens or 0)
        return asked.max_tokens or 0

    with ThreadPoolExecutor(4) as threads:
        tokens = sum(threads.map(one, range(20)))
    assert tokens == 20 and ledger.balance(caller) == 0 and check(database) == []


def test_a_key_revoked_between_login_and_work_is_refused(
    ledger: Ledger, spender: Callable[..., Caller], keys: Keys
) -> None:
    caller = spender()
    keys.revoke("spender")
    with pytest.raises(AccountError) as refused:
        ask(ledger, caller, "a")
    assert refused.value.status == 401


# ---------------------------------------------------------------------- the books


def test_settling_twice_charges_once(ledger: Ledger, database: Database) -> None:  # noqa: F811
    charge = ask(ledger, Caller(), "a")
    assert finish(ledger, charge, 1, 1, 1) == finish(ledger, charge, 9, 9, 9) == 448_000
    assert check(database) == []


def test_what_a_dead_server_left_open_costs_nothing(
    ledger: Ledger, database: Database, clock: Clock, spender: Callable[..., Caller]  # noqa: F811
) -> None:  # fmt: skip
    caller = spender(spend_limit=PICO, concurrency=1)
    ask(ledger, caller, "a", prompt_tokens=10, max_tokens=10)
    other = Ledger(database, PriceList(), clock)
    assert other.beat() == 0
    clock.pass_(seconds=DEAD.total_seconds() + 1)
    assert other.beat() == 1 and check(database) == []
    with database.read() as session:
        account = session.get_one(Account, caller.id)
        assert (account.spent, account.reserved) == (0, 0)
    ask(other, caller, "b", prompt_tokens=1)
    with database.read() as session:
        outcomes = session.scalars(select(Charge.outcome).order_by(Charge.id)).all()
    assert outcomes == ["lost", None]


def test_a_server_taken_for_dead_still_charges_what_it_did(
    ledger: Ledger, database: Database, clock: Clock  # noqa: F811
) -> None:  # fmt: skip
    charge = ask(ledger, Caller(), "a")
    other = Ledger(database, PriceList(), clock)
    clock.pass_(seconds=DEAD.total_seconds() + 1)
    other.beat()
    assert finish(ledger, charge, 0, 1, 0) == 140_000
    assert check(database) == []
    ledger.beat()
    assert other.beat() == 0


def test_an_orderly_end_leaves_nothing_open(
    ledger: Ledger, database: Database  # noqa: F811
) -> None:  # fmt: skip
    ask(ledger, Caller(), "a")
    ledger.end()
    (row,) = usage(database, ())
    assert (row.requests, row.open, row.cost) == (1, 0, 0) and check(database) == []


def test_usage_adds_up_by_day_caller_and_model(
    ledger: Ledger, database: Database, clock: Clock, spender: Callable[..., Caller]  # noqa: F811
) -> None:  # fmt: skip
    caller = spender()
    finish(ledger, ask(ledger, caller, "a"), 1, 2, 3)
    finish(ledger, ask(ledger, caller, "a"), 1, 2, 3)
    finish(ledger, ask(ledger, Caller(), "b"), 10, 20, 30)
    clock.pass_(days=1)
    pro = ledger.reserve(caller, request="c", model=PRO, served="x").charge
    finish(ledger, pro, 0, 0, 1)
    ask(ledger, caller, "d")
    rows = usage(database)
    assert [(r.day, r.caller, r.model, r.requests, r.open) for r in rows] == [
        ("2026-05-02", "spender", FLASH, 0, 1),
        ("2026-05-02", "spender", PRO, 1, 0),
        ("2026-05-01", LOCAL, FLASH, 1, 0),
        ("2026-05-01", "spender", FLASH, 1, 0),
    ]
    assert rows[3].as_json() == {
        "day": "2026-05-01", "caller": "spender", "model": FLASH, "requests": 1, "open": 0,
        "hit_tokens": 2, "miss_tokens": 4, "output_tokens": 6, "cost_usd": "0.000002296",
    }  # fmt: skip
    (total,) = usage(database, ())
    assert total.cost == sum(r.cost for r in rows) and total.hit_tokens == 12
    (first,) = usage(database, (), until=date(2026, 5, 1), owner=caller.id)
    assert first.hit_tokens == 2
    assert usage(database, (), since=date(2026, 6, 1)) == []


def test_the_check_sees_what_is_wrong(ledger: Ledger, database: Database) -> None:  # noqa: F811
    finish(ledger, ask(ledger, Caller(), "a"), 1, 2, 3)
    assert check(database) == []
    with database.write() as session:
        session.get_one(Account, LOCAL).spent += 1
    assert len(check(database)) == 1
    with database.write() as session:
        session.scalars(select(Charge)).one().cost += 1
    (problem,) = check(database)
    assert "its tokens cost" in problem
