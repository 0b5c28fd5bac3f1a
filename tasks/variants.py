"""Variants: the recipes that `optimize` knows by name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from registry.manifest import Precision, Runtime
from tasks.steps import DistillConfig, Step

Build = Literal["fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino"]
VariantName = Literal[Build, "student3-fp32", "student3-int8-openvino"]


class Variant(BaseModel):
    """A recipe: what is done to the model, how the exported graph becomes an engine file, and what runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: VariantName
    steps: tuple[Step, ...] = ()
    build: Build
    runtime: Runtime
    precision: Precision
    method: str
    compute: Literal["f32", "bf16"] = "f32"
    is_calibrated: bool = False


_BUILDS: dict[Build, Variant] = {
    variant.build: variant
    for variant in (
        Variant(name="fp32-onnx", build="fp32-onnx", runtime="onnxruntime", precision="fp32", method="export"),
        Variant(
            name="int8-dynamic",
            build="int8-dynamic",
            runtime="onnxruntime",
            precision="int8",
            method="dynamic, per channel",
        ),
        Variant(
            name="int8-static",
            build="int8-static",
            runtime="onnxruntime",
            precision="int8",
            method="static QDQ, MinMax, per channel",
            is_calibrated=True,
        ),
        Variant(
            name="int8-openvino",
            build="int8-openvino",
            runtime="openvino",
            precision="int8",
            method="NNCF post-training; attention products and FFN-down in bf16",
            compute="bf16",
            is_calibrated=True,
        ),
        Variant(
            name="bf16-openvino",
            build="bf16-openvino",
            runtime="openvino",
            precision="bf16",
            method="bf16 arithmetic",
            compute="bf16",
        ),
    )
}


def _after(name: VariantName, build: Build, *steps: Step) -> Variant:
    """A variant that builds what is left of the teacher after `steps`."""
    return _BUILDS[build].model_copy(update={"name": name, "steps": steps})


_STUDENT3 = DistillConfig(depth=3)
VARIANTS: dict[VariantName, Variant] = {
    variant.name: variant
    for variant in (
        *_BUILDS.values(),
        _after("student3-fp32", "fp32-onnx", _STUDENT3),
        _after("student3-int8-openvino", "int8-openvino", _STUDENT3),
    )
}
