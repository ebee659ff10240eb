"""Control networks of UNets: against the UNet's own blocks, in every layout; control LoRA; T2I-Adapters."""

import types

import pytest
import torch
import torch.nn.functional as F

from comfy.cldm.cldm import ControlNet as Network
from comfy.control.loading import load_controlnet_state_dict
from comfy.denoiser_batch import DenoiserBatch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.unet import keys
from tests.tiny_models import Shapes, random_weights

SIZES = {
    "in_channels": 4, "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "context_dim": 24,
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "num_head_channels": 64,
    "use_linear_in_transformer": True,
}  # fmt: skip
UP = {"out_channels": 4, "transformer_depth_output": [1, 1, 1, 1]}


def weights(network, seed):
    sd = random_weights({key: tuple(value.shape) for key, value in network.state_dict().items()}, seed)
    return {key: value + 1 if is_scale(key) else value for key, value in sd.items()}


def is_scale(key):
    """Scales of group norms, which have no name of their own."""
    return key.endswith(("in_layers.0.weight", "out_layers.0.weight", "out.0.weight")) or ".norm.weight" in key


def control_weights(kinds=None, seed=3):
    return weights(Network(**SIZES, union_controlnet_num_control_type=kinds), seed)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prepared(control, hints=1, strength=1.0):
    picture = torch.rand(hints, 3, 56, 72, generator=torch.Generator().manual_seed(5))
    control = control.copy().set_cond_hint(picture, strength)
    sampling = types.SimpleNamespace(
        timestep=lambda sigma: sigma * 1000, calculate_input=lambda sigma, x: x / (sigma.view(-1, 1, 1, 1) ** 2 + 1)
    )
    control.pre_run(types.SimpleNamespace(model_sampling=sampling), lambda percent: 1.0 - percent)
    return control, picture


def hint_features(sd, picture):
    hint = picture
    for i, stride in enumerate((1, 1, 2, 1, 2, 1, 2, 1)):
        weight, bias = (sd[f"input_hint_block.{2 * i}.{kind}"] for kind in ("weight", "bias"))
        hint = F.conv2d(F.silu(hint) if i else hint, weight, bias, stride=stride, padding=1)
    return hint


def expected(sd, x, timesteps, context, guide):
    """Residuals by a whole UNet with the same first half, whose patches see what is after each block."""
    unet = UNetModel(**SIZES, **UP)
    unet.load_state_dict({**weights(unet, 9), **{k: v for k, v in sd.items() if k in unet.state_dict()}})
    seen = {}

    def block(h, options):
        h = h + guide if options["block"] == ("input", 0) else h
        seen[options["block"]] = h
        return h

    def middle(h, skip, options):
        seen.setdefault("middle", h)
        return h, skip

    patches = {"input_block_patch": [block], "output_block_patch": [middle]}
    unet(x, timesteps, context, transformer_options={"patches": patches})

    def projected(name, h):
        return F.conv2d(h, sd[f"{name}.0.weight"], sd[f"{name}.0.bias"])

    outputs = [projected(f"zero_convs.{i}", seen["input", i]) for i in range(len(unet.input_blocks))]
    return outputs, projected("middle_block_out", seen["middle"])


def residuals(control, x, context, conds=1):
    sigma = torch.full((x.shape[0],), 0.5)
    with torch.no_grad():
        return control.get_control(x, sigma, {"c_crossattn": context}, conds, {})


@pytest.mark.parametrize("layout", ["plain", "prefix", "difference", "diffusers"])
def test_layouts(layout):
    """At an odd size, with two conditionings, one hint, and strength 0.5."""
    sd, model = control_weights(), None
    if layout == "plain":
        stored = dict(sd)
    elif layout == "diffusers":
        names = {ours: theirs for theirs, ours in keys.unet_to_diffusers({**SIZES, **UP}).items()}
        stored = {to_diffusers(key, names): value for key, value in sd.items()}
    else:
        stored = {f"control_model.{key}": value for key, value in sd.items()}
    if layout == "difference":
        base = {key: draw(*value.shape, seed=7) for key, value in sd.items() if key.startswith("middle_block.")}
        stored |= {f"control_model.{key}": sd[key] - value for key, value in base.items()}
        stored["difference"] = torch.tensor(1)
        model = Placed({f"diffusion_model.{key}": value for key, value in base.items()})
    control, picture = prepared(load_controlnet_state_dict(stored, model), strength=0.5)
    x, context = draw(2, 4, 7, 9), draw(2, 5, 24, seed=2)
    got = residuals(control, x, context, 2)
    with torch.no_grad():
        outputs, middle = expected(sd, x / 1.25, torch.full((2,), 500.0), context, hint_features(sd, picture))
    assert got["input"] == [] and len(got["output"]) == len(outputs) == 4
    for a, b in zip([*got["output"], *got["middle"]], [*outputs, middle]):
        torch.testing.assert_close(a, b * 0.5, rtol=1e-4, atol=1e-4)


