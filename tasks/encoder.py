"""The files of our own engines from a model: float16 weights for cuda, with what E4M3 needs, and int8 for avx512."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prefect import task
from safetensors.torch import load_file, save_file
from torch import Tensor

from registry.manifest import EngineEntry, Runtime, hash_file
from serving.engines import avx512, cuda
from serving.engines.bert import (
    CONFIG_NAME,
    E4M3_NAME,
    E4M3_VERSION,
    BertConfig,
    Packed,
    Weights,
    encode,
    find_prefix,
    keep_by_default,
    list_linears,
    load_weights,
    name_parts,
    parse_config,
    read_config,
)
from serving.engines.e4m3 import BIASES, MATRICES, ExactE4M3, calibrate
from serving.errors import EngineUnavailable
from serving.tokenizer import TOKENIZER_NAME, Ids, TextTokenizer, pad_batch
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import read_calibration
from tasks.models.teacher import Teacher
from tasks.quantization.built import Ranking
from tasks.quantization.calibrate import Batches
from tasks.quantization.e4m3 import choose_weights, round_weights
from tasks.quantization.sensitivity import Probe, rank_layers
from tasks.quantize import Candidate, fitting_texts
from tasks.steps import PruneConfig
from tasks.variants import Variant

ENCODER_NAME, INTEGERS_NAME = "model.safetensors", "encoder.safetensors"
_SMOOTHING, _LEAST = 0.6, 1e-5
_FLOAT_BITS = 16  # of the layers that are not rounded


@task(task_run_name="encoder-{variant.name}", cache_policy=CACHED, persist_result=True, result_serializer="json")
def build_encoder(variant: Variant, teacher: Teacher, corpus: Artifact, calibration_size: int) -> Candidate:
    """A variant of the cuda or the avx512 engine from the weights. Raises CorpusRejected and EngineUnavailable."""
    texts = read_calibration(corpus, calibration_size, variant.name) if variant.is_calibrated else []
    tokenizer = TextTokenizer.from_folder(teacher.tokenizer.parent, teacher.max_seq_length)
    rows = tokenizer.encode(texts) if texts else []
    with draft(variant.name) as work:
        (work.folder / TOKENIZER_NAME).write_bytes(teacher.tokenizer.read_bytes())
        if variant.runtime == "avx512":
            path = write_integers(teacher, work.folder, rows)
        else:
            path = write_encoder(teacher, work.folder, rows)
        limit = variant.qdq.min_cosine if variant.qdq else None
        found = Ranking({}, ())
        if variant.compute == "f8":
            found = round_encoder(path, tokenizer.encode(fitting_texts(corpus)), rows, limit)
        entry = hash_file(path)
        disk_bytes = sum(file.stat().st_size for file in work.folder.iterdir())
    return Candidate(
        variant=variant,
        artifact=work.artifact,
        engine=EngineEntry(
            runtime=variant.runtime, file=path.name, sha256=entry.sha256, size=entry.size, compute=variant.compute
        ),
        max_seq_length=teacher.max_seq_length,
        calibration_size=len(texts),
        calibration_digest=corpus.digest if texts else None,
        disk_bytes=disk_bytes,
        damages=tuple(found.damages.values()),
        curve=found.curve,
    )


def write_encoder(teacher: Teacher, folder: Path, calibration: Sequence[Ids] = ()) -> Path:
    """Write `model.safetensors` (float16) and `config.json` into `folder`; returns the former's path.

    With `calibration` texts (token ids) the file also holds the largest input each linear layer saw, and the largest
    state each norm, which `f8` needs. Raises EngineUnavailable for an architecture or a weight that the cuda engine
    cannot honour.
    """
    source = teacher.tokenizer.parent
    fields = json.loads((source / CONFIG_NAME).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    config_path = folder / CONFIG_NAME
    _write_fields(config_path, fields | {"pooling": teacher.pooling, "normalize": teacher.normalize})
    config = read_config(config_path)
    weights = load_weights(source / ENCODER_NAME, config)
    tensors = {
        name: value.half() for name, value in load_file(source / ENCODER_NAME).items() if value.is_floating_point()
    }
    if len(calibration):
        tensors |= calibrate(weights, config, (Packed.of_rows([row]) for row in calibration))
    path = folder / ENCODER_NAME
    save_file(tensors, path)
    return path


def write_integers(teacher: Teacher, folder: Path, calibration: Sequence[Ids]) -> Path:
    """Write `encoder.safetensors` into `folder`, as `serving.engines.avx512` describes it; returns its path.

    `calibration` texts (token ids) say which channels of the inputs reach far. Raises EngineUnavailable for an
    architecture or a weight that our kernels cannot honour.
    """
    path = folder / INTEGERS_NAME
    save_integers(*_read(teacher, "avx512"), calibration, path)
    return path


def check_fits(variant: Variant, teacher: Teacher) -> None:
    """Raises EngineUnavailable where the variant's engine cannot honour the teacher as the variant's steps leave it."""
    pruning = next((step for step in variant.steps if isinstance(step, PruneConfig)), None)
    if pruning:
        raise EngineUnavailable(
            f"{variant.name}: {pruning} leaves {teacher.name} layers of different shapes, "
            f"which the {variant.runtime} engine does not run: build it for onnxruntime or openvino"
        )
    _read(teacher, variant.runtime)


def _read(teacher: Teacher, runtime: Runtime) -> tuple[Weights, BertConfig]:
    """The weights and the configuration. Raises EngineUnavailable."""
    path = teacher.tokenizer.parent / CONFIG_NAME
    fields = json.loads(path.read_text(encoding="utf-8")) | {"pooling": teacher.pooling, "normalize": teacher.normalize}
    config = parse_config(fields, path)
    if runtime == "avx512":
        avx512.check_sizes(path, config.hidden, config.intermediate, config.heads)
    if runtime == "cuda":
        cuda.check_sizes(path, config)
    return load_weights(path.with_name(ENCODER_NAME), config), config


def save_integers(weights: Weights, config: BertConfig, calibration: Sequence[Ids], path: Path) -> None:
    """Round every weight to int8, rows by their own largest value, and write the avx512 engine's file."""
    reach = measure_reach(weights, config, calibration)
    tensors = {"positions": weights.positions, "norm": torch.stack((weights.norm_weight, weights.norm_bias))}
    tensors |= _round("words", weights.words)
    for number, layer in enumerate(weights.layers):
        name = f"layers.{number}."
        for linear, part in enumerate(("qkv", "out", "up", "down")):
            weight = getattr(layer, f"{part}_weight")
            if part in avx512.SMOOTHED:
                factor = choose_factor(weight, reach[number, linear])
                weight, tensors[f"{name}{part}.factor"] = weight / factor, factor
            tensors |= _round(f"{name}{part}", weight)
            tensors[f"{name}{part}.bias"] = getattr(layer, f"{part}_bias")
        tensors[f"{name}norm1"] = torch.stack((layer.out_norm_weight, layer.out_norm_bias))
        tensors[f"{name}norm2"] = torch.stack((layer.down_norm_weight, layer.down_norm_bias))
    options = {"heads": config.heads, "eps": config.eps, "pooling": config.pooling, "normalize": config.normalize}
    # One key: the library writes several in an order of chance, and the file has a digest.
    save_file(tensors, path, {"config": json.dumps(options)})


