import io

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from pipeline_tango.sound_files import draw_spectrogram, encode_wav, read_audio


def tone(num_samples=4000, rate=16000):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) + 0.01


def test_int16_is_rounded_and_never_wraps():
    audio = np.array([1.0, -1.0, 0.5, 0.0, 1.6 / 32768, 2.0, -2.0], dtype=np.float32)
    sampling_rate, samples = wavfile.read(io.BytesIO(encode_wav(audio, 16000)))
    assert sampling_rate == 16000 and samples.dtype == np.int16
    assert samples.tolist() == [32767, -32768, 16384, 0, 2, 32767, -32768]


def test_spectrogram_shows_a_tone_where_it_is():
    time_in_s = np.arange(32000) / 16000
    tone = np.where(time_in_s < 1, 0.5 * np.sin(2 * np.pi * 1000 * time_in_s), 0).astype(np.float32)
    picture = Image.open(io.BytesIO(draw_spectrogram(tone, 16000, "a $tone% of 1 kHz " * 20)))
    assert picture.format == "PNG" and picture.size == (1200, 504)
    pixels = np.asarray(picture.convert("L"), dtype=float)
    inside = pixels[150:400, 150:1000]  # away from axes, title and colour bar
    assert inside.std() > 20
    left, right = inside[:, :300], inside[:, 600:]
    assert right.max() < 30 and left.max() > 200
    rows = np.argwhere(left.mean(axis=1) > 150).ravel()
    assert 0 < len(rows) < 20  # one thin line


@pytest.mark.parametrize("num_samples", [1, 16, 700, 1025])
def test_spectrogram_of_next_to_nothing(num_samples):
    picture = Image.open(io.BytesIO(draw_spectrogram(np.zeros(num_samples, dtype=np.float32), 16000, "silence")))
    assert picture.size == (1200, 504)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_wav_files_of_every_kind_are_read_alike(tmp_path, dtype):
    samples = np.stack([tone(), -0.5 * tone()], axis=1)
    if dtype == "uint8":
        stored = np.rint(samples * 128 + 128).astype(np.uint8)
    else:
        stored = (samples * (np.iinfo(dtype).max if "int" in dtype else 1)).astype(dtype)
    wavfile.write(tmp_path / "tone.wav", 22050, stored)
    read, sampling_rate = read_audio(tmp_path / "tone.wav")
    assert sampling_rate == 22050 and read.shape == (2, 4000)
    assert np.abs(read.T - samples).max() < (1e-2 if dtype == "uint8" else 1e-4)
