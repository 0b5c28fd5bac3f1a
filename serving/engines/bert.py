"""BERT-family encoders from safetensors and config.json: configuration, weights and the plain-PyTorch forward pass."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import Repr
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import layer_norm

from serving.engines.packing import Limits, pack, packed_size
from serving.errors import EngineUnavailable
from serving.kernels import reference
from serving.tokenizer import Ids, pad_batch

CONFIG_NAME = "config.json"
AMAX_NAME = "activation_amax"  # [layers, 4]: largest input of the query, output, up and down projections
STATES_NAME = "state_amax"  # [layers, 2]: largest state before the norm behind the attention, and before the last
# Linear layers of a layer in the order they run, queries, keys and values as one: the columns of `activation_amax`.
LINEARS = ("attention/self", "attention/output/dense", "intermediate/dense", "output/dense")
E4M3_NAME, E4M3_VERSION = "e4m3", 1  # of config.json: which linear layers E4M3 leaves in float16
_OUTPUT, _NARROW = 1, 512  # of LINEARS the output projection, and the hidden size up to which E4M3 does not speed it up
# What the forward pass is: a config that says otherwise is another architecture. None also stands for nothing said.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "auto_map": (None,),  # code of its own
    "pooling": ("mean", "cls", "lasttoken"),
    "normalize": (True, False),
}
# The largest size: kernels count in 32 bits. Of every layer the linear layers are named before a tensor is looked for.
_MAX_SIZE, _MAX_LAYERS = 2**31 - 1, 1024
_MAX_FLOAT = torch.finfo(torch.float32).max
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names the types of weights
_SHORT = Repr()  # what a file holds may be as long and as deeply nested as it likes, a message may not
_SHORT.maxstring = 80


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Sizes of the encoder, how its tokens become one vector, and what E4M3 leaves alone."""

    vocabulary: int
    positions: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    eps: float
    pooling: str
    normalize: bool
    float16: frozenset[str] = frozenset()
    """Linear layers that stay in float16 where the others are E4M3, by the names of `list_linears`."""

    @property
    def limits(self) -> Limits:
        """What a batch must stay within."""
        return Limits(self.vocabulary, self.positions)

    @property
    def rounded(self) -> list[list[bool]]:
        """By layer and LINEARS: what E4M3 does not leave in float16."""
        numbers = range(len(LINEARS))
        return [[name_linear(layer, number) not in self.float16 for number in numbers] for layer in range(self.layers)]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights [out, in] and vectors of one layer; for E4M3 the calibrated `amax` (float32 [4]) of its inputs, and
    `state_amax` ([2]) of its states before their norms."""

    qkv_weight: Tensor
    qkv_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor
    down_norm_weight: Tensor
    down_norm_bias: Tensor
    amax: Tensor | None
    state_amax: Tensor | None


@dataclass(frozen=True, slots=True)
class Weights:
    """Embedding tables (type 0 already added to the positions), the norm behind them, and the layers."""

    words: Tensor
    positions: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    layers: tuple[Layer, ...]


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the device: ids, starts, ends int32 [T], offsets int32 [B + 1], and tiles, see `list_tiles`."""

    ids: Tensor
    starts: Tensor
    ends: Tensor
    offsets: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, integers: Tensor, tokens: int, rows: int) -> "Packed":
        """Views of what `packing.pack` wrote."""
        ids, starts, ends = integers[: 3 * tokens].view(3, tokens)
        bounds = integers[3 * tokens : packed_size(tokens, rows)]
        return cls(ids, starts, ends, bounds[: rows + 1], bounds[rows + 1 :])

    @classmethod
    def of_rows(cls, rows: Sequence[Ids]) -> "Packed":
        """Texts' ids as a batch on the CPU."""
        input_ids, mask = pad_batch(rows)
        lengths = mask.sum(axis=1)
        tokens = int(lengths.sum())
        numbers = np.zeros(packed_size(tokens, len(rows)), dtype=np.int32)
        pack(input_ids, lengths, tokens, len(rows), numbers)
        return cls.of(torch.from_numpy(numbers), tokens, len(rows))


def name_linear(layer: int, linear: int) -> str:
    """How files and reports call a layer's linear layer, such as `layer.0/attention/self`."""
    return f"layer.{layer}/{LINEARS[linear]}"


