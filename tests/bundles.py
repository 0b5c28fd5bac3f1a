"""A real, tiny bundle: a word tokenizer and an ONNX graph (table lookup, masked mean, L2 norm) every engine runs."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from registry.manifest import (
    Cosine,
    EngineEntry,
    Lineage,
    Manifest,
    Performance,
    Validation,
    payload_checksum,
    scan_files,
    write_manifest,
)
from serving.tokenizer import TextTokenizer, pad_batch

WORDS = ("hello", "world", "red", "green", "blue", "one", "two", "three", "cat", "dog", "runs", "sleeps")
GOLDEN_TEXTS = tuple(f"{a} {b}" for a in WORDS for b in WORDS)[:64]


def make_tokenizer() -> Tokenizer:
    """`[CLS] words [SEP]` over WORDS; everything else is `[UNK]`."""
    vocabulary = {token: index for index, token in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def make_table(dimension: int, seed: int = 0) -> np.ndarray:
    """The embedding table [V, D], float32."""
    return np.random.default_rng(seed).standard_normal((len(WORDS) + 4, dimension)).astype(np.float32)


def make_graph(table: np.ndarray) -> onnx.ModelProto:
    """Gather → masked mean → L2 normalise, with the pipeline's input and output names."""
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")
    )
    out = helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["b", table.shape[1]])
    constants = [numpy_helper.from_array(table, "table")]
    constants += [numpy_helper.from_array(np.array([axis], dtype=np.int64), f"axis{axis}") for axis in (1, 2)]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "axis2"], ["column"]),
        helper.make_node("Mul", ["tokens", "column"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis1"], ["summed"], keepdims=0),
        helper.make_node("ReduceL2", ["summed", "axis1"], ["norm"], keepdims=1),
        helper.make_node("Div", ["summed", "norm"], ["sentence_embedding"]),
    ]
    graph = helper.make_graph(nodes, "tiny", [ids, mask], [out], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def make_bundle(folder: Path, name: str = "tiny", dimension: int = 8, max_length: int = 16, seed: int = 0) -> str:
    """Write a complete, verified bundle into `folder` and return its digest."""
    folder.mkdir(parents=True)
    table = make_table(dimension, seed)
    onnx.save(make_graph(table), folder / "model.onnx")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    ids, mask = pad_batch(TextTokenizer.from_folder(folder, max_length).encode(GOLDEN_TEXTS))
    summed = (table[ids] * mask[:, :, None]).sum(axis=1)
    golden = (summed / np.linalg.norm(summed, axis=1, keepdims=True)).astype(np.float32)
    np.savez(folder / "golden.npz", input_ids=ids.astype(np.int32), lengths=mask.sum(axis=1), embeddings=golden)
    files = scan_files(folder)
    engine = files["model.onnx"]
    checksum = payload_checksum(files)
    manifest = Manifest(
        model_name=name,
        model_id=f"tests/{name}",
        variant="fp32-onnx",
        version=f"fp32-onnx-{checksum[:12]}",
        dimension=dimension,
        max_seq_length=max_length,
        pooling="mean",
        normalize=True,
        prompts={"query": "red "},
        precision="fp32",
        compatibility="drop-in",
        quantization=None,
        performance=Performance(
            latency_p50_ms=1.0,
            latency_p95_ms=1.0,
            latency_p99_ms=1.0,
            throughput_qps=1.0,
            gpu_memory_mb=None,
            peak_memory_mb=1.0,
            batch_size=32,
            hardware="test",
        ),
        validation=Validation(
            cosine_similarity_vs_fp32=Cosine(mean=1.0, p1=1.0, min=1.0, ci=(1.0, 1.0)),
            overlap_at_10=None,
            recall_at_k=None,
            ndcg_at_10=None,
            cross_recall_at_10=None,
            cross_ndcg_at_10=None,
            sts_spearman=None,
            test_dataset="test",
        ),
        lineage=Lineage(parents={}, recipe={}, git_commit=None, mlflow_run_id=None, versions={}),
        engines=(EngineEntry(runtime="onnxruntime", file="model.onnx", sha256=engine.sha256, size=engine.size),),
        files=files,
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        checksum=checksum,
    )
    return write_manifest(folder, manifest)
