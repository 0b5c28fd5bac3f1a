"""Variants that OpenVINO runs: INT8 by NNCF, and bf16 arithmetic on the graph as exported."""

import errno
import logging
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from serving.tokenizer import Ids
from tasks.progress import Advance
from tasks.quantization.built import Built
from tasks.quantization.calibrate import Batches

_LAYOUT_OPS = frozenset({"Convert", "Reshape", "Transpose"})
_ELEMENTWISE_OPS = frozenset({"Add", "Divide", "Multiply"})
_ACTIVATION_OPS = frozenset({"Erf", "Gelu", "Relu", "Swish", "Tanh"})


def quantize_openvino(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
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
    return Built(save_ir(quantized, folder))


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


def convert_openvino(source: Path, folder: Path, batches: Batches, advance: Advance) -> Built:
    """The exported graph as OpenVINO IR."""
    import openvino as ov  # noqa: PLC0415  a cached run need not load it

    file = save_ir(ov.Core().read_model(source), folder)
    advance(1)
    return Built(file)


def save_ir(model: Any, folder: Path) -> str:
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
