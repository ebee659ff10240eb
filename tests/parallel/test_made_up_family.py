"""A family is one record and one network file: a made-up one is detected, loaded, sampled, and split over ranks."""

from __future__ import annotations

import pytest
import torch

from .ranks import run_ranks

HIDDEN, TEXT = 96, 40
LORA_SCALE = 0.7


def weights(depth=2):
    """A Pebble checkpoint's diffusion model."""
    from tests.made_up.network import Pebble

    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in Pebble(depth=depth).named_parameters()}
    return {
        f"model.diffusion_model.{name}": torch.randn(shape, generator=generator)
        / (shape[-1] ** 0.5 if shape[1:] else 50)
        for name, shape in shapes.items()
    }


def load():
    """The made-up family's model, found by what its file holds."""
    import comfy.families
    import comfy.sd
    from tests.made_up.family import FAMILY

    if FAMILY not in comfy.families.records():
        comfy.families.register(FAMILY)
    return comfy.sd.load_diffusion_model_state_dict(weights())


def conditioning(length, seed, mask=False):
    generator = torch.Generator().manual_seed(seed)
    fields = {"attention_mask": (torch.arange(length) < length - 3).float()[None]} if mask else {}
    return [[torch.randn((1, length, TEXT), generator=generator), fields]]


def lora():
    generator = torch.Generator().manual_seed(9)
    shapes = {"pebble_0_q": (HIDDEN, HIDDEN), "pebble_1_kv": (HIDDEN, HIDDEN), "pebble_1_down": (HIDDEN, 3 * HIDDEN)}
    out = {}
    for name, (outer, inner) in shapes.items():
        out[f"{name}.lora_down.weight"] = torch.randn((3, inner), generator=generator) / inner**0.5
        out[f"{name}.lora_up.weight"] = torch.randn((outer, 3), generator=generator) / 3**0.5
    return out


def replaced(args, extra):
    """A replaced block whose result depends on all tokens and all pictures."""
    out = extra["original_block"]({**args, "img": args["img"] - 0.1 * args["img"].mean(dim=(0, 1), keepdim=True)})
    return {"img": out["img"]}


def draw(patcher, height=9, width=13, cfg=1.0, mask=False, pictures=1):
    import comfy.sample

    latent = torch.zeros((pictures, 4, height, width))
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, 3), 2, cfg, "euler", "simple", conditioning(7, 1, mask),
        conditioning(7, 2, mask), latent, disable_pbar=True, seed=3,
    )  # fmt: skip


def cases(patcher):
    """{name: (patcher, arguments of `draw`)}."""
    import comfy.sd

    adapted, _ = comfy.sd.load_lora_for_models(patcher, None, lora(), LORA_SCALE, 0)
    patched = patcher.clone()
    patched.set_model_patch_replace(replaced, "dit", "double_block", 1)
    return {
        "one picture": (patcher, {}),
        "guidance and mask": (patcher, {"cfg": 4.0, "mask": True, "height": 5}),
        "replaced block": (patched, {"cfg": 4.0, "mask": True, "pictures": 2}),
        "LoRA": (adapted, {"height": 7, "width": 3}),
        "three pictures": (patcher, {"pictures": 3}),
    }


def serial_and_parallel(manager, rings):
    """{case: (plan, deviation from one rank)} for each ring degree, and what the LoRA changes."""
    import dataclasses

    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    runtime.activate(runtime.Runtime(TacoConfig(), manager, lockstep, engine))
    found, pictures = {ring: {} for ring in rings}, {}
    lockstep.begin("made up")
    for name, (patcher, arguments) in cases(load()).items():
        patcher.taco_parallel = dataclasses.replace(ParallelConfig(), enabled=False)
        pictures[name] = serial = draw(patcher, **arguments)
        for ring, out in found.items():
            patcher.taco_parallel = dataclasses.replace(ParallelConfig(), ring_degree=ring)
            parallel = draw(patcher, **arguments)
            out[name] = engine.last_run.plan, ((parallel - serial).abs().max() / serial.abs().max()).item()
    lora_changes = (pictures["LoRA"] - draw_plain(load())).abs().max().item()
    lockstep.end()
    return found, lora_changes


def draw_plain(patcher):
    import dataclasses

    from comfy.taco_dit.core.config_manager import ParallelConfig

    patcher.taco_parallel = dataclasses.replace(ParallelConfig(), enabled=False)
    from comfy.taco_dit.core import model_wrapper

    patcher.remove_wrappers_with_key("outer_sample", model_wrapper.WRAPPER_KEY)
    return draw(patcher, height=7, width=3)


@pytest.mark.parametrize(
    "world,plans",
    [
        (2, {None: ("ulysses 2", "cfg 2"), 2: ("ring 2", "ring 2")}),
        (3, {None: ("ulysses 3", "ulysses 3"), 3: ("ring 3", "ring 3")}),
        (4, {2: ("ulysses 2 x ring 2", "cfg 2 x ring 2")}),
    ],
)
def test_parallel_equals_serial(world, plans):
    for found, lora_changes in run_ranks(world, serial_and_parallel, list(plans)):
        assert lora_changes > 1e-2
        for ring, (one_row, two_rows) in plans.items():
            out = found[ring]
            assert all(deviation < 1e-5 for _, deviation in out.values()), out
            assert out["one picture"][0] == out["LoRA"][0] == out["replaced block"][0] == one_row
            assert out["guidance and mask"][0] == two_rows


def test_public_names_come_from_the_record():
    patcher = load()
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models

    assert type(patcher.model) is comfy.model_base.Pebble
    assert isinstance(patcher.model.model_config, comfy.supported_models.Pebble)
    assert isinstance(patcher.model.latent_format, comfy.latent_formats.Pebble)
    assert type(patcher.model).__name__ == "Pebble" and patcher.model.diffusion_model.blocks[0].kv_heads == 2
