"""Prometheus metrics: names, buckets and labels in one place; children are bound once, off the hot path."""

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.gpus import Gpu

NO_MODEL = "none"  # label of requests refused before their model was known
FLUSH_REASONS = ("queue", "size", "tokens", "latency", "length")
_MODEL_LABELS = ("model", "model_version")
_LATENCY_BUCKETS = (
    0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075,
    0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# An engine's speed depends on the size of its runs; each holds those above the one before it.
_RUN_TOKENS = (64, 256, 1024, 4096, 16384)
_RUN_SIZES = (*map(str, _RUN_TOKENS), "+Inf")
_RATIO_BUCKETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75)


class Metrics:
    """The worker's own registry, so that two workers in one process do not share counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._latency = self._histogram(
            "akidb_embed_latency_seconds", "From the request's headers to its rendered answer.", _LATENCY_BUCKETS
        )
        self.requests = Counter(
            "akidb_embed_requests_total",
            "Embedding requests by HTTP status; 499: the client hung up.",
            (*_MODEL_LABELS, "status"),
            registry=self.registry,
        )
        self.errors = Counter(
            "akidb_embed_errors_total",
            "Failed embedding requests by error; model: none where it failed before its model was known.",
            (*_MODEL_LABELS, "error"),
            registry=self.registry,
        )
        self._batch_size = self._histogram("akidb_batch_size", "Texts in an engine run.", _SIZE_BUCKETS)
        self._batch_wait = self._histogram(
            "akidb_batch_wait_time_seconds", "Wait of a batch's oldest text before its engine run.", _LATENCY_BUCKETS
        )
        self._flush = Counter(
            "akidb_batch_flush_total",
            "Engine runs by what ended the batch: queue, size, tokens, latency or length.",
            (*_MODEL_LABELS, "reason"),
            registry=self.registry,
        )
        self._padding = self._histogram(
            "akidb_padding_ratio", "Part of an engine run's tokens that is padding.", _RATIO_BUCKETS
        )
        self._engine = Histogram(
            "akidb_engine_seconds",
            "Length of an engine run, by the tokens it computed, padding included: 64 at most, 65 to 256, and so on.",
            (*_MODEL_LABELS, "precision", "tokens"),
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "akidb_tokens_total", "Tokens computed, padding excluded.", _MODEL_LABELS, registry=self.registry
        )
        self._queue_depth = self._gauge("akidb_queue_depth", "Texts waiting for the engine.")
        self._queue_tokens = self._gauge("akidb_queue_tokens", "Tokens waiting for the engine.")
        self._fallback = Counter(
            "akidb_engine_fallback_total",
            "Engines that did not load, so that the next of the bundle was taken, and plans that were built again.",
            (*_MODEL_LABELS, "engine"),
            registry=self.registry,
        )
        self._request_log = Counter(
            "akidb_request_log_texts_total",
            "Sampled texts by what became of them: written, dropped (queue full) or failed (disk).",
            ("outcome",),
            registry=self.registry,
        )
        self._tls_reloads = Counter(
            "akidb_tls_reloads_total",
            "Changed certificates: loaded, or refused so that the old one stays.",
            ("outcome",),
            registry=self.registry,
        )
        self._engine_events = Counter(
            "akidb_engine_events_total",
            "Engines rebuilt, rebuild_failed or abandoned (it hung), texts retried on another one with success, and "
            "batches divided, because vectors were not finite.",
            (*_MODEL_LABELS, "event"),
            registry=self.registry,
        )
        self._failed_texts = Counter(
            "akidb_engine_failed_texts_total",
            "Texts no engine answered: it raised, or a value was not finite.",
            _MODEL_LABELS,
            registry=self.registry,
        )
        self._shared = Counter(
            "akidb_shared_texts_total",
            "Texts answered with the row of an identical text that was in flight.",
            _MODEL_LABELS,
            registry=self.registry,
        )
        self._cache = Counter(
            "akidb_cache_lookups_total",
            "Texts looked up in the vector cache: hit or miss.",
            (*_MODEL_LABELS, "result"),
            registry=self.registry,
        )
        self._info = Gauge(
            "akidb_model_info",
            "1 for each model served.",
            (*_MODEL_LABELS, "digest", "engine", "precision"),
            registry=self.registry,
        )

        self._front_restarts = Counter(
            "akidb_front_restarts_total",
            "Front processes that had to be started again: killed by a signal, or ended by themselves.",
            ("cause",),
            registry=self.registry,
        )
        self._gpu_duty = Gauge(
            "nvidia_gpu_duty_cycle",
            "Percent of the last sampling period in which a kernel ran on the GPU.",
            ("gpu",),
            registry=self.registry,
        )
        self._gpu_memory = Gauge(
            "nvidia_gpu_memory_usage_bytes",
            "Memory of the GPU in use, by the worker and by others.",
            ("gpu",),
            registry=self.registry,
        )
        self._engine_memory = self._gauge(
            "akidb_engine_memory_bytes", "GPU memory that a model's engine took at its start, where the engine says."
        )
        self._weight = self._gauge("akidb_model_traffic_weight", "Weight of a version, relative to the model's others.")
        self._swaps = Counter(
            "akidb_model_swaps_total", "Versions that took a model over.", _MODEL_LABELS, registry=self.registry
        )
        self._load_failures = Counter(
            "akidb_model_load_failures_total",
            "Bundles that could not be served; model: none where the bundle does not even say that.",
            ("model",),
            registry=self.registry,
        )

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, _MODEL_LABELS, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(name, help_text, _MODEL_LABELS, registry=self.registry)

    def for_model(self, model: str, version: str, precision: str) -> "ModelMetrics":
        """The children of one model, bound once."""
        return ModelMetrics(self, model, version, precision)

    def watch_gpus(self, gpus: Iterable[Gpu]) -> None:
        """Ask each GPU, for what it tells at all, whenever it is scraped."""
        for gpu in gpus:
            for gauge, read in ((self._gpu_duty, gpu.duty_percent), (self._gpu_memory, gpu.memory_bytes)):
                if not math.isnan(read()):
                    gauge.labels(str(gpu.index)).set_function(read)

    def count_refusal(self, status: int, error: str) -> None:
        """Count an embedding request that failed before its model was known."""
        self.count_failures(NO_MODEL, NO_MODEL, status, error)

    def count_answers(self, model: str, version: str, seconds: Collection[float]) -> None:
        """Count requests that were answered with vectors, by what each took."""
        self.requests.labels(model, version, "200").inc(len(seconds))
        latency = self._latency.labels(model, version)
        for each in seconds:
            latency.observe(each)

    def count_failures(self, model: str, version: str, status: int, error: str, number: int = 1) -> None:
        """Count requests that failed; `error` is the error's code."""
        for counter in self.failure_counters(model, version, status, error):
            counter.inc(number)

    def failure_counters(self, model: str, version: str, status: int, error: str) -> tuple[Counter, Counter]:
        """What such a failure is counted by."""
        return self.requests.labels(model, version, str(int(status))), self.errors.labels(model, version, error)

    def count_front_restart(self, cause: str) -> None:
        """Count a front process that was killed, or ended."""
        self._front_restarts.labels(cause).inc()

    def count_fallback(self, model: str, version: str, engine: str) -> None:
        """Count an engine that did not load."""
        self._fallback.labels(model, version, engine).inc()

    def count_swap(self, model: str, version: str) -> None:
        """Count a version that took a model over."""
        self._swaps.labels(model, version).inc()

    def count_load_failure(self, model: str | None) -> None:
        """Count a bundle that could not be served."""
        self._load_failures.labels(model or NO_MODEL).inc()

    def count_logged(self, outcome: str) -> None:
        """Count a text the request log sampled."""
        self._request_log.labels(outcome).inc()

    def count_tls_reload(self, outcome: str) -> None:
        """Count a changed certificate that was read."""
        self._tls_reloads.labels(outcome).inc()

    def render(self) -> bytes:
        """The Prometheus text exposition."""
        return generate_latest(self.registry)


