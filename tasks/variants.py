"""Variants: the recipes that `optimize` knows by name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from registry.manifest import Precision, Runtime

CudaVariantName = Literal["cuda-fp16", "cuda-fp8"]
VariantName = Literal["fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino", CudaVariantName]


class Variant(BaseModel):
    """A recipe: how the exported graph becomes an engine file, and what runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: VariantName
    runtime: Runtime
    precision: Precision
    method: str
    compute: Literal["f32", "bf16", "f16", "f8"] = "f32"
    is_calibrated: bool = False


VARIANTS: dict[VariantName, Variant] = {
    variant.name: variant
    for variant in (
        Variant(name="fp32-onnx", runtime="onnxruntime", precision="fp32", method="export"),
        Variant(name="int8-dynamic", runtime="onnxruntime", precision="int8", method="dynamic, per channel"),
        Variant(
            name="int8-static",
            runtime="onnxruntime",
            precision="int8",
            method="static QDQ, MinMax, per channel",
            is_calibrated=True,
        ),
        Variant(
            name="int8-openvino",
            runtime="openvino",
            precision="int8",
            method="NNCF post-training; attention products and FFN-down in bf16",
            compute="bf16",
            is_calibrated=True,
        ),
        Variant(name="bf16-openvino", runtime="openvino", precision="bf16", method="bf16 arithmetic", compute="bf16"),
    )
}

# Made of the teacher's weights, not of the exported graph, and judged where there is a GPU alone.
CUDA_VARIANTS: dict[VariantName, Variant] = {
    variant.name: variant
    for variant in (
        Variant(name="cuda-fp16", runtime="cuda", precision="fp16", method="float16, packed", compute="f16"),
        Variant(
            name="cuda-fp8",
            runtime="cuda",
            precision="fp8",
            method="linear layers in E4M3, max calibration; the rest in float16, packed",
            compute="f8",
            is_calibrated=True,
        ),
    )
}


def list_variants(has_gpu: bool) -> tuple[VariantName, ...]:
    """What is built unless something else is asked for."""
    return (*VARIANTS, *(CUDA_VARIANTS if has_gpu else ()))
