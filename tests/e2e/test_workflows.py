"""What a workflow leaves behind and tells the page: embedded workflows, TACO-DiT's nodes, previews, LoRA on and off."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from tests.e2e.compare import furthest
from tests.e2e.workflows import changed, custom_sampling, flux, insert, node, picture_to_picture, with_lora


def test_the_workflow_is_in_the_picture(serve):
    prompt = flux(seed=301)
    workflow = {"nodes": [{"id": 1, "type": "KSampler"}], "version": 0.4, "extra": {"who": 'it\'s "me" ü'}}
    outcome = serve(3).run(prompt, extra_data={"extra_pnginfo": {"workflow": workflow}})
    (content,) = outcome.files()
    image = Image.open(io.BytesIO(content))
    assert json.loads(image.info["prompt"]) == prompt
    assert json.loads(image.info["workflow"]) == workflow
    assert image.size == (72, 104)


def test_the_same_workflow_read_back_gives_the_same_picture(serve):
    (content,) = serve(2).run(changed(custom_sampling(seed=302), "save", filename_prefix="first")).files()
    again = json.loads(Image.open(io.BytesIO(content)).info["prompt"])
    picture = serve(1).pictures(changed(again, "save", filename_prefix="second"))
    assert furthest(picture, serve(2).pictures(again)) <= 1


def test_denoise_keeps_the_picture_it_starts_from(serve):
    """Also proves that LoadImage and VAEEncode take part: a little denoising stays nearer to the start than much."""
    server = serve(3)
    start, little, much = (
        server.pictures(picture_to_picture("start.png", seed=303, denoise=denoise)) for denoise in (0.01, 0.3, 0.95)
    )
    assert abs(little - start).mean() < abs(much - start).mean()
    assert furthest(little, much) > 10


# --- TACO-DiT's own nodes ------------------------------------------------------------------------------------------


def taco_nodes(ranks, **settings):
    prompt = flux(seed=310, cfg=4.5)
    options = {"enable_taco_dit": True, "auto_detect": True, "sequence_parallel_degree": ranks, "cfg_parallel": True,
               "use_flash_attention": True, **settings}  # fmt: skip
    insert(prompt, "taco", "TACODiTModelLoader", **options)
    prompt["sample"]["class_type"] = "TACODiTKSampler"
    prompt["sample"]["inputs"]["enable_taco_dit"] = True
    prompt["info"] = node("TACODiTInfoDisplay", taco_dit_info=["taco", 1])
    prompt["stats"] = node("TACODiTStatsDisplay", taco_dit_stats=["sample", 1])
    return prompt


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_four_nodes(serve, ranks):
    server = serve(ranks)
    outcome = server.run(taco_nodes(ranks))
    (info,) = outcome.outputs["info"]["text"]
    (stats,) = outcome.outputs["stats"]["text"]
    assert f"ranks: {ranks}" in info and "model type: Flux" in info and "plan at cfg above 1: " in info
    assert f"parallel enabled: {'yes' if ranks > 1 else 'no'}" in info
    assert "rank 0" in stats
    assert all(f"rank {rank}" in stats for rank in range(ranks)), stats
    assert [m["output"]["text"] for m in outcome.of("executed") if m["node"] == "info"] == [[info]]
    assert furthest(outcome.pictures(), serve(1).pictures(flux(seed=310, cfg=4.5))) <= 1


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        ({"auto_detect": False, "sequence_parallel_degree": 2}, "ulysses 2"),
        ({"auto_detect": False, "sequence_parallel_degree": 1}, "cfg 2"),
        ({"cfg_parallel": False}, "ulysses 2"),
        ({"enable_taco_dit": False}, "replicas 2"),
        ({"use_flash_attention": False}, "cfg 2"),
    ],
)
def test_settings_of_a_model_change_the_plan_not_the_picture(serve, settings, plan):
    server = serve(2)
    picture = server.pictures(taco_nodes(2, **settings))
    assert plan in server.json("/taco_dit/status")["last_run"]["plan"]
    assert furthest(picture, serve(1).pictures(flux(seed=310, cfg=4.5))) <= 1


def test_an_impossible_degree_is_said(serve):
    outcome = serve(3).run(taco_nodes(3, auto_detect=False, sequence_parallel_degree=2))
    assert "does not divide the 3 ranks; use 1, 3" in outcome.error["exception_message"]
    assert outcome.error["node_id"] == "taco"
    assert furthest(serve(3).pictures(flux(seed=310, cfg=4.5)), serve(1).pictures(flux(seed=310, cfg=4.5))) <= 1


# --- messages ------------------------------------------------------------------------------------------------------


def test_order_of_messages(serve):
    """As reference.md section 1 has it, with three ranks; previews without metadata come after their progress."""
    steps = 4
    outcome = serve(3).run(flux(seed=320, steps=steps))
    kinds = [m["type"] for m in outcome.messages if m["type"] not in ("progress_state", "status")]
    assert kinds[:2] == ["execution_start", "execution_cached"]
    assert kinds[-2:] == ["execution_success", "executing"]
    assert kinds.count("executed") == 1
    started = [m["node"] for m in outcome.of("executing")]
    assert started[-1] is None and len(started) == len(set(started))
    assert set(started[:-1]) | set(outcome.of("execution_cached")[0]["nodes"]) == set(flux())
    assert [m["value"] for m in outcome.of("progress") if m["node"] == "sample"] == list(range(1, steps + 1))
    during = [k for k in kinds if k in ("progress", "binary")]
    assert during == ["progress", "binary"] * steps
    states = outcome.of("progress_state")[-1]["nodes"]
    assert all(state["state"] == "finished" for state in states.values())


def test_previews_with_metadata(serve):
    steps = 3
    with serve(3).page({"supports_preview_metadata": True}) as page:
        page.post(flux(seed=321, steps=steps))
        outcome = page.finish()
    frames = [m for m in outcome.messages if m["type"] == "binary"]
    assert [m["event"] for m in frames] == [4] * steps
    for frame in frames:
        size = int.from_bytes(frame["data"][:4], "big")
        told = json.loads(frame["data"][4 : 4 + size])
        assert (told["node_id"], told["prompt_id"]) == ("sample", outcome.prompt_id)
        image = Image.open(io.BytesIO(frame["data"][4 + size :]))
        assert image.width > 0 and image.format == told["image_type"].removeprefix("image/").upper()
    kinds = [m["type"] for m in outcome.messages if m["type"] in ("progress", "binary")]
    assert kinds == ["binary", "progress"] * steps


def test_a_prompt_chooses_its_previews(serve):
    """Without naming a method it gets the server's, which is latent2rgb here."""
    for method, frames in (("none", 0), ("default", 2), ("latent2rgb", 2), ("best", 2), (None, 2)):
        outcome = serve(3).run(flux(seed=320, steps=2, text=f"{method}"), extra_data={"preview_method": method})
        assert sum(m["type"] == "binary" for m in outcome.messages) == frames, method
    assert any("preview_method 'best' is not one of default, none, auto" in line for line in serve(3).log)


