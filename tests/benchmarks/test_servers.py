"""Texts, installed sizes, and servers that are started, held still, attached to and ended."""

import json
import os
import sys
from importlib.metadata import PathDistribution, distributions
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.cases import (
    CLOSED_CASES,
    ClosedCase,
    check_agreement,
    check_reference,
    make_two_versions,
    measure_bare_engine,
    measure_closed,
    measure_overload,
    measure_soak,
    read_batches,
    render_requests,
)
from benchmarks.footprint import installed_mb
from benchmarks.servers import Server, ServerFailed, ServerSpec, attach_server, start_server, thorforge_spec, turn_of
from benchmarks.texts import Texts, load_texts
from registry.manifest import read_manifest, verify_bundle
from tasks.errors import CorpusRejected
from tests.bundles import GOLDEN_TEXTS, make_bundle
from tests.servers import free_port
from tests.texts import make_sentences

TEXTS = Texts(short=list(GOLDEN_TEXTS), mixed=list(GOLDEN_TEXTS))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    make_bundle(folder)
    return folder


def test_texts_come_in_the_same_order_whatever_the_files_order(tmp_path: Path) -> None:
    sentences = [*make_sentences(60), "two words", "one two three four five six seven"]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(sentences), encoding="utf-8")
    texts = load_texts(str(path))
    path.write_text("\n".join(reversed(sentences)), encoding="utf-8")
    assert load_texts(str(path)) == texts
    assert sorted(texts.mixed) == sorted(sentences)
    assert texts.short
    assert all(7 <= len(text.split()) <= 15 for text in texts.short)
    path.write_text("two words", encoding="utf-8")
    with pytest.raises(CorpusRejected, match="7 to 15 words"):
        load_texts(str(path))


def test_requests_of_a_case_hold_its_texts() -> None:
    server = Server("x", "http://127.0.0.1:1", "m")
    texts = Texts(short=[f"s{index}" for index in range(70)], mixed=["m0"])
    singles = render_requests(server, texts, ClosedCase(1))
    assert len(singles) == 70
    assert json.loads(singles[3].partition(b"\r\n\r\n")[2]) == {"model": "m", "input": "s3", "encoding_format": "float"}
    batches = render_requests(server, texts, CLOSED_CASES["batch-32"])
    assert [json.loads(batch.partition(b"\r\n\r\n")[2])["input"][0] for batch in batches] == ["s0", "s32"]
    assert b"m0" in render_requests(server, texts, CLOSED_CASES["mixed-32"])[0]


def write_distribution(site: Path, name: str, size: int, *requires: str) -> PathDistribution:
    folder = site / f"{name}-1.dist-info"
    folder.mkdir(parents=True)
    (site / f"{name}.py").write_bytes(b"x" * size)
    lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {line}" for line in requires)]
    (folder / "METADATA").write_text("\n".join(lines), encoding="utf-8")
    (folder / "RECORD").write_text(f"{name}.py,,{size}\n", encoding="utf-8")
    return PathDistribution(folder)


def test_installed_size_is_that_of_everything_needed(tmp_path: Path) -> None:
    found = [
        write_distribution(tmp_path, "app", 1000, "Base_Lib", 'fast; extra == "speed"', 'gone; python_version < "3"'),
        write_distribution(tmp_path, "base-lib", 20_000, "app"),
        write_distribution(tmp_path, "fast", 300_000),
        write_distribution(tmp_path, "other", 5),
    ]
    assert installed_mb("app", found) == pytest.approx(0.021)
    assert installed_mb("app[speed]", found) == pytest.approx(0.321)
    with pytest.raises(KeyError):
        installed_mb("missing", found)
    assert installed_mb("thorforge[serve]", distributions()) > 10


def test_two_versions_of_a_bundle_differ_in_their_version_alone(bundle: Path, tmp_path: Path) -> None:
    names = make_two_versions(bundle, tmp_path)
    first, second = (verify_bundle(tmp_path / name) for name in names)
    assert first.version != second.version
    assert first.files == second.files == read_manifest(bundle).files


def test_server_that_ends_at_once_is_reported_with_what_it_said() -> None:
    spec = ServerSpec("broken", "m", (sys.executable, "-c", "raise SystemExit('no model here')"))
    with pytest.raises(ServerFailed, match="no model here"), start_server(spec):
        pass


def test_server_that_does_not_run_cannot_be_attached() -> None:
    with pytest.raises(ServerFailed, match="does not name a model"):
        attach_server("x", f"http://127.0.0.1:{free_port()}")


def test_worker_is_measured_held_still_and_ended(bundle: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with start_server(thorforge_spec(bundle, cores=frozenset({core}))) as server:
        assert server.process is not None
        assert server.cold_start_seconds is not None
        assert (server.resident_mb() or 0) > 10
        assert attach_server("again", server.base_url).model == server.model == "tiny"
        process = psutil.Process(server.process.pid)
        assert process.cpu_affinity() == [core]
        with turn_of(None, [server]):
            assert process.status() == psutil.STATUS_STOPPED
        assert process.status() != psutil.STATUS_STOPPED

        vectors = server.embed(list(GOLDEN_TEXTS))
        assert check_agreement([server], GOLDEN_TEXTS, vectors) == {"thorforge": pytest.approx(1.0)}
        with pytest.raises(ServerFailed, match="its speed means nothing"):
            check_agreement([server], GOLDEN_TEXTS, np.roll(vectors, 1, axis=0))

        mean, count = check_reference(server)
        assert mean == pytest.approx(1.0, abs=1e-4)
        assert count == len(GOLDEN_TEXTS)
        runs, texts = read_batches(server)
        result = measure_closed(server, TEXTS, CLOSED_CASES["closed-8"], seconds=0.2)
        assert result.num_failed == 0
        assert read_batches(server)[1] - texts >= result.count(200)
        assert read_batches(server)[0] > runs
        overload = measure_overload(server, TEXTS, rate=200, seconds=0.2)
        assert overload.during.num_failed == 0
        assert list(overload.after.statuses) == [200] * 40
        soak = measure_soak(server, TEXTS, 100)
        assert soak.load.count(200) == 100
        assert len(soak.resident_mb) == 10
    assert server.process.poll() is not None
    report = measure_bare_engine(bundle, 8, list(GOLDEN_TEXTS), 0.1, frozenset({core}))
    assert report["texts_per_s"] > 0
    assert 0 < report["p50_ms"] <= report["p99_ms"]
