"""A V1 pack that needs its prestartup script to have run, once."""

import os

assert os.environ["SAMPLE_PRESTARTUP"] == "ran ", "the prestartup script must run once, before packs are imported"


class SampleStarted:
    CATEGORY = "samples"
    FUNCTION = "tell"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def tell(self):
        return (os.environ["SAMPLE_PRESTARTUP"].strip(),)


NODE_CLASS_MAPPINGS = {"SampleStarted": SampleStarted}
