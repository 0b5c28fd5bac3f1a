import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from registry.manifest import EngineEntry, digest_of, read_manifest
from serving.autotune import Choice, Setup, record_path
from serving.engines import Engine, num_cores, open_engine
from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.engines.packing import Limits
from serving.engines.replicas import ReplicatedEngine
from serving.errors import BundleRejected, EngineUnavailable
from serving.models import LoadedModel, load_model
from serving.opening import Opened, Opener, SwitchedEngine
from serving.settings import CustomKernelsSettings, ModelSource
from tests.serving.conftest import MAX_LENGTH
from tests.serving.engines import FaultyEngine, HeldEngine, WrappedEngine, die
from tests.serving.test_models import engine_entries, rewrite

KERNELS_ALWAYS, KERNELS_NEVER = (CustomKernelsSettings(use=use) for use in ("always", "never"))  # type: ignore[arg-type]
ROWS = [np.full(length, 6) for length in (3, 4, 5)]


def nothing(*_: object) -> None:
    pass


def copy_with(bundle: Path, tmp_path: Path, *runtimes: str) -> Path:
    folder = shutil.copytree(bundle, tmp_path / "copy")
    rewrite(folder, engines=engine_entries(folder, *runtimes))
    return folder


def open_best(folder: Path, **options: object) -> tuple[Opener, Setup]:
    opener = Opener(ModelSource(path=folder, **options), read_manifest(folder), nothing)  # type: ignore[arg-type]
    opened = opener.open_best(digest_of(folder), ROWS)
    opened.engine.close()
    return opener, opened.choice.large


def test_measured_choice_is_remembered_and_taken_again(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "openvino")
    with caplog.at_level(logging.INFO):
        _, first = open_best(folder)
        _, second = open_best(folder)
    assert first == second
    assert [record.message.split(" ")[1] for record in caplog.records] == ["chosen"]
    document = json.loads(record_path(folder).read_text())
    worst = next(entry["setup"] for entry in document["measured"] if Setup(**entry["setup"]) != first)
    record_path(folder).write_text(json.dumps(document | {"large": worst, "small": worst}))
    assert open_best(folder)[1] == Setup(**worst)
    unasked = worst | {"num_threads": 77}
    record_path(folder).write_text(json.dumps(document | {"large": unasked, "small": unasked}))
    assert open_best(folder)[1].num_threads != 77


def test_remembered_engine_that_does_not_load_is_measured_anew(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "tensorrt")
    open_best(folder)
    document = json.loads(record_path(folder).read_text())
    setup = document["large"] | {"runtime": "tensorrt"}
    record_path(folder).write_text(json.dumps(document | {"large": setup, "small": setup}))
    assert open_best(folder)[1].runtime == "onnxruntime"


def test_kernels_of_our_own_are_taken_unmeasured_against_the_rest(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "avx512")
    opened: list[str] = []

    def open_any(path: Path, entry: EngineEntry, *options: object, **named: object) -> Engine:
        opened.append(entry.runtime)
        graph = path / read_manifest(path).engines[0].file
        return OnnxRuntimeEngine(graph, 1)

    monkeypatch.setattr("serving.opening.open_engine", open_any)
    opener, setup = open_best(folder)
    assert setup.runtime == "avx512"
    assert set(opened) == {"avx512"}
    spare = opener.open_best(digest_of(folder), ROWS).open_spare
    assert spare is not None
    spare().close()
    assert opened[-1] == "onnxruntime"


def test_without_our_own_kernels_the_portable_engine_serves(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "avx512", "onnxruntime")  # its file is a graph: no such kernels read it
    fallen: list[str] = []
    opener = Opener(ModelSource(path=folder), read_manifest(folder), lambda _, name: fallen.append(name))
    opened = opener.open_best(digest_of(folder), ROWS)
    opened.engine.close()
    assert opened.choice.large.runtime == "onnxruntime"
    assert fallen == ["avx512"]
    with pytest.raises(EngineUnavailable, match=r"cannot be read|no AVX-512|not compiled"):
        open_best(folder, engine="avx512")


class OfOurOwn(WrappedEngine):
    """It says what its model takes."""

    def __init__(self, inner: Engine, positions: int) -> None:
        super().__init__(inner)
        self.limits = Limits(vocabulary=100, positions=positions)


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_manifest_that_promises_longer_texts_than_the_model_takes_is_refused_with_both_lengths(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gpus: int
) -> None:
    folder = copy_with(bundle, tmp_path, "avx512")
    opened: list[OfOurOwn] = []

    def open_short(path: Path, *_: object, **__: object) -> Engine:
        graph = path / read_manifest(path).engines[0].file
        opened.extend(OfOurOwn(OnnxRuntimeEngine(graph, 1), MAX_LENGTH) for _ in range(num_gpus))
        return opened[-1] if num_gpus == 1 else ReplicatedEngine(opened[-num_gpus:])

    monkeypatch.setattr("serving.opening.open_engine", open_short)
    open_best(folder)
    opened.clear()
    rewrite(folder, engines=engine_entries(folder, "avx512"), max_seq_length=MAX_LENGTH + 1)
    message = (
        rf"copy: max_seq_length of the manifest is {MAX_LENGTH + 1}, the model of its avx512 engine has {MAX_LENGTH}"
    )
    with pytest.raises(BundleRejected, match=message):
        load_model(ModelSource(path=folder))
    assert [engine.is_closed for engine in opened] == [True] * num_gpus