def name_parts(layer: int, linear: int) -> list[str]:
    """How a file of weights calls it, or, one below the other, the three that make one, without `find_prefix`."""
    parts = [f"attention.self.{part}" for part in ("query", "key", "value")] if linear == 0 else [LINEARS[linear]]
    return [f"encoder.layer.{layer}.{part.replace('/', '.')}" for part in parts]


def find_prefix(names: Collection[str]) -> str:
    """What the names of a file's tensors begin with."""
    return "bert." if any(name.startswith("bert.") for name in names) else ""


def list_linears(layers: int) -> list[str]:
    """The names of all linear layers, in the order they run."""
    return [name_linear(layer, linear) for layer in range(layers) for linear in range(len(LINEARS))]


def keep_by_default(hidden: int, layers: int) -> frozenset[str]:
    """The linear layers that E4M3 leaves in float16 where a file names none: the output projections of narrow models.

    E4M3 costs them cosine and gains no time: docs/log.md has both.
    """
    return frozenset(name_linear(layer, _OUTPUT) for layer in range(layers) if hidden <= _NARROW)


def read_config(path: Path) -> BertConfig:
    """Read config.json. Raises EngineUnavailable naming the field that our kernels cannot honour."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EngineUnavailable(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise EngineUnavailable(f"{path} holds {_SHORT.repr(fields)}, it must hold a JSON object")
    return parse_config(fields, path)


def parse_config(fields: dict[str, Any], path: Path) -> BertConfig:
    """What `path` says. Raises EngineUnavailable naming the field that our kernels cannot honour."""
    _check_architecture(path, fields)
    config = BertConfig(
        vocabulary=_size(path, fields, "vocab_size"),
        positions=_size(path, fields, "max_position_embeddings"),
        hidden=_size(path, fields, "hidden_size"),
        layers=_size(path, fields, "num_hidden_layers", _MAX_LAYERS),
        heads=_size(path, fields, "num_attention_heads"),
        intermediate=_size(path, fields, "intermediate_size"),
        eps=_read_eps(path, fields),
        pooling=fields["pooling"],
        normalize=fields["normalize"],
        float16=_read_float16(path, fields),
    )
    if config.hidden % config.heads:
        raise EngineUnavailable(f"{path}: hidden_size {config.hidden} is no multiple of {config.heads} heads")
    return config


def _check_architecture(path: Path, fields: dict[str, Any]) -> None:
    """Raise EngineUnavailable for a field that changes what is computed. Those of training, and caches, do not."""
    width = {"embedding_size": (fields.get("hidden_size"), None)}  # without a projection words are as wide as the rest
    for name, allowed in (_FIXED | width).items():
        value = fields.get(name)
        if not any(type(value) is type(each) and value == each for each in allowed):  # 1 is not True
            known = ", ".join(_SHORT.repr(each) for each in allowed if each is not None) or "none"
            raise EngineUnavailable(f"{path}: {name} is {_SHORT.repr(value)}, our kernels know {known}")


def _size(path: Path, fields: dict[str, Any], name: str, limit: int = _MAX_SIZE) -> int:
    value = fields.get(name)
    if type(value) is not int or not 1 <= value <= limit:  # a bool is an int, too
        raise EngineUnavailable(f"{path}: {name} is {_SHORT.repr(value)}, it must be an integer from 1 to {limit}")
    return value


def _read_eps(path: Path, fields: dict[str, Any]) -> float:
    value = fields.get("layer_norm_eps", 1e-12)
    if type(value) not in (int, float) or not 0 < value <= _MAX_FLOAT:
        raise EngineUnavailable(f"{path}: layer_norm_eps is {_SHORT.repr(value)}, it must be a finite number above 0")
    return float(value)


def _read_float16(path: Path, fields: dict[str, Any]) -> frozenset[str]:
    """The layers that the file keeps in float16: those it names, where it says nothing those of `keep_by_default`."""
    hidden, layers = _size(path, fields, "hidden_size"), _size(path, fields, "num_hidden_layers", _MAX_LAYERS)
    if E4M3_NAME not in fields:
        return keep_by_default(hidden, layers)
    section = fields[E4M3_NAME]
    if not isinstance(section, dict):
        raise EngineUnavailable(f"{path}: {E4M3_NAME} is {type(section).__name__}, it must be an object")
    if section.get("schema_version") != E4M3_VERSION:
        version = section.get("schema_version")
        raise EngineUnavailable(
            f"{path}: {E4M3_NAME} has schema_version {_SHORT.repr(version)}, this engine reads {E4M3_VERSION}"
        )
    if section.keys() != {"schema_version", "float16"}:
        raise EngineUnavailable(f"{path}: {E4M3_NAME} holds {sorted(section)}, it must hold float16, schema_version")
    names, known = section["float16"], list_linears(layers)
    if not isinstance(names, list):
        raise EngineUnavailable(f"{path}: {E4M3_NAME}.float16 is {_SHORT.repr(names)}, it must be a list of names")
    for name in names:
        if name not in known:
            raise EngineUnavailable(
                f"{path}: {E4M3_NAME}.float16 names {_SHORT.repr(name)}, which is no linear layer of this model: "
                f"they go from {known[0]} to {known[-1]}"
            )
    return frozenset(names)


def load_weights(path: Path, config: BertConfig, dtype: torch.dtype = torch.float32) -> Weights:
    """Read the tensors of a safetensors file into host memory, every shape checked against `config`.

    Raises EngineUnavailable for a file that is short or damaged, for a tensor that is missing, of another shape, not of
    floats or not finite, and for a calibrated value that E4M3 cannot scale by.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return _Reader(path, file, dtype).read(config)
    except (OSError, SafetensorError) as error:
        raise EngineUnavailable(f"{path} cannot be read: {error}") from None