class ModelMetrics:
    """Metrics of one model and version."""

    def __init__(self, metrics: Metrics, model: str, version: str, precision: str) -> None:
        self._metrics, self._labels = metrics, (model, version)
        self._described: tuple[str, ...] = ()
        self._latency = metrics._latency.labels(model, version)
        self._ok = metrics.requests.labels(model, version, "200")
        self._batch_size = metrics._batch_size.labels(model, version)
        self._batch_wait = metrics._batch_wait.labels(model, version)
        self._flush = {reason: metrics._flush.labels(model, version, reason) for reason in FLUSH_REASONS}
        self._padding = metrics._padding.labels(model, version)
        self._engine = [metrics._engine.labels(model, version, precision, size) for size in _RUN_SIZES]
        self._tokens = metrics._tokens.labels(model, version)
        self._shared = metrics._shared.labels(model, version)
        self._failed_texts = metrics._failed_texts.labels(model, version)
        self._failures: dict[tuple[int, str], tuple[Counter, Counter]] = {}
        self._hits, self._misses = (metrics._cache.labels(model, version, result) for result in ("hit", "miss"))

    def watch_queue(self, depth: Callable[[], float], tokens: Callable[[], float]) -> None:
        """Read both gauges from the queue whenever they are scraped."""
        self._metrics._queue_depth.labels(*self._labels).set_function(depth)
        self._metrics._queue_tokens.labels(*self._labels).set_function(tokens)

    def describe_model(self, digest: str, engine: str, precision: str, memory_bytes: int | None) -> None:
        """Say what is served, and the memory that its engine took if that is known."""
        self._described = (digest, engine, precision)
        self._metrics._info.labels(*self._labels, *self._described).set(1)
        if memory_bytes is not None:
            self._metrics._engine_memory.labels(*self._labels).set(memory_bytes)

    def set_weight(self, weight: float) -> None:
        """Say how much of the model's traffic this version gets, relative to the others."""
        self._metrics._weight.labels(*self._labels).set(weight)

    def forget_model(self) -> None:
        """Say no longer that this bundle is served, in the words in which it was said."""
        self._metrics._info.remove(*self._labels, *self._described)
        self._metrics._engine_memory.remove(*self._labels)

    def forget_version(self) -> None:
        """Show no more gauges of a version that is not served; what was counted stays."""
        for gauge in (self._metrics._queue_depth, self._metrics._queue_tokens, self._metrics._weight):
            gauge.remove(*self._labels)

    def count_answer(self, seconds: float) -> None:
        """Count a request that was answered with vectors."""
        self._ok.inc()
        self._latency.observe(seconds)

    def count_failure(self, status: int, error: str) -> None:
        """Count a request that failed; `error` is the error's code."""
        counters = self._failures.get((status, error))
        if counters is None:  # looking them up by label takes longer than all else that a refusal in a flood takes here
            counters = self._failures[status, error] = self._metrics.failure_counters(*self._labels, status, error)
        for counter in counters:
            counter.inc()

    def count_batch(self, reason: str, size: int, num_tokens: int, padded_tokens: int, wait_seconds: float) -> None:
        """Count a batch handed to the engine."""
        self._flush[reason].inc()
        self._batch_size.observe(size)
        self._batch_wait.observe(wait_seconds)
        self._padding.observe(1 - num_tokens / padded_tokens)
        self._tokens.inc(num_tokens)

    def count_engine_run(self, seconds: float, padded_tokens: int) -> None:
        """Count one call of the engine."""
        self._engine[bisect_left(_RUN_TOKENS, padded_tokens)].observe(seconds)

    def count_engine_event(self, event: str) -> None:
        """Count an engine that was replaced, or a text that another engine answered."""
        self._metrics._engine_events.labels(*self._labels, event).inc()

    def count_failed_texts(self, count: int) -> None:
        """Count texts that no engine answered."""
        self._failed_texts.inc(count)

    def count_shared(self, count: int) -> None:
        """Count texts that share the row of another."""
        self._shared.inc(count)

    def count_cache(self, hits: int, misses: int) -> None:
        """Count texts looked up in the cache."""
        self._hits.inc(hits)
        self._misses.inc(misses)