def test_settings_override_the_measurement(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "openvino")
    assert open_best(folder, engine="openvino", num_threads=1, num_instances=2)[1] == Setup("openvino", 1, 2)
    assert not record_path(folder).exists()


def test_engine_opens_anew_and_the_other_one_is_the_spare(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "openvino")
    setup = Setup("openvino", 1, 1)  # measured, it may be a pair of both, which leaves no spare
    model = load_model(ModelSource(path=folder, num_threads=1), layout=Choice(setup, setup))
    assert model.reopen is not None
    assert model.open_spare is not None
    again, spare = model.reopen(), model.open_spare()
    assert again.runtime == model.engine.runtime
    assert (again.runtime.split()[0], spare.runtime.split()[0]) == ("openvino", "onnxruntime")
    for engine in (model.engine, again, spare):
        engine.close()


def test_bundle_of_one_engine_has_no_spare(model: LoadedModel) -> None:
    assert model.open_spare is None


def test_switched_engine_runs_a_lone_small_batch_on_the_one_and_all_others_on_the_other(model: LoadedModel) -> None:
    small, large = HeldEngine(model.engine, is_free=lambda ids: ids.size != 8), WrappedEngine(model.engine)
    engine = SwitchedEngine(small, large)

    def run(*shape: int) -> None:
        engine.embed(np.full(shape, 6), np.ones(shape, dtype=np.int64))

    for shape in ((4, 16), (5, 13)):
        run(*shape)
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(run, 1, 8)
        assert small.entered.wait(20)
        run(1, 7)  # while another runs
        small.gate.set()
        held.result()
    run(1, 6)
    assert (small.shapes, large.shapes) == ([(4, 16), (1, 8), (1, 6)], [(5, 13), (1, 7)])
    assert engine.runtime == model.engine.runtime
    engine.close()
    assert (small.is_closed, large.is_closed) == (True, True)


def test_choice_of_two_runtimes_opens_both(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "openvino")
    opener = Opener(ModelSource(path=folder), read_manifest(folder), nothing)
    engine = opener.open_choice(Choice(Setup("openvino", 1, 2), Setup("onnxruntime", 1, 2)))
    assert [name.split()[0] for name in engine.runtime.split(" + ")] == ["onnxruntime", "openvino"]
    engine.close()


def test_engine_that_was_measured_is_the_one_that_serves(bundle: Path, model: LoadedModel) -> None:
    opener = Opener(ModelSource(path=bundle), read_manifest(bundle), nothing)
    large, small, other = (Setup("onnxruntime", threads, 1) for threads in (1, 2, 3))
    fits, does_not = WrappedEngine(model.engine), WrappedEngine(model.engine)
    assert opener.open_choice(Choice(large, large), {large: fits}) is fits
    pair = opener.open_choice(Choice(large, small), {small: fits, other: does_not})
    assert (fits.is_closed, does_not.is_closed) == (False, True)
    pair.embed(np.full((1, 4), 6), np.ones((1, 4), dtype=np.int64))
    assert fits.shapes == [(1, 4)]
    pair.close()
    assert fits.is_closed


def test_every_engine_that_does_not_load_is_named(bundle: Path, tmp_path: Path) -> None:
    folder = copy_with(bundle, tmp_path, "tensorrt", "cuda")
    with pytest.raises(EngineUnavailable, match=r"no engine of the bundle loads: .*the cuda engine.*tensorrt"):
        open_best(folder)


def test_engine_that_fails_on_every_reference_text_is_rejected(bundle: Path) -> None:
    opener = Opener(ModelSource(path=bundle), read_manifest(bundle), nothing)
    with pytest.raises(BundleRejected, match="fails on the reference texts"):
        opener.open_best("digest", [np.full(3, -100)])


class OnGpu(Opener):
    """As on a node with a GPU on which `working` load; they are the bundle's graph on the CPU."""

    working: tuple[str, ...] = ("cuda", "tensorrt")

    def _open(self, setup: Setup, cache: Path | None = None) -> Engine:
        if setup.runtime in self.working:
            return open_engine(self._source.path, self._entries["onnxruntime"])
        return super()._open(setup, cache)


def open_on_gpu(folder: Path, working: tuple[str, ...], heard: list[str]) -> Opened:
    opener = OnGpu(ModelSource(path=folder), read_manifest(folder), lambda _, runtime: heard.append(runtime))
    opener.working = working
    opened = opener.open_best(digest_of(folder), ROWS)
    opened.engine.close()
    return opened


