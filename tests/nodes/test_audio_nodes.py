"""Audio nodes: sounds in memory, in files, and as latents."""

from __future__ import annotations

import json

import av
import pytest
import torch

import folder_paths
from comfy_api.latest._audio import read_audio, resample, write_audio
from tests.nodes.helpers import run

RATE = 44100


@pytest.fixture
def folders(tmp_path):
    folder_paths.set_base_directory(str(tmp_path))
    for name in ("input", "output", "temp"):
        (tmp_path / name).mkdir()
    yield tmp_path
    folder_paths.set_base_directory(None)


def tone(seconds=0.5, rate=RATE, channels=2, hertz=440.0, batch=1):
    wave = 0.5 * torch.sin(torch.arange(int(seconds * rate)) * hertz * 2 * torch.pi / rate)
    return {"waveform": wave.expand(batch, channels, -1).contiguous(), "sample_rate": rate}


def loudest_hertz(waveform, rate):
    spectrum = torch.fft.rfft(waveform[0]).abs()
    return float(spectrum.argmax()) * rate / waveform.shape[-1]


@pytest.mark.parametrize(
    ("node", "settings", "tolerance"),
    [
        ("SaveAudio", {}, 2e-4),
        ("SaveAudioMP3", {"quality": "V0"}, 0.05),
        ("SaveAudioMP3", {"quality": "320k"}, 0.05),
        ("SaveAudioOpus", {"quality": "128k"}, None),
    ],
)
def test_sounds_are_saved_and_loaded(all_nodes, folders, node, settings, tolerance):
    sound = tone(batch=2)
    shown = run(all_nodes, node, audio=sound, filename_prefix="audio/x", prompt={"1": {}}, **settings)["ui"]["audio"]
    assert [entry["type"] for entry in shown] == ["output", "output"] and shown[1]["filename"].startswith("x_00002_")
    path = folders / "output/audio" / shown[1]["filename"]
    with av.open(str(path)) as file:
        texts = {key.lower(): value for key, value in {**file.metadata, **file.streams.audio[0].metadata}.items()}
    assert json.loads(texts["prompt"]) == {"1": {}}
    loaded = run(all_nodes, "LoadAudio", audio=f"audio/{shown[1]['filename']} [output]")[0]
    waveform, rate = loaded["waveform"], loaded["sample_rate"]
    assert waveform.shape[:2] == (1, 2) and rate == (48000 if node == "SaveAudioOpus" else RATE)
    assert loudest_hertz(waveform[0, :, : rate // 2], rate) == pytest.approx(440, abs=4)
    if tolerance is not None:
        middle = slice(4000, 16000)
        shift = 1105 if node == "SaveAudioMP3" and waveform.shape[-1] > sound["waveform"].shape[-1] + 1000 else 0
        same = waveform[0, :, middle.start + shift : middle.stop + shift]
        assert (same - sound["waveform"][1, :, middle]).abs().max() < max(tolerance, 0.05 if shift else 0)


def test_sounds_are_previewed_and_recorded(all_nodes, folders):
    shown = run(all_nodes, "PreviewAudio", audio=tone(channels=1))["ui"]["audio"][0]
    assert shown["type"] == "temp"
    recorded = run(all_nodes, "RecordAudio", audio=f"{shown['filename']} [temp]")[0]
    assert recorded["waveform"].shape == (1, 1, RATE // 2)
    node = all_nodes["LoadAudio"]
    assert node.VALIDATE_INPUTS("none.wav") == "Invalid audio file: none.wav"
    assert node.IS_CHANGED(f"{shown['filename']} [temp]")
    with pytest.raises(FileNotFoundError, match="none.wav is not in the input folder"):
        run(all_nodes, "LoadAudio", audio="none.wav")


def test_files_without_sound(folders, tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("h264", rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="holds no sound"):
        read_audio(str(tmp_path / "v.mp4"))
    with pytest.raises(ValueError, match="choose one of flac, mp3, opus"):
        write_audio(str(tmp_path / "x"), torch.zeros(1, 9), RATE, "wma")
    with pytest.raises(ValueError, match="7 channels"):
        write_audio(str(tmp_path / "x"), torch.zeros(7, 9), RATE, "flac")


def test_other_rates():
    wave = tone(1.0)["waveform"]
    lower = resample(wave, RATE, 16000)
    assert lower.shape == (1, 2, 16000) and loudest_hertz(lower[0], 16000) == pytest.approx(440, abs=1)
    assert resample(wave, RATE, RATE) is wave


def test_sounds_are_changed(all_nodes):
    left, right = run(all_nodes, "SplitAudioChannels", audio=tone())
    assert left["waveform"].shape == right["waveform"].shape == (1, 1, RATE // 2)
    with pytest.raises(ValueError, match="1 channel"):
        run(all_nodes, "SplitAudioChannels", audio=left)
    silence = run(all_nodes, "EmptyAudio", duration=0.25, sample_rate=8000, channels=1)[0]
    assert silence["waveform"].shape == (1, 1, 2000) and silence["waveform"].abs().max() == 0
    joined = run(all_nodes, "AudioConcat", audio1=left, audio2=silence, direction="before")[0]
    assert joined["waveform"].shape == (1, 2, int(0.75 * RATE)) and joined["sample_rate"] == RATE
    assert joined["waveform"][..., :10000].abs().max() == 0 and joined["waveform"][..., -10000:].abs().max() > 0.4
    trimmed = run(all_nodes, "TrimAudioDuration", audio=tone(), start_index=-0.2, duration=0.1)[0]["waveform"]
    torch.testing.assert_close(trimmed, tone()["waveform"][..., -8820:-4410])
    with pytest.raises(ValueError, match="nothing is left"):
        run(all_nodes, "TrimAudioDuration", audio=tone(), start_index=0.0, duration=0.0)
    louder = run(all_nodes, "AudioAdjustVolume", audio=tone(), volume=6)[0]["waveform"]
    assert float(louder.abs().max() / tone()["waveform"].abs().max()) == pytest.approx(10**0.3)
    for method, value in {"add": 1.0, "mean": 0.5, "subtract": 0.0, "multiply": 0.25}.items():
        both = run(all_nodes, "AudioMerge", audio1=tone(), audio2=tone(0.7), merge_method=method)[0]["waveform"]
        assert both.shape[-1] == RATE // 2 and float(both.max()) == pytest.approx(value, abs=1e-3)
    short = run(all_nodes, "AudioMerge", audio1=tone(), audio2=tone(0.1), merge_method="add")[0]["waveform"]
    torch.testing.assert_close(short[..., 10000:], tone()["waveform"][..., 10000:])


def test_sounds_as_latents(all_nodes):
    class Codec:
        """Averages 2048 samples of a channel into one cell."""

        def encode(self, pixels):
            assert pixels.shape[-1] == 2
            return pixels.movedim(-1, 1).unflatten(-1, (-1, 2048)).mean(-1)

        def decode(self, samples):
            return samples.repeat_interleave(2048, -1).movedim(1, -1)

    empty = run(all_nodes, "EmptyLatentAudio", seconds=47.6, batch_size=2)[0]
    assert empty["samples"].shape == (2, 64, 1024) and empty["type"] == "audio"
    loud = {
        "waveform": torch.cat([torch.full((1, 2, 4096), 3.0), torch.full((1, 2, 4096), -3.0)], -1),
        "sample_rate": RATE,
    }
    latent = run(all_nodes, "VAEEncodeAudio", audio=loud, vae=Codec())[0]
    assert latent["samples"].shape == (1, 2, 4)
    sound = run(all_nodes, "VAEDecodeAudio", samples=latent, vae=Codec())[0]
    assert sound["waveform"].shape == (1, 2, 8192) and float(sound["waveform"].abs().max()) == pytest.approx(
        0.2, abs=1e-3
    )
    positive, negative = run(
        all_nodes,
        "ConditioningStableAudio",
        positive=[[torch.zeros(1), {}]],
        negative=[[torch.zeros(1), {"a": 1}]],
        seconds_start=1.0,
        seconds_total=9.0,
    )
    assert positive[0][1] == {"seconds_start": 1.0, "seconds_total": 9.0} and negative[0][1]["a"] == 1


def test_sounds_in_a_format_of_choice(all_nodes, folders):
    shown = run(
        all_nodes, "SaveAudioAdvanced", audio=tone(), filename_prefix="x", **{"format": "opus", "format.quality": "64k"}
    )
    assert shown["ui"]["audio"][0]["filename"] == "x_00001_.opus" and shown["result"][0]["sample_rate"] == RATE
    flac = run(all_nodes, "SaveAudioAdvanced", audio=tone(), filename_prefix="x", format="flac")
    assert flac["ui"]["audio"][0]["filename"].endswith(".flac")
    with pytest.raises(ValueError, match=r"input 'format.quality' is '64k'; with 'mp3' choose one of"):
        run(
            all_nodes,
            "SaveAudioAdvanced",
            audio=tone(),
            filename_prefix="x",
            **{"format": "mp3", "format.quality": "64k"},
        )
