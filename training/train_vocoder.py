"""Train a HiFi-GAN vocoder: `accelerate launch -m training.train_vocoder --train_manifest M --output_dir OUT`.

The result, `OUT/model`, is a transformers `SpeechT5HifiGan` for the mel spectrograms of `log_mel_spectrogram`. As in
`training.train` everything random is drawn from generators keyed by the seed and by what it is for, so a run that was
killed and resumed does exactly what an unbroken one does.

A spectrogram says nothing of the phases of rain. A net that is asked for *the* waveform settles on what is least wrong
on average, one click a frame, which is heard as a buzz. So the vocoder reads channels of noise beside the mel bands,
starts as a noise vocoder (`training.noise_vocoder`), and makes two waveforms of each segment; the losses ask that the
two be as far from each other as from the recording (`energy_distance`). Discriminators can be added.
"""

import argparse
import functools
import json
import logging
import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig
from transformers.audio_utils import mel_filter_bank

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.pipeline_tango import MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS
from pipeline_tango.sound_files import draw_spectrogram, encode_wav, write_atomically

from .batches import StepSampler, keyed_generator, list_of_items
from .data import is_silent, normalise, read_waveform
from .noise_vocoder import initialise
from .objective import sample_noise
from .run import Log, load_checkpoint, replacing, run, save_checkpoint
from .train import LR_SCHEDULERS, add_checkpoint_arguments, add_data_arguments, check_arguments, prepare_clips
from .train_autoencoder import add_pool_argument, reconstruction_error, vae_factor


logger = get_logger(__name__)

