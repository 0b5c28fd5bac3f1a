import ast
import importlib.util
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import openvino
import pytest
from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.settings import PREFECT_TASKS_REFRESH_CACHE, temporary_settings

import tasks.artifacts
from registry.errors import StoreFull
from registry.gate import Measurement
from tasks.artifacts import CACHED, CODE_AND_LIBRARIES, Artifact, draft
from tasks.errors import ArtifactChanged, ArtifactMissing
from tasks.evaluate import Quality
from tasks.measurement.libraries import library_versions
from tasks.quantization.openvino_builds import save_ir
from tasks.state import state_dir
from tests.bundles import make_graph
from tests.disks import mounted_disk


def make(text: str, kind: str = "thing") -> Artifact:
    with draft(kind) as work:
        (work.folder / "file.txt").write_text(text)
    return work.artifact


def test_state_dir_is_the_variable_or_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("THORFORGE_HOME")
    assert state_dir() == tmp_path / ".thorforge"
    monkeypatch.setenv("THORFORGE_HOME", "elsewhere")
    assert state_dir() == tmp_path / "elsewhere"
    assert list(tmp_path.iterdir()) == []


def test_artifact_is_named_by_its_content(home: Path) -> None:
    first, again, other = make("one"), make("one"), make("two")
    assert first == again
    assert first.digest != other.digest
    assert (first.folder / "file.txt").read_text() == "one"
    assert sorted(path.name for path in (home / "artifacts").iterdir()) == sorted(
        f"thing-{artifact.digest[:16]}" for artifact in (first, other)
    )


