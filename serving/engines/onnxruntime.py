"""ONNX Runtime on the CPU."""

from pathlib import Path

from serving.engines import Embeddings, num_cores
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids

# Its kernel adds and normalises one value at a time: 1.0 ms for 512 × 384 values, where an Add and a
# LayerNormalization take 0.15 ms (docs/log.md).
_SLOW_FUSIONS = ["SkipLayerNormFusion"]


class OnnxRuntimeEngine:
    """Runs an exported graph (`input_ids`, `attention_mask` → `sentence_embedding`) with every fusion that pays."""

    compiles_shapes = False

    def __init__(self, path: Path, num_threads: int = 0, is_exact: bool = False, compute: str = "f32") -> None:
        """Load `path` with `num_threads` (0: one per core). Raises EngineUnavailable.

        `is_exact` computes Q and DQ as they are written, slowly: int8 kernels saturate on processors without VNNI.
        Graphs of `compute` f8 know no other way, onnxruntime has no float8 kernels and its fusions break them.
        """
        try:
            import onnxruntime as ort  # noqa: PLC0415  loading it takes 100 ms a worker on another engine need not pay
        except ImportError:
            raise EngineUnavailable("onnxruntime is not installed: pip install 'thorforge[serve]'") from None
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads or num_cores()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if compute == "f8":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        elif is_exact:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_SLOW_FUSIONS
            )
        except Exception as error:  # onnxruntime's errors share no public base class
            raise EngineUnavailable(f"onnxruntime {ort.__version__} cannot load {path}: {error}") from None
        self.runtime = f"onnxruntime {ort.__version__}"

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`."""
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        embeddings: Embeddings = self._session.run(["sentence_embedding"], feeds)[0]
        return embeddings

    def close(self) -> None:
        """See `Engine.close`."""
        del self._session