# the released vocoder's, but half as wide and with the smallest of its kernels: 4.8 million parameters
VOCODER_CONFIG = {
    "sampling_rate": MEL_SAMPLING_RATE,
    "upsample_initial_channel": 512,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "normalize_before": False,
}
NUM_CONTEXT_FRAMES = 8  # on each side of a segment: its mel windows, and the VAE's view
MAX_GAIN_DB = 20  # of a quiet segment
SPECTRUM_BANDS = {128: 8, 256: 16, 512: 40, 1024: 64, 2048: 80}  # window in samples: bands, of the energy distance
# what a random draw is for: the first word of its key
SEGMENTS, RECONSTRUCTION, VALIDATION, NOISE = range(4, 8)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m training.train_vocoder",
        description="Train or fine-tune a HiFi-GAN vocoder on sounds. Run it as it is or by `accelerate launch -m "
        "training.train_vocoder ...` on any number of processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    start = parser.add_argument_group("start", "random weights, unless a vocoder is given")
    start.add_argument("--pretrained_model_name_or_path", help="vocoder to fine-tune: folder or Hub repo")
    start.add_argument(
        "--config", help="JSON config of a SpeechT5HifiGan, whole or in part (default: 4.0 M parameters)"
    )
    start.add_argument("--upsample_initial_channel", type=int, help="its width, for short")
    start.add_argument(
        "--num_noise_channels",
        type=int,
        default=96,
        help="inputs beside the mel bands, of white noise; a pipeline with this vocoder needs the same number as its "
        "`num_noise_channels`. 0 makes a plain HiFi-GAN",
    )
    start.add_argument("--discriminators", help="those of an earlier run: CHECKPOINT/model_1.safetensors")

    data = add_data_arguments(parser, "all of it is kept in memory: 230 MB an hour")
    data.add_argument("--caption_column", help="column of the caption, which must be there (default: by convention)")
    data.add_argument("--num_workers", type=int, default=2, help="threads that read sounds at the start")
    data.add_argument("--num_segment_frames", type=int, default=48, help="length trained on, in frames of 10 ms")
    data.add_argument("--vae", help="folder of an AutoencoderKL whose blur the vocoder is to undo")
    data.add_argument(
        "--proportion_reconstructed", type=float, default=0.5, help="share of mel spectrograms that go through --vae"
    )
    data.add_argument(
        "--train_decoder",
        action="store_true",
        help="train the decoder of --vae along, on reconstructions only, so that nothing is left out that the vocoder "
        "needs; the encoder stays, and with it all latents. The result is OUT/vae",
    )

    objective = parser.add_argument_group("objective", "the weights of the generator's losses")
    objective.add_argument("--spectrogram_weight", type=float, default=1.0, help="of the energy distance of spectra")
    objective.add_argument("--adversarial_weight", type=float, default=0.0, help="0 leaves the discriminators out")
    objective.add_argument("--mel_weight", type=float, default=0.0, help="of that of log-mel spectrograms")
    objective.add_argument("--feature_weight", type=float, default=0.0, help="of that of the discriminators' features")
    objective.add_argument("--decoder_weight", type=float, default=5.0, help="of that of the decoder's spectrograms")
    add_pool_argument(objective)
    objective.add_argument(
        "--stft_windows", type=int, nargs="+", default=[2048, 512, 128], help="a spectrogram discriminator each"
    )
    objective.add_argument(
        "--periods", type=int, nargs="*", default=[], help="a period discriminator each: 2 3 5 7 11"
    )
    objective.add_argument("--discriminator_channels", type=int, default=16, help="of their first layer")

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--train_batch_size", type=int, default=8, help="segments per process and step")
    steps.add_argument("--max_train_steps", type=int, default=100000)
    steps.add_argument("--learning_rate", type=float, default=1e-4)
    steps.add_argument("--discriminator_learning_rate", type=float, default=2e-4, help="5e-4 wins too early")
    steps.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="cosine")
    steps.add_argument("--lr_warmup_steps", type=int, default=0)
    steps.add_argument("--adam_beta1", type=float, default=0.8)
    steps.add_argument("--adam_beta2", type=float, default=0.99)
    steps.add_argument("--adam_weight_decay", type=float, default=0.0)
    steps.add_argument("--max_grad_norm", type=float, default=10.0, help="of the generator; 0 turns clipping off")
    steps.add_argument("--ema_decay", type=float, default=0.999, help="of the average of the generator that is saved")
    steps.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: accelerate's setting")
    steps.add_argument("--seed", type=int, default=0)
    steps.add_argument("--profile_steps", type=int, help="log where the time of the first so many steps goes")
    parser.set_defaults(gradient_accumulation_steps=1)

    add_checkpoint_arguments(parser)
    parser.set_defaults(checkpointing_steps=1000)

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_steps", type=int, default=1000, help="steps between copy syntheses")
    validation.add_argument("--num_validation_sounds", type=int, default=4, help="of them kept as WAV and PNG")

    reports = parser.add_argument_group("reports")
    reports.add_argument("--report_to", choices=("none", "tensorboard", "wandb"), default="none")

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path and (args.config or args.upsample_initial_channel):
        parser.error("--pretrained_model_name_or_path has its config: leave out --config, --upsample_initial_channel")
    check_arguments(
        parser,
        args,
        "upsample_initial_channel",
        "max_train_samples",
        "discriminator_channels",
        "pool_frames",
        "train_batch_size",
        "max_train_steps",
        "profile_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
    )
    if args.seed < 0:
        parser.error(f"--seed has to be at least 0, not {args.seed}")
    if not 0 <= args.proportion_reconstructed <= 1:
        parser.error(f"--proportion_reconstructed has to be between 0 and 1, not {args.proportion_reconstructed}")
    if args.num_noise_channels < 0:
        parser.error(f"--num_noise_channels has to be at least 0, not {args.num_noise_channels}")
    if not any((args.adversarial_weight, args.spectrogram_weight, args.mel_weight)):
        parser.error("--adversarial_weight, --spectrogram_weight and --mel_weight are all 0: nothing would be learnt")
    if args.train_decoder and not args.vae:
        parser.error("--train_decoder needs --vae")
    num_samples = args.num_segment_frames * MEL_HOP_LENGTH
    if min(args.stft_windows + args.periods) < 2 or max(args.stft_windows + [2048]) > num_samples:
        parser.error(
            f"--stft_windows {args.stft_windows} and at least 2048 samples have to fit into a segment, which has "
            f"{num_samples} samples, and --periods has to be at least 2"
        )
    return args


# Models


