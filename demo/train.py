"""Train the demo model: text encoders, picture VAE, then network and text encoders together, then the LoRA.

    python -m demo.train                     the whole recipe, under half an hour on one H200
    python -m demo.train --smoke             a few steps of each stage, to see that it runs
    torchrun --nproc-per-node 4 -m demo.train        each batch spread over four GPUs

State is saved to --work every minute; the same command goes on from there. The same seed and number of GPUs give the
same scenes, captions, times and noise for every step, whatever the number of workers or interruptions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from demo import networks
from demo.data import CHOICES, Pool, make_pool
from demo.render import SceneArrays, render
from demo.run import Batch, Recipe, Run, apply

SIZES = ((128, 128), (160, 112), (112, 160))
_SIZE_SHARES = (0.76, 0.12, 0.12)
_CROP = 64
_TIME_MEAN, _TIME_DEVIATION = 0.5, 1.2
_LATENT_NOISE = 0.1  # deviation added to latents of unit deviation while the VAE trains
_PARTS = ("kind", "place", "rgb", "background")


def pick(pool: Pool, count: int, generator: torch.Generator) -> Pool:
    """`count` random entries of a pool."""
    size = len(pool["kind"])
    index = torch.randint(size, (count,), generator=generator, device=pool["kind"].device)
    return {key: value[index] for key, value in pool.items()}


def pools(run: Run, count: int, seed: int) -> list[Pool]:
    """Scenes of all sizes on the run's device, `count` in all."""
    out = []
    for share, size in zip(_SIZE_SHARES, SIZES):
        pool = make_pool(max(int(count * share), 1), size, run.recipe.seed * 1000 + seed, run.workers)
        out.append({key: value.to(run.device) for key, value in pool.items()})
    return out


class Reader(nn.Module):
    """What the text encoders must be able to tell: the choices a caption makes, linear in T5's end token and in CLIP's
    pooled vector. Only for training: colours and shapes are bound to each other long before pictures would teach it."""

    def __init__(self) -> None:
        super().__init__()
        total = sum(count for _, count in CHOICES)
        self.t5 = nn.Linear(networks.T5_WIDTH, total)
        self.clip = nn.Linear(networks.CLIP_WIDTH, total)

    def forward(self, context: torch.Tensor, pooled: torch.Tensor, batch: Pool) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean cross entropy, share of captions that T5's end token tells wholly right) of a text batch."""
        ends = (batch["t5"] == 1).int().argmax(dim=1)
        states = context[torch.arange(len(ends), device=ends.device), ends]
        target = batch["meaning"].long()
        losses, right = [], torch.ones(len(ends), dtype=torch.bool, device=ends.device)
        for head, features in ((self.t5, states), (self.clip, pooled)):
            for i, logits in enumerate(head(features.float()).split([count for _, count in CHOICES], dim=1)):
                losses.append(F.cross_entropy(logits, target[:, i], ignore_index=-1))
                if head is self.t5:
                    right &= (logits.argmax(1) == target[:, i]) | (target[:, i] < 0)
        return torch.stack(losses).mean(), right.float().mean()


def train_text(run: Run, scenes: list[Pool]) -> Reader:
    """T5 and CLIP alone, to read captions."""
    torch.manual_seed(run.recipe.seed + 2)
    reader = Reader().to(run.device)
    texts = {key: torch.cat([pool[key] for pool in scenes]) for key in ("kind", "t5", "clip", "meaning")}
    parameters = {f"reader.{k}": v for k, v in reader.named_parameters()}
    parameters |= {k: v for k, v in run.model.named_parameters() if not k.startswith("dit.")}

    def batch_of(number: int, generator: torch.Generator) -> Batch:
        batch = pick(texts, run.share(run.recipe.text_batch), generator)
        return {"t5": _padded(batch["t5"], number % 4 == 3), "clip": batch["clip"], "meaning": batch["meaning"]}

    def loss_of(batch: Batch) -> torch.Tensor:
        loss, right = reader(*run.model.text(batch["t5"], batch["clip"]), batch)
        run.note("captions read", right)
        return loss

    average = run.stage("text", parameters, run.recipe.text_steps, run.recipe.text_rate, batch_of, loss_of)
    if "model" not in run.averages:
        apply(run.model, average)
    apply(reader, {key.removeprefix("reader."): value for key, value in average.items()})
    return reader


