"""Initial weights of a vocoder: a noise vocoder, written into a HiFi-GAN.

The phases of noise-like sounds do not follow from their spectrogram, so a vocoder needs randomness. A GAN takes
long to learn this: convolutions of an input that is the same in every frame have an output that is the same in every
frame, which is heard as a buzz. Here a vocoder reads channels of white noise beside the mel bands, and starts as the
simplest network that uses them: noise in each band at the level of the band.
"""

import math

import torch
from torch import nn
from torch.nn.functional import leaky_relu
from transformers.audio_utils import mel_filter_bank

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.mel import MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS


SIGNAL_SCALE = 30.0  # of a waveform inside the vocoder, so that it is large beside the changes of one step of Adam
NUM_UNITS = 5  # of the first layer that approximate an exponential function
LOUDEST, SOFTEST = 1.5, -7.5  # log-mel values that it covers
NOISE_DEVIATION = 3.0  # of the noise that is clipped to the amplitude of its band
TONE_WIDTH = 50  # in Hz: bandwidth of a tone of 32 ms
WIDEST = 180  # in Hz: wider bands get white noise instead of tones
LEVEL_OFFSET = 0.2  # nepers by which flat spectra are made too quiet, since leakage into valleys makes these too loud


@torch.no_grad()
def initialise(vocoder, num_noise_channels):
    """Write a noise vocoder over random weights: before any training its output has the given spectrogram.

    - The first layer, at 100 Hz, computes the amplitude of each band, the exponential function by a few leaky ReLUs,
      and passes the noise on.
    - The first upsampler, at 500 Hz, interpolates the amplitude `a` and generates the noise of the band: tones of
      32 ms at its frequency modulo 500 Hz, with the noise channels as amplitudes. The leaky ReLUs after it approximate
      the product of the two: `(|noise + a| - |noise - a|) / 2` is the noise clipped to the amplitude.
    - The second upsampler turns each such value into a grain of 8 ms in the band: the multiple of 500 Hz.

    All later layers pass samples on, in pairs of opposite sign. Training can change every weight. A vocoder that is
    too small for this, or without noise channels, gets random weights only.

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
            layer.weight.mul_(0.3)  # the branches do not add more than their input

    # samples of the waveform that one time step of each stage stands for, two channels each but in the first stage
    sizes = [math.prod(config.upsample_rates[i + 1 :]) for i in range(len(config.upsample_rates))]
    nums_used = [4 * NUM_MEL_BINS, *(2 * size for size in sizes[1:])]
    num_units = NUM_UNITS * NUM_MEL_BINS + 2 * num_noise_channels
    widths = [first.out_channels, *(up.out_channels for up in vocoder.upsampler)]
    if num_noise_channels == 0 or any(used > width for used, width in zip([num_units, *nums_used], widths)):
        vocoder.conv_post.weight.mul_(0.1)
        return

    # 1. The first layer: amplitudes, and the noise passed on
    middle = first.kernel_size[0] // 2
    first.weight[:num_units] = 0
    first.bias[:num_units] = 0
    knots, signs, weights, least = exponential_units(NUM_UNITS, slope)
    amplitudes = torch.zeros(first.out_channels, NUM_MEL_BINS)
    for band in range(NUM_MEL_BINS):
        units = slice(band * NUM_UNITS, (band + 1) * NUM_UNITS)
        first.weight[units, band, middle] = signs
        first.bias[units] = -signs * knots
        amplitudes[units, band] = weights
    noise_units = slice(NUM_UNITS * NUM_MEL_BINS, num_units)
    first.weight[noise_units, NUM_MEL_BINS:, middle] = torch.eye(num_noise_channels).repeat_interleave(2, dim=0)
    first.weight[noise_units.start + 1 : num_units : 2] *= -1

    # 2. The first upsampler: noise and amplitude of each band
    up = vocoder.upsampler[0]
    up.weight.mul_(0.05)  # the other channels start out weak
    up.weight[:, : nums_used[0]] = 0
    distance = torch.arange(up.kernel_size[0]) - up.padding[0] - up.stride[0] // 2  # from the middle of a frame
    between_frames = (1 - distance.abs() / up.stride[0]).clamp(min=0)  # linear interpolation
    step_rate = MEL_SAMPLING_RATE / sizes[0]
    centres, bandwidths = mel_bands()
    for band in range(NUM_MEL_BINS):
        noise = band_noise(centres[band], bandwidths[band], num_noise_channels, distance / step_rate)
        noise *= NOISE_DEVIATION * (noise.square().sum() / up.stride[0]) ** -0.5
        noise = torch.stack([noise, -noise], dim=1).flatten(0, 1) / (1 + slope)
        # noise + a, -noise - a, noise - a, a - noise
        for i, (sign, sign_of_amplitude) in enumerate(((1, 1), (-1, -1), (1, -1), (-1, 1))):
            channel = 4 * band + i
            up.weight[:, channel] = sign_of_amplitude * amplitudes[:, band, None] * between_frames
            up.weight[noise_units, channel] = sign * noise
            up.bias[channel] = -sign_of_amplitude * least

    # 3. Samples passed on
    for i, (size, up) in enumerate(zip(sizes, vocoder.upsampler)):
        used = nums_used[i]
        if i > 0:
            up.weight[:, :used] = 0
        if i > 1:
            for channel in range(used):
                sample, sign = channel // 2, 1 - 2 * (channel % 2)
                for phase in range(up.stride[0]):
                    source = 2 * (phase * size + sample)
                    up.weight[source, channel, phase + up.padding[0]] = sign / (1 + slope)
                    up.weight[source + 1, channel, phase + up.padding[0]] = -sign / (1 + slope)
        for block in vocoder.resblocks[i * vocoder.num_kernels : (i + 1) * vocoder.num_kernels]:
            for layer in block.convs2:
                layer.weight[:used] = 0
    last = vocoder.conv_post
    last.weight.mul_(2e-4)
    last.weight[:, :2] = 0
    last.weight[0, :2, last.kernel_size[0] // 2] = torch.tensor([0.5, -0.5]) / SIGNAL_SCALE

    # 4. Grains, scaled such that levels are those of the spectrogram, in the median over loud and soft ones
    up = vocoder.upsampler[1]
    grains = band_grains(centres, up.kernel_size[0] * sizes[1])
    level = torch.linspace(-5, 0, 8)[:, None, None].expand(-1, 200, NUM_MEL_BINS)
    inputs = torch.cat([level, torch.randn(*level.shape[:2], num_noise_channels)], dim=2)
    for _ in range(4):
        table = grains.unflatten(1, (-1, sizes[1])).transpose(1, 2) / (2 - 2 * slope)  # (bands, samples, taps)
        for i, sign in enumerate((1, 1, -1, -1)):
            up.weight[i : nums_used[0] : 4, 0 : nums_used[1] : 2] = sign * table
            up.weight[i : nums_used[0] : 4, 1 : nums_used[1] : 2] = -sign * table
        made = log_mel_spectrogram(vocoder(inputs)[:, : level.shape[1] * math.prod(config.upsample_rates)])
        grains *= (level - LEVEL_OFFSET - made)[:, 10:-10].flatten(0, 1).median(0).values.exp()[:, None]


def exponential_units(num_units, slope):
    """Leaky ReLUs whose weighted sum approximates the exponential function by chords between `num_units` points, the
    last of which is no knot; the chords are lowered a little, so that their errors are of both signs.

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


