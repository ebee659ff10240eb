"""Areas, masks, ranges, strengths and combinations of conditionings against the recorded runs (topic 10)."""

import pytest
import torch

import comfy.sample
import comfy.samplers
from tests.goldens import golden, models
from tests.goldens.standins import ClosedFormModel, text

TOPIC = "10 conditioning"
TOLERANCE = 5e-5
DATA = golden.load_json("10_conditioning/index.json")
RUNS = DATA.get("runs", {})


def _with(cond, **values):
    return [[tensor, {**fields, **values}] for tensor, fields in cond]


class Conds:
    """The conditionings of the recorded runs, as nodes would build them."""

    def __init__(self):
        self.tensors = golden.load_tensors("10_conditioning/tensors.safetensors")
        values = DATA["m_values"]
        self.a, self.b, self.c, self.n = ([[text(values[name]), {}]] for name in ("A", "B", "C", "negative"))

    def area(self, cond, strength=1.0, **changes):
        args = {**DATA["area_args"], **changes}
        cells = tuple(args[name] // 8 for name in ("height", "width", "y", "x"))
        return _with(cond, area=cells, strength=strength, set_area_to_bounds=False)

    def share(self, cond):
        args = DATA["area_percentage_args"]
        area = ("percentage", args["height"], args["width"], args["y"], args["x"])
        return _with(cond, area=area, strength=1.0, set_area_to_bounds=False)

    def mask(self, cond, name="mask_box", strength=1.0, bounds=False, mask=None):
        mask = self.tensors[name] if mask is None else mask
        return _with(cond, mask=mask, set_area_to_bounds=bounds, mask_strength=strength)

    def range(self, cond, start, end):
        return _with(cond, start_percent=start, end_percent=end)

    def two_rows(self):
        return [[torch.cat([self.a[0][0], self.b[0][0]]), {}]]

    def pair(self, name):
        """(positive, negative) of a run."""
        a, b, c, n, area, mask, span = self.a, self.b, self.c, self.n, self.area, self.mask, self.range
        soft = self.tensors["mask_soft"]
        longer = [[text(DATA["m_values"]["B"], tokens=6), {}]]
        return {
            "plain": (a, n),
            "combine": (a + b, n),
            "combine_three": (a + b + c, n),
            "combine_area_strength": (_with(a, strength=0.3) + b, n),
            "combine_diff_len": (a + longer, n),
            "area_over_background": (a + area(b), n),
            "area_strength0.4": (a + area(b, 0.4), n),
            "area_strength2.5": (a + area(b, 2.5), n),
            "area_touching_corner": (a + area(b, x=0, y=0), n),
            "area_past_edge": (a + area(b, width=512, height=512), n),
            "area_only": (area(b), n),
            "two_areas": (a + area(b, x=0, y=0) + area(c, 0.8), n),
            "area_percentage": (a + self.share(b), n),
            "negative_area": (a, n + area(c)),
            "mask_box": (a + mask(b), n),
            "mask_soft": (mask(a, mask=1 - soft) + mask(b, mask=soft), n),
            "mask_strength0.5": (a + mask(b, strength=0.5), n),
            "mask_bounds": (a + mask(b, bounds=True), n),
            "mask_bounds_small": (a + mask(b, "mask_small", bounds=True), n),
            "mask_alone": (mask(b), n),
            "mask_and_area": (a + mask(area(b)), n),
            "range_first_half": (span(a, 0.0, 0.5) + span(b, 0.5, 1.0), n),
            "range_gap": (span(a, 0.0, 0.3) + span(b, 0.7, 1.0), n),
            "range_overlap": (span(a, 0.0, 0.7) + span(b, 0.2, 1.0), n),
            "range_negative": (a, span(n, 0.0, 0.5)),
            "range_area": (a + span(area(b), 0.2, 0.6), n),
            "default_cond": (mask(b) + _with(a, default=True), n),
            "two_row_context": (self.two_rows(), n),
            "area_over_background_cfg1": (a + area(b), n),
        }[name]


def run_case(tag, model=None):
    """(final latent, model) of a recorded run."""
    kind, name = tag.split("/")
    positive, negative = Conds().pair(name)
    model = ClosedFormModel(kind) if model is None else model
    latent = torch.zeros(DATA["shape"])
    out = comfy.sample.sample(
        model.patcher(), comfy.sample.prepare_noise(latent, DATA["seed"]), DATA["steps"],
        1.0 if name.endswith("cfg1") else DATA["cfg"], DATA["sampler"], RUNS[tag]["scheduler"], positive, negative,
        latent, disable_pbar=True, seed=DATA["seed"],
    )  # fmt: skip
    return out, model


@pytest.mark.parametrize("tag", golden.cases(RUNS))
def test_conditioning(tag):
    """The final latent, and how many denoiser calls it took."""
    out, model = run_case(tag)
    want = golden.load_tensors("10_conditioning/tensors.safetensors")[tag]
    golden.check(TOPIC, tag, out, want, TOLERANCE)
    if "model_call_sigmas" in RUNS[tag]:
        assert model.calls == pytest.approx(RUNS[tag]["model_call_sigmas"], rel=TOLERANCE)


def test_order_within_a_call():
    """Custom nodes know positive and negative as rows [1, 0] of one call."""
    golden.require()
    _, model = run_case("flow/plain")
    assert set(map(tuple, model.batches)) == {(1, 0)}
    _, model = run_case("flow/combine_three")
    assert set(map(tuple, model.batches)) == {(1, 0, 0, 0)}


def test_little_memory_means_more_calls(monkeypatch):
    """A budget that only holds one conditioning splits the call, with the same result."""
    golden.require()
    whole, _ = run_case("flow/combine")
    asked = []
    model = ClosedFormModel("flow")
    monkeypatch.setattr(model, "memory_required", lambda shape, cond_shapes=None: shape[0])
    patcher_class = type(model.patcher())

    def budget(self, device):
        asked.append(device)
        return 2 * 1.5 + 0.1  # two samples of one conditioning

    monkeypatch.setattr(patcher_class, "denoiser_memory_budget", budget)
    out, _ = run_case("flow/combine", model)
    golden.check(TOPIC, "flow/combine split", out, whole, TOLERANCE)
    assert set(map(tuple, model.batches)) == {(0,), (1,)}
    assert len(asked) == DATA["steps"]


def _sd3_conditionings():
    """{run: positive conditioning} of the runs with SD3, and the negative one."""
    stored, facts = golden.load_tensors("10_conditioning/tensors.safetensors"), DATA["sd3"]

    def text_of(name, **fields):
        return [[stored[f"sd3/{name}_context"], {"pooled_output": stored[f"sd3/{name}_pooled"], **fields}]]

    width, height, x, y = (size // 8 for size in facts["area_args"])
    area = {"area": (height, width, y, x), "strength": 1.0, "set_area_to_bounds": False}
    split, strengths = facts["range_split"], facts["mask_strength"]

    def masked(bounds, strength):
        fields = {"mask": stored["sd3/mask_input"], "set_area_to_bounds": bounds, "mask_strength": strength}
        return text_of("B", **fields)

    a = text_of("A")
    runs = {
        "combine": a + text_of("B"),
        "area": a + text_of("B", **area),
        "area_only": text_of("B", **area),
        "mask": a + masked(False, strengths["mask"]),
        "mask_bounds": a + masked(True, strengths["mask_bounds"]),
        "ranges": text_of("A", start_percent=0.0, end_percent=split)
        + text_of("B", start_percent=split, end_percent=1.0),
    }
    return runs, text_of("N")


@pytest.mark.parametrize("name", ["combine", "area", "area_only", "mask", "mask_bounds", "ranges"])
@pytest.mark.skipif(not models.known("sd3_medium"), reason="recorded figures not found: set TACO_GOLDENS")
def test_conditioning_of_sd3(name):
    """The same with a network, its text and its pooled text."""
    from comfy.taco_dit import TACODiTModelPatcher

    runs, negative = _sd3_conditionings()
    patcher = TACODiTModelPatcher(models.model("sd3_medium"), torch.device("cpu"), torch.device("cpu"))
    latent = torch.zeros(DATA["sd3"]["shape"])
    with torch.inference_mode():
        out = comfy.sample.sample(
            patcher, comfy.sample.prepare_noise(latent, DATA["seed"]), DATA["steps"], DATA["cfg"], DATA["sampler"],
            DATA["sd3"]["scheduler"], runs[name], negative, latent, disable_pbar=True, seed=DATA["seed"],
        )  # fmt: skip
    want = golden.load_tensors("10_conditioning/tensors.safetensors")[f"sd3/{name}"]
    golden.check(TOPIC, f"sd3/{name}", out, want, TOLERANCE)
