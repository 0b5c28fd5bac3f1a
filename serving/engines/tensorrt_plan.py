"""From an ONNX graph to a TensorRT plan: one path for TensorRT 10.13+, 11.x and tensorrt_rtx.

Every function takes the vendor's module as `trt`; `serving/engines/tensorrt.py` is where it is imported.
"""

import functools
import json
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry.manifest import Precision, Profile
from serving.engines.plans import BuildRecipe, opt_length
from serving.errors import EngineUnavailable

_INPUTS = ("input_ids", "attention_mask")
_MB = 10**6
_MAX_REASONS = 3
# How libraries of different versions spell a type, in networks and in what their inspector prints.
_SPELLINGS: dict[Precision, tuple[str, ...]] = {
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("half", "fp16", "float16"),
    "int8": ("int8",),
    "fp8": ("fp8", "e4m3"),
    "fp32": ("float", "fp32"),  # last: the other floats' names hold it too
}

_BUILDING = threading.Lock()

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A built engine, the timing cache that went into it, and the types its matrix products were parsed with."""

    data: bytes
    timing_cache: bytes
    products: Mapping[str, int]


def name_vendor(trt: Any) -> str:
    """`tensorrt 10.13.3.9`: which library, and the build of it, that a plan is bound to."""
    return f"{'tensorrt_rtx' if 'rtx' in trt.__name__ else 'tensorrt'} {trt.__version__}"


def build_plan(trt: Any, graph: Path, recipe: BuildRecipe, timing_cache: bytes = b"") -> Plan:
    """Parse `graph` as a strongly typed network and build it. Raises EngineUnavailable saying what was refused.

    With a timing cache of an earlier build on this kind of GPU tactics are not measured again.
    """
    logger = shared_logger(trt)
    with _BUILDING:  # one at a time: builds that share a GPU would mismeasure each other's tactics
        logger.errors.clear()
        try:
            builder = trt.Builder(logger)
        except TypeError:  # its constructor returned nothing
            raise EngineUnavailable(f"{name_vendor(trt)} cannot build here: {logger.reasons()}") from None
        network, parser = _parse(trt, builder, logger, graph)
        products = count_products(network)
        check_products(products, recipe.precision)
        config = _configure(trt, builder, recipe)
        cache = _use_timing_cache(config, timing_cache)
        data = builder.build_serialized_network(network, config)
        if data is None:
            raise EngineUnavailable(f"{name_vendor(trt)} cannot build {graph.name}: {logger.reasons()}")
        del parser  # it owns weights that the network points at
        with _timing_caches_allowed():
            return Plan(bytes(data), bytes(cache.serialize()), products)


@functools.cache  # the library keeps a pointer to it, also when what it was made for is gone
def shared_logger(trt: Any) -> Any:
    """The process's logger: passes the library's warnings on and remembers its errors, to say why nothing was built."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())
            elif severity == trt.ILogger.Severity.WARNING:
                _log.debug("tensorrt warns message=%s", message)

        def reasons(self) -> str:
            return "; ".join(self.errors[:_MAX_REASONS]) or "it does not say why"

    return Logger()


def count_products(network: Any) -> Counter[str]:
    """How many matrix products the network computes in which type, as it was parsed."""
    producers = {}
    for layer in _layers(network):
        for index in range(layer.num_outputs):
            producers[layer.get_output(index).name] = layer
    found: Counter[str] = Counter()
    for layer in _layers(network):
        if _kind(layer) == "MATRIX_MULTIPLY":
            found[_product_type(layer, producers)] += 1
    return found


def check_products(products: Mapping[str, int], precision: Precision) -> None:
    """Raise EngineUnavailable when no product, or for a float precision not every one, has the type asked for.

    A type that is only asked for by a flag is silently ignored on some GPUs (TensorRT issue 4590).
    """
    wrong = {name: count for name, count in products.items() if name != precision}
    is_quantised = precision in ("int8", "fp8")
    if not products.get(precision) or (wrong and not is_quantised):
        raise EngineUnavailable(f"asked for {precision}, the graph's matrix products are {dict(products)}")


def check_engine(information: str, precision: Precision) -> dict[str, int]:
    """Types of the built engine's tensors, counted, from its inspector's JSON.

    Raises EngineUnavailable when the type asked for is not among them.
    """
    types = read_types(information)
    if not types.get(precision):
        raise EngineUnavailable(f"asked for {precision}, the engine was built with {dict(types)}")
    return dict(types)


