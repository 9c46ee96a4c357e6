"""Weights to start the training of a vocoder from: a noise vocoder, written into a HiFi-GAN.

A spectrogram says nothing of the phases of rain, so a vocoder has to take them from chance. What a GAN takes longest
to find is how: a steady input repeats itself every frame, so does the output of convolutions that see nothing else,
and that is heard as a buzz. Here a vocoder reads channels of white noise beside the mel bands, and starts as the
simplest net that uses them: noise in each band, as loud as the band.
"""

import math

import torch
from torch import nn
from torch.nn.functional import leaky_relu
from transformers.audio_utils import mel_filter_bank

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.pipeline_tango import MEL_SAMPLING_RATE, NUM_MEL_BINS


SIGNAL_SCALE = 30.0  # of a waveform inside the vocoder, or it would be small beside what a step of Adam changes
NUM_NARROW_BANDS = 28  # up to 1.4 kHz: one random number a frame is as much as fits into their width
NARROW_UNITS, WIDE_UNITS = 3, 4  # of the first layer that make an exponential function
LOUDEST, SOFTEST = 1.5, -7.5  # log-mel values that it covers
JITTER = 0.7  # of the level of each of the two whose difference is the amplitude of a narrow band, in log units
SIGN_DEVIATION = 4.0  # of the noise whose clipping makes the signs in wide bands


