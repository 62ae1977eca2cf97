"""What /metrics shows. Every name is documented in docs/metrics.md, and a test holds that.

Two sources: what this frontend saw of its requests (counters and histograms below), and the
pool's own view (`PoolCollector`, read when scraped).
"""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import weft
from weft.hub.base import Hub
from weft.server.attainment import AttainmentMetrics

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
TBT_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.2,
    0.4,
    0.8,
    1.6,
    3.2,
    6.4,
    12.8,
    25.6,
)
UNKNOWN_MODEL = "(unknown)"
"""Label of requests for a model that does not exist: clients cannot make new labels."""


class Metrics:
    """The metrics of one frontend, with a registry of their own."""

    def __init__(self, hub: Hub) -> None:
        # A time of birth per series would double the page and tell nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "weft_requests",
            "Choices asked for, by how they ended.",
            ["model", "outcome"],
            registry=self.registry,
        )
        self.ttft = Histogram(
            "weft_ttft_seconds",
            "From the arrival of a request to its first token.",
            ["model"],
            buckets=TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self.tbt = Histogram(
            "weft_tbt_seconds",
            "Time between tokens of one answer.",
            ["model"],
            buckets=TBT_BUCKETS_S,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "weft_prompt_tokens",
            "Prompt tokens of admitted requests.",
            ["model"],
            registry=self.registry,
        )
        self.output_tokens = Counter(
            "weft_output_tokens",
            "Tokens of answers, as received from the pool.",
            ["model"],
            registry=self.registry,
        )
        self.attainment = AttainmentMetrics(self.registry)
        self.registry.register(PoolCollector(hub))

    def render(self) -> bytes:
        text: bytes = generate_latest(self.registry)
        return text


class PoolCollector(Collector):
    """The pool's view at the moment of the scrape. Counters of a unit begin again at zero when its
    worker is restarted, as Prometheus expects of counters."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are unique by construction, and registering must not read the hub."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        view = self._hub.view()
        build = GaugeMetricFamily("weft_build_info", "Always 1.", labels=["version"])
        build.add_metric([weft.__version__], 1)
        yield build
        yield GaugeMetricFamily(
            "weft_unfinished_requests", "Requests in the hub's journal.", value=view.unfinished
        )
        yield GaugeMetricFamily(
            "weft_host_store_bytes", "Size of the host store.", value=view.host_store_bytes
        )
        yield GaugeMetricFamily(
            "weft_host_store_used_bytes",
            "Bytes of the host store in use: weight images and parked KV.",
            value=view.host_store_used_bytes,
        )
        broken = GaugeMetricFamily(
            "weft_model_failed", "1 if the model cannot be served.", labels=["model"]
        )
        for card in view.models:
            broken.add_metric([card.name], int(card.failed is not None))
        yield broken
        yield from self._units()
        yield from self._models()

    def _units(self) -> Iterator[Metric]:
        units = self._hub.view().units
        up = GaugeMetricFamily("weft_unit_up", "1 if the unit's worker answers.", labels=["unit"])
        restarts = CounterMetricFamily(
            "weft_unit_restarts", "Times the unit's worker was started again.", labels=["unit"]
        )
        for unit in units:
            up.add_metric([str(unit.unit)], int(unit.up))
            restarts.add_metric([str(unit.unit)], unit.restarts)
        yield up
        yield restarts
        gauges = {
            "num_granules": ("weft_granules", "Granules of the arena."),
            "free_granules": ("weft_granules_free", "Granules that nobody holds."),
            "host_bytes": ("weft_parked_kv_capacity_bytes", "Host bytes for parked KV."),
            "host_used_bytes": ("weft_parked_kv_bytes", "Host bytes that hold parked KV."),
            "host_cached_bytes": (
                "weft_prefix_host_bytes",
                "Host bytes that hold what the prefix cache keeps.",
            ),
        }
        counters = {
            "actions_done": ("weft_actions", "Actions the executor has ended."),
            "bytes_copied": ("weft_copied_bytes", "Bytes moved by loads and KV copies."),
        }
        for fields, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for field, (name, text) in fields.items():
                metric = family(name, text, labels=["unit"])
                for unit in units:
                    if unit.status is not None:
                        metric.add_metric([str(unit.unit)], getattr(unit.status, field))
                yield metric

    def _models(self) -> Iterator[Metric]:
        units = self._hub.view().units
        labels = ["unit", "model"]
        gauges = {
            "queued": ("weft_requests_queued", "Requests that have not begun."),
            "running": ("weft_requests_running", "Requests that hold device state."),
            "parked": ("weft_requests_parked", "Requests whose KV is in host memory."),
            "turn": ("weft_model_turn", "1 if it is the model's turn to decode."),
            "weight_granules": ("weft_model_weight_granules", "Granules under the weights."),
            "kv_granules": ("weft_model_kv_granules", "Granules under the KV cache."),
            "kv_pages_used": ("weft_model_kv_pages_used", "KV pages in use."),
            "kv_pages_cached": (
                "weft_model_kv_pages_cached",
                "KV pages that the prefix cache keeps and nobody uses.",
            ),
            "host_pages_cached": (
                "weft_model_host_pages_cached",
                "KV pages that the prefix cache keeps in host memory.",
            ),
        }
        counters = {
            "switches_in": ("weft_switches_in", "Times the model's weights came in."),
            "switches_out": ("weft_switches_out", "Times the model's weights were dropped."),
            "prompt_tokens": ("weft_unit_prompt_tokens", "Prompt tokens the unit has computed."),
            "output_tokens": ("weft_unit_output_tokens", "Tokens the unit has drawn."),
            "load_bytes": ("weft_load_bytes", "Bytes of weights that came in."),
            "begun": ("weft_requests_begun", "Requests whose first step was planned."),
            "preemptions": (
                "weft_preemptions",
                "Times a running request had to give its device memory up.",
            ),
            "parks": ("weft_parks", "Of these, those whose KV went to host memory."),
            "prefix_hit_tokens": (
                "weft_prefix_hit_tokens",
                "Positions whose KV was found in the prefix cache instead of computed.",
            ),
        }
        for fields, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for field, (name, text) in fields.items():
                metric = family(name, text, labels=labels)
                for unit in units:
                    for model in unit.status.models if unit.status else ():
                        metric.add_metric([str(unit.unit), model.name], getattr(model, field))
                yield metric
        yield from self._moves()
        state = GaugeMetricFamily(
            "weft_model_state", "1 for the state the model is in.", labels=[*labels, "state"]
        )
        for unit in units:
            for model in unit.status.models if unit.status else ():
                state.add_metric([str(unit.unit), model.name, model.state], 1)
        yield state

    def _moves(self) -> Iterator[Metric]:
        """Loads and drops by cause, and times in seconds."""
        labels = ["unit", "model"]
        times = {
            "load_ns": CounterMetricFamily(
                "weft_load_seconds", "From the order of a load to its last byte.", labels=labels
            ),
            "queue_wait_ns": CounterMetricFamily(
                "weft_queue_wait_seconds", "From arrival to the first step.", labels=labels
            ),
        }
        causes = {
            "loads_by": CounterMetricFamily(
                "weft_loads", "Times the weights came in, by cause.", labels=[*labels, "cause"]
            ),
            "drops_by": CounterMetricFamily(
                "weft_drops", "Times the weights left, by cause.", labels=[*labels, "cause"]
            ),
        }
        for unit in self._hub.view().units:
            for model in unit.status.models if unit.status else ():
                where = [str(unit.unit), model.name]
                for field, metric in times.items():
                    metric.add_metric(where, getattr(model, field) / 1e9)
                for field, metric in causes.items():
                    for cause, count in getattr(model, field).items():
                        metric.add_metric([*where, cause], count)
        yield from times.values()
        yield from causes.values()
