"""Weights of loaded networks: where they are, with which patches, and how they get there.

`store.WeightStore` belongs to a network and is the only place that moves weights; `staging` copies host memory
to a GPU at the speed of the link; `streaming` brings what does not fit, layer by layer, while others compute; `loading`
decides which networks stay on a device. Nothing here depends on ranks.
"""