class Placed:
    """A model on the device, as far as differences to it ask."""

    def __init__(self, sd):
        self.sd = sd

    def model_state_dict(self):
        return self.sd


@pytest.fixture(autouse=True)
def _placed(monkeypatch):
    import comfy.model_management

    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management, "load_models_gpu", lambda models, **k: load([m for m in models if type(m) is not Placed])
    )


def to_diffusers(key, names):
    if key in names:
        return names[key]
    stem, _, kind = key.rpartition(".")
    if stem == "middle_block_out.0":
        return f"controlnet_mid_block.{kind}"
    if stem.startswith("zero_convs."):
        return f"controlnet_down_blocks.{stem.split('.')[1]}.{kind}"
    if stem.startswith("input_hint_block."):
        number = int(stem.split(".")[1]) // 2
        place = {0: "conv_in", 7: "conv_out"}.get(number, f"blocks.{number - 1}")
        return f"controlnet_cond_embedding.{place}.{kind}"
    return key.replace(".attn.in_proj.", ".attn.in_proj_")


def test_union():
    """The kind of hint is added to the time embedding, and its transformer shifts the hint's channels."""
    sd = control_weights(kinds=6)
    names = {ours: theirs for theirs, ours in keys.unet_to_diffusers({**SIZES, **UP}).items()}
    control, picture = prepared(load_controlnet_state_dict({to_diffusers(k, names): v for k, v in sd.items()}))
    x, context = draw(1, 4, 7, 9), draw(1, 5, 24, seed=2)
    automatic = residuals(control, x, context)
    control.set_extra_arg("control_type", [4])
    got = residuals(control, x, context)
    assert not torch.allclose(got["middle"][0], automatic["middle"][0], atol=1e-3)

    network = control.control_model
    with torch.no_grad():
        hint = hint_features(sd, picture)
        layer = torch.nn.TransformerEncoderLayer(
            64, 8, 256, 0.0, lambda t: t * torch.sigmoid(1.702 * t), batch_first=True, norm_first=True
        )
        parts = {"self_attn.in_proj_": "attn.in_proj.", "self_attn.out_proj.": "attn.out_proj.", "norm1.": "ln_1.",
                 "norm2.": "ln_2.", "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj."}  # fmt: skip
        layer.load_state_dict(
            {a + kind: sd[f"transformer_layes.0.{b}{kind}"] for a, b in parts.items() for kind in ("weight", "bias")}
        )
        token = layer((hint.mean((2, 3)) + sd["task_embedding"][4])[:, None])[:, 0]
        shift = F.linear(token, sd["spatial_ch_projs.weight"], sd["spatial_ch_projs.bias"])
        torch.testing.assert_close(network._hint_of_kind(hint, [4]), hint + shift[:, :, None, None], rtol=1e-4, atol=1e-4)
        steps = torch.exp(torch.arange(128) * (-torch.log(torch.tensor(10000.0)) / 128))
        present, absent = (torch.cat([(n * steps).cos(), (n * steps).sin()]) for n in (1.0, 0.0))
        features = torch.cat([present if i == 4 else absent for i in range(6)])[None]
        names = [f"control_add_embedding.linear_{n}" for n in (1, 2)]
        for name in names:
            features = F.linear(features, sd[f"{name}.weight"], sd[f"{name}.bias"])
            features = F.silu(features) if name == names[0] else features
        torch.testing.assert_close(network.control_add_embedding([4], hint), features, rtol=1e-4, atol=1e-4)
    for wrong in ([6], [1, 2]):
        control.set_extra_arg("control_type", wrong)
        with pytest.raises(ValueError, match="takes one kind of hint of 0 to 5"):
            residuals(control, x, context)


