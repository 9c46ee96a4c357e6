import math

import numpy as np
import pytest
import torch
from conftest import golden, largest_difference, read_wav

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.mel import log_mel_spectrogram_in_chunks, match_mel_spectrogram, mel_band_edges


def normalise_as_the_original(waveform, num_samples):
    waveform = waveform - waveform.mean()
    waveform = 0.5 * waveform / (waveform.abs().max() + 1e-8)
    waveform = torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))  # negative padding cuts
    return 0.5 * waveform / waveform.abs().max()


def assert_same_mel(mel, expected):
    """Within 1e-4 wherever a band is above the rounding noise of the original's own float32 sums, and within 3e-6 of
    linear magnitude everywhere: a logarithm near the floor of 1e-5 magnifies 1e-8 of a loud neighbour to 1e-3."""
    assert mel.shape == expected.shape
    audible = expected.exp() > 3e-3
    if audible.any():
        assert largest_difference(mel[audible], expected[audible]) < 1e-4
    assert largest_difference(mel.exp(), expected.exp()) < 3e-6


def test_log_mel_spectrogram_is_the_originals():
    expected = golden("mel")
    mel = log_mel_spectrogram(read_wav("b.wav", 8000)[None])
    assert_same_mel(mel, expected["raw_mel"].transpose(1, 2)[:, :50])


def test_log_mel_spectrogram_of_normalised_files_is_the_originals():
    expected = golden("mel")
    waveform = torch.stack([normalise_as_the_original(read_wav(name), 40960) for name in ("a.wav", "b.wav")])
    assert torch.equal(waveform[:, :1000], expected["waveform_256_first_1000"])
    assert_same_mel(log_mel_spectrogram(waveform), expected["fbank_256"])
    assert_same_mel(log_mel_spectrogram(expected["waveform_c_64"]), expected["fbank_c_64"])
    padded = normalise_as_the_original(read_wav("a.wav"), 163840)
    mel = log_mel_spectrogram(padded[None])
    assert mel.shape == (1, 1024, 64)
    assert_same_mel(mel[:, 280:330], expected["fbank_1024_frames_280_to_330"])
    assert_same_mel(mel[:, -4:], expected["fbank_1024_last_4"])


def test_log_mel_spectrogram_is_as_near_to_exact_arithmetic_as_the_original():
    expected = golden("mel")
    waveform = read_wav("b.wav", 8000)[None]
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(waveform.double(), 1024, 160, window=window, pad_mode="reflect", return_complex=True)
    mel_basis = expected["mel_basis"].double()
    exact = (mel_basis @ spectrum.abs()).clamp(min=1e-5).log().transpose(1, 2)[:, :50]
    original = expected["raw_mel"].transpose(1, 2)[:, :50]
    assert largest_difference(log_mel_spectrogram(waveform), exact) < 2 * largest_difference(original, exact)


def test_a_sine_peaks_in_the_mel_band_of_its_frequency():
    librosa = pytest.importorskip("librosa")
    centres = librosa.mel_frequencies(66, fmin=0, fmax=8000)[1:-1]
    time = torch.arange(16000) / 16000
    for frequency in (200.0, 1000.0, 5000.0):
        mel = log_mel_spectrogram(0.5 * torch.sin(2 * math.pi * frequency * time)[None])[0, 50]
        assert int(mel.argmax()) == int(np.abs(centres - frequency).argmin())


def test_silence_is_the_floor():
    assert torch.allclose(log_mel_spectrogram(torch.zeros(2, 1600)), torch.tensor(math.log(1e-5)))


@pytest.mark.parametrize("num_samples", [513, 1599, 1600, 1601])
def test_there_is_one_frame_for_each_started_hop(num_samples):
    assert log_mel_spectrogram(torch.zeros(1, num_samples)).shape == (1, math.ceil(num_samples / 160), 64)


@pytest.mark.parametrize("waveform", [torch.zeros(1600), torch.zeros(1, 512), torch.zeros(1, 1600).int(), [0.0]])
def test_log_mel_spectrogram_refuses_what_is_no_waveform(waveform):
    with pytest.raises(ValueError, match="`waveform`"):
        log_mel_spectrogram(waveform)


@pytest.mark.parametrize("num_frames", [40, 100, 1000])
def test_chunks_have_the_mel_spectrogram_of_the_whole(num_frames):
    waveform = torch.randn(32000, generator=torch.Generator().manual_seed(0))
    chunks = log_mel_spectrogram_in_chunks(waveform.numpy(), "cpu", num_frames)
    assert torch.allclose(chunks, log_mel_spectrogram(waveform[None])[0], atol=1e-5)


@pytest.mark.parametrize("band", [20, 40, 63])
def test_mel_bands_peak_between_their_edges(band):
    edges = mel_band_edges()
    assert edges[0] == 0 and edges[-1] == pytest.approx(8000)
    sine = torch.sin(2 * math.pi * edges[band + 1] * torch.arange(16000) / 16000)
    assert log_mel_spectrogram(sine[None].float())[0, 50].argmax() == band


def test_log_mel_spectrogram_has_gradients():
    waveform = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_mel_spectrogram(waveform).sum().backward()
    assert torch.isfinite(waveform.grad).all() and waveform.grad.abs().max() > 0


def test_a_waveform_is_matched_to_a_mel_spectrogram():
    recording = read_wav("b.wav", 8000)[None]
    mel = log_mel_spectrogram(recording)
    noise = 0.1 * torch.randn(recording.shape, generator=torch.Generator().manual_seed(0))

    def error(waveform):
        difference = (log_mel_spectrogram(waveform) - mel)[mel > mel.max() - 5]  # 43 dB below the loudest
        return difference.abs().mean(), difference.mean()

    first, once, more = (error(match_mel_spectrogram(noise, mel, num_iterations)) for num_iterations in (0, 1, 8))
    assert torch.equal(match_mel_spectrogram(noise, mel, 0), noise)
    assert first[0] > 0.8 and once[0] < 0.5 * first[0] and more[0] < 0.5 * once[0]
    assert abs(more[1]) < 0.1 < abs(first[1])
    kept = match_mel_spectrogram(recording, mel)  # nothing to do; rounding moves what is far below the rest
    assert (log_mel_spectrogram(kept) - mel)[mel > -7].abs().mean() < 0.01


@pytest.mark.parametrize("frequency", [300, 400, 1000])
def test_a_partial_comes_out_of_noise(frequency):
    tone = 0.3 * torch.sin(2 * math.pi * frequency * torch.arange(16000) / 16000)[None]
    noise = 0.1 * torch.randn(tone.shape, generator=torch.Generator().manual_seed(0))

    def share_near(waveform):
        power = torch.fft.rfft(waveform[0]).abs().square()  # in steps of 1 Hz
        return power[frequency - 20 : frequency + 20].sum() / power.sum()

    once, more = (match_mel_spectrogram(noise, log_mel_spectrogram(tone), number) for number in (1, 8))
    assert share_near(once) < 0.8 and share_near(more) > 0.93


def test_matching_keeps_phases_and_lengths():
    time = torch.arange(16033) / 16000
    tone = torch.sin(2 * math.pi * 1000 * time)[None]
    mel = log_mel_spectrogram(0.1 * tone[:, :16000])
    matched = match_mel_spectrogram(tone, mel)
    assert matched.shape == tone.shape and matched.dtype == torch.float32
    assert (matched - 0.1 * tone)[:, 1000:-1000].abs().max() < 3e-3
    silence = match_mel_spectrogram(torch.zeros(2, 1600), mel[:, :10].expand(2, -1, -1))
    assert torch.equal(silence, torch.zeros(2, 1600))
