"""Command line flags: one mutable namespace, `args`, holding defaults until `parse_command_line` fills it in.

Flag names, types and defaults are ComfyUI's; the last group is ours. Custom nodes read and write `args` at run time.
"""

from __future__ import annotations

import argparse
import enum
import os
from collections.abc import Sequence
from typing import Any

import comfy.options


class EnumAction(argparse.Action):
    """Converts each value to a member of the enum given as `type`."""

    def __init__(self, **kwargs: Any) -> None:
        kind = kwargs.pop("type", None)
        if kind is None or not issubclass(kind, enum.Enum):
            raise ValueError("EnumAction needs an Enum as type")
        kwargs.setdefault("choices", tuple(member.value for member in kind))
        kwargs.setdefault("metavar", "{" + ",".join(kwargs["choices"]) + "}")
        super().__init__(**kwargs)
        self._kind = kind

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        value = [self._kind(v) for v in values] if isinstance(values, list) else self._kind(values)
        setattr(namespace, self.dest, value)


class LatentPreviewMethod(enum.Enum):
    """How latents are turned into preview pictures while sampling."""

    NoPreviews = "none"
    Auto = "auto"
    Latent2RGB = "latent2rgb"
    TAESD = "taesd"


class PerformanceFeature(enum.Enum):
    """Optimisations of `--fast` that trade exactness for speed."""

    Fp16Accumulation = "fp16_accumulation"
    Fp8MatrixMultiplication = "fp8_matrix_mult"
    CublasOps = "cublas_ops"
    AutoTune = "autotune"


def existing_directory(text: str) -> str:
    """An absolute path of an existing directory, for argparse."""
    path = os.path.abspath(text)
    if not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{text} is not a directory")
    return path


def page_directory(text: str) -> str:
    """An absolute path of a built page's directory, for argparse."""
    path = existing_directory(text)
    if not os.path.isfile(os.path.join(path, "index.html")):
        raise argparse.ArgumentTypeError(f"{text} has no index.html; give the folder of a built page")
    return path


def device_list(text: str) -> tuple[int, ...]:
    """`3,4,5` -> (3, 4, 5)."""
    try:
        devices = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        devices = ()
    if not devices or min(devices) < 0 or len(set(devices)) != len(devices):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of GPU numbers; write for example 3,4,5")
    return devices


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def port_number(text: str) -> int:
    """A TCP port; 0 takes a free one."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give a number from 1 to 65535, or 0 for a free one")
    return value


def gibibytes(text: str) -> float:
    """A size in GiB above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size in GiB above 0")
    return value


FRONT_END_DEFAULT = "comfyanonymous/ComfyUI@latest"

# Flags of ComfyUI that name something this program does not have or need. They are accepted, so that scripts go on
# working, and named in a warning (`app.run`), but are not in --help.
WITHOUT_EFFECT = (
    "--directml", "--oneapi-device-selector", "--disable-ipex-optimize", "--use-split-cross-attention",
    "--use-quad-cross-attention", "--force-upcast-attention", "--async-offload", "--force-channels-last",
    "--database-url", "--front-end-version", "--comfy-api-base", "--fp8_e8m0fnu-unet",
)  # fmt: skip
# The same, but what they ask for is so in any case.
ALWAYS_SO = ("--disable-xformers", "--disable-api-nodes", "--dont-upcast-attention")

