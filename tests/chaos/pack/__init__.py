"""A node that changes no value but what is kept of nodes after it: with a new label they run again."""


class ChaosPass:
    """Passes a latent on. A label that was not used before makes the sampler after it run again."""

    CATEGORY = "test"
    FUNCTION = "run"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"latent_image": ("LATENT",), "label": ("STRING",)}}

    def run(self, latent_image, label):
        return (latent_image,)


NODE_CLASS_MAPPINGS = {"ChaosPass": ChaosPass}
