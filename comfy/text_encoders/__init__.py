"""Text encoders: one file per family, on the networks of `comfy.clip_model`, `t5` and `bert`."""
