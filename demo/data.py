"""Captioned scenes for training as tensors: the same for the same seed, whatever the number of workers."""

from __future__ import annotations

import functools
import multiprocessing
import random
import re
from typing import Any

import torch

from demo.networks import CLIP_LENGTH, T5_LENGTH
from demo.render import to_arrays
from demo.scenes import COLORS, NUMBERS, POSITIONS, SHAPES, SIZES, Spec, training_scene

TEXT_LENGTH = 48  # ids kept of a caption; no caption of the domain has more
_CHUNK = 1000
_UNCAPTIONED = 0.08  # share of empty captions, for classifier-free guidance (Ho & Salimans 2022)
_NOISY = 0.08  # share of captions with some words that mean nothing here

Pool = dict[str, torch.Tensor]

# What a caption says, as choices: (name, number of choices). Things in the order in which they stand in the picture.
_ARRANGEMENTS = ("across", "down")
CHOICES: tuple[tuple[str, int], ...] = (
    *((f"{part} {i}", count + 1) for i in range(3) for part, count in
      (("shape", len(SHAPES)), ("color", len(COLORS)), ("size", len(SIZES)))),
    ("count", max(NUMBERS) + 1),
    ("arrangement", len(_ARRANGEMENTS) + 1),
    ("position", len(POSITIONS) + 1),
    ("background", len(COLORS) + 1),
)  # fmt: skip


def meaning(spec: Spec) -> list[int]:
    """A choice for each of `CHOICES`; 0 is "none"."""
    things, relation = list(spec.things), spec.relation
    if relation in ("below", "right"):
        things.reverse()
    out = []
    for i in range(3):
        thing = things[i] if i < len(things) else None
        out.append(1 + SHAPES.index(thing.shape) if thing else 0)
        out.append(1 + list(COLORS).index(thing.color) if thing else 0)
        out.append(1 + SIZES.index(thing.size) if thing and thing.size else 0)
    arrangement = {"left": 1, "right": 1, "row": 1, "above": 2, "below": 2, "column": 2}.get(relation or "", 0)
    position = 1 + list(POSITIONS).index(spec.position) if spec.position else 0
    background = 1 + list(COLORS).index(spec.background) if spec.background else 0
    return [*out, spec.count, arrangement, position, background]


@functools.cache
def _tokenizers() -> tuple[Any, Any]:
    """(T5's, CLIP's), as the program uses them for Flux."""
    from comfy.text_encoders.flux import FluxTokenizer

    both = FluxTokenizer()
    return both.t5xxl, both.clip_l


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without start, end and padding."""
    ids = [pair[0] for pair in tokenizer.tokenize_with_weights(text)[0]]
    start = 1 if tokenizer.start_token is not None else 0
    return ids[start : ids.index(tokenizer.end_token, start)]


@functools.cache
def _piece(word: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(T5's, CLIP's) ids of a word at the start of a text or after a space, or of a comma or full stop after one."""
    t5, clip = _tokenizers()
    if word in ",.":
        return tuple(_ids(t5, "a" + word)[len(_ids(t5, "a")) :]), tuple(_ids(clip, word))
    return tuple(_ids(t5, word)), tuple(_ids(clip, word))


def token_ids(text: str, rng: random.Random | None = None) -> tuple[list[int], list[int]]:
    """(T5's, CLIP's) ids of a caption, without start, end and padding; with `rng`, some meaningless ones among them.

    Word by word from a cache, which is a thousand times faster than the tokenizers and the same for captions.
    """
    pieces = [_piece(word) for word in re.findall(r"[^\s,.]+|[,.]", text)]
    t5 = [i for piece in pieces for i in piece[0]]
    clip = [i for piece in pieces for i in piece[1]]
    if rng and rng.random() < _NOISY:
        for ids, vocabulary in ((t5, 32000), (clip, 49000)):
            for _ in range(rng.randint(1, 3)):
                ids.insert(rng.choice((0, len(ids))), rng.randrange(3, vocabulary))
    return t5, clip


def pad_ids(t5: list[int], clip: list[int], length: int | None = None) -> tuple[list[int], list[int]]:
    """Ids with start, end and padding: 256 for T5 and 77 for CLIP, or `length` for both."""
    t5_tokenizer, clip_tokenizer = _tokenizers()
    t5 = [*t5, t5_tokenizer.end_token]
    t5 += [t5_tokenizer.pad_token] * ((length or T5_LENGTH) - len(t5))
    clip = [clip_tokenizer.start_token, *clip, clip_tokenizer.end_token]
    return t5, clip + [clip_tokenizer.pad_token] * ((length or CLIP_LENGTH) - len(clip))


def _chunk(arguments: tuple[int, int, int, int, int]) -> Pool:
    seed, number, count, width, height = arguments
    rng = random.Random(f"{seed} {width}x{height} {number}")
    scenes = [training_scene(rng, width, height) for _ in range(count)]
    texts = ["" if rng.random() < _UNCAPTIONED else scene.caption for scene in scenes]
    rows = [pad_ids(*token_ids(text, rng if text else None), TEXT_LENGTH) for text in texts]
    t5, clip = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows))
    meanings = torch.tensor([meaning(s.spec) if text else [-1] * len(CHOICES) for s, text in zip(scenes, texts)])
    return {**to_arrays(scenes), "t5": t5, "clip": clip, "meaning": meanings.to(torch.int8)}


def make_pool(count: int, size: tuple[int, int], seed: int, workers: int) -> Pool:
    """`count` scenes of `size` (width, height): the arrays of `demo.render.to_arrays`, `t5` and `clip` [N, 48] int32,
    `meaning` [N, len(CHOICES)] int8 (-1: no caption)."""
    _piece("a")  # the tokenizers, before the workers are forked
    jobs = [(seed, i, min(_CHUNK, count - i * _CHUNK), *size) for i in range(-(-count // _CHUNK))]
    if workers > 1:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            chunks = pool.map(_in_numpy, jobs, chunksize=1)
        return {k: torch.cat([torch.from_numpy(c[k]) for c in chunks]) for k in chunks[0]}
    parts = [_chunk(job) for job in jobs]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _in_numpy(job: tuple[int, int, int, int, int]) -> dict[str, Any]:
    """Tensors between processes would need a file descriptor each."""
    torch.set_num_threads(1)
    return {key: value.numpy() for key, value in _chunk(job).items()}
