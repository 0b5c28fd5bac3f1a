"""Admission, queue, batcher and latency model together, in simulated time: three times the load an engine can take."""

from concurrent.futures import Future

import numpy as np
import pytest

from serving.admission import Admission
from serving.batcher import Batch, Batcher, Limits
from serving.containment import GuardedEngine
from serving.errors import Overloaded
from serving.latency_model import Run
from serving.models import LoadedModel
from serving.request_queue import Request, RequestQueue
from serving.runner import EngineRunner
from tests.serving.latency import make_latency_model

OBJECTIVE = 0.25
OVERHEAD_SECONDS, TOKEN_SECONDS = 0.0005, 0.00004


class Simulation:
    """One engine whose runs take a line plus noise; `slowdown` is what the worker's own model was not told."""

    def __init__(self, model: LoadedModel, slowdown: float) -> None:
        self.random, self.slowdown, self.now = np.random.default_rng(0), slowdown, 0.0
        self.batcher = Batcher(
            RequestQueue(65_536, 4096),
            Limits(64, 8192, max_run_seconds=OBJECTIVE / 8),
            make_latency_model(OVERHEAD_SECONDS / TOKEN_SECONDS, 1 / TOKEN_SECONDS),
        )
        guard = GuardedEngine(model.engine, 8, np.array([2]))
        self.runner = EngineRunner(guard, self.batcher, lambda _: None, clock=lambda: self.now)
        self.admission = Admission(OBJECTIVE)
        self.predicted: dict[Request, float] = {}
        self.latencies: list[float] = []
        self.refused = 0

    def arrive(self) -> None:
        """A request of one text; it is let in or refused."""
        backlog = self.runner.backlog(is_bulk=False)
        try:
            self.admission.check(backlog, self.now)
        except Overloaded:
            self.refused += 1
            return
        waiter: Future[None] = Future()
        request = Request(1, 8, self.now, waiter)
        self.predicted[request] = backlog.seconds
        self.runner.submit(request, [self.random.integers(0, 10**6, self.random.integers(8, 33))])

    def begin_run(self) -> tuple[float, Batch] | None:
        """The next batch and when it ends."""
        batch = self.batcher.take(self.now)
        if batch is None:
            return None
        self.runner._lanes[0].begin(batch, self.now)
        seconds = (OVERHEAD_SECONDS + TOKEN_SECONDS * batch.padded_tokens) * self.slowdown
        return self.now + seconds * self.random.uniform(0.9, 1.3), batch

    def end_run(self, batch: Batch, started: float) -> None:
        """Answer a batch and learn from it."""
        self.runner._lanes[0].end()
        self.batcher.model.observe(Run(batch.padded_tokens, self.now - started))
        self.runner.forget(batch.items)
        for item in batch.items:
            ((request, _),) = item.places
            latency = self.now - request.arrival
            self.latencies.append(latency)
            self.admission.observe(self.predicted.pop(request), latency)

    def run(self, rate: float, seconds: float) -> None:
        """Poisson arrivals at `rate` for so long."""
        end, arrival = self.now + seconds, self.now + self.random.exponential(1 / rate)
        running, started = None, self.now
        while self.now < end:
            if running is not None and running[0] <= arrival:
                self.now = running[0]
                self.end_run(running[1], started)
                running = None
            else:
                self.now = arrival
                self.arrive()
                arrival += self.random.exponential(1 / rate)
            if running is None:
                started = self.now
                running = self.begin_run()
        if running is not None:
            self.now = max(self.now, running[0])
            self.end_run(running[1], started)


@pytest.mark.parametrize("slowdown", [1.0, 3.0])
def test_overload_keeps_goodput_and_the_objective_even_where_the_engine_is_slower_than_it_seemed(
    model: LoadedModel, slowdown: float
) -> None:
    peak = 1 / (20 * TOKEN_SECONDS * slowdown * 1.1)  # texts of 20 tokens on average, without overhead or padding
    simulation = Simulation(model, slowdown)
    simulation.run(3 * peak, 4.0)  # time to learn
    simulation.latencies.clear()
    simulation.run(3 * peak, 12.0)
    assert len(simulation.latencies) / 12.0 >= 0.85 * peak
    assert np.quantile(simulation.latencies, 0.95) <= OBJECTIVE
    assert np.quantile(simulation.latencies, 0.5) >= OBJECTIVE / 4  # and it does not refuse without need
    assert simulation.refused > 0


def test_load_below_capacity_is_never_refused(model: LoadedModel) -> None:
    simulation = Simulation(model, slowdown=1.0)
    simulation.run(0.7 / (20 * TOKEN_SECONDS * 1.1), 5.0)
    assert simulation.refused == 0
    assert np.quantile(simulation.latencies, 0.95) <= OBJECTIVE
