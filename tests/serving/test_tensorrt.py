"""The engine's way from a plan that does not fit to one that does.

Networks are parsed and plans built by the real library, which needs no GPU for that; what does need one (to load a
plan, to run it, to inspect it) onnxruntime stands in for. No TensorRT engine runs here.
"""

import hashlib
import json
import logging
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from registry.manifest import digest_of, read_manifest
from serving.engines import Embeddings, tensorrt
from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.engines.plans import TIMING_CACHE_NAME, BuildRecipe, make_profiles, plan_path, read_recipe, write_recipe
from serving.engines.tensorrt import Node, TensorRtEngine, import_tensorrt, make_probes
from serving.engines.tensorrt_plan import Plan, build_plan
from serving.errors import EngineUnavailable
from serving.opening import Opener
from serving.settings import ModelSource
from serving.tokenizer import Ids
from tests.bundles import make_bundle
from tests.serving.test_models import engine_entries, rewrite

HAS_PLATFORM = (platform.system(), platform.machine()) == ("Linux", "x86_64")
pytestmark = pytest.mark.skipif(not HAS_PLATFORM, reason="tensorrt_rtx has no wheel for this platform")

DIMENSION, MAX_LENGTH = 8, 16
RECIPE = BuildRecipe(precision="fp32", profiles=make_profiles(MAX_LENGTH), compute_capabilities=("8.9",))

Fault = Callable[[Embeddings], Embeddings]


