"""What Prometheus reads at /metrics. Nothing in it names a caller or holds a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from .backend import Backend, Usage
from .prices import PICO

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counters of one application, in a registry of their own."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Load(backends))
        self.requests = Counter(
            "dsv4_http_requests", "Requests answered.", ("route", "method", "status"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "dsv4_http_request_seconds", "From the first byte asked to the last byte answered.",
            ("route",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.open = Gauge("dsv4_http_requests_open", "Being answered now.", registry=registry)
        self.held = Gauge(
            "dsv4_http_bodies_bytes", "Request bodies held in memory.", registry=registry
        )
        self.tokens = Counter(
            "dsv4_tokens", "Prompt tokens found in the cache (hit) or computed (miss), and output.",
            ("model", "kind"), registry=registry,
        )  # fmt: skip
        self.prompt = Counter(
            "dsv4_prompt_tokens", "Prompt tokens by where they came from, or why they were computed"
            " (as prompt_cache_details of an answer).", ("model", "whence"), registry=registry,
        )  # fmt: skip
        self.cost = Counter(
            "dsv4_cost_usd", "What answers cost at the price list.", ("model",), registry=registry
        )
        self.answers = Counter(
            "dsv4_answers", "Answers by how they ended.", ("model", "outcome"), registry=registry
        )
        self.first = Histogram(
            "dsv4_first_token_seconds", "From the request to the first text or call.", ("model",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.refused = Counter(
            "dsv4_limits_refused", "Answers refused by a limit of the key.", ("status",),
            registry=registry,
        )  # fmt: skip
        self.ledger_failures = Counter(
            "dsv4_ledger_failures", "Answers whose cost could not be written.", registry=registry
        )

    def answered(self, model: str, usage: Usage, cost: int, outcome: str) -> None:
        self.answers.labels(model, outcome).inc()
        self.tokens.labels(model, "hit").inc(usage.cached_tokens)
        self.tokens.labels(model, "miss").inc(usage.prompt_tokens - usage.cached_tokens)
        for whence, tokens in usage.whence().items():
            self.prompt.labels(model, whence).inc(tokens)
        self.tokens.labels(model, "output").inc(usage.completion_tokens)
        self.cost.labels(model).inc(cost / PICO)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Load:
    """Every number of a backend's ``load``, read when Prometheus asks."""

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = backends

    def collect(self) -> Iterable[GaugeMetricFamily]:
        gauges: dict[str, GaugeMetricFamily] = {}
        for backend in self._backends:
            for name, value in backend.load().items():
                if isinstance(value, int | float):
                    gauge = gauges.setdefault(
                        name, GaugeMetricFamily(f"dsv4_{name}", "As in /health.", labels=["model"])
                    )
                    gauge.add_metric([backend.model.id], value)
        return gauges.values()
