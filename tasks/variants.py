"""Variants: the recipes that `optimize` knows by name."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.manifest import Precision, Runtime, SafeName
from tasks.steps import DistillConfig, PruneConfig, Step, TrimConfig

Build = Literal[
    "fp32-onnx", "int8-dynamic", "int8-static", "fp8-onnx", "int4-small", "int4-tiny", "int8-openvino", "bf16-openvino",
    "fp16-tensorrt", "int8-tensorrt", "fp8-tensorrt", "cuda-fp16", "cuda-fp8",
]  # fmt: skip


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
    is_qdq: bool = False  # rounds in Q and DQ nodes: judged on exact arithmetic, no processor's kernels


_SMALL: dict[Build, str] = {"int4-small": "the gate's 1 % of nDCG", "int4-tiny": "cosine 0.98"}
_BUILDS: dict[Build, Variant] = {
    variant.build: variant
    for variant in (
        Variant(name="fp32-onnx", build="fp32-onnx", runtime="onnxruntime", precision="fp32", method="export"),
        Variant(
            name="int8-dynamic",
            build="int8-dynamic",
            runtime="onnxruntime",
            precision="int8",
            method="dynamic, per channel; SmoothQuant, outlier channels of FFN-down in float",
            is_calibrated=True,
        ),
        Variant(
            name="int8-static",
            build="int8-static",
            runtime="onnxruntime",
            precision="int8",
            method="static QDQ, MinMax, per channel; SmoothQuant, outlier channels of FFN-down in float",
            is_calibrated=True,
            is_qdq=True,
        ),
        Variant(
            name="fp8-onnx",
            build="fp8-onnx",
            runtime="onnxruntime",
            precision="fp8",
            method="QDQ in E4M3, max calibration",
            compute="f8",
            is_calibrated=True,
            is_qdq=True,
        ),
        *(
            Variant(
                name=name,
                build=name,
                runtime="onnxruntime",
                precision="int4",
                method=f"weights only: table 4 bits, linears 4 or 6 by sensitivity, GPTQ rounding, for {aim}",
                is_calibrated=True,
            )
            for name, aim in _SMALL.items()
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
        Variant(
            name="fp16-tensorrt",
            build="fp16-tensorrt",
            runtime="tensorrt",
            precision="fp16",
            method="float16 encoder",
            compute="f16",
        ),
        Variant(
            name="int8-tensorrt",
            build="int8-tensorrt",
            runtime="tensorrt",
            precision="int8",
            method="static QDQ, MinMax, symmetric, per channel; outliers tamed; float16 elsewhere",
            compute="f16",
            is_calibrated=True,
        ),
        Variant(
            name="fp8-tensorrt",
            build="fp8-tensorrt",
            runtime="tensorrt",
            precision="fp8",
            method="QDQ in E4M3, max calibration; float16 elsewhere",
            compute="f16",
            is_calibrated=True,
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
# 30 % of all parameters of MiniLM, taken where they are missed least: layers, rank of the embeddings, vocabulary.
_PRUNED30 = (PruneConfig(ratio=0.19, embedding_ratio=1 / 3), TrimConfig(ratio=0.115))
_RECIPES = (
    Recipe(name="student3-fp32", build="fp32-onnx", steps=_STUDENT3),
    Recipe(name="student3-int8-openvino", build="int8-openvino", steps=_STUDENT3),
    Recipe(name="pruned30-fp32", build="fp32-onnx", steps=_PRUNED30),
    Recipe(name="pruned30-int8-openvino", build="int8-openvino", steps=_PRUNED30),
)
VARIANTS: dict[str, Variant] = {
    variant.name: variant for variant in (*_BUILDS.values(), *(recipe.variant() for recipe in _RECIPES))
}


# Minutes on two cores, together; the others are made when asked for.
_DEFAULT: tuple[Build, ...] = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")


def list_variants(has_gpu: bool) -> tuple[str, ...]:
    """What is built unless something else is asked for."""
    return (*_DEFAULT, *(CUDA_VARIANTS if has_gpu else ()))
