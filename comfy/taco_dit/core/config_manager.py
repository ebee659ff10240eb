"""Configuration of the parallel core: a YAML file's explicit values, else what is detected.

Everything is parsed and checked before weights are loaded, into frozen dataclasses. `None` means
"auto": the program chooses. An unknown key, a value of the wrong kind, or degrees that cannot be laid out over the
ranks raise `ConfigError`, which names the key and the allowed values.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from typing import Any

DEFAULT_FILE = "taco_dit_config.yaml"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the reason and the allowed values."""


@dataclass(frozen=True)
class ParallelConfig:
    """`parallel:` - which strategies may be used, and fixed degrees. Degrees are numbers of ranks."""

    enabled: bool = True
    auto_detect: bool = True
    sequence_parallel: bool = True
    sequence_parallel_degree: int | None = None
    ulysses_degree: int | None = None
    ring_degree: int | None = None
    pipeline_parallel: bool = False
    pipeline_parallel_degree: int | None = None
    pipefusion: bool = False
    pipefusion_patches: int | None = None
    pipefusion_warmup_steps: int = 2
    tensor_parallel: bool = False
    tensor_parallel_degree: int | None = None
    cfg_parallel: bool = True
    data_parallel: bool = True
    data_parallel_degree: int | None = None
    spatial_parallel: bool = True
    exchange: str = "collective"


@dataclass(frozen=True)
class OptimizationConfig:
    """`optimization:` - how a rank computes. auto: stages are not compiled, calls are captured in CUDA graphs on CUDA."""

    engine: str = "native"
    use_flash_attention: bool = True
    use_torch_compile: bool | None = None
    use_cuda_graph: bool | None = None
    linear_precision: str = "auto"
    attention: str = "auto"
    use_cache: bool = False
    cache_mode: str = "first_block"
    cache_threshold: float = 0.08
    cache_interval: int = 2
    cache_warm_up_steps: int = 4


@dataclass(frozen=True)
class MemoryConfig:
    """`memory:` - what may leave the GPU, and where it waits then: in host memory, the only place there is.

    shard_weights: each rank keeps a part of a network's blocks; auto: when the network does not fit one GPU.
    """

    enable_offload: bool = True
    offload_device: str = "cpu"
    shard_weights: bool | None = None


@dataclass(frozen=True)
class RecoveryConfig:
    """`recovery:` - what happens when a rank ends or does not answer. The deadline is in seconds."""

    rerun_prompts: bool = False
    answer_deadline_s: int = 60


@dataclass(frozen=True)
class TacoConfig:
    """The whole configuration; `source` says where it came from."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    source: str = "defaults"

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dict, for JSON."""
        return dataclasses.asdict(self)


_SECTIONS: dict[str, type[Any]] = {
    "parallel": ParallelConfig,
    "optimization": OptimizationConfig,
    "memory": MemoryConfig,
    "recovery": RecoveryConfig,
}
_CHOICES = {
    "parallel.exchange": ("collective", "peer", "auto"),
    "optimization.engine": ("native", "xfuser"),
    "optimization.linear_precision": ("auto", "bf16", "fp8", "int8"),
    "optimization.attention": ("auto", "sdpa", "cudnn", "flash", "sage"),
    "optimization.cache_mode": ("first_block", "interval"),
    "memory.offload_device": ("cpu",),
}


def can_run(key: str) -> bool:
    """Whether this version runs the strategy that a key such as `parallel.tensor_parallel` turns on."""
    section, _, name = key.partition(".")
    return name in {field.name for field in dataclasses.fields(_SECTIONS[section])}


def _closest(name: str, known: list[str]) -> str:
    import difflib

    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]}?" if match else ""


