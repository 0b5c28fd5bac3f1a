"""The avx512 engine: BERT-family encoders in 8-bit integers, on our own kernels for processors with AVX-512 VNNI.

Its file is one safetensors file: `words` int8 [V, H] with `words.scale` [V], `positions` [P, H] (type 0 added), `norm`
[2, H] (weight, bias), and for each layer i and linear layer `qkv`, `out`, `up` and `down`: `layers.i.qkv` int8
[out, in], `layers.i.qkv.scale` and `layers.i.qkv.bias` [out], with `layers.i.norm1` and `layers.i.norm2` [2, H]. The
inputs of `qkv` and `up` are multiplied by `layers.i.qkv.factor` [in] first. What is not int8 is float32; `config` of
the metadata is JSON with `heads`, `eps`, `pooling` and `normalize`.
"""

import ctypes
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from serving.engines import Embeddings, num_cores
from serving.engines.packing import Limits, check_batch, split_rows
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids

_POOLINGS = ("mean", "cls", "lasttoken")  # as the library counts them
SMOOTHED = ("qkv", "up")  # linear layers whose inputs have a factor by channel
_LIBRARY = "serving.kernels._avx512"
# A tile of a product is so many columns wide; a head is read in pairs of registers.
_COLUMNS, _HEAD_STEP = 64, 32
_MAX_THREADS = 64
# Tokens of one run for each of its threads unless a text has more: what lies between two layers stays in the cache.
_RUN_TOKENS = 192
_ALIGNMENT = 64


class _Linear(ctypes.Structure):
    _fields_ = (
        ("n", ctypes.c_int32),
        ("k", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "sum", "bias", "factor")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("norm1", "norm2")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("hidden", "heads", "ffn", "num_layers", "num_positions", "pooling", "normalize")
        ),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("words", "word_scales", "positions", "norm", "layers")),
    )


def find_problem() -> str | None:
    """Why the engine cannot run here and what to do; None where it can."""
    try:
        library = _load_library()
    except EngineUnavailable as error:
        return str(error)
    if not library.encoder_is_supported():
        return "this processor has no AVX-512 VNNI: serve a bundle of onnxruntime or openvino"
    return None


def check_sizes(path: Path, hidden: int, ffn: int, heads: int) -> None:
    """Raises EngineUnavailable for a model, described by `path`, whose sizes the kernels do not know."""
    for name, size in (("hidden", hidden), ("intermediate", ffn)):
        if size % _COLUMNS:
            raise EngineUnavailable(f"{path}: {name} size {size} is no multiple of {_COLUMNS}")
    if heads < 1 or hidden % (heads * _HEAD_STEP):
        raise EngineUnavailable(f"{path}: {heads} heads of {hidden} are not multiples of {_HEAD_STEP} wide")


