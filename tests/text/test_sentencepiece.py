"""Sentence-piece models from bytes: a small one written here, and encoders that carry theirs with the weights."""

import pytest
import torch

from comfy.text_encoders.loader import CLIPType, load_text_encoder_state_dicts
from comfy.text_encoders.sentencepiece import BPE, UNIGRAM, SentencePieceModel, SentencePieceTokenizer
from tests.text import tiny
from tests.tiny_parts import sentence_pieces

PIECES = [("\u2581", -2.0), ("\u2581fox", -3.0), ("a", -4.0), ("b", -4.5), ("ab", -3.5), ("\u2581ab", -3.2)]


def test_reading():
    """All that matters is read."""
    model = SentencePieceModel(sentence_pieces(BPE, PIECES))
    assert model.kind == BPE and model.unknown == 2 and len(model.pieces) == 9
    assert model.pieces[4] == ("\u2581fox", -3.0, 1) and model.prefix_space and model.remove_extra_spaces


@pytest.mark.parametrize("kind", [UNIGRAM, BPE])
def test_ids(kind):
    """The best pieces; one space in front, extra spaces removed; unknown letters."""
    pieces = (
        PIECES if kind == UNIGRAM else [*PIECES, ("\u2581f", -9.0), ("\u2581fo", -8.0), ("f", -9), ("o", -9), ("x", -9)]
    )
    tokenizer = SentencePieceTokenizer(sentence_pieces(kind, [(t, float(s)) for t, s in pieces]), end=1)
    assert tokenizer("  fox   ab ")["input_ids"] == [4, 8, 1]
    assert tokenizer("")["input_ids"] == [1]
    assert 2 in tokenizer("z")["input_ids"]


def test_wan_encoder_carries_its_tokenizer():
    """umT5 files have the model as a tensor of bytes; it survives saving."""
    weights = tiny.t5(dtype=torch.float16, vocabulary=200001)
    data = torch.frombuffer(bytearray(sentence_pieces(UNIGRAM, PIECES)), dtype=torch.uint8)
    clip = load_text_encoder_state_dicts([{**weights, "spiece_model": data}], clip_type=CLIPType.WAN)
    tokens = clip.tokenize("fox ab")
    assert [pair[0] for pair in tokens["umt5xxl"][0][:4]] == [4, 8, 1, 0] and len(tokens["umt5xxl"][0]) == 512
    assert torch.equal(clip.get_sd()["spiece_model"], data)


def test_a_missing_model_is_said():
    """Naming the file to use."""
    with pytest.raises(ValueError, match="umt5_xxl file made for ComfyUI"):
        load_text_encoder_state_dicts([tiny.t5(dtype=torch.float16, vocabulary=200001)], clip_type=CLIPType.WAN)


def test_auraflows_vocabulary_is_asked_for_when_a_prompt_comes(monkeypatch, tmp_path):
    """Its files have none: they load, a prompt says what to do, and the file is found then."""
    import folder_paths
    from comfy.text_encoders.aura_t5 import VOCABULARY, AuraT5Tokenizer

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"}))
    without = AuraT5Tokenizer()
    assert without.state_dict() == {} and without.tokenize_with_weights("")["pile_t5xl"][0][0][0] == 2
    with pytest.raises(ValueError, match=f"put it into models/text_encoders as {VOCABULARY}"):
        without.tokenize_with_weights("a fox")
    (tmp_path / VOCABULARY).write_bytes(sentence_pieces(UNIGRAM, PIECES))
    rows = AuraT5Tokenizer().tokenize_with_weights("fox ab")["pile_t5xl"]
    assert [pair[0] for pair in rows[0][:4]] == [4, 8, 2, 1] and len(rows[0]) == 256


def test_damaged_bytes():
    """Not a protobuf message."""
    with pytest.raises(ValueError, match="damaged"):
        SentencePieceModel(b"\x0f\x0f\x0f")
