from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.errors import TeacherRejected
from tasks.models.teacher import load_teacher
from tasks.models.weights import check_finite, count_parameters, is_of_a_layer

NAME = "encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_load_teacher_names_the_tensor_that_is_not_finite(value: float, teacher_copy: Path) -> None:
    path = teacher_copy / "model.safetensors"
    tensors = load_file(path)
    tensors[NAME].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(TeacherRejected, match=rf"tensor '{NAME}' holds NaN or Inf, first at element 5 of \d+"):
        load_teacher.fn(str(teacher_copy))


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_check_finite_reads_every_width_of_floats(kind: torch.dtype, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    good = {"a": torch.tensor([1.0, -3e4, 0.0, 1e-8]).to(kind), "ids": torch.arange(3), "none": torch.zeros(0)}
    save_file(good, path)
    check_finite(path)
    save_file(good | {"b": torch.tensor([1.0, float("nan")]).to(kind)}, path)
    with pytest.raises(TeacherRejected, match="tensor 'b' holds NaN or Inf, first at element 1 of 2"):
        check_finite(path)


def test_count_parameters_tells_layers_from_tables(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    names = {"embeddings.word.weight": 7, "encoder.layer.0.q": 3, "layers.11.norm": 2, "pooler.dense.weight": 5}
    save_file({name: torch.zeros(size) for name, size in names.items()}, path)
    counts = count_parameters(path)
    assert (counts.everything, counts.encoder) == (17, 5)
    assert not is_of_a_layer("layer_norm.weight")