def measure_reach(weights: Weights, config: BertConfig, rows: Sequence[Ids]) -> dict[tuple[int, int], Tensor]:
    """The largest magnitude of every input channel, by layer and linear layer, over texts (token ids)."""
    reach: dict[tuple[int, int], Tensor] = {}

    def see(layer: int, linear: int, x: Tensor) -> Tensor:
        largest = x.abs().amax(dim=0)
        reach[layer, linear] = torch.maximum(reach.get((layer, linear), largest), largest)
        return x

    for row in rows:
        encode(weights, config, Packed.of_rows([row]), see)
    return reach


def choose_factor(weight: Tensor, reach: Tensor) -> Tensor:
    """What inputs of `weight` [out, in] are multiplied by [in], so that few channels no longer span the eight bits.

    SmoothQuant (arXiv 2211.10438), with the mean kept; its exponent is measured in docs/log.md.
    """
    spread = reach.clamp_min(_LEAST) ** _SMOOTHING / weight.abs().amax(dim=0).clamp_min(_LEAST) ** (1 - _SMOOTHING)
    return spread.mean() / spread


def _round(name: str, weight: Tensor) -> dict[str, Tensor]:
    """`weight` [out, in] as int8, with the scale of each row [out]."""
    scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return {name: (weight / scale[:, None]).round().to(torch.int8), f"{name}.scale": scale}


