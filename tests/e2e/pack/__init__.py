"""Test nodes for the servers of tests/e2e: they misbehave on chosen ranks and write down what each rank does."""

import asyncio
import copy
import os
import random
import sys
import threading
import time

import torch

import comfy.model_management
import comfy.patcher_extension
import comfy.sd
import folder_paths
from comfy.taco_dit import runtime

ANY = "*"


class _Any(str):
    def __ne__(self, other):
        return False


def rank():
    return runtime.current().manager.rank


def record(label, text):
    with open(os.path.join(os.environ["TACO_TEST_RECORDS"], f"{label}.{rank()}"), "a", encoding="utf-8") as file:
        file.write(f"{text}\n")


class _Node:
    CATEGORY = "test"
    FUNCTION = "run"


class TestRestart(_Node):
    """Starts the server again in the same process, as ComfyUI-Manager does after an installation."""

    RETURN_TYPES = ("INT",)
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT",)}}

    def run(self, seconds):
        arguments = [sys.executable, *sys.argv]
        threading.Timer(seconds, os.execv, (sys.executable, arguments)).start()
        return (0,)


class TestRaise(_Node):
    """Fails on every rank, with a message of so many characters."""

    RETURN_TYPES = ("INT",)
    OUTPUT_NODE = True
    TACO_RANKS = "all"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"length": ("INT", {"max": 2**40})}}

    def run(self, length):
        raise ValueError(f"rank {rank()} " + "x" * length)


class TestRecord(_Node):
    """Writes a text down on every rank, when its turn comes."""

    RETURN_TYPES = ("INT",)
    OUTPUT_NODE = True
    TACO_RANKS = "all"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING",), "text": ("STRING",)}, "optional": {"value": (_Any(ANY),)}}

    def run(self, label, text, value=None):
        if text == "value":
            text = str(value)
        elif text == "inference mode":
            text = str(torch.is_inference_mode_enabled())
        elif text == "loaded models":
            text = str(len(comfy.model_management.current_loaded_models))
        record(label, text)
        return (0,)

    @classmethod
    def IS_CHANGED(cls, label, text, value=None):
        return float("nan")


class TestOutput(_Node):
    """An output node whose order among others is written down on every rank."""

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    TACO_RANKS = "all"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING",), "text": ("STRING",)}, "optional": {"value": (_Any(ANY),)}}

    def run(self, label, text, value=None):
        record(label, text)
        return {"ui": {"text": [text]}}


class TestModel(_Node):
    """Counts the steps of a model on every rank, may slow them down, and may fail on one rank in one step."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "label": ("STRING",),
                "slow_ms": ("INT", {"default": 0, "max": 100000}),
                "fail": (["never", "wrapper", "block"],),
                "fail_rank": ("INT", {"default": 1, "min": 0}),
                "fail_step": ("INT", {"default": 2, "min": 1}),
            }
        }

    def run(self, model, label, slow_ms, fail, fail_rank, fail_step):
        model = model.clone()
        steps = [0]

        def count(executor, *args, **kwargs):
            steps[0] += 1
            record(label, steps[0])
            time.sleep(slow_ms / 1000)
            return executor(*args, **kwargs)

        def trip():
            if steps[0] == fail_step and rank() == fail_rank:
                raise ArithmeticError("on purpose, inside the model")

        def function_wrapper(apply_model, options):
            trip()
            return apply_model(options["input"], options["timestep"], **options["c"])

        def block(args, extra):
            trip()
            return extra["original_block"](args)

        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", count)
        if fail == "wrapper":
            model.set_model_unet_function_wrapper(function_wrapper)
        if fail == "block":
            model.set_model_patch_replace(block, "dit", "double_block", 1)
        return (model,)


class TestSlowBlocks(_Node):
    """A model whose every block takes so many seconds longer; each is written down when it begins."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "label": ("STRING",), "seconds": ("FLOAT",)}}

    def run(self, model, label, seconds):
        model = model.clone()

        def block(args, extra):
            record(label, "block")
            time.sleep(seconds)
            return extra["original_block"](args)

        for kind, count in (("double_block", 2), ("single_block", 3)):
            for index in range(count):
                model.set_model_patch_replace(block, "dit", kind, index)
        return (model,)


class TestSlowVae(_Node):
    """A copy of a VAE whose every residual block takes so many seconds longer; each is written down."""

    RETURN_TYPES = ("VAE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",), "label": ("STRING",), "seconds": ("FLOAT",)}}

    def run(self, vae, label, seconds):
        vae = copy.copy(vae)
        vae.first_stage_model = copy.deepcopy(vae.first_stage_model)

        def wait(module, inputs):
            record(label, "block")
            time.sleep(seconds)

        for module in vae.first_stage_model.modules():
            if type(module).__name__ == "ResnetBlock":
                module.register_forward_pre_hook(wait)
        return (vae,)


