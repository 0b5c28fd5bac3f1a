"""Exact twins: integers are multiplied and added without a limit that a processor's kernels may have."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from registry.gate import GateLimits
from serving.engines import open_engine
from tasks.evaluate import open_candidate
from tasks.graphs.exact import write_exact_twin
from tasks.measurement.hardware import INT8_FLAGS, cpu_flags
from tests.forge import Forge
from tests.texts import make_sentences

WIDTH = 300


def dynamic_graph(weight: Any, weight_zero: Any) -> onnx.ModelProto:
    """An input rounded over its own range, times integers, twice: as onnxruntime writes them."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"], name="q"),
        helper.make_node("MatMulInteger", ["q", "w", "zero", "w_zero"], ["first"], name="first"),
        helper.make_node("MatMulInteger", ["q", "w", "zero", "w_zero"], ["second"], name="second"),
        helper.make_node("Add", ["first", "second"], ["sum"], name="sum"),
        helper.make_node("Cast", ["sum"], ["y"], name="cast", to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(weight_zero, "w_zero")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("zero", [0, 3])
def test_exact_twin_adds_up_what_16_bits_cannot_hold(zero: int, tmp_path: Path) -> None:
    weight = np.full((WIDTH, 2), 127, dtype=np.int8)
    weight[::7, 1] = -127
    onnx.save(dynamic_graph(weight, np.array([zero, 0], dtype=np.int8)), tmp_path / "model.onnx")
    write_exact_twin(tmp_path / "model.onnx", tmp_path / "twin.onnx")
    session = ort.InferenceSession(str(tmp_path / "twin.onnx"), providers=["CPUExecutionProvider"])
    x = np.full((1, WIDTH), 255, dtype=np.float32)
    x[0, :3] = 0, -85, 170  # from -85 to 255: steps of 4/3, zero at 64
    integers = np.rint(x / (340 / 255)).astype(np.int64)
    expected = 2 * integers @ (weight.astype(np.int64) - np.array([zero, 0]))
    assert expected.max() > 2**15
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], expected)
    assert all(node.op_type != "MatMulInteger" for node in onnx.load(tmp_path / "twin.onnx").graph.node)


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static", "int8-openvino"])
def test_int8_is_judged_on_exact_arithmetic_and_serves_close_to_it(name: str, forge: Forge) -> None:
    judged = forge.study.find(name)
    served = judged.quality.metrics["engine_cosine_mean"]
    if INT8_FLAGS & set(cpu_flags()):
        assert 0.999 < served.low < served.high  # measured, not taken for granted
    else:  # saturated: close, and not close enough for the gate
        assert 0.99 < served.low < served.high < GateLimits().min_engine_cosine
    encode, engine = open_candidate(judged.candidate, is_exact=True)
    exact = encode(make_sentences(20), lambda steps: None)
    engine.close()
    encode, engine = open_candidate(judged.candidate)
    fused = encode(make_sentences(20), lambda steps: None)
    engine.close()
    np.testing.assert_allclose(exact, fused, atol=0.05)


@pytest.mark.parametrize("name", ["fp32-onnx", "bf16-openvino"])
def test_float_variants_are_judged_on_the_engine_that_serves(name: str, forge: Forge) -> None:
    judged = forge.study.find(name)
    assert not judged.candidate.variant.is_exact
    assert judged.quality.value("engine_cosine_mean") == 1


def test_exact_openvino_uses_no_integer_kernels(forge: Forge) -> None:
    candidate = forge.study.find("int8-openvino").candidate

    def kernels(is_exact: bool) -> set[str]:
        engine: Any = open_engine(candidate.artifact.folder, candidate.engine, is_exact=is_exact)
        about = [op.get_rt_info() for op in engine._model.get_runtime_model().get_ops()]
        engine.close()
        return {str(i["primitiveType"].astype(str)) for i in about if i["layerType"].astype(str) == "FullyConnected"}

    assert all(name.endswith("f32") for name in kernels(is_exact=True))
    assert any(name.lower().endswith("i8") for name in kernels(is_exact=False))


def test_exact_twin_that_a_killed_run_left_is_removed(forge: Forge) -> None:
    (forge.state / ".exact-dead").mkdir()
    (forge.state / ".exact-dead.lock").touch()
    _, engine = open_candidate(forge.study.find("int8-dynamic").candidate, is_exact=True)
    engine.close()
    assert list(forge.state.glob(".exact-*")) == []
