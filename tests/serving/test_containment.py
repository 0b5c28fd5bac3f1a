import numpy as np
import pytest

from serving.containment import GuardedEngine, run_isolated
from serving.engines import Embeddings, Engine
from serving.errors import EngineFailed, EngineUnavailable
from serving.models import LoadedModel
from serving.tokenizer import Ids, pad_batch
from tests.serving.engines import FaultyEngine, WrappedEngine, die, nan_on, raise_on

CAT, DOG, RED = 12, 13, 6
PROBE = np.array([2, RED, 3])


def rows_of(*tokens: int) -> list[Ids]:
    return [np.array([2, token, 3]) for token in tokens]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_poison_text_fails_alone(model: LoadedModel, size: int) -> None:
    engine = FaultyEngine(model.engine, raise_on(CAT))
    poisoned = size // 2
    rows = rows_of(*(CAT if place == poisoned else RED for place in range(size)))
    vectors, failures = run_isolated(engine, rows, *pad_batch(rows), 8)
    assert list(failures) == [poisoned]
    assert vectors.shape == (size, 8)
    good = np.delete(np.arange(size), poisoned)
    expected = model.engine.embed(*pad_batch(rows_of(RED)))
    np.testing.assert_allclose(vectors[good], np.repeat(expected, size - 1, axis=0), rtol=1e-5)


def test_batch_of_poison_fails_each_text(model: LoadedModel) -> None:
    rows = rows_of(*[CAT] * 5)
    _, failures = run_isolated(FaultyEngine(model.engine, raise_on(CAT)), rows, *pad_batch(rows), 8)
    assert sorted(failures) == [0, 1, 2, 3, 4]


def test_non_finite_vector_fails_its_text_alone(model: LoadedModel) -> None:
    rows = rows_of(RED, CAT, DOG)
    _, failures = run_isolated(FaultyEngine(model.engine, nan_on(CAT)), rows, *pad_batch(rows), 8)
    assert list(failures) == [1]
    assert "non-finite" in str(failures[1])


class PackedEngine(FaultyEngine):
    """Overflows on one text, and spoils those near it in the same batch."""

    is_packed = True

    def __init__(self, inner: Engine) -> None:
        super().__init__(inner, spread)


def spread(input_ids: Ids, embeddings: Embeddings) -> Embeddings:
    at_fault = (input_ids == CAT).any(axis=1)
    near = [at_fault[max(place - 3, 0) : place + 4].any() for place in range(len(at_fault))]
    embeddings[near] = np.nan
    return embeddings


@pytest.mark.parametrize("places", [[0], [7], [19], [7, 9], [2, 18]])
def test_neighbours_of_a_text_that_overflows_in_a_packed_batch_are_answered(
    model: LoadedModel, places: list[int]
) -> None:
    rows = rows_of(*(CAT if place in places else RED + place % 5 for place in range(20)))
    vectors, failures = run_isolated(PackedEngine(model.engine), rows, *pad_batch(rows), 8)
    assert sorted(failures) == places
    sound = [place for place in range(20) if place not in places]
    expected = model.engine.embed(*pad_batch([rows[place] for place in sound]))
    np.testing.assert_allclose(vectors[sound], expected, rtol=1e-5)


def test_packed_engine_that_answers_nothing_is_asked_for_each_half_once(model: LoadedModel) -> None:
    engine, events, rows = PackedEngine(model.engine), list[str](), rows_of(*[CAT] * 8)
    _, failures = run_isolated(engine, rows, *pad_batch(rows), 8, events.append)
    assert sorted(failures) == list(range(8))
    assert sorted(size for size, _ in engine.shapes) == [1] * 8 + [2] * 4 + [4] * 2 + [8]
    assert events == ["divided"]


def test_engine_that_is_not_packed_is_asked_once(model: LoadedModel) -> None:
    engine, rows = FaultyEngine(model.engine, nan_on(CAT)), rows_of(RED, CAT, DOG)
    run_isolated(engine, rows, *pad_batch(rows), 8)
    assert engine.shapes == [(3, 3)]


def test_wrong_shape_fails_every_text(model: LoadedModel) -> None:
    def cut(_: Ids, embeddings: Embeddings) -> Embeddings:
        return embeddings[:, :5]

    rows = rows_of(RED, RED)
    vectors, failures = run_isolated(FaultyEngine(model.engine, cut), rows, *pad_batch(rows), 8)
    assert vectors.shape == (2, 8)
    assert all(isinstance(failures[row], EngineFailed) and "(2, 5)" in str(failures[row]) for row in (0, 1))


class Opener:
    """Opens the engines it was given, one after the other; then none."""

    def __init__(self, *engines: Engine) -> None:
        self.engines = list(engines)
        self.num_opened = 0

    def __call__(self) -> Engine:
        self.num_opened += 1
        if not self.engines:
            raise EngineUnavailable("there is no other")
        return self.engines.pop(0)