def load_vocoder(args):
    """The vocoder to start from, in float32."""
    if args.pretrained_model_name_or_path:
        vocoder = SpeechT5HifiGan.from_pretrained(args.pretrained_model_name_or_path, dtype=torch.float32)
    else:
        config = VOCODER_CONFIG | (json.loads(Path(args.config).read_text()) if args.config else {})
        config.setdefault("model_in_dim", NUM_MEL_BINS + args.num_noise_channels)
        if args.upsample_initial_channel:
            config["upsample_initial_channel"] = args.upsample_initial_channel
        torch.manual_seed(args.seed)  # of the random weights
        vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config))
        initialise(vocoder, args.num_noise_channels)
    config = vocoder.config
    wanted = (MEL_SAMPLING_RATE, NUM_MEL_BINS + args.num_noise_channels, MEL_HOP_LENGTH, False)
    came = (config.sampling_rate, config.model_in_dim, math.prod(config.upsample_rates), config.normalize_before)
    if came != wanted:
        raise ValueError(
            "the vocoder's sampling rate, `model_in_dim` (mel bins and --num_noise_channels), product of "
            f"`upsample_rates` and `normalize_before` have to be {wanted}, not {came}"
        )
    return vocoder


class Generator(nn.Module):
    """A `SpeechT5HifiGan`, run such that a step takes less time.

    The same function of the same weights: its convolutions run as 2-D ones on channels-last tensors, for which the
    CPU's kernels are faster, and nothing is kept twice for the backward pass. The last layer is always in float32:
    a waveform of 8 bits would hiss.

    With a `vae` it reads latents of segments with context, and its decoder is what comes first.
    """

    def __init__(self, vocoder, vae=None):
        super().__init__()
        self.vocoder, self.vae = vocoder, vae

    def forward(self, mel, noise):
        """(batch, num_frames, num_mel_bins), or latents of them with context, and (batch, num_frames, channels) of
        noise, to waveforms (batch, num_frames * hop) and the mel spectrograms they are of."""
        if self.vae is not None:
            mel = without_context(self.vae.decode(mel).sample[:, 0].float())
        return self.vocode(torch.cat([mel, noise], dim=2)), mel

    def vocode(self, inputs):
        vocoder, slope = self.vocoder, self.vocoder.config.leaky_relu_slope
        hidden = inputs.transpose(1, 2).unsqueeze(2).to(memory_format=torch.channels_last)  # (batch, bins, 1, frames)
        hidden = conv(vocoder.conv_pre, hidden)
        for i, upsampler in enumerate(vocoder.upsampler):
            hidden = F.conv_transpose2d(
                F.leaky_relu(hidden, slope),
                upsampler.weight.unsqueeze(2),
                upsampler.bias,
                stride=(1, upsampler.stride[0]),
                padding=(0, upsampler.padding[0]),
            )  # (batch, channels, 1, time)
            total = 0
            for block in vocoder.resblocks[i * vocoder.num_kernels : (i + 1) * vocoder.num_kernels]:
                state = hidden
                for conv1, conv2 in zip(block.convs1, block.convs2):
                    branch = F.leaky_relu_(conv(conv1, F.leaky_relu(state, slope)), slope)
                    state = conv(conv2, branch).add_(state)
                total = total + state
            hidden = total / vocoder.num_kernels
        with torch.autocast(inputs.device.type, enabled=False):
            waveform = conv(vocoder.conv_post, F.leaky_relu(hidden.float())).tanh()[:, 0, 0]  # (batch, time)
        return waveform[:, : inputs.shape[1] * MEL_HOP_LENGTH]  # the pipeline cuts the 32 samples at the end too


def conv(layer, hidden):
    """A 1-D convolution of (batch, channels, 1, time)."""
    return F.conv2d(
        hidden,
        layer.weight.unsqueeze(2),
        layer.bias,
        padding=(0, layer.padding[0]),
        dilation=(1, layer.dilation[0]),
    )