def _cropped(arrays: SceneArrays, generator: torch.Generator) -> SceneArrays:
    """Scenes moved so that a window of 64 x 64 at the origin shows at least part of an object."""
    place = arrays["place"]
    rows = torch.arange(len(place), device=place.device)
    present = (arrays["kind"] >= 0).sum(1)
    chosen = (torch.rand(len(place), generator=generator, device=place.device) * present).long()
    wobble = torch.rand((len(place), 2), generator=generator, device=place.device) - 0.5
    corner = (place[rows, chosen, :2] - _CROP / 2 + wobble * _CROP).round()
    moved = place.clone()
    moved[:, :, :2] -= corner[:, None]
    return {**arrays, "place": moved}


def train_vae(run: Run, scenes: Pool) -> None:
    """Encoder and decoder on windows, then on whole pictures; then the latents' mean and deviation become 0 and 1."""
    recipe, vae = run.recipe, run.vae

    def reconstruction(pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        # Normalised by the batch, as `standardise` will by constants: no channel and no place can shout down the noise.
        latent = F.batch_norm(vae.encode(pictures * 2 - 1), None, None, training=True)
        again = networks.pictures_of(vae, latent + _LATENT_NOISE * noise)
        return F.l1_loss(again, pictures) + 2 * F.mse_loss(again, pictures)

    compiled = run.compiled(reconstruction)
    windows = recipe.vae_steps * 3 // 4

    def batch_of(number: int, generator: torch.Generator) -> Batch:
        whole = number >= windows
        batch = pick(scenes, run.share(recipe.vae_batch // 4 if whole else recipe.vae_batch), generator)
        arrays = {name: batch[name] for name in _PARTS}
        side = 128 if whole else _CROP
        pictures = run.draw(
            arrays if whole else _cropped(arrays, generator), side, side, "night" if number % 4 == 3 else "plain"
        )
        shape = (len(pictures), networks.LATENT_CHANNELS, side // 8, side // 8)
        return {"pictures": pictures, "noise": torch.randn(shape, generator=generator, device=run.device)}

    def loss_of(batch: Batch) -> torch.Tensor:
        return compiled(batch["pictures"], batch["noise"])

    if "standardised" not in run.done:
        parameters = dict(vae.named_parameters())
        apply(vae, run.stage("vae", parameters, recipe.vae_steps, recipe.vae_rate, batch_of, loss_of))
        networks.standardise(vae, *_statistics(run, scenes))
        run.averages.pop("vae")
        run.done["standardised"] = 1
        run.save()
    vae.requires_grad_(False)


@torch.no_grad()
def _statistics(run: Run, scenes: Pool) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, deviation) [C] of what the encoder gives for up to 4,096 scenes."""
    rows = []
    for start in range(0, min(4096, len(scenes["kind"])), 128):
        arrays = {name: scenes[name][start : start + 128] for name in _PARTS}
        rows.append(run.vae.encode(render(arrays, 128, 128) * 2 - 1).transpose(0, 1).flatten(1))
    values = torch.cat(rows, dim=1)
    return values.mean(1), values.std(1)


@torch.no_grad()
def add_latents(run: Run, scenes: list[Pool], style: str) -> None:
    """Give each pool its pictures' latents [N, 16, h, w] in half precision; each rank makes some of them."""
    for pool, (width, height) in zip(scenes, SIZES):
        count = len(pool["kind"])
        latent = torch.zeros(
            (count, networks.LATENT_CHANNELS, height // 8, width // 8), dtype=torch.half, device=run.device
        )
        share = run.share(count)
        for start in range(run.rank * share, min((run.rank + 1) * share, count), 512):
            arrays = {name: pool[name][start : start + 512] for name in _PARTS}
            with run.amp():
                latent[start : start + 512] = run.encode(arrays, width, height, style).half()
        for rank in range(run.ranks if run.ranks > 1 else 0):
            dist.broadcast(latent[rank * share : (rank + 1) * share], rank)
        pool["latent"] = latent


def _padded(t5: torch.Tensor, whole: bool) -> torch.Tensor:
    """T5's ids as they are in the pool, or padded as Flux pads them: whole prompts take three times as long."""
    return F.pad(t5, (0, networks.T5_LENGTH - t5.shape[1])) if whole else t5


def _flow_batch(run: Run, pool: Pool, generator: torch.Generator, whole: bool) -> Batch:
    """Some latents with their captions, and for each noise and a moment between picture (0) and noise (1).

    Moments are logit-normal (Esser et al. 2024), a fifth of them uniform. They lean towards noise, where a picture's
    layout is settled: neighbouring latents repeat each other, so that objects show through much noise.
    """
    batch = pick(pool, run.share(run.recipe.batch), generator)
    latent = batch["latent"].float()
    logits = torch.randn(len(latent), generator=generator, device=latent.device)
    uniform = torch.rand(len(latent), generator=generator, device=latent.device)
    return {
        "latent": latent,
        "noise": torch.randn(latent.shape, generator=generator, device=latent.device),
        "moment": torch.where(uniform < 0.2, uniform * 5, (_TIME_MEAN + _TIME_DEVIATION * logits).sigmoid()),
        "t5": _padded(batch["t5"], whole),
        "clip": batch["clip"],
        "meaning": batch["meaning"],
    }


def _flow_loss(run: Run, batch: Batch) -> tuple[torch.Tensor, Any]:
    """(mean squared error of the predicted flow (Lipman et al. 2022), the text it was given)."""
    at = batch["moment"][:, None, None, None]
    text = run.model.text(batch["t5"], batch["clip"])
    flow = run.model.dit((1 - at) * batch["latent"] + at * batch["noise"], batch["moment"], *text)
    return F.mse_loss(flow.float(), batch["noise"] - batch["latent"]), text


def _pool_of_step(scenes: list[Pool], number: int) -> Pool:
    """Every eighth step another size than 128 x 128, in turn."""
    return scenes[0] if number % 8 < 6 else scenes[number % 8 - 5]


def train_model(run: Run, scenes: list[Pool], reader: Reader) -> None:
    """Network, T5 and CLIP together; prompts are whole in every seventh step, and at last in all."""
    recipe = run.recipe
    short = recipe.steps * 9 // 10
    parameters = dict(run.model.named_parameters())

    def batch_of(number: int, generator: torch.Generator) -> Batch:
        return _flow_batch(run, _pool_of_step(scenes, number), generator, number % 7 == 6 or number >= short)

    def loss_of(batch: Batch) -> torch.Tensor:
        loss, text = _flow_loss(run, batch)
        reading, right = reader(*text, batch)
        run.note("captions read", right)
        return loss + 0.02 * reading

    reader.requires_grad_(False)
    run.stage("model", parameters, recipe.steps, recipe.rate, batch_of, loss_of)


class _LowRank(nn.Module):
    """A weight plus `up @ down` (Hu et al. 2021); `up` begins at zero."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> [out, in]."""
        return weight + self.up @ self.down


def _targets(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the blocks, without their modulations."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name and not name.endswith(".lin"):
            yield name, module


def train_lora(run: Run, scenes: list[Pool]) -> None:
    """The night LoRA on the averaged model, which stays as it is."""
    recipe = run.recipe
    trained = {key: value.detach().clone() for key, value in run.model.named_parameters()}
    apply(run.model, run.averages["model"])
    run.model.requires_grad_(False)
    torch.manual_seed(recipe.seed + 1)
    parameters: dict[str, nn.Parameter] = {}
    layers = list(_targets(run.model.dit))
    for name, layer in layers:
        change = _LowRank(layer.weight, recipe.lora_rank)
        nn.utils.parametrize.register_parametrization(layer, "weight", change)
        parameters |= {f"{name}.down": change.down, f"{name}.up": change.up}

    def batch_of(number: int, generator: torch.Generator) -> Batch:
        return _flow_batch(run, _pool_of_step(scenes, number), generator, number % 4 == 3)

    def loss_of(batch: Batch) -> torch.Tensor:
        return _flow_loss(run, batch)[0]

    run.lora = run.stage("lora", parameters, recipe.lora_steps, recipe.lora_rate, batch_of, loss_of, compiled=False)
    for _, layer in layers:
        nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    apply(run.model, trained)
    run.save()


def lora_file(lora: dict[str, torch.Tensor], rank: int) -> networks.StateDict:
    """Trained factors under kohya's keys, in half precision."""
    out = {}
    for key, value in lora.items():
        name, part = key.rsplit(".", 1)
        stem = "lora_unet_" + name.replace(".", "_")
        out[f"{stem}.lora_{part}.weight"] = value.detach().half().cpu().contiguous()
        out[f"{stem}.alpha"] = torch.tensor(float(rank))
    return out


def export(run: Run, out: str) -> None:
    """Write checkpoint and LoRA below `out`."""
    if "model" not in run.averages:
        raise SystemExit(f"{run.file} is not there or its run has not come to the model yet; nothing to write")
    metadata = {"format": "pt", "taco_dit_demo": json.dumps(asdict(run.recipe)), "license": "GPL-3.0-or-later"}
    weights = networks.checkpoint(run.averages["model"], run.vae.state_dict())
    networks.write(os.path.join(out, networks.CHECKPOINT), weights, metadata)
    if run.lora:
        networks.write(os.path.join(out, networks.LORA), lora_file(run.lora, run.recipe.lora_rank), metadata)


def plot(run: Run, path: str) -> None:
    """The losses of all stages as a picture; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss plot: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(4 * len(run.losses), 3), layout="constrained")
    axes = figure.subplots(1, len(run.losses), squeeze=False)[0]
    for axis, (name, points) in zip(axes, run.losses.items()):
        axis.plot(*zip(*points), linewidth=0.8)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=110)


def train(run: Run) -> None:
    """All stages, from wherever the run is."""
    scenes = pools(run, run.recipe.scenes, 1)
    reader = train_text(run, scenes)
    train_vae(run, scenes[0])
    add_latents(run, scenes, "plain")
    train_model(run, scenes, reader)
    del scenes
    if run.recipe.lora_steps:
        scenes = pools(run, run.recipe.scenes // 10, 2)
        add_latents(run, scenes, "night")
        train_lora(run, scenes)


@contextmanager
def _ranks(device: str) -> Iterator[torch.device]:
    """This rank's device, inside a process group when torchrun started several."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield torch.device(device)
        return
    chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Recipe()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    parser.add_argument("--smoke", action="store_true", help="few steps, few scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--workers",
        type=int,
        default=max((os.cpu_count() or 2) // int(os.environ.get("WORLD_SIZE", 1)) - 1, 1),
        help="processes making scenes",
    )
    parser.add_argument("--work", default="temp/demo", help="folder for the state of the run")
    parser.add_argument("--out", default="demo/models", help="models folder to write into")
    parser.add_argument("--plot", default="docs/images/demo_loss.png")
    parser.add_argument("--export", action="store_true", help="only write the model files from the state in --work")
    arguments = vars(parser.parse_args())
    recipe = Recipe(**{name: arguments[name] for name in asdict(Recipe())})
    if arguments["smoke"]:
        recipe = replace(recipe, scenes=60, text_batch=8, text_steps=4, vae_batch=8, vae_steps=4, batch=4, steps=5,
                         lora_steps=2)  # fmt: skip
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # sizes of pictures, styles, last batches
    with _ranks(arguments["device"]) as device:
        run = Run(recipe, device, arguments["work"], arguments["workers"])
        began = time.monotonic()
        if not arguments["export"]:
            train(run)
        if run.rank == 0:
            export(run, arguments["out"])
            plot(run, arguments["plot"])
            minutes = (time.monotonic() - began) / 60
            print(f"done after {minutes:.1f} minutes: {os.path.join(arguments['out'], networks.CHECKPOINT)}")


if __name__ == "__main__":
    main()