def test_control_lora():
    """The same as a network with the low-rank products added to the model's weights."""
    unet = UNetModel(**SIZES, **UP)
    base = weights(unet, 9)
    unet.load_state_dict(base)
    whole = control_weights(seed=4)
    adapter = {key: value for key, value in whole.items() if key not in base}
    adapter["lora_controlnet"] = torch.tensor([])
    merged = {**base, **adapter}
    low = {"input_blocks.1.0.in_layers.2": (3, 64 * 9), "middle_block.0.emb_layers.1": (2, 256)}
    for seed, (name, (rank, inner)) in enumerate(low.items()):
        weight = base[f"{name}.weight"]
        up, down = draw(weight.shape[0], rank, seed=seed) / 8, draw(rank, inner, seed=seed + 5) / 8
        adapter |= {f"{name}.up": up, f"{name}.down": down.reshape(rank, *weight.shape[1:])}
        merged[f"{name}.weight"] = weight + (up @ down).reshape(weight.shape)
    merged = {key: value for key, value in merged.items() if key in whole}
    want, _ = prepared(load_controlnet_state_dict(merged))
    control = load_controlnet_state_dict(adapter)
    control = control.copy().set_cond_hint(want.cond_hint_original)
    model = types.SimpleNamespace(
        model_sampling=want.model_sampling_current, model_config=types.SimpleNamespace(unet_config={**SIZES, **UP}),
        diffusion_model=unet, manual_cast_dtype=None, get_dtype=lambda: torch.float32,
    )  # fmt: skip
    control.pre_run(model, lambda percent: 1.0 - percent)
    assert control.control_model.get_submodule("input_blocks.0.0").weight.data_ptr() == (
        unet.get_submodule("input_blocks.0.0").weight.data_ptr()
    )
    assert control.get_models() == [] and control.inference_memory_requirements(torch.float32) > 0
    x, context = draw(2, 4, 7, 9), draw(2, 5, 24, seed=2)
    got, other = residuals(control, x, context), residuals(want, x, context)
    for a, b in zip([*got["output"], *got["middle"]], [*other["output"], *other["middle"]]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    control.cleanup()
    assert control.control_model is None
    model.model_config.unet_config["model_channels"] = 32
    with pytest.raises(ValueError, match="use the model it was made for"):
        control.pre_run(model, lambda percent: 1.0 - percent)


def t2i_shapes(channels, width=8, xl=False):
    out: Shapes = {}

    def conv(name, outer, inner, kernel):
        out[f"{name}.weight"], out[f"{name}.bias"] = (outer, inner, kernel, kernel), (outer,)

    conv("conv_in", width, channels, 3)
    widths = [width, 2 * width, 4 * width, 4 * width]
    for level in range(4):
        for j in range(2):
            name = f"body.{2 * level + j}"
            before = widths[max(level - 1, 0)] if j == 0 else widths[level]
            if before != widths[level]:
                conv(f"{name}.in_conv", widths[level], before, 1)
            conv(f"{name}.block1", widths[level], widths[level], 3)
            conv(f"{name}.block2", widths[level], widths[level], 1)
    return out


@pytest.mark.parametrize("xl", [False, True])
def test_t2i_adapter(xl):
    """Each level by plain convolutions, and which block of the UNet gets it; diffusers' names give the same."""
    sd = random_weights(t2i_shapes(256 if xl else 64, xl=xl), 6)
    control = load_controlnet_state_dict(dict(sd)).copy()
    picture = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))
    control.set_cond_hint(picture, 0.5)
    x = draw(4, 4, 15, 16)
    got = control.get_control(x, torch.ones(4), {}, 2, {})
    shown = picture if xl else picture[:, :, 4:-4]  # 15 cells are 120 pixels; SDXL's adapter has cells of 16
    grey = shown.mean(1, keepdim=True)

    def conv(name, x):
        weight = sd[f"{name}.weight"]
        return F.conv2d(x, weight, sd[f"{name}.bias"], padding=weight.shape[-1] // 2)

    h, levels = conv("conv_in", F.pixel_unshuffle(grey, 16 if xl else 8)), []
    for i in range(8):
        if i in ((4,) if xl else (2, 4, 6)):
            h = F.avg_pool2d(h, 2, 2, padding=(h.shape[2] % 2, h.shape[3] % 2))
        h = conv(f"body.{i}.in_conv", h) if f"body.{i}.in_conv.weight" in sd else h
        h = h + conv(f"body.{i}.block2", F.relu(conv(f"body.{i}.block1", h)))
        levels += [h] if i % 2 else []
    places = {3: 0, 5: 1, 8: 2} if xl else {2: 0, 5: 1, 8: 2, 11: 3}
    taken = got["input"][::-1]  # the UNet takes them from the end
    assert [i for i, value in enumerate(taken) if value is not None] == list(places)
    for place, level in places.items():
        torch.testing.assert_close(taken[place], levels[level].repeat(2, 1, 1, 1) * 0.5, rtol=1e-4, atol=1e-4)
    if xl:
        torch.testing.assert_close(got["middle"][0], levels[3].repeat(2, 1, 1, 1) * 0.5, rtol=1e-4, atol=1e-4)
    renamed = {}
    for key, value in sd.items():
        first, number, *rest = key.split(".")
        if first != "body":
            renamed[f"adapter.{key}"] = value
        elif rest[0] == "in_conv":
            renamed[f"adapter.body.{int(number) // 2}.{'.'.join(rest)}"] = value
        else:
            renamed[f"adapter.body.{int(number) // 2}.resnets.{int(number) % 2}.{'.'.join(rest)}"] = value
    other = load_controlnet_state_dict(renamed).set_cond_hint(picture, 0.5)
    torch.testing.assert_close(other.get_control(x, torch.ones(4), {}, 2, {})["input"][-3 if not xl else -4], taken[min(places)])


def test_light_t2i_adapter():
    out: Shapes = {}
    widths = [64, 16, 32, 32, 32]
    for level in range(4):
        narrow, name = widths[level + 1] // 4, f"body.{level}"
        for part, outer, inner, kernel in (
            ("in_conv", narrow, widths[level], 1), ("out_conv", widths[level + 1], narrow, 1),
            *((f"body.{i}.block{n}", narrow, narrow, 3) for i in range(3) for n in (1, 2)),
        ):  # fmt: skip
            out[f"{name}.{part}.weight"], out[f"{name}.{part}.bias"] = (outer, inner, kernel, kernel), (outer,)
    sd = random_weights(out, 8)
    control = load_controlnet_state_dict(dict(sd)).copy().set_cond_hint(torch.rand(1, 1, 64, 64))
    got = control.get_control(draw(2, 4, 8, 8), torch.ones(2), {}, 2, {})["input"][::-1]
    h = F.pixel_unshuffle(control.cond_hint, 8)
    for level in range(4):
        h = F.avg_pool2d(h, 2) if level else h
        name = f"body.{level}"
        h = F.conv2d(h, sd[f"{name}.in_conv.weight"], sd[f"{name}.in_conv.bias"])
        for i in range(3):
            first, second = ([sd[f"{name}.body.{i}.block{n}.{k}"] for k in ("weight", "bias")] for n in (1, 2))
            h = h + F.conv2d(F.relu(F.conv2d(h, *first, padding=1)), *second, padding=1)
        h = F.conv2d(h, sd[f"{name}.out_conv.weight"], sd[f"{name}.out_conv.bias"])
        torch.testing.assert_close(got[3 * level + 2], h, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="T2I-Adapter is incomplete"):
        load_controlnet_state_dict({key: value for key, value in sd.items() if "body.1" not in key})


def test_rows_of_a_call():
    """Parts of a call get the hints of their samples, from networks and adapters in one chain."""
    control, _ = prepared(load_controlnet_state_dict(control_weights()), hints=2)
    adapter = load_controlnet_state_dict(random_weights(t2i_shapes(64), 6))
    control.set_previous_controlnet(adapter.set_cond_hint(torch.rand(2, 3, 64, 64)))
    conditioning = {"c_crossattn": draw(4, 5, 24)}
    batch = DenoiserBatch(draw(4, 4, 8, 8), torch.full((4,), 0.5), conditioning, [1, 0], 2, control=control)
    control.prepare_hints(batch.x)
    with torch.no_grad():
        whole = batch.with_residuals().conditioning["control"]
        part = batch.select_samples(1, 2).select_conds([1]).with_residuals().conditioning["control"]
    for kind, at in (("output", 0), ("middle", 0), ("input", -3)):
        torch.testing.assert_close(part[kind][at], whole[kind][at][3:], rtol=1e-4, atol=1e-4)
