"""Records: public names, lazy networks, and splits that add up to the whole."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import comfy.families
import comfy.families.flux
from comfy.families.base import Split
from tests.made_up.family import FAMILY as PEBBLE
from tests.made_up.network import Pebble
from tests.parallel.tiny import tiny_flux
from tests.tiny_families import TINY

ROOT = Path(__file__).resolve().parents[2]
FLUX = comfy.families.flux.FAMILY


def test_importing_the_program_imports_no_network():
    code = (
        "import asyncio, sys, nodes, comfy.sd, comfy.samplers, comfy.supported_models, comfy.model_base;"
        "import comfy.families, comfy.latent_formats; asyncio.run(nodes.init_builtin_extra_nodes());"
        "loaded = set(sys.modules); records = comfy.families.records();"
        "lazy = {f'comfy.families.{name}' for name in comfy.families._NAMES} | {f.network.split(':')[0] for f in records};"
        "unused = {'transformers', 'torchvision', 'torchaudio', 'huggingface_hub'};"  # for packs only
        "print(len(lazy) >= 2 * len(records) - 1,"
        " sorted(m for m in loaded if m in lazy | unused or m.startswith('comfy.control.')))"
    )
    done = subprocess.run([sys.executable, "-c", code, "--cpu"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip().splitlines()[-1] == "True []", done.stdout + done.stderr


def test_public_names_are_the_records_classes():
    import pickle

    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models

    for name, kind in FLUX.configurations.items():
        assert getattr(comfy.supported_models, name) is kind and kind.__name__ == name
        assert pickle.loads(pickle.dumps(kind)) is kind
    assert comfy.model_base.Flux is FLUX.models["Flux"] and issubclass(comfy.model_base.Flux, comfy.model_base.BaseModel)
    assert comfy.latent_formats.Flux is comfy.supported_models.Flux.latent_format
    assert comfy.supported_models.models is comfy.supported_models.models
    names = ["FluxInpaint", "Flux", "FluxSchnell"]
    assert [kind.__name__ for kind in comfy.supported_models.models if kind.__name__ in names] == names

    class Mine(comfy.model_base.Flux):
        """What packs do."""

    assert issubclass(Mine, comfy.model_base.Flux)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="a model family 'flux' already"):
        comfy.families.register(FLUX)


def test_a_family_registered_late_is_tried_first():
    import comfy.model_detection
    import comfy.supported_models

    before = list(comfy.supported_models.models)
    if PEBBLE not in comfy.families.records():
        comfy.families.register(PEBBLE)
        assert comfy.supported_models.models[1:] == before
    config = comfy.model_detection.model_config_from_unet(dict(Pebble(depth=1).state_dict()), "")
    assert type(config) is comfy.supported_models.Pebble and config.unet_config["kv_heads"] == 2


def test_a_network_belongs_to_its_record():
    class Derived(type(tiny_flux())):
        """A pack's subclass."""

    network = tiny_flux()
    assert comfy.families.record_of(network) is FLUX
    assert comfy.families.record_of(types.SimpleNamespace(_orig_mod=network)) is FLUX  # as torch.compile wraps it
    network.__class__ = Derived
    assert comfy.families.record_of(network) is FLUX and comfy.families.record_of(nn.Linear(1, 1)) is None


def linears_of_blocks(network):
    """(name in the network, linear) of all blocks."""
    for block in network.block_list():
        for name, module in block.module.named_modules():
            if isinstance(module, nn.Linear):
                yield f"{block.name}.{name}", module


def rows(split, sizes, index, count):
    """Indices of a rank's slice along the cut axis."""
    return torch.cat([torch.arange(a, b) for a, b in split.ranges(sizes, index, count)])


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", [*TINY, "pebble"])
def test_slices_add_up(name, count):
    """Each linear of each block is declared, its slices cover it once, and computing with them gives the whole."""
    family, network = (PEBBLE, Pebble()) if name == "pebble" else (TINY[name].family, TINY[name].network())
    generator = torch.Generator().manual_seed(0)
    sizes, seen = family.sizes(network), 0
    for name, linear in linears_of_blocks(network):
        split, seen = family.split_of(name), seen + 1
        weight = torch.randn(linear.weight.shape, generator=generator)
        bias = torch.randn(linear.out_features, generator=generator)  # some have none; the sum is the same
        x = torch.randn((2, 5, linear.in_features), generator=generator)
        whole = nn.functional.linear(x, weight, bias)
        if split.kind in ("whole", "gathered"):
            assert not split.parts
            continue
        mine = [rows(split, sizes, rank, count) for rank in range(count)]
        length = linear.out_features if split.kind == "column" else linear.in_features
        assert torch.equal(torch.cat(mine).sort().values, torch.arange(length)), name
        if split.kind == "column":
            got = torch.empty_like(whole)
            for places in mine:
                got[..., places] = nn.functional.linear(x, weight[places], bias[places])
        else:
            got = bias + sum(nn.functional.linear(x[..., places], weight[:, places]) for places in mine)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
    assert seen >= 9


@pytest.mark.parametrize("count", [2, 3])
def test_a_single_block_in_slices(count):
    """Columns of linear1 and rows of linear2 fit each other: heads with heads, MLP with MLP, nothing is exchanged between."""
    network = tiny_flux()
    block, sizes = network.single_blocks[0], FLUX.sizes(network)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 5, 96), generator=generator)

    def between(out, heads):
        qkv, mlp = out.split([3 * heads * 24, out.shape[-1] - 3 * heads * 24], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, heads, 24)).permute(2, 0, 3, 1, 4)
        met = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return torch.cat((met, nn.functional.gelu(mlp)), dim=-1)

    want = block.linear2(between(block.linear1(x), 4))
    total = block.linear2.bias
    columns, inputs = FLUX.split_of("single_blocks.0.linear1"), FLUX.split_of("single_blocks.0.linear2")
    for rank in range(count):
        out, inner = rows(columns, sizes, rank, count), rows(inputs, sizes, rank, count)
        first = nn.functional.linear(x, block.linear1.weight[out], block.linear1.bias[out])
        (start, stop), *_ = columns.ranges(sizes, rank, count)
        total = total + nn.functional.linear(between(first, (stop - start) // 24), block.linear2.weight[:, inner])
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_tiny_files_make_the_same_network(name):
    """Files of small models are recognised, and loaded with the sizes that their shapes tell."""
    import comfy.model_detection

    tiny, prefix = TINY[name], "model.diffusion_model."
    wanted = tiny.shapes()
    weights = {prefix + key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    found = comfy.model_detection.model_config_from_unet(weights, prefix, metadata=tiny.metadata)
    assert type(found).__name__ == tiny.configuration
    found.set_inference_dtype(torch.float32, None)
    network = found.get_model(weights, prefix, device="meta").diffusion_model
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == wanted
    assert comfy.families.record_of(network) is tiny.family
    assert network.num_heads == tiny.network().num_heads


def test_an_undeclared_linear_is_named():
    with pytest.raises(KeyError, match="flux does not declare how its linear double_blocks.0.new is split"):
        FLUX.split_of("double_blocks.0.new")
    assert Split("whole").ranges({}, 0, 2) == []
