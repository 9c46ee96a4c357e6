import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipeline_tango import TangoPipeline, log_mel_spectrogram
from training.copy_synthesis import main


SOUNDS = Path(__file__).parents[1] / "examples" / "sounds"


@pytest.fixture
def manifest(tmp_path):
    lines = [json.dumps({"location": str(SOUNDS / f"{name}.flac"), "captions": name}) for name in ("rain", "cow")]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


def test_each_stage_is_heard_alone(manifest, tiny_folder, tmp_path, capsys):
    flags = [str(manifest), str(tmp_path / "out"), "--model", str(tiny_folder), "--takes=2", "--seconds=0.5"]
    main(flags)
    assert "2 recordings" in capsys.readouterr().out
    names = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.wav"))
    copies = [
        f"{stage}/{name}-{take}.wav" for stage in ("vae", "vocoder") for name in ("cow", "rain") for take in (0, 1)
    ]
    assert names == sorted([*copies, "recordings/cow.wav", "recordings/rain.wav"])
    sounds = {name: soundfile.read(tmp_path / "out" / name, dtype="float32")[0] for name in names}
    assert {len(sound) for sound in sounds.values()} == {8000}
    assert np.abs(sounds["recordings/rain.wav"]).max() == pytest.approx(0.5, abs=1e-4)

    pipe = TangoPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    padded = np.pad(sounds["recordings/rain.wav"], (0, 320))  # 13 cells of 640 samples
    with torch.no_grad():
        mel = log_mel_spectrogram(torch.from_numpy(padded)[None])[:, None]
        expected = pipe.mel_spectrogram_to_waveform(mel)[0, :8000].numpy()
        assert sounds["vocoder/rain-0.wav"] == pytest.approx(expected, abs=5e-3)
        decoded = pipe.vae.decode(pipe.vae.encode(mel).latent_dist.mode()).sample
        expected = pipe.mel_spectrogram_to_waveform(decoded)[0, :8000].numpy()
    assert sounds["vae/rain-0.wav"] == pytest.approx(expected, abs=5e-3)

    written = (tmp_path / "out" / "vae" / "cow-0.wav").stat().st_mtime_ns
    main(flags)
    assert (tmp_path / "out" / "vae" / "cow-0.wav").stat().st_mtime_ns == written


def test_bad_input_is_one_line(manifest, tmp_path):
    with pytest.raises(SystemExit, match="error: .*missing.jsonl"):
        main([str(tmp_path / "missing.jsonl"), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2"):
        main([str(manifest), str(tmp_path / "out"), "--takes=0"])
    assert not (tmp_path / "out").exists()
