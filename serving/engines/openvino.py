"""OpenVINO on the CPU."""

from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from serving.engines import Embeddings
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids

# No int8 kernels for FakeQuantize, nor for float inputs of int8 weights.
_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


class OpenVinoEngine:
    """Runs an OpenVINO IR (or ONNX) graph; `compute` is the arithmetic of layers that are not quantised."""

    is_packed = False
    compiles_shapes = True  # kernels of its CPU plugin are generated for each shape

    def __init__(
        self,
        path: Path,
        compute: str = "f32",
        num_threads: int = 0,
        num_instances: int = 1,
        cache: Path | None = None,
        is_exact: bool = False,
    ) -> None:
        """Compile `path` for the CPU: `num_instances` runs at a time, each on `num_threads` (0: all cores).

        What is compiled is kept in the folder `cache`, and taken from there. `is_exact` computes FakeQuantize and the
        rest as they are written, in float32, slowly: int8 kernels saturate on processors without VNNI. Raises
        EngineUnavailable.
        """
        try:
            import openvino as ov  # noqa: PLC0415  an optional extra
        except ImportError:
            raise EngineUnavailable("openvino is not installed: pip install '.[openvino]' in the checkout") from None
        options = {"INFERENCE_PRECISION_HINT": compute, "NUM_STREAMS": str(num_instances)}
        if is_exact:
            options |= _EXACT
        if num_threads:
            options["INFERENCE_NUM_THREADS"] = str(num_threads * num_instances)
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        try:
            self._model = ov.Core().compile_model(str(path), "CPU", options)
            self._inputs = [self._model.input(name) for name in ("input_ids", "attention_mask")]
        except Exception as error:  # openvino raises bare RuntimeError and Exception
            raise EngineUnavailable(f"openvino {ov.__version__} cannot load {path}: {error}") from None
        self._make_tensor = ov.Tensor
        self._requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(num_instances):
            self._requests.put(self._model.create_infer_request())
        self.runtime = f"openvino {ov.__version__.split('-')[0]}"

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`."""
        request = self._requests.get()
        try:
            # What `infer(feeds)` does, without its dispatching on types: 16 µs under the interpreter's lock, not 40.
            for place, array in zip(self._inputs, (input_ids, attention_mask), strict=True):
                request.set_tensor(place, self._make_tensor(array, shared_memory=True))
            request.start_async()
            request.wait()
            return np.array(request.get_output_tensor(0).data)  # a copy: the request reuses its output memory
        finally:
            self._requests.put(request)

    def close(self) -> None:
        """See `Engine.close`."""
        del self._requests, self._inputs, self._model
