"""Prometheus metrics, under the names that dashboards made for vLLM know, with a prefix of our own or vLLM's.

Every frontend counts into memory-mapped files of its own in one folder, and whichever is asked sums them all. What the
engine core counts comes from its last status instead.
"""

import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from cableway.frontend.client import EngineClient
from cableway.ipc.messages import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WHOLE_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_QUEUE_S = (0.001, 0.01, 0.05, 0.1, *_WHOLE_S)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("Arrival of a request to its first token", _FIRST_TOKEN_S),
    "inter_token_latency_seconds": ("Time between two tokens of a choice", _GAP_S),
    "e2e_request_latency_seconds": ("Arrival of a request to its end", _WHOLE_S),
    "request_queue_time_seconds": ("Time a request waited in the engine's queue", _QUEUE_S),
    "request_prompt_tokens": ("Prompt tokens of a request", _TOKENS),
    "request_generation_tokens": ("Tokens made for a request, all choices together", _TOKENS),
}


class TalliedHistogram(Histogram):
    """A histogram that counts in memory, and writes to its file when flushed: it may be told of each token.

    PERF: 0.4 µs an observation, where the library's own takes 2.1.
    """

    def _metric_init(self) -> None:
        super()._metric_init()
        self._pending = [0] * len(self._upper_bounds)
        self._pending_sum = 0.0

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        self.observe_many(amount, 1)

    def observe_many(self, value: float, num: int) -> None:
        """Observe `value` `num` times."""
        self._pending[bisect_left(self._upper_bounds, value)] += num
        self._pending_sum += value * num

    def flush(self) -> None:
        """Let others see what was observed."""
        for bucket, num in enumerate(self._pending):
            if num:
                self._buckets[bucket].inc(num)
                self._pending[bucket] = 0
        self._sum.inc(self._pending_sum)
        self._pending_sum = 0.0


class ModelMetrics:
    """The counters of one served model in this process."""

    def __init__(self, counters: dict[str, Counter], histograms: dict[str, TalliedHistogram], name: str):
        self.prompt_tokens = counters["prompt_tokens"].labels(name)
        self.generation_tokens = counters["generation_tokens"].labels(name)
        self.time_to_first_token_s = histograms["time_to_first_token_seconds"].labels(name)
        self.inter_token_latency_s = histograms["inter_token_latency_seconds"].labels(name)
        self.e2e_latency_s = histograms["e2e_request_latency_seconds"].labels(name)
        self.queue_s = histograms["request_queue_time_seconds"].labels(name)
        self.prompt_len = histograms["request_prompt_tokens"].labels(name)
        self.generation_len = histograms["request_generation_tokens"].labels(name)
        self._histograms = [histogram.labels(name) for histogram in histograms.values()]
        self._success = counters["request_success"]
        self._name = name

    def flush(self) -> None:
        for histogram in self._histograms:
            histogram.flush()

    def finished(self, reason: str) -> None:
        """A choice ended by itself, or its request was aborted or failed."""
        self._success.labels(self._name, reason).inc()


class Metrics:
    """All metrics of a server, seen from one of its frontends.

    Args:
        folder: shared by the frontends of a server; made when missing.
        prefix: goes before each name, with a colon.
        model_names: served names, first the one that stands for each engine.
    """

    def __init__(self, folder: str, prefix: str, engine: EngineClient, engines: dict[str, str]):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # The library reads this variable in whatever process counts; it is how its files are told apart from memory.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
        counters = {
            "prompt_tokens": Counter(f"{prefix}:prompt_tokens", "Prompt tokens", ["model_name"], registry=None),
            "generation_tokens": Counter(f"{prefix}:generation_tokens", "Tokens made", ["model_name"], registry=None),
            "request_success": Counter(
                f"{prefix}:request_success", "Choices ended", ["model_name", "finished_reason"], registry=None
            ),
        }
        histograms = {
            name: TalliedHistogram(f"{prefix}:{name}", text, ["model_name"], buckets=buckets, registry=None)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._models = {name: ModelMetrics(counters, histograms, name) for name in engines}
        self._registry = CollectorRegistry()
        MultiProcessCollector(self._registry, path=folder)  # type: ignore[no-untyped-call]
        self._registry.register(_CoreMetrics(prefix, engine, engines))

    def of(self, model: str) -> ModelMetrics:
        return self._models[model]

    def flush(self) -> None:
        """Write what was counted in memory, for whichever frontend is asked; to be called every second."""
        for model in self._models.values():
            model.flush()

    def render(self) -> bytes:
        """Everything, summed over the frontends, in Prometheus' text format."""
        return generate_latest(self._registry)


class _CoreMetrics(Collector):
    """What each engine core told in its last status."""

    def __init__(self, prefix: str, engine: EngineClient, engines: dict[str, str]):
        self._prefix = prefix
        self._engine = engine
        self._names = {engine: name for name, engine in reversed(engines.items())}

    def collect(self) -> Iterator[Metric]:
        known = [
            (self._names[engine], status)
            for engine, (status, _) in self._engine.statuses().items()
            if status is not None
        ]
        for field, name, text in (
            ("num_running", "num_requests_running", "Requests in the batch"),
            ("num_waiting", "num_requests_waiting", "Requests in the queue"),
            ("kv_usage_frac", "kv_cache_usage_perc", "Part of the KV blocks in use; 1 = all"),
            ("asleep", "engine_sleep_state", "1 while the engine has given its memory back"),
        ):
            yield self._fill(GaugeMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"]), field, known)
        for field, name, text in (
            ("prefix_queries", "prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
            ("prefix_hits", "prefix_cache_hits", "Prompt tokens found in the prefix cache"),
            ("preemptions", "num_preemptions", "Requests put back into the queue for want of blocks"),
            ("steps", "engine_steps", "Steps finished"),
            ("compilations", "kernel_compilations_after_ready", "Kernels that steps had to wait for"),
        ):
            yield self._fill(CounterMetricFamily(f"{self._prefix}:{name}", text, labels=["model_name"]), field, known)

    @staticmethod
    def _fill(
        family: GaugeMetricFamily | CounterMetricFamily, field: str, known: list[tuple[str, Status]]
    ) -> GaugeMetricFamily | CounterMetricFamily:
        for model, status in known:
            family.add_metric([model], getattr(status, field))
        return family