def _checked(key: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the field's kind. Raises ConfigError."""
    arguments = typing.get_args(kind)
    optional = type(None) in arguments
    wanted = next((a for a in arguments if a is not type(None)), kind)
    if value is None or (optional and value == "auto"):
        if optional:
            return None
        raise ConfigError(f"{key} must not be empty")
    if wanted is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is {value!r}; allowed: {'auto, ' if optional else ''}true, false")
    elif wanted is int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            automatic = "auto, or " if optional else ""
            raise ConfigError(f"{key} is {value!r}; allowed: {automatic}a whole number of at least 1")
    elif wanted is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ConfigError(f"{key} is {value!r}; allowed: a number of at least 0")
        return float(value)
    elif key in _CHOICES and value not in _CHOICES[key]:
        raise ConfigError(f"{key} is {value!r}; allowed: {', '.join(_CHOICES[key])}")
    return value


def parse_config(content: Any, source: str) -> TacoConfig:
    """A configuration from a YAML file's content. Raises ConfigError."""
    if content is None:
        return TacoConfig(source=source)
    if not isinstance(content, dict):
        raise ConfigError(f"{source} must hold sections ({', '.join(_SECTIONS)}), not {type(content).__name__}")
    sections: dict[str, Any] = {}
    for name, values in content.items():
        if name not in _SECTIONS:
            raise ConfigError(
                f"{source}: unknown section {name!r}{_closest(str(name), list(_SECTIONS))} "
                f"(allowed: {', '.join(_SECTIONS)})"
            )
        kinds = typing.get_type_hints(_SECTIONS[name])
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{source}: {name} must hold keys ({', '.join(kinds)}), not {values!r}")
        for key in values or {}:
            if key not in kinds:
                raise ConfigError(
                    f"{source}: unknown key {name}.{key}{_closest(str(key), list(kinds))} (allowed: {', '.join(kinds)})"
                )
        try:
            checked = {key: _checked(f"{name}.{key}", value, kinds[key]) for key, value in (values or {}).items()}
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        sections[name] = _SECTIONS[name](**checked)
    return TacoConfig(**sections, source=source)


def load_config(path: str) -> TacoConfig:
    """Read and check a YAML file. Raises ConfigError, also for a missing or malformed file."""
    import yaml

    if not os.path.isfile(path):
        raise ConfigError(f"configuration file {path} does not exist; give another with --taco-config")
    with open(path, encoding="utf-8") as file:
        try:
            content = yaml.safe_load(file)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f" in line {mark.line + 1}" if mark is not None else ""
            raise ConfigError(f"{path} is not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    return parse_config(content, path)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def sequence_degree(parallel: ParallelConfig) -> int | None:
    """How many ranks share the tokens of a picture, or its part that is configured; None: nothing is."""
    ulysses, ring = parallel.ulysses_degree, parallel.ring_degree
    if parallel.sequence_parallel_degree is not None or (ulysses is None and ring is None):
        return parallel.sequence_parallel_degree
    return (ulysses or 1) * (ring or 1)


def tensor_degree(parallel: ParallelConfig, ranks: int) -> int:
    """How many ranks share the linears of one copy of a network; auto: all that fixed degrees leave of `ranks`."""
    if not parallel.enabled or not parallel.tensor_parallel:
        return 1
    if parallel.tensor_parallel_degree is not None:
        return parallel.tensor_parallel_degree
    fixed = (sequence_degree(parallel) or 1) * (parallel.data_parallel_degree or 1)
    if parallel.pipeline_parallel:
        fixed *= parallel.pipeline_parallel_degree or 1
    return max(1, ranks // fixed)


def pipeline_degree(parallel: ParallelConfig, ranks: int) -> int:
    """How many stages one copy of a network has; auto: all ranks that fixed degrees and tensor parallelism leave."""
    if not parallel.enabled or not parallel.pipeline_parallel:
        return 1
    if parallel.pipeline_parallel_degree is not None:
        return parallel.pipeline_parallel_degree
    fixed = (sequence_degree(parallel) or 1) * (parallel.data_parallel_degree or 1)
    return max(1, ranks // (fixed * tensor_degree(parallel, ranks)))


def _validate_tensor(config: TacoConfig, world_size: int) -> int:
    """The number of copies of a network that tensor parallelism leaves. Raises ConfigError."""
    parallel, source = config.parallel, config.source
    degree = parallel.tensor_parallel_degree or 1
    if degree > 1 and not parallel.tensor_parallel:
        raise ConfigError(
            f"{source}: parallel.tensor_parallel_degree is {degree}, but parallel.tensor_parallel is false; "
            "allowed: auto, 1, or parallel.tensor_parallel: true"
        )
    if world_size % degree:
        allowed = ", ".join(map(str, divisors(world_size)))
        raise ConfigError(
            f"{source}: parallel.tensor_parallel_degree is {degree}, which does not divide the {world_size} ranks; "
            f"allowed: auto, {allowed}"
        )
    if parallel.tensor_parallel and config.memory.shard_weights:
        raise ConfigError(
            f"{source}: parallel.tensor_parallel and memory.shard_weights are both true; each deals the same weights over "
            "the ranks: set one of them to false"
        )
    return world_size // degree


def _validate_pipeline(config: TacoConfig, world_size: int) -> None:
    """Check the degree of pipeline stages and what PipeFusion needs. Raises ConfigError."""
    parallel, source = config.parallel, config.source
    degree = parallel.pipeline_parallel_degree or 1
    if degree > 1 and not parallel.pipeline_parallel:
        raise ConfigError(
            f"{source}: parallel.pipeline_parallel_degree is {degree}, but parallel.pipeline_parallel is false; "
            "allowed: auto, 1, or parallel.pipeline_parallel: true"
        )
    stages, cut = pipeline_degree(parallel, world_size), tensor_degree(parallel, world_size)
    if world_size % (stages * cut):
        raise ConfigError(
            f"{source}: {stages} pipeline stages times tensor degree {cut} is {stages * cut}, which does not divide the "
            f"{world_size} ranks; set parallel.pipeline_parallel_degree to auto or a divisor of {world_size}"
        )
    if parallel.pipeline_parallel and config.memory.shard_weights:
        raise ConfigError(
            f"{source}: parallel.pipeline_parallel and memory.shard_weights are both true; each deals the same weights over "
            "the ranks: set one of them to false"
        )
    if not parallel.pipefusion:
        return
    if not parallel.pipeline_parallel:
        raise ConfigError(f"{source}: parallel.pipefusion needs parallel.pipeline_parallel: true")
    if cut > 1 or config.optimization.engine == "xfuser":
        other = "parallel.tensor_parallel" if cut > 1 else "optimization.engine: xfuser"
        raise ConfigError(f"{source}: parallel.pipefusion cannot be combined with {other}; switch one of them off")
    patches = parallel.pipefusion_patches
    if patches is not None and patches < stages:
        raise ConfigError(
            f"{source}: parallel.pipefusion_patches is {patches}, fewer than the {stages} pipeline stages, which would wait "
            f"for one another; allowed: auto, {stages} or more"
        )


def _validate_cache(config: TacoConfig) -> None:
    """Check that ranks may decide which blocks they compute. Raises ConfigError."""
    dealt = {
        "parallel.pipeline_parallel": config.parallel.pipeline_parallel,
        "memory.shard_weights": config.memory.shard_weights,
    }
    for key, on in dealt.items():
        if on and config.optimization.use_cache:
            raise ConfigError(
                f"{config.source}: optimization.use_cache and {key} are both true, but with {key} all ranks have to compute "
                "the same blocks; set one of them to false"
            )


def _validate_sequence(config: TacoConfig) -> None:
    """Check the degrees of tokens against each other. Raises ConfigError."""
    parallel, source = config.parallel, config.source
    sequence, ulysses, ring = parallel.sequence_parallel_degree, parallel.ulysses_degree, parallel.ring_degree
    if sequence is not None:
        for name, degree in (("ulysses_degree", ulysses), ("ring_degree", ring)):
            if degree is not None and sequence % degree:
                allowed = ", ".join(map(str, divisors(sequence)))
                raise ConfigError(
                    f"{source}: parallel.{name} is {degree}, which does not divide parallel.sequence_parallel_degree "
                    f"{sequence}; allowed: auto, {allowed}"
                )
        if ulysses is not None and ring is not None and ulysses * ring != sequence:
            raise ConfigError(
                f"{source}: parallel.ulysses_degree {ulysses} times parallel.ring_degree {ring} is {ulysses * ring}, but "
                f"parallel.sequence_parallel_degree is {sequence}; set one of the three to auto"
            )
    degree = sequence_degree(parallel) or 1
    if not parallel.sequence_parallel and degree > 1:
        raise ConfigError(f"{source}: parallel.sequence_parallel is false but its degree is {degree}; allowed: auto, 1")


def validate_for(config: TacoConfig, world_size: int) -> TacoConfig:
    """Check fixed degrees against the number of ranks. Raises ConfigError."""
    parallel = config.parallel
    copies = _validate_tensor(config, world_size)
    _validate_pipeline(config, world_size)
    _validate_cache(config)
    allowed = ", ".join(str(d) for d in divisors(world_size))
    fixed = {
        "sequence_parallel_degree": parallel.sequence_parallel_degree,
        "ulysses_degree": parallel.ulysses_degree,
        "ring_degree": parallel.ring_degree,
        "data_parallel_degree": parallel.data_parallel_degree,
    }
    for name, degree in fixed.items():
        if degree is not None and world_size % degree:
            raise ConfigError(
                f"{config.source}: parallel.{name} is {degree}, which does not divide the {world_size} ranks; "
                f"allowed: auto, {allowed}"
            )
    _validate_sequence(config)
    degree = sequence_degree(parallel) or 1
    if world_size % degree:
        raise ConfigError(
            f"{config.source}: parallel.ulysses_degree {parallel.ulysses_degree} times parallel.ring_degree "
            f"{parallel.ring_degree} is {degree}, which does not divide the {world_size} ranks; set one of them to auto"
        )
    data = parallel.data_parallel_degree or 1
    if world_size % (degree * data):
        raise ConfigError(
            f"{config.source}: parallel.data_parallel_degree {data} times sequence degree {degree} is "
            f"{degree * data}, which does not divide the {world_size} ranks; set one of them to auto"
        )
    if copies % (degree * data):
        raise ConfigError(
            f"{config.source}: parallel.tensor_parallel_degree {world_size // copies} leaves {copies} copies of a network on "
            f"{world_size} ranks, which data degree {data} times sequence degree {degree} does not divide; set one of them "
            "to auto"
        )
    return config
