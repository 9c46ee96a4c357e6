"""Losses of the vocoder, as pure functions, and the discriminators that some of them need."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.audio_utils import mel_filter_bank

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.mel import MEL_SAMPLING_RATE


SPECTRUM_BANDS = {128: 8, 256: 16, 512: 40, 1024: 64, 2048: 80}  # window in samples: bands, of the energy distance


def mel_loss(made, waveform):
    """Mean absolute difference of the log-mel spectrograms."""
    return F.l1_loss(log_mel_spectrogram(made), log_mel_spectrogram(waveform))


def discriminator_loss(real, made):
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894), summed over the discriminators."""
    return sum((F.relu(1 - r[-1]).mean() + F.relu(1 + m[-1]).mean()) for r, m in zip(real, made))


def adversarial_loss(made):
    """The generator's side of the hinge loss."""
    return -sum(features[-1].mean() for features in made)


def energy_distance(distance, real, first, second):
    """Energy distance of generated sounds to recorded ones up to a constant, from two sounds generated of one input.

    `2 E d(made, real) - E d(made, made')` has its minimum where generated and recorded sounds have one distribution,
    if `d` is a sum of Euclidean norms. The minimum of `E d(made, real)` is their median instead.
    Source: Gritsenko et al. 2020, arXiv 2008.01160, equation 4.
    """
    return distance(first, real) + distance(second, real) - distance(first, second)


@functools.lru_cache(maxsize=1)
def band_filters():
    """For each of `SPECTRUM_BANDS` a window and filters (num_bins, num_bands) that take means of magnitudes."""
    result = []
    for length, num_bands in SPECTRUM_BANDS.items():
        filters = mel_filter_bank(
            length // 2 + 1, num_bands, 0, MEL_SAMPLING_RATE / 2, MEL_SAMPLING_RATE, mel_scale="slaney"
        )
        filters = torch.tensor(filters / filters.sum(0), dtype=torch.float32)
        window = torch.hann_window(length)
        result.append((window / window.square().sum().sqrt(), filters))  # white noise has one level in all
    return result


