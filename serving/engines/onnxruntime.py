"""ONNX Runtime on the CPU, or with its CUDA provider on an NVIDIA GPU."""

from pathlib import Path

from serving.engines import Embeddings, num_cores
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids

# Its kernel adds and normalises one value at a time: 1.0 ms for 512 × 384 values, where an Add and a
# LayerNormalization take 0.15 ms (docs/log.md).
_SLOW_FUSIONS = ["SkipLayerNormFusion"]


class OnnxRuntimeEngine:
    """Runs an exported graph (`input_ids`, `attention_mask` → `sentence_embedding`) with every fusion that pays."""

    compiles_shapes, is_packed = False, False

    def __init__(
        self,
        path: Path,
        num_threads: int = 0,
        is_exact: bool = False,
        compute: str = "f32",
        on_gpu: bool = False,
    ) -> None:
        """Load `path` with `num_threads` (0: one per core) or `on_gpu`. Raises EngineUnavailable.

        `is_exact` computes Q and DQ as they are written, slowly: int8 kernels saturate on processors without VNNI.
        Graphs of `compute` f8 know no other way, onnxruntime has no float8 kernels and its fusions break them.
        """
        try:
            import onnxruntime as ort  # noqa: PLC0415  loading it takes 100 ms a worker on another engine need not pay
        except ImportError:
            raise EngineUnavailable("onnxruntime is not installed: pip install '.[serve]' in the checkout") from None
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or num_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if compute == "f8":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        elif is_exact:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        provider = "CUDAExecutionProvider" if on_gpu else "CPUExecutionProvider"
        if provider not in ort.get_available_providers():
            raise EngineUnavailable(f"onnxruntime {ort.__version__} has no {provider}: pip install onnxruntime-gpu")
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=[provider], disabled_optimizers=[] if on_gpu else _SLOW_FUSIONS
            )
        except Exception as error:  # onnxruntime's errors share no public base class
            raise EngineUnavailable(f"onnxruntime {ort.__version__} cannot load {path}: {error}") from None
        if self._session.get_providers()[0] != provider:  # it takes the CPU by itself where CUDA does not start
            raise EngineUnavailable(f"onnxruntime {ort.__version__} cannot start its {provider}: see nvidia-smi")
        self.runtime = f"onnxruntime {ort.__version__}" + (" cuda" if on_gpu else "")

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        embeddings: Embeddings = self._session.run(["sentence_embedding"], feeds)[0]
        return embeddings

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session
