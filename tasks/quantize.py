"""Quantisation and conversion: one exported graph in, one variant out."""

from collections.abc import Callable, Sequence
from pathlib import Path

from prefect import task
from pydantic import BaseModel, ConfigDict

from registry.manifest import EngineEntry, Quantization, hash_file
from serving.telemetry import disable_telemetry
from serving.tokenizer import TOKENIZER_NAME, Ids, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_calibration, read_part
from tasks.distillation.teach import join_neighbours
from tasks.export import ONNX_NAME
from tasks.progress import Advance, progress
from tasks.quantization.built import Built, CurvePoint, InputRange, LayerDamage
from tasks.quantization.calibrate import Batches
from tasks.quantization.onnx_builds import (
    keep_fp32,
    quantize_dynamic,
    quantize_fp8,
    quantize_static,
    squeeze_for_caution,
    squeeze_for_gate,
)
from tasks.quantization.openvino_builds import convert_openvino, quantize_openvino
from tasks.quantization.tensorrt_graphs import write_fp8, write_fp16, write_int8
from tasks.settings import QdqConfig
from tasks.variants import Build, Variant

_NUM_FITTED, _JOINED_SHARE = 12_000, 0.1  # texts that few bits are fitted to; share of long ones, made of neighbours


class Candidate(BaseModel):
    """A variant that was built: its folder (engine files and tokenizer), engine entry and quantisation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Variant
    artifact: Artifact
    engine: EngineEntry
    max_seq_length: int
    calibration_size: int
    calibration_digest: str | None
    disk_bytes: int
    damages: tuple[LayerDamage, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    ranges: tuple[InputRange, ...] = ()

    @property
    def method(self) -> str:
        """How it was made: the variant's method, and the layers that stayed in float for the gate."""
        kept = [layer.layer for layer in self.damages if layer.is_float]
        return f"{self.variant.method}; in float: {', '.join(kept)}" if kept else self.variant.method

    def quantization(self, corpus: str, cosine_mean: float) -> Quantization | None:
        """The manifest's account of the quantisation; None where the weights are as exported."""
        if self.variant.precision not in {"int4", "int8", "fp8"}:
            return None
        return Quantization(
            method=self.method,
            calibration_dataset=corpus if self.variant.is_calibrated else None,
            calibration_digest=self.calibration_digest,
            calibration_size=self.calibration_size,
            accuracy_loss=1 - cosine_mean,
        )


@task(task_run_name="quantize-{variant.name}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def quantize(
    variant: Variant, exported: Artifact, max_length: int, corpus: Artifact, calibration_size: int
) -> Candidate:
    """Build one variant from the exported graph, calibrated on the first `calibration_size` calibration texts.

    Raises CorpusRejected, QuantizationFailed.
    """
    disable_telemetry()
    texts = read_calibration(corpus, calibration_size, variant.name) if variant.is_calibrated else []
    tokenizer = TextTokenizer.from_folder(exported.folder, max_length)
    # Shortest first: OpenVINO compiles kernels for every change of shape, half the time of quantising.
    batches = [pad_batch([ids]) for ids in sorted(tokenizer.encode(texts), key=len)] if texts else []
    with draft(variant.name) as work, progress(f"quantize {variant.name}", max(len(batches), 1)) as advance:
        (work.folder / TOKENIZER_NAME).write_bytes((exported.folder / TOKENIZER_NAME).read_bytes())
        given = exported.folder / ONNX_NAME, work.folder, batches, advance
        if variant.build in _FITTED_BUILDERS:
            built = _FITTED_BUILDERS[variant.build](*given, tokenizer.encode(fitting_texts(corpus)))
        elif variant.qdq:
            built = _QDQ_BUILDERS[variant.build](*given, variant.qdq)
        else:
            built = _BUILDERS[variant.build](*given)
        entry = hash_file(work.folder / built.file)
        disk_bytes = sum(path.stat().st_size for path in work.folder.iterdir())
    return Candidate(
        variant=variant,
        artifact=work.artifact,
        engine=EngineEntry(
            runtime=variant.runtime, file=built.file, sha256=entry.sha256, size=entry.size, compute=variant.compute
        ),
        max_seq_length=max_length,
        calibration_size=len(texts),
        calibration_digest=corpus.digest if texts else None,
        disk_bytes=disk_bytes,
        damages=built.damages,
        curve=built.curve,
        ranges=built.ranges,
    )


def fitting_texts(corpus: Artifact) -> list[str]:
    """Texts of the distillation part that few bits are fitted to, after long ones that are made of neighbours."""
    texts = read_part(corpus, "distillation")[:_NUM_FITTED]
    return [*join_neighbours(texts, _JOINED_SHARE), *texts]


_BUILDERS: dict[Build, Callable[[Path, Path, Batches, Advance], Built]] = {
    "fp32-onnx": keep_fp32,
    "int8-dynamic": quantize_dynamic,
    "int8-openvino": quantize_openvino,
    "bf16-openvino": convert_openvino,
    "fp16-onnx": write_fp16,
    "fp16-tensorrt": write_fp16,
}
_QDQ_BUILDERS: dict[Build, Callable[[Path, Path, Batches, Advance, QdqConfig], Built]] = {
    "int8-static": quantize_static,
    "fp8-onnx": quantize_fp8,
    "int8-tensorrt": write_int8,
    "fp8-tensorrt": write_fp8,
}
_FITTED_BUILDERS: dict[Build, Callable[[Path, Path, Batches, Advance, Sequence[Ids]], Built]] = {
    "int4-small": squeeze_for_gate,
    "int4-tiny": squeeze_for_caution,
}
