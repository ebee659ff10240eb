"""Sampling with Flux ControlNets on several ranks, against the same on one."""

from __future__ import annotations

import dataclasses
import functools

import torch

from tests import tiny_adapters
from tests.tiny_models import CLIP_WIDTH, T5_WIDTH, flux_shapes, random_weights

WORST = 2e-5


class Vae:
    """Latents that are the pictures' 8 x 8 means."""

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        return torch.nn.functional.avg_pool2d(pictures.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model():
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(random_weights(flux_shapes(), 1))


@functools.cache
def loaded(name):
    from comfy.control.loading import load_controlnet_state_dict

    return load_controlnet_state_dict(getattr(tiny_adapters, f"control_{name}")())


def foreign(control):
    """The same network, as a class of a pack that mixes the rows of a call."""

    class Mixing(type(control)):
        def get_control(self, *args):
            out = super().get_control(*args) or {}
            return {kind: [value - 0.3 * value.mean(0, keepdim=True) for value in out[kind]] for kind in out}

    control.__class__ = Mixing
    return control


def nets():
    """{case: (chain of (layout, strength, interval, number of pictures, mask), foreign)}."""
    whole, late = (0.0, 1.0), (0.5, 1.0)
    return {
        "xlabs": [("xlabs", 1.0, whole, 1)],
        "instantx": [("instantx", 0.8, whole, 3)],
        "union of two": [("union", 0.6, whole, 2), ("inpaint", 0.9, whole, 1)],
        "late": [("instantx", 1.0, late, 1), ("xlabs", 0.5, whole, 1)],
        "foreign": [("xlabs", 1.0, whole, 1)],
    }


def chained(case):
    """(positive, negative) conditionings with the chain of a case."""
    from comfy_nodes.controlnet import with_control

    conds = [[[drawn(1, 7, T5_WIDTH, seed=i), {"pooled_output": drawn(1, CLIP_WIDTH, seed=i + 2)}]] for i in (1, 2)]
    for place, (name, strength, interval, pictures) in enumerate(nets()[case]):
        control = loaded(name).copy()
        if name == "union":
            control.set_extra_arg("control_type", [2])
        image = torch.rand(pictures, 70, 90, 3, generator=torch.Generator().manual_seed(place))
        keep = torch.rand(1, 1, 70, 90, generator=torch.Generator().manual_seed(9)).round()
        extra = [keep] if name == "inpaint" else []
        conds = list(with_control(conds, control, image, strength, interval, vae=Vae(), extra_concat=extra))
    if case == "foreign":
        foreign(conds[0][0][1]["control"])  # the negative prompt has the same object
    return conds


def draw(patcher, case, height, width, cfg, pictures, masked=False):
    import comfy.sample

    positive, negative = chained(case)
    latent = drawn(pictures, 16, height, width, seed=4)
    mask = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(6)) if masked else None
    return comfy.sample.sample(
        patcher, comfy.sample.prepare_noise(latent, 3), 2, cfg, "euler", "simple", positive, negative, latent,
        denoise=0.9, noise_mask=mask, disable_pbar=True, seed=3,
    )  # fmt: skip


# case -> (height, width, cfg, pictures, noise mask)
CALLS = {
    "xlabs": (10, 14, 1.0, 1, True),
    "instantx": (7, 9, 4.0, 3, False),
    "union of two": (9, 6, 4.0, 2, False),
    "late": (7, 11, 1.0, 2, True),
    "foreign": (6, 6, 4.0, 2, False),
}


