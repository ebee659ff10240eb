"""Qwen2.5-VL: what its vision tower sees, where its tokens are, and the prompts of Qwen-Image-Edit."""

import math

import pytest
import torch
import torch.nn.functional as F

import comfy.ops
from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts
from comfy.text_encoders.qwen_image import EDIT_TEMPLATE
from comfy.text_encoders.qwen_vl import VisionTower, picture_patches, seen_size, token_places, vision_config, windows
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit, TextEncodeQwenImageEditPlus
from tests.text import tiny


def picture(height, width, seed=5):
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


def clip_of(**changes):
    clip = load_text_encoder_state_dicts([tiny.qwen_vl(**changes)], clip_type=CLIPType.QWEN_IMAGE)
    clip.tokenizer.qwen25_7b.tokenizer = tiny.Words()
    return clip


@pytest.fixture(scope="module")
def clip():
    return clip_of()


@pytest.mark.parametrize(
    "given, seen",
    [((100, 200), (112, 196)), ((20, 20), (56, 56)), ((8000, 4000), (5068, 2520)), ((10, 1000), (28, 560))],
)
def test_sizes_that_are_seen(given, seen):
    """Whole tokens of 28 pixels, between 56 x 56 and 12845056 pixels."""
    assert seen_size(*given, 14) == seen


