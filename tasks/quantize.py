"""Quantisation and conversion: one exported graph in, one variant out."""

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from prefect import task
from pydantic import BaseModel, ConfigDict

from registry.manifest import EngineEntry, Quantization, hash_file
from serving.telemetry import disable_telemetry
from serving.tokenizer import TOKENIZER_NAME, Ids, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_part
from tasks.errors import QuantizationFailed
from tasks.export import ONNX_NAME
from tasks.progress import Advance, progress
from tasks.variants import Build, Variant


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

    def quantization(self, corpus: str, cosine_mean: float) -> Quantization | None:
        """The manifest's account of the quantisation; None where the weights are as exported."""
        if self.variant.precision != "int8":
            return None
        return Quantization(
            method=self.variant.method,
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

    Raises QuantizationFailed.
    """
    disable_telemetry()
    texts = read_part(corpus, "calibration")[:calibration_size] if variant.is_calibrated else []
    if variant.is_calibrated and len(texts) < calibration_size:
        raise QuantizationFailed(
            f"{variant.name} asks for {calibration_size} calibration texts, the corpus has {len(texts)}: "
            "set calibration_size lower or give a larger corpus"
        )
    tokenizer = TextTokenizer.from_folder(exported.folder, max_length)
    # Shortest first: OpenVINO compiles kernels for every change of shape, half the time of quantising.
    batches = [pad_batch([ids]) for ids in sorted(tokenizer.encode(texts), key=len)] if texts else []
    with draft(variant.name) as work, progress(f"quantize {variant.name}", max(len(batches), 1)) as advance:
        (work.folder / TOKENIZER_NAME).write_bytes((exported.folder / TOKENIZER_NAME).read_bytes())
        file = _BUILDERS[variant.build](exported.folder / ONNX_NAME, work.folder, batches, advance)
        entry = hash_file(work.folder / file)
        disk_bytes = sum(path.stat().st_size for path in work.folder.iterdir())
    return Candidate(
        variant=variant,
        artifact=work.artifact,
        engine=EngineEntry(
            runtime=variant.runtime, file=file, sha256=entry.sha256, size=entry.size, compute=variant.compute
        ),
        max_seq_length=max_length,
        calibration_size=len(texts),
        calibration_digest=corpus.digest if texts else None,
        disk_bytes=disk_bytes,
    )


Batches = list[tuple[Ids, Ids]]

_LAYOUT_OPS = frozenset({"Convert", "Reshape", "Transpose"})
_ELEMENTWISE_OPS = frozenset({"Add", "Divide", "Multiply"})
_ACTIVATION_OPS = frozenset({"Erf", "Gelu", "Relu", "Swish", "Tanh"})


class _Reader:
    """Calibration batches as onnxruntime wants them: anything with `get_next` is its CalibrationDataReader."""

    def __init__(self, batches: Batches, advance: Advance) -> None:
        self._batches, self._advance = iter(batches), advance

    def get_next(self) -> dict[str, Ids] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        self._advance(1)
        return {"input_ids": batch[0], "attention_mask": batch[1]}


def _keep_fp32(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    (folder / ONNX_NAME).write_bytes(source.read_bytes())
    advance(1)
    return ONNX_NAME


def _quantize_dynamic(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  a cached run need not load it

    with _root_logger_silent():
        quantize_dynamic(source, folder / ONNX_NAME, weight_type=QuantType.QInt8, per_channel=True)
    advance(1)
    return ONNX_NAME


def _quantize_static(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """QDQ with MinMax ranges: int8 per-channel weights stored as int8, uint8 activations, only linears quantised.

    MinMax because entropy and percentile ruin BERT and exhaust memory (onnxruntime issues 10571, 10503); uint8
    because symmetric int8 activations measured cosine 0.977 against 0.991 and ran 1.6 times slower (docs/log.md).
    """
    # A cached run need not load it.
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    prepared = folder / "prepared.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    with _root_logger_silent():
        quantize_static(
            prepared,
            folder / ONNX_NAME,
            _Reader(batches, advance),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "WeightSymmetric": True,
                "MatMulConstBOnly": True,
                "DedicatedQDQPair": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"],
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            },
        )
    prepared.unlink()
    return ONNX_NAME


def _quantize_openvino(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    """INT8 for the linears that bear it; what follows an activation function and attention's products stay float.

    That is closer to the teacher and no slower (docs/log.md): those inputs are skewed, and requantising costs time.
    """
    import nncf  # noqa: PLC0415  a cached run need not load it
    import openvino as ov  # noqa: PLC0415

    def feed(batch: tuple[Ids, Ids]) -> dict[str, Ids]:
        advance(1)
        return {"input_ids": batch[0], "attention_mask": batch[1]}

    nncf.set_log_level(logging.ERROR)
    model = ov.Core().read_model(source)
    with redirect_stdout(sys.stderr):  # its progress bars: stdout is for results
        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches, feed),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=_float_products(model)),
            # Bias correction left the cosine as it was and cost recall@10: 0.28 % with it, -0.35 % without.
            advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
        )
    return _save_ir(quantized, folder)


def _float_products(model: Any) -> list[str]:
    """Names of the matrix products of an OpenVINO model to leave in float: attention's, and those fed by an activation
    function (the feed-forward's second)."""
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul"]
    return [
        product.get_friendly_name()
        for product in products
        if not _is_weight(product.input_value(1).get_node()) or _is_activation(product.input_value(0).get_node())
    ]


def _is_weight(node: Any) -> bool:
    while node.get_type_name() in _LAYOUT_OPS:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _is_activation(node: Any) -> bool:
    """Whether `node` is the output of an activation function, GELU written out in its parts included."""
    kind = node.get_type_name()
    return kind in _ACTIVATION_OPS or (
        kind in _ELEMENTWISE_OPS and any(_is_activation(value.get_node()) for value in node.input_values())
    )


def _convert_openvino(source: Path, folder: Path, batches: Batches, advance: Advance) -> str:
    import openvino as ov  # noqa: PLC0415  a cached run need not load it

    file = _save_ir(ov.Core().read_model(source), folder)
    advance(1)
    return file


def _save_ir(model: Any, folder: Path) -> str:
    """Write OpenVINO IR; weights that are not quantised are stored as fp16."""
    import openvino as ov  # noqa: PLC0415

    try:
        ov.save_model(model, folder / "model.xml", compress_to_fp16=True)
    except RuntimeError as error:
        # All it says of a disk with no room for the file, which it has removed again by now.
        if "iostream error" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
    return "model.xml"


_BUILDERS: dict[Build, Callable[[Path, Path, Batches, Advance], str]] = {
    "fp32-onnx": _keep_fp32,
    "int8-dynamic": _quantize_dynamic,
    "int8-static": _quantize_static,
    "int8-openvino": _quantize_openvino,
    "bf16-openvino": _convert_openvino,
}


@contextmanager
def _root_logger_silent() -> Iterator[None]:
    """Drop what onnxruntime's quantiser logs on the root logger: advice to do what was just done."""

    def refuse(record: logging.LogRecord) -> bool:
        return False

    logging.getLogger().addFilter(refuse)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(refuse)
