"""Calling nodes in tests, with a tiny Flux model where one is needed."""

from __future__ import annotations

import torch


def run(all_nodes, name, /, **inputs):
    """A node's outputs (or its dict, for nodes that show something), as the executor would call it."""
    node = all_nodes[name]
    if hasattr(node, "GET_SCHEMA"):
        return node.PREPARE_CLASS_CLONE({}).EXECUTE_NORMALIZED(**inputs)
    return getattr(node(), node.FUNCTION)(**inputs)


def encode(all_nodes, clip, text):
    return run(all_nodes, "CLIPTextEncode", clip=clip, text=text)[0]


def sample(all_nodes, model, clip, steps=4, cfg=2.0, seed=3, positive=None, negative=None, batch=1):
    """A picture's latent of 8 x 8 cells."""
    positive = encode(all_nodes, clip, "a tree") if positive is None else positive
    negative = encode(all_nodes, clip, "") if negative is None else negative
    latent = {"samples": torch.zeros(batch, 16, 8, 8)}
    return run(
        all_nodes,
        "KSampler",
        model=model,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="simple",
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
    )[0]["samples"]