def test_what_did_not_change_is_not_computed_again(serve):
    server = serve(3)
    first = server.run(flux(seed=322))
    second = server.run(flux(seed=323))
    assert set(second.of("execution_cached")[0]["nodes"]) == {"load", "positive", "negative", "latent"}
    again = server.run(flux(seed=323))
    assert set(again.of("execution_cached")[0]["nodes"]) == set(flux())
    assert again.files() == second.files() != first.files()


# --- LoRA ----------------------------------------------------------------------------------------------------------


def test_lora_on_off_and_changed(serve):
    """Between prompts the adapter comes, changes its strength and goes; each time all ranks must follow."""
    strengths = [None, 1.0, 0.35, None, -0.5, 1.0, 0.0]
    prompts = [with_lora(strength, seed=330) for strength in strengths]
    expected = [serve(1).pictures(changed(p, "save", filename_prefix="lora")) for p in prompts]
    for ranks in (2, 3):
        found = [serve(ranks).pictures(prompt) for prompt in prompts]
        assert [furthest(a, b) <= 1 for a, b in zip(found, expected)] == [True] * len(strengths)
    assert furthest(expected[0], expected[1]) > 10 and furthest(expected[1], expected[2]) > 5
    assert furthest(expected[0], expected[3]) == 0 and furthest(expected[0], expected[6]) == 0