def control_results(manager, rings=(None,)):
    """{(case, ring degree): (plan, deviation from one rank, change by the ControlNets, evaluations)}."""
    from comfy.control.network import ControlNet
    from comfy.ldm.flux.controlnet import ControlNetFlux
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    runtime.activate(runtime.Runtime(TacoConfig(), manager, lockstep, engine))
    patcher, out = model(), {}
    rows = []
    forward, get_control = ControlNetFlux.forward, ControlNet.get_control

    def counted(self, x, *args, **kwargs):
        rows.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    lockstep.begin("control")
    for case, call in CALLS.items():
        patcher.taco_parallel = dataclasses.replace(ParallelConfig(), enabled=False)
        serial = draw(patcher, case, *call)
        ControlNet.get_control = lambda self, *args: None
        plain = draw(patcher, case, *call)
        ControlNet.get_control = get_control
        change = ((plain - serial).abs().max() / serial.abs().max()).item()
        for ring in rings:
            patcher.taco_parallel = dataclasses.replace(ParallelConfig(), ring_degree=ring)
            rows.clear()
            ControlNetFlux.forward = counted
            parallel = draw(patcher, case, *call)
            ControlNetFlux.forward = forward
            deviation = ((parallel - serial).abs().max() / serial.abs().max()).item()
            out[case, ring] = (engine.last_run.plan, deviation, change, list(rows))
    lockstep.end()
    return out


def sd3_residuals(manager):
    """Deviations of control networks with tokens shared: SD3's in each layout, HunyuanDiT's."""
    from comfy.control.loading import load_controlnet_state_dict
    from comfy.ldm import dit
    from comfy.taco_dit.core.config_manager import TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy.taco_dit.core.plan import ParallelDims

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    lockstep.begin("sd3")
    plan, out = engine.token_plan(ParallelDims(ulysses_degree=manager.world_size)), []
    files = (
        tiny_adapters.control_sd3(),
        tiny_adapters.control_sd35(False),
        tiny_adapters.control_sd35(True),
        tiny_adapters.control_hunyuan(),
    )
    for sd in files:
        network = load_controlnet_state_dict(sd).control_model
        pooled = 2048 if getattr(network, "double_y_emb", False) else 48
        call = {
            "x": drawn(2, 16, 7, 10, seed=1), "timesteps": torch.tensor([300.0, 700.0]), "y": drawn(2, pooled, seed=2),
            "context": drawn(2, 5, T5_WIDTH, seed=3), "hint": drawn(1, 16, 7, 10, seed=4),
        }  # fmt: skip
        if sd is files[-1]:
            call = {
                "x": drawn(2, 4, 7, 10, seed=1), "timesteps": torch.tensor([300.0, 700.0]), "hint": drawn(1, 4, 7, 10, seed=4),
                "context": drawn(2, 77, 40, seed=3), "encoder_hidden_states_t5": drawn(2, 16, 24, seed=2),
                "text_embedding_mask": torch.ones(2, 77), "text_embedding_mask_t5": (torch.arange(16) < 9).float()[None],
            }  # fmt: skip
        with torch.inference_mode():
            one = network(**call)["output"]
            many = network(**call, transformer_options=dit.DenoiserCall(plan=plan).within({}))["output"]
        assert len(one) == len(many)
        out.append(max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(one, many)))
    lockstep.end()
    return out


class FrameVae(Vae):
    """As `Vae`, for latents with an axis of frames."""

    def encode(self, pictures):
        return super().encode(pictures).unsqueeze(2)


def qwen_residuals(manager):
    """Deviations with tokens shared: InstantX's residuals, and Qwen-Image with DiffSynth's patch; what the patch changes."""
    from comfy.control.loading import load_controlnet_state_dict
    from comfy.ldm import dit
    from comfy.ldm.qwen_image.control_patch import QwenImageBlockWiseControlNet, sizes_of
    from comfy.taco_dit.core.config_manager import TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy.taco_dit.core.plan import ParallelDims
    from comfy_extras.nodes_model_patch import DiffSynthCnetPatch
    from tests.tiny_families import TINY

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    lockstep.begin("qwen")
    plan = engine.token_plan(ParallelDims(ulysses_degree=manager.world_size))
    deviations = []

    def compare(network, options, result, **call):
        with torch.inference_mode():
            one = result(network(**call, transformer_options=options))
            many = result(network(**call, transformer_options=dit.DenoiserCall(plan=plan).within(options)))
        deviations.append(((one - many).abs().max() / one.abs().max()).item())
        return one

    call = {"x": drawn(2, 16, 1, 7, 10, seed=1), "context": drawn(2, 5, 40, seed=3)}
    control = load_controlnet_state_dict(tiny_adapters.control_qwen()).control_model
    hint = {"timesteps": torch.tensor([0.3, 0.7]), "hint": drawn(1, 16, 1, 7, 10, seed=4)}
    compare(control, {}, lambda out: torch.stack(out["input"][::30]), **call, **hint)

    tiny = TINY["qwen_image_edit"]
    network = tiny.model("cpu").diffusion_model
    network.load_state_dict(random_weights(tiny.shapes(), 1))
    sd = tiny_adapters.diffsynth()
    patch_network = QwenImageBlockWiseControlNet(**sizes_of(sd))
    patch_network.load_state_dict(sd)

    class Patcher:
        model = patch_network.requires_grad_(False)

    class OnShards(DiffSynthCnetPatch):
        def __call__(self, inputs):
            raise AssertionError("tokens were gathered for the patch")

    image = torch.rand(1, 56, 80, 3, generator=torch.Generator().manual_seed(2))
    patch = OnShards(Patcher, FrameVae(), image, 0.8)
    call |= {"timestep": torch.tensor([0.3, 0.7]), "ref_latents": [drawn(2, 16, 1, 5, 7, seed=5)]}
    with_patch = compare(network, {"patches": {"double_block": [patch]}}, lambda out: out, **call)
    plain = compare(network, {}, lambda out: out, **call)
    lockstep.end()
    return deviations, (with_patch - plain).abs().max().item()


