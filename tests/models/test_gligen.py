"""GLIGEN on a UNet: gates, boxes, and rows of a call."""

import pytest
import torch
import torch.nn.functional as F

from comfy.gligen import load_gligen
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.tiny_models import Shapes, _linear, random_weights

SIZES = {
    "in_channels": 4, "model_channels": 64, "out_channels": 4, "num_res_blocks": [1], "channel_mult": [1],
    "context_dim": 24, "transformer_depth": [1], "transformer_depth_output": [1, 1], "transformer_depth_middle": 1,
    "num_head_channels": 64,
}  # fmt: skip
TEXT = 24


def weights():
    out: Shapes = {}
    for place in ("input_blocks.1.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"):
        name = f"model.{place}.transformer_blocks.0.fuser"
        _linear(out, f"{name}.linear", 64, TEXT)
        for part in ("to_q", "to_k", "to_v"):
            out[f"{name}.attn.{part}.weight"] = (64, 64)
        _linear(out, f"{name}.attn.to_out.0", 64, 64)
        _linear(out, f"{name}.ff.net.0.proj", 512, 64)
        _linear(out, f"{name}.ff.net.2", 64, 256)
        for norm in ("norm1", "norm2"):
            out[f"{name}.{norm}.weight"] = out[f"{name}.{norm}.bias"] = (64,)
        out[f"{name}.alpha_attn"] = out[f"{name}.alpha_dense"] = (1,)
    for i, (rows, cols) in enumerate(((512, TEXT + 64), (512, 512), (TEXT, 512))):
        _linear(out, f"position_net.linears.{2 * i}", rows, cols)
    out |= {"position_net.null_positive_feature": (TEXT,), "position_net.null_position_feature": (64,)}
    sd = random_weights(out, 71)
    return {key: value[0] * 40 if "alpha" in key else value for key, value in sd.items()}


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_boxes():
    """Four gated attentions of the UNet see the boxes; a gate that is closed leaves the picture."""
    sd = weights()
    model = load_gligen(sd)
    assert len(model.module_list) == 4 and model.key_dim == TEXT
    boxes = [(draw(1, TEXT, seed=3), 4, 6, 2, 1), (draw(1, TEXT, seed=4), 2, 2, 0, 0)]
    patch = model.set_position((2, 4, 8, 8), boxes, "cpu")
    assert patch.rows_independent and patch.tokens.shape == (1, 30, TEXT)
    corners = torch.tensor([1, 2, 7, 6]) / 8
    waves = [f(100 ** (i / 8) * corners) for i in range(8) for f in (torch.sin, torch.cos)]
    features = torch.cat([boxes[0][0][0], *waves])
    absent = torch.cat([sd["position_net.null_positive_feature"], sd["position_net.null_position_feature"]])
    for token, made_of in ((0, features), (2, absent), (29, absent)):
        for i in (0, 2, 4):
            layer = [sd[f"position_net.linears.{i}.{kind}"] for kind in ("weight", "bias")]
            made_of = F.linear(made_of if i == 0 else F.silu(made_of), *layer)
        torch.testing.assert_close(patch.tokens[0, token], made_of, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.set_empty((2, 4, 8, 8), "cpu").tokens[0, 0], patch.tokens[0, 29])

    unet = UNetModel(**SIZES).eval()
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    unet.load_state_dict(random_weights(shapes, 2))
    call = (draw(2, 4, 8, 8), torch.tensor([5.0, 9.0]), draw(2, 5, 24))
    with torch.no_grad():
        plain = unet(*call)
        boxed = unet(*call, transformer_options={"patches": {"middle_patch": [patch]}})
        assert not torch.allclose(plain, boxed, atol=1e-4)
        one = unet(*(t[1:] for t in call), transformer_options={"patches": {"middle_patch": [patch]}})
        torch.testing.assert_close(one, boxed[1:], rtol=1e-4, atol=1e-4)
        closed = load_gligen({k: v * 0 if "alpha" in k else v for k, v in sd.items()})
        patch = closed.set_position((2, 4, 8, 8), boxes, "cpu")
        torch.testing.assert_close(unet(*call, transformer_options={"patches": {"middle_patch": [patch]}}), plain)


def test_a_gated_attention():
    """Against torch's attention."""
    sd = weights()
    module = load_gligen(sd).module_list[1]
    name = "model.middle_block.1.transformer_blocks.0.fuser"
    own = {key.removeprefix(f"{name}."): value for key, value in sd.items() if key.startswith(f"{name}.")}
    x, boxes = draw(2, 9, 64), draw(2, 3, TEXT, seed=2)
    joint = torch.cat([x, F.linear(boxes, own["linear.weight"], own["linear.bias"])], dim=1)
    joint = F.layer_norm(joint, (64,), own["norm1.weight"], own["norm1.bias"])
    q, k, v = (F.linear(joint, own[f"attn.to_{part}.weight"]) for part in "qkv")
    out = F.linear(F.scaled_dot_product_attention(q, k, v), own["attn.to_out.0.weight"], own["attn.to_out.0.bias"])
    want = x + own["alpha_attn"].tanh() * out[:, :9]
    h = F.layer_norm(want, (64,), own["norm2.weight"], own["norm2.bias"])
    value, gate = F.linear(h, own["ff.net.0.proj.weight"], own["ff.net.0.proj.bias"]).chunk(2, dim=-1)
    h = F.linear(value * F.gelu(gate), own["ff.net.2.weight"], own["ff.net.2.bias"])
    with torch.no_grad():
        torch.testing.assert_close(module(x, boxes), want + own["alpha_dense"].tanh() * h, rtol=1e-4, atol=1e-4)


def test_bad_input(tmp_path):
    from safetensors.torch import save_file

    import comfy.sd

    sd = weights()
    model = load_gligen(sd)
    with pytest.raises(ValueError, match="takes 30 boxes, not 31"):
        model.set_position((1, 4, 8, 8), [(draw(1, TEXT), 1, 1, 0, 0)] * 31, "cpu")
    save_file(sd, tmp_path / "g.safetensors")
    assert comfy.sd.load_gligen(str(tmp_path / "g.safetensors")).model.key_dim == TEXT
    del sd["position_net.linears.2.bias"]
    for wrong in (sd, {"a": torch.zeros(1)}):
        with pytest.raises(ValueError, match="no GLIGEN network, or not all of one"):
            load_gligen(wrong)
