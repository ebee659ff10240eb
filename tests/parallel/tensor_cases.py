"""Networks cut over ranks, for tests: as the engine does it, without an engine."""

from __future__ import annotations

import torch

import comfy.lora
from comfy.families import record_of
from comfy.ldm import dit
from comfy.taco_dit.core.layout import Layout
from comfy.taco_dit.core.plan import ParallelDims
from comfy.taco_dit.parallel.exchange import CollectiveExchange
from comfy.taco_dit.parallel.ring_parallel import native_plan
from comfy.taco_dit.parallel.sequence_parallel import UlyssesPlan
from comfy.taco_dit.parallel.tensor_parallel import TensorPlan, TensorWeights
from comfy.weights.store import store_of


def cut(network, manager, degree):
    """The network with its linears cut over each `degree` ranks; only this rank's parts are in its memory."""
    layout, record = Layout(tensor_degree=degree), record_of(network)
    members = layout.tensor_group(manager.rank)
    weights = TensorWeights(
        degree, members.index(manager.rank), lambda: CollectiveExchange(manager.data.group(members))
    )
    blocks = {block.name: block.module for block in network.block_list()}
    store, inside = store_of(network), tuple(f"{name}." for name in blocks)

    def split_of(name):
        return record.split_of(name) if name.startswith(inside) else None

    weights.cut(network, split_of, record.sizes(network), blocks, store)
    store.hold(weights.held())
    store.place(torch.device("cpu"), {}, comfy.lora.calculate_weight)
    weights.install()
    return network


def language_models(manager):
    """{kind: (deviation of a language model whose linears are cut over all ranks, share of its layers held)}."""
    import fnmatch

    import comfy.ops
    from comfy.text_encoders.llama import LanguageModel
    from tests.tiny_models import weight_from

    members, found = range(manager.world_size), {}
    common = {
        "vocab_size": 30, "hidden_size": 24, "intermediate_size": 41, "num_hidden_layers": 2, "head_dim": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    }  # fmt: skip
    gemma = {
        "transformer_type": "gemma2",
        "rms_norm_add": True,
        "mlp_activation": "gelu_pytorch_tanh",
        "qkv_bias": False,
    }
    qwen = {"transformer_type": "llama", "rms_norm_add": False, "mlp_activation": "silu", "qkv_bias": True}
    for kind, config in {
        "gemma": {**gemma, "num_attention_heads": 4, "num_key_value_heads": 2},
        "qwen": {**qwen, "num_attention_heads": 6, "num_key_value_heads": 3},
    }.items():
        network = LanguageModel({**common, **config}, torch.float32, "cpu", comfy.ops.manual_cast)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in network.named_parameters():
            parameter.data.copy_(weight_from(name, torch.randn(parameter.shape, generator=generator)))
        ids = torch.arange(14).view(2, 7)
        mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
        whole = sum(parameter.numel() for parameter in network.model.layers.parameters())
        with torch.inference_mode():
            want, _ = network(ids, mask)
            weights = TensorWeights(
                len(members), manager.rank, lambda: CollectiveExchange(manager.data.group(members)), own_tokens=True
            )

            def split_of(name, network=network):
                return next((s for pattern, s in network.splits.items() if fnmatch.fnmatchcase(name, pattern)), None)

            store = store_of(network)
            weights.cut(network, split_of, network.sizes(), {}, store)
            store.hold(weights.held())
            store.place(torch.device("cpu"), {}, comfy.lora.calculate_weight)
            weights.install()
            got, _ = network(ids, mask)
        held = sum(parameter.numel() for parameter in network.model.layers.parameters())
        found[kind] = ((got - want).abs().max() / want.abs().max()).item(), held / whole
    return found


def call_for(manager, degree, ulysses=1, ring=1):
    """A denoiser call of networks that are cut, with their tokens over `ulysses * ring` copies."""
    layout = Layout(tensor_degree=degree)
    dims = ParallelDims(ulysses_degree=ulysses, ring_degree=ring)
    inside = None
    if ulysses * ring > 1:

        def group(copies):
            return manager.data.group(layout.ranks_of(copies, manager.rank))

        inside = native_plan(group, dims, layout.place_of(manager.rank).copy)
    among = UlyssesPlan(CollectiveExchange(manager.data.group(layout.tensor_group(manager.rank))))
    return dit.DenoiserCall(TensorPlan(inside, among), layout=layout)
