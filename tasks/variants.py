"""Variants: the recipes that `optimize` knows by name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.manifest import Precision, Runtime, SafeName
from tasks.steps import DistillConfig, Step

Build = Literal["fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino", "cuda-fp16", "cuda-fp8"]


class Variant(BaseModel):
    """A recipe: what is done to the model, how the exported graph becomes an engine file, and what runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SafeName
    steps: tuple[Step, ...] = ()
    build: Build
    runtime: Runtime
    precision: Precision
    method: str
    compute: Literal["f32", "bf16", "f16", "f8"] = "f32"
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

# Made of the weights, not of the exported graph, and judged where there is a GPU alone.
CUDA_VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="cuda-fp16",
            build="cuda-fp16",
            runtime="cuda",
            precision="fp16",
            method="float16, packed",
            compute="f16",
        ),
        Variant(
            name="cuda-fp8",
            build="cuda-fp8",
            runtime="cuda",
            precision="fp8",
            method="linear layers in E4M3, max calibration; the rest in float16, packed",
            compute="f8",
            is_calibrated=True,
        ),
    )
}


class Recipe(BaseModel):
    """A variant as a user writes it: what to do to the teacher, and how to build what is left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SafeName = Field(description="the variant's name, to be listed in `variants`")
    build: Build = Field(description="how the model becomes an engine file")
    steps: tuple[Step, ...] = Field(description="what is done to the model before")

    def variant(self) -> Variant:
        """The variant that `optimize` makes."""
        plain = CUDA_VARIANTS.get(self.build) or _BUILDS[self.build]
        return plain.model_copy(update={"name": self.name, "steps": self.steps})


_STUDENT3 = (DistillConfig(depth=3),)
_RECIPES = (
    Recipe(name="student3-fp32", build="fp32-onnx", steps=_STUDENT3),
    Recipe(name="student3-int8-openvino", build="int8-openvino", steps=_STUDENT3),
)
VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in (*_BUILDS.values(), *(recipe.variant() for recipe in _RECIPES))
}


def list_variants(has_gpu: bool) -> tuple[str, ...]:
    """What is built unless something else is asked for."""
    return (*_BUILDS, *(CUDA_VARIANTS if has_gpu else ()))
