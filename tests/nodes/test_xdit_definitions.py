"""The xDiT nodes have the names, inputs and defaults that users were promised."""

from __future__ import annotations

LOADERS = ("XDiTCheckpointLoader", "XDiTUNetLoader", "XDiTVAELoader", "XDiTCLIPLoader", "XDiTDualCLIPLoader",
           "MultiGPUModelLoader")  # fmt: skip
SAMPLERS = ("XDiTKSampler", "XDiTSamplerAdvanced", "MultiGPUSampler")


def test_loaders_take_the_settings_and_give_a_dispatcher(all_nodes):
    for name in LOADERS:
        required = all_nodes[name].INPUT_TYPES()["required"]
        assert required["enable_multi_gpu"][1]["default"] is True
        assert required["gpu_devices"][1]["default"] == "0,1,2,3"
        assert required["parallel_strategy"][0] == ["PipeFusion", "USP", "Hybrid", "Tensor", "CFG"]
        assert required["scheduling_strategy"][0] == ["round_robin", "least_loaded", "weighted_round_robin", "adaptive"]
        assert all_nodes[name].RETURN_TYPES[-1] == "XDIT_DISPATCHER"


def test_samplers_take_a_dispatcher_optionally(all_nodes):
    for name in SAMPLERS:
        assert all_nodes[name].INPUT_TYPES()["optional"]["dispatcher"][0] == "XDIT_DISPATCHER"
