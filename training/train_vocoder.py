"""Train a HiFi-GAN vocoder: `accelerate launch -m training.train_vocoder --train_manifest M --output_dir OUT`.

The result, `OUT/model`, is a transformers `SpeechT5HifiGan` for the mel spectrograms of `log_mel_spectrogram`. As in
`training.train` everything random is drawn from keyed generators, so a run that was killed and resumed is bitwise
equal to an unbroken one.

The phases of noise-like sounds do not follow from their spectrogram. A network trained by a distance to the recording
converges to an average of all waveforms that fit, with one click a frame, which is heard as a buzz. So the vocoder
reads channels of noise beside the mel bands, starts as a noise vocoder (`training.noise_vocoder`), and generates two
waveforms of each segment; the losses want these two as far from each other as from the recording (`energy_distance`).
Discriminators can be added.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.flags import COUNT, FRACTION, INDEX, NOT_NEGATIVE
from pipeline_tango.mel import MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS

from .arguments import (
    add_checkpoint_arguments,
    add_data_arguments,
    add_pool_argument,
    add_report_arguments,
    add_schedule_arguments,
    build_parser,
    check_arguments,
    check_libraries,
    clip_sources,
)
from .batches import keyed_generator, shared_indices, step_loader
from .data import is_silent, normalise, prepare_clips, read_waveform
from .latents import draw_latents, vae_factor
from .model_card import base_model, write_card
from .noise_vocoder import initialise
from .objective import reconstruction_error, sample_noise
from .run import (
    averaged,
    catch_sigterm,
    end,
    load_checkpoint,
    make_ema,
    mean_figures,
    open_log,
    progress_bar,
    replacing,
    run,
    save_checkpoint,
    shards_weights,
    start,
    stop_early,
    stop_requested,
    write_sound,
)
from .vocoder_losses import (
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    energy_distance,
    feature_distance,
    mel_loss,
    spectra,
    spectral_distance,
)


logger = get_logger(__name__)

# the released vocoder's, but half as wide and with the smallest of its kernels: 4.3 million parameters
VOCODER_CONFIG = {
    "sampling_rate": MEL_SAMPLING_RATE,
    "upsample_initial_channel": 512,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernel_sizes": [16, 16, 8, 4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
    "normalize_before": False,
}
NUM_CONTEXT_FRAMES = 8  # on each side of a segment: for its mel windows and the VAE's receptive field
MAX_GAIN_DB = 20  # of a quiet segment
# what is drawn: after the seed the first number of a generator's key
SEGMENTS, RECONSTRUCTION, VALIDATION, NOISE = range(4, 8)


def parse_args(argv=None):
    parser = build_parser(__spec__.name, "Train or fine-tune a HiFi-GAN vocoder on sounds.")
    start = parser.add_argument_group("start", "a noise vocoder, unless another one is given")
    start.add_argument("--pretrained_model_name_or_path", help="vocoder to fine-tune: folder or Hub repo")
    start.add_argument(
        "--config",
        help="JSON file with arguments of SpeechT5HifiGanConfig that differ from the default's (default: 4.3 million "
        "parameters)",
    )
    start.add_argument(
        "--upsample_initial_channel", type=COUNT, help="channels of the first layer, instead of a --config"
    )
    start.add_argument(
        "--num_noise_channels",
        type=INDEX,
        default=96,
        help="input channels of white noise beside the mel bands; a pipeline with this vocoder needs the same number "
        "as its `num_noise_channels`. 0 gives a plain HiFi-GAN",
    )
    start.add_argument("--discriminators", help="start from those of an earlier run, CHECKPOINT/model_1.safetensors")

    data = add_data_arguments(parser, "all sounds are kept in memory: 230 MB an hour")
    data.add_argument("--caption_column", help="column of the caption, which must be there (default: by convention)")
    data.add_argument("--num_workers", type=INDEX, default=2, help="threads that read sounds at the start")
    data.add_argument("--num_segment_frames", type=COUNT, default=48, help="length of a segment, in frames of 10 ms")
    data.add_argument("--vae", help="folder of an AutoencoderKL whose reconstructions to train on")
    data.add_argument(
        "--proportion_reconstructed",
        type=FRACTION,
        default=0.5,
        help="share of mel spectrograms that go through --vae",
    )
    data.add_argument(
        "--train_decoder",
        action="store_true",
        help="train the decoder of --vae together with the vocoder, on reconstructions only; the encoder, and with it "
        "all latents, does not change. The result is OUT/vae",
    )

    objective = parser.add_argument_group("objective", "weights of the generator's losses, which are energy distances")
    objective.add_argument(
        "--spectrogram_weight", type=NOT_NEGATIVE, default=1.0, help="of magnitude and complex spectra"
    )
    objective.add_argument(
        "--adversarial_weight",
        type=NOT_NEGATIVE,
        default=0.0,
        help="of the hinge loss; 0 leaves the discriminators out",
    )
    objective.add_argument("--mel_weight", type=NOT_NEGATIVE, default=0.0, help="of log-mel spectrograms")
    objective.add_argument("--feature_weight", type=NOT_NEGATIVE, default=0.0, help="of the discriminators' features")
    objective.add_argument("--decoder_weight", type=NOT_NEGATIVE, default=5.0, help="of the decoder's spectrograms")
    add_pool_argument(objective)
    objective.add_argument(
        "--stft_windows",
        type=COUNT,
        nargs="+",
        default=[2048, 512, 128],
        help="a spectrogram discriminator for each, in samples",
    )
    objective.add_argument(
        "--periods", type=COUNT, nargs="*", default=[], help="a period discriminator for each; 2 3 5 7 11 are usual"
    )
    objective.add_argument("--discriminator_channels", type=COUNT, default=16, help="channels of their first layer")

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--train_batch_size", type=COUNT, default=8, help="segments per process and step")
    steps.add_argument("--max_train_steps", type=COUNT, default=100000, help="length of the run")
    add_schedule_arguments(steps)
    steps.add_argument(
        "--discriminator_learning_rate", type=NOT_NEGATIVE, default=2e-4, help="at 5e-4 they win too early"
    )
    steps.add_argument(
        "--ema_decay", type=FRACTION, default=0.999, help="decay of the moving average, which is what is saved"
    )
    steps.add_argument("--mixed_precision", choices=("no", "bf16"), help="autocast (default: accelerate's setting)")
    steps.add_argument("--profile_steps", type=COUNT, help="profile so many steps and log the table")
    parser.set_defaults(learning_rate=1e-4, lr_scheduler="cosine", adam_beta1=0.8, adam_beta2=0.99)
    parser.set_defaults(adam_weight_decay=0.0, max_grad_norm=10.0, gradient_accumulation_steps=1)

    add_checkpoint_arguments(parser)
    parser.set_defaults(checkpointing_steps=1000)

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_steps", type=COUNT, default=1000, help="steps between copy syntheses")
    validation.add_argument(
        "--num_validation_sounds", type=INDEX, default=4, help="copy syntheses kept as WAV and PNG"
    )

    add_report_arguments(parser)

    args = parser.parse_args(argv)
    if args.pretrained_model_name_or_path and (args.config or args.upsample_initial_channel):
        parser.error("--pretrained_model_name_or_path has its config: leave out --config, --upsample_initial_channel")
    check_arguments(parser, args)
    if not any((args.adversarial_weight, args.spectrogram_weight, args.mel_weight)):
        parser.error("--adversarial_weight, --spectrogram_weight and --mel_weight are all 0: nothing would train")
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


def load_vocoder(pretrained_model_name_or_path, config, upsample_initial_channel, num_noise_channels, seed):
    """The vocoder to start from, in float32: a pretrained one, or a noise vocoder.

    Args:
        config (`str` or None): JSON file of what differs from `VOCODER_CONFIG`.
    """
    if pretrained_model_name_or_path:
        vocoder = SpeechT5HifiGan.from_pretrained(pretrained_model_name_or_path, dtype=torch.float32)
    else:
        config = VOCODER_CONFIG | (json.loads(Path(config).read_text()) if config else {})
        config.setdefault("model_in_dim", NUM_MEL_BINS + num_noise_channels)
        if upsample_initial_channel:
            config["upsample_initial_channel"] = upsample_initial_channel
        torch.manual_seed(seed)  # of the random weights
        vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config))
        initialise(vocoder, num_noise_channels)
    config = vocoder.config
    wanted = (MEL_SAMPLING_RATE, NUM_MEL_BINS + num_noise_channels, MEL_HOP_LENGTH, False)
    came = (config.sampling_rate, config.model_in_dim, math.prod(config.upsample_rates), config.normalize_before)
    if came != wanted:
        raise ValueError(
            "the vocoder's sampling rate, `model_in_dim` (mel bins and --num_noise_channels), product of "
            f"`upsample_rates` and `normalize_before` have to be {wanted}, not {came}"
        )
    return vocoder


def load_vae(path, train_decoder, num_segment_frames):
    """The VAE whose reconstructions the vocoder trains on, frozen but for its decoder if that trains too."""
    vae = AutoencoderKL.from_pretrained(path).eval().requires_grad_(False)
    factor = vae_factor(vae)
    if train_decoder and (num_segment_frames + 2 * NUM_CONTEXT_FRAMES) % factor:
        raise ValueError(
            f"`--num_segment_frames` {num_segment_frames} and {2 * NUM_CONTEXT_FRAMES} of context are no "
            f"multiple of the VAE's {factor}"
        )
    if train_decoder:
        vae.decoder.requires_grad_(True)
        if vae.post_quant_conv is not None:
            vae.post_quant_conv.requires_grad_(True)
    return vae


def load_discriminators(path, stft_windows, periods, channels):
    """Discriminators of random weights, or those that an earlier run saved as `path`."""
    discriminators = Discriminators(stft_windows, periods, channels)
    if path:
        try:
            discriminators.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"`--discriminators` {path} does not fit: {error}") from None
    return discriminators


class Generator(nn.Module):
    """A `SpeechT5HifiGan` with a faster forward and backward pass.

    The same function of the same weights: convolutions run as 2-D ones on channels-last tensors, for which CPU
    kernels are faster, and no activation is stored twice. The last layer is always in float32: bfloat16 has 8
    significant bits, and a waveform of 8 bits hisses.

    With a `vae` it reads latents of segments with context, which the VAE's decoder turns into mel spectrograms first.
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
        return waveform[:, : inputs.shape[1] * MEL_HOP_LENGTH]  # the pipeline cuts the 32 extra samples too