def read_types(information: str) -> Counter[str]:
    """Tensors of an engine by type. `Bindings` became `I/O Tensors` in TensorRT 11; inner layers are `Layers`."""
    document = json.loads(information)
    found: Counter[str] = Counter()
    for layer in document.get("Layers", []):
        # With less than detailed verbosity a layer is only its name.
        tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])] if isinstance(layer, dict) else []
        for tensor in tensors:
            found.update(_known_types(str(tensor.get("Format/Datatype", tensor.get("Datatype", "")))))
    return found


def _known_types(text: str) -> Iterator[str]:
    lowered = text.lower()
    for precision, spellings in _SPELLINGS.items():
        if any(spelling in lowered for spelling in spellings):
            yield precision
            return


def _parse(trt: Any, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        faults = [parser.get_error(index) for index in range(min(parser.num_errors, _MAX_REASONS))]
        told = "; ".join(f"node {fault.node_name() or '?'}: {fault.desc()}" for fault in faults)
        raise EngineUnavailable(f"{name_vendor(trt)} cannot read {graph.name}: {told or logger.reasons()}")
    names = {network.get_input(index).name for index in range(network.num_inputs)}
    if names != set(_INPUTS):
        raise EngineUnavailable(f"{graph.name} has inputs {sorted(names)}, expected {sorted(_INPUTS)}")
    return network, parser


def _configure(trt: Any, builder: Any, recipe: BuildRecipe) -> Any:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mb * _MB)
    config.builder_optimization_level = recipe.builder_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector cannot tell types
    if recipe.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if recipe.hardware_compatibility != "NONE":
        config.hardware_compatibility_level = _member(trt, "HardwareCompatibilityLevel", recipe.hardware_compatibility)
    if recipe.tactic_sources is not None:
        bits = (1 << int(_member(trt, "TacticSource", name)) for name in recipe.tactic_sources)
        config.set_tactic_sources(sum(bits))
    if recipe.compute_capabilities:
        if not hasattr(trt, "ComputeCapability"):
            raise EngineUnavailable(f"{name_vendor(trt)} builds for the GPU it runs on, not for others by name")
        config.num_compute_capabilities = len(recipe.compute_capabilities)
        for index, capability in enumerate(recipe.compute_capabilities):
            value = _member(trt, "ComputeCapability", f"SM{capability.replace('.', '')}")
            config.set_compute_capability(value, index)
    for profile in recipe.profiles:
        _add_profile(builder, config, profile)
    return config


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    shapes = builder.create_optimization_profile()
    for name in _INPUTS:
        shapes.set_shape(
            name,
            (profile.min_batch, 1),
            (profile.opt_batch, opt_length(profile)),
            (profile.max_batch, profile.max_length),
        )
    if config.add_optimization_profile(shapes) < 0:
        raise EngineUnavailable(f"profile {profile.name} is refused: {profile.model_dump()}")


def _use_timing_cache(config: Any, data: bytes) -> Any:
    """A timing cache in use: the one given, or an empty one where it is of another device or version."""
    with _timing_caches_allowed():
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            _log.warning("timing cache of another device or version is not used size_bytes=%d", len(data))
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


@contextmanager
def _timing_caches_allowed() -> Iterator[None]:
    """tensorrt_rtx warns that timing caches do nothing there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _member(trt: Any, enum: str, name: str) -> Any:
    kind = getattr(trt, enum)
    if name not in kind.__members__:
        raise EngineUnavailable(f"{name_vendor(trt)} has no {enum} {name}: it has {', '.join(kind.__members__)}")
    return kind.__members__[name]


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _kind(layer: Any) -> str:
    return str(layer.type).rpartition(".")[2]


def _product_type(layer: Any, producers: Mapping[str, Any]) -> str:
    """The type a product is computed in: the quantised one when both inputs are dequantised, else its output's."""
    sources = [producers.get(layer.get_input(index).name) for index in range(2)]
    sources = [_skip_layout(source, producers) for source in sources]
    if all(source is not None and _kind(source) == "DEQUANTIZE" for source in sources):
        kinds = {_type_name(source.get_input(0).dtype) for source in sources if source is not None}
        return kinds.pop() if len(kinds) == 1 else "mixed"
    return _type_name(layer.get_output(0).dtype)


def _skip_layout(layer: Any, producers: Mapping[str, Any]) -> Any:
    while layer is not None and _kind(layer) == "SHUFFLE":
        layer = producers.get(layer.get_input(0).name)
    return layer


def _type_name(dtype: Any) -> str:
    text = str(dtype).rpartition(".")[2].lower()
    return next((name for name, spellings in _SPELLINGS.items() if text in spellings), text)
