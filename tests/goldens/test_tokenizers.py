"""Prompt tokenizers against the recorded rows (topic 04)."""

import pytest

from comfy import sd1_clip, sdxl_clip
from comfy.text_encoders import flux, hydit, sd2_clip, sd3_clip, t5_family
from tests.goldens import golden

DATA = golden.load_json("04_tokenizers/tokens.json")
FAMILIES = {
    "sd1": sd1_clip.SD1Tokenizer,
    "sd2": sd2_clip.SD2Tokenizer,
    "sdxl": sdxl_clip.SDXLTokenizer,
    "cascade": sdxl_clip.StableCascadeTokenizer,
    "sd3": sd3_clip.SD3Tokenizer,
    "flux": flux.FluxTokenizer,
    "pixart_chroma": t5_family.PixArtTokenizer,
    "hydit_bert_part": hydit.HyditBertTokenizer,
    "ltxv": t5_family.LTXVT5Tokenizer,
    "mochi": t5_family.MochiT5Tokenizer,
    "stable_audio": t5_family.SAT5Tokenizer,
    "cosmos": t5_family.CosmosT5Tokenizer,
    "sdxl_with_embedding_dir": sdxl_clip.SDXLTokenizer,
    "flux_with_embedding_dir": flux.FluxTokenizer,
}


def _cases():
    return {f"{family}/{prompt}": None for family, prompts in DATA.get("tokenizers", {}).items() for prompt in prompts}


@pytest.mark.parametrize("case", golden.cases(_cases()))
def test_tokens(case, tmp_path):
    """Ids exactly, weights to 1e-6."""
    family, prompt = case.split("/")
    if family not in FAMILIES:
        pytest.skip(f"no tokenizer for {family} yet: its vocabulary does not ship with the program")
    directory = str(tmp_path) if family.endswith("_with_embedding_dir") else None
    rows = FAMILIES[family](embedding_directory=directory).tokenize_with_weights(DATA["prompts"][prompt])
    rows = rows if isinstance(rows, dict) else {"tokens": rows}
    want = DATA["tokenizers"][family][prompt]
    assert set(rows) == set(want)
    for encoder, recorded in want.items():
        assert [len(row) for row in rows[encoder]] == [row["len"] for row in recorded]
        for row, spec in zip(rows[encoder], recorded):
            expanded = [(token, weight) for token, weight, count in spec["rle"] for _ in range(count)]
            assert [pair[0] for pair in row] == [pair[0] for pair in expanded]
            assert [pair[1] for pair in row] == pytest.approx([pair[1] for pair in expanded], abs=1e-6)
    golden.WORST[("04 tokenizers", case)] = 0.0