class Bench:
    """A bundle with a graph that has a matrix product, a GPU that is not there, and what was done to them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.graph = folder / "model.onnx"
        self.node = Node(import_tensorrt(), "8.9", "580.95")
        self.fault: Fault = lambda rows: rows
        self.refused_plans: set[bytes] = set()
        self.given_caches: list[bytes] = []  # one for each build
        self.plans: list[Plan] = []
        self.num_rebuilds = 0
        patch.setattr(Node, "examine", lambda: self.node)
        patch.setattr(tensorrt, "build_plan", self._build)
        patch.setattr(tensorrt, "TensorRtEngine", self.make_class())

    @property
    def plan(self) -> Path:
        return plan_path(self.graph, read_recipe(self.graph.parent))

    def open(self, built: Plan | None = None) -> TensorRtEngine:
        return tensorrt.TensorRtEngine(self.graph, built, self._count_rebuild)

    def make_class(self) -> type[TensorRtEngine]:
        bench = self

        class OnThisMachine(TensorRtEngine):
            def _load(self, plan: bytes, recipe: BuildRecipe) -> None:
                if plan in bench.refused_plans:
                    raise EngineUnavailable("the library cannot load the plan")
                self._profiles = recipe.profiles
                self._judge = OnnxRuntimeEngine(bench.graph, is_exact=True)

            def _run(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
                assert len(input_ids) <= max(profile.max_batch for profile in self._profiles)
                return bench.fault(self._judge.embed(input_ids, attention_mask))

            def describe(self) -> str:
                return json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Float"}]}]})

            def close(self) -> None:
                self._judge.close()

        return OnThisMachine

    def _build(self, trt: ModuleType, graph: Path, recipe: BuildRecipe, timing_cache: bytes) -> Plan:
        self.given_caches.append(timing_cache)
        self.plans.append(build_plan(trt, graph, recipe, timing_cache))
        return self.plans[-1]

    def _count_rebuild(self) -> None:
        self.num_rebuilds += 1


def add_product(graph: Path) -> None:
    """Put a matrix product with the identity into the tiny bundle's graph, which has none to have a type."""
    model = onnx.load(graph)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(DIMENSION, dtype=np.float32), "identity"))
    place = next(index for index, node in enumerate(model.graph.node) if node.op_type == "ReduceL2")
    model.graph.node.insert(place, helper.make_node("MatMul", ["summed", "identity"], ["product"]))
    for node in model.graph.node[place + 1 :]:
        node.input[0] = node.input[0].replace("summed", "product")
    onnx.save(model, graph)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    folder = tmp_path / "bundle"
    make_bundle(folder, dimension=DIMENSION, max_length=MAX_LENGTH)
    add_product(folder / "model.onnx")
    write_recipe(folder, RECIPE)
    return Bench(folder, monkeypatch)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Why plans were built again, as logged."""
    return [record.getMessage() for record in caplog.records if "built again" in record.getMessage()]


def test_first_plan_is_built_checked_kept_and_taken_from_then_on(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        engines = [bench.open(), bench.open()]
    assert (len(bench.plans), bench.num_rebuilds, reasons(caplog)) == (1, 0, [])
    assert bench.plan.read_bytes() == bench.plans[0].data
    assert json.loads(bench.plan.with_name(f"{bench.plan.name}.json").read_text())["parity"] > 0.9999
    assert engines[1].runtime.startswith("tensorrt_rtx 1.")
    assert engines[1].runtime.endswith(" sm 8.9 fp32")
    rows = 2 * RECIPE.profiles[-1].max_batch + 1  # more than a profile takes, so in parts
    ids = np.full((rows, 3), 6)
    assert engines[1].embed(ids, np.ones_like(ids)).shape == (rows, DIMENSION)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ({"sm": "12.0"}, "it was built for sm 8.9, not 12.0"),
        ({"driver": "590.10"}, "it was built for driver 580.95, not 590.10"),
    ],
)
def test_plan_of_another_node_is_built_again_logged_and_counted_once(
    bench: Bench, caplog: pytest.LogCaptureFixture, node: dict[str, str], reason: str
) -> None:
    bench.open()
    bench.node = replace(bench.node, **node)
    with caplog.at_level(logging.WARNING):
        bench.open()
        bench.open()
    assert (len(bench.plans), bench.num_rebuilds) == (2, 1)
    assert reasons(caplog) == [f"tensorrt plan is built again file={bench.plan.name} reason={reason}"]


def test_plan_with_a_changed_byte_is_built_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.open()
    plan = bytearray(bench.plan.read_bytes())
    plan[len(plan) // 2] ^= 1
    bench.plan.write_bytes(plan)
    bench.open()
    assert (len(bench.plans), bench.num_rebuilds) == (2, 1)
    assert "its bytes are not those that were built" in reasons(caplog)[0]
    assert bench.plan.read_bytes() == bench.plans[1].data


def test_plan_of_another_graph_is_built_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.open()
    model = onnx.load(bench.graph)
    model.doc_string = "another"
    onnx.save(model, bench.graph)
    bench.open()
    assert bench.num_rebuilds == 1
    assert "it was built for onnx_sha256" in reasons(caplog)[0]


def test_plan_that_fits_but_does_not_load_is_built_again(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.open()
    bench.refused_plans.add(b"refused")
    bench.plan.write_bytes(b"refused")
    record = bench.plan.with_name(f"{bench.plan.name}.json")
    digest = hashlib.sha256(b"refused").hexdigest()
    record.write_text(json.dumps(json.loads(record.read_text()) | {"sha256": digest}))
    bench.open()
    assert (len(bench.plans), bench.num_rebuilds) == (2, 1)
    assert "reason=the library cannot load the plan" in reasons(caplog)[0]


def test_plan_built_just_now_is_kept_without_a_second_build(bench: Bench) -> None:
    built = build_plan(bench.node.trt, bench.graph, RECIPE)
    bench.open(built)
    assert bench.plans == []
    assert bench.plan.read_bytes() == built.data


def spoil(sizes: tuple[int, ...], value: float) -> Fault:
    """Turn every text of batches of these sizes into another, or into something that is not finite."""
    return lambda rows: rows * np.float32(value) if len(rows) in sizes else rows


@pytest.mark.parametrize(
    ("sizes", "value", "said"),
    [
        ((1,), -1, r"the plan is wrong: cosine -1\.0000 at batch 1 of \d+ tokens, limit 0\.9999"),
        ((1,), np.nan, r"the plan is wrong: cosine nan at batch 1 of"),
        ((32,), -1, r"cosine -1\.0000 at high_throughput, batch 32, limit"),
        ((8,), -1, r"cosine -1\.0000 at balanced, batch 8, limit"),
    ],
)
def test_wrong_plan_is_refused_and_not_kept(bench: Bench, sizes: tuple[int, ...], value: float, said: str) -> None:
    bench.fault = spoil(sizes, value)
    with pytest.raises(EngineUnavailable, match=said) as refused:
        bench.open()
    assert "LUNOWUD" not in str(refused.value)
    assert not bench.plan.exists()


def test_wrong_plan_on_thor_is_refused_with_the_way_round(bench: Bench) -> None:
    bench.open()
    kept = bench.plan.read_bytes()
    bench.node, bench.fault = replace(bench.node, sm="11.0"), spoil((1,), -1)
    with pytest.raises(EngineUnavailable, match=r'set __LUNOWUD="-peep:fc_h_fusion=off" and start again'):
        bench.open()
    assert bench.num_rebuilds == 0
    assert bench.plan.read_bytes() == kept  # which stays stale: the next start tries again


def test_timing_cache_of_this_node_is_used_again_and_the_bundle_s_before_there_is_one(bench: Bench) -> None:
    brought = build_plan(bench.node.trt, bench.graph, RECIPE).timing_cache
    assert brought
    (bench.graph.parent / TIMING_CACHE_NAME).write_bytes(brought)
    bench.open()
    own = bench.plan.with_name(TIMING_CACHE_NAME)
    assert own.read_bytes() == bench.plans[0].timing_cache
    own.write_bytes(brought + bench.plans[0].timing_cache)  # told apart from the bundle's
    bench.node = replace(bench.node, driver="590.10")
    bench.open()
    assert bench.given_caches == [brought, brought + bench.plans[0].timing_cache]


def test_probes_are_single_texts_and_every_profile_in_full(bench: Bench) -> None:
    probes = dict(make_probes(bench.graph, RECIPE))
    shapes = [mask.shape[0] for _, mask in probes.values()]
    assert shapes.count(1) == len(shapes) - 3
    assert shapes[-3:] == [profile.max_batch for profile in RECIPE.profiles]
    assert max(mask.shape[1] for _, mask in probes.values()) == MAX_LENGTH


def test_folder_that_takes_no_plan_is_named(bench: Bench) -> None:
    bench.plan.parent.write_text("a file, not a folder")
    with pytest.raises(EngineUnavailable, match=f"plans cannot be kept in {bench.plan.parent}: "):
        bench.open()


def test_rebuild_is_told_to_whoever_counts_fallbacks(bench: Bench) -> None:
    folder, heard = bench.graph.parent, []  # type: ignore[var-annotated]
    rewrite(folder)  # the graph is not the one that the bundle was made with
    rewrite(folder, engines=engine_entries(folder, "tensorrt", "onnxruntime"))
    opener = Opener(ModelSource(path=folder), read_manifest(folder), lambda _, engine: heard.append(engine))
    rows = [np.full(length, 6) for length in (3, 4, 5)]
    for driver in ("580.95", "590.10"):
        bench.node = replace(bench.node, driver=driver)
        opened = opener.open_best(digest_of(folder), rows)
        assert opened.choice.large.runtime == "tensorrt"
        opened.engine.close()
    assert heard == ["tensorrt plan"]
