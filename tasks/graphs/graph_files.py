"""ONNX files: a graph with its weights inside or, where protobuf could not hold them, in one file beside it."""

import shutil
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from registry.staging import staged_folder
from serving.engines.plans import weights_of
from tasks.state import state_dir

MAX_INLINE_BYTES = 1 << 30  # protobuf refuses to write a message of 2 GiB, and reading one takes its size twice
MIN_APART_BYTES = 1024  # what is smaller stays in the graph: shapes and axes, which shape inference reads
_PAGE_BYTES = 4096  # where weights begin in their file, so that it can be mapped

Weights = dict[str, NDArray[Any]]


def read_model(path: Path) -> tuple[Any, Weights]:
    """The graph at `path`, a ModelProto whose constants from 1 KiB on are mere references, and those by name."""
    import onnx  # noqa: PLC0415  a cached run need not load it

    whole = onnx.load(path)
    weights: Weights = {}
    for index, tensor in enumerate(whole.graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if values.nbytes >= MIN_APART_BYTES:
            weights[tensor.name] = values
            whole.graph.initializer[index].CopyFrom(refer_to(tensor.name, values))
    light = onnx.ModelProto()
    light.CopyFrom(whole)  # the memory of what was taken out is free only with the message it was in
    return light, weights


def refer_to(name: str, values: NDArray[Any]) -> Any:
    """The tensor's name, type and shape, without its values."""
    from onnx import TensorProto, helper  # noqa: PLC0415  a cached run need not load it

    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=values.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="weights")  # until it is written
    return tensor


def attach_weights(model: Any, weights: Weights) -> Any:
    """A copy of `model` that holds its weights itself."""
    from onnx import numpy_helper  # noqa: PLC0415  a cached run need not load it

    whole = type(model)()
    whole.CopyFrom(model)
    for tensor in whole.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    return whole


def is_large(weights: Weights) -> bool:
    """Whether weights are kept in a file of their own."""
    return sum(values.nbytes for values in weights.values()) > MAX_INLINE_BYTES


def write_model(model: Any, weights: Weights, path: Path) -> None:
    """Write `path` and, for a large model, `path` with `.data` behind its name. Equal models give equal bytes."""
    if not is_large(weights):
        weights_of(path).unlink(missing_ok=True)
        path.write_bytes(attach_weights(model, weights).SerializeToString(deterministic=True))
        return
    placed = type(model)()
    placed.CopyFrom(model)
    with weights_of(path).open("wb") as stream:
        for tensor in placed.graph.initializer:
            if tensor.name in weights:
                stream.write(b"\0" * (-stream.tell() % _PAGE_BYTES))
                place = {"location": weights_of(path).name, "offset": stream.tell()}
                place["length"] = stream.write(weights[tensor.name].tobytes())
                del tensor.external_data[:]
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(placed.SerializeToString(deterministic=True))


def copy_model_files(path: Path, folder: Path) -> None:
    """Copy a graph to `folder`, with the file of its weights where it has one."""
    for file in (path, weights_of(path)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def gather_weights(traced: Path, path: Path) -> None:
    """Move the graph `traced` to `path`; a large one, which the tracer may have spread over many files, as ours are."""
    if sum(file.stat().st_size for file in traced.parent.iterdir()) <= MAX_INLINE_BYTES:
        traced.rename(path)
    else:
        write_model(*read_model(traced), path)


def open_model(model: Any, weights: Weights, options: Any) -> Any:
    """An onnxruntime session on the CPU; a large model goes through a temporary file."""
    import onnxruntime as ort  # noqa: PLC0415  a cached run need not load it

    providers = ["CPUExecutionProvider"]
    if not is_large(weights):
        return ort.InferenceSession(attach_weights(model, weights).SerializeToString(), options, providers=providers)
    state_dir().mkdir(parents=True, exist_ok=True)
    with staged_folder(state_dir(), "graph") as folder:
        path = folder / "model.onnx"
        write_model(model, weights, path)
        return ort.InferenceSession(str(path), options, providers=providers)