def conv(layer, hidden):
    """A 1-D convolution of (batch, channels, 1, time)."""
    return F.conv2d(
        hidden,
        layer.weight.unsqueeze(2),
        layer.bias,
        padding=(0, layer.padding[0]),
        dilation=(1, layer.dilation[0]),
    )


# Data


class Segments(Dataset):
    """Random parts of sounds held in memory. Items are asked for by `(epoch, index)`, on which alone they depend.

    A sound has the level that the VAE was trained on (peak 0.5), reflection padding before its start and silence after
    its end, as sounds in a pipeline do. A quiet segment is amplified by a random share, in decibels, of what would
    bring its peak to 0.5, or of `MAX_GAIN_DB` if that is less.

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
    """The whole sound with peak 0.5, and long enough for the reflection padding before it."""
    waveform = read_waveform(clip, MEL_SAMPLING_RATE)
    return normalise(waveform, max(len(waveform), NUM_CONTEXT_FRAMES * MEL_HOP_LENGTH + 1))


@torch.no_grad()
def reconstruct(vae, mel, generators):
    """Reconstructions of mel spectrograms by the VAE, from a sample of the posterior with one generator each."""
    num_frames = mel.shape[1]
    mel = F.pad(mel.transpose(1, 2), (0, -num_frames % vae_factor(vae)), mode="replicate").transpose(1, 2)
    posterior = vae.encode(mel.unsqueeze(1)).latent_dist
    return vae.decode(draw_latents(posterior, generators)).sample[:, 0, :num_frames]


def without_context(mel):
    return mel[:, NUM_CONTEXT_FRAMES:-NUM_CONTEXT_FRAMES]


def inputs_of(batch, vae, device, *, seed, num_noise_channels, proportion_reconstructed=0.0, train_decoder=False):
    """What the generator reads of a batch of segments, and the waveforms `(batch, num_frames * hop)` and mel
    spectrograms `(batch, num_frames, num_mel_bins)` that belong to it.

    The generator reads two mel spectrograms of each segment, `(2 * batch, num_frames, num_mel_bins)`, first all of one
    draw, and noise `(2 * batch, num_frames, num_noise_channels)`. The two differ in the noise, and in the sample of
    the posterior where they are reconstructions of the VAE. With `train_decoder` it reads latents instead, with
    context.
    """
    waveform = torch.stack(batch["waveform"]).to(device)
    keys = list(zip(batch["epoch"], batch["index"]))
    recorded = log_mel_spectrogram(waveform)
    num_context = NUM_CONTEXT_FRAMES * MEL_HOP_LENGTH
    targets = waveform[:, num_context:-num_context], without_context(recorded)
    generators = [keyed_generator(seed, NOISE, *key) for key in keys]
    shape = (*targets[1].shape[:2], num_noise_channels)
    noise = torch.cat([sample_noise(shape, generators, device) for _ in range(2)])
    generators = [keyed_generator(seed, RECONSTRUCTION, *key) for key in keys]
    if train_decoder:
        with torch.no_grad():
            posterior = vae.encode(recorded.unsqueeze(1)).latent_dist
            return torch.cat([draw_latents(posterior, generators) for _ in range(2)]), noise, *targets
    draws = [recorded.clone() for _ in range(2)]
    if vae is not None:
        chosen = torch.stack([torch.rand((), generator=each) for each in generators]) < proportion_reconstructed
        rows = chosen.nonzero()[:, 0].tolist()
        for mel in draws if rows else ():
            mel[rows] = reconstruct(vae, recorded[rows], [generators[row] for row in rows])
    return without_context(torch.cat(draws)), noise, *targets


# Validation and results


@torch.no_grad()
def copy_synthesis(vocoder, mel, noise, waveform):
    """Vocode `mel` and compare with the recording, all of batch size 1.

    Returns:
        The generated waveform, the mean absolute error of its log-mel spectrogram, and that of its log magnitudes,
        mean over STFTs of 2048, 512 and 128 samples. Two draws of one noise already differ in the latter by ln 2 on
        average (half the mean of a standard logistic variable's absolute value).
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


def validate(accelerator, vocoder, vae, waveforms, folder, num_sounds, seed):
    """Mean errors of copy synthesis over the held-out clips, with and without the VAE; `num_sounds` of them are kept
    in `folder` with their recordings."""
    num_noise_channels = vocoder.config.model_in_dim - NUM_MEL_BINS
    num_sounds = min(num_sounds, len(waveforms))
    kept = {len(waveforms) * i // num_sounds for i in range(num_sounds)}
    sums = torch.zeros(5, dtype=torch.float64, device=accelerator.device)
    for index in shared_indices(accelerator, len(waveforms), "validation"):
        waveform = waveforms[index][None].to(accelerator.device)
        mels = {"": log_mel_spectrogram(waveform)}
        generators = [keyed_generator(seed, VALIDATION, index)]
        if vae is not None:
            mels["-reconstructed"] = reconstruct(vae, mels[""], generators)
        figures, sounds = [], {"-recording": waveform}
        for name, mel in mels.items():
            noise = sample_noise((*mel.shape[:2], num_noise_channels), generators, mel.device)
            sounds[name], *errors = copy_synthesis(vocoder, mel, noise, waveform)
            figures += errors
        for name, sound in sounds.items() if index in kept else ():
            write_sound(folder, f"{index}{name}", sound[0].cpu().numpy(), MEL_SAMPLING_RATE, f"{index}{name}")
        sums += torch.tensor([1.0, *figures, *[0.0] * (4 - len(figures))], device=sums.device)
    sums = accelerator.reduce(sums, reduction="sum").tolist()
    names = ("mel_error", "stft_error", "reconstructed_mel_error", "reconstructed_stft_error")
    return {name: value / sums[0] for name, value in zip(names[: 4 if vae is not None else 2], sums[1:])}


def save_result(args, vocoder, vae, summary):
    """The vocoder with a card as `output_dir/model`, and a trained VAE as `output_dir/vae`."""
    with replacing(Path(args.output_dir) / "model") as folder:
        vocoder.save_pretrained(folder)
        write_card(
            folder,
            args,
            {"library_name": "transformers", "pipeline_tag": "audio-to-audio", "tags": ["vocoder", "hifigan"]}
            | base_model(args.pretrained_model_name_or_path),
            "A vocoder for 64-bin log-mel spectrograms at 16 kHz, trained with `training.train_vocoder` of "
            "pipeline-tango.",
            "from transformers import SpeechT5HifiGan\n\n"
            'vocoder = SpeechT5HifiGan.from_pretrained("THIS_FOLDER_OR_REPO")',
            summary,
        )
    if args.train_decoder:
        with replacing(Path(args.output_dir) / "vae") as folder:
            vae.save_pretrained(folder)
            write_card(
                folder,
                args,
                {"library_name": "diffusers", "tags": ["tango", "vae"], **base_model(args.vae)},
                "VAE of log-mel spectrograms, whose decoder was trained together with a vocoder by "
                "`training.train_vocoder` of pipeline-tango.",
                'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("THIS_FOLDER_OR_REPO")',
                summary,
            )


# Training


def generator_losses(weights, discriminators, made, mel, waveform, recorded, pool_frames):
    """Losses of the generator by name, those of weight 0 left out, and `mel_error`, which is only measured.

    Args:
        weights (`dict[str, float]`): of the losses by name.
        discriminators (`Discriminators`): unwrapped, since they get no gradients for DDP to wait for.
        made, mel (`torch.Tensor`): two generated waveforms of each segment, and their mel spectrograms.
        waveform, recorded (`torch.Tensor`): the segments and their mel spectrograms.
    """
    losses = {}
    if weights["adversarial_loss"]:
        discriminators.requires_grad_(False)
        fake = discriminators(made)
        losses["adversarial_loss"] = adversarial_loss(fake)
        if weights["feature_loss"]:
            with torch.no_grad():
                real = discriminators(waveform)
            halves = ([[m.chunk(2)[half] for m in maps] for maps in fake] for half in (0, 1))
            losses["feature_loss"] = energy_distance(feature_distance, real, *halves)
        discriminators.requires_grad_(True)
    first, second = made.chunk(2)
    with torch.no_grad():
        losses["mel_error"] = mel_loss(first, waveform)
    if weights["mel_loss"]:
        losses["mel_loss"] = energy_distance(mel_loss, waveform, first, second)
    if weights["spectrogram_loss"]:
        losses["spectrogram_loss"] = energy_distance(spectral_distance, *map(spectra, (waveform, first, second)))
    if weights["decoder_loss"] is not None:
        losses["decoder_loss"] = energy_distance(
            lambda a, b: reconstruction_error((a - b).unsqueeze(1), pool_frames), recorded, *mel.chunk(2)
        )
    return losses


def train(args):
    check_libraries(args)
    output_dir = Path(args.output_dir)
    accelerator = start(output_dir, args.mixed_precision, args.report_to)
    signals = catch_sigterm()
    if shards_weights(accelerator):
        raise ValueError("two small models train in turn here: use plain data parallelism, not FSDP or DeepSpeed")
    if accelerator.mixed_precision == "fp16":
        raise ValueError("`--mixed_precision` has to be no or bf16: gradients of the quietest sounds overflow in fp16")
    device = accelerator.device

    # 1. Models
    vocoder = load_vocoder(
        args.pretrained_model_name_or_path,
        args.config,
        args.upsample_initial_channel,
        args.num_noise_channels,
        args.seed,
    )
    vae = load_vae(args.vae, args.train_decoder, args.num_segment_frames).to(device) if args.vae else None
    torch.manual_seed(keyed_generator(args.seed).initial_seed())  # not the vocoder's weights again
    generator = Generator(vocoder, vae if args.train_decoder else None)
    discriminators = load_discriminators(
        args.discriminators, args.stft_windows, args.periods, args.discriminator_channels
    )
    parameters = [parameter for parameter in generator.parameters() if parameter.requires_grad]

    # 2. Data
    train_clips, validation_clips = prepare_clips(
        clip_sources(args), accelerator, output_dir, args.num_workers, args.seed
    )
    dataset = Segments(train_clips, args.num_segment_frames, args.seed)
    validation_waveforms = [read_clip(clip) for clip in validation_clips]

    # 3. Optimizers and schedules
    num_steps = args.max_train_steps
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
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
        )
        for optimizer in (generator_optimizer, discriminator_optimizer)
    ]
    generator, discriminators, generator_optimizer, discriminator_optimizer = accelerator.prepare(
        generator, discriminators, generator_optimizer, discriminator_optimizer
    )
    unwrapped = accelerator.unwrap_model(discriminators)
    ema = make_ema(accelerator, parameters, args.ema_decay)
    accelerator.register_for_checkpointing(*lr_schedulers)  # stepped by hand

    names = ("seed", "train_batch_size", "num_segment_frames", "max_train_steps", "mixed_precision")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"num_clips": len(train_clips), "num_processes": accelerator.num_processes}
    first_step = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, settings)
    results = ("model", "vae") if args.train_decoder else ("model",)
    log = open_log(accelerator, output_dir, args, first_step, "pipeline-tango", results)
    loader = step_loader(
        dataset, accelerator, range(first_step, num_steps), seed=args.seed, batch_size=args.train_batch_size
    )
    hours = sum(map(len, dataset.waveforms)) / MEL_SAMPLING_RATE / 3600
    num_parameters, num_more = (sum(p.numel() for p in each) for each in (parameters, unwrapped.parameters()))
    logger.info(
        f"training a vocoder of {num_parameters:,} parameters and discriminators of {num_more:,} on {device}, "
        f"{accelerator.num_processes} process(es)"
    )
    logger.info(
        f"data: {len(train_clips)} clips, {hours:.2f} h; validation: {len(validation_clips)}; steps "
        f"{first_step} to {num_steps}"
    )

    # 4. The loop
    weights = {
        "adversarial_loss": args.adversarial_weight,
        "feature_loss": args.feature_weight,
        "mel_loss": args.mel_weight,
        "spectrogram_loss": args.spectrogram_weight,
        "decoder_loss": args.decoder_weight if args.train_decoder else None,
    }
    step, errors = first_step, {}
    started = time.monotonic()
    profiler = torch.profiler.profile() if args.profile_steps else None
    if profiler is not None:
        profiler.start()
    bar = progress_bar(accelerator, first_step, num_steps)
    for batch in loader:
        inputs, noise, waveform, recorded = inputs_of(
            batch,
            vae,
            device,
            seed=args.seed,
            num_noise_channels=args.num_noise_channels,
            proportion_reconstructed=args.proportion_reconstructed,
            train_decoder=args.train_decoder,
        )
        made, mel = generator(inputs, noise)
        figures = {}
        if args.adversarial_weight:  # discriminators first, on recorded and generated waveforms in one pass
            judged = discriminators(torch.cat([waveform, made.detach()]))
            sizes = [len(waveform), len(made)]
            real, fake = ([[m.split(sizes)[part] for m in maps] for maps in judged] for part in (0, 1))
            figures["discriminator_loss"] = discriminator_loss(real, fake)
            accelerator.backward(figures["discriminator_loss"])
            discriminator_optimizer.step()
            discriminator_optimizer.zero_grad()
        losses = generator_losses(weights, unwrapped, made, mel, waveform, recorded, args.pool_frames)
        loss = sum(weights[name] * value for name, value in losses.items() if name in weights)
        accelerator.backward(loss)
        figures |= losses
        if args.max_grad_norm:
            figures["grad_norm"] = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        generator_optimizer.step()
        generator_optimizer.zero_grad()

        step += 1
        learning_rate = generator_optimizer.param_groups[0]["lr"]  # the one that this step used
        for lr_scheduler in lr_schedulers:
            lr_scheduler.step()
        ema.step(parameters)
        means = mean_figures(accelerator, [figures], step, bar)
        log.write(step, **means, lr=learning_rate)
        bar.update()
        bar.set_postfix(mel_error=f"{means['mel_error']:.3f}", grad_norm=f"{means.get('grad_norm', 0):.0f}")
        if profiler is not None and step == first_step + args.profile_steps:
            profiler.stop()
            logger.info("\n" + profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))

        if step % args.validation_steps == 0 or step == num_steps:
            with averaged(ema, parameters):
                if validation_waveforms:
                    folder = output_dir / "samples" / f"step-{step}"
                    errors = validate(
                        accelerator, vocoder, vae, validation_waveforms, folder, args.num_validation_sounds, args.seed
                    )
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
            accelerator.wait_for_everyone()

        stop = stop_requested(accelerator, signals)
        if step % args.checkpointing_steps == 0 or stop or step == num_steps:
            save_checkpoint(accelerator, output_dir, step, settings, args.checkpoints_total_limit)
        if stop and step < num_steps:
            return stop_early(accelerator, bar, step, num_steps)
    bar.close()
    return end(accelerator)


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
