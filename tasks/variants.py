"""Variants: the recipes that `optimize` knows by name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from registry.manifest import Precision, Runtime

VariantName = Literal["fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino"]


class Variant(BaseModel):
    """A recipe: how the exported graph becomes an engine file, and what runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: VariantName
    runtime: Runtime
    precision: Precision
    method: str
    compute: Literal["f32", "bf16"] = "f32"
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