class _Reader:
    def __init__(self, path: Path, file: Any, dtype: torch.dtype) -> None:
        self._path, self._file, self._dtype = path, file, dtype
        self._names = set(file.keys())
        self._prefix = find_prefix(self._names)

    def read(self, config: BertConfig) -> Weights:
        hidden = config.hidden
        types = self._tensor("embeddings.token_type_embeddings.weight", None, hidden)
        positions = self._tensor("embeddings.position_embeddings.weight", config.positions, hidden)
        linears = torch.tensor(config.rounded)
        # The first state of a layer is for its own intermediate layer, the second for the next one's queries.
        queries, intermediate = torch.cat((linears[1:, 0], torch.tensor([False]))), linears[:, 2]
        amax = self._calibrated(AMAX_NAME, linears)
        states = self._calibrated(STATES_NAME, torch.stack((intermediate, queries), dim=1))
        return Weights(
            words=self._tensor("embeddings.word_embeddings.weight", config.vocabulary, hidden).to(self._dtype),
            positions=(positions + types[0]).to(self._dtype),
            norm_weight=self._tensor("embeddings.LayerNorm.weight", hidden).to(self._dtype),
            norm_bias=self._tensor("embeddings.LayerNorm.bias", hidden).to(self._dtype),
            layers=tuple(
                self._layer(number, config, *(None if each is None else each[number] for each in (amax, states)))
                for number in range(config.layers)
            ),
        )

    def _calibrated(self, name: str, needed: Tensor) -> Tensor | None:
        """What calibration wrote, if it did: of the shape of `needed`, above 0 where that is true."""
        if name not in self._names:
            return None
        tensor = self._read(name, tuple(needed.shape))
        bad = (needed & (tensor <= 0)).nonzero().tolist()
        if bad:
            layer, column = bad[0]
            raise EngineUnavailable(
                f"{self._path}: {name}[{layer}, {column}] is {tensor[layer, column]}, E4M3 needs a number above 0: "
                "calibrate the model anew"
            )
        return tensor

    def _layer(self, number: int, config: BertConfig, amax: Tensor | None, state_amax: Tensor | None) -> Layer:
        hidden, inner, layer = config.hidden, config.intermediate, f"encoder.layer.{number}."
        queries, (out,), (up,), (down,) = (name_parts(number, linear) for linear in range(len(LINEARS)))
        parts = {
            "qkv_weight": torch.cat([self._tensor(f"{name}.weight", hidden, hidden) for name in queries]),
            "qkv_bias": torch.cat([self._tensor(f"{name}.bias", hidden) for name in queries]),
            "out_weight": self._tensor(f"{out}.weight", hidden, hidden),
            "out_bias": self._tensor(f"{out}.bias", hidden),
            "out_norm_weight": self._tensor(f"{layer}attention.output.LayerNorm.weight", hidden),
            "out_norm_bias": self._tensor(f"{layer}attention.output.LayerNorm.bias", hidden),
            "up_weight": self._tensor(f"{up}.weight", inner, hidden),
            "up_bias": self._tensor(f"{up}.bias", inner),
            "down_weight": self._tensor(f"{down}.weight", hidden, inner),
            "down_bias": self._tensor(f"{down}.bias", hidden),
            "down_norm_weight": self._tensor(f"{layer}output.LayerNorm.weight", hidden),
            "down_norm_bias": self._tensor(f"{layer}output.LayerNorm.bias", hidden),
        }
        return Layer(**{name: part.to(self._dtype) for name, part in parts.items()}, amax=amax, state_amax=state_amax)

    def _tensor(self, name: str, *shape: int | None) -> Tensor:
        """A tensor in float32; None in `shape` is any size."""
        full = self._prefix + name
        if full not in self._names:
            raise EngineUnavailable(f"{self._path} holds no tensor {full}")
        return self._read(full, shape)

    def _read(self, name: str, shape: tuple[int | None, ...]) -> Tensor:
        part = self._file.get_slice(name)
        found, kind = tuple(part.get_shape()), part.get_dtype()
        fits = len(found) == len(shape) and all(a == b if b else a > 0 for a, b in zip(found, shape, strict=True))
        if not fits:
            wanted = str(shape).replace("None", "1 or more")
            raise EngineUnavailable(f"{self._path}: {name} is {found}, config.json says {wanted}")
        if kind not in _FLOATS:
            raise EngineUnavailable(f"{self._path}: {name} is of {kind}, weights must be of {', '.join(_FLOATS)}")
        tensor: Tensor = self._file.get_tensor(name)
        low, high = (each.item() for each in tensor.aminmax())  # one pass; both are NaN where any value is
        if not -_MAX_FLOAT <= low <= high <= _MAX_FLOAT:
            raise EngineUnavailable(
                f"{self._path}: {name} holds values from {low} to {high}, they must be finite in float32"
            )
        return tensor.float()


