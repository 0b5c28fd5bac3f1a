import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.manifest import EngineEntry, Manifest, payload_checksum, read_manifest, scan_files, write_manifest
from serving.errors import BundleRejected, EngineUnavailable
from serving.models import load_model
from serving.settings import ModelSource
from tests.bundles import make_bundle, make_tokenizer
from tests.serving.conftest import DIMENSION, MAX_LENGTH


def copy_bundle(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def rewrite(folder: Path, **changes: Any) -> Manifest:
    """Make the manifest agree with the folder's files again, with `changes`."""
    files = scan_files(folder)
    entry = files["model.onnx"]
    engines = (EngineEntry(runtime="onnxruntime", file="model.onnx", sha256=entry.sha256, size=entry.size),)
    update = {"files": files, "checksum": payload_checksum(files), "engines": engines} | changes
    manifest = read_manifest(folder).model_copy(update=update)
    write_manifest(folder, manifest)
    return manifest


def engine_entries(folder: Path, *runtimes: str) -> tuple[EngineEntry, ...]:
    entry = read_manifest(folder).engines[0]
    return tuple(entry.model_copy(update={"runtime": runtime}) for runtime in runtimes)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_model_loads_and_answers_on_each_engine(bundle: Path, tmp_path: Path, runtime: str) -> None:
    folder = copy_bundle(bundle, tmp_path)
    rewrite(folder, engines=engine_entries(folder, "onnxruntime", "openvino"))
    model = load_model(ModelSource(path=folder, engine=runtime))
    assert model.engine.runtime.startswith(f"{runtime} ")
    ids = np.stack([row for row in model.golden.rows if len(row) == 4])
    live = model.engine.embed(ids, np.ones_like(ids))
    expected = [g for row, g in zip(model.golden.rows, model.golden.embeddings, strict=True) if len(row) == 4]
    np.testing.assert_allclose(live, expected, atol=1e-5)
    assert model.cost.tokens_per_second > 0
    assert model.cost.overhead_tokens >= 0
    model.engine.close()


def test_model_takes_its_name_from_the_source_or_the_manifest(bundle: Path) -> None:
    assert load_model(ModelSource(path=bundle)).name == "tiny"
    assert load_model(ModelSource(path=bundle, name="other")).name == "other"


def test_changed_byte_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[-1] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(BundleRejected, match=r"model\.onnx .* has digest"):
        load_model(ModelSource(path=folder))


@pytest.mark.parametrize("name", ["golden.npz", "tokenizer.json"])
def test_bundle_without_a_needed_file_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    folder = copy_bundle(bundle, tmp_path)
    (folder / name).unlink()
    with pytest.raises(BundleRejected, match="missing"):
        load_model(ModelSource(path=folder))
    rewrite(folder)
    with pytest.raises(BundleRejected, match=name):
        load_model(ModelSource(path=folder))


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleRejected, match=r"manifest\.json"):
        load_model(ModelSource(path=tmp_path))


def test_unreadable_tokenizer_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    rewrite(folder)
    with pytest.raises(BundleRejected, match="cannot be read as a tokenizer"):
        load_model(ModelSource(path=folder))


def test_tokenizer_with_too_few_tokens_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path)
    golden = dict(np.load(folder / "golden.npz"))
    golden["input_ids"][0, 1] = 999
    np.savez(folder / "golden.npz", **golden)
    rewrite(folder)
    with pytest.raises(BundleRejected, match="16 tokens, the reference texts use id 999"):
        load_model(ModelSource(path=folder))


