"""A pack without nodes: translations, an example workflow and a sub-graph."""

NODE_CLASS_MAPPINGS = {}
