"""Does a model fit on a machine, with what, how fast, and what does it cost?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..config import V4Config
from ..errors import ConfigError
from ..formats import storage_format
from .hardware import HOURS_A_MONTH, Machine, api, data, devices, engine, machine
from .roofline import PREFILL_CHUNK, QUANTIZATIONS, Placement, Speed, sizes

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Use:
    """How the machine is used, for costs: prompt tokens per output token, the share of them found
    in the prefix cache, and the share of the month in which it is busy."""

    prompt_per_output: float = 4.0
    hits: float = 0.5
    busy: float = 1.0

    def __post_init__(self) -> None:
        if self.prompt_per_output < 0 or not (0 <= self.hits <= 1 and 0 < self.busy <= 1):
            raise ConfigError(
                "use of the machine",
                expected="prompt tokens per output >= 0, hits in [0, 1], busy in (0, 1]",
                got=f"{self.prompt_per_output}, {self.hits}, {self.busy}",
            )


def fit(
    name: str,
    config: V4Config,
    on: Machine,
    context: int,
    users: int = 1,
    *,
    quantization: str | None = None,
    engine_name: str | None = None,
    month: float | None = None,
    use: Use | None = None,
) -> dict[str, Any]:
    """Everything ``dsv4 plan fit`` says about ``users`` sequences of ``context`` tokens.

    ``fits``: all weights and caches lie in device memory; ``runs``: they do if experts may lie in
    host memory or on the SSD. Speeds are predictions (``roofline``) for an engine of
    ``hardware.toml``. ``month`` (US$) replaces the known price. Raises ConfigError for a context
    the model does not have, no users, or unknown names.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise ConfigError(
            "--context",
            expected=f"1 to {config.max_position_embeddings:,} tokens of {name}",
            got=f"{context:,}",
        )
    if users < 1:
        raise ConfigError("--users", expected="at least 1", got=users)
    if month is not None and month < 0:
        raise ConfigError("--price", expected="US$ a month, at least 0", got=month)
    stored = quantization or storage_format(config)
    software = engine(engine_name or on.device.engine)
    speed = Speed(config, on, software, stored)
    place = speed.place(users, context)
    room = on.device.memory * 1e9 * on.count
    report: dict[str, Any] = {
        "model": name,
        "hardware": on.name,
        "engine": engine_name or on.device.engine,
        "context": context,
        "users": users,
        "quantization": stored,
        "bytes": {
            "weights": speed.sizes.total,
            "kv": speed.kv_of(users, context),
            "workspace": speed.workspace(users) * on.count,
            "device_memory": room,
        },
        "fits": place is not None and place.on_device == 1,
        "runs": place is not None,
    }
    if place is not None:
        report |= _placed(speed, place, users, context)
        report |= _splits(speed, users, context)
    report["quantizations"] = _quantizations(speed, users, context)
    report["cost"] = _cost(name, speed, place, users, context, month, use or Use())
    report["statement"] = _statement(report, place)
    if not report["fits"]:
        report["what_fits"] = what_fits(speed, users, context)
    return report


def _placed(speed: Speed, place: Placement, users: int, context: int) -> dict[str, Any]:
    decode = speed.decode(place, users, context)
    prefill = speed.prefill(place, context)
    return {
        "placement": {
            "split": str(place.split),
            "experts": place.experts,
            "experts_on_device": place.on_device,
            "experts_in_host_memory": place.on_host,
            "experts_on_ssd": place.on_ssd,
            "fullest_device_bytes": place.device_bytes,
        },
        "decode": {
            "tokens_per_second": users / decode.total,
            "tokens_per_second_per_user": 1 / decode.total,
            "binding": decode.binding,
            "seconds": decode._asdict(),
        },
        "prefill": {
            "tokens_per_second": context / prefill.total,
            "seconds_to_first_token": prefill.total,
            "binding": prefill.binding,
            "seconds": prefill._asdict(),
        },
    }


def _splits(speed: Speed, users: int, context: int) -> dict[str, Any]:
    room = speed.machine.device.memory * 1e9
    found = []
    for split in speed.splits():
        need = speed.device_bytes(split, users, context)
        found.append({"split": str(split), "device_bytes": need, "fits": need <= room})
    return {"splits": found}


def _quantizations(speed: Speed, users: int, context: int) -> list[dict[str, Any]]:
    """The ways to store the weights, from large to small, and whether each fits."""
    found = []
    for name in QUANTIZATIONS:
        other = copy(speed)
        other.sizes = sizes(speed.config, name)
        weights, fits = other.sizes.total, other.fits(users, context)
        found.append({"quantization": name, "weights": weights, "fits": fits})
    return sorted(found, key=lambda row: -row["weights"])


