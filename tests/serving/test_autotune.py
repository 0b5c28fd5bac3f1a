import importlib
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from registry.manifest import EngineEntry, read_manifest
from serving.autotune import (
    Choice,
    Measured,
    Setup,
    choose,
    list_setups,
    measure,
    node_key,
    read_choice,
    record_path,
    write_choice,
)
from serving.engines import Embeddings
from serving.models import LoadedModel
from serving.tokenizer import Ids
from tests.serving.engines import WrappedEngine

ORT, OV = "onnxruntime", "openvino"


def entries(bundle: Path, *runtimes: str) -> list[EngineEntry]:
    entry = read_manifest(bundle).engines[0]
    return [entry.model_copy(update={"runtime": runtime}) for runtime in runtimes]


@pytest.mark.parametrize(
    ("threads", "instances", "cores", "expected"),
    [
        (0, 0, 1, [(1, 1)]),
        (0, 0, 2, [(1, 1), (2, 1), (1, 2)]),
        (0, 0, 3, [(2, 1), (1, 2)]),
        (0, 0, 8, [(7, 1), (4, 2), (2, 4)]),
        (3, 0, 8, [(3, 1)]),
        (0, 2, 8, [(4, 2)]),
        (3, 2, 8, [(3, 2)]),
        (0, 4, 2, [(1, 4)]),
    ],
)
def test_setups_share_the_cores_and_leave_one_to_the_event_loop_unless_told(
    bundle: Path, threads: int, instances: int, cores: int, expected: list[tuple[int, int]]
) -> None:
    setups = list_setups(entries(bundle, ORT, OV), threads, instances, cores)
    assert [(setup.num_threads, setup.num_instances) for setup in setups if setup.runtime == ORT] == expected
    assert len(setups) == 2 * len(expected)


def measured(runtime: str, threads: int, instances: int, single: float, batched: float) -> Measured:
    return Measured(Setup(runtime, threads, instances), single, batched, compiles_shapes=runtime == OV)


def test_latency_and_throughput_count_alike() -> None:
    quick, steady = measured(OV, 2, 1, 1.0, 4.0), measured(OV, 1, 2, 1.5, 2.0)
    assert choose([quick, steady]) == Choice(steady.setup, steady.setup)
    slower = measured(OV, 1, 2, 2.1, 2.0)
    assert choose([quick, slower]) == Choice(quick.setup, quick.setup)


def test_runs_that_leave_cores_idle_have_to_be_clearly_faster() -> None:
    both = measured(ORT, 1, 2, 2.0, 1.0)
    for batched, is_taken in ((0.95, False), (0.85, True)):
        one = measured(ORT, 1, 1, 2.0, batched)
        chosen = one if is_taken else both
        assert choose([one, both]) == Choice(chosen.setup, chosen.setup)


@pytest.mark.parametrize("runtime", [ORT, OV])
def test_lone_small_batches_get_an_engine_of_their_own_only_where_it_is_clearly_faster(runtime: str) -> None:
    large = measured(runtime, 1, 2, 1.0, 1.0)
    compiles = measured(OV, 2, 1, 0.5, 3.0)  # would have to meet every shape again
    for single, is_taken in ((0.9, True), (0.95, False)):
        small = measured(ORT, 2, 1, single, 1.5)
        choice = choose([large, small, compiles])
        assert choice == Choice(large.setup, small.setup if is_taken else large.setup)


def test_batches_are_measured_beside_a_thread_that_works_as_the_event_loop_does(model: LoadedModel) -> None:
    beside: dict[bool, set[int]] = {True: set(), False: set()}

    class Watching(WrappedEngine):
        def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
            beside[len(input_ids) > 1].add(threading.active_count())
            return super().embed(input_ids, attention_mask)

    before = threading.active_count()
    measure(Watching(model.engine), Setup(ORT, 1, 1), [np.full(5, 6)] * 8)
    assert max(beside[True]) == max(beside[False]) + 1
    assert threading.active_count() == before


def test_measure_runs_singles_and_batches_of_similar_length(model: LoadedModel) -> None:
    engine = WrappedEngine(model.engine)
    rows = [np.full(length, 6) for length in (3, 9) for _ in range(16)]
    result = measure(engine, Setup(ORT, 1, 1), rows)
    assert set(engine.shapes) == {(1, 9), (8, 3), (8, 9)}
    assert 0 < result.batched_seconds < 1
    assert 0 < result.single_seconds < 1


def test_choice_is_remembered_for_the_same_node_only(tmp_path: Path) -> None:
    path, choice = tmp_path / "record.json", Choice(Setup(OV, 1, 2), Setup(ORT, 1, 2))
    write_choice(path, "this node", choice, [measured(OV, 1, 2, 1.0, 1.0)])
    assert read_choice(path, "this node") == choice
    assert read_choice(path, "another") is None
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"key": "k"}', '{"key": "k", "large": {"x": 1}, "small": 1}'])
def test_damaged_record_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "record.json").write_text(content)
    assert read_choice(tmp_path / "record.json", "k") is None


def test_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        write_choice(tmp_path / "missing" / "record.json", "k", Choice(Setup(ORT, 1, 1), Setup(ORT, 1, 1)), [])
    assert "not remembered" in caplog.text


def test_record_lies_beside_the_bundle(tmp_path: Path) -> None:
    assert record_path(tmp_path / "a" / ".." / "bundle.v1") == tmp_path / "bundle.v1.engine.json"


def test_node_key_names_what_the_choice_depends_on() -> None:
    setups = [Setup(ORT, 2, 1)]
    key = node_key("digest", setups)
    assert {"digest", "onnxruntime:1x2"} <= set(key.split())
    assert len({key, node_key("other", setups), node_key("digest", [Setup(ORT, 1, 2)])}) == 3
    assert {name for name, _, value in (part.partition("=") for part in key.split()) if value} >= {
        "thorforge", "onnxruntime", "openvino", "kernels", "cores",
    }  # fmt: skip
    assert json.dumps(key)


def test_node_key_changes_with_our_own_version_and_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("serving.autotune.KERNELS", "kernels_of_a_test")
    setups, keys = [Setup("avx512", 2, 1)], []
    keys.append(node_key("digest", setups))
    for content in ("old = 1\n", "new = 1\n"):
        (tmp_path / "kernels_of_a_test.py").write_text(content)
        importlib.invalidate_caches()
        keys.append(node_key("digest", setups))
    monkeypatch.setattr("serving.autotune.version", lambda name: "9.9" if name == "thorforge" else "1.0")
    keys.append(node_key("digest", setups))
    assert "kernels=none" in keys[0]
    assert "thorforge=9.9" in keys[3]
    assert len(set(keys)) == 4
