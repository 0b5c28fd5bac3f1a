import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks.benchmark
from serving.engines import Embeddings
from serving.tokenizer import Ids, TextTokenizer, pad_batch
from tasks.benchmark import (
    BATCH_SIZE,
    CHAMPION,
    NUM_BATCHES,
    TORCH,
    Batch,
    Speed,
    SpeedReport,
    _open_for_turn,
    _peak_memory_mb,
    _rotate,
    _time_calls,
    _tokenize,
    benchmark,
    sample_calls,
)
from tasks.errors import QuantizationFailed
from tasks.measurement.footprint import count_rows, measure_footprint
from tasks.publish import Origin, assemble_bundle
from tests.forge import Forge


def speed(latencies: tuple[float, ...], throughputs: tuple[float, ...]) -> Speed:
    """A system with one round of equal batches of 32 for each throughput."""
    seconds = tuple(32 / throughput for throughput in throughputs for _ in range(NUM_BATCHES))
    return Speed(latencies_ms=latencies, batch_seconds=seconds, peak_memory_mb=None)


def report(**speeds: Speed) -> SpeedReport:
    return SpeedReport(hardware="here", mean_tokens=10.0, speeds=speeds)


ROUNDS = (100.0, 101.0, 99.0, 100.5, 99.5, 100.0, 100.2, 99.8)
CHAMPION_RATIOS = {"latency_ratio_vs_champion", "p95_ratio_vs_champion", "throughput_ratio_vs_champion"}
STEADY = speed(tuple(1.0 + 0.1 * (i % 7) for i in range(200)), ROUNDS)


@given(st.lists(st.text(), min_size=1, max_size=8, unique=True))
def test_rotation_lets_every_system_go_first_and_loses_none(names: list[str]) -> None:
    turns = [_rotate(names, turn) for turn in range(len(names))]
    assert [turn[0] for turn in turns] == names
    assert all(sorted(turn) == sorted(names) for turn in turns)


def test_champion_ratios_of_a_system_against_itself_are_one() -> None:
    ratios = report(own=STEADY, champion=STEADY).champion_ratios("own")
    assert ratios.keys() == CHAMPION_RATIOS
    for ratio in ratios.values():
        assert ratio.low <= ratio.value == 1 <= ratio.high


def test_champion_ratios_find_a_known_difference() -> None:
    slower = speed(tuple(1.2 * t for t in STEADY.latencies_ms), tuple(t / 1.2 for t in ROUNDS))
    ratios = report(own=slower, champion=STEADY).champion_ratios("own")
    assert ratios["latency_ratio_vs_champion"].value == pytest.approx(1.2)
    assert ratios["latency_ratio_vs_champion"].low > 1.05
    assert ratios["throughput_ratio_vs_champion"].value == pytest.approx(1 / 1.2)
    assert ratios["throughput_ratio_vs_champion"].high < 0.95


def test_champion_ratios_without_a_champion_are_none() -> None:
    assert report(own=STEADY).champion_ratios("own") == {}


def test_speed_percentiles_and_speedup() -> None:
    measured = speed(tuple(float(i) for i in range(1, 101)), (10.0, 30.0, 20.0))
    assert measured.latency_ms(50) == pytest.approx(50.5)
    assert measured.latency_ms(99) == pytest.approx(99.01)
    assert measured.throughput_per_s == pytest.approx(20)
    assert SpeedReport(hardware="x", mean_tokens=1, speeds={TORCH: STEADY, "own": measured}).speedup_vs_torch(
        "own"
    ) == pytest.approx(0.2)