class Avx512Engine:
    """Runs a file as the module describes it; texts are packed, so a batch costs what its texts do."""

    compiles_shapes, is_packed = False, True
    runtime = "avx512"

    def __init__(self, path: Path, num_threads: int = 0, num_instances: int = 1) -> None:
        """Load `path`: `num_instances` runs at a time, each on `num_threads` (0: all cores). Raises EngineUnavailable.

        Refused are a file that is short or damaged, sizes the kernels do not know, and a processor without AVX-512.
        """
        problem = find_problem()
        if problem is not None:
            raise EngineUnavailable(problem)
        self._library = _load_library()
        self._weights: _Weights | None = _share_weights(path)
        self.limits, self._hidden = self._weights.limits, self._weights.model.hidden
        threads = min(num_threads or num_cores(), _MAX_THREADS)
        self._run_tokens = _RUN_TOKENS * threads
        max_tokens = max(self._run_tokens, self.limits.positions)
        self._runners: SimpleQueue[int] = SimpleQueue()
        for _ in range(num_instances):
            runner = self._library.encoder_open(ctypes.addressof(self._weights.model), max_tokens, threads)
            if not runner:
                self.close()
                raise EngineUnavailable(f"no memory for runs of {max_tokens} tokens on {threads} threads")
            self._runners.put(runner)

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`. Raises ValueError for ids and masks that the kernels must not see."""
        lengths = check_batch(input_ids, attention_mask, self.limits)
        weights = self._weights  # stay until the run ends, whoever closes the engine
        assert weights is not None, "the engine is closed"
        vectors = np.empty((len(input_ids), self._hidden), dtype=np.float32)
        runner = self._runners.get()
        try:
            for rows in split_rows(lengths, self._run_tokens, len(lengths)):
                ids = input_ids[rows][attention_mask[rows].astype(bool)].astype(np.int32)
                starts = np.concatenate(([0], np.cumsum(lengths[rows]))).astype(np.int32)
                out = vectors[rows]
                self._library.encoder_run(runner, ids.ctypes.data, starts.ctypes.data, len(starts) - 1, out.ctypes.data)
        finally:
            self._runners.put(runner)
            if self._weights is None:
                self.close()
        return vectors

    def close(self) -> None:
        """See `Engine.close`. What a run has is freed when the run ends."""
        while not self._runners.empty():
            self._library.encoder_close(self._runners.get())
        self._weights = None


def _load_library() -> ctypes.CDLL:
    """The compiled kernels. Raises EngineUnavailable."""
    found = find_spec(_LIBRARY)
    if found is None or found.origin is None:
        raise EngineUnavailable(
            "the avx512 kernels were not compiled: they need Linux on x86-64 and a C compiler when thorforge is "
            "installed (apt install gcc, then pip install again)"
        )
    try:
        library = ctypes.CDLL(found.origin)
    except OSError as error:  # compiled for another system
        raise EngineUnavailable(f"the avx512 kernels do not load: {error}: install thorforge anew") from None
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.encoder_open.argtypes, library.encoder_open.restype = (pointer, integer, integer), pointer
    library.encoder_run.argtypes, library.encoder_run.restype = (pointer, pointer, pointer, integer, pointer), None
    library.encoder_close.argtypes, library.encoder_close.restype = (pointer,), None
    return library


# Weights by file, while an engine has them: runs of another width need no copy of their own.
_shared: "WeakValueDictionary[tuple[int, ...], _Weights]" = WeakValueDictionary()
_sharing = threading.Lock()


def _share_weights(path: Path) -> "_Weights":
    """The weights of a file, read unless an engine has them. Raises EngineUnavailable."""
    with _sharing, _reading(path) as file:
        status = path.stat()
        key = (status.st_dev, status.st_ino, status.st_size, status.st_ctime_ns)
        weights = _shared.get(key)
        if weights is None:
            weights = _shared[key] = _Weights(path, file)
        return weights


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise EngineUnavailable(f"{path} cannot be read: {error}") from None


class _Weights:
    """The model as the library sees it, and the arrays it points into."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file, self._kept = path, file, list[Any]()
        self._names = set(file.keys())
        vocabulary, hidden = self._size("words")
        positions, _ = self._size("positions")
        ffn, _ = self._size("layers.0.up")
        num_layers = len({name.split(".")[1] for name in self._names if name.startswith("layers.")})
        options = self._read_options()
        check_sizes(path, hidden, ffn, options["heads"])
        layers = (_Layer * num_layers)(*(self._layer(i, hidden, ffn) for i in range(num_layers)))
        self._kept.append(layers)
        self.limits = Limits(vocabulary, positions)
        self.model = _Model(
            hidden,
            options["heads"],
            ffn,
            num_layers,
            positions,
            _POOLINGS.index(options["pooling"]),
            options["normalize"],
            options["eps"],
            self._keep(self._tensor("words", np.int8, vocabulary, hidden)),
            self._keep(self._tensor("words.scale", np.float32, vocabulary)),
            self._keep(self._tensor("positions", np.float32, positions, hidden)),
            self._keep(self._tensor("norm", np.float32, 2, hidden)),
            ctypes.addressof(layers),
        )

    def _layer(self, number: int, hidden: int, ffn: int) -> _Layer:
        name = f"layers.{number}."
        return _Layer(
            self._linear(f"{name}qkv", 3 * hidden, hidden),
            self._linear(f"{name}out", hidden, hidden),
            self._linear(f"{name}up", ffn, hidden),
            self._linear(f"{name}down", hidden, ffn),
            self._keep(self._tensor(f"{name}norm1", np.float32, 2, hidden)),
            self._keep(self._tensor(f"{name}norm2", np.float32, 2, hidden)),
        )

    def _linear(self, name: str, n: int, k: int) -> _Linear:
        weight = self._tensor(name, np.int8, n, k)
        scale = self._tensor(f"{name}.scale", np.float32, n)
        packed = weight.view(np.int32).reshape(n // _COLUMNS, _COLUMNS, k // 4).transpose(0, 2, 1)  # four at a time
        sums = (weight.sum(axis=1, dtype=np.int32) * scale).astype(np.float32)
        bias = self._tensor(f"{name}.bias", np.float32, n)
        factor = self._keep(self._tensor(f"{name}.factor", np.float32, k)) if name.endswith(SMOOTHED) else None
        return _Linear(n, k, *map(self._keep, (packed, scale, sums, bias)), factor)

    def _keep(self, array: NDArray[Any]) -> int:
        """The address of a contiguous, aligned copy that lives as long as the model."""
        space = np.empty(array.nbytes + _ALIGNMENT, dtype=np.uint8)
        start = -space.ctypes.data % _ALIGNMENT
        copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        self._kept.append(space)
        address: int = copy.ctypes.data
        return address

    def _read_options(self) -> dict[str, Any]:
        try:
            options: dict[str, Any] = json.loads((self._file.metadata() or {})["config"])
        except (KeyError, ValueError):
            raise EngineUnavailable(f"{self._path} has no config in its metadata") from None
        fits = {
            "heads": type(options.get("heads")) is int,
            "eps": type(options.get("eps")) is float,
            "pooling": options.get("pooling") in _POOLINGS,
            "normalize": type(options.get("normalize")) is bool,
        }
        for name, is_fitting in fits.items():
            if not is_fitting:
                raise EngineUnavailable(
                    f"{self._path}: {name} is {options.get(name)!r}, which the engine does not know"
                )
        return options

    def _size(self, name: str) -> tuple[int, int]:
        if name not in self._names:
            raise EngineUnavailable(f"{self._path} holds no tensor {name}")
        shape = self._file.get_slice(name).get_shape()
        if len(shape) != 2:
            raise EngineUnavailable(f"{self._path}: {name} is {tuple(shape)}, it must have two dimensions")
        return shape[0], shape[1]

    def _tensor(self, name: str, dtype: type[Any], *shape: int) -> NDArray[Any]:
        if name not in self._names:
            raise EngineUnavailable(f"{self._path} holds no tensor {name}")
        tensor: NDArray[Any] = self._file.get_tensor(name)
        if tensor.shape != shape or tensor.dtype != dtype:
            found, wanted = f"{tensor.dtype} {tensor.shape}", f"{np.dtype(dtype)} {shape}"
            raise EngineUnavailable(f"{self._path}: {name} is {found}, it must be {wanted}")
        return tensor