def round_encoder(path: Path, texts: Sequence[Ids], calibration: Sequence[Ids], min_cosine: float | None) -> Ranking:
    """Choose the linear layers that `f8` leaves in float16 for `min_cosine`, and round the weights of the others.

    `path` is what `write_encoder` wrote with the same `calibration`; the choice goes into `config.json` beside it. What
    weights are rounded for are `texts`, so that what is chosen by calibration was not made for it. What stays in
    float16 by default does so before the others are ranked. Returns the damage and bits of each other, no layers where
    all of them can be E4M3 or there is no limit, and the cosine against how many of them are kept.
    """
    config_path = path.with_name(CONFIG_NAME)
    config = read_config(config_path)
    default = keep_by_default(config.hidden, config.layers)  # whatever the teacher's own file names
    weights = load_weights(path, config)
    rounded = round_weights(weights, replace(config, float16=default), texts)
    found = Ranking({}, ())
    if min_cosine is not None:
        probe = EncoderProbe(weights, rounded, config, [pad_batch([row]) for row in calibration])
        labels = {name: name for name in list_linears(config.layers) if name not in default}
        found = rank_layers(probe, labels, min_cosine, _FLOAT_BITS)
    chosen = {name for name, layer in found.damages.items() if layer.is_float}
    kept = [name for name in list_linears(config.layers) if name in default | chosen]
    fields = json.loads(config_path.read_text(encoding="utf-8"))
    _write_fields(config_path, fields | {E4M3_NAME: {"schema_version": E4M3_VERSION, "float16": kept}})
    _write_linears(path, choose_weights(weights, rounded, replace(config, float16=frozenset(kept))))
    return found


def _write_linears(path: Path, weights: Weights) -> None:
    """The linear layers of `weights` in the place of those of the file."""
    tensors = load_file(path)
    prefix = find_prefix(tensors)
    for number, layer in enumerate(weights.layers):
        for linear, names in enumerate(zip(MATRICES, BIASES, strict=True)):
            parts = name_parts(number, linear)
            for kind, name in zip(("weight", "bias"), names, strict=True):
                pieces = getattr(layer, name).half().chunk(len(parts))
                tensors |= {f"{prefix}{part}.{kind}": own.clone() for part, own in zip(parts, pieces, strict=True)}
    written = path.with_suffix(".written")  # what was loaded still lies in the file
    save_file(tensors, written)
    written.replace(path)


class EncoderProbe(Probe[bool]):
    """Linear layers of the cuda engine in E4M3, on its arithmetic in plain PyTorch."""

    def __init__(self, weights: Weights, rounded: Weights, config: BertConfig, batches: Batches) -> None:
        """Embed `batches`, which hold no padding, with no layer rounded; the weights of one that is are `rounded`'s."""
        self._weights, self._others, self._config = weights, rounded, config
        super().__init__(batches)

    def _run(self, rounded: Mapping[str, bool]) -> Callable[[dict[str, Any]], NDArray[np.float32]]:
        kept = frozenset(name for name in list_linears(self._config.layers) if not rounded.get(name))
        config = replace(self._config, float16=kept)
        encoder = ExactE4M3(choose_weights(self._weights, self._others, config), config)
        return lambda feeds: np.asarray(encoder.encode(Packed.of_rows(feeds["input_ids"])).numpy())


def _write_fields(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n", encoding="utf-8")
