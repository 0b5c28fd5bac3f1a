"""One sitting: the servers side by side, each case measured in turns, and the figures that come of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import (
    CLOSED_CASES,
    FRONTS_CASES,
    OVERLOAD_FACTOR,
    SWAP_CLIENTS,
    ClosedCase,
    check_agreement,
    check_reference,
    make_arrivals,
    make_two_versions,
    measure_bare_engine,
    measure_closed,
    measure_open,
    measure_overload,
    measure_soak,
    measure_swaps,
    read_batches,
)
from benchmarks.figures import Figure, median_rate, percentiles, summarise
from benchmarks.footprint import installed_mb
from benchmarks.load import LoadResult
from benchmarks.servers import (
    INFINITY,
    PEERS,
    THORFORGE,
    Server,
    find_distributions,
    start_server,
    thorforge_spec,
    turn_of,
)
from benchmarks.texts import Texts
from serving.settings import BatchingSettings

ALL_CLOSED = CLOSED_CASES | FRONTS_CASES
_OPEN_SHARE = 0.8
_BARE = "bare-engine"
_BARE_TEXTS = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how long."""

    cases: frozenset[str]
    rounds: int
    seconds: float
    overload_seconds: float
    num_swaps: int
    swap_every_seconds: float
    num_soak_requests: int
    arrivals: str
    server_cores: frozenset[int] = frozenset()
    """Cores of our worker and of the bare engine; empty: all, which the load shares with them."""


