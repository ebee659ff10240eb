"""ControlNet nodes on the tiny Flux: from file to picture."""

import pytest
import torch
from safetensors.torch import save_file

from tests.nodes.helpers import encode, run, sample


def picture(seed=1, pictures=1):
    return torch.rand(pictures, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def texts(all_nodes, tiny):
    return {"positive": encode(all_nodes, tiny[1], "a tree"), "negative": encode(all_nodes, tiny[1], "")}


def load(all_nodes, name):
    return run(all_nodes, "ControlNetLoader", control_net_name=f"tiny_flux_{name}.safetensors")[0]


def drawn(all_nodes, tiny, positive, negative=None, **kwargs):
    return sample(all_nodes, tiny[0], tiny[1], steps=2, positive=positive, negative=negative, **kwargs)


def test_apply(all_nodes, tiny, texts):
    """Strength 0 and an empty range leave the picture; both prompts share one network, and a chain has both nets."""
    control = load(all_nodes, "instantx")
    apply = {"control_net": control, "image": picture(), "vae": tiny[2], "start_percent": 0.0, "end_percent": 1.0}
    plain = drawn(all_nodes, tiny, texts["positive"], texts["negative"], batch=2)
    off = run(all_nodes, "ControlNetApplyAdvanced", **texts, **apply, strength=0.0)
    assert torch.equal(drawn(all_nodes, tiny, *off, batch=2), plain)
    never = run(all_nodes, "ControlNetApplyAdvanced", **texts, **{**apply, "start_percent": 1.0}, strength=1.0)
    torch.testing.assert_close(drawn(all_nodes, tiny, *never, batch=2), plain)
    positive, negative = run(all_nodes, "ControlNetApplyAdvanced", **texts, **apply, strength=0.9)
    assert positive[0][1]["control"] is negative[0][1]["control"]
    once = drawn(all_nodes, tiny, positive, negative, batch=2)
    assert not torch.allclose(once, plain, atol=1e-2)
    assert positive[0][1]["control"].cond_hint is None  # the run is over

    xlabs = load(all_nodes, "xlabs")
    older = run(all_nodes, "ControlNetApply", conditioning=positive, control_net=xlabs, image=picture(2), strength=0.5)
    assert len(older[0][0][1]["control"].get_models()) == 2
    assert not torch.allclose(drawn(all_nodes, tiny, older[0], negative, batch=2), once, atol=1e-2)


def test_kinds_of_a_union(all_nodes, tiny, texts):
    control = load(all_nodes, "union")
    apply = {"image": picture(), "vae": tiny[2], "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
    pictures = {}
    for kind in ("auto", "openpose", "depth"):
        chosen = run(all_nodes, "SetUnionControlNetType", control_net=control, type=kind)[0]
        conds = run(all_nodes, "ControlNetApplyAdvanced", **texts, **apply, control_net=chosen)
        pictures[kind] = drawn(all_nodes, tiny, *conds)
    assert control.extra_args == {}
    assert not torch.allclose(pictures["auto"], pictures["depth"], atol=1e-3)
    assert not torch.allclose(pictures["openpose"], pictures["depth"], atol=1e-3)


def test_inpainting(all_nodes, tiny, texts):
    """The masked part of the picture is not seen."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    apply = {
        "control_net": load(all_nodes, "inpaint"), "vae": tiny[2], "mask": mask, "strength": 1.0,
        "start_percent": 0.0, "end_percent": 1.0,
    }  # fmt: skip
    other = picture()
    other[:, :32] = 0.3
    results = []
    for image in (picture(), other, picture(2)):
        conds = run(all_nodes, "ControlNetInpaintingAliMamaApply", **texts, **apply, image=image)
        results.append(drawn(all_nodes, tiny, *conds))
    torch.testing.assert_close(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_what_is_wrong(all_nodes, tiny, texts, tiny_folder):
    apply = {"image": picture(), "start_percent": 0.0, "end_percent": 1.0, "strength": 1.0}
    conds = run(all_nodes, "ControlNetApplyAdvanced", **texts, **apply, control_net=load(all_nodes, "instantx"))
    with pytest.raises(ValueError, match="connect the model's VAE"):
        drawn(all_nodes, tiny, *conds)
    save_file({"a": torch.zeros(1)}, tiny_folder / "models" / "controlnet" / "none.safetensors")
    with pytest.raises(RuntimeError, match="none.safetensors is not a ControlNet file"):
        run(all_nodes, "ControlNetLoader", control_net_name="none.safetensors")
