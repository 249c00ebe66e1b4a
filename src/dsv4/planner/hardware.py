"""Machines: what ``hardware.toml`` says of them, and how ``8xH100-80G`` is read."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HOURS_A_MONTH = 730
MONTHS_OF_USE = 36  # over which a bought machine is paid off
KWH = 0.15  # US$


@dataclass(frozen=True)
class Engine:
    """What software makes of a machine: reached shares of bandwidth and compute, the narrowest
    precision it multiplies in, and the microseconds a layer takes whatever it does and for each
    further user of a step. Not ``batched``: each user's token is a step of its own."""

    bandwidth: float
    compute: float
    precision: str
    layer_us: float
    source: str
    batched: bool = True
    user_us: float = 0.0


@dataclass(frozen=True)
class Api:
    """Hosted prices, US$ per million tokens."""

    hit: float
    miss: float
    output: float
    source: str


@dataclass(frozen=True)
class Device:
    """Something with one memory. GB, GB/s and dense TFLOP/s, as ``hardware.toml`` explains."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    engine: str
    source: str
    fp8: float | None = None
    fp4: float | None = None
    link: float = 0.0
    host_memory: float = 0.0
    host_bandwidth: float = 0.0
    ssd: float = 0.0
    hour: float | None = None
    price: float | None = None
    watts: float = 0.0

    def compute(self, precision: str, narrowest: str = "fp4") -> float:
        """TFLOP/s in ``fp4``, ``fp8`` or ``bf16``, or in the next wider one that the device has
        and that software whose narrowest is ``narrowest`` uses."""
        if "bf16" in (precision, narrowest) or self.fp8 is None:
            return self.bf16
        return self.fp4 if precision == narrowest == "fp4" and self.fp4 else self.fp8

    @property
    def month(self) -> float | None:
        """US$ a month: rented, or paid off with its electricity; None where no price is known."""
        if self.hour is not None:
            return self.hour * HOURS_A_MONTH
        if self.price is not None:
            return self.price / MONTHS_OF_USE + self.watts / 1000 * HOURS_A_MONTH * KWH
        return None


@dataclass(frozen=True)
class Machine:
    """``count`` equal devices that work on one model."""

    device: Device
    count: int = 1

    @property
    def name(self) -> str:
        return self.device.name if self.count == 1 else f"{self.count}x{self.device.name}"


@cache
def data(name: str) -> dict[str, Any]:
    """A TOML file of this package, parsed."""
    text = Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found


def devices() -> dict[str, Device]:
    """Every known device by name."""
    return {name: Device(name, **entry) for name, entry in data("hardware")["device"].items()}


def engine(name: str) -> Engine:
    """An engine of ``hardware.toml``; ConfigError for any other."""
    engines = data("hardware")["engine"]
    if name not in engines:
        raise ConfigError("no such engine", expected=", ".join(engines), got=name)
    return Engine(**engines[name])


def api(name: str) -> Api | None:
    """Hosted prices of a model; None for one that nobody hosts."""
    entry = data("hardware")["api"].get(name)
    return None if entry is None else Api(**entry)


def machine(text: str) -> Machine:
    """``M3-Ultra-512``, ``8xH100-80G``, or ``2xRTX-5090-32G+256`` with 256 GB of host memory in
    all. Raises ConfigError, naming the nearest known devices, for anything else."""
    known = {name.lower(): device for name, device in devices().items()}
    match = re.fullmatch(r"(?:(\d+)x)?([a-z0-9-]+?)(?:\+(\d+)g?b?)?", text.strip().lower())
    count = int(match[1] or 1) if match else 0
    if not match or match[2] not in known or not 1 <= count <= 1024:
        raise ConfigError(
            "--hardware",
            expected=f"this, or [COUNTx]NAME[+HOST_GB] with one of {', '.join(devices())}",
            got=text,
            hint="dsv4 plan fit --hardware 8xH200-141G",
        )
    device = known[match[2]]
    if match[3]:
        bandwidth = device.host_bandwidth or 50.0
        device = replace(
            device, host_memory=float(match[3]) / count, host_bandwidth=bandwidth
        )
    return Machine(device, count)
