"""What tokens cost. Money is counted in whole picodollars (10^-12 USD) and never rounded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ..errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PICO = 10**12  # picodollars in a dollar
LARGEST = 9_000_000  # USD; what a 64-bit column of picodollars holds
_FIELDS = {"model", "from", "until", "hit", "miss", "output"}


@dataclass(frozen=True)
class Price:
    """Picodollars per token: of the prompt from the cache, of the prompt computed, generated."""

    hit: int
    miss: int
    output: int

    def cost(self, hit_tokens: int, miss_tokens: int, output_tokens: int) -> int:
        """Picodollars."""
        return self.hit * hit_tokens + self.miss * miss_tokens + self.output * output_tokens


@dataclass(frozen=True)
class _Period:
    model: str
    begins: date
    ends: date | None
    price: Price


class PriceList:
    """Prices by model and day, read from TOML (``prices.toml`` explains the format).

    ``path`` None takes the list of the package, V4's prices at its launch. Raises ConfigError for
    a list that leaves a question open.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        source = Path(path) if path is not None else Path(__file__).with_name("prices.toml")
        self._source = source
        try:
            data = tomllib.loads(source.read_text(encoding="utf-8"), parse_float=Decimal)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot read the price list {source}", expected="a TOML file", got=error
            ) from error
        entries = data.get("price")
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{source} has no prices", expected="[[price]] tables")
        self._periods = sorted(
            (self._period(entry) for entry in entries), key=lambda p: p.begins, reverse=True
        )
        self.models = tuple(dict.fromkeys(str(entry["model"]) for entry in entries))
        self._default = data.get("default", self.models[0])
        if self._default not in self.models:
            raise ConfigError(
                f"{source}: default", expected=" or ".join(self.models), got=self._default
            )

    def charged_as(self, model: str) -> str:
        """The listed model whose price a request for ``model`` pays."""
        return model if model in self.models else str(self._default)

    def at(self, model: str, moment: datetime) -> Price:
        """The price of ``model`` (or of what it is charged as) at an aware time.

        Raises ConfigError when the list has none for that day.
        """
        name, day = self.charged_as(model), moment.astimezone(timezone.utc).date()
        for period in self._periods:
            if period.model == name and period.begins <= day:
                if period.ends is None or day <= period.ends:
                    return period.price
        raise ConfigError(
            f"{self._source} has no price for {name} on {day}",
            hint="add a [[price]] whose `from` is not later",
        )

    def _period(self, entry: Mapping[str, Any]) -> _Period:
        def wrong(name: str, expected: str) -> ConfigError:
            return ConfigError(
                f"{self._source}: {name} of a [[price]]", expected=expected, got=entry.get(name)
            )

        unknown = set(entry) - _FIELDS
        if unknown:
            raise ConfigError(
                f"{self._source}: [[price]]",
                expected=", ".join(sorted(_FIELDS)),
                got=", ".join(sorted(unknown)),
            )
        if not isinstance(entry.get("model"), str) or not entry["model"]:
            raise wrong("model", "a name")
        for name in ("from", "until"):
            given = entry.get(name)
            if (given is None and name == "from") or not isinstance(given, date | None):
                raise wrong(name, "a day such as 2026-04-24")
            if isinstance(given, datetime):
                raise wrong(name, "a day without a time")
        amounts = []
        for name in ("hit", "miss", "output"):
            try:
                amounts.append(picodollars(entry[name], per=10**6))
            except (KeyError, ConfigError) as error:
                expected = "USD per million tokens, 0 or more, at most 6 decimals"
                raise wrong(name, expected) from error
        if amounts[0] > amounts[1]:
            raise wrong("hit", "not more than miss")
        return _Period(entry["model"], entry["from"], entry.get("until"), Price(*amounts))


def picodollars(usd: str | int | Decimal, per: int = 1) -> int:
    """Dollars as picodollars, divided by ``per``. Raises ConfigError unless that is exact."""
    expected = f"0 to {LARGEST:,} US dollars"
    try:
        if isinstance(usd, bool | float):
            raise InvalidOperation
        amount = Decimal(usd)
        if not 0 <= amount <= LARGEST:
            raise InvalidOperation
        exact = amount * PICO / per
        if exact != int(exact):
            raise InvalidOperation
    except (InvalidOperation, ValueError, OverflowError) as error:
        raise ConfigError("an amount of money", expected=expected, got=usd) from error
    return int(exact)


def dollars(amount: int) -> str:
    """Picodollars as an exact decimal number of dollars with two places or more: "0.00000028"."""
    sign, amount = ("-", -amount) if amount < 0 else ("", amount)
    whole, rest = divmod(amount, PICO)
    places = f"{rest:012d}".rstrip("0")
    return f"{sign}{whole}.{places:0<2}"