def test_turn_pads_as_the_worker_does_and_meets_every_shape_before_it_is_timed(
    forge: Forge, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []

    class Compiling:
        runtime, compiles_shapes = "test", True

        def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
            assert input_ids.shape == attention_mask.shape
            lengths.append(input_ids.shape[1])
            return np.zeros((len(input_ids), 1), dtype=np.float32)

        def close(self) -> None:
            lengths.append(0)

    monkeypatch.setattr(tasks.benchmark, "open_engine", lambda folder, entry: Compiling())
    batches: list[Batch] = [pad_batch([np.ones(length, dtype=np.int64)]) for length in (3, 13, 30, 128)]
    candidate = forge.study.find("fp32-onnx").candidate
    with _open_for_turn(candidate.artifact.folder, candidate.engine, 128, batches) as run:
        assert lengths == [4, 16, 32, 128]
        seconds = _time_calls(run, batches)
    assert lengths == [4, 16, 32, 128, 4, 16, 32, 128, 0]
    assert len(seconds) == len(batches)


def test_sample_draws_from_every_set_and_batches_by_length(forge: Forge) -> None:
    teacher = forge.study.teacher
    singles, groups, mean_tokens = sample_calls(teacher, forge.study.corpus)
    assert {len(group) for group in groups} == {BATCH_SIZE}
    tokenizer = TextTokenizer.from_folder(forge.exported.folder, teacher.max_seq_length)
    longest = [max(map(len, tokenizer.encode(group))) for group in groups]
    assert longest == sorted(longest)
    assert min(longest) < mean_tokens < max(longest)
    assert len({text for (text,) in singles}) > 100
    assert sample_calls(teacher, forge.study.corpus) == (singles, groups, mean_tokens)


def test_benchmark_gives_each_system_the_ids_of_its_own_tokenizer(forge: Forge, tmp_path: Path) -> None:
    """A step may have trimmed the vocabulary: ids of another tokenizer would be other words, or none."""
    rules = json.loads((forge.exported.folder / "tokenizer.json").read_text())
    rules["model"]["vocab"] = {word: 1000 + place for word, place in rules["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(rules))
    own, moved = (_tokenize(folder, 48, [["the baker"]])[0][0] for folder in (forge.exported.folder, tmp_path))
    assert moved[0, 1:-1].tolist() == (own[0, 1:-1] + 1000).tolist()


def test_benchmark_measured_every_system_in_every_round(forge: Forge) -> None:
    speeds = forge.study.speeds
    names = {row.name for row in forge.study.judged}
    assert speeds.speeds.keys() == {TORCH, *names}
    for name, measured in speeds.speeds.items():
        assert len(measured.latencies_ms) == 150
        assert len(measured.batch_seconds) == 2 * NUM_BATCHES
        numbers = (*measured.latencies_ms, *measured.batch_seconds)
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        if name == TORCH:
            assert measured.peak_memory_mb is None
        else:
            assert measured.peak_memory_mb is not None
            assert 20 < measured.peak_memory_mb < 4000


def test_benchmark_times_the_champion_bundle_beside_the_candidates(forge: Forge) -> None:
    study, origin = forge.study, Origin(mlflow_run_id=None, git_commit=None)
    champion = assemble_bundle.fn(study, "fp32-onnx", forge.teacher_embeddings, origin).folder
    candidate = study.find("fp32-onnx").candidate
    speeds = benchmark.fn([candidate], study.teacher, study.corpus, "here", champion)
    assert speeds.speeds.keys() == {TORCH, "fp32-onnx", CHAMPION}
    assert speeds.champion_ratios("fp32-onnx").keys() == CHAMPION_RATIOS | {"memory_ratio_vs_champion"}


def test_footprint_counts_the_engine_itself(forge: Forge) -> None:
    candidate = forge.study.find("fp32-onnx").candidate
    found = measure_footprint(candidate.artifact.folder, candidate.engine, candidate.max_seq_length)
    assert found["peak_memory_mb"] > candidate.disk_bytes / 1e6
    assert found["load_seconds"] > 0


@pytest.mark.parametrize(("max_length", "rows"), [(128, 32), (256, 32), (512, 16), (8192, 1), (32_768, 1)])
def test_footprint_is_that_of_the_largest_batch_a_worker_makes(max_length: int, rows: int) -> None:
    assert count_rows(max_length) == rows


def test_footprint_of_an_engine_that_fails_says_what_it_said(forge: Forge) -> None:
    candidate = forge.study.find("fp32-onnx").candidate
    missing = candidate.engine.model_copy(update={"file": "none.onnx"})
    with pytest.raises(QuantizationFailed, match=r"onnxruntime engine in .* 48 tokens a text .* said: .*none"):
        _peak_memory_mb(candidate.artifact.folder, missing, 48)
