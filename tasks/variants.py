"""Variants: the recipes that `optimize` knows by name."""

from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from registry.gate import GateLimits
from registry.manifest import Precision, Runtime, SafeName
from tasks.settings import CalibrationMethod, QdqConfig
from tasks.steps import DistillConfig, PruneConfig, Step, TrimConfig

Build = Literal[
    "fp32-onnx", "fp16-onnx", "int8-dynamic", "int8-static", "fp8-onnx", "int4-small", "int4-tiny", "int8-openvino",
    "bf16-openvino", "fp16-tensorrt", "int8-tensorrt", "fp8-tensorrt", "cuda-fp16", "cuda-fp8", "int8-avx512",
]  # fmt: skip

Compute = Literal["f32", "bf16", "f16", "f8"]


class Variant(BaseModel):
    """A recipe: what is done to the model, how the exported graph becomes an engine file, and what runs it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SafeName
    steps: tuple[Step, ...] = ()
    build: Build
    runtime: Runtime
    precision: Precision
    method: str
    compute: Compute = "f32"
    is_calibrated: bool = False
    qdq: QdqConfig | None = None

    @property
    def is_exact(self) -> bool:
        """Whether it is judged on the exact arithmetic of its graph, not on what a processor's kernels make of it.

        Not so what serves on one processor alone: avx512 adds up its integers in 32 bits, which is exact as it is.
        """
        return self.precision in {"int8", "fp8"} and self.runtime in {"onnxruntime", "openvino"}

    def within(self, limits: GateLimits) -> "Variant":
        """The variant that keeps its most sensitive layers in float where the gate's cosine or its own asks for it."""
        if self.qdq is None:
            return self
        qdq = self.qdq.model_copy(update={"min_cosine": max(limits.cosine_mean_pass, self.qdq.min_cosine or 0.0)})
        return self.model_copy(update={"qdq": qdq})


def _build(
    build: Build, runtime: Runtime, precision: Precision, compute: Compute, method: str, **flags: Any
) -> tuple[Build, Variant]:
    return build, Variant(
        name=build, build=build, runtime=runtime, precision=precision, compute=compute, method=method, **flags
    )


_CALIBRATED: dict[str, Any] = {"is_calibrated": True}
_QDQ: dict[str, Any] = {"is_calibrated": True, "qdq": QdqConfig()}
_INT8_QDQ = "static QDQ, MinMax, per channel; SmoothQuant, outlier channels of FFN-down in float"
_FP8_QDQ = "QDQ in E4M3, max calibration"
_INT4 = "weights only, on a trellis: linears 3 to 6 bits by sensitivity, GPTQ rounding; table"
_BUILDS: dict[Build, Variant] = dict(
    (
        _build("fp32-onnx", "onnxruntime", "fp32", "f32", "export"),
        _build("fp16-onnx", "onnxruntime", "fp16", "f16", "float16 encoder"),
        _build(
            "int8-dynamic", "onnxruntime", "int8", "f32",
            "dynamic, per channel; SmoothQuant, outlier channels of FFN-down in float", **_CALIBRATED,
        ),
        _build("int8-static", "onnxruntime", "int8", "f32", _INT8_QDQ, **_QDQ),
        _build("fp8-onnx", "onnxruntime", "fp8", "f8", _FP8_QDQ, **_QDQ),
        _build("int4-small", "onnxruntime", "int4", "f32", f"{_INT4} 3 or 4 bits", **_CALIBRATED),
        _build("int4-tiny", "onnxruntime", "int4", "f32", f"{_INT4} 2 or 3 bits", **_CALIBRATED),
        _build(
            "int8-openvino", "openvino", "int8", "bf16",
            "NNCF post-training; attention products and FFN-down in bf16", **_CALIBRATED,
        ),
        _build("bf16-openvino", "openvino", "bf16", "bf16", "bf16 arithmetic"),
        _build("fp16-tensorrt", "tensorrt", "fp16", "f16", "float16 encoder"),
        _build("int8-tensorrt", "tensorrt", "int8", "f16", f"{_INT8_QDQ}; symmetric, float16 elsewhere", **_QDQ),
        _build("fp8-tensorrt", "tensorrt", "fp8", "f16", f"{_FP8_QDQ}; float16 elsewhere", **_QDQ),
    )
)  # fmt: skip

_CUDA_COSINE = 0.997  # what FP8 has to keep, on calibration texts
# Made of the weights, not of the exported graph; those of cuda are judged where there is a GPU alone.
KERNEL_VARIANTS: dict[str, Variant] = dict(
    (
        _build("cuda-fp16", "cuda", "fp16", "f16", "float16, packed"),
        _build(
            "cuda-fp8", "cuda", "fp8", "f8",
            "linear layers in E4M3, but output projections of narrow models; GPTQ; scales by row and max calibration; "
            "the rest in float16, packed",
            is_calibrated=True, qdq=QdqConfig(min_cosine=_CUDA_COSINE),
        ),
        _build(
            "int8-avx512", "avx512", "int8", "f32",
            "weights by output channel, inputs by token as they come; SmoothQuant, packed", **_CALIBRATED,
        ),
    )
)  # fmt: skip
_METHODS: dict[CalibrationMethod, str] = {
    "minmax": "MinMax", "percentile": "99.99th percentile", "entropy": "entropy",
}  # fmt: skip
_WITH_METHOD: tuple[Build, ...] = ("int8-static", "int8-tensorrt")


class Recipe(BaseModel):
    """A variant as a user writes it: what to do to the teacher, and how to build what is left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: SafeName = Field(description="the variant's name, to be listed in `variants`")
    build: Build = Field(description="how the model becomes an engine file")
    steps: tuple[Step, ...] = Field(default=(), description="what is done to the model before")
    calibration: CalibrationMethod | None = Field(
        default=None,
        description="how int8-static and int8-tensorrt choose ranges: minmax (the default), percentile or entropy",
    )

    @model_validator(mode="after")
    def _calibration_means_something(self) -> Self:
        if self.calibration is not None and self.build not in _WITH_METHOD:
            builds = " and ".join(_WITH_METHOD)
            raise ValueError(f"calibration {self.calibration!r} is a setting of {builds}, not of {self.build}")
        return self

    def variant(self) -> Variant:
        """The variant that `optimize` makes."""
        plain = KERNEL_VARIANTS.get(self.build) or _BUILDS[self.build]
        changes: dict[str, Any] = {"name": self.name, "steps": self.steps}
        if self.calibration is not None:
            changes["qdq"] = QdqConfig(calibration=self.calibration)
            changes["method"] = plain.method.replace("MinMax", _METHODS[self.calibration])
        return plain.model_copy(update=changes)


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


def list_variants(runnable: Collection[str] = ()) -> tuple[str, ...]:
    """What is built unless something else is asked for, with the `runnable` ones of the engines of our own."""
    return (*_DEFAULT, *(name for name in KERNEL_VARIANTS if name in runnable))
