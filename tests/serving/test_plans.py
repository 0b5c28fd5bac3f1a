"""Plans without TensorRT: what they are bound to, when they are stale, and how they are kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from registry.manifest import Profile
from serving.engines.plans import (
    BuildRecipe,
    Fingerprint,
    PlanStale,
    driver_version,
    make_profiles,
    opt_length,
    plan_path,
    read_plan,
    read_recipe,
    write_plan,
    write_recipe,
)
from serving.engines.tensorrt import choose_profile, min_cosine
from serving.engines.tensorrt_plan import check_engine, check_products, read_types
from serving.errors import EngineUnavailable

RECIPE = BuildRecipe(precision="fp16", profiles=make_profiles(256))
HERE = Fingerprint(sm="11.0", tensorrt="tensorrt 10.13.3.9", driver="580.95", onnx_sha256="a" * 64, recipe=RECIPE)


def kept(folder: Path, fingerprint: Fingerprint = HERE) -> Path:
    path = plan_path(folder / "model.onnx", RECIPE)
    write_plan(path, b"plan", fingerprint, 0.9999)
    return path


def test_profiles_are_the_three_of_the_design_with_lengths_to_512() -> None:
    shapes = [(p.name, p.min_batch, p.opt_batch, p.max_batch) for p in make_profiles(2048)]
    assert shapes == [("low_latency", 1, 1, 2), ("balanced", 2, 4, 8), ("high_throughput", 8, 16, 32)]
    assert {p.max_length for p in make_profiles(2048)} == {512}
    assert {(p.max_length, opt_length(p)) for p in make_profiles(16)} == {(16, 16)}


@pytest.mark.parametrize(
    ("rows", "name"),
    [(1, "low_latency"), (2, "low_latency"), (3, "balanced"), (8, "balanced"), (9, "high_throughput"),
     (32, "high_throughput")],
)  # fmt: skip
def test_choose_profile_takes_the_smallest_that_fits(rows: int, name: str) -> None:
    profiles: tuple[Profile, ...] = tuple(reversed(RECIPE.profiles))
    assert profiles[choose_profile(profiles, rows)].name == name


def test_plan_that_fits_is_read_back(tmp_path: Path) -> None:
    plan, record = read_plan(kept(tmp_path / "bundle"), HERE)
    assert (plan, record.parity) == (b"plan", 0.9999)
    assert [p.suffix for p in (tmp_path / "bundle.plans").iterdir() if p.name.endswith("tmp")] == []
    assert not (tmp_path / "bundle").exists()  # a bundle is immutable: its plans lie beside it


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sm": "9.0"}, r"it was built for sm 9\.0, not 11\.0"),
        ({"tensorrt": "tensorrt 11.4.1"}, r"tensorrt tensorrt 11\.4\.1, not tensorrt 10\.13\.3\.9"),
        ({"driver": "570.1"}, r"driver 570\.1, not 580\.95"),
        ({"onnx_sha256": "b" * 64}, "onnx_sha256 bbb"),
        ({"recipe": RECIPE.model_copy(update={"workspace_mb": 512})}, "recipe differs"),
    ],
)
def test_plan_of_another_machine_version_or_graph_is_stale(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    path = kept(tmp_path / "bundle", HERE.model_copy(update=change))
    with pytest.raises(PlanStale, match=reason):
        read_plan(path, HERE)


def test_plan_with_a_changed_byte_is_stale(tmp_path: Path) -> None:
    path = kept(tmp_path / "bundle")
    path.write_bytes(b"plaN")
    with pytest.raises(PlanStale, match="bytes are not those that were built"):
        read_plan(path, HERE)


@pytest.mark.parametrize("record", [None, b"", b"{}", b"\xff", json.dumps({"sha256": 1}).encode()])
def test_plan_without_a_readable_record_is_stale(tmp_path: Path, record: bytes | None) -> None:
    path = kept(tmp_path / "bundle")
    beside = path.with_name(f"{path.name}.json")
    beside.unlink() if record is None else beside.write_bytes(record)
    with pytest.raises(PlanStale, match="there is none yet" if record is None else "record cannot be read"):
        read_plan(path, HERE)


def test_recipe_is_read_back_and_refused_with_its_key(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE)
    assert read_recipe(tmp_path) == RECIPE
    (tmp_path / "tensorrt.json").write_text('{"precision": "fp16", "profiles": [], "speed": 9}')
    with pytest.raises(EngineUnavailable, match=r"tensorrt\.json: profiles: .*; speed: unknown key"):
        read_recipe(tmp_path)
    with pytest.raises(EngineUnavailable, match="No such file"):
        read_recipe(tmp_path / "nowhere")


def test_driver_version_is_the_kernel_modules_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr("serving.engines.plans._DRIVER_FILE", file)
    assert driver_version() == "unknown"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.95.05  Release Build\nGCC 13.2")
    assert driver_version() == "580.95.05"


@pytest.mark.parametrize(
    ("products", "precision", "fits"),
    [
        ({"fp16": 48}, "fp16", True),
        ({"fp16": 47, "fp32": 1}, "fp16", False),
        ({"int8": 36, "fp32": 12}, "int8", True),
        ({"fp32": 48}, "int8", False),
        ({"int8": 36, "fp16": 12}, "fp8", False),
    ],
)
def test_network_of_other_types_than_asked_for_is_refused(products: dict[str, int], precision: str, fits: bool) -> None:
    recipe = RECIPE.model_copy(update={"precision": precision})
    if fits:
        check_products(products, recipe.precision)
        return
    with pytest.raises(EngineUnavailable, match=f"asked for {precision}, the graph's matrix products are"):
        check_products(products, recipe.precision)


# As the inspector of 10.x and of 11.x names things; no engine was run to record them.
LAYERS = [
    {"Name": "a", "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}], "Outputs": []},
    {"Name": "b", "Inputs": [], "Outputs": [{"Name": "y", "Format/Datatype": "Int8"}, {"Format/Datatype": "Int64"}]},
    {"Name": "c", "Inputs": [{"Format/Datatype": "FP8"}], "Outputs": [{"Format/Datatype": "BFloat16"}]},
    {"Name": "d", "Inputs": [{"Format/Datatype": "Float"}]},
]


@pytest.mark.parametrize("key", ["Bindings", "I/O Tensors"])
def test_engine_types_are_read_under_both_versions_names(key: str) -> None:
    information = json.dumps({"Layers": LAYERS, key: ["input_ids"]})
    assert read_types(information) == {"fp16": 1, "int8": 1, "fp8": 1, "bf16": 1, "fp32": 1}
    assert check_engine(information, "fp8")["fp8"] == 1


def test_engine_without_the_type_asked_for_is_refused() -> None:
    information = json.dumps({"Layers": [LAYERS[3], "a name alone"], "Bindings": []})
    with pytest.raises(EngineUnavailable, match=r"asked for fp8, the engine was built with \{'fp32': 1\}"):
        check_engine(information, "fp8")


def test_min_cosine_is_nan_for_a_row_that_is_not_finite() -> None:
    good = np.eye(3, dtype=np.float32)
    bad = good.copy()
    bad[1] = np.nan
    assert min_cosine(good, good) == 1
    assert min_cosine(good, good[[1, 0, 2]]) == 0
    assert np.isnan(min_cosine(good, bad))