@torch.no_grad()
def initialise(vocoder, num_noise_channels):
    """Random weights, of which a part makes a noise vocoder: before any training it sounds like its spectrogram.

    Two ways to multiply noise with the amplitude of a band, of which a net of leaky ReLUs has neither:

    - Narrow bands, in the first layer, at 100 Hz: `exp(mel + noise) - exp(mel + other noise)` is a random number as
      loud as the band. The first upsampler makes it a grain of 32 ms of noise in the band.
    - Wide bands, after the first upsampler, at 500 Hz: `(|noise + a| - |noise - a|) / 2` is the noise clipped to the
      amplitude `a`. The second upsampler makes it a grain of 8 ms.

    Everything after that hands samples on, in pairs of opposite sign. All of it can be trained away from. A vocoder
    that is too small for it, or without noise channels, gets random weights only.

    Args:
        vocoder (`SpeechT5HifiGan`): `model_in_dim` is the mel bands and then the noise channels.
        num_noise_channels (`int`): inputs of unit variance.
    """
    config = vocoder.config
    slope = config.leaky_relu_slope
    for module in vocoder.modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            fan_in = module.in_channels * module.kernel_size[0] / module.stride[0]
            module.weight.normal_(std=fan_in**-0.5)
            module.bias.zero_()
    first = vocoder.conv_pre
    first.weight[:, :NUM_MEL_BINS].div_(3)  # log-mel values vary by 3 around -6
    first.bias.copy_(6 * first.weight[:, :NUM_MEL_BINS].sum((1, 2)))
    for block in vocoder.resblocks:
        for layer in block.convs2:
            layer.weight.mul_(0.3)  # the sum of the branches stays as loud as what they are added to

    # samples of the waveform that one time step of each stage stands for, two channels each
    sizes = [math.prod(config.upsample_rates[i + 1 :]) for i in range(len(config.upsample_rates))]
    num_wide_bands = NUM_MEL_BINS - NUM_NARROW_BANDS
    num_units = 2 * NARROW_UNITS * NUM_NARROW_BANDS + WIDE_UNITS * num_wide_bands + 2 * num_noise_channels
    nums_used = [2 * size for size in sizes]
    nums_used[0] += 4 * num_wide_bands
    widths = [first.out_channels, *(up.out_channels for up in vocoder.upsampler)]
    if num_noise_channels == 0 or any(used > width for used, width in zip([num_units, *nums_used], widths)):
        vocoder.conv_post.weight.mul_(0.1)
        return

    # 1. The first layer: levels, and the noise handed on
    middle = first.kernel_size[0] // 2
    first.weight[:num_units] = 0
    first.bias[:num_units] = 0
    narrow_amplitudes = torch.zeros(first.out_channels, NUM_NARROW_BANDS)
    wide_amplitudes = torch.zeros(first.out_channels, num_wide_bands)
    unit = 0
    knots, signs, weights, _ = exponential_units(NARROW_UNITS, slope)
    for band in range(NUM_NARROW_BANDS):
        for side in (1, -1):
            jitter = torch.randn(num_noise_channels)
            jitter *= JITTER / jitter.norm()
            units = slice(unit, unit := unit + NARROW_UNITS)
            first.weight[units, band, middle] = signs
            first.weight[units, NUM_MEL_BINS:, middle] = signs[:, None] * jitter
            first.bias[units] = -signs * knots
            narrow_amplitudes[units, band] = side * weights
    knots, signs, weights, least = exponential_units(WIDE_UNITS, slope)
    for band in range(num_wide_bands):
        units = slice(unit, unit := unit + WIDE_UNITS)
        first.weight[units, NUM_NARROW_BANDS + band, middle] = signs
        first.bias[units] = -signs * knots
        wide_amplitudes[units, band] = weights
    noise_units = slice(unit, unit + 2 * num_noise_channels)
    first.weight[noise_units, NUM_MEL_BINS:, middle] = torch.eye(num_noise_channels).repeat_interleave(2, dim=0)
    first.weight[unit + 1 : noise_units.stop : 2] *= -1

    # 2. The first upsampler: narrow grains, later; and noise and amplitude of each wide band
    up = vocoder.upsampler[0]
    up.weight.mul_(0.05)  # what is not handed on starts out weak
    up.weight[:, : nums_used[0]] = 0
    distance = torch.arange(up.kernel_size[0]) - up.padding[0] - up.stride[0] // 2  # from the middle of a frame
    between_frames = (1 - distance.abs() / up.stride[0]).clamp(min=0)  # linear interpolation
    reach = (distance >= -up.stride[0]) & (distance < up.stride[0])  # two frames of noise for each time step
    for band in range(num_wide_bands):
        noise = SIGN_DEVIATION * (2 * num_noise_channels) ** -0.5 * torch.randn(num_noise_channels, len(reach)) * reach
        noise = torch.stack([noise, -noise], dim=1).flatten(0, 1) / (1 + slope)
        # noise + a, -noise - a, noise - a, a - noise
        for i, (sign, sign_of_amplitude) in enumerate(((1, 1), (-1, -1), (1, -1), (-1, 1))):
            channel = 2 * sizes[0] + 4 * band + i
            up.weight[:, channel] = sign_of_amplitude * wide_amplitudes[:, band, None] * between_frames
            up.weight[noise_units, channel] = sign * noise
            up.bias[channel] = -sign_of_amplitude * least

    # 3. Samples handed on
    for i, (size, up) in enumerate(zip(sizes, vocoder.upsampler)):
        used = 2 * size
        if i > 0:
            up.weight[:, :used] = 0
            for channel in range(used):
                sample, sign = channel // 2, 1 - 2 * (channel % 2)
                for phase in range(up.stride[0]):
                    source = 2 * (phase * size + sample)
                    up.weight[source, channel, phase + up.padding[0]] = sign / (1 + slope)
                    up.weight[source + 1, channel, phase + up.padding[0]] = -sign / (1 + slope)
        for block in vocoder.resblocks[i * vocoder.num_kernels : (i + 1) * vocoder.num_kernels]:
            for layer in block.convs2:
                layer.weight[: nums_used[i]] = 0
    last = vocoder.conv_post
    last.weight.mul_(2e-4)
    last.weight[:, :2] = 0
    last.weight[0, :2, last.kernel_size[0] // 2] = torch.tensor([0.5, -0.5]) / SIGNAL_SCALE

    # 4. Grains, whose levels are those of the spectrogram, in the median over loud and soft ones
    narrow_grains = noise_grains(vocoder.upsampler[0], sizes[0])[:NUM_NARROW_BANDS]
    wide_grains = short_grains(vocoder.upsampler[1], sizes[1])[NUM_NARROW_BANDS:]
    level = torch.linspace(-5, 0, 8)[:, None, None].expand(-1, 200, NUM_MEL_BINS)
    inputs = torch.cat([level, torch.randn(*level.shape[:2], num_noise_channels)], dim=2)
    wide_channels = 2 * sizes[0] + 4 * torch.arange(num_wide_bands)
    for _ in range(4):
        table = (narrow_amplitudes @ narrow_grains).unflatten(1, (-1, sizes[0])).transpose(1, 2)
        hand_on(vocoder.upsampler[0], slice(None), table)
        table = wide_grains.unflatten(1, (-1, sizes[1])).transpose(1, 2) / (2 - 2 * slope)  # (bands, samples, taps)
        for i, sign in enumerate((1, 1, -1, -1)):
            hand_on(vocoder.upsampler[1], wide_channels + i, sign * table)
        made = log_mel_spectrogram(vocoder(inputs)[:, : level.shape[1] * math.prod(config.upsample_rates)])
        gain = (level - made)[:, 10:-10].flatten(0, 1).median(0).values.exp()
        narrow_grains *= gain[:NUM_NARROW_BANDS, None]
        wide_grains *= gain[NUM_NARROW_BANDS:, None]


def exponential_units(num_units, slope):
    """Leaky ReLUs whose weighted sum runs along the exponential function, by chords between `num_units` points, the
    last of which is no knot; a little lowered, so as to be too high and too low alike.

    Returns:
        `sign * (x - knot)` is what each reads; `(num_units,)` tensors of knots and signs, and the weights; and the
        value that the sum has wherever `x` is below all knots.
    """
    ends = torch.linspace(SOFTEST, LOUDEST, num_units)
    knots = ends[:-1]
    chords = ends.exp().diff() / ends.diff()
    # the slope of sum of c_j lrelu(x - k_j) + b lrelu(k_0 - x) in each part is the chord's, and below k_0 it is 0, by
    # b = slope sum(c)
    num_knots = len(knots)
    ones = torch.ones(num_knots, num_knots)
    system = slope * ones.tril(-1).T + ones.tril() - slope**2
    weights = 0.75 * torch.linalg.solve(system, chords)
    weights = torch.cat([weights, slope * weights.sum()[None]])
    knots = torch.cat([knots, knots[:1]])
    signs = torch.tensor([1.0] * num_knots + [-1.0])
    least = weights @ leaky_relu(signs * (SOFTEST - 1 - knots), slope)
    return knots, signs, weights, float(least)


def mel_filters(length):
    """Responses of the mel bands, (bands, frequencies), and the frequencies of an FFT of `length` in hertz."""
    frequencies = torch.fft.rfftfreq(length, 1 / MEL_SAMPLING_RATE)
    filters = mel_filter_bank(
        len(frequencies),
        NUM_MEL_BINS,
        0,
        MEL_SAMPLING_RATE / 2,
        MEL_SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.tensor(filters.T, dtype=torch.float32), frequencies


def noise_grains(up, size):
    """A grain of noise in each band, as long as the upsampler's kernel: (bands, samples)."""
    length = up.kernel_size[0] * size
    filters, frequencies = mel_filters(length)
    return windowed(torch.fft.irfft(filters * torch.randn(filters.shape, dtype=torch.complex64), n=length))


def short_grains(up, size):
    """A grain of zero phase in each band, as long as the upsampler's kernel: (bands, samples)."""
    length = up.kernel_size[0] * size
    filters, frequencies = mel_filters(8192)
    delay = torch.exp(-2j * math.pi * frequencies / MEL_SAMPLING_RATE * (length / 2))
    return windowed(torch.fft.irfft(filters * delay, n=8192)[:, :length])


def windowed(grains):
    grains = grains * torch.hann_window(grains.shape[1])
    return SIGNAL_SCALE * grains / grains.norm(dim=1, keepdim=True)


def hand_on(up, rows, table):
    """Write what `up` makes of its inputs `rows`, (rows, samples, taps), into its first channels: samples in pairs of
    opposite sign."""
    used = 2 * table.shape[1]
    up.weight[rows, 0:used:2] = table
    up.weight[rows, 1:used:2] = -table