class TestLoader(_Node):
    """A pack's loader of diffusion models, which does not look whether its file has changed."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING",)}}

    def run(self, name):
        return (comfy.sd.load_diffusion_model(folder_paths.get_full_path("diffusion_models", name)),)


class TestFail(_Node):
    """Passes its value on, except on one rank, where it fails: always, or with kind "once" the first time only."""

    RETURN_TYPES = (_Any(ANY),)
    failed_once = False

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": (_Any(ANY),), "rank": ("INT", {"default": 1}), "kind": ("STRING",)}}

    def run(self, latent_image, rank, kind):  # noqa: A002
        record(f"trip-{kind}", "run")
        if runtime.current().manager.rank == rank and not TestFail.failed_once:
            TestFail.failed_once = kind == "once"
            if kind == "memory":
                raise comfy.model_management.OOM_EXCEPTION("on purpose, out of memory")
            raise ArithmeticError("on purpose, before sampling")
        return (latent_image,)


class TestUnseeded(_Node):
    """Adds noise of its own to a latent, another on each rank."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": ("LATENT",), "label": ("STRING",)}}

    def run(self, latent_image, label):
        generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(40))
        noise = torch.randn(latent_image["samples"].shape, generator=generator)
        record(label, float(noise.sum()))
        folder = os.environ["TACO_TEST_RECORDS"]
        torch.save(noise.clone(), os.path.join(folder, f"{label}.noise{rank()}.pt"))
        return ({**latent_image, "samples": latent_image["samples"] + noise},)


class TestKnownNoise(_Node):
    """Adds the noise that TestUnseeded drew on rank 0."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": ("LATENT",), "path": ("STRING",)}}

    def run(self, latent_image, path):
        return ({**latent_image, "samples": latent_image["samples"] + torch.load(path, weights_only=True)},)


class TestAsync(_Node):
    """Waits another time on each rank: `delays` are seconds by rank, separated by commas."""

    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING",), "delays": ("STRING",), "value": ("INT", {"default": 0})}}

    async def run(self, label, delays, value):
        await asyncio.sleep(float(delays.split(",")[rank()]))
        record(label, value)
        return (value,)


class TestSlow(_Node):
    """Stops one rank for a while before it passes its value on."""

    RETURN_TYPES = (_Any(ANY),)
    OUTPUT_NODE = True
    TACO_RANKS = "all"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": (_Any(ANY),), "rank": ("INT",), "seconds": ("FLOAT",)}}

    def run(self, latent_image, rank, seconds):  # noqa: A002
        if runtime.current().manager.rank == rank:
            time.sleep(seconds)
        return (latent_image,)


class TestChanged(_Node):
    """IS_CHANGED says something new each time on the ranks listed, always the same on others."""

    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING",), "ranks": ("STRING",)}}

    def run(self, label, ranks):
        record(label, "run")
        return (1,)

    @classmethod
    def IS_CHANGED(cls, label, ranks):
        return time.time_ns() if str(rank()) in ranks.split(",") else "same"


class TestFreeMemory(_Node):
    """From here to TestFreeMemoryEnd, ranks above 0 believe that almost no memory is free."""

    RETURN_TYPES = ("LATENT",)
    real = None

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": ("LATENT",), "label": ("STRING",)}}

    def run(self, latent_image, label):
        TestFreeMemory.real = comfy.model_management.get_free_memory
        free = 2**40 if rank() == 0 else 2**20

        def fake(device=None, torch_free_too=False):
            record(label, free)
            return (free, free) if torch_free_too else free

        comfy.model_management.get_free_memory = fake
        return (latent_image,)


class TestFreeMemoryEnd(_Node):
    """The end of TestFreeMemory's belief."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def run(self, samples):
        if TestFreeMemory.real is not None:
            comfy.model_management.get_free_memory = TestFreeMemory.real
        return (samples,)


class TestApi(_Node):
    """Stands for a node that calls a paid service."""

    RETURN_TYPES = ("INT",)
    API_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"label": ("STRING",)}}

    def run(self, label):
        record(label, "called")
        return (random.SystemRandom().getrandbits(40),)


class TestDrainRandom(_Node):
    """Draws another number of random numbers on each rank from the process's own generators."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": ("LATENT",), "label": ("STRING",)}}

    def run(self, latent_image, label):
        torch.randn(17 * (rank() + 1))
        torch.seed()
        random.seed()
        record(label, torch.initial_seed())
        return (latent_image,)


NODE_CLASS_MAPPINGS = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, _Node) and value is not _Node
}