def compressed_spectrum(waveform, window_length):
    """Complex STFT with its amplitudes to the power 0.3, smooth at 0: (batch, 2, num_frames, num_bins).

    The compression makes quiet partials and noise count beside loud ones, as they do for the ear.
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


class Discriminator(nn.Module):
    """Tells recordings from made waveforms by a picture of them, which `picture_of` draws. Returns the feature maps of
    its layers; the last one is the score of each place, positive for a recording."""

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
    def __init__(self, args):
        super().__init__()
        channels = args.discriminator_channels
        self.each = nn.ModuleList([SpectrogramDiscriminator(window, channels) for window in args.stft_windows])
        self.each.extend(PeriodDiscriminator(period, channels) for period in args.periods)

    def forward(self, waveform):
        """A list of feature maps for each discriminator."""
        return [discriminator(waveform) for discriminator in self.each]


# Losses


def mel_loss(made, waveform):
    """Mean absolute difference of the log-mel spectrograms."""
    return F.l1_loss(log_mel_spectrogram(made), log_mel_spectrogram(waveform))


def discriminator_loss(real, made):
    """Hinge loss (Lim and Ye 2017, arXiv 1705.02894), summed over the discriminators."""
    return sum((F.relu(1 - r[-1]).mean() + F.relu(1 + m[-1]).mean()) for r, m in zip(real, made))


def adversarial_loss(made):
    return -sum(features[-1].mean() for features in made)


def energy_distance(distance, real, first, second):
    """Energy distance of what was made to what was recorded, but for a constant, from two sounds made of one input.

    `2 E d(made, real) - E d(made, made')` is least where the made ones are distributed as the real ones, if `d` is a
    sum of Euclidean norms: being in the middle of all that could be does not pay, as it does for `E d(made, real)`.
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
        result.append((window / window.square().sum().sqrt(), filters))  # white noise is as loud in each
    return result


