"""Configuration: explicit values win, mistakes are named with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from comfy.taco_dit import ConfigError, TACODiTConfigManager
from comfy.taco_dit.core.config_manager import TacoConfig, load_config, parse_config, validate_for


def test_defaults_without_a_file() -> None:
    assert parse_config(None, "x") == TacoConfig(source="x")


def test_explicit_values_win_and_auto_means_not_said() -> None:
    config = parse_config(
        {"parallel": {"ulysses_degree": 3, "data_parallel_degree": "auto", "cfg_parallel": False}}, "x"
    )
    assert config.parallel.ulysses_degree == 3
    assert config.parallel.data_parallel_degree is None
    assert config.parallel.cfg_parallel is False


@pytest.mark.parametrize(
    "content,message",
    [
        ({"paralel": {}}, r"unknown section 'paralel'; did you mean parallel\?"),
        ({"parallel": {"ulises_degree": 2}}, r"unknown key parallel.ulises_degree; did you mean ulysses_degree\?"),
        ({"parallel": {"enabled": 1}}, r"parallel.enabled is 1; allowed: true, false"),
        ({"parallel": {"ulysses_degree": 0}}, r"parallel.ulysses_degree is 0; allowed: auto, or a whole number"),
        ({"parallel": {"ulysses_degree": True}}, r"parallel.ulysses_degree is True"),
        ({"parallel": {"ring_degree": "2"}}, r"parallel.ring_degree is '2'; allowed: auto, or a whole number"),
        ({"parallel": {"tensor_parallel": 2}}, r"parallel.tensor_parallel is 2; allowed: true, false"),
        ({"memory": {"shard_weights": "yes"}}, r"memory.shard_weights is 'yes'; allowed: auto, true, false"),
        ({"optimization": {"engine": "xdit"}}, r"optimization.engine is 'xdit'; allowed: native, xfuser"),
        ({"optimization": {"use_cuda_graph": "yes"}}, r"allowed: auto, true, false"),
        (["parallel"], r"must hold sections"),
        ({"parallel": [1]}, r"parallel must hold keys"),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(content, "taco.yaml")


@pytest.mark.parametrize("world,degree,good", [(6, 3, True), (6, 4, False), (3, 3, True), (4, 3, False), (1, 2, False)])
def test_degrees_must_divide_the_ranks(world: int, degree: int, good: bool) -> None:
    config = parse_config({"parallel": {"sequence_parallel_degree": degree}}, "taco.yaml")
    if good:
        assert validate_for(config, world) is config
    else:
        with pytest.raises(
            ConfigError, match=f"sequence_parallel_degree is {degree}.*does not divide the {world} ranks"
        ):
            validate_for(config, world)


def test_degrees_must_fit_together() -> None:
    config = parse_config({"parallel": {"sequence_parallel_degree": 2, "data_parallel_degree": 4}}, "taco.yaml")
    with pytest.raises(ConfigError, match="does not divide the 4 ranks"):
        validate_for(config, 4)
    config = parse_config({"parallel": {"sequence_parallel": False, "ulysses_degree": 2}}, "taco.yaml")
    with pytest.raises(ConfigError, match="sequence_parallel is false"):
        validate_for(config, 2)


@pytest.mark.parametrize(
    "sequence,ulysses,ring,message",
    [
        (None, 2, 2, None), (4, 2, None, None), (4, None, 2, None), (4, 2, 2, None), (8, None, 8, None),
        (2, 4, None, "ulysses_degree is 4, which does not divide parallel.sequence_parallel_degree 2; allowed: auto, 1, 2"),
        (4, None, 8, "ring_degree is 8, which does not divide parallel.sequence_parallel_degree 4"),
        (None, None, 3, "ring_degree is 3, which does not divide the 8 ranks; allowed: auto, 1, 2, 4, 8"),
        (8, 2, 2, "ulysses_degree 2 times parallel.ring_degree 2 is 4, but parallel.sequence_parallel_degree is 8"),
        (None, 4, 4, "ulysses_degree 4 times parallel.ring_degree 4 is 16, which does not divide the 8 ranks"),
    ],
)  # fmt: skip
def test_ulysses_and_ring_multiply(
    sequence: int | None, ulysses: int | None, ring: int | None, message: str | None
) -> None:
    degrees = {"sequence_parallel_degree": sequence, "ulysses_degree": ulysses, "ring_degree": ring}
    config = parse_config({"parallel": degrees}, "taco.yaml")
    if message is None:
        assert validate_for(config, 8) is config
    else:
        with pytest.raises(ConfigError, match=message):
            validate_for(config, 8)


@pytest.mark.parametrize(
    "parallel,shard,message",
    [
        ({"tensor_parallel": True}, None, None),
        ({"tensor_parallel": True, "tensor_parallel_degree": 2, "ulysses_degree": 2}, None, None),
        ({"tensor_parallel": True, "tensor_parallel_degree": 3}, None,
         "tensor_parallel_degree is 3, which does not divide the 4 ranks; allowed: auto, 1, 2, 4"),
        ({"tensor_parallel_degree": 2}, None, "tensor_parallel_degree is 2, but parallel.tensor_parallel is false"),
        ({"tensor_parallel": True, "tensor_parallel_degree": 4, "ulysses_degree": 2}, None,
         "tensor_parallel_degree 4 leaves 1 copies of a network on 4 ranks, which data degree 1 times sequence degree 2"),
        ({"tensor_parallel": True}, True, "tensor_parallel and memory.shard_weights are both true"),
    ],
)  # fmt: skip
def test_tensor_parallelism_leaves_copies_for_other_degrees(
    parallel: dict[str, object], shard: bool | None, message: str | None
) -> None:
    config = parse_config({"parallel": parallel, "memory": {"shard_weights": shard}}, "taco.yaml")
    if message is None:
        assert validate_for(config, 4) is config
    else:
        with pytest.raises(ConfigError, match=message):
            validate_for(config, 4)


@pytest.mark.parametrize(
    "content,key",
    [
        ({"parallel": {"pipeline_parallel": True}}, "parallel.pipeline_parallel"),
        ({"memory": {"shard_weights": True}}, "memory.shard_weights"),
        ({"parallel": {"tensor_parallel": True}}, None),
    ],
)
def test_the_step_cache_needs_ranks_that_may_compute_other_blocks(content: dict[str, object], key: str | None) -> None:
    config = parse_config({**content, "optimization": {"use_cache": True}}, "taco.yaml")
    if key is None:
        assert validate_for(config, 4) is config
    else:
        with pytest.raises(ConfigError, match=f"optimization.use_cache and {key} are both true"):
            validate_for(config, 4)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("parallel: {enabled: true\nmemory: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(broken))
    good = tmp_path / "good.yaml"
    good.write_text("parallel:\n  ulysses_degree: 2\n")
    assert TACODiTConfigManager(str(good), world_size=2).config.parallel.ulysses_degree == 2


def test_the_file_in_the_repository_is_valid() -> None:
    assert TACODiTConfigManager().config.parallel.enabled
