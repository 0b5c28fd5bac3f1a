"""Export: the teacher as one ONNX graph with pooling and L2 normalisation inside."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any

import numpy as np
from prefect import task

from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.tokenizer import TOKENIZER_NAME, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact, draft
from tasks.errors import ExportFailed
from tasks.graphs.graph_files import gather_weights
from tasks.models.teacher import BERT_TYPES, Teacher, load_sentence_transformer

ONNX_NAME = "model.onnx"
# Opset 17 is the first with LayerNormalization. The TorchScript exporter is chosen over the dynamo one because
# onnxruntime fuses its attention: batch 32 × 32 tokens in 62 ms against 77 to 79 ms on 2 cores (docs/log.md).
_OPSET = 17
_MASKED = -1e4  # its exponential is 0, and it fits float16, in which infinity times 0 would be NaN
_PARITY_LIMIT = 1e-5
_PROBES = ("a", "The quick brown fox jumps over the lazy dog.", "naïve café 你好 🙂 שלום", "word " * 400)


@task(task_run_name="export", cache_policy=CACHED, persist_result=True, result_serializer="json")
def export_onnx(teacher: Teacher) -> Artifact:
    """Write `tokenizer.json` and `model.onnx`: input_ids, attention_mask int64 [B, T] → sentence_embedding [B, D].

    Weights above 1 GiB go to `model.onnx.data`.

    Raises ExportFailed for a model that cannot be traced, named by the module that stopped it, and when the graph's
    embeddings differ from sentence-transformers' by more than 1e-5.
    """
    model = load_sentence_transformer(teacher.folder)
    with draft("export") as work:
        shutil.copyfile(teacher.tokenizer, work.folder / TOKENIZER_NAME)
        with TemporaryDirectory(prefix="traced-", dir=work.folder) as traced:
            _export(model, teacher, Path(traced) / ONNX_NAME)
            gather_weights(Path(traced) / ONNX_NAME, work.folder / ONNX_NAME)
        error = measure_parity(model, work.folder, teacher.max_seq_length)
        if not error <= _PARITY_LIMIT:
            raise ExportFailed(f"{teacher.name}: the exported graph is off by {error:.2e}, limit {_PARITY_LIMIT:.0e}")
    return work.artifact


def measure_parity(model: Any, folder: Path, max_length: int) -> float:
    """Largest absolute difference between the graph's and sentence-transformers' embeddings, alone and in a batch."""
    expected = model.encode(list(_PROBES), show_progress_bar=False)
    ids = TextTokenizer.from_folder(folder, max_length).encode(_PROBES)
    engine = OnnxRuntimeEngine(folder / ONNX_NAME)
    batch = engine.embed(*pad_batch(ids))
    singles = np.concatenate([engine.embed(*pad_batch([row])) for row in ids])
    engine.close()
    return float(max(np.abs(batch - expected).max(), np.abs(singles - expected).max()))


def _export(model: Any, teacher: Teacher, path: Path) -> None:
    import torch  # noqa: PLC0415  seconds that a cached run need not pay

    class EmbeddingGraph(torch.nn.Module):
        """Transformer, pooling and normalisation as one module."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = model[0].auto_model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            mask = attention_mask
            # BERTs take a float mask [B, 1, 1, T] as it is; others build theirs of 60 nodes, 5 % of a lone text's time.
            if self.encoder.config.model_type in BERT_TYPES:
                mask = (1 - attention_mask[:, None, None, :].to(torch.float32)) * _MASKED
            hidden = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
            pooled = _pool(hidden, attention_mask, teacher.pooling)
            return torch.nn.functional.normalize(pooled, p=2, dim=1) if teacher.normalize else pooled

    # Two rows of different length: an example with a dimension of 1, or no padding, would freeze it in the trace.
    ids = torch.randint(5, 100, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    axes = {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}}
    with _attention_written_out(model[0].auto_model), warnings.catch_warnings(), torch.inference_mode():
        # The tracer warns of itself being deprecated and of shape checks that hold for every input.
        warnings.simplefilter("ignore")
        graph = EmbeddingGraph().eval()
        with _failure_named(teacher.name, graph):
            torch.onnx.export(
                graph,
                (ids, mask),
                str(path),
                dynamo=False,
                opset_version=_OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=["sentence_embedding"],
                dynamic_axes={**axes, "sentence_embedding": {0: "batch"}},
            )


@contextmanager
def _failure_named(name: str, graph: Any) -> Iterator[None]:
    """Raises ExportFailed for whatever stops the exporter inside, with the module of `graph` that it came from."""
    try:
        yield
    except Exception as error:  # torch raises what its tracer, its converter and the model itself raise
        place = _find_module(graph, error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExportFailed(f"{name} cannot be exported to ONNX{f', {place}' if place else ''}: {reason}") from error


def _find_module(graph: Any, error: Exception) -> str | None:
    """The innermost module that ran when tracing failed, or whose operator was being converted when that did."""
    names = {id(module): path for path, module in graph.named_modules() if path}
    for frame, _ in reversed(list(walk_tb(error.__traceback__))):
        node: Any = frame.f_locals.get("node")
        if hasattr(node, "scopeName"):  # a.Graph::/b.Encoder::encoder/c.Gate::gate
            parts = (part.rpartition("::")[2] for part in node.scopeName().split("/"))
            return ".".join(part for part in parts if part)
        path = names.get(id(frame.f_locals.get("self")))
        if path:
            return path
    return None


@contextmanager
def _attention_written_out(encoder: Any) -> Iterator[None]:
    """Product, mask, softmax, product: traced, torch's fused attention also checks each row for being masked whole.

    Without those checks 8 texts of 183 tokens take onnxruntime 8 % and OpenVINO 5 % less time (docs/log.md).
    """
    before = encoder.config._attn_implementation
    encoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        encoder.set_attn_implementation(before)


def _pool(hidden: Any, mask: Any, mode: str) -> Any:
    """Token states [B, T, H] to one vector a text [B, H]; padding is on the right."""
    import torch  # noqa: PLC0415

    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        last = mask.sum(dim=1) - 1
        return hidden[torch.arange(hidden.shape[0]), last]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