def spectra(waveform):
    """Four pictures for each window of 8 to 128 ms: logarithms of mean magnitudes in mel bands, (batch, num_bands,
    num_frames), since single bins of noise say little about the noise; the compressed complex spectrum,
    (batch, 2, num_frames, num_bins), in which a sound that is made alike each time is nowhere near its like; and how
    rough the waveform is, that is by how much the mean over all bands, or over each eight, and its change from frame
    to frame deviate in time, (batch, 1, 2 * num_means), if there are three frames.

    The roughness is there because the norms of many bands hardly tell whether they rise and fall together. In noise
    they do not; where they do it is heard as grains.
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
    """Mean absolute difference of feature maps, each in units of its mean, or deep maps would hardly count.

    Source: EnCodec (Defossez et al. 2022, arXiv 2210.13438), section 3.4.
    """
    maps = [pair for maps_a, maps_b in zip(a, b) for pair in zip(maps_a[:-1], maps_b[:-1])]
    return sum(F.l1_loss(x, y) / (y.detach().abs().mean() + 1e-5) for x, y in maps) / len(maps)


# Data


class Segments(Dataset):
    """Random parts of sounds held in memory. Items are asked for by `(epoch, index)`, on which alone they depend.

    A sound has the level that the VAE was trained on (peak 0.5), reflected context before its start and silence after
    its end, for sounds in a pipeline end in it. A quiet segment is made louder by a random part of what brings its
    peak to 0.5, but for no more than `MAX_GAIN_DB`.

    An item holds `waveform`, of shape `((num_frames + 2 * NUM_CONTEXT_FRAMES) * hop,)`, `index` and `epoch`.
    """

    def __init__(self, clips, num_frames, seed):
        self.num_context = NUM_CONTEXT_FRAMES * MEL_HOP_LENGTH
        self.num_samples = num_frames * MEL_HOP_LENGTH
        self.seed = seed
        self.waveforms = []
        for clip in tqdm(clips, desc="reading", unit="clip", disable=None):
            waveform = read_clip(clip)
            num_after = max(self.num_samples // 2, self.num_samples - len(waveform)) + self.num_context
            waveform = F.pad(waveform[None], (self.num_context, 0), mode="reflect")[0]
            self.waveforms.append(F.pad(waveform, (0, num_after)))

    def __len__(self):
        return len(self.waveforms)

    def __getitem__(self, key):
        epoch, index = key
        waveform = self.waveforms[index]
        length = self.num_samples + 2 * self.num_context
        generator = keyed_generator(self.seed, SEGMENTS, epoch, index)
        start = int(torch.randint(len(waveform) - length + 1, (), generator=generator))
        waveform = waveform[start : start + length]
        if not is_silent(waveform):
            headroom_db = -20 * math.log10(2 * waveform.abs().max())
            gain_db = min(headroom_db, MAX_GAIN_DB) * float(torch.rand((), generator=generator))
            waveform = waveform * 10 ** (gain_db / 20)
        return {"waveform": waveform, "index": index, "epoch": epoch}


def read_clip(clip):
    """The whole sound with peak 0.5, and at least as long as the context that is reflected before it."""
    waveform = read_waveform(clip, MEL_SAMPLING_RATE)
    return normalise(waveform, max(len(waveform), NUM_CONTEXT_FRAMES * MEL_HOP_LENGTH + 1))


@torch.no_grad()
def reconstruct(vae, mel, generators):
    """Mel spectrograms through the VAE, by a sample of the posterior with one generator each."""
    num_frames = mel.shape[1]
    mel = F.pad(mel.transpose(1, 2), (0, -num_frames % vae_factor(vae)), mode="replicate").transpose(1, 2)
    posterior = vae.encode(mel.unsqueeze(1)).latent_dist
    return vae.decode(draw_latents(posterior, generators)).sample[:, 0, :num_frames]


def draw_latents(posterior, generators):
    """A sample of the posterior with one generator each; not scaled."""
    return posterior.mean + posterior.std * sample_noise(posterior.mean.shape, generators, posterior.mean.device)


def without_context(mel):
    return mel[:, NUM_CONTEXT_FRAMES:-NUM_CONTEXT_FRAMES]


def inputs_of(args, vae, batch, device):
    """What the generator reads of a batch of segments, and the waveforms `(batch, num_frames * hop)` and mel
    spectrograms `(batch, num_frames, num_mel_bins)` that belong to it.

    The generator reads two mel spectrograms of each segment, `(2 * batch, num_frames, num_mel_bins)`, first all of one
    draw, and noise `(2 * batch, num_frames, num_noise_channels)`. The two differ by the noise, and by the draw of the
    posterior where they went through the VAE. With `--train_decoder` it reads latents instead, with context.
    """
    waveform = torch.stack(batch["waveform"]).to(device)
    keys = list(zip(batch["epoch"], batch["index"]))
    recorded = log_mel_spectrogram(waveform)
    num_context = NUM_CONTEXT_FRAMES * MEL_HOP_LENGTH
    targets = waveform[:, num_context:-num_context], without_context(recorded)
    generators = [keyed_generator(args.seed, NOISE, *key) for key in keys]
    shape = (len(keys), args.num_segment_frames, args.num_noise_channels)
    noise = torch.cat([sample_noise(shape, generators, device) for _ in range(2)])
    generators = [keyed_generator(args.seed, RECONSTRUCTION, *key) for key in keys]
    if args.train_decoder:
        with torch.no_grad():
            posterior = vae.encode(recorded.unsqueeze(1)).latent_dist
            return torch.cat([draw_latents(posterior, generators) for _ in range(2)]), noise, *targets
    draws = [recorded.clone() for _ in range(2)]
    if vae is not None:
        chosen = torch.stack([torch.rand((), generator=each) for each in generators]) < args.proportion_reconstructed
        rows = chosen.nonzero()[:, 0].tolist()
        for mel in draws if rows else ():
            mel[rows] = reconstruct(vae, recorded[rows], [generators[row] for row in rows])
    return without_context(torch.cat(draws)), noise, *targets


# Validation and results


@torch.no_grad()
def copy_synthesis(vocoder, mel, noise, waveform):
    """Vocode `mel` and compare with the recording, all of batch size 1.

    Returns:
        The waveform made, the mean absolute error of its log-mel spectrogram, and that of its log magnitudes, mean
        over STFTs of 2048, 512 and 128 samples. Two draws of one noise already differ
        in the latter by ln 2 on average (half the mean of a standard logistic variable's absolute value).
    """
    made = vocoder(torch.cat([mel, noise], dim=2))[:, : waveform.shape[1]]
    errors = []
    for length in (2048, 512, 128):
        window = torch.hann_window(length, device=waveform.device)
        logs = [
            torch.stft(each, length, length // 4, window=window, pad_mode="constant", return_complex=True)
            .abs()
            .clamp(min=1e-3)
            .log()
            for each in (made, waveform)
        ]
        errors.append(float(F.l1_loss(*logs)))
    return made, float(mel_loss(made, waveform)), sum(errors) / len(errors)


def validate(args, accelerator, vocoder, vae, waveforms, step):
    """Mean errors of copy synthesis over the held-out clips, with and without the VAE; some as WAV and PNG in
    `samples/step-<step>`."""
    folder = Path(args.output_dir) / "samples" / f"step-{step}"
    num_sounds = min(args.num_validation_sounds, len(waveforms))
    kept = {len(waveforms) * i // num_sounds for i in range(num_sounds)}
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    indices = range(accelerator.process_index, len(waveforms), accelerator.num_processes)
    for index in tqdm(indices, desc="validation", leave=False, disable=not accelerator.is_local_main_process):
        waveform = waveforms[index][None].to(accelerator.device)
        mels = {"": log_mel_spectrogram(waveform)}
        generators = [keyed_generator(args.seed, VALIDATION, index)]
        if vae is not None:
            mels["-reconstructed"] = reconstruct(vae, mels[""], generators)
        figures = []
        for name, mel in mels.items():
            noise = sample_noise((*mel.shape[:2], args.num_noise_channels), generators, mel.device)
            made, *errors = copy_synthesis(vocoder, mel, noise, waveform)
            figures += errors
            if index in kept:
                keep_sound(folder, f"{index}{name}", made[0].cpu().numpy())
        if index in kept:
            keep_sound(folder, f"{index}-recording", waveform[0].cpu().numpy())
        sums += torch.tensor([1.0, *figures, *[0.0] * (4 - len(figures))], device=sums.device)
    sums = accelerator.reduce(sums, reduction="sum").tolist()
    names = ("mel_error", "stft_error", "reconstructed_mel_error", "reconstructed_stft_error")
    return {name: value / sums[0] for name, value in zip(names[: 4 if vae is not None else 2], sums[1:])}


def keep_sound(folder, name, audio):
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.wav", encode_wav(audio, MEL_SAMPLING_RATE))
    try:
        write_atomically(folder / f"{name}.png", draw_spectrogram(audio, MEL_SAMPLING_RATE, name))
    except ImportError:
        logger.warning('no pictures without matplotlib: pip install "pipeline-tango[demo]"')


def save_result(args, vocoder, vae, summary):
    """The vocoder with a card as `output_dir/model`, and a trained VAE as `output_dir/vae`."""
    data = ModelCardData(library_name="transformers", pipeline_tag="audio-to-audio", tags=["vocoder", "hifigan"])
    flags = "\n".join(f"    --{name} {value}" for name, value in sorted(vars(args).items()) if value not in (None, []))
    figures = "\n".join(f"- {name}: {value}" for name, value in summary.items())
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(args.output_dir).resolve().name}\n\nA vocoder for 64-bin log-mel "
        "spectrograms at 16 kHz, trained with `training.train_vocoder` of pipeline-tango.\n\n```python\nfrom "
        'transformers import SpeechT5HifiGan\n\nvocoder = SpeechT5HifiGan.from_pretrained("THIS_FOLDER_OR_REPO")\n'
        f"```\n\n## Figures\n\n{figures}\n\n## Flags\n\n{flags}\n"
    )
    with replacing(Path(args.output_dir) / "model") as folder:
        vocoder.save_pretrained(folder)
        ModelCard(text).save(folder / "README.md")
    if args.train_decoder:
        with replacing(Path(args.output_dir) / "vae") as folder:
            vae.save_pretrained(folder)


def train(args):
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / "logs")),
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("two small models train in turn here, which FSDP and DeepSpeed have no use for")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("`--mixed_precision` has to be no or bf16: gradients of the quietest sounds overflow in fp16")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop_requested = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.append(True))
    device = accelerator.device

    # 1. Models
    vocoder = load_vocoder(args)
    vae = None
    if args.vae:
        vae = AutoencoderKL.from_pretrained(args.vae).to(device).eval().requires_grad_(False)
        factor = vae_factor(vae)
        if args.train_decoder and (args.num_segment_frames + 2 * NUM_CONTEXT_FRAMES) % factor:
            raise ValueError(
                f"`--num_segment_frames` {args.num_segment_frames} and {2 * NUM_CONTEXT_FRAMES} of context are no "
                f"multiple of the VAE's {factor}"
            )
        if args.train_decoder:
            vae.decoder.requires_grad_(True)
            if vae.post_quant_conv is not None:
                vae.post_quant_conv.requires_grad_(True)
    torch.manual_seed(keyed_generator(args.seed).initial_seed())  # not the vocoder's weights again
    generator, discriminators = Generator(vocoder, vae if args.train_decoder else None), Discriminators(args)
    if args.discriminators:
        try:
            discriminators.load_state_dict(load_file(args.discriminators))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"`--discriminators` {args.discriminators} does not fit: {error}") from None
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
    accelerator.wait_for_everyone()

    # 2. Data
    train_clips, validation_clips = prepare_clips(args, accelerator)
    dataset = Segments(train_clips, args.num_segment_frames, args.seed)
    validation_waveforms = [read_clip(clip) for clip in validation_clips]

    # 3. Optimizers and schedules
    options = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "fused": True,
    }
    generator_optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, **options)
    discriminator_optimizer = torch.optim.AdamW(
        discriminators.parameters(), lr=args.discriminator_learning_rate, **options
    )
    lr_schedulers = [
        get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
        for optimizer in (generator_optimizer, discriminator_optimizer)
    ]
    generator, discriminators, generator_optimizer, discriminator_optimizer = accelerator.prepare(
        generator, discriminators, generator_optimizer, discriminator_optimizer
    )
    # the generator's step needs gradients of the discriminators' input only, which DDP has no part in
    judges = accelerator.unwrap_model(discriminators)
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=True)
    ema.to(device)
    accelerator.register_for_checkpointing(ema, *lr_schedulers)  # stepped by hand

    settings = {
        name: getattr(args, name)
        for name in ("seed", "train_batch_size", "num_segment_frames", "max_train_steps", "mixed_precision")
    } | {"num_clips": len(train_clips), "num_processes": accelerator.num_processes}
    first_step = load_checkpoint(args, accelerator, settings)
    log = Log(output_dir / "log.jsonl", first_step, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers("pipeline-tango", config={k: str(v) for k, v in vars(args).items()})
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(train_clips), args, accelerator, first_step, args.max_train_steps),
        collate_fn=list_of_items,
    )
    hours = sum(map(len, dataset.waveforms)) / MEL_SAMPLING_RATE / 3600
    logger.info(
        f"training a vocoder of {sum(map(torch.Tensor.numel, parameters)):,} parameters against "
        f"{sum(map(torch.Tensor.numel, judges.parameters())):,} on {device}, {accelerator.num_processes} process(es)"
    )
    logger.info(
        f"data: {len(train_clips)} clips, {hours:.2f} h; validation: {len(validation_clips)}; steps "
        f"{first_step} to {args.max_train_steps}"
    )

    # 4. The loop
    step, errors = first_step, {}
    started = time.monotonic()
    profiler = None
    if args.profile_steps:
        profiler = torch.profiler.profile()
        profiler.start()
    bar = tqdm(
        total=args.max_train_steps,
        initial=first_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for batch in loader:
        inputs, noise, waveform, recorded = inputs_of(args, vae, batch, device)
        made, mel = generator(inputs, noise)
        figures, loss = {}, 0.0
        if args.adversarial_weight:
            # discriminators first, on recorded and made ones in one pass
            judged = discriminators(torch.cat([waveform, made.detach()]))
            sizes = [len(waveform), len(made)]
            real, fake = ([[m.split(sizes)[part] for m in maps] for maps in judged] for part in (0, 1))
            figures["discriminator_loss"] = discriminator_loss(real, fake)
            accelerator.backward(figures["discriminator_loss"])
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()

            judges.requires_grad_(False)
            fake = judges(made)
            figures["adversarial_loss"] = adversarial_loss(fake)
            loss = args.adversarial_weight * figures["adversarial_loss"]
            if args.feature_weight:
                with torch.no_grad():
                    real = judges(waveform)
                halves = ([[m.chunk(2)[half] for m in maps] for maps in fake] for half in (0, 1))
                figures["feature_loss"] = energy_distance(feature_distance, real, *halves)
                loss = loss + args.feature_weight * figures["feature_loss"]
            judges.requires_grad_(True)
        first, second = made.chunk(2)
        with torch.no_grad():
            figures["mel_error"] = mel_loss(first, waveform)
        if args.mel_weight:
            figures["mel_loss"] = energy_distance(mel_loss, waveform, first, second)
            loss = loss + args.mel_weight * figures["mel_loss"]
        if args.spectrogram_weight:
            pictures = map(spectra, (waveform, first, second))
            figures["spectrogram_loss"] = energy_distance(spectral_distance, *pictures)
            loss = loss + args.spectrogram_weight * figures["spectrogram_loss"]
        if args.train_decoder:
            figures["decoder_loss"] = energy_distance(
                lambda a, b: reconstruction_error((a - b).unsqueeze(1), args.pool_frames), recorded, *mel.chunk(2)
            )
            loss = loss + args.decoder_weight * figures["decoder_loss"]
        accelerator.backward(loss)
        if args.max_grad_norm:
            figures["grad_norm"] = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        generator_optimizer.step()
        generator_optimizer.zero_grad()

        step += 1
        learning_rate = generator_optimizer.param_groups[0]["lr"]  # the one that this step used
        for lr_scheduler in lr_schedulers:
            lr_scheduler.step()
        ema.step(parameters)
        values = accelerator.reduce(torch.stack([value.detach() for value in figures.values()]), reduction="mean")
        values = dict(zip(figures, values.tolist()))
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}: lower --learning_rate")
        log.write(step, **values, lr=learning_rate)
        bar.update()
        bar.set_postfix(mel_error=f"{values['mel_error']:.3f}", grad_norm=f"{values.get('grad_norm', 0):.0f}")
        if profiler is not None and step == first_step + args.profile_steps:
            profiler.stop()
            logger.info("\n" + profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

        last = step == args.max_train_steps
        if step % args.validation_steps == 0 or last:
            ema.store(parameters)
            ema.copy_to(parameters)
            if validation_waveforms:
                errors = validate(args, accelerator, vocoder, vae, validation_waveforms, step)
                log.write(step, **{f"validation_{name}": value for name, value in errors.items()})
                logger.info(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in errors.items()))
            summary = {
                "steps": step,
                "clips": len(train_clips),
                "hours of sound": f"{hours:.2f}",
                "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
            }
            summary |= {f"held-out {name.replace('_', ' ')}": f"{value:.4f}" for name, value in errors.items()}
            if accelerator.is_main_process:
                save_result(args, vocoder, vae, summary)
            ema.restore(parameters)
            accelerator.wait_for_everyone()

        stop = bool(stop_requested)
        if accelerator.num_processes > 1:
            stop = bool(accelerator.reduce(torch.tensor(float(stop), device=device), reduction="sum") > 0)
        if step % args.checkpointing_steps == 0 or stop or last:
            save_checkpoint(args, accelerator, step, settings)
        if stop and not last:
            bar.close()
            logger.info(
                f"stopped at step {step} of {args.max_train_steps}; go on with --resume_from_checkpoint latest"
            )
            break
    bar.close()
    accelerator.wait_for_everyone()  # or a process may hang that leaves while another is still at work
    accelerator.end_training()
    return 0


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