@pytest.mark.parametrize(
    ("working", "taken", "fallen"),
    [
        (("cuda", "tensorrt"), "cuda", []),
        (("tensorrt",), "tensorrt", ["cuda"]),
        ((), "onnxruntime", ["cuda", "tensorrt"]),
    ],
)
def test_chain_takes_the_first_gpu_engine_that_loads(
    bundle: Path, tmp_path: Path, working: tuple[str, ...], taken: str, fallen: list[str]
) -> None:
    folder, heard = copy_with(bundle, tmp_path, "onnxruntime", "tensorrt", "cuda"), []  # type: ignore[var-annotated]
    assert open_on_gpu(folder, working, heard).choice.large.runtime == taken
    assert heard == fallen
    assert record_path(folder).exists() == (taken == "onnxruntime")


def test_engine_whose_library_raises_as_it_likes_leaves_its_place_to_the_next(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Engine:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("serving.engines.cuda.CudaEngine", fail)
    folder = copy_with(bundle, tmp_path, "onnxruntime", "cuda")
    assert open_best(folder)[1].runtime == "onnxruntime"
    assert "engine=cuda reason=cuda does not load: RuntimeError: CUDA error: out of memory" in caplog.text


def test_gpu_engine_that_fails_and_cannot_be_closed_leaves_its_place_to_the_next(
    bundle: Path, tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(FaultyEngine):
        def close(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr("serving.engines.cuda.CudaEngine", lambda *_: Lost(model.engine, die))
    folder = copy_with(bundle, tmp_path, "onnxruntime", "cuda")
    assert open_best(folder)[1].runtime == "onnxruntime"


def test_custom_kernels_that_must_be_used_load_or_raise(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="no cuda engine, it has onnxruntime"):
        Opener(ModelSource(path=bundle), read_manifest(bundle), nothing, KERNELS_ALWAYS)
    folder = copy_with(bundle, tmp_path, "onnxruntime", "cuda")
    opener = Opener(ModelSource(path=folder), read_manifest(folder), nothing, KERNELS_ALWAYS)
    with pytest.raises(EngineUnavailable, match="the cuda engine has no f32"):
        opener.open_best(digest_of(folder), ROWS)


def test_custom_kernels_that_must_not_be_used_are_not_tried(bundle: Path, tmp_path: Path) -> None:
    folder, heard = copy_with(bundle, tmp_path, "onnxruntime", "cuda"), []  # type: ignore[var-annotated]
    opener = Opener(
        ModelSource(path=folder), read_manifest(folder), lambda _, runtime: heard.append(runtime), KERNELS_NEVER
    )
    opened = opener.open_best(digest_of(folder), ROWS)
    opened.engine.close()
    assert (opened.choice.large.runtime, opened.open_spare, heard) == ("onnxruntime", None, [])


@pytest.mark.parametrize(("engine", "kernels"), [("onnxruntime", KERNELS_ALWAYS), ("cuda", KERNELS_NEVER)])
def test_contradicting_settings_are_named(bundle: Path, engine: str, kernels: CustomKernelsSettings) -> None:
    source = ModelSource(path=bundle, engine=engine)  # type: ignore[arg-type]
    with pytest.raises(EngineUnavailable, match=f"custom_kernels.use = {kernels.use} and engine = {engine} contradict"):
        Opener(source, read_manifest(bundle), nothing, kernels)


def test_onnxruntime_without_its_cuda_provider_says_so(bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="has no CUDAExecutionProvider: pip install onnxruntime-gpu"):
        open_engine(bundle, read_manifest(bundle).engines[0], on_gpu=True)


def test_bundle_loaded_beside_traffic_takes_the_layout_in_use_and_measures_nothing(
    bundle: Path, tmp_path: Path
) -> None:
    folder = copy_with(bundle, tmp_path, "onnxruntime", "openvino")
    opener = Opener(ModelSource(path=folder), read_manifest(folder), nothing)
    in_use = Choice(Setup("onnxruntime", 1, min(2, num_cores())), Setup("onnxruntime", max(1, num_cores() - 1), 1))
    opened = opener.open_best(digest_of(folder), ROWS, in_use)
    assert opened.choice == in_use
    opened.engine.close()
    assert not record_path(folder).exists()
    remembered = open_best(folder)[1]
    opened = opener.open_best(digest_of(folder), ROWS, in_use)
    assert opened.choice.large == remembered
    opened.engine.close()


def test_layout_of_an_engine_that_a_bundle_lacks_is_kept_for_the_one_it_has() -> None:
    in_use = Choice(Setup("onnxruntime", 1, 2), Setup("onnxruntime", 2, 1))
    assert in_use.keep_layout(["openvino", "onnxruntime"]) == in_use
    kept = Setup("openvino", 1, 2)
    assert in_use.keep_layout(["openvino"]) == Choice(kept, kept)
    assert (str(in_use), str(Choice(kept, kept))) == ("onnxruntime:2x1, lone onnxruntime:1x2", "openvino:2x1")
    on_gpu, one = Setup("cuda", 2, 2), Setup("openvino", 2, 1)
    assert Choice(on_gpu, on_gpu).keep_layout(["openvino"]) == Choice(one, one), "its second batch only waits"