def mel_bands():
    """Centres and widths of the mel bands in Hz, as lists."""
    frequencies = torch.fft.rfftfreq(8192, 1 / MEL_SAMPLING_RATE)
    filters = mel_filter_bank(
        len(frequencies),
        NUM_MEL_BINS,
        0,
        MEL_SAMPLING_RATE / 2,
        MEL_SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    filters = torch.tensor(filters.T, dtype=torch.float32)
    centres = filters @ frequencies / filters.sum(1)
    bandwidths = filters.sum(1) / filters.amax(1) * frequencies[1]
    return centres.tolist(), bandwidths.tolist()


def band_noise(centre, bandwidth, num_noise_channels, time):
    """What each noise channel, one value a frame, adds to the noise of a band at `time` in seconds from the middle of
    the frame: (channels, time). A narrow band gets tones that fade in and out, a wide one white noise."""
    if bandwidth >= WIDEST:
        reach = (time >= -MEL_HOP_LENGTH / MEL_SAMPLING_RATE) & (time < MEL_HOP_LENGTH / MEL_SAMPLING_RATE)
        return torch.randn(num_noise_channels, len(time)) * reach  # two frames for each time
    noise = torch.zeros(num_noise_channels, len(time))
    fade = torch.hann_window(len(time) + 1, periodic=False)[1:]
    num_tones = max(1, round(bandwidth / TONE_WIDTH))
    for i in range(num_tones):
        frequency = centre + bandwidth * ((i + 0.5) / num_tones - 0.5)
        for quarter in (0, 0.25):
            tone = fade * torch.cos(2 * math.pi * (frequency * time + quarter))
            noise += torch.randn(num_noise_channels, 1) * tone
    return noise


def band_grains(centres, length):
    """A grain of `length` samples at each of the frequencies `centres` in Hz: (bands, length)."""
    time = (torch.arange(length) - length / 2) / MEL_SAMPLING_RATE
    grains = torch.cos(2 * math.pi * torch.tensor(centres)[:, None] * time) * torch.hann_window(length)
    return SIGNAL_SCALE * grains / grains.norm(dim=1, keepdim=True)