def test_artifact_that_is_there_already_is_left_alone() -> None:
    first = make("one").folder
    before = first.stat().st_ino
    assert make("one").folder.stat().st_ino == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_draft_that_crashes_leaves_nothing(error: type[BaseException], home: Path) -> None:
    def crash() -> None:
        with draft("thing") as work:
            (work.folder / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        crash()
    assert list((home / "artifacts").iterdir()) == []


def test_draft_is_hidden_until_it_is_finished(home: Path) -> None:
    with draft("thing") as work:
        (work.folder / "file.txt").write_text("x")
        assert {path.name[0] for path in (home / "artifacts").iterdir()} == {"."}
    assert work.artifact.folder.stat().st_mode & 0o755 == 0o755


def test_artifact_that_was_deleted_is_missing() -> None:
    artifact = make("one")
    (artifact.folder / "file.txt").unlink()
    artifact.folder.rmdir()
    with pytest.raises(ArtifactMissing, match="is gone, but a cached result names it: run again with --refresh"):
        _ = artifact.folder


def test_artifact_that_was_changed_is_noticed_and_made_anew() -> None:
    artifact, other = make("one"), make("two")
    (artifact.folder / "file.txt").write_text("onf")
    with pytest.raises(ArtifactChanged, match=rf"files in {artifact.folder} were changed .* run again with --refresh"):
        artifact.verify()
    assert make("one") == artifact
    assert (artifact.verify() / "file.txt").read_text() == "one"
    assert {path.name for path in artifact.folder.parent.iterdir()} == {artifact.folder.name, other.folder.name}


def fill_by_python(path: Path) -> None:
    path.write_bytes(b"x" * (200 << 10))


def fill_by_numpy(path: Path) -> None:
    np.save(path, np.zeros(200 << 10, dtype=np.uint8))


def fill_by_onnx(path: Path) -> None:
    onnx.save(make_graph(np.zeros((2000, 32), dtype=np.float32)), path)


def fill_by_openvino(path: Path) -> None:
    graph = path.with_name("graph.onnx")
    graph.write_bytes(
        make_graph(np.random.default_rng(0).standard_normal((680, 32)).astype(np.float32)).SerializeToString()
    )
    save_ir(openvino.Core().read_model(graph), path.parent)


def fill_without_a_word(path: Path) -> None:
    with suppress(OSError):
        path.write_bytes(b"x" * (200 << 10))


@pytest.mark.parametrize("fill", [fill_by_python, fill_by_numpy, fill_by_onnx, fill_by_openvino, fill_without_a_word])
def test_draft_on_a_full_disk_says_so_and_leaves_nothing(fill: Callable[[Path], None], home: Path) -> None:
    def make_large() -> None:
        with draft("thing") as work:
            fill(work.folder / "file.bin")

    with mounted_disk(home / "artifacts", 96) as disk:
        with pytest.raises(StoreFull, match=rf"^{disk} is full: \d+ bytes free$"):
            make_large()
        assert list(disk.iterdir()) == []
        assert make("one").verify()


def cache_key(function: Callable[[int], int]) -> str:
    # The policy looks at nothing but the task, so this context is enough; a real run follows below.
    context = TaskRunContext.model_construct(task=task(function))
    return CODE_AND_LIBRARIES.compute_key(context, {}, {})


def load_helped(path: Path, helper: str) -> ModuleType:
    """A task module whose helper differs but whose task function does not."""
    return load_module(path, f"def work(x):\n    return _help(x)\n\n\ndef _help(x):\n    return {helper}\n")


def load_module(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_cache_key_changes_with_a_helper_beside_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    same = [cache_key(load_helped(tmp_path / name, "x + 1").work) for name in ("task_a.py", "task_b.py")]
    other = cache_key(load_helped(tmp_path / "task_c.py", "x + 2").work)
    assert same[0] == same[1] != other


def test_cache_key_changes_with_a_module_imported_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(tasks.artifacts, "OWN_PACKAGES", ("ours",))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "__init__.py").touch()
    (tmp_path / "ours" / "near.py").write_text("def near():\n    from ours.far import far\n    return far()\n")
    (tmp_path / "ours" / "far.py").write_text("def far():\n    return 1\n")
    module = load_module(tmp_path / "task_e.py", "from ours.near import near\n\n\ndef work(x):\n    return near()\n")
    before = cache_key(module.work)
    (tmp_path / "ours" / "far.py").write_text("def far():\n    return 2\n")
    assert cache_key(module.work) == before  # this process runs what it has loaded
    tasks.artifacts._source_of.cache_clear()  # what the next process sees
    assert cache_key(module.work) != before


def test_cache_key_changes_with_a_module_imported_by_its_name_and_with_kernels_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(tasks.artifacts, "OWN_PACKAGES", ("parts",))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("SIZE = 1\n")
    source = "from parts import (\n    SIZE,\n    far,\n)\n\n\ndef work(x):\n    return far.far() + SIZE\n"
    kernel, far = tmp_path / "parts" / "_fast.so", tmp_path / "parts" / "far.py"
    far.write_text("def far():\n    return 1\n")
    kernel.write_bytes(b"\x7fELF one")
    keys = [cache_key(load_module(tmp_path / "task_g.py", source).work)]
    for path, content in ((far, b"def far():\n    return 2\n"), (kernel, b"\x7fELF two")):
        path.write_bytes(content)
        tasks.artifacts._source_of.cache_clear()
        keys.append(cache_key(sys.modules["task_g"].work))
    assert len(set(keys)) == len(keys)


def test_cache_key_can_be_made_while_other_threads_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    work = load_helped(tmp_path / "task_f.py", "x").work
    source = "x = [1, 2, (3, [4])]\n" * 2000
    done = threading.Event()

    def parse() -> None:
        while not done.is_set():
            with suppress(SystemError):  # the very failure that keys must not meet
                ast.parse(source)

    with ThreadPoolExecutor(1) as pool:
        parsing = pool.submit(parse)
        try:
            assert len({cache_key(work) for _ in range(100)}) == 1
        finally:
            done.set()
        parsing.result()


def test_cache_key_changes_with_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    work = load_helped(tmp_path / "task_d.py", "x").work
    before = cache_key(work)
    versions = {**library_versions(), "onnxruntime": "0.0.1"}
    monkeypatch.setattr(tasks.artifacts, "library_versions", lambda: versions)
    assert cache_key(work) != before


def test_library_versions_name_what_is_installed_and_nothing_else() -> None:
    found = library_versions()
    assert {"torch", "onnxruntime", "openvino", "nncf", "numpy"} <= found.keys()
    assert all(found.values())


@task(cache_policy=CACHED, persist_result=True, result_serializer="json")
def note(text: str) -> Artifact:
    return make(text, "note")


@task(cache_policy=CACHED, persist_result=True, result_serializer="json")
def measure(count: int) -> Quality:
    measured = Measurement(math.nan, math.nan, math.inf)
    return Quality(metrics={"cosine_mean": measured}, num_texts=count, num_queries=0)


@flow
def note_flow(text: str) -> tuple[str, Artifact]:
    state: State[Artifact] = note(text, return_state=True)
    return state.name, state.result()


@flow
def measure_flow() -> tuple[str, Quality]:
    state: State[Quality] = measure(3, return_state=True)
    return state.name, state.result()


@pytest.mark.usefixtures("prefect")
def test_cached_task_is_reused_by_the_next_flow_run_and_refreshed_on_demand() -> None:
    name, first = note_flow("one")
    assert name == "Completed"
    assert note_flow("one") == ("Cached", first)
    assert note_flow("two")[0] == "Completed"
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        assert note_flow("one") == ("Completed", first)
    assert note_flow("one")[0] == "Cached"


@pytest.mark.usefixtures("prefect")
def test_cached_measurements_that_are_not_numbers_come_back_as_they_were() -> None:
    for expected in ("Completed", "Cached"):
        name, quality = measure_flow()
        measured = quality.metrics["cosine_mean"]
        assert name == expected
        assert math.isnan(measured.value)
        assert math.isinf(measured.high)
