"""Prometheus metrics of a server: gauges of the engine, and counts and times of requests."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mistral_jax.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PREFIX = "mistral_jax_"
_GAUGES = {
    "slots": ("slots", "Requests that can run at a time"),
    "running": ("requests_running", "Requests in slots"),
    "waiting": ("requests_waiting", "Requests that wait for a slot"),
    "prefix_bytes": ("prefix_cache_bytes", "Bytes of stored keys and values"),
    "seconds_since_step": ("seconds_since_step", "Age of the engine's last step, 0 when idle"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts of ended requests"),
    "new_tokens": ("generated_tokens", "Tokens generated for ended requests"),
    "reused_tokens": ("reused_tokens", "Prompt tokens restored instead of read"),
    "cancelled": ("requests_cancelled", "Requests that were cancelled"),
    "failed": ("requests_failed", "Requests that failed"),
}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class _Engine:
    """Collects the engine's counts at the time of a request for them."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics."""
        stats = self._service.stats()
        ready = GaugeMetricFamily(f"{_PREFIX}ready", "1 = the server takes requests")
        ready.add_metric([], float(self._service.problem() is None))
        yield ready
        for name, (metric, meaning) in _GAUGES.items():
            yield GaugeMetricFamily(f"{_PREFIX}{metric}", meaning, value=stats.get(name, 0))
        for name, (metric, meaning) in _COUNTERS.items():
            yield CounterMetricFamily(f"{_PREFIX}{metric}", meaning, value=stats.get(name, 0))
        share = stats.get("running", 0) / max(stats.get("slots", 0), 1)
        yield GaugeMetricFamily(f"{_PREFIX}slot_usage", "Share of slots in use", value=share)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, service: Service):
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(service))
        own = {"registry": self._registry, "namespace": "", "subsystem": ""}
        self._responses = Counter(
            f"{_PREFIX}responses", "Responses by route and status", ["route", "status"], **own
        )
        self._answers = Counter(
            f"{_PREFIX}answers", "Answers by the reason of their end", ["reason"], **own
        )
        self._first = Histogram(
            f"{_PREFIX}time_to_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=_SECONDS,
            **own,
        )
        self._each = Histogram(
            f"{_PREFIX}time_per_token_seconds",
            "Seconds between tokens, averaged over an answer",
            buckets=_TOKEN_SECONDS,
            **own,
        )
        self._whole = Histogram(
            f"{_PREFIX}answer_seconds",
            "Seconds from a request to the last token",
            buckets=_SECONDS,
            **own,
        )

    def responded(self, route: str, status: int) -> None:
        """Counts a response."""
        self._responses.labels(route, str(status)).inc()

    def answered(self, reason: str, first: float, seconds: float, tokens: int) -> None:
        """Counts an answer that has ended, with its times in seconds."""
        self._answers.labels(reason).inc()
        if tokens > 0:
            self._first.observe(first)
            self._whole.observe(seconds)
        if tokens > 1:
            self._each.observe((seconds - first) / (tokens - 1))

    def text(self) -> bytes:
        """Returns all metrics in Prometheus's text format."""
        return generate_latest(self._registry)