# (flags, keywords) by topic; a topic whose name begins with "one:" lists flags that exclude each other.
_FLAGS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "network": [
        ("--listen", {"nargs": "?", "const": "0.0.0.0,::", "default": "127.0.0.1", "metavar": "IP",
                      "help": "addresses to listen on, separated by commas; without a value: everywhere"}),
        ("--port", {"type": port_number, "default": 8188, "help": "port of the web server; 0: a free one"}),
        ("--tls-keyfile", {"help": "TLS key file; with --tls-certfile the server speaks https"}),
        ("--tls-certfile", {"help": "TLS certificate file"}),
        ("--enable-cors-header", {"nargs": "?", "const": "*", "metavar": "ORIGIN",
                                  "help": "allow requests from ORIGIN (all without a value)"}),
        ("--max-upload-size", {"type": float, "default": 100, "help": "largest upload in MiB"}),
        ("--enable-compress-response-body", {"action": "store_true", "help": "gzip JSON and text answers"}),
        ("--auto-launch", {"action": "store_true", "help": "open the page in a browser after start"}),
        ("--disable-auto-launch", {"action": "store_true", "help": "do not open a browser"}),
        ("--comfy-api-base", {"default": "https://api.comfy.org"}),
        ("--dont-print-server", {"action": "store_true", "help": "do not print the address of the page"}),
    ],
    "folders": [
        ("--base-directory", {"help": "folder that holds models, custom_nodes, input, output, temp and user"}),
        ("--extra-model-paths-config", {"nargs": "+", "action": "append", "metavar": "PATH",
                                        "help": "YAML files with further model folders"}),
        ("--output-directory", {"help": "folder for results"}),
        ("--temp-directory", {"help": "folder for temporary files"}),
        ("--input-directory", {"help": "folder for input pictures"}),
        ("--user-directory", {"type": existing_directory, "help": "folder for settings and workflows"}),
        ("--no-persist", {"action": "store_true",
                          "help": "keep queue and history in memory only, not in the user folder"}),
        ("--database-url", {"default": None}),
    ],
    "front end": [
        ("--front-end-version", {"default": FRONT_END_DEFAULT}),
        ("--front-end-root", {"type": page_directory, "help": "serve the page from this folder"}),
        ("--multi-user", {"action": "store_true", "help": "a folder of files and settings per user; it separates folders, "
                                                     "not people: anyone may name any user"}),
        ("--preview-method", {"type": LatentPreviewMethod, "action": EnumAction,
                              "default": LatentPreviewMethod.NoPreviews, "help": "previews while sampling"}),
        ("--preview-size", {"type": int, "default": 512, "help": "largest side of previews in pixels"}),
    ],
    "devices": [
        ("--cuda-device", {"type": int, "metavar": "N", "help": "use only GPU N"}),
        ("--default-device", {"type": int, "metavar": "N", "help": "make GPU N the first one"}),
        ("--directml", {"type": int, "nargs": "?", "const": -1, "metavar": "N"}),
        ("--oneapi-device-selector", {}),
        ("--disable-ipex-optimize", {"action": "store_true"}),
    ],
    "one:allocator": [
        ("--cuda-malloc", {"action": "store_true", "help": "use cudaMallocAsync"}),
        ("--disable-cuda-malloc", {"action": "store_true", "help": "do not use cudaMallocAsync"}),
    ],
    "one:precision": [
        ("--force-fp32", {"action": "store_true", "help": "compute in fp32"}),
        ("--force-fp16", {"action": "store_true", "help": "compute in fp16"}),
    ],
    "one:precision of the diffusion model": [
        ("--fp32-unet", {"action": "store_true"}),
        ("--fp64-unet", {"action": "store_true"}),
        ("--bf16-unet", {"action": "store_true"}),
        ("--fp16-unet", {"action": "store_true"}),
        ("--fp8_e4m3fn-unet", {"action": "store_true"}),
        ("--fp8_e5m2-unet", {"action": "store_true"}),
        ("--fp8_e8m0fnu-unet", {"action": "store_true"}),
    ],
    "one:precision of the VAE": [
        ("--fp16-vae", {"action": "store_true"}),
        ("--fp32-vae", {"action": "store_true"}),
        ("--bf16-vae", {"action": "store_true"}),
    ],
    "VAE": [("--cpu-vae", {"action": "store_true", "help": "run the VAE on the CPU"})],
    "one:precision of text encoders": [
        ("--fp8_e4m3fn-text-enc", {"action": "store_true"}),
        ("--fp8_e5m2-text-enc", {"action": "store_true"}),
        ("--fp16-text-enc", {"action": "store_true"}),
        ("--fp32-text-enc", {"action": "store_true"}),
        ("--bf16-text-enc", {"action": "store_true"}),
    ],
    "one:caching of node results": [
        ("--cache-classic", {"action": "store_true", "help": "keep the results of the last prompt (default)"}),
        ("--cache-lru", {"type": int, "default": 0, "metavar": "N", "help": "keep N results across prompts"}),
        ("--cache-ram", {"nargs": "?", "const": 4.0, "type": float, "default": 0, "metavar": "GIB",
                         "help": "keep results until less than GIB of memory are available (4 without a value)"}),
        ("--cache-none", {"action": "store_true", "help": "keep nothing, save memory"}),
    ],
    "one:attention": [
        ("--use-split-cross-attention", {"action": "store_true"}),
        ("--use-quad-cross-attention", {"action": "store_true"}),
        ("--use-pytorch-cross-attention", {"action": "store_true", "help": "torch's attention (default)"}),
        ("--use-sage-attention", {"action": "store_true", "help": "SageAttention, if installed"}),
        ("--use-flash-attention", {"action": "store_true", "help": "flash-attn, if installed"}),
    ],
    "one:upcast": [
        ("--force-upcast-attention", {"action": "store_true"}),
        ("--dont-upcast-attention", {"action": "store_true"}),
    ],
    "one:memory": [
        ("--gpu-only", {"action": "store_true", "help": "keep everything on the GPU"}),
        ("--highvram", {"action": "store_true", "help": "keep models on the GPU after use"}),
        ("--normalvram", {"action": "store_true", "help": "ordinary memory management"}),
        ("--lowvram", {"action": "store_true", "help": "split models to save GPU memory"}),
        ("--novram", {"action": "store_true", "help": "when lowvram is not enough"}),
        ("--cpu", {"action": "store_true", "help": "compute on the CPU"}),
    ],
    "memory and speed": [
        ("--reserve-vram", {"type": float, "metavar": "GIB", "help": "GPU memory to leave free"}),
        ("--async-offload", {"action": "store_true"}),
        ("--force-non-blocking", {"action": "store_true", "help": "non-blocking copies everywhere"}),
        ("--disable-smart-memory", {"action": "store_true", "help": "unload models to RAM after each use"}),
        ("--deterministic", {"action": "store_true", "help": "slower deterministic algorithms"}),
        ("--fast", {"nargs": "*", "type": PerformanceFeature, "action": EnumAction, "default": None,
                    "metavar": "{fp16_accumulation,fp8_matrix_mult,autotune}",
                    "help": "optimisations that change results a little; without a value: all"}),
        ("--force-channels-last", {"action": "store_true"}),
        ("--supports-fp8-compute", {"action": "store_true", "help": "act as if the GPU computes in fp8"}),
        ("--disable-xformers", {"action": "store_true"}),
        ("--mmap-torch-files", {"action": "store_true", "help": "memory-map .ckpt and .pt files"}),
        ("--disable-mmap", {"action": "store_true", "help": "read safetensors into memory"}),
    ],
    "custom nodes": [
        ("--disable-all-custom-nodes", {"action": "store_true", "help": "load no custom nodes"}),
        ("--whitelist-custom-nodes", {"nargs": "+", "default": [], "help": "packs to load all the same"}),
        ("--disable-api-nodes", {"action": "store_true"}),
        ("--enable-manager", {"action": "store_true", "help": "ComfyUI-Manager, the package comfyui-manager"}),
    ],
    "one:ComfyUI-Manager": [
        ("--disable-manager-ui", {"action": "store_true", "help": "only what it does at the start: no pages, no routes"}),
        ("--enable-manager-legacy-ui", {"action": "store_true", "help": "its older pages"}),
    ],
    "others": [
        ("--default-hashing-function", {"choices": ["md5", "sha1", "sha256", "sha512"], "default": "sha256",
                                        "help": "hash for comparing uploaded files"}),
        ("--disable-metadata", {"action": "store_true", "help": "do not write the workflow into files"}),
        ("--quick-test-for-ci", {"action": "store_true", "help": "load the nodes and stop"}),
        ("--windows-standalone-build", {"action": "store_true", "help": "conveniences of the portable build"}),
        ("--verbose", {"nargs": "?", "const": "DEBUG", "default": "INFO",
                       "choices": ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], "help": "log level"}),
        ("--log-stdout", {"action": "store_true", "help": "log to stdout instead of stderr"}),
    ],
    "TACO-DiT": [
        ("--gpus", {"type": device_list, "metavar": "3,4,5", "help": "GPUs to use; one rank each"}),
        ("--prefer-gpus", {"type": device_list, "metavar": "3,4,5",
                           "help": "GPUs to use where all of them exist, else all that are fit; --gpus and "
                                   "CUDA_VISIBLE_DEVICES come first"}),
        ("--taco-ranks", {"type": positive, "metavar": "N",
                          "help": "number of ranks; default: one per visible GPU, one on the CPU"}),
        ("--taco-config", {"metavar": "FILE", "help": "configuration; default: taco_dit_config.yaml"}),
        ("--taco-measure", {"action": "store_true",
                            "help": "measure computing and links anew for the planner; default: at the first start with "
                                    "these GPUs and versions"}),
        ("--disable-taco-dit", {"action": "store_true", "help": "one rank, no parallelism"}),
        ("--no-demo", {"action": "store_true", "help": "without the demo model, its workflows and the first screen"}),
        ("--allowed-hosts", {"metavar": "NAME[,NAME...]", "default": "",
                             "help": "further names this server is reached by, for example a proxy's; *: any"}),
        ("--auth-token", {"metavar": "TOKEN", "help": "password of the server; rather set TACO_TOKEN, which others cannot "
                                                      "read in the list of processes"}),
        ("--max-image-pixels", {"type": positive, "default": 178_956_970, "metavar": "N",
                                "help": "largest picture, or frame of a video, that is opened, in pixels"}),
        ("--max-image-frames", {"type": positive, "default": 4096, "metavar": "N",
                                "help": "most frames of a moving picture that is opened"}),
        ("--max-image-gib", {"type": gibibytes, "default": 4.0, "metavar": "GIB",
                             "help": "most memory that the frames of one picture may take"}),
        ("--max-video-gib", {"type": gibibytes, "metavar": "GIB",
                             "help": "most memory that one video or sound may take; default: a quarter of the machine's"}),
    ],
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Names the closest flag when one is unknown."""

    def error(self, message: str) -> Any:
        import difflib
        import re

        known = [flag for flags in _FLAGS.values() for flag, _ in flags]
        unknown = re.findall(r"--[\w-]+", message.split("unrecognized arguments:")[-1])
        hints = [m for flag in unknown for m in difflib.get_close_matches(flag, known, n=1)]
        if "unrecognized" in message and hints:
            message += f"; did you mean {', '.join(hints)}?"
        self.exit(2, f"TACO-DiT: {message} (--help lists all flags)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = Parser(prog="main.py", usage="main.py [FLAGS]", allow_abbrev=False,
                    description="ComfyUI whose core uses all your GPUs for one picture.")  # fmt: skip
    for topic, flags in _FLAGS.items():
        exclusive = topic.startswith("one:")
        group: Any = parser.add_argument_group(topic.removeprefix("one:"))
        group = group.add_mutually_exclusive_group() if exclusive else group
        for flag, keywords in flags:
            hidden = {"help": argparse.SUPPRESS} if flag in (*WITHOUT_EFFECT, *ALWAYS_SO) else {}
            group.add_argument(flag, **(keywords | hidden))
    return parser


def _finish(namespace: argparse.Namespace) -> argparse.Namespace:
    """Settings that follow from others."""
    if namespace.windows_standalone_build:
        namespace.auto_launch = True
    if namespace.disable_auto_launch:
        namespace.auto_launch = False
    if namespace.force_fp16:
        namespace.fp16_unet = True
    if namespace.fast is None:
        namespace.fast = set()
    elif not namespace.fast:
        namespace.fast = set(PerformanceFeature)
    else:
        namespace.fast = set(namespace.fast)
    return namespace


def parse_command_line(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line into `args` (the same object, so that everyone who imported it sees the values).

    Exits with status 2 and one line on stderr when a flag is unknown or a value is not allowed.
    """
    vars(args).update(vars(_finish(build_parser().parse_args(argv))))
    return args


args = _finish(build_parser().parse_args([]))
if comfy.options.args_parsing:
    parse_command_line()
