"""The teacher: a sentence-transformers model folder, checked before anything runs it."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from registry.manifest import hash_file, is_name, payload_checksum
from serving.tokenizer import TOKENIZER_NAME
from tasks.artifacts import CACHED, Artifact, draft
from tasks.corpus import evaluation_sets
from tasks.errors import TeacherRejected
from tasks.models.bucket_models import MODEL_FILES, fetch_model
from tasks.models.weights import check_finite, count_parameters
from tasks.progress import progress
from tasks.state import state_dir

# `model_type` of a BERT, and of one whose layers `prune` cut.
BERT_TYPES = ("bert", "pruned_bert")

_MODULES = ("Transformer", "Pooling", "Normalize")
_BATCH = 32
# What transformers writes as a tokenizer's length where it has none is 1e30; a model without positions may say -1.
_NO_LIMIT = 10**9


class Teacher(BaseModel):
    """A checked teacher: where it lies, what its files hash to, and how it makes a sentence embedding."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    uri: str
    name: str
    folder: Path
    tokenizer: Path
    digest: str
    dimension: int
    max_seq_length: int
    pooling: Literal["mean", "cls", "lasttoken"]
    normalize: bool
    prompts: dict[str, str]
    num_parameters: int
    num_encoder_parameters: int


@task(task_run_name="load-teacher", cache_policy=NO_CACHE)
def load_teacher(uri: str, name: str | None = None) -> Teacher:
    """Find, check and describe the teacher at `uri`: a folder, `package:<name>`, `hf:<id>[@revision]` or an S3 URL.

    Nothing of the model is executed. Raises TeacherRejected.
    """
    folder = locate_teacher(uri)
    modules = _read_modules(folder)
    kinds = [_module_kind(folder, module) for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise TeacherRejected(
            f"{folder}/modules.json lists {kinds}: the export knows Transformer, Pooling and Normalize"
        )
    transformer = folder / modules[0]["path"]
    config = _read_object(transformer / "config.json")
    if "auto_map" in config:
        raise TeacherRejected(
            f"{transformer}/config.json asks for remote code (auto_map): models that bring code are never run"
        )
    _require_tokenizer(transformer)
    pooling = _read_object(folder / modules[1]["path"] / "config.json")
    counts = [count_parameters(path) for path in _weights(transformer)]
    for path in _weights(transformer):
        check_finite(path)
    return Teacher(
        uri=uri,
        name=name or _safe_name_of(uri, folder),
        folder=folder,
        tokenizer=transformer / TOKENIZER_NAME,
        # Through links: a hub snapshot is a folder of links into a blob store.
        digest=payload_checksum({str(p.relative_to(folder)): hash_file(p) for p in folder.rglob("*") if p.is_file()}),
        dimension=_dimension(pooling, config),
        max_seq_length=_max_length(transformer, config),
        pooling=_pooling_mode(folder, pooling),
        normalize="Normalize" in kinds,
        prompts=_prompts(folder),
        num_parameters=sum(count.everything for count in counts),
        num_encoder_parameters=sum(count.encoder for count in counts),
    )


@task(task_run_name="embed-teacher", cache_policy=CACHED, persist_result=True, result_serializer="json")
def embed_teacher(teacher: Teacher, corpus: Artifact) -> Artifact:
    """The teacher's fp32 embeddings of the evaluation part, by sentence-transformers: `<set>.npy`, float32 [N, D]."""
    sets, _ = evaluation_sets(corpus)
    encode = open_teacher(teacher.folder)
    with draft("teacher-embeddings") as work, progress("embed teacher", sum(map(len, sets.values()))) as advance:
        for name, texts in sets.items():
            np.save(work.folder / f"{name}.npy", encode(texts, advance))
    return work.artifact


def open_teacher(folder: Path) -> Callable[[Sequence[str], Callable[[int], None]], NDArray[np.float32]]:
    """Load a model folder with sentence-transformers; returns `encode(texts, advance)` → float32 [N, D]."""
    model = load_sentence_transformer(folder)

    def encode(texts: Sequence[str], advance: Callable[[int], None]) -> NDArray[np.float32]:
        # By tokens: half the time of sorting by characters, which leaves padding in every batch.
        lengths = [len(tokens) for tokens in model.tokenizer(list(texts), truncation=True)["input_ids"]]
        order = np.argsort(lengths, kind="stable")
        embeddings = np.empty((len(texts), model.get_embedding_dimension()), dtype=np.float32)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = [texts[row] for row in rows]
            embeddings[rows] = model.encode(batch, batch_size=_BATCH, show_progress_bar=False)
            advance(len(rows))
        return embeddings

    return encode


def load_sentence_transformer(folder: Path) -> Any:
    """The model as sentence-transformers loads it: fp32, on the CPU, offline, no code of the model's own, no pickle.

    Texts are embedded as they are, without the prompt that a model may have by default: the worker puts one before a
    text where a request names it.

    Raises TeacherRejected, also for missing weights, which transformers would fill with random numbers.
    """
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415  torch takes seconds; a cached run needs none
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from tasks.models.pruned_bert import register_pruned_bert  # noqa: PLC0415

    disable_progress_bar()
    register_pruned_bert()
    safe = {"local_files_only": True, "trust_remote_code": False}
    weights = {"use_safetensors": True, "dtype": "float32"}  # else as they are stored, which may be in half
    try:
        model = SentenceTransformer(str(folder), device="cpu", model_kwargs=weights, **safe).eval()
        # A second load, tenths of a second: sentence-transformers does not pass on what was missing.
        transformer = folder / _read_modules(folder)[0]["path"]
        kind = type(model[0].auto_model)  # of T5 the encoder alone
        _, found = kind.from_pretrained(transformer, output_loading_info=True, **weights, **safe)
    except TeacherRejected:
        raise
    except Exception as error:  # transformers and safetensors raise whatever their readers raise
        raise TeacherRejected(f"sentence-transformers cannot load {folder}: {error}") from error
    # A pooler belongs to pre-training; no pooling that the export knows reads it.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise TeacherRejected(f"{folder} lacks {len(missing)} weights, {missing[0]} the first: fetch it again")
    model.default_prompt_name = None
    return model


def locate_teacher(uri: str) -> Path:
    """The folder that holds `modules.json`. Raises TeacherRejected for a URI that names none."""
    scheme, _, rest = uri.partition(":")
    if scheme == "package":
        return _package_folder(rest)
    if scheme == "hf":
        return _hub_folder(rest)
    folder = fetch_model(uri) if scheme == "s3" else Path(uri)
    if not folder.is_dir():
        raise TeacherRejected(
            f"model {uri!r} is no folder: give a folder, package:<installed package>, hf:<id> or s3://bucket/prefix"
        )
    if not (folder / "modules.json").is_file():
        raise TeacherRejected(f"model folder {folder} has no modules.json: give a sentence-transformers model folder")
    return folder.absolute()


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise TeacherRejected(f"package {name!r} is not installed: pip install it or give the model another way")
    found = sorted(Path(spec.origin).parent.rglob("modules.json"))
    if len(found) != 1:
        raise TeacherRejected(f"package {name!r} holds {len(found)} model folders, expected one with a modules.json")
    return found[0].parent


def _hub_folder(reference: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only this kind of URI needs it

    name, _, revision = reference.partition("@")
    try:
        found = snapshot_download(
            name, revision=revision or None, allow_patterns=[*MODEL_FILES], cache_dir=state_dir() / "hub"
        )
    except Exception as error:  # the hub raises errors of several HTTP libraries
        raise TeacherRejected(f"model hf:{reference} cannot be fetched: {type(error).__name__}: {error}") from error
    return Path(found)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherRejected(f"{path} does not exist: the model folder is incomplete") from None
    except ValueError as error:
        raise TeacherRejected(f"{path} is not JSON: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise TeacherRejected(f"{path} is not a JSON object but {type(value).__name__}")
    return value


def _read_modules(folder: Path) -> list[dict[str, str]]:
    path = folder / "modules.json"
    modules = _read_json(path)
    if not isinstance(modules, list) or not all(_is_module(module) for module in modules):
        raise TeacherRejected(f"{path} is not a list of modules, each with a path and a type")
    return modules


def _is_module(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("path", "type"))


def _module_kind(folder: Path, module: dict[str, str]) -> str:
    kind = module["type"].rpartition(".")[2]
    if not module["type"].startswith("sentence_transformers."):
        raise TeacherRejected(
            f"{folder}/modules.json asks for remote code ({module['type']}): models that bring code are never run"
        )
    if kind not in _MODULES:
        raise TeacherRejected(
            f"{folder}/modules.json lists {kind}, which the export does not know: it knows {', '.join(_MODULES)}"
        )
    return kind


def _require_tokenizer(folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise TeacherRejected(f"{folder} has no tokenizer.json: save the model with its fast tokenizer")


def _pooling_mode(folder: Path, config: dict[str, Any]) -> Literal["mean", "cls", "lasttoken"]:
    mode = config.get("pooling_mode")
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    chosen = [name for name, flag in flags.items() if mode == name or config.get(flag) is True]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or set(others) - set(flags.values()):
        raise TeacherRejected(f"{folder} pools by {mode or others}: the export knows mean, cls and lasttoken")
    return chosen[0]  # type: ignore[return-value]


def _dimension(pooling: dict[str, Any], config: dict[str, Any]) -> int:
    return int(pooling.get("embedding_dimension") or pooling.get("word_embedding_dimension") or config["hidden_size"])


def _max_length(transformer: Path, config: dict[str, Any]) -> int:
    """As sentence-transformers decides it: its own setting, or the smaller of the tokenizer's and the model's.

    Raises TeacherRejected where none of them says: T5 has no positions to run out of.
    """
    own = transformer / "sentence_bert_config.json"
    length = _read_object(own).get("max_seq_length") if own.is_file() else None
    if length:
        return int(length)
    path = transformer / "tokenizer_config.json"
    tokenizer = _read_object(path) if path.is_file() else {}
    limits = (tokenizer.get("model_max_length"), config.get("max_position_embeddings"))
    found = [int(limit) for limit in limits if limit and 0 < limit < _NO_LIMIT]
    if not found:
        raise TeacherRejected(
            f"{transformer} does not say how many tokens a text may have: set max_seq_length in {own.name} "
            "or model_max_length in tokenizer_config.json"
        )
    return min(found)


def _prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    prompts = _read_object(path).get("prompts") if path.is_file() else None
    return {name: text for name, text in (prompts or {}).items() if text}


def _safe_name_of(uri: str, folder: Path) -> str:
    path = uri.partition(":")[2].partition("?")[0].partition("@")[0].rstrip("/")
    found = path.rpartition("/")[2] if ":" in uri else folder.name
    if not is_name(found):
        raise TeacherRejected(
            f"{found!r} is not a name for the registry (letters, digits, '.', '_' and '-'): give one with --name"
        )
    return found


def _weights(folder: Path) -> list[Path]:
    whole = folder / "model.safetensors"
    paths = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not paths:
        raise TeacherRejected(
            f"{folder} has no model.safetensors: pickled weights are never loaded; save it as safetensors"
        )
    return paths
