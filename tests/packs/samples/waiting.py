"""A V1 pack in one file: asynchronous nodes and checks."""

import asyncio


class SampleWait:
    CATEGORY = "samples"
    FUNCTION = "wait"
    RETURN_TYPES = ("FLOAT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {"default": 0.05, "min": 0, "max": 5})}}

    @classmethod
    async def VALIDATE_INPUTS(cls, seconds):
        await asyncio.sleep(0)
        return seconds <= 1 or "nobody waits that long"

    async def wait(self, seconds):
        await asyncio.gather(*(asyncio.sleep(seconds) for _ in range(3)))
        return (seconds,)


NODE_CLASS_MAPPINGS = {"SampleWait": SampleWait}
