"""The books: what every request used and cost, to the token.

A request is a ``Charge``. It is opened before any work is done, with what it may cost at most
reserved against the caller's limit, and settled with what it did cost before the caller sees the
end of the answer. Both are single transactions that change the charge and its account together,
so whenever the process dies the books balance:

    spent of an account     = the sum of its charges' costs
    reserved of an account  = the sum of its open charges' reservations
    cost of a charge        = its tokens at the prices noted in it

A server that died leaves open charges; nobody saw their answers end, so they cost nothing and are
marked "lost" by whichever server next notices that the dead one's sign of life is old.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from math import ceil
from typing import Any, Literal

from sqlalchemy import BigInteger, ForeignKey, Index, Integer, delete, distinct, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from .accounts import Account, AccountError, Caller, now
from .database import Base, Database, Timestamp
from .prices import Price, PriceList, dollars

SIGN_OF_LIFE = 5.0  # seconds between a server's signs of life
DEAD = timedelta(seconds=60)  # after so long without one a server is taken to be dead
MINUTE = timedelta(minutes=1)
LOST = "lost"

Grouping = Literal["day", "caller", "model"]
GROUPINGS: tuple[Grouping, ...] = ("day", "caller", "model")


class Charge(Base):
    """One request; money in picodollars. Open while ``ended`` is None.

    ``model`` is the listed model whose price is paid, ``served`` the one that answered.
    ``outcome`` is the finish reason, "cancelled", "error" or "lost".
    """

    __tablename__ = "charge"
    id: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True
    )
    owner: Mapped[str] = mapped_column(ForeignKey("account.id"))
    server: Mapped[str] = mapped_column(index=True)
    request: Mapped[str]
    model: Mapped[str]
    served: Mapped[str]
    begun: Mapped[datetime] = mapped_column(Timestamp)
    ended: Mapped[datetime | None] = mapped_column(Timestamp)
    outcome: Mapped[str | None]
    reserved: Mapped[int] = mapped_column(BigInteger)
    hit_tokens: Mapped[int] = mapped_column(default=0)
    miss_tokens: Mapped[int] = mapped_column(default=0)
    output_tokens: Mapped[int] = mapped_column(default=0)
    hit_price: Mapped[int] = mapped_column(BigInteger)
    miss_price: Mapped[int] = mapped_column(BigInteger)
    output_price: Mapped[int] = mapped_column(BigInteger)
    cost: Mapped[int] = mapped_column(BigInteger, default=0)
    __table_args__ = (Index(None, "owner", "begun"), Index(None, "owner", "ended"))


class ServerLife(Base):
    """A running server, and when it last said so."""

    __tablename__ = "server_life"
    id: Mapped[str] = mapped_column(primary_key=True)
    seen: Mapped[datetime] = mapped_column(Timestamp)


@dataclass(frozen=True)
class Reservation:
    """An open charge. ``max_tokens``: how long the answer may be at most, None for any length."""

    charge: int
    max_tokens: int | None


@dataclass(frozen=True)
class UsageRow:
    """What a group of requests used; ``cost`` in picodollars, ``open`` requests not included."""

    day: str
    caller: str
    model: str
    requests: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    cost: int
    open: int

    def as_json(self) -> dict[str, Any]:
        """With the cost as an exact decimal string of US dollars."""
        row = asdict(self)
        row["cost_usd"] = dollars(row.pop("cost"))
        return {name: value for name, value in row.items() if value != ""}


class Ledger:
    """Opens and settles charges for one server. Its methods are for worker threads.

    ``clock`` gives aware datetimes. ``beat`` must be called every SIGN_OF_LIFE seconds while
    requests may be running.
    """

    def __init__(
        self, database: Database, prices: PriceList, clock: Callable[[], datetime] = now
    ) -> None:
        self._database, self._prices, self._clock = database, prices, clock
        self._server = secrets.token_hex(8)
        for model in prices.models:
            prices.at(model, clock())  # a list without a price for today is refused now
        self.beat()

    def reserve(
        self,
        caller: Caller,
        *,
        request: str,
        model: str,
        served: str,
        prompt_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> Reservation:
        """Open a charge, if the caller's limits allow it.

        Charges of one ``request`` (an id) count as one against the limits of rate and
        concurrency. With a spend limit, ``prompt_tokens`` and ``max_tokens`` say what the request
        may cost; if the limit does not allow so long an answer, a shorter one is reserved.

        Raises AccountError: 401 if the key was revoked meanwhile, 402 when the limit is spent,
        429 for too many requests or tokens or when running requests have reserved what is left.
        """
        moment = self._clock()
        model = self._prices.charged_as(model)
        price = self._prices.at(model, moment)
        with self._database.write() as session:
            account = session.get_one(Account, caller.id, with_for_update=True)
            if account.revoked is not None:
                raise AccountError(f"Authentication Fails (request_id: {request})", 401)
            self._check_rates(session, account, request, moment)
            reserved = 0
            if account.spend_limit is not None:
                allowed = self._affordable(session, account, request, price, prompt_tokens)
                if allowed is not None:
                    max_tokens = allowed if max_tokens is None else min(max_tokens, allowed)
                reserved = price.cost(0, prompt_tokens, max_tokens or 0)
            charge = Charge(
                owner=account.id, server=self._server, request=request, model=model,
                served=served, begun=moment, reserved=reserved, hit_price=price.hit,
                miss_price=price.miss, output_price=price.output,
            )  # fmt: skip
            account.reserved += reserved
            session.add(charge)
            session.flush()
            return Reservation(charge.id, max_tokens)

    def settle(
        self, charge: int, *, hit: int, miss: int, output: int, outcome: str
    ) -> int:  # fmt: skip
        """Close a charge with the tokens it used; the cost, in picodollars. The first call counts.

        One that was taken for lost is charged after all.
        """
        with self._database.write() as session:
            owner = session.scalars(select(Charge.owner).where(Charge.id == charge)).one()
            account = session.get_one(Account, owner, with_for_update=True)
            row = session.get_one(Charge, charge)
            if row.ended is not None and row.outcome != LOST:
                return row.cost
            if row.ended is None:
                account.reserved -= row.reserved
            price = Price(row.hit_price, row.miss_price, row.output_price)
            row.hit_tokens, row.miss_tokens, row.output_tokens = hit, miss, output
            row.cost = price.cost(hit, miss, output)
            row.ended, row.outcome = self._clock(), outcome
            account.spent += row.cost
            return row.cost

    def beat(self) -> int:
        """Say that this server lives, and close what dead ones left open; how many charges."""
        moment = self._clock()
        with self._database.write() as session:
            session.merge(ServerLife(id=self._server, seen=moment))
            session.flush()
            dead = session.scalars(select(ServerLife.id).where(ServerLife.seen < moment - DEAD))
            return sum(_close(session, server, moment) for server in dead.all())

    def end(self) -> None:
        """The last sign: what is still open now is lost."""
        with self._database.write() as session:
            _close(session, self._server, self._clock())

    def balance(self, caller: Caller) -> int | None:
        """What the caller may still spend, in picodollars; None without a limit."""
        with self._database.read() as session:
            account = session.get_one(Account, caller.id)
            return None if account.spend_limit is None else account.spend_limit - account.spent

    def _check_rates(
        self, session: Session, account: Account, request: str, moment: datetime
    ) -> None:
        others = (Charge.owner == account.id, Charge.request != request)
        if account.concurrency is not None:
            running = _running(session, account, request)
            if running >= account.concurrency:
                raise AccountError(
                    f"Your current concurrency is {running + 1}, which exceeds your concurrency "
                    f"limit of {account.concurrency}. Please wait for a request to finish.",
                    429,
                    1,
                )
        if account.requests_per_minute is not None:
            begun = func.min(Charge.begun, type_=Timestamp).label("first")
            since = select(begun).where(*others, Charge.begun > moment - MINUTE)
            nth = since.group_by(Charge.request).order_by(begun.desc())
            full = session.scalar(nth.offset(account.requests_per_minute - 1).limit(1))
            if full is not None:
                raise AccountError(
                    f"Rate limit reached for RPM: {account.requests_per_minute} requests per "
                    "minute.",
                    429,
                    _seconds(full + MINUTE - moment),
                )
        if account.tokens_per_minute is not None:
            tokens = Charge.hit_tokens + Charge.miss_tokens + Charge.output_tokens
            first = func.min(Charge.ended, type_=Timestamp)
            recent = select(func.sum(tokens), first).where(*others, Charge.ended > moment - MINUTE)
            used, oldest = session.execute(recent).one()
            if oldest is not None and used >= account.tokens_per_minute:
                raise AccountError(
                    f"Rate limit reached for TPM: {account.tokens_per_minute} tokens per minute.",
                    429,
                    _seconds(oldest + MINUTE - moment),
                )

    def _affordable(
        self, session: Session, account: Account, request: str, price: Price, prompt_tokens: int
    ) -> int | None:
        """The longest answer that the spend limit pays for; None for any."""
        assert account.spend_limit is not None
        left = account.spend_limit - account.spent
        least = price.cost(0, prompt_tokens, 1)
        if left <= 0 or least > left:
            raise AccountError("Insufficient Balance", 402)
        if least > left - account.reserved:
            running = _running(session, account, request)
            raise AccountError(
                f"Your current concurrency is {running + 1}, which exceeds your concurrency limit "
                f"of {running} based on your remaining balance. Please wait for a request to "
                "finish, or set a smaller max_tokens.",
                429,
                1,
            )
        if price.output == 0:
            return None
        return (left - account.reserved - price.cost(0, prompt_tokens, 0)) // price.output


def usage(
    database: Database,
    by: Sequence[Grouping] = GROUPINGS,
    *,
    since: date | None = None,
    until: date | None = None,
    owner: str | None = None,
) -> list[UsageRow]:
    """Totals of the days from ``since`` to ``until`` (both included, UTC), latest first.

    ``by`` are the columns that are told apart, the others are "". ``owner`` is one caller's id.
    """
    day = func.date(Charge.begun)
    columns: dict[Grouping, Any] = {"day": day, "caller": Account.name, "model": Charge.model}
    chosen = [columns[name].label(name) for name in GROUPINGS if name in by]
    done = Charge.ended.is_not(None)
    query = select(
        *chosen,
        func.count(distinct(Charge.request)).filter(done).label("requests"),
        *(func.coalesce(func.sum(column), 0).label(column.key) for column in (
            Charge.hit_tokens, Charge.miss_tokens, Charge.output_tokens, Charge.cost
        )),
        func.count(distinct(Charge.request)).filter(~done).label("open"),
    ).join(Account, Account.id == Charge.owner)  # fmt: skip
    if since is not None:
        query = query.where(day >= _day(database, since))
    if until is not None:
        query = query.where(day <= _day(database, until))
    if owner is not None:
        query = query.where(Charge.owner == owner)
    if chosen:
        query = query.group_by(*chosen).order_by(
            *(c.desc() if c.name == "day" else c for c in chosen)
        )
    with database.read() as session:
        rows = [row._asdict() for row in session.execute(query)]
    return [
        UsageRow(
            day=str(row.get("day", "")),
            caller=row.get("caller", ""),
            model=row.get("model", ""),
            requests=row["requests"],
            hit_tokens=int(row["hit_tokens"]),  # PostgreSQL's sums are Decimals
            miss_tokens=int(row["miss_tokens"]),
            output_tokens=int(row["output_tokens"]),
            cost=int(row["cost"]),
            open=row["open"],
        )
        for row in rows
        if row["requests"] or row["open"]
    ]


def check(database: Database) -> list[str]:
    """What does not balance in the books, in sentences; [] is as it must be."""
    problems = []
    with database.read() as session:
        sums = {
            owner: (int(cost or 0), int(reserved or 0))
            for owner, cost, reserved in session.execute(
                select(
                    Charge.owner,
                    func.sum(Charge.cost),
                    func.sum(Charge.reserved).filter(Charge.ended.is_(None)),
                ).group_by(Charge.owner)
            )
        }
        for account in session.scalars(select(Account)):
            cost, reserved = sums.get(account.id, (0, 0))
            if account.spent != cost:
                problems.append(f"{account.id} spent {account.spent}, its charges sum to {cost}")
            if account.reserved != reserved:
                problems.append(
                    f"{account.id} reserved {account.reserved}, its open charges {reserved}"
                )
            if account.spend_limit is not None and account.spent < 0:
                problems.append(f"{account.id} has spent less than nothing")
        priced = (
            Charge.hit_tokens * Charge.hit_price
            + Charge.miss_tokens * Charge.miss_price
            + Charge.output_tokens * Charge.output_price
        )
        wrong = select(Charge.id, Charge.cost, priced).where(Charge.cost != priced)
        for charge, cost, right in session.execute(wrong):
            problems.append(f"charge {charge} costs {cost}, its tokens cost {right}")
    return problems


def _close(session: Session, server: str, moment: datetime) -> int:
    """Forget a server, mark its open charges as lost and give their reservations back."""
    session.execute(delete(ServerLife).where(ServerLife.id == server))
    left_open = (Charge.server == server, Charge.ended.is_(None))
    owners = select(Charge.owner).where(*left_open).distinct()
    closed = 0
    for owner in sorted(session.scalars(owners)):  # one order, so that two servers do not lock
        account = session.get_one(Account, owner, with_for_update=True)
        for row in session.scalars(select(Charge).where(*left_open, Charge.owner == owner)):
            account.reserved -= row.reserved
            row.ended, row.outcome = moment, LOST
            closed += 1
    return closed


def _running(session: Session, account: Account, request: str) -> int:
    open_ = select(func.count(distinct(Charge.request))).where(
        Charge.owner == account.id, Charge.request != request, Charge.ended.is_(None)
    )
    return session.scalar(open_) or 0


def _seconds(span: timedelta) -> int:
    return max(1, ceil(span.total_seconds()))


def _day(database: Database, day: date) -> Any:
    """A day as the database compares it with ``date(...)``: SQLite's dates are texts."""
    return day.isoformat() if database.name.startswith("sqlite") else day