def spectra(waveform):
    """Four features for each window of 8 to 128 ms: logarithms of mean magnitudes in mel bands, (batch, num_bands,
    num_frames), since single bins of noise say little about the noise; the compressed complex spectrum,
    (batch, 2, num_frames, num_bins), in which two draws of one noise are far apart; and, twice, the roughness of the
    waveform: the standard deviation in time of the mean over all bands, or over each eight, and of its change from
    frame to frame, (batch, 1, 2 * num_means), if there are three frames.

    The norms of many bands hardly tell whether the bands rise and fall together. In noise they do not; where they do
    it is heard as graininess, which the roughness measures.
    """
    result = []
    for window, filters in band_filters():
        window, filters = window.to(waveform.device), filters.to(waveform.device)
        length = len(window)
        spectrum = torch.stft(waveform, length, length // 4, window=window, center=False, return_complex=True)
        magnitude = (torch.view_as_real(spectrum).square().sum(-1) + 1e-9).sqrt()
        bands = (filters.T @ magnitude + 3e-3).log()
        pictures = [bands, 2 * compressed_spectrum(waveform, length)]
        if bands.shape[2] > 2:  # or there is no deviation
            for means in (bands.mean(1, keepdim=True), bands.unflatten(1, (-1, 8)).mean(2)):
                deviations = [(each.var(2) + 1e-4).sqrt().add(0.03).log() for each in (means, means.diff(dim=2))]
                pictures.append(torch.cat(deviations, dim=1).unsqueeze(1))
        result.append(tuple(pictures))
    return result


def spectral_distance(a, b):
    """Distance of two `spectra`: Euclidean norms of the differences of each frame's bands, of each complex bin and of
    each roughness, in means over frames, bins, roughnesses and windows."""
    total = 0
    for parts in zip(a, b):
        for x, y in zip(*parts):
            total = total + ((x - y).square().mean(1) + 1e-8).sqrt().mean()
    return total / len(a)


def feature_distance(a, b):
    """Mean absolute difference of feature maps, each relative to its mean, so that deep maps have weight.

    Source: EnCodec (Defossez et al. 2022, arXiv 2210.13438), section 3.4.
    """
    maps = [pair for maps_a, maps_b in zip(a, b) for pair in zip(maps_a[:-1], maps_b[:-1])]
    return sum(F.l1_loss(x, y) / (y.detach().abs().mean() + 1e-5) for x, y in maps) / len(maps)


def compressed_spectrum(waveform, window_length):
    """Complex STFT with its amplitudes to the power 0.3, smooth at 0: (batch, 2, num_frames, num_bins).

    The compression gives weight to quiet partials and noise beside loud ones, as hearing does.
    """
    window = torch.hann_window(window_length, device=waveform.device)
    spectrum = torch.stft(
        waveform.float(),
        window_length,
        window_length // 4,
        window=window,
        center=False,
        normalized=True,
        return_complex=True,
    )
    spectrum = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (batch, 2, num_frames, num_bins)
    # |X|^0.3 = |X| |X|^-0.7; below an amplitude of 1e-5 it is linear, or the gradient would be infinite in silence
    return spectrum * (spectrum.square().sum(1, keepdim=True) + 1e-10) ** -0.35


# Discriminators


class Discriminator(nn.Module):
    """Tells recordings from generated waveforms by a 2-D representation, which `picture_of` computes. Returns the
    feature maps of its layers; the last one is the score of each place, positive for a recording."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, waveform):
        hidden = self.picture_of(waveform).contiguous(memory_format=torch.channels_last)
        features = []
        for layer in self.layers[:-1]:
            hidden = F.leaky_relu(layer(hidden), 0.1)
            features.append(hidden)
        return [*features, self.layers[-1](hidden)]


class SpectrogramDiscriminator(Discriminator):
    def __init__(self, window_length, channels):
        super().__init__(
            [
                nn.Conv2d(2, channels, (3, 5), stride=(1, 2), padding=(1, 2)),
                nn.Conv2d(channels, 2 * channels, (3, 5), stride=(2, 2), padding=(1, 2)),
                nn.Conv2d(2 * channels, 4 * channels, (3, 3), stride=(1, 2), padding=1),
                nn.Conv2d(4 * channels, 4 * channels, (3, 3), stride=(2, 2), padding=1),
                nn.Conv2d(4 * channels, 1, (3, 3), padding=1),
            ]
        )
        self.window_length = window_length

    def picture_of(self, waveform):
        return compressed_spectrum(waveform, self.window_length)


class PeriodDiscriminator(Discriminator):
    """One row of samples for each period. Source: HiFi-GAN (Kong et al. 2020), section 2.3."""

    def __init__(self, period, channels):
        super().__init__(
            [
                nn.Conv2d(1, channels, (5, 1), stride=(3, 1), padding=(2, 0)),
                nn.Conv2d(channels, 2 * channels, (5, 1), stride=(3, 1), padding=(2, 0)),
                nn.Conv2d(2 * channels, 4 * channels, (5, 1), stride=(3, 1), padding=(2, 0)),
                nn.Conv2d(4 * channels, 4 * channels, (5, 1), padding=(2, 0)),
                nn.Conv2d(4 * channels, 1, (3, 1), padding=(1, 0)),
            ]
        )
        self.period = period

    def picture_of(self, waveform):
        waveform = F.pad(waveform, (0, -waveform.shape[1] % self.period))
        return waveform.unflatten(1, (-1, self.period)).unsqueeze(1)  # (batch, 1, rows, period)


class Discriminators(nn.Module):
    """A spectrogram discriminator for each window and a period discriminator for each period."""

    def __init__(self, stft_windows, periods, channels):
        super().__init__()
        self.each = nn.ModuleList([SpectrogramDiscriminator(window, channels) for window in stft_windows])
        self.each.extend(PeriodDiscriminator(period, channels) for period in periods)

    def forward(self, waveform):
        """A list of feature maps for each discriminator."""
        return [discriminator(waveform) for discriminator in self.each]
