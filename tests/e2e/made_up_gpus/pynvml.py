"""A stand-in for NVIDIA's management library: as many equal GPUs as TACO_TEST_GPUS says. Put its folder on PYTHONPATH."""

import os

NVML_TEMPERATURE_GPU = 0


class NVMLError(Exception):
    pass


class _Memory:
    total = 80 * 2**30


def nvmlInit():
    if nvmlDeviceGetCount() == 0:
        raise NVMLError("no driver")


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return int(os.environ["TACO_TEST_GPUS"])


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetName(handle):
    return "Made-up GPU"


def nvmlDeviceGetCudaComputeCapability(handle):
    return 9, 0


def nvmlDeviceGetMemoryInfo(handle):
    return _Memory
