"""The files that `bench_cuda --minilm` takes hold the model whose vectors lie beside them."""

from pathlib import Path

import numpy as np

from benchmarks.cuda_files import write_files
from serving.engines.bert import Packed, encode, load_weights, read_config
from serving.engines.e4m3 import ExactE4M3
from tests.forge import CALIBRATION_SIZE, write_corpus

NUM_TEXTS = 12


def test_both_engines_files_give_the_vectors_beside_them(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    write_files(folder, str(tiny_teacher), str(write_corpus(tmp_path / "corpus.jsonl")), NUM_TEXTS, CALIBRATION_SIZE)
    texts = np.load(folder / "texts.npz", allow_pickle=False)
    assert len(texts["lengths"]) == len(texts["vectors"]) == NUM_TEXTS
    batch = Packed.of_rows(np.split(texts["ids"].astype(np.int64), texts["lengths"].cumsum()[:-1]))
    config = read_config(folder / "config.json")
    plain = encode(load_weights(folder / "model.safetensors", config), config, batch).numpy()
    assert (plain * texts["vectors"]).sum(axis=1).min() > 0.9999
    config = read_config(folder / "fp8" / "config.json")
    narrow = ExactE4M3(load_weights(folder / "fp8" / "model.safetensors", config), config).encode(batch).numpy()
    cosines = (narrow * texts["vectors"]).sum(axis=1)
    assert 0.9 < cosines.mean() < 0.99999
