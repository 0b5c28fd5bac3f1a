"""TensorRT on an NVIDIA GPU: a plan of this node's cache, or one built here from the bundle's graph and recipe."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.manifest import Profile
from serving.engines import Embeddings
from serving.engines.onnxruntime import OnnxRuntimeEngine
from serving.engines.plans import (
    TIMING_CACHE_NAME,
    BuildRecipe,
    Fingerprint,
    PlanStale,
    driver_version,
    hash_graph,
    plan_path,
    read_plan,
    read_recipe,
    replace_file,
    write_plan,
)
from serving.engines.tensorrt_plan import Plan, build_plan, check_engine, name_vendor, shared_logger
from serving.errors import EngineUnavailable
from serving.tokenizer import Ids, TextTokenizer, pad_batch

if TYPE_CHECKING:
    import torch

# The library, the one for consumer GPUs, and the name its wheel has without the vendor's index.
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
_OUTPUT = "sentence_embedding"
# Least cosine between a plan and the same graph in onnxruntime. A wrong plan is far below: q/k/v of another text.
_MIN_PARITY = {"fp32": 0.9999, "bf16": 0.995, "fp16": 0.999, "int8": 0.99, "fp8": 0.99}
_PROBES = ("a", "The quick brown fox jumps over the lazy dog.", "naïve café 你好 🙂 שלום", "word " * 600)

# TensorRT-Edge-LLM issues 105 and 151.
_FUSION_HINT = '; TensorRT 10.13 fuses q/k/v wrongly there: set __LUNOWUD="-peep:fc_h_fusion=off" and start again'

_log = logging.getLogger(__name__)


def import_tensorrt() -> ModuleType:
    """The vendor's module. Raises EngineUnavailable."""
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise EngineUnavailable(f"{name} is installed, but {error.name} is not: install it anew") from None
        except (ImportError, OSError) as error:  # its shared libraries
            raise EngineUnavailable(f"{name} does not load: {error}") from None
    raise EngineUnavailable("tensorrt is not installed: pip install '.[gpu]', on a Jetson it is part of JetPack")


@dataclass(frozen=True, slots=True)
class Node:
    """The GPU and the libraries a plan is bound to."""

    trt: ModuleType
    sm: str
    driver: str

    @classmethod
    def examine(cls) -> "Node":
        """This machine's. Raises EngineUnavailable when something is missing, and names it."""
        trt = import_tensorrt()
        try:
            import torch  # noqa: PLC0415  it owns the device's memory; only GPU engines need it
        except ImportError:
            raise EngineUnavailable("torch is not installed: pip install '.[gpu]'") from None
        if not torch.cuda.is_available():
            raise EngineUnavailable(
                f"{name_vendor(trt)} is here, but no NVIDIA GPU that torch {torch.__version__} sees"
            )
        major, minor = torch.cuda.get_device_capability()
        return cls(trt, f"{major}.{minor}", driver_version())

    def fingerprint(self, graph: Path, recipe: BuildRecipe) -> Fingerprint:
        """What a plan of `graph` built here would be bound to."""
        return Fingerprint(
            sm=self.sm,
            tensorrt=name_vendor(self.trt),
            driver=self.driver,
            onnx_sha256=hash_graph(graph),
            recipe=recipe,
        )


