"""Control networks on one process: Flux's layouts block by block, hints, strength, range, chain."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import comfy.latent_formats
from comfy.control.base import ControlBase, StrengthType, broadcast_image_to
from comfy.control.loading import load_controlnet, load_controlnet_state_dict
from comfy.denoiser_batch import DenoiserBatch
from tests import tiny_adapters
from tests.goldens import golden
from tests.tiny_models import CLIP_WIDTH, T5_WIDTH

LAYOUTS = {
    "xlabs": tiny_adapters.control_xlabs,
    "mistoline": tiny_adapters.control_mistoline,
    "instantx": tiny_adapters.control_instantx,
    "union": tiny_adapters.control_union,
    "inpaint": tiny_adapters.control_inpaint,
}


class Sampling:
    """A model's noise schedule, as far as control networks ask for it."""

    model_sampling = property(lambda self: self)

    def timestep(self, sigma):
        return sigma

    def calculate_input(self, sigma, x):
        return x


class Vae:
    """Latents that are the pictures' 8 x 8 means, 16 channels."""

    def __init__(self):
        self.asked = []

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        self.asked.append(tuple(pictures.shape))
        return F.avg_pool2d(pictures.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning(rows):
    return {
        "c_crossattn": draw(rows, 5, T5_WIDTH, seed=2), "y": draw(rows, CLIP_WIDTH, seed=3),
        "guidance": torch.full((rows,), 3.5),
    }  # fmt: skip


def convolved(sd, name, hint, strided):
    for i in range(10):
        if f"{name}.{2 * i}.weight" not in sd:
            break
        weight, bias = sd[f"{name}.{2 * i}.weight"], sd[f"{name}.{2 * i}.bias"]
        hint = F.conv2d(
            F.silu(hint) if i else hint, weight, bias, stride=2 if i in strided else 1, padding=weight.shape[-1] // 2
        )
    return hint


def patches(latent):
    """[B, C, h, w] -> [B, L, 4 C], odd sizes repeated from the other side."""
    latent = F.pad(latent, (0, latent.shape[-1] % 2, 0, latent.shape[-2] % 2), mode="circular")
    return F.unfold(latent, 2, stride=2).transpose(1, 2)


def expected(control, sd, x, sigma, cond, hint, modes=()):
    """Residuals, with the blocks called one by one on whole tokens, as foreign code does."""
    network = control.control_model
    linear = lambda name, tokens: F.linear(tokens, sd[f"{name}.weight"], sd[f"{name}.bias"])  # noqa: E731
    embed = "controlnet_x_embedder" if "controlnet_x_embedder.weight" in sd else "pos_embed_input"
    first = "x_embedder" if embed.startswith("controlnet") else "img_in"
    img = linear(first, patches(x)) + linear(embed, patches(hint))
    txt = network.txt_in(cond["c_crossattn"])
    if modes:
        chosen = sd["controlnet_mode_embedder.weight"][list(modes)]
        txt = torch.cat([chosen.expand(len(txt), -1, -1), txt], dim=1)
    vec = network.conditioning_vector(sigma, cond["y"], cond["guidance"], img)
    _, ids = network.process_img(x)
    pe = network.pe_embedder(torch.cat([torch.zeros(len(x), txt.shape[1], 3), ids], dim=1))
    out = {"input": [], "output": []}

    def projected(name, tokens):
        return F.silu(linear(f"{name}.linear", tokens)) if f"{name}.linear.weight" in sd else linear(name, tokens)

    for i, block in enumerate(network.double_blocks):
        img, txt = block(img=img, txt=txt, vec=vec, pe=pe)
        out["input"].append(projected(f"controlnet_blocks.{i}", img))
    joint = torch.cat([txt, img], dim=1)
    name = "single_controlnet_blocks" if "single_controlnet_blocks.0.linear.weight" in sd else "controlnet_single_blocks"
    for i, block in enumerate(network.single_blocks):
        joint = block(joint, vec=vec, pe=pe)
        out["output"].append(projected(f"{name}.{i}", joint[:, txt.shape[1] :]))
    return out


def loaded(name, picture, strength=1.0, interval=(0.0, 1.0), **kwargs):
    sd = LAYOUTS[name]()
    control = load_controlnet_state_dict(dict(sd)).copy()
    vae = None if control.latent_format is None else Vae()
    control.set_cond_hint(picture, strength, interval, vae=vae, **kwargs)
    control.pre_run(Sampling(), lambda percent: 1.0 - percent)
    return control, sd


@pytest.mark.parametrize("name", LAYOUTS)
def test_flux_layouts(name):
    """Every residual, at an odd size, for two conditionings of two samples and a picture for each sample."""
    picture = torch.rand(2, 3, 56, 64, generator=torch.Generator().manual_seed(5))
    control, sd = loaded(name, picture, strength=0.7)
    if name == "union":
        control.set_extra_arg("control_type", [3])
    x, sigma, cond = draw(4, 16, 7, 9), torch.full((4,), 0.6), conditioning(4)
    with torch.no_grad():
        got = control.get_control(x, sigma, cond, 2, {})
        hint = hint_of(name, sd, picture)
        want = expected(control, sd, x, sigma, cond, hint.repeat(2, 1, 1, 1), [3] if name == "union" else ())
    latents = name in ("instantx", "union", "inpaint")
    for kind, blocks in (("input", 19), ("output", 38)):
        count = len(want[kind])
        assert len(got[kind]) == (blocks if count else 0)
        each = -(-blocks // count) if count else 0
        for i, residual in enumerate(got[kind]):
            source = want[kind][i // each if latents else i % count]
            torch.testing.assert_close(residual, source * 0.7, rtol=1e-4, atol=1e-4)
        assert len({id(residual) for residual in got[kind]}) <= count
    assert got["middle"] == []


def hint_of(name, sd, picture):
    """What each layout sees of 56 x 64 pixels for a latent of 7 x 9 cells: cut to 7 : 9, then 56 x 72 pixels."""
    import comfy.utils

    picture = comfy.utils.common_upscale(picture, 72, 56, "nearest-exact", "center")
    if name == "xlabs":
        return convolved(sd, "input_hint_block", picture * 2 - 1, (2, 4, 6))
    if name == "mistoline":
        return convolved(sd, "input_cond_block.encoder", picture * 2 - 1, (3, 5, 7))
    latent = comfy.latent_formats.Flux().process_in(Vae().encode(picture.movedim(1, -1)))
    if name == "inpaint":
        return torch.cat([latent, torch.ones_like(latent[:, :1])], dim=1)
    return latent


def test_hints_are_made_once_a_size():
    control, _ = loaded("instantx", torch.rand(1, 3, 40, 40))
    cond = conditioning(1)
    with torch.no_grad():
        for size in ((4, 4), (6, 4), (4, 4), (6, 4)):
            control.get_control(draw(1, 16, *size), torch.tensor([0.5]), cond, 1, {})
    assert control.vae.asked == [(1, 32, 32, 3), (1, 48, 32, 3)]
    control.cleanup()
    assert control.cond_hint is None and not control._hints


def test_a_mask_beside_the_latent():
    """Alimama's: the mask at the latent's size; the network without one sees all of the picture."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    control, _ = loaded("inpaint", torch.rand(1, 3, 32, 32), extra_concat=[mask])
    assert control.concat_mask
    control.prepare_hints(draw(1, 16, 4, 4))
    assert torch.equal(control.cond_hint[0, 16], mask[0, 0, ::8, ::8])
    plain, _ = loaded("inpaint", torch.rand(1, 3, 32, 32))
    plain.prepare_hints(draw(1, 16, 4, 4))
    assert plain.cond_hint[0, 16].min() == 1


def test_range_of_steps_and_chain():
    """Outside its range a network adds nothing; others of the chain still do."""
    picture = torch.rand(1, 3, 32, 32)
    first, _ = loaded("xlabs", picture)
    second, _ = loaded("instantx", picture, 0.5, (0.2, 0.6))
    second.set_previous_controlnet(first)
    x, cond = draw(1, 16, 4, 4), conditioning(1)

    def at(control, sigma):
        with torch.no_grad():
            return control.get_control(x, torch.tensor([sigma]), cond, 1, {})

    second.pre_run(Sampling(), lambda percent: 1.0 - percent)
    for sigma, active in ((1.0, False), (0.8, True), (0.5, True), (0.4, True), (0.39, False)):
        alone = first_of = at(first, sigma)
        if active:
            other, _ = loaded("instantx", picture, 0.5)
            alone = at(other, sigma)
            for kind in ("input", "output"):
                for got, a, b in itertools.zip_longest(at(second, sigma)[kind], first_of[kind], alone[kind]):
                    torch.testing.assert_close(got, b if a is None else a + b)
        else:
            torch.testing.assert_close(at(second, sigma), first_of)
    assert len(second.get_models()) == 2
    third, _ = loaded("xlabs", picture, 1.0, (0.5, 1.0))
    assert at(third, 0.9) is None


def test_rows_of_a_call():
    """Parts of a call get the hints of their samples."""
    control, _ = loaded("instantx", torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(8)))
    batch = DenoiserBatch(draw(6, 16, 4, 4), torch.full((6,), 0.5), conditioning(6), [1, 0], 3, control=control)
    control.prepare_hints(batch.x)
    with torch.no_grad():
        whole = batch.with_residuals().conditioning["control"]["input"][0]
        for start, stop in ((0, 1), (1, 3), (2, 3)):
            part = batch.select_samples(start, stop).select_conds([1]).with_residuals()
            torch.testing.assert_close(
                part.conditioning["control"]["input"][0], whole[3 + start : 3 + stop], rtol=1e-4, atol=1e-5
            )
            both = batch.select_samples(start, stop).with_residuals().conditioning["control"]["input"][0]
            rows = [k * 3 + b for k in range(2) for b in range(start, stop)]
            torch.testing.assert_close(both, whole[rows], rtol=1e-4, atol=1e-5)
    assert control.vae.asked == [(3, 32, 32, 3)]

    class Foreign:
        def get_control(self, *args):
            return None

    control.set_previous_controlnet(Foreign())
    with pytest.raises(ValueError, match="Foreign has to see all samples"):
        batch.select_samples(0, 1)
    with pytest.raises(ValueError, match="Foreign has to see all samples"):
        DenoiserBatch(batch.x, batch.sigma, {}, [1, 0], 3, control=Foreign()).select_samples(0, 1)


def test_recorded_merging():
    """Topic 10: the sum with the chain's residuals, for both kinds of strength."""
    tensors = golden.load_tensors("10_conditioning/tensors.safetensors")
    strength = golden.load_json("10_conditioning/index.json")["control_merge"]["strength"]

    def slots(name, count):
        found = [tensors.get(f"control/{name}_in{i}") for i in range(count)]
        return {"input": found, "middle": [tensors[f"control/{name}_mid"]], "output": []}

    for kind in StrengthType:
        control = ControlBase()
        control.strength, control.strength_type = strength, kind
        got = control.control_merge({k: v for k, v in slots("cur", 3).items() if v}, slots("prev", 4), None)
        for name, value in {**{f"in{i}": got["input"][i] for i in (0, 2, 3)}, "mid": got["middle"][0]}.items():
            tag = f"control/{kind.name.lower()}_{name}"
            golden.check("10 conditioning", tag, value, tensors[tag], 5e-5)
        assert got["input"][1] is None


def test_averages_and_repeats():
    control = ControlBase()
    control.global_average_pooling = True
    value = draw(1, 2, 3, 4)
    got = control.control_merge({"middle": [value]}, None, torch.float16)["middle"][0]
    torch.testing.assert_close(got, value.mean((2, 3), keepdim=True).expand(1, 2, 3, 4).half())
    hints = torch.arange(3.0)[:, None]
    assert broadcast_image_to(hints[:1], 4, 2).flatten().tolist() == [0]
    assert broadcast_image_to(hints, 4, 2).flatten().tolist() == [0, 1, 0, 1]
    assert broadcast_image_to(hints[:2], 5, 1).flatten().tolist() == [0, 1, 0, 1, 0]


def test_bad_input(tmp_path, caplog):
    from safetensors.torch import save_file

    sd = tiny_adapters.control_instantx()
    control = load_controlnet_state_dict(dict(sd)).copy().set_cond_hint(torch.rand(1, 3, 32, 32))
    assert "needs a VAE" in caplog.text
    control.pre_run(Sampling(), lambda percent: 1.0 - percent)
    with pytest.raises(ValueError, match="has no VAE to encode its picture; use Apply ControlNet"):
        control.get_control(draw(1, 16, 4, 4), torch.tensor([0.5]), conditioning(1), 1, {})
    union, _ = loaded("union", torch.rand(1, 3, 32, 32))
    union.set_extra_arg("control_type", [7])
    with pytest.raises(ValueError, match="kinds 0 to 3, not 7; choose another type, or auto"):
        union.get_control(draw(1, 16, 4, 4), torch.tensor([0.5]), conditioning(1), 1, {})
    del sd["controlnet_blocks.1.bias"]
    with pytest.raises(ValueError, match="lacks 1 weights, first controlnet_blocks.1.bias"):
        load_controlnet_state_dict(sd)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert load_controlnet(str(tmp_path / "a.safetensors")) is None and "no control network" in caplog.text
    torn = {key: value for key, value in tiny_adapters.control_xlabs().items() if not key.startswith("img_in")}
    with pytest.raises(ValueError, match="but not its blocks; use a complete file"):
        load_controlnet_state_dict(torn)