@pytest.mark.parametrize("fault", [raise_on(CAT), nan_on(CAT)])
def test_text_that_fails_is_answered_by_the_spare_engine(model: LoadedModel, fault: object) -> None:
    events: list[str] = []
    spare = WrappedEngine(model.engine)
    open_spare = Opener(spare)
    guard = GuardedEngine(
        FaultyEngine(model.engine, fault),  # type: ignore[arg-type]
        8, PROBE, open_spare=open_spare, on_event=events.append,
    )  # fmt: skip
    rows = rows_of(RED, CAT, DOG)
    for _ in range(2):
        vectors, failures = guard.run(rows, *pad_batch(rows))
        assert failures == {}
        np.testing.assert_allclose(vectors, model.engine.embed(*pad_batch(rows)), rtol=1e-5)
    assert (spare.shapes, events, open_spare.num_opened) == ([(1, 3)] * 2, ["retried"] * 2, 1)
    guard.close()
    assert spare.is_closed


def test_text_fails_when_the_spare_fails_too_or_does_not_load(model: LoadedModel) -> None:
    rows, broken = rows_of(CAT), FaultyEngine(model.engine, nan_on(CAT))
    for open_spare in (Opener(broken), Opener()):
        guard = GuardedEngine(broken, 8, PROBE, open_spare=open_spare)
        for _ in range(2):
            assert list(guard.run(rows, *pad_batch(rows))[1]) == [0]
        assert open_spare.num_opened == 1


def test_dead_engine_is_opened_anew_and_the_batch_run_again(model: LoadedModel) -> None:
    events: list[str] = []
    dead = FaultyEngine(model.engine, die)
    guard = GuardedEngine(dead, 8, PROBE, reopen=Opener(WrappedEngine(model.engine)), on_event=events.append)
    rows = rows_of(RED, DOG)
    vectors, failures = guard.run(rows, *pad_batch(rows))
    assert failures == {}
    np.testing.assert_allclose(vectors, model.engine.embed(*pad_batch(rows)), rtol=1e-5)
    assert events == ["rebuilt"]
    assert dead.is_closed
    assert not guard.is_dead


def test_engine_that_cannot_be_closed_either_is_replaced(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    """As one is whose GPU is lost: everything that is asked of it raises."""

    class Lost(FaultyEngine):
        def close(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    sound = WrappedEngine(model.engine)
    reopen = Opener(Lost(model.engine, die), sound)
    guard = GuardedEngine(Lost(model.engine, die), 8, PROBE, reopen=reopen)
    rows = rows_of(RED, DOG)
    assert sorted(guard.run(rows, *pad_batch(rows))[1]) == [0, 1]
    assert guard.is_broken
    assert guard.revive()
    assert guard.run(rows, *pad_batch(rows))[1] == {}
    guard.close()
    assert sound.is_closed
    assert caplog.text.count("engine does not close") == 2


def test_engine_that_fails_on_poison_only_is_kept(model: LoadedModel) -> None:
    reopen = Opener()
    guard = GuardedEngine(FaultyEngine(model.engine, raise_on(CAT)), 8, PROBE, reopen=reopen)
    rows = rows_of(CAT, CAT)
    assert sorted(guard.run(rows, *pad_batch(rows))[1]) == [0, 1]
    assert (reopen.num_opened, guard.is_dead) == (0, False)


def test_dead_engine_stays_dead_until_one_answers_the_probe(model: LoadedModel) -> None:
    events: list[str] = []
    also_dead, sound = FaultyEngine(model.engine, die), WrappedEngine(model.engine)
    reopen = Opener(also_dead)
    guard = GuardedEngine(FaultyEngine(model.engine, die), 8, PROBE, reopen=reopen, on_event=events.append)
    rows = rows_of(RED)
    assert list(guard.run(rows, *pad_batch(rows))[1]) == [0]
    assert guard.is_broken
    assert also_dead.is_closed
    assert not guard.revive()  # there is no other yet
    reopen.engines.append(sound)
    assert guard.revive()
    assert guard.revive()  # nothing left to do
    assert (guard.is_dead, guard.is_broken) == (False, False)
    assert events == ["rebuild_failed", "rebuild_failed", "rebuilt"]
    assert guard.run(rows, *pad_batch(rows))[1] == {}


def test_engine_that_hangs_is_left_open(model: LoadedModel) -> None:
    hanging = WrappedEngine(model.engine)
    assert not GuardedEngine(hanging, 8, PROBE).abandon()
    guard = GuardedEngine(hanging, 8, PROBE, reopen=Opener(WrappedEngine(model.engine)))
    assert guard.abandon()
    assert guard.is_dead
    assert not guard.is_broken
    assert guard.revive()
    assert not hanging.is_closed
