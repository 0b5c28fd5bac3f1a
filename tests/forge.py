"""What `optimize` makes of the tiny teacher, step by step and without Prefect, for tests of single steps."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.texts import make_pairs

if TYPE_CHECKING:
    from tasks.artifacts import Artifact
    from tasks.select import Study

NUM_PAIRS, CALIBRATION_SIZE = 200, 16
FORGED = ("fp32-onnx", "int8-dynamic", "int8-static", "int8-openvino", "bf16-openvino")


@dataclass(frozen=True, slots=True)
class Forge:
    """A finished study of all five variants, and the folder its artifacts lie in."""

    state: Path
    exported: "Artifact"
    teacher_embeddings: "Artifact"
    study: "Study"


def write_corpus(path: Path, count: int = NUM_PAIRS) -> Path:
    """A jsonl corpus of query and text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(count)), encoding="utf-8")
    return path


def write_sts(path: Path, sentences: list[str]) -> Path:
    """An STS file that rates each sentence with the next, the later the higher."""
    pairs = zip(sentences[::2], sentences[1::2], strict=True)
    rows = [f"{score}\t{first}\t{second}" for score, (first, second) in enumerate(pairs)]
    path.write_text("\n".join(["score\tsentence1\tsentence2", *rows]) + "\n", encoding="utf-8")
    return path


def build_forge(root: Path, teacher_folder: Path) -> Forge:
    """Run every step once below `root`; `$THORFORGE_HOME` must be `root / "state"`."""
    from registry.gate import GateLimits
    from tasks.benchmark import benchmark
    from tasks.corpus import build_corpus, corpus_fingerprint
    from tasks.evaluate import evaluate
    from tasks.export import export_onnx
    from tasks.models.teacher import embed_teacher, load_teacher
    from tasks.quantize import quantize
    from tasks.select import Study, select
    from tasks.variants import VARIANTS

    uri = str(write_corpus(root / "corpus.jsonl"))
    teacher = load_teacher.fn(str(teacher_folder))
    corpus = build_corpus.fn(uri, (), corpus_fingerprint(uri))
    exported, embeddings = export_onnx.fn(teacher), embed_teacher.fn(teacher, corpus)
    length = teacher.max_seq_length
    candidates = [
        quantize.fn(v, exported, length, corpus, CALIBRATION_SIZE) for v in VARIANTS.values() if v.name in FORGED
    ]
    qualities = [evaluate.fn(candidate, corpus, embeddings, "here") for candidate in candidates]
    speeds = benchmark.fn(candidates, teacher, corpus, "a test's machine", None)
    study = Study(
        teacher=teacher,
        corpus_uri=uri,
        corpus=corpus,
        speeds=speeds,
        limits=GateLimits(),
        judged=tuple(select.fn(candidates, qualities, speeds, GateLimits(), {(): teacher})),
    )
    return Forge(root / "state", exported, embeddings, study)