SD1 = {
    "in_channels": 4, "out_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "context_dim": 24, "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_head_channels": 64,
}  # fmt: skip


def unet():
    """(patcher of a tiny UNet of the kind of SD1, its control network)."""
    import comfy.model_base
    from comfy.cldm.cldm import ControlNet as Network
    from comfy.control.loading import load_controlnet_state_dict
    from comfy.supported_models_base import BASE
    from comfy.taco_dit import TACODiTModelPatcher

    class Tiny(BASE):
        unet_config = {}

    def filled(network, seed):
        return random_weights({key: tuple(value.shape) for key, value in network.state_dict().items()}, seed)

    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = Tiny(dict(SD1))
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device=torch.device("cpu"), unet_model=UNetModel)
    model.diffusion_model.load_state_dict(filled(model.diffusion_model, 1))
    control = load_controlnet_state_dict(filled(Network(**{k: v for k, v in SD1.items() if k != "out_channels"}), 2))
    device = torch.device("cpu")
    return TACODiTModelPatcher(model.eval().requires_grad_(False), load_device=device, offload_device=device), control


def unet_results(manager):
    """{conditionings x pictures: (plan, deviation from one rank)} of a UNet with a ControlNet and a hint a picture."""
    import comfy.sample
    from comfy.taco_dit import runtime
    from comfy.taco_dit.core.config_manager import ParallelConfig, TacoConfig
    from comfy.taco_dit.core.execution_engine import TACODiTExecutionEngine
    from comfy.taco_dit.core.lockstep import RankLockstep
    from comfy_nodes.controlnet import with_control

    lockstep = RankLockstep(manager)
    engine = TACODiTExecutionEngine(TacoConfig(), manager, lockstep)
    runtime.activate(runtime.Runtime(TacoConfig(), manager, lockstep, engine))
    patcher, control = unet()
    conds = [[[drawn(1, 7, 24, seed=i), {}]] for i in (1, 2)]
    out = {}
    lockstep.begin("unet")
    for cfg, pictures in ((4.0, 1), (1.0, 3)):
        image = torch.rand(pictures, 60, 60, 3, generator=torch.Generator().manual_seed(7))
        found = []
        for enabled in (False, True):
            patcher.taco_parallel = dataclasses.replace(ParallelConfig(), enabled=enabled)
            positive, negative = with_control(conds, control, image, 0.8, (0.0, 1.0))
            latent = torch.zeros(pictures, 4, 7, 9)
            found.append(
                comfy.sample.sample(
                    patcher, comfy.sample.prepare_noise(latent, 3), 2, cfg, "euler", "normal", positive, negative,
                    latent, disable_pbar=True, seed=3,
                )
            )  # fmt: skip
        deviation = (found[0] - found[1]).abs().max() / found[0].abs().max()
        out[engine.last_run.plan] = deviation.item()
    lockstep.end()
    return out
