"""A V1 pack in one file: lazy inputs, sub-graphs and lists."""

from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder


class SamplePick:
    CATEGORY = "samples"
    FUNCTION = "pick"
    RETURN_TYPES = ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        lazy = ("INT", {"lazy": True})
        return {"required": {"index": ("INT", {"min": 0, "max": 2})}, "optional": {f"value{i}": lazy for i in range(3)}}

    def check_lazy_status(self, index, **values):
        return [f"value{index}"] if values.get(f"value{index}") is None else []

    def pick(self, index, **values):
        return (values[f"value{index}"],)


class SampleRepeat:
    """Adds one `times` times, in a sub-graph that calls this node again."""

    CATEGORY = "samples"
    FUNCTION = "repeat"
    RETURN_TYPES = ("INT", "INT")
    OUTPUT_IS_LIST = (False, True)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {}), "times": ("INT", {"max": 50})}}

    def repeat(self, value, times):
        if times < 0:
            return (ExecutionBlocker("cannot repeat less than never"), [])
        if times == 0:
            return (value, [value])
        graph = GraphBuilder()
        rest = graph.node("SampleRepeat", value=value + 1, times=times - 1)
        return {"result": (rest.out(0), rest.out(1)), "expand": graph.finalize()}


NODE_CLASS_MAPPINGS = {"SamplePick": SamplePick, "SampleRepeat": SampleRepeat}