def tower_by_masks(sd, image):
    """The tower written down once more: patches row by row, every layer attends to all of them through a mask."""
    sd = {key.removeprefix("visual."): value for key, value in sd.items() if key.startswith("visual.")}
    heads, width = 2, 160
    rows, columns = image.shape[1] // 14, image.shape[2] // 14
    middle = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    spread = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((image[0] - middle) / spread).movedim(-1, 0)
    kernel = sd["patch_embed.proj.weight"].sum(2)  # both frames are the same
    x = F.conv2d(pixels[None], kernel, stride=14)[0].flatten(1).T
    y_of, x_of = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    frequencies = torch.tensor([10000 ** (-2 * j / 40) for j in range(20)])
    angles = torch.cat([y_of[:, None] * frequencies, x_of[:, None] * frequencies], dim=1)
    turn = torch.polar(torch.ones_like(angles), angles)  # [n, 40] complex: component j goes with component j + 40
    window = (y_of // 8) * 1000 + x_of // 8
    same = window[:, None] == window[None, :]

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * sd[f"{name}.weight"]

    def linear(x, name):
        return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]

    def turned(t):
        z = torch.complex(t[..., :40], t[..., 40:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    for i in range(8):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(-1, 3, heads, 80).permute(1, 2, 0, 3)
        scores = turned(q) @ turned(k).transpose(1, 2) / math.sqrt(80)
        if i != 7:
            scores = scores.masked_fill(~same, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(-1, width)
        x = x + linear(attended, f"{block}.attn.proj")
        y = norm(x, f"{block}.norm2")
        y = F.silu(linear(y, f"{block}.mlp.gate_proj")) * linear(y, f"{block}.mlp.up_proj")
        x = x + linear(y, f"{block}.mlp.down_proj")
    x = norm(x, "merger.ln_q").view(rows // 2, 2, columns // 2, 2, width).transpose(1, 2).reshape(-1, 4 * width)
    return linear(F.gelu(linear(x, "merger.mlp.0")), "merger.mlp.2")


@pytest.mark.parametrize("size", [(140, 196), (112, 112), (56, 280)])  # 5 x 7 tokens: windows at both edges
def test_the_tower(size):
    sd = tiny.qwen_vl()
    config = vision_config(sd)
    assert config == {"width": 160, "layers": 8, "heads": 2, "inner": 40, "patch": 14}
    tower = VisionTower(config, 64, torch.float32, "meta", comfy.ops.manual_cast)
    weights = {key.removeprefix("visual."): value for key, value in sd.items() if key.startswith("visual.")}
    tower.load_state_dict(weights, assign=True)
    image = picture(*size)
    patches, grid = picture_patches(image[0], 14)
    assert grid == (size[0] // 14, size[1] // 14)
    with torch.no_grad():
        torch.testing.assert_close(tower(patches, *grid), tower_by_masks(sd, image), rtol=1e-4, atol=1e-4)


def test_windows_hold_every_token_once():
    for rows, columns in ((5, 7), (4, 4), (1, 9), (8, 3)):
        order, shapes = windows(rows, columns)
        assert sorted(order.tolist()) == list(range(rows * columns))
        start = 0
        for count, size in shapes:
            for part in order[start : start + count * size].view(count, size):
                assert len({(int(t) // columns // 4, int(t) % columns // 4) for t in part}) == 1
            start += count * size


def test_places_of_tokens():
    """Two pictures of 2 x 3 and 2 x 1 tokens among words."""
    first = {"type": "image", "index": 2, "size": 6, "extra": torch.tensor([[1, 4, 6]])}
    second = {"type": "image", "index": 9, "size": 2, "extra": torch.tensor([[1, 4, 2]])}
    time, row, column = token_places(13, [first, second]).tolist()
    #               words | the first picture | word | second | words
    assert time == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 6, 8, 9]
    assert row == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8, 9]
    assert column == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 8, 9]


def test_each_axis_has_its_frequencies(clip):
    network = clip.cond_stage_model.qwen25_7b.transformer
    places = torch.tensor([[3, 4], [5, 6], [7, 8]])
    angles = network.angles(places)
    axis = [0] * 16 + [1] * 24 + [2] * 24
    want = [[int(places[axis[j], t]) * 1e6 ** (-j / 64) for j in range(64)] for t in range(2)]
    torch.testing.assert_close(angles, torch.tensor(want), rtol=1e-5, atol=1e-6)
    same = network.angles(torch.tensor([[3, 4]] * 3))
    torch.testing.assert_close(same, network.angles(torch.tensor([3, 4])))


def test_pictures_stand_among_the_words(clip):
    """Their tokens take the place of <|image_pad|>, in order, and what comes before them is as without."""
    one, other = picture(56, 84), picture(84, 56, 6)
    row = clip.tokenize("ab", images=[one])["qwen25_7b"][0]
    at = [i for i, (token, _) in enumerate(row) if isinstance(token, dict)]
    assert len(at) == 1 and row[at[0] - 1][0] == 151652 and row[at[0] + 1][0] == 151653
    encoded = clip.encode_from_tokens(clip.tokenize("ab", images=[one]), return_dict=True)
    # the turn opens with <|vision_start|>, six tokens, <|vision_end|>, "ab", <|im_end|>, a line, and the answer's turn
    words = len(tiny.Words()("<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    assert encoded["cond"].shape == (1, 1 + 6 + 1 + 2 + words, 64) and "attention_mask" not in encoded
    changed = clip.encode_from_tokens(clip.tokenize("ab", images=[other]))
    torch.testing.assert_close(changed[:, 0], encoded["cond"][:, 0])
    assert not torch.allclose(changed[:, -1], encoded["cond"][:, -1], atol=1e-3)
    network = clip.cond_stage_model.qwen25_7b.transformer
    vectors, grid = network.preprocess_embed({"type": "image", "data": one}, torch.device("cpu"))
    assert vectors.shape == (6, 64) and grid.tolist() == [[1, 4, 6]]
    own = "<|im_start|>user\nab"
    assert [token for token, _ in clip.tokenize(own)["qwen25_7b"][0]] == tiny.Words()(own)["input_ids"]
    two = clip.tokenize("<|image_pad|><|image_pad|><|image_pad|>", images=[one, other], llama_template=EDIT_TEMPLATE)
    kinds = [token if isinstance(token, int) else token["data"].shape[1] for token, _ in two["qwen25_7b"][0]]
    assert kinds[kinds.index(56) : kinds.index(56) + 3] == [56, 84, 151655]


class Encoded:
    """A VAE that says what it was given."""

    def encode(self, pixels):
        return torch.full((1, 16, 1, 2, 2), float(pixels.shape[1] * 10000 + pixels.shape[2]))


def test_the_nodes(clip, monkeypatch):
    """The picture at one megapixel for both; in Plus smaller for the encoder, in multiples of eight for the VAE."""
    seen = []
    tokenize = type(clip).tokenize
    monkeypatch.setattr("comfy_extras.nodes_qwen.MEGAPIXEL", 100 * 100)  # as quick as with the real size
    monkeypatch.setattr("comfy_extras.nodes_qwen.SEEN_PIXELS", 60 * 60)

    def watched(self, text, **kwargs):
        seen.append((text, [tuple(image.shape) for image in kwargs["images"]]))
        return tokenize(self, text, **kwargs)

    monkeypatch.setattr(type(clip), "tokenize", watched)
    alpha = torch.cat([picture(50, 80), torch.ones(1, 50, 80, 1)], dim=-1)
    out = TextEncodeQwenImageEdit.execute(clip, "make it red", Encoded(), alpha).args[0]
    assert seen.pop() == ("make it red", [(1, 79, 126, 3)])
    assert [float(latent.max()) for latent in out[0][1]["reference_latents"]] == [790126]
    out = TextEncodeQwenImageEditPlus.execute(clip, "join", Encoded(), None, picture(50, 80), picture(30, 30)).args[0]
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    assert seen.pop() == (f"Picture 2: {marks}Picture 3: {marks}join", [(1, 47, 76, 3), (1, 60, 60, 3)])
    assert [float(latent.max()) for latent in out[0][1]["reference_latents"]] == [800128, 960096]
    plain = TextEncodeQwenImageEdit.execute(clip, "make it red").args[0]
    assert "reference_latents" not in plain[0][1] and seen == [("make it red", [])]


def test_a_file_without_the_tower():
    clip = clip_of(vision=False)
    assert clip.encode_from_tokens(clip.tokenize("ab")).shape[2] == 64
    with pytest.raises(ValueError, match="no vision tower .* load the whole Qwen2.5-VL file"):
        clip.encode_from_tokens(clip.tokenize("ab", images=[picture(56, 56)]))


def test_half_precision_and_scaled_files(clip):
    """bf16 is what is stored; of scaled fp8 the tower's linears too."""
    image = picture(56, 84)
    want = clip.encode_from_tokens(clip.tokenize("ab", images=[image]))
    scaled = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for key, value in tiny.qwen_vl().items():
        scaled[key] = value.to(torch.bfloat16)
        if value.ndim == 2 and "embed_tokens" not in key:
            scale = value.abs().max() / 448
            scaled[key] = (value / scale).to(torch.float8_e4m3fn)
            scaled[key.replace(".weight", ".scale_weight")] = scale.float()
    eight = load_text_encoder_state_dicts([scaled], clip_type=CLIPType.QWEN_IMAGE)
    eight.tokenizer.qwen25_7b.tokenizer = tiny.Words()
    assert eight.cond_stage_model.qwen25_7b.transformer.visual.blocks[0].attn.qkv.weight.dtype == torch.float8_e4m3fn
    for other, limit in ((clip_of(dtype=torch.bfloat16), 0.02), (eight, 0.15)):
        got = other.encode_from_tokens(other.tokenize("ab", images=[image]))
        assert (got - want).abs().mean() / want.abs().mean() < limit