# Of a layer, one of its linear layers and that one's input [T, K]: what the linear layer computes with instead.
See = Callable[[int, int, Tensor], Tensor]
# Of a layer, one of its two norms and that one's input [T, H].
Watch = Callable[[int, int, Tensor], None]


def encode(
    weights: Weights,
    config: BertConfig,
    batch: Packed,
    see: See = lambda layer, linear, x: x,
    watch: Watch = lambda layer, norm, state: None,
) -> Tensor:
    """Plain PyTorch, in the dtype of the weights: float32 [B, H]. The oracle of the kernels.

    `see` is given the numbers of every linear layer with its input, and gives what it computes with; `watch` is given
    those of every norm with its input.
    """
    x = reference.embed_norm(
        batch.ids, batch.starts, weights.words, weights.positions, weights.norm_weight, weights.norm_bias, config.eps
    )
    for number, layer in enumerate(weights.layers):
        qkv = reference.linear(see(number, 0, x), layer.qkv_weight, layer.qkv_bias)
        context = see(number, 1, reference.attention(qkv, batch.starts, batch.ends, config.heads))
        state = reference.linear(context, layer.out_weight, torch.zeros_like(layer.out_bias)) + x + layer.out_bias
        watch(number, 0, state)
        middle = layer_norm(state, state.shape[1:], layer.out_norm_weight, layer.out_norm_bias, config.eps)
        inner = see(number, 3, reference.linear(see(number, 2, middle), layer.up_weight, layer.up_bias, gelu=True))
        state = reference.linear(inner, layer.down_weight, torch.zeros_like(layer.down_bias)) + middle + layer.down_bias
        watch(number, 1, state)
        x = layer_norm(state, state.shape[1:], layer.down_norm_weight, layer.down_norm_bias, config.eps)
    return reference.pool(x, batch.offsets, config.pooling, config.normalize)