def test_tokenizer_that_frames_texts_otherwise_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path)
    tokenizer = make_tokenizer()
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(single="[PAD] $A", special_tokens=[("[PAD]", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    rewrite(folder)
    with pytest.raises(BundleRejected, match="not this model's"):
        load_model(ModelSource(path=folder))


def golden_of(rows: int = 2, length: int = 4, dimension: int = DIMENSION) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.full((rows, length), 2, dtype=np.int32),
        "lengths": np.full(rows, length, dtype=np.int64),
        "embeddings": np.ones((rows, dimension), dtype=np.float32),
    }


@pytest.mark.parametrize(
    ("golden", "message"),
    [
        (golden_of(dimension=DIMENSION + 1), "dimension 8"),
        (golden_of(length=MAX_LENGTH + 1), "outside 1 to 16 tokens"),
        (golden_of(rows=0), "outside 1 to 16 tokens"),
        (golden_of() | {"lengths": np.array([4])}, "lengths"),
        (golden_of() | {"lengths": np.array([4, 0])}, "outside 1 to 16 tokens"),
        (golden_of() | {"embeddings": np.array([object()])}, "ValueError"),
        ({"input_ids": np.zeros((1, 1))}, "KeyError"),
    ],
)
def test_contradictory_golden_set_is_refused(
    bundle: Path, tmp_path: Path, golden: dict[str, np.ndarray], message: str
) -> None:
    folder = copy_bundle(bundle, tmp_path)
    np.savez(folder / "golden.npz", **golden)
    rewrite(folder)
    with pytest.raises(BundleRejected, match=message):
        load_model(ModelSource(path=folder))


def test_engine_of_another_dimension_is_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_bundle(other, dimension=DIMENSION + 1, max_length=MAX_LENGTH)
    folder = copy_bundle(bundle, tmp_path)
    shutil.copy(other / "model.onnx", folder / "model.onnx")
    rewrite(folder)
    with pytest.raises(BundleRejected, match=r"answers \(1, 9\), the manifest says \(1, 8\)"):
        load_model(ModelSource(path=folder))


def test_engine_that_fails_on_the_reference_texts_is_refused(bundle: Path, tmp_path: Path) -> None:
    folder = copy_bundle(bundle, tmp_path)
    golden = dict(np.load(folder / "golden.npz"))
    golden["input_ids"][0, 1] = -100  # a row the embedding table does not have
    np.savez(folder / "golden.npz", **golden)
    rewrite(folder)
    with pytest.raises(BundleRejected, match=r"onnxruntime .* fails on"):
        load_model(ModelSource(path=folder))


def test_engine_with_non_finite_output_is_refused(bundle: Path, tmp_path: Path) -> None:
    import onnx

    from tests.bundles import make_graph, make_table

    folder = copy_bundle(bundle, tmp_path)
    table = make_table(DIMENSION)
    table[2] = np.nan
    onnx.save(make_graph(table), folder / "model.onnx")
    rewrite(folder)
    with pytest.raises(BundleRejected, match="non-finite"):
        load_model(ModelSource(path=folder))


def test_auto_falls_back_to_the_next_engine_and_says_so(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_bundle(bundle, tmp_path)
    rewrite(folder, engines=engine_entries(folder, "tensorrt", "onnxruntime"))
    heard: list[str] = []
    model = load_model(ModelSource(path=folder), lambda _, runtime: heard.append(runtime))
    assert model.engine.runtime.startswith("onnxruntime")
    assert heard == ["tensorrt"]
    assert [record.message.split(" reason")[0] for record in caplog.records] == [
        "engine fallback model=tiny engine=tensorrt"
    ]


def test_engine_asked_for_by_name_loads_or_raises(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="no openvino engine, it has onnxruntime"):
        load_model(ModelSource(path=bundle, engine="openvino"))
    folder = copy_bundle(bundle, tmp_path)
    (folder / "model.onnx").write_bytes(b"not a graph")
    rewrite(folder)
    with pytest.raises(EngineUnavailable, match=r"onnxruntime .* cannot load"):
        load_model(ModelSource(path=folder, engine="onnxruntime"))
    rewrite(folder, engines=engine_entries(folder, "onnxruntime", "openvino"))
    with pytest.raises(EngineUnavailable, match=r"no engine of the bundle loads: .*onnxruntime.*openvino"):
        load_model(ModelSource(path=folder))
