"""Who may ask, and how much: keys and their limits. What was used is in ``ledger``.

A key is a secret that its owner sends with each request. Only its SHA-256 is stored (a key has
256 random bits, so there is nothing to guess), and it is shown once, when it is made.

While there is no key at all, whoever reaches the server is ``LOCAL``. That is for loopback: the
command refuses to serve other machines then, and ``open_to`` refuses what a web page somewhere
sends through a visitor's browser.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from urllib.parse import urlsplit

from sqlalchemy import BigInteger, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from ..errors import ConfigError, DSV4Error
from .database import LOCAL, Base, Database, Timestamp

LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "spend_limit")


class Account(Base):
    """A caller: one key, or LOCAL. Money in picodollars; a limit that is None does not limit.

    ``spent`` is the sum of the costs of its charges, ``reserved`` what its running requests may
    still cost; both change only together with the charges (``ledger``).
    """

    __tablename__ = "account"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    digest: Mapped[str | None] = mapped_column(unique=True)
    ending: Mapped[str] = mapped_column(default="")
    made: Mapped[datetime] = mapped_column(Timestamp)
    revoked: Mapped[datetime | None] = mapped_column(Timestamp)
    requests_per_minute: Mapped[int | None]
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    concurrency: Mapped[int | None]
    spend_limit: Mapped[int | None] = mapped_column(BigInteger)
    spent: Mapped[int] = mapped_column(BigInteger, default=0)
    reserved: Mapped[int] = mapped_column(BigInteger, default=0)


@dataclass(frozen=True)
class Caller:
    """Who sent a request: ``id`` owns what it makes. ``limited`` if there is a spend limit."""

    id: str = LOCAL
    name: str = LOCAL
    limited: bool = False


class AccountError(DSV4Error):
    """A caller who is not let in: ``status`` 401, 402, 403 or 429, in the hosted API's words.

    ``retry_after`` is in seconds, for 429.
    """

    def __init__(self, message: str, status: int, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def now() -> datetime:
    return datetime.now(timezone.utc)


class Keys:
    """Makes, lists, limits, revokes and recognises keys."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = now) -> None:
        self._database, self._clock = database, clock
        with database.write() as session:
            if session.get(Account, LOCAL) is None:
                session.add(Account(id=LOCAL, name=LOCAL, made=clock()))

    def create(self, name: str, **limits: int | None) -> str:
        """A new key, which nothing can show again. ``limits`` as for ``limit``."""
        if not re.fullmatch(r"[\w][\w.@ -]{0,63}", name) or name == LOCAL:
            raise ConfigError(
                "this cannot be a key's name",
                expected="up to 64 letters, digits, spaces or any of . @ _ -",
                got=repr(name),
            )
        secret = "sk-" + secrets.token_urlsafe(32)
        with self._database.write() as session:
            if _find(session, name) is not None:
                raise ConfigError(
                    f"there is a key named {name}", hint=f"another name, or: keys revoke '{name}'"
                )
            account = Account(
                id="key_" + secrets.token_hex(8),
                name=name,
                digest=_digest(secret),
                ending=secret[-4:],
                made=self._clock(),
            )
            _set_limits(account, limits)
            session.add(account)
        return secret

    def list(self) -> list[Account]:
        """Every key ever made, in that order, revoked ones too."""
        with self._database.read() as session:
            keys = select(Account).where(Account.digest.is_not(None)).order_by(Account.made)
            return list(session.scalars(keys))

    def revoke(self, which: str) -> Account:
        """End a key, given by name or id. What it used stays in the books."""
        with self._database.write() as session:
            account = _named(session, which)
            account.revoked = self._clock()
            return account

    def limit(self, which: str, **limits: int | None) -> Account:
        """Set some of a key's ``LIMITS``; None takes one away.

        ``requests_per_minute`` and ``tokens_per_minute`` count the last 60 seconds,
        ``concurrency`` the requests at one time, ``spend_limit`` is all that the key may ever
        cost, in picodollars.
        """
        with self._database.write() as session:
            account = _named(session, which)
            _set_limits(account, limits)
            return account

    def exist(self) -> bool:
        """Whether any key may be used."""
        with self._database.read() as session:
            return _any(session)

    def check_exposure(self, host: str, also: str | None = None) -> None:
        """Raises ConfigError if other machines could use a server at ``host`` without a key."""
        if also is None and not is_loopback(host) and not self.exist():
            raise ConfigError(
                f"{host} would let anybody who can reach this machine use the server",
                expected="a key, when other machines are served",
                got="none in the database",
                hint="dsv4 keys create NAME, or --api-key, or --host 127.0.0.1",
            )

    def recognise(
        self,
        headers: Mapping[str, str],
        *,
        also: str | None = None,
        keyless: bool = True,
        request_id: str = "",
    ) -> Caller | None:
        """Whose key the headers hold; None if there is no key to ask for, and ``keyless``.

        Where both are sent, ``Authorization`` wins over ``x-api-key``. ``also`` is a key that is
        not in the database and stands for LOCAL. Raises AccountError 401.
        """
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        given = given.strip()
        if also is not None and hmac.compare_digest(given.encode(), also.encode()):
            return Caller()
        with self._database.read() as session:
            account = session.scalar(select(Account).where(Account.digest == _digest(given)))
            if account is not None and account.revoked is None:
                return Caller(account.id, account.name, account.spend_limit is not None)
            if keyless and account is None and also is None and not _any(session):
                return None
        told = f"Your api key: ****{given[-4:] if len(given) > 12 else ''} is invalid"
        raise AccountError(
            f"Authentication Fails, {told if given else 'no api key was sent'} "
            f"(request_id: {request_id})",
            401,
        )


def open_to(headers: Mapping[str, str], origins: tuple[str, ...] = ()) -> None:
    """Check that a request without a key comes from this machine's own programs and pages.

    A page of some other site can make its visitor's browser send requests to 127.0.0.1, or to a
    name that it made to mean 127.0.0.1. So the Host must be an address or localhost, and the
    Origin, which browsers send, that same host or one of ``origins``. Raises AccountError 403.
    """
    host = headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if not (name == "localhost" or name.endswith(".localhost") or _is_address(name)):
        raise AccountError(
            f"Requests for the host {name} need an api key: dsv4 keys create NAME", 403
        )
    origin = headers.get("origin")
    if origin and origin not in origins and "*" not in origins and urlsplit(origin).netloc != host:
        raise AccountError(
            f"Requests from pages of {origin} need an api key (dsv4 keys create NAME) or that "
            "the server allows their origin",
            403,
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that is bound to ``host``."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _any(session: Session) -> bool:
    usable = select(Account.id).where(Account.digest.is_not(None), Account.revoked.is_(None))
    return session.scalar(usable.limit(1)) is not None


def _find(session: Session, which: str) -> Account | None:
    usable = select(Account).where(Account.digest.is_not(None), Account.revoked.is_(None))
    return session.scalar(usable.where((Account.name == which) | (Account.id == which)))


def _named(session: Session, which: str) -> Account:
    found = _find(session, which)
    if found is None:
        raise ConfigError(
            f"there is no key {which}", expected="the name or id of one", hint="dsv4 keys list"
        )
    return found


def _set_limits(account: Account, limits: Mapping[str, int | None]) -> None:
    for name, value in limits.items():
        if name not in LIMITS:
            raise TypeError(f"no such limit: {name}")
        least = 0 if name == "spend_limit" else 1
        if value is not None and not least <= value < 2**63:
            raise ConfigError(name.replace("_", " "), expected=f"{least} or more", got=value)
        setattr(account, name, value)
