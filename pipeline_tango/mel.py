"""Log-mel spectrograms as the VAE and the vocoder of the released checkpoints were trained on."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers.audio_utils import hertz_to_mel, mel_filter_bank, mel_to_hertz


MEL_SAMPLING_RATE = 16000
MEL_FFT_LENGTH = 1024
MEL_HOP_LENGTH = 160
NUM_MEL_BINS = 64
MEL_MATCH_MOMENTUM = 0.9  # of `match_mel_spectrogram`
MEL_MATCH_RANGE = (-6.0, 2.0)  # nepers by which one of its iterations may change a level
MIN_MEL_MAGNITUDE = 1e-5


@functools.lru_cache(maxsize=1)
def _mel_filters():
    filters = mel_filter_bank(
        num_frequency_bins=MEL_FFT_LENGTH // 2 + 1,
        num_mel_filters=NUM_MEL_BINS,
        min_frequency=0.0,
        max_frequency=MEL_SAMPLING_RATE / 2,
        sampling_rate=MEL_SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    with torch.inference_mode(False):  # else they could not be used in training later
        return torch.from_numpy(filters).float()  # (num_frequency_bins, num_mel_bins)


def log_mel_spectrogram(waveform):
    """Log-mel spectrogram as the VAE and the vocoder of the released checkpoints were trained on.

    Args:
        waveform (`torch.Tensor` of shape `(batch, num_samples)`):
            16 kHz mono in [-1, 1], more than 512 samples. It is not normalised.

    Returns:
        `torch.Tensor` of shape `(batch, num_frames, num_mel_bins)`: float32, natural log of the magnitude in 64 Slaney
        mel bands from 0 to 8 kHz, clamped from below at ln(1e-5); `ceil(num_samples / 160)` frames. (A centred
        transform has one frame more if 160 divides `num_samples`; the original cuts it off later.)

    Raises:
        ValueError: if `waveform` is not a 2-D floating-point tensor or is too short for reflection padding.

    Source: HiFi-GAN (Kong et al. 2020), as set up by AudioLDM (Liu et al. 2023): periodic Hann window of 1024 samples.
    """
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 2 or not waveform.is_floating_point():
        came = f"{tuple(waveform.shape)} {waveform.dtype}" if isinstance(waveform, torch.Tensor) else type(waveform)
        raise ValueError(f"`waveform` has to be a floating-point tensor (batch, num_samples), not {came}.")
    if waveform.shape[1] <= MEL_FFT_LENGTH // 2:
        raise ValueError(f"`waveform` needs more than {MEL_FFT_LENGTH // 2} samples, not {waveform.shape[1]}.")

    num_frames = math.ceil(waveform.shape[1] / MEL_HOP_LENGTH)
    spectrum = torch.stft(waveform.float(), **_mel_stft(waveform.device), pad_mode="reflect", return_complex=True)
    return _log_mel(spectrum[..., :num_frames])


def _mel_stft(device):
    """Arguments of the transform for `torch.stft` and `torch.istft`."""
    # in float64 first: the float32 window is off by 1e-7, which shows in quiet bands beside loud ones
    window = torch.hann_window(MEL_FFT_LENGTH, dtype=torch.float64, device="cpu").float().to(device)
    return {"n_fft": MEL_FFT_LENGTH, "hop_length": MEL_HOP_LENGTH, "window": window}


def log_mel_spectrogram_in_chunks(waveform, device, num_frames=4096):
    """[`log_mel_spectrogram`] of an `np.ndarray` of shape `(num_samples,)`, computed on `device` from at most about
    `num_frames` frames at a time, since the complex spectrum of minutes of sound is large.

    Returns:
        `torch.Tensor` of shape `(num_samples // 160, num_mel_bins)`.
    """
    context = math.ceil(MEL_FFT_LENGTH / 2 / MEL_HOP_LENGTH)  # frames whose window reaches beyond a chunk
    num_all_frames = len(waveform) // MEL_HOP_LENGTH
    mels = []
    for start in range(0, num_all_frames, num_frames):
        end = min(start + num_frames, num_all_frames)
        if num_all_frames - end <= context:
            end = num_all_frames
        first, last = max(start - context, 0), min(end + context, num_all_frames)
        chunk = torch.from_numpy(waveform[first * MEL_HOP_LENGTH : last * MEL_HOP_LENGTH]).to(device)
        mels.append(log_mel_spectrogram(chunk[None])[0, start - first : end - first])
        if end == num_all_frames:
            break
    return torch.cat(mels)  # (num_frames, num_mel_bins)


def mel_band_edges():
    """Frequencies in Hz between which the mel bands lie: band `k` begins at `[k]`, peaks at `[k + 1]`, ends at
    `[k + 2]`."""
    highest = hertz_to_mel(MEL_SAMPLING_RATE / 2, mel_scale="slaney")
    return mel_to_hertz(np.linspace(0, highest, NUM_MEL_BINS + 2), mel_scale="slaney")  # (num_mel_bins + 2,)


def _log_mel(spectrum):
    magnitude = spectrum.abs().transpose(1, 2)  # (batch, num_frames, num_frequency_bins)
    return (magnitude @ _mel_filters().to(spectrum.device)).clamp(min=MIN_MEL_MAGNITUDE).log()


def match_mel_spectrogram(waveform, mel_spectrogram, num_iterations=8):
    """`waveform` with its level in each mel band and frame corrected to that of a log-mel spectrogram.

    The waveform that a small vocoder generates from a spectrogram does not have that spectrogram: random phases bring
    random levels, and partials and onsets are blurred. Each iteration multiplies the short-time spectrum by the ratio
    of the magnitudes and keeps the phases. One iteration is not enough, because the phases are not consistent with the
    new magnitudes. Partials emerge from the noise over the iterations, in fewer of them with momentum. The target
    should vary as much from frame to frame and band to band as spectrograms of recordings do: noise that is matched to
    an over-smoothed spectrogram sounds tonal.

    Args:
        waveform (`torch.Tensor` of shape `(batch, num_samples)`): 16 kHz mono, more than 512 samples.
        mel_spectrogram (`torch.Tensor` of shape `(batch, num_frames, num_mel_bins)`): target, as
            [`log_mel_spectrogram`] computes it, with a frame for each hop in `waveform`.
        num_iterations (`int`, *optional*, defaults to 8): 0 returns `waveform`.

    Returns:
        `torch.Tensor` of shape `(batch, num_samples)`: float32.

    Source: the momentum is that of the fast Griffin-Lim algorithm (Perraudin et al. 2013).
    """
    options = _mel_stft(waveform.device)
    filters = _mel_filters().to(waveform.device)
    weights = filters / filters.sum(1, keepdim=True).clamp(min=1e-12)  # (num_frequency_bins, num_mel_bins)
    matched = waveform
    for i in range(num_iterations):
        spectrum = torch.stft(waveform.float(), **options, pad_mode="reflect", return_complex=True)
        num_frames = min(mel_spectrogram.shape[1], spectrum.shape[2])
        difference = mel_spectrogram[:, :num_frames] - _log_mel(spectrum[..., :num_frames])
        difference = difference.clamp(*MEL_MATCH_RANGE).transpose(1, 2)  # (batch, num_mel_bins, num_frames)
        difference = F.pad(difference, (0, spectrum.shape[2] - num_frames), mode="replicate")
        previous = matched
        matched = torch.istft(spectrum * (weights @ difference).exp(), **options, length=waveform.shape[1])
        waveform = matched + MEL_MATCH_MOMENTUM * (matched - previous) if i > 0 else matched
    return matched
