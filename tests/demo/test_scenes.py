"""Scenes are what their captions say, training never sees what evaluation asks, and ids are the tokenizers' own."""

import random

import numpy as np
import pytest
import torch

from demo.data import CHOICES, TEXT_LENGTH, make_pool, meaning, pad_ids, token_ids
from demo.judge import find, judge
from demo.render import render, to_arrays
from demo.scenes import (
    KINDS,
    ROWS,
    SHAPES,
    Placed,
    Scene,
    Spec,
    Thing,
    caption,
    held_out_specs,
    place,
    random_spec,
    training_scene,
)

SIZES = ((128, 128), (160, 112), (112, 160), (200, 136))


def picture(scene: Scene) -> np.ndarray:
    return render(to_arrays([scene]), scene.width, scene.height)[0].permute(1, 2, 0).numpy()


def scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [place(random_spec(rng), rng, *SIZES[i % len(SIZES)]) for i in range(number)]


def test_the_judge_finds_every_rendered_scene_right():
    for scene in scenes(160):
        verdict = judge(picture(scene), scene.spec)
        assert verdict.right and verdict.position and verdict.size and verdict.background, (scene, verdict.wrong)


@pytest.mark.parametrize("blur", [0.6, 1.0])
def test_the_judge_bears_what_a_vae_does_to_pictures(blur):
    from scipy import ndimage

    rng = np.random.default_rng(0)
    right = 0
    for scene in scenes(60, seed=4):
        soft = ndimage.gaussian_filter(picture(scene), (blur, blur, 0)) + rng.normal(0, 0.02, (1, 1, 3))
        right += judge(soft, scene.spec).right
    assert right >= 58


def changed(spec: Spec, rng: random.Random) -> list[Spec]:
    """Specs a picture of `spec` does not fulfil: another shape, another colour, one more, one less, turned round."""
    first = spec.things[0]
    others = [s for s in SHAPES if s != first.shape]
    out = [
        Spec(spec.kind, (Thing(rng.choice(others), first.color), *spec.things[1:]), spec.relation, count=spec.count),
        Spec(spec.kind, (Thing(first.shape, "red" if first.color != "red" else "blue"), *spec.things[1:]),
             spec.relation, count=spec.count),
    ]  # fmt: skip
    if spec.kind == "count":
        out.append(Spec("count", spec.things, count=spec.count + 1))
        out.append(Spec("count", spec.things, count=spec.count - 1))
    turned = {"above": "below", "below": "above", "left": "right", "right": "left", "row": "column", "column": "row"}
    if spec.relation in turned and len({(t.shape, t.color) for t in spec.things}) > 1:
        out.append(Spec(spec.kind, spec.things, turned[spec.relation]))
    return out


def test_the_judge_sees_what_is_wrong():
    rng = random.Random(5)
    checked = 0
    for scene in scenes(80, seed=5):
        shown = picture(scene)
        for wrong in changed(scene.spec, rng):
            assert not judge(shown, wrong).right, (scene.caption, wrong)
            checked += 1
    assert checked > 160
    assert not judge(np.full((128, 128, 3), 0.9), scenes(1)[0].spec).right
    noise = np.random.default_rng(0).random((128, 128, 3))
    assert not any(judge(noise, scene.spec).right for scene in scenes(20))


def test_found_objects_are_where_they_were_drawn():
    things = (
        Placed("star", (0.86, 0.12, 0.14), 30.5, 40.0, 18.0),
        Placed("ring", (0.13, 0.33, 0.86), 90.0, 80.5, 20.0),
    )
    scene = Scene(random_spec(random.Random(0)), "", 128, 128, (0.95, 0.95, 0.95), things)
    found = find(picture(scene))
    assert [(f.shape, f.color) for f in found] == [("star", "red"), ("ring", "blue")]
    for seen, drawn in zip(found, things):
        assert abs(seen.x - drawn.x) < 2 and abs(seen.y - drawn.y) < 2.5 and abs(seen.radius - drawn.radius) < 1.5


def test_training_never_sees_a_held_out_scene():
    rng = random.Random(1)
    trained = {training_scene(rng).spec.key() for _ in range(3000)}
    asked = {spec.key() for kind in KINDS for spec in held_out_specs(kind, 60)}
    assert len(asked) == 240
    assert not trained & asked
    assert sum(random_spec(rng).held_out for _ in range(3000)) == pytest.approx(300, abs=60)


def test_a_relation_said_the_other_way_round_is_the_same_scene():
    a, b = Thing("circle", "red"), Thing("square", "green", "large")
    assert Spec("pair", (a, b), "above").key() == Spec("pair", (b, a), "below").key()
    assert Spec("pair", (a, b), "left").key() == Spec("pair", (b, a), "right").key()
    assert Spec("pair", (a, b), "and").key() == Spec("pair", (b, a), "and").key()
    assert Spec("pair", (a, b), "above").key() != Spec("pair", (b, a), "above").key()
    assert meaning(Spec("pair", (a, b), "above")) == meaning(Spec("pair", (b, a), "below"))


def test_captions():
    a, b, c = Thing("circle", "orange"), Thing("square", "green", "small"), Thing("cross", "red")
    assert caption(Spec("pair", (a, b), "above")) == "an orange circle above a small green square"
    assert caption(Spec("count", (c,), count=3, background="blue")) == "three red crosses on a blue background"
    assert caption(Spec("triple", (a, b, c), "row")).endswith("and a red cross " + ROWS["row"][0])
    assert caption(Spec("single", (b,), position="at the top")) == "a small green square at the top"


def test_cached_ids_are_the_tokenizers():
    from comfy.text_encoders.flux import FluxTokenizer

    both = FluxTokenizer()
    for scene in scenes(150, seed=7):
        wanted = both.tokenize_with_weights(scene.caption)
        t5, clip = pad_ids(*token_ids(scene.caption))
        assert t5 == [pair[0] for pair in wanted["t5xxl"][0]]
        assert clip == [pair[0] for pair in wanted["l"][0]]
        assert sum(1 for i in t5 if i) <= TEXT_LENGTH and clip.index(49407) < TEXT_LENGTH - 3


def test_pools_do_not_depend_on_the_number_of_workers():
    one, three = (make_pool(1500, (160, 112), 3, workers) for workers in (1, 3))
    assert one.keys() == three.keys()
    assert all(torch.equal(one[key], three[key]) for key in one)
    assert one["meaning"].shape == (1500, len(CHOICES))
    assert 0.05 < (one["meaning"][:, 0] < 0).float().mean() < 0.12
    other = make_pool(1500, (160, 112), 4, 1)
    assert not torch.equal(one["place"], other["place"])


def test_rendering_another_style_is_refused():
    with pytest.raises(ValueError, match="known are plain and night"):
        render(to_arrays(scenes(1)), 128, 128, "oil")