class Sitting:
    """Collects figures; `say` hears of progress."""

    def __init__(self, plan: Plan, texts: Texts, bundle: Path, say: Callable[[str], None], scratch: Path) -> None:
        self.plan, self.servers = plan, list[Server]()
        self._texts, self._bundle, self._say, self._scratch = texts, bundle, say, scratch
        self._starts: dict[str, list[float]] = {}
        self._closed: dict[str, dict[str, list[LoadResult]]] = {}
        self._figures: list[Figure] = []

    def add(self, server: Server) -> None:
        """Let `server` take part. The first one is ours."""
        self.servers.append(server)

    def note_start(self, server: Server) -> None:
        """Remember how long `server` took from nothing to its first answer."""
        if server.cold_start_seconds is not None:
            self._starts.setdefault(server.name, []).append(server.cold_start_seconds)

    def check_agreement(self, texts: Sequence[str], expected: np.ndarray) -> None:
        """Every server's vectors are the teacher's, or nothing is timed. Raises ServerFailed."""
        for name, cosine in check_agreement(self.servers, texts, expected).items():
            self._put(name, "agreement", "cosine_mean", "", cosine, {"texts": len(texts)})

    def check_reference(self) -> None:
        """Our worker's vectors of its bundle's reference texts are the teacher's. Raises ServerFailed."""
        mean, count = check_reference(self._ours)
        self._put(THORFORGE, "agreement", "cosine_mean", "", mean, {"texts": count})

    def measure(self) -> list[Figure]:
        """Every case of the plan."""
        for case in (case for case in ALL_CLOSED if case in self.plan.cases):
            self._measure_closed(case)
        steps: dict[str, Callable[[], None]] = {
            "open-80": self._measure_open,
            "overhead": self._measure_overhead,
            "overhead-batches": partial(self._measure_overhead, ("batches-32",)),
            "footprint": self._measure_footprint,
            "overload-3x": self._measure_overload,
            "swap": self._measure_swap,
        }
        for case, step in steps.items():
            if case in self.plan.cases:
                self._say(case)
                step()
        if self.plan.num_soak_requests:
            self._measure_soak()
        return self._figures

    @property
    def _ours(self) -> Server:
        return self.servers[0]

    def _measure_closed(self, case: str) -> None:
        shape = ALL_CLOSED[case]
        runs: dict[str, list[LoadResult]] = {server.name: [] for server in self.servers}
        for turn in range(self.plan.rounds):
            for server in self._rotated(turn):
                self._say(f"{case} {server.name} {turn + 1}/{self.plan.rounds}")
                with self._turn(server):
                    runs[server.name].append(measure_closed(server, self._texts, shape, self.plan.seconds))
        config = {"clients": shape.clients, "texts_per_request": shape.texts_per_request, "mixed": shape.is_mixed}
        self._closed[case] = runs
        for server in self.servers:
            self._figures += summarise(server.name, case, runs[server.name], config)

    def _measure_open(self) -> None:
        """Each at 80 % of its own peak: what a latency is worth at a load that a server can just carry."""
        runs: dict[str, list[LoadResult]] = {server.name: [] for server in self.servers}
        rates: dict[str, list[float]] = {server.name: [] for server in self.servers}
        for turn in range(self.plan.rounds):
            for server in self._rotated(turn):
                with self._turn(server):
                    rates[server.name].append(_OPEN_SHARE * self._peak(server))
                    arrivals = make_arrivals(self.plan.arrivals, rates[server.name][-1], self.plan.seconds, seed=turn)
                    runs[server.name].append(measure_open(server, self._texts, arrivals))
        for server in self.servers:
            config = {"rates": [round(rate, 1) for rate in rates[server.name]], "arrivals": self.plan.arrivals}
            self._figures += summarise(server.name, "open-80", runs[server.name], config)

    def _measure_overhead(self, cases: Sequence[str] = ("closed-1", "closed-32", "closed-128")) -> None:
        """The worker beside its engine alone on the same texts and batch sizes."""
        for case in cases:
            bare, own, sizes = [], [], []
            sent = ALL_CLOSED[case].texts_per_request
            for _ in range(self.plan.rounds):
                with self._turn(self._ours):
                    runs, texts = read_batches(self._ours)
                    own.append(measure_closed(self._ours, self._texts, ALL_CLOSED[case], self.plan.seconds))
                    more_runs, more_texts = read_batches(self._ours)
                sizes.append(max(1, round((more_texts - texts) / (more_runs - runs))))
                with self._turn(None):
                    bare.append(self._run_bare(sizes[-1]))
            self._put_overhead(ALL_CLOSED[case], own, bare, sizes)
            if sent > 1:  # as a client would run its batches itself
                with self._turn(None):
                    rate, alone = sent * median_rate(own), self._run_bare(sent)["texts_per_s"]
                config, baseline = {"batch_sizes": [sent]}, (f"{_BARE}, batches of {sent}", alone)
                self._put(THORFORGE, "overhead", "texts_per_s", "1/s", rate, config, baseline=baseline)

    def _run_bare(self, batch_size: int) -> dict[str, float]:
        sample, plan = self._texts.short[:_BARE_TEXTS], self.plan
        return measure_bare_engine(self._bundle, batch_size, sample, plan.seconds, plan.server_cores)

    def _put_overhead(
        self, case: ClosedCase, own: list[LoadResult], bare: list[dict[str, float]], sizes: list[int]
    ) -> None:
        clients, texts = case.clients, case.texts_per_request
        config = {
            "clients": clients,
            "texts_per_request": texts,
            "batch_sizes": sizes,
            "bare_texts_per_s": [report["texts_per_s"] for report in bare],
        }
        rate = float(np.median([report["texts_per_s"] for report in bare]))
        suffix = "" if clients == SWAP_CLIENTS else f"_at_{clients}"
        metric = f"requests_per_s{suffix}" if texts == 1 else "texts_per_s"
        self._put(THORFORGE, "overhead", metric, "1/s", texts * median_rate(own), config, baseline=(_BARE, rate))
        if clients == 1:
            latency = float(np.median(np.concatenate([run.latencies_ms() for run in own])))
            engine = float(np.median([report["p50_ms"] for report in bare]))
            self._put(THORFORGE, "overhead", "p50_ms_at_1", "ms", latency, config, baseline=(_BARE, engine))

    def _measure_overload(self) -> None:
        with self._turn(self._ours):
            before, seconds = self._peak(self._ours), self.plan.overload_seconds
            rate = OVERLOAD_FACTOR * before
            overload = measure_overload(self._ours, self._texts, rate, seconds)
            peak = (before + self._peak(self._ours)) / 2
        during, after = overload.during, overload.after
        config = {"rate": round(rate, 1), "peak": round(peak, 1), "overload_seconds": seconds}
        refused = percentiles(during.latencies_ms(429))
        config |= {"refused": during.count(429), "without_retry_after": during.num_unguided}
        objective = ("objective", BatchingSettings().latency_objective_ms)
        for figure in summarise(THORFORGE, "overload-3x", [during], config):
            self._figures.append(replace(figure, baseline=objective) if figure.metric == "p95_ms" else figure)
        self._put(THORFORGE, "overload-3x", "goodput_share", "", during.requests_per_s / peak, config)
        for name, value in refused.items():
            self._put(THORFORGE, "overload-3x", f"refusal_{name}_ms", "ms", value, config)
        self._put(THORFORGE, "overload-3x", "failed_after", "", float(len(after.due) - after.count(200)), config)
        if after.count(200):
            quiet = self._quiet_p50()
            p50 = percentiles(after.latencies_ms())["p50"]
            self._put(THORFORGE, "overload-3x", "p50_ms_after", "ms", p50, config, baseline=quiet)

    def _measure_swap(self) -> None:
        names = make_two_versions(self._bundle, self._scratch)
        spec = thorforge_spec(self._scratch / names[0], root=self._scratch, cores=self.plan.server_cores)
        with self._turn(None), start_server(spec) as server:
            swaps = measure_swaps(server, self._texts, names, self.plan.num_swaps, self.plan.swap_every_seconds)
        config = {"clients": SWAP_CLIENTS, "swaps": swaps.num_swaps}
        quiet = percentiles(swaps.quiet.latencies_ms())
        for figure in summarise(THORFORGE, "swap", [swaps.during], config):
            name = figure.metric.removesuffix("_ms")
            self._figures.append(replace(figure, baseline=("quiet", quiet[name])) if name in quiet else figure)

    def _measure_footprint(self) -> None:
        for server in self.servers:
            resident = server.resident_mb()
            if resident is not None:
                starts = self._starts[server.name]
                config = {"starts_s": [round(seconds, 2) for seconds in starts]}
                self._put(server.name, "footprint", "cold_start_s", "s", float(np.median(starts)), config)
                self._put(server.name, "footprint", "resident_mb", "MB", resident, {})
            if server.name.startswith(f"{INFINITY}-"):
                size = installed_mb("infinity-emb[torch,server]", find_distributions(PEERS))
                self._put(server.name, "footprint", "installed_mb", "MB", size, {})
        extras = "serve,openvino" if (self._bundle / "model.xml").is_file() else "serve"
        size = installed_mb(f"thorforge[{extras}]", distributions())
        self._put(THORFORGE, "footprint", "installed_mb", "MB", size, {"extras": extras})

    def _measure_soak(self) -> None:
        self._say("soak")
        with self._turn(self._ours):
            soak = measure_soak(self._ours, self._texts, self.plan.num_soak_requests)
        config = {"requests": len(soak.load.due), "resident_mb": soak.resident_mb}
        self._figures += summarise(THORFORGE, "soak", [soak.load], config)
        first, last = soak.resident_mb[0], soak.resident_mb[-1]
        self._put(THORFORGE, "soak", "resident_mb", "MB", last, config, baseline=("start", first))

    def _peak(self, server: Server) -> float:
        """Single short texts a second right now, of 128 clients: a machine's speed minutes ago says little of it."""
        rate = measure_closed(server, self._texts, CLOSED_CASES["closed-128"], self.plan.seconds).requests_per_s
        return max(1 / self.plan.seconds, rate)

    def _quiet_p50(self) -> tuple[str, float] | None:
        if "closed-1" not in self._closed:
            return None
        return "closed-1", float(
            np.median(np.concatenate([r.latencies_ms() for r in self._closed["closed-1"][THORFORGE]]))
        )

    def _turn(self, server: Server | None) -> AbstractContextManager[None]:
        return turn_of(server, self.servers)

    def _rotated(self, turn: int) -> list[Server]:
        """Another server goes first in each round."""
        start = turn % len(self.servers)
        return self.servers[start:] + self.servers[:start]

    def _put(
        self,
        system: str,
        case: str,
        metric: str,
        unit: str,
        value: float,
        config: Mapping[str, Any],
        baseline: tuple[str, float] | None = None,
    ) -> None:
        self._figures.append(Figure(system, case, metric, unit, value, config=config, baseline=baseline))