def _cost(
    name: str,
    speed: Speed,
    place: Placement | None,
    users: int,
    context: int,
    month: float | None,
    use: Use,
) -> dict[str, Any]:
    device, count = speed.machine.device, speed.machine.count
    known = device.month
    price = month if month is not None else None if known is None else known * count
    hosted = api(name)
    out: dict[str, Any] = {"month": price, "use": vars(use)}
    if place is not None:
        chunk = min(context, PREFILL_CHUNK)
        prompt = speed.prefill(place, chunk).total / chunk
        fresh = use.prompt_per_output * (1 - use.hits)
        seconds = speed.decode(place, users, context).total / users + prompt * fresh
        out["output_tokens_a_month"] = HOURS_A_MONTH * 3600 * use.busy / seconds
        if price is not None:
            out["per_million_output"] = price / out["output_tokens_a_month"] * 1e6
    if hosted is not None:
        asked = use.hits * hosted.hit + (1 - use.hits) * hosted.miss
        out["api_per_million_output"] = hosted.output + use.prompt_per_output * asked
        out["api_source"] = hosted.source
        if price is not None:
            even = price / out["api_per_million_output"] * 1e6
            out["break_even_output_tokens_a_month"] = even
            out["break_even_reached"] = even <= out.get("output_tokens_a_month", 0.0)
    return out


def _statement(report: dict[str, Any], place: Placement | None) -> str:
    """One or two plain sentences."""
    b = report["bytes"]
    need, room = b["weights"] + b["kv"] + b["workspace"], b["device_memory"]
    what = f"{report['model']} in {report['quantization']} on {report['hardware']}"
    if report["fits"]:
        return (
            f"{what} fits: {b['weights'] / 1e9:,.2f} GB of weights and {b['kv'] / 1e9:,.2f} GB of"
            f" KV in {room / 1e9:,.0f} GB."
        )
    if b["weights"] > room:
        text = (
            f"{what} does not fit in device memory: the weights alone are"
            f" {b['weights'] / 1e9:.1f} GB, the devices have {room / 1e9:,.0f} GB."
        )
    elif need > room:
        text = (
            f"{what} does not fit in device memory: {need / 1e9:.1f} GB are needed, the devices"
            f" have {room / 1e9:,.0f} GB."
        )
    else:
        text = (
            f"{what} does not fit in device memory: there is enough in all, but no split of the"
            " model leaves each device little enough."
        )
    if place is None:
        return f"{text} Nor does it run with experts elsewhere."
    moved = place.on_ssd or place.on_host
    return f"{text} It runs with {moved:.0%} of the experts {place.experts}, at that speed."


def what_fits(speed: Speed, users: int, context: int) -> list[str]:
    """For each known device the smallest number (up to 32) that holds everything."""
    found: list[str] = []
    for device in devices().values():
        counts = COUNTS if device.link else COUNTS[:1]  # what is not connected works alone
        machines = (Machine(device, count) for count in counts)
        fitting = (on.name for on in machines if speed.on(on).fits(users, context))
        found += islice(fitting, 1)
    return found


# ---------------------------------------------------------------- published measurements


def published() -> Iterator[dict[str, Any]]:
    """Each result of ``published.toml`` with what this planner predicts beside it."""
    models: dict[tuple[str, str], Speed] = {}
    for entry in data("published")["result"]:
        on = machine(entry["hardware"])
        software = engine(entry.get("engine", on.device.engine))
        stored = entry["model"], entry.get("quantization", "instruct")
        if stored not in models:
            models[stored] = Speed(V4Config.preset(stored[0]), on, software, stored[1])
        speed = models[stored].on(on, software)
        users, context = entry.get("users", 1), entry["context"]
        place = speed.place(users, context)
        assert place is not None, entry["what"]
        row = {"what": entry["what"], "source": entry["source"]}
        predicted = {"decode": users / speed.decode(place, users, context).total}
        if prompt := entry.get("prompt"):
            predicted["prefill"] = prompt / speed.prefill(place, prompt, context - prompt).total
        for key in ("decode", "prefill"):
            if key in entry:
                row[key] = entry[key]
                row[f"{key}_predicted"] = predicted[key]
                row[f"{key}_error"] = predicted[key] / entry[key] - 1
        yield row


def median_error(rows: list[dict[str, Any]], key: str) -> float:
    """Median of the absolute relative errors of ``decode`` or ``prefill``."""
    return statistics.median([abs(float(r[f"{key}_error"])) for r in rows if key in r])
