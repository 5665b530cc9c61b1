"""Figures for Prometheus, named as vLLM names them with the prefix `ultrafuser:`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ultrafuser.engine.requests import TokenPiece
from ultrafuser.engine.thread import EngineThread
from ultrafuser.server.facts import RequestFacts
from ultrafuser.server.log import num_dropped_lines

PREFIX = "ultrafuser:"
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_WEIGHTS = tuple(tenth / 10 for tenth in range(1, 11))


class Metrics:
    """All figures of one server, in a registry of its own.

    Args:
        engine: Gives the figures of now.
    """

    def __init__(self, engine: EngineThread) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.registry.register(_EngineFigures(engine))
        self.names = engine.names
        self._first_token = Histogram(
            f"{PREFIX}time_to_first_token_seconds", "From submission", buckets=_FIRST_TOKEN_S, registry=self.registry
        )
        self._between = Histogram(
            f"{PREFIX}inter_token_latency_seconds", "Per token", buckets=_TOKEN_S, registry=self.registry
        )
        self._whole = Histogram(
            f"{PREFIX}e2e_request_latency_seconds", "Of answered requests", buckets=_WHOLE_S, registry=self.registry
        )
        self._finished = Counter(
            f"{PREFIX}request_success", "Finished choices", ["finished_reason"], registry=self.registry
        )
        self._responses = Counter(f"{PREFIX}http_responses", "Responses", ["route", "status"], registry=self.registry)
        self._rejections = Counter(
            f"{PREFIX}admission_rejections", "Refused before the engine", ["reason"], registry=self.registry
        )
        self._weights = Histogram(
            f"{PREFIX}gate_weight", "Per token", ["specialist"], buckets=_WEIGHTS, registry=self.registry
        )

    def first_token(self, seconds: float) -> None:
        """A request got its first token."""
        self._first_token.observe(seconds)

    def between_tokens(self, seconds: float, num_tokens: int) -> None:
        """So many tokens came, each after so long."""
        for _ in range(num_tokens):
            self._between.observe(seconds)

    def gate_weights(self, pieces: Sequence[TokenPiece]) -> None:
        """Who wrote these tokens."""
        for piece in pieces:
            for name, weight in zip(self.names, piece.gate_weights, strict=False):
                self._weights.labels(name).observe(weight)

    def rejected(self, reason: str) -> None:
        """A request was refused for load: "rate", "queue"."""
        self._rejections.labels(reason).inc()

    def responded(self, route: str, status: int, facts: RequestFacts, seconds: float) -> None:
        """A response has ended."""
        self._responses.labels(route, str(status)).inc()
        for reason in facts.finish_reasons:
            self._finished.labels(reason).inc()
        if facts.finish_reasons:
            self._whole.observe(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    """Asked at every scrape."""

    def __init__(self, engine: EngineThread) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        stats = self.engine.stats()
        room = stats.num_slots * self.engine.max_context
        gauges = {
            "num_requests_running": ("Choices that hold a slot", stats.num_running),
            "num_requests_waiting": ("Choices that wait for a slot", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the cache in use, 0 to 1", stats.cached_tokens / room if room else 0.0),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts", stats.prompt_tokens),
            "generation_tokens": ("Tokens of answers", stats.generated_tokens),
            "spec_decode_num_draft_tokens": ("Tokens drafted", stats.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Drafted tokens that stood", stats.accepted_tokens),
            "engine_steps": ("Passes of the model", stats.steps),
            "log_lines_dropped": ("Log lines that could not be written", num_dropped_lines()),
        }
        for name, (meaning, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}{name}", meaning, value)
        for name, (meaning, count) in counters.items():
            yield CounterMetricFamily(f"{PREFIX}{name}", meaning, count)
