"""A real, tiny teacher: a random BERT that sentence-transformers itself writes as a model folder."""

import shutil
from pathlib import Path

from tests.texts import make_sentences

HIDDEN, MAX_LENGTH, POSITIONS = 32, 48, 64


def make_teacher(folder: Path, layers: int = 2) -> Path:
    """Write a sentence-transformers folder (Transformer, mean Pooling, Normalize; safetensors) with random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = BertWordPieceTokenizer()
    words.train_from_iterator(make_sentences(400), vocab_size=400, min_frequency=1, show_progress=False)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        initializer_range=0.1,  # with the usual 0.02 two random layers give every text nearly the same embedding
    )
    parts = folder.with_name(f"{folder.name}-parts")
    BertModel(config).save_pretrained(parts)
    BertTokenizerFast(tokenizer_object=words._tokenizer, model_max_length=MAX_LENGTH).save_pretrained(parts)
    modules = [Transformer(str(parts)), Pooling(HIDDEN), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    shutil.rmtree(parts)
    return folder
