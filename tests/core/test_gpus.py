"""Which GPUs a start takes and what it says of them, for made-up machines."""

from __future__ import annotations

import pynvml
import pytest

from comfy.cli_args import build_parser
from comfy.taco_dit.core.gpus import GIB, Gpu, list_gpus
from comfy.taco_dit.core.launcher import LaunchError, plan_launch

SCRIPT = ("--prefer-gpus", "3,4,5")  # what the start script passes when nobody chose
H200 = ("NVIDIA H200", 140, (9, 0))
RTX4090 = ("NVIDIA GeForce RTX 4090", 24, (8, 9))
RTX3060 = ("NVIDIA GeForce RTX 3060", 12, (8, 6))
T4 = ("Tesla T4", 15, (7, 5))
ALL = "GPU 3, 4, 5 are not all there, so all of this machine are used: "
GTX1080 = ("NVIDIA GeForce GTX 1080", 8, (6, 1))


def machine(*kinds):
    return tuple(Gpu(index, name, gib * GIB, capability) for index, (name, gib, capability) in enumerate(kinds))


def plan(kinds, *flags, environ=None):
    present = machine(*([H200] * kinds if isinstance(kinds, int) else kinds))
    return plan_launch(build_parser().parse_args(list(flags)), environ or {}, present)


@pytest.mark.parametrize("present, gpus, said", [
    (1, (0,), ALL + "GPU 0 (NVIDIA H200, 140 GiB); one rank"),
    (2, (0, 1), ALL + "GPU 0, 1 (NVIDIA H200, 140 GiB each); 2 ranks"),
    (3, (0, 1, 2), ALL + "GPU 0, 1, 2 (NVIDIA H200, 140 GiB each); "
                   "3 ranks"),
    (4, (0, 1, 2, 3), ALL + "GPU 0, 1, 2, 3 (NVIDIA H200, 140 GiB "
                      "each); 4 ranks"),
    (6, (3, 4, 5), "using GPU 3, 4, 5 (NVIDIA H200, 140 GiB each); 3 ranks"),
    (8, (3, 4, 5), "using GPU 3, 4, 5 (NVIDIA H200, 140 GiB each); 3 ranks"),
])  # fmt: skip
def test_the_start_script_takes_its_three_gpus_or_all(present, gpus, said):
    found = plan(present, *SCRIPT)
    assert (found.ranks, found.gpus, found.cpu) == (len(gpus), gpus, False)
    assert (found.used, found.messages) == (said, ())


def test_without_gpus_the_cpu_computes_and_one_line_says_so():
    found = plan(0, *SCRIPT)
    assert (found.ranks, found.gpus, found.cpu, found.used) == (1, (), True, "")
    assert found.messages == ("no NVIDIA GPU found: computing on the CPU, which is slow",)
    assert plan(0, *SCRIPT, "--taco-ranks", "3").ranks == 3
    assert plan(4, "--cpu", "--taco-ranks", "5").cpu and not plan(4, "--cpu").messages


@pytest.mark.parametrize("flags, environ, gpus", [
    (["--gpus", "0,1"], {"CUDA_VISIBLE_DEVICES": "6,7"}, (0, 1)),
    (SCRIPT, {"CUDA_VISIBLE_DEVICES": "6,7"}, (6, 7)),
    ([], {"CUDA_VISIBLE_DEVICES": "6,7"}, (6, 7)),
    ([], {}, tuple(range(8))),
    (["--taco-ranks", "2"], {}, (0, 1)),
    ([*SCRIPT, "--taco-ranks", "2"], {}, (3, 4)),
    ([*SCRIPT, "--cuda-device", "1"], {}, (1,)),
    ([*SCRIPT, "--default-device", "5"], {}, (5, 3, 4)),
    (["--disable-taco-dit"], {}, (0,)),
])  # fmt: skip
def test_what_is_named_comes_first(flags, environ, gpus):
    found = plan(8, *flags, environ=environ)
    assert (found.gpus, found.messages) == (gpus, ())


def test_gpus_named_by_their_identifier():
    found = plan(2, *SCRIPT, environ={"CUDA_VISIBLE_DEVICES": "GPU-1f,MIG-2e"})
    assert (found.ranks, found.gpus, found.used) == (2, (), "using GPU-1f, MIG-2e; 2 ranks")


@pytest.mark.parametrize("present, flags, environ, gpus, message", [
    (4, ["--gpus", "3,4,5"], {}, (3,), "GPU 4, 5 not found (4 present): left out"),
    (0, ["--gpus", "3,4,5"], {}, (), "GPU 3, 4, 5 not found (0 present): computing on the CPU, which is slow"),
    (2, [], {"CUDA_VISIBLE_DEVICES": "1,7"}, (1,), "CUDA_VISIBLE_DEVICES names GPU 7, not found: left out"),
    (4, SCRIPT, {"CUDA_VISIBLE_DEVICES": ""}, (), "CUDA_VISIBLE_DEVICES is empty: computing on the CPU, which is slow"),
    (2, [], {"CUDA_VISIBLE_DEVICES": "-1"}, (), "no NVIDIA GPU found: computing on the CPU, which is slow"),
])  # fmt: skip
def test_gpus_that_are_not_there(present, flags, environ, gpus, message):
    found = plan(present, *flags, environ=environ)
    assert found.gpus == gpus and found.cpu == (not gpus)
    assert found.messages[-1] == message


