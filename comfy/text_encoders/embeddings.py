"""Textual inversion: learned vectors that stand for words, used in prompts as `embedding:name`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch

import comfy.utils

_EXTENSIONS = ("", ".safetensors", ".pt", ".bin")


def expand_directory_list(directories: Iterable[str]) -> list[str]:
    """The directories and everything below them, following links."""
    found: dict[str, None] = {}
    for directory in directories:
        found[directory] = None
        for root, _, _ in os.walk(directory, followlinks=True):
            found[root] = None
    return list(found)


def _find(name: str, directories: Any) -> str | None:
    """The embedding's file, never outside its directory."""
    roots = [directories] if isinstance(directories, str) else list(directories)
    for directory in expand_directory_list(roots):
        base = os.path.abspath(directory)
        path = os.path.abspath(os.path.join(base, name))
        if os.path.commonpath((base, path)) != base:
            continue
        for extension in _EXTENSIONS:
            if os.path.isfile(path + extension):
                return path + extension
    return None


def _vectors_in(content: Any, key: str) -> torch.Tensor | None:
    """The vectors of an encoder in any of the layouts that trainers write."""
    if isinstance(content, dict):
        if "string_to_param" in content:
            values = content["string_to_param"]
            return next(iter(values.values()), None)
        if isinstance(content.get(key), torch.Tensor):
            return content[key]
        prefix = f"bundle_emb.{key}.string_to_param.*"
        if prefix in content:
            return content[prefix]
        return next((value for value in content.values() if isinstance(value, torch.Tensor)), None)
    if isinstance(content, (list, tuple)):
        vectors = [_vectors_in(item, key) for item in content]
        rows = [v.reshape(-1, v.shape[-1]) for v in vectors if v is not None]
        return torch.cat(rows) if rows else None
    return content if isinstance(content, torch.Tensor) else None


def load_embed(
    embedding_name: str, embedding_directory: Any, embedding_size: int, embed_key: str | None = None
) -> torch.Tensor | None:
    """The vectors [n, size] or [size] of an embedding, or None when there is no readable file.

    `embed_key` names the encoder ("clip_l", "clip_g", ...) in files with vectors for several; otherwise the first
    vectors of the right width are taken.
    """
    path = _find(embedding_name, embedding_directory)
    if path is None:
        return None
    try:
        content = comfy.utils.load_torch_file(path, safe_load=True)
    except Exception as error:
        logging.warning("embedding %s cannot be read (%s); it is left out of the prompt", path, error)
        return None
    vectors = _vectors_in(content, embed_key or "")
    if vectors is None or vectors.shape[-1] != embedding_size:
        fitting = [
            value for value in (content.values() if isinstance(content, dict) else ())
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == embedding_size
        ]  # fmt: skip
        vectors = fitting[0] if fitting else vectors
    return vectors