class TensorRtEngine:
    """Runs a graph with the recipe `tensorrt.json` beside it; the plan lies beside the folder, in `<folder>.plans`."""

    compiles_shapes, is_packed = False, False

    def __init__(self, graph: Path, built: Plan | None = None, on_rebuild: Callable[[], object] = lambda: None) -> None:
        """Load the plan, or build one (`built`: it was just now), check it against onnxruntime and keep it.

        `on_rebuild` hears of a plan that was there and had to be built again; the log says why.
        Raises EngineUnavailable.
        """
        self._node = Node.examine()
        recipe = read_recipe(graph.parent)
        path, wanted = plan_path(graph, recipe), self._node.fingerprint(graph, recipe)
        try:
            plan, _ = read_plan(path, wanted)
            self._load(plan, recipe)
        except (PlanStale, EngineUnavailable) as stale:
            is_again = path.exists()
            if is_again:
                _log.warning("tensorrt plan is built again file=%s reason=%s", path.name, stale)
            self._keep(built or self._build(graph, recipe), graph, wanted, path)
            if is_again:
                on_rebuild()
        self.bound_to = self._node.sm, name_vendor(self._node.trt)
        self.runtime = f"{self.bound_to[1]} sm {self.bound_to[0]} {recipe.precision}"

    def embed(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        """See `Engine.embed`. A batch above the largest profile is run in parts."""
        largest = max(profile.max_batch for profile in self._profiles)
        parts = [slice(start, start + largest) for start in range(0, len(input_ids), largest)]
        return np.concatenate([self._run(input_ids[part], attention_mask[part]) for part in parts])

    def close(self) -> None:
        """See `Engine.close`."""
        del self._contexts, self._engine, self._runtime

    def describe(self) -> str:
        """The engine inspector's JSON: layers, tensors and their types."""
        inspector = self._engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._node.trt.LayerInformationFormat.JSON))

    def _build(self, graph: Path, recipe: BuildRecipe) -> Plan:
        return build_plan(self._node.trt, graph, recipe, read_timing_cache(graph, recipe))

    def _keep(self, built: Plan, graph: Path, wanted: Fingerprint, path: Path) -> None:
        """Load what was built, check its types and its embeddings, and only then keep it."""
        self._load(built.data, wanted.recipe)
        check_engine(self.describe(), wanted.recipe.precision)
        parity = self._check_parity(graph, wanted.recipe)
        try:
            write_plan(path, built.data, wanted, parity)
            replace_file(path.with_name(TIMING_CACHE_NAME), built.timing_cache)
        except OSError as error:
            raise EngineUnavailable(f"plans cannot be kept in {path.parent}: {error.strerror}") from None

    def _load(self, plan: bytes, recipe: BuildRecipe) -> None:
        import torch  # noqa: PLC0415  it is here: Node.examine looked

        logger = shared_logger(self._node.trt)
        self._runtime = self._node.trt.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineUnavailable(f"{name_vendor(self._node.trt)} cannot load the plan: {logger.reasons()}")
        self._profiles = recipe.profiles
        self._stream = torch.cuda.Stream()
        self._contexts = [self._make_context(index) for index in range(len(recipe.profiles))]

    def _make_context(self, profile: int) -> Any:
        """One for each profile: changing a context's profile costs a synchronisation."""
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise EngineUnavailable(f"no memory on the GPU for a context of profile {self._profiles[profile].name}")
        self._stream.synchronize()
        return context

    def _run(self, input_ids: Ids, attention_mask: Ids) -> Embeddings:
        import torch  # noqa: PLC0415  loaded with the engine

        rows = len(input_ids)
        context = self._contexts[choose_profile(self._profiles, rows)]
        with torch.cuda.stream(self._stream):
            tensors = {name: _to_device(array) for name, array in _feeds(input_ids, attention_mask)}
            for name, tensor in tensors.items():
                context.set_input_shape(name, tuple(tensor.shape))
                context.set_tensor_address(name, tensor.data_ptr())
            shape = tuple(context.get_tensor_shape(_OUTPUT))
            dtype = torch.float16 if "HALF" in str(self._engine.get_tensor_dtype(_OUTPUT)) else torch.float32
            output = torch.empty(shape, dtype=dtype, device="cuda")
            context.set_tensor_address(_OUTPUT, output.data_ptr())
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise RuntimeError(f"TensorRT refused a batch of {rows} texts of {input_ids.shape[1]} tokens")
            embeddings: Embeddings = output.float().cpu().numpy()
        return embeddings

    def _check_parity(self, graph: Path, recipe: BuildRecipe) -> float:
        """Least cosine to onnxruntime on the same graph, alone and in full profiles. Raises EngineUnavailable."""
        compute = "f8" if recipe.precision == "fp8" else "f32"
        judge = OnnxRuntimeEngine(graph, is_exact=True, compute=compute)
        try:
            worst = {
                name: min_cosine(self.embed(*batch), judge.embed(*batch)) for name, batch in make_probes(graph, recipe)
            }
        finally:
            judge.close()
        limit = _MIN_PARITY[recipe.precision]
        for name, cosine in worst.items():
            if not cosine >= limit:
                hint = _FUSION_HINT if self._node.sm == "11.0" else ""
                raise EngineUnavailable(f"the plan is wrong: cosine {cosine:.4f} at {name}, limit {limit}{hint}")
        return min(worst.values())


def choose_profile(profiles: tuple[Profile, ...], rows: int) -> int:
    """The index of the smallest profile that takes a batch of `rows`."""
    fitting = [(p.max_batch, index) for index, p in enumerate(profiles) if p.min_batch <= rows <= p.max_batch]
    assert fitting, f"no profile takes {rows} rows, but embed() cuts batches to the largest"
    return min(fitting)[1]


def make_probes(graph: Path, recipe: BuildRecipe) -> list[tuple[str, tuple[Ids, Ids]]]:
    """Named batches to check a plan with: single texts, whose q/k/v sm_110 has computed wrongly, and full profiles."""
    length = max(profile.max_length for profile in recipe.profiles)
    ids = TextTokenizer.from_folder(graph.parent, length).encode(_PROBES)
    alone = [(f"batch 1 of {len(row)} tokens", pad_batch([row])) for row in ids]
    full = [
        (f"{p.name}, batch {p.max_batch}", pad_batch([ids[row % len(ids)] for row in range(p.max_batch)]))
        for p in recipe.profiles
    ]
    return [*alone, *full]


def min_cosine(first: Embeddings, second: Embeddings) -> float:
    """The least cosine between rows; NaN when a row is not finite, so that no comparison with it holds."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.min((first * second).sum(axis=1) / norms))


def read_timing_cache(graph: Path, recipe: BuildRecipe) -> bytes:
    """This node's own timing cache, else the one the bundle brings, else none."""
    for path in (plan_path(graph, recipe).with_name(TIMING_CACHE_NAME), graph.with_name(TIMING_CACHE_NAME)):
        if path.is_file():
            return path.read_bytes()
    return b""


def _feeds(input_ids: Ids, attention_mask: Ids) -> tuple[tuple[str, Ids], tuple[str, Ids]]:
    return ("input_ids", input_ids), ("attention_mask", attention_mask)


def _to_device(array: Ids) -> "torch.Tensor":
    import torch  # noqa: PLC0415  loaded with the engine

    return torch.from_numpy(np.ascontiguousarray(array)).to("cuda", non_blocking=True)