def test_too_many_ranks():
    with pytest.raises(LaunchError, match=r"--taco-ranks 3 needs 3 GPUs but 2 can be used \(0, 1\); give at most 2"):
        plan(2, "--taco-ranks", "3")
    with pytest.raises(LaunchError, match=r"--taco-ranks 3 needs 3 GPUs but 1 can be used \(3\)"):
        plan(4, "--gpus", "3,4,5", "--taco-ranks", "3")
    with pytest.raises(LaunchError, match="this machine has GPUs 0 to 1"):
        plan(2, "--cuda-device", "2")
    assert plan(1, "--taco-ranks", "3", environ={"TACO_SHARE_GPU": "1"}).used.endswith("3 ranks")


@pytest.mark.parametrize("kinds, flags, gpus, words", [
    # of another kind and smaller
    ([RTX4090, RTX3060], SCRIPT, (0, 1), [
        "GPU 1 (12 GiB) has less memory than the others (24 GiB): every GPU holds the same share",
        "the GPUs are of 2 kinds and get equal shares of the work, so each step takes as long as the slowest one needs; "
        "--gpus 0 uses NVIDIA GeForce RTX 4090 only",
    ]),
    # too old for torch: left out where nobody named it, used where somebody did
    ([GTX1080, RTX4090, RTX4090], SCRIPT, (1, 2),
     ["GPU 0 (NVIDIA GeForce GTX 1080) is left out: its compute capability is 6.1, torch's packages need 7.5"]),
    ([GTX1080], ["--gpus", "0"], (0,), ["GPU 0 (NVIDIA GeForce GTX 1080) is older than torch's packages support",
                                        "GPU 0 (NVIDIA GeForce GTX 1080) has 8 GiB"]),
    ([GTX1080], SCRIPT, (), ["GPU 0 (NVIDIA GeForce GTX 1080) is left out", "no GPU that can be used: computing on the CPU"]),
    # no bf16: left out beside others that have it, used alone
    ([T4, RTX4090], SCRIPT, (1,), ["GPU 0 (Tesla T4) is left out: it has no bf16 (compute capability 7.5)"]),
    ([T4, T4], SCRIPT, (0, 1), ["GPU 0 (Tesla T4) has no bf16 (compute capability 7.5): models are computed in fp16",
                                "GPU 1 (Tesla T4) has no bf16"]),
    ([T4, RTX4090], ["--gpus", "0,1"], (0, 1), ["GPU 0 (Tesla T4) has no bf16", "GPU 0 (15 GiB) has less memory",
                                                "the GPUs are of 2 kinds", "GPU 0 has no bf16, and all ranks must compute in "
                                                "one dtype; add --force-fp16"]),
    # what the driver does not tell is no concern
    ([("NVIDIA GB10", 0, (12, 1))], SCRIPT, (0,), None),
])  # fmt: skip
def test_gpus_that_cost_something_are_named(kinds, flags, gpus, words):
    if words is None:
        present = (Gpu(0, "NVIDIA GB10", None, (12, 1)),)
        found = plan_launch(build_parser().parse_args(list(flags)), {}, present)
        assert found.used.endswith("GPU 0 (NVIDIA GB10); one rank") and not found.messages
        return
    found = plan(kinds, *flags)
    assert found.gpus == gpus
    assert [message.startswith(start) for message, start in zip(found.messages, words, strict=True)] == [True] * len(
        words
    )
    assert all("\n" not in message for message in found.messages)


def test_unlike_gpus_are_told_apart_in_the_line():
    assert plan([RTX4090, RTX3060]).used == (
        "using GPU 0 (NVIDIA GeForce RTX 4090, 24 GiB), 1 (NVIDIA GeForce RTX 3060, 12 GiB); 2 ranks"
    )


def test_gpus_are_listed_as_far_as_the_driver_tells(monkeypatch):
    class Memory:
        total = 24 * GIB

    def memory(handle):
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return Memory

    def lost(index):
        if index == 2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    for name, value in {
        "nvmlInit": lambda: None, "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lost, "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: [8, 9], "nvmlDeviceGetMemoryInfo": memory,
    }.items():  # fmt: skip
        monkeypatch.setattr(pynvml, name, value)
    assert list_gpus() == (Gpu(0, "card 0", 24 * GIB, (8, 9)), Gpu(1, "card 1", None, (8, 9)), Gpu(2))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: memory(1))
    assert list_gpus() == ()
