"""A real, tiny teacher: a random BERT, or one of another family, that sentence-transformers itself writes."""

import shutil
from pathlib import Path
from typing import Any

from tests.texts import make_sentences

HIDDEN, MAX_LENGTH, POSITIONS = 32, 48, 64
# What other families of encoders and decoders call their sizes, or want beside them.
_DISTILBERT = {"dim": HIDDEN, "n_heads": 4, "hidden_dim": 64}
_T5 = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_heads": 4}
_DECODER = {"head_dim": 8, "num_key_value_heads": 2}
_EXTRA: dict[str, dict[str, Any]] = {
    "bert": {"initializer_range": 0.1},  # with the usual 0.02 random layers give every text nearly the same embedding
    "distilbert": _DISTILBERT,
    "modernbert": {
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "initializer_range": 0.1,
    },
    "qwen3": _DECODER,
    "gemma3_text": _DECODER,
    "t5": _T5,
}


def make_teacher(folder: Path, layers: int = 2, family: str = "bert") -> Path:
    """Write a sentence-transformers folder (Transformer, mean Pooling, Normalize; safetensors) with random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoConfig, AutoModel, BertTokenizerFast, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = BertWordPieceTokenizer()
    words.train_from_iterator(make_sentences(400), vocab_size=400, min_frequency=1, show_progress=False)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=words.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        **_EXTRA.get(family, {}),
    )
    parts = folder.with_name(f"{folder.name}-parts")
    model = T5EncoderModel(config) if family == "t5" else AutoModel.from_config(config)
    model.save_pretrained(parts)
    BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=MAX_LENGTH).save_pretrained(parts)
    modules = [Transformer(str(parts)), Pooling(HIDDEN), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    shutil.rmtree(parts)
    return folder
