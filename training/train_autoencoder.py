"""Train or fine-tune the VAE of a Tango: `accelerate launch -m training.train_autoencoder --train_manifest FILE ...`.

The first stage of training a Tango from random weights; `--vae OUT/model` hands its result to `training.train`. Sounds
are cut and normalised as in the last stage, so that the VAE sees what the UNet will, and trained on in shorter crops.
Everything random is drawn from keyed generators, as in `training.train`.
"""

import csv
import inspect
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from torch.utils.data import Dataset

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.flags import COUNT, INDEX, NOT_NEGATIVE, POSITIVE, Number
from pipeline_tango.mel import MEL_FFT_LENGTH, MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS
from pipeline_tango.sound_files import write_atomically

from .arguments import (
    add_checkpoint_arguments,
    add_data_arguments,
    add_ema_arguments,
    add_optimisation_arguments,
    add_pool_argument,
    add_report_arguments,
    build_parser,
    check_arguments,
    check_libraries,
    clip_sources,
)
from .batches import keyed_generator, shared_indices, step_loader
from .data import ClipDataset, count_samples, prepare_clips, select_clips
from .latents import vae_factor
from .linear_autoencoder import can_initialise, initialise
from .model_card import base_model, write_card
from .objective import reconstruction_error, sample_noise
from .run import (
    averaged,
    catch_sigterm,
    end,
    load_checkpoint,
    log_plan,
    make_ema,
    make_folder,
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
    tail_mean,
)


logger = get_logger(__name__)

# the released VAE at a quarter of its width, without attention and without group norms of single channels: both make
# the level depend on the length of a sound
VAE_CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 64, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 256,
}
NUM_START_FRAMES = 25600  # at most, to which a new VAE is fitted before the first step
# what is drawn: after the seed the first number of a generator's key
NOISE, CROP, LENGTH = range(3)


def parse_args(argv=None):
    parser = build_parser(__spec__.name, "Train or fine-tune the VAE of a Tango on sounds.")
    start = parser.add_argument_group(
        "start",
        "by default a VAE of 2.6 million parameters, initialised as a linear transform that is fitted to the data",
    )
    start.add_argument(
        "--config",
        help="JSON file with arguments of AutoencoderKL that differ from the default's. For a VAE that the converter "
        "can write in the original's layout: norm_num_groups 32 and mid_block_add_attention true; it then needs 128 "
        "channels at the first level to start as a linear transform",
    )
    start.add_argument(
        "--pretrained_model_name_or_path", help="folder or Hub repo of a VAE, or of a pipeline with one"
    )
    start.add_argument(
        "--freeze_encoder",
        action="store_true",
        help="train the decoder only, so that latents do not change and a UNet trained on them can still be used. The "
        "encoder of a new VAE then stays a linear transform",
    )
    start.add_argument(
        "--no_decoder_attention",
        action="store_true",
        help="set the attention of the decoder's middle block to zero permanently: its effect on a frame depends on "
        "the number of frames. For the level of longer sounds this alone is not enough, see --length_factors",
    )

    data = add_data_arguments(parser)
    data.add_argument("--caption_column", help="column of a text, which is not used (default: by convention)")
    data.add_argument(
        "--audio_length_in_s",
        type=POSITIVE,
        default=10.24,
        help="length of clips, in seconds: the one that the UNet will train on",
    )
    data.add_argument("--crop", choices=("random", "head"), default="random", help="part kept of longer sounds")
    data.add_argument("--num_crop_frames", type=COUNT, default=128, help="frames of a training crop")
    data.add_argument(
        "--length_factors",
        type=Number(float),
        nargs="+",
        default=[0.5, 1, 2],
        metavar="F",
        help="in each step the crops of a batch are split or concatenated into rows of --num_crop_frames times one of "
        "these. A VAE trained on one length only has a wrong level at others: it was half a neper too loud at twice "
        "the length. With --freeze_encoder this applies to the decoder (default: 0.5 1 2)",
    )
    data.add_argument("--num_workers", type=INDEX, default=2, help="processes that read sounds")

    objective = parser.add_argument_group("objective", "the sum of three terms")
    objective.add_argument(
        "--reconstruction_weight",
        type=NOT_NEGATIVE,
        default=1.0,
        help="weight of the mean absolute error of log-mel values",
    )
    add_pool_argument(objective)
    objective.add_argument(
        "--kl_weight",
        type=NOT_NEGATIVE,
        default=1e-4,
        help="weight of the KL divergence from a standard normal, in nats, as the mean over the elements of the "
        "latent: independent of the shapes of latent and spectrogram",
    )
    objective.add_argument(
        "--adversarial_weight",
        type=NOT_NEGATIVE,
        default=0.0,
        help="weight of the hinge loss of a patch discriminator, for sharper spectrograms; 0.05 is usual",
    )
    objective.add_argument(
        "--adversarial_start_step", type=INDEX, default=0, help="step at which the adversarial loss starts"
    )
    objective.add_argument(
        "--discriminator_learning_rate",
        type=NOT_NEGATIVE,
        default=2e-4,
        help="learning rate of the discriminator, constant",
    )

    trained = parser.add_argument_group("trained weights")
    add_ema_arguments(trained, ema_decay=0.999)
    trained.add_argument("--mixed_precision", choices=("no", "bf16"), help="autocast (default: accelerate's setting)")

    add_optimisation_arguments(parser)
    parser.set_defaults(train_batch_size=8, learning_rate=3e-4, lr_scheduler="cosine")
    parser.set_defaults(adam_beta2=0.99, adam_weight_decay=0.0)

    add_checkpoint_arguments(parser)

    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--validation_steps", type=COUNT, default=500, help="steps between validations")
    measuring.add_argument(
        "--num_scale_clips", type=COUNT, default=1000, help="training clips on which `scaling_factor` is measured"
    )

    add_report_arguments(parser)

    args = parser.parse_args(argv)
    if args.config and args.pretrained_model_name_or_path:
        parser.error("give --config or --pretrained_model_name_or_path, not both")
    check_arguments(parser, args)
    if args.audio_length_in_s * MEL_SAMPLING_RATE <= MEL_FFT_LENGTH // 2:
        parser.error(f"--audio_length_in_s of {args.audio_length_in_s} is too short for a spectrogram")
    return args


def load_vae(pretrained_model_name_or_path, config, freeze_encoder, seed):
    """The VAE to start from, in float32: a pretrained one, or one of random weights.

    Args:
        config (`str` or None): JSON file of what differs from `VAE_CONFIG`.
    """
    if pretrained_model_name_or_path:
        subfolder = "vae" if (Path(pretrained_model_name_or_path) / "vae").is_dir() else ""
        vae = AutoencoderKL.from_pretrained(
            pretrained_model_name_or_path, subfolder=subfolder, torch_dtype=torch.float32
        )
    else:
        config = VAE_CONFIG | (read_config(config) if config else {})
        num_levels = len(config["block_out_channels"])
        config.setdefault("down_block_types", ["DownEncoderBlock2D"] * num_levels)
        config.setdefault("up_block_types", ["UpDecoderBlock2D"] * num_levels)
        torch.manual_seed(seed)  # of the random weights
        vae = AutoencoderKL(**config)
        if freeze_encoder and not can_initialise(vae):
            raise ValueError(
                "`--freeze_encoder` needs --pretrained_model_name_or_path, or a --config wide enough for a "
                "linear transform: latents of random weights hold little of a sound"
            )
    if (vae.config.in_channels, vae.config.out_channels) != (1, 1):
        raise ValueError(
            "a VAE of spectrograms has `in_channels` and `out_channels` 1, not "
            f"{vae.config.in_channels} and {vae.config.out_channels}"
        )
    return vae


def zero_decoder_attention(vae):
    """Set the attention of the decoder's middle block to zero permanently."""
    for attention in filter(None, vae.decoder.mid_block.attentions):
        for parameter in (*attention.to_v.parameters(), attention.to_out[0].weight):
            torch.nn.init.zeros_(parameter)  # each keeps the others' gradients at 0


def count_frames(vae, audio_length_in_s, num_crop_frames, length_factors, batch_size):
    """Frames of a sound, and of the part of it that is trained on at a time.

    Raises:
        ValueError: if the VAE cannot work on so many frames, or on those of a batch laid out by `length_factors`.
    """
    factor = vae_factor(vae)
    for name, number in (("--num_crop_frames", num_crop_frames), ("the number of mel bins", NUM_MEL_BINS)):
        if number % factor:
            raise ValueError(f"{name} is {number}, which the VAE's {factor} does not divide")
    num_frames = math.ceil(round(audio_length_in_s * MEL_SAMPLING_RATE) / MEL_HOP_LENGTH)
    num_frames = math.ceil(num_frames / factor) * factor
    num_crop_frames = min(num_crop_frames, num_frames)
    for length_factor in length_factors:
        length = num_crop_frames * length_factor
        if length % factor or length <= 0 or batch_size * num_crop_frames % length:
            raise ValueError(
                f"--length_factors: {batch_size} rows of {num_crop_frames} frames cannot be laid out "
                f"as rows of {length:g}, a multiple of {factor}: give other factors"
            )
    return num_frames, num_crop_frames


def read_config(path):
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"`--config`: {path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"`--config`: {path} has to hold a JSON object, not {config!r:.80}")
    config = {name: value for name, value in config.items() if not name.startswith("_")}  # diffusers' notes
    unknown = config.keys() - inspect.signature(AutoencoderKL).parameters.keys()
    if unknown:
        raise ValueError(f"`--config`: AutoencoderKL has no argument {', '.join(sorted(unknown))}")
    return config


class Autoencoder(torch.nn.Module):
    """Encoder and decoder as one module for DDP."""

    def __init__(self, vae, freeze_encoder):
        super().__init__()
        self.vae, self.freeze_encoder = vae, freeze_encoder

    def forward(self, mel, noise, num_frames):
        """Reconstruction of `(batch, 1, num_crop_frames, num_mel_bins)`, and mean and log-variance of the posterior
        that `noise` draws from. The batch is processed in rows of `num_frames` frames, by a frozen encoder in rows of
        the length that `mel` has."""
        num_crop_frames, num_latent_frames = mel.shape[2], num_frames // vae_factor(self.vae)
        if not self.freeze_encoder:
            mel, noise = lay_out(mel, num_frames), lay_out(noise, num_latent_frames)
        posterior = self.vae.encode(mel).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = lay_out(mean + torch.exp(0.5 * logvar) * noise, num_latent_frames)
        reconstruction = lay_out(self.vae.decode(latents).sample.float(), num_crop_frames)
        return reconstruction, mean, logvar


def lay_out(rows, num_frames):
    """`(batch, channels, frames, bins)` as rows of `num_frames` frames: rows are split or concatenated in time."""
    return rows.transpose(0, 1).flatten(1, 2).unflatten(1, (-1, num_frames)).transpose(0, 1)


class PatchDiscriminator(torch.nn.Sequential):
    """One logit for each patch of 8 frames and 8 mel bins, from about 38 of each around it.

    Source: Isola et al. 2017, with group for batch norm, which would let the samples of a batch see each other.
    """

    def __init__(self):
        layers, num_inputs = [], 1
        for num_outputs in (32, 64, 128):
            layers += [
                torch.nn.Conv2d(num_inputs, num_outputs, 4, stride=2, padding=1),
                torch.nn.GroupNorm(8, num_outputs),
                torch.nn.LeakyReLU(0.2),
            ]
            num_inputs = num_outputs
        super().__init__(*layers, torch.nn.Conv2d(num_inputs, 1, 3, padding=1))


class MelDataset(Dataset):
    """Crops of the log-mel spectrograms of a `ClipDataset`, by the same keys `(epoch, index)`.

    At least half of a crop is sound where the sound is long enough, so that padding is not seen too often.

    An item is `{"mel": (num_crop_frames, num_mel_bins), "num_frames": int, "index": int, "epoch": int}`, `num_frames`
    being how many of the crop's frames the sound reaches.
    """

    def __init__(self, dataset, num_crop_frames, seed=0):
        self.dataset, self.num_crop_frames, self.seed = dataset, num_crop_frames, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        mel = log_mel_spectrogram(self.dataset[key]["waveform"][None])[0]  # (num_frames, num_mel_bins)
        clip_length = count_samples(self.dataset.clips[index], self.dataset.sampling_rate)
        num_frames = min(math.ceil(clip_length / MEL_HOP_LENGTH), len(mel))
        last = max(0, min(num_frames - self.num_crop_frames // 2, len(mel) - self.num_crop_frames))
        start = int(torch.randint(last + 1, (), generator=keyed_generator(self.seed, CROP, epoch, index)))
        return {
            "mel": mel[start : start + self.num_crop_frames],
            "num_frames": min(num_frames - start, self.num_crop_frames),
            "epoch": epoch,
            "index": index,
        }


@torch.no_grad()
def validate(accelerator, vae, dataset):
    """Mean absolute log-mel error of the posterior's mode for each clip, without the padding, on the CPU."""
    errors = torch.zeros(len(dataset), dtype=torch.float64)
    for index in shared_indices(accelerator, len(dataset), "validation"):
        item = dataset[(0, index)]
        mel = item["mel"][None, None].to(accelerator.device)  # (1, 1, num_frames, num_mel_bins)
        reconstruction = vae.decode(vae.encode(mel).latent_dist.mode()).sample
        errors[index] = (reconstruction - mel)[:, :, : item["num_frames"]].abs().mean()
    return accelerator.reduce(errors.to(accelerator.device), reduction="sum").cpu()


@torch.no_grad()
def measure_latents(accelerator, vae, dataset):
    """Mean and standard deviation of all elements of latents drawn from the posterior.

    Nothing is drawn: the variance is that of the posterior's means plus the mean of its variances.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for index in shared_indices(accelerator, len(dataset), "measuring latents"):
        mel = dataset[(0, index)]["mel"][None, None].to(accelerator.device)  # (1, 1, num_frames, num_mel_bins)
        posterior = vae.encode(mel).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        sums += torch.stack([torch.ones_like(mean).sum(), mean.sum(), (mean.square() + variance).sum()]).cpu()
    count, first, second = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return first / count, math.sqrt(second / count - (first / count) ** 2)


def save_result(args, accelerator, vae, dataset, name, summary):
    """The weights as they are now under `output_dir/name`: a diffusers folder with its measured `scaling_factor`, or
    that of the frozen encoder."""
    mean, std = measure_latents(accelerator, vae, dataset)
    if not (args.freeze_encoder and args.pretrained_model_name_or_path):  # or latents scaled before would not fit
        vae.register_to_config(scaling_factor=1 / std)
    summary = summary | {
        "mean of the latents": f"{mean:.4f}",
        "standard deviation of the latents": f"{std:.4f}",
        "`scaling_factor`": f"{vae.config.scaling_factor:.6f}",
    }
    if not accelerator.is_main_process:
        return
    with replacing(Path(args.output_dir) / name) as folder:
        vae.save_pretrained(folder)
        write_card(
            folder,
            args,
            {"library_name": "diffusers", "tags": ["tango", "vae"], **base_model(args.pretrained_model_name_or_path)},
            "VAE of log-mel spectrograms, trained with `training.train_autoencoder` of pipeline-tango.",
            'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("THIS_FOLDER_OR_REPO")',
            summary,
        )
    logger.info(", ".join(f"{key} {value}" for key, value in summary.items()))


def write_table(path, clips, errors):
    """CSV of the error of each clip, the worst first."""
    make_folder(path.parent)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("file_name", "mean_absolute_error"))
    for error, name in sorted(zip(errors.tolist(), [clip.path for clip in clips]), reverse=True):
        writer.writerow((name, f"{error:.4f}"))
    write_atomically(path, file.getvalue().encode())


def mel_dataset(clips, crop, num_frames, num_crop_frames, seed):
    """Crops of `num_crop_frames` of clips that are cut or padded to `num_frames` first."""
    num_samples = num_frames * MEL_HOP_LENGTH
    dataset = ClipDataset(clips, sampling_rate=MEL_SAMPLING_RATE, num_samples=num_samples, crop=crop, seed=seed)
    return MelDataset(dataset, num_crop_frames, seed)


def start_weights(vae, dataset, num_crop_frames):
    """Fit a new VAE to crops of the data, as a linear transform if it is wide enough for one."""
    num_clips = max(1, NUM_START_FRAMES // num_crop_frames)
    indices = range(0, len(dataset), math.ceil(len(dataset) / num_clips))
    mels = torch.stack([dataset[(0, index)]["mel"] for index in indices]).unsqueeze(1)
    if can_initialise(vae):
        initialise(vae, mels)
    else:  # log-mel values lie around -6, which the optimizer would take long to reach
        torch.nn.init.constant_(vae.decoder.conv_out.bias, float(mels.mean()))


def hinge_loss(real, fake):
    """Loss of the discriminator, from its logits for spectrograms and for reconstructions."""
    return 0.5 * (torch.relu(1 - real) + torch.relu(1 + fake)).mean()


def score_reconstruction(discriminator, reconstruction):
    """Adversarial loss of the VAE. `discriminator` has to be unwrapped: it gets no gradients for DDP to wait for."""
    discriminator.requires_grad_(False)
    loss = -discriminator(reconstruction).float().mean()
    discriminator.requires_grad_(True)
    return loss


def train(args):
    check_libraries(args)
    output_dir = Path(args.output_dir)
    accelerator = start(output_dir, args.mixed_precision, args.report_to, args.gradient_accumulation_steps)
    signals = catch_sigterm()
    if shards_weights(accelerator):
        raise ValueError("a VAE is small: train it with plain data parallelism instead of FSDP or DeepSpeed")
    device = accelerator.device

    # 1. Models
    vae = load_vae(args.pretrained_model_name_or_path, args.config, args.freeze_encoder, args.seed)
    num_frames, num_crop_frames = count_frames(
        vae, args.audio_length_in_s, args.num_crop_frames, args.length_factors, args.train_batch_size
    )
    if args.no_decoder_attention:
        zero_decoder_attention(vae)
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    discriminator = None
    if args.adversarial_weight:
        torch.manual_seed(args.seed)
        discriminator = PatchDiscriminator().to(device)

    # 2. Data
    train_clips, validation_clips = prepare_clips(
        clip_sources(args), accelerator, output_dir, args.num_workers, args.seed
    )
    scale_clips = select_clips(train_clips, args.num_scale_clips, args.seed)
    dataset = mel_dataset(train_clips, args.crop, num_frames, num_crop_frames, args.seed)
    scale_dataset = mel_dataset(scale_clips, args.crop, num_frames, num_frames, args.seed)
    validation_dataset = mel_dataset(validation_clips, "head", num_frames, num_frames, args.seed)
    if not args.pretrained_model_name_or_path:
        start_weights(vae, dataset, num_crop_frames)
    vae.to(device)

    # 3. Optimizers and schedules, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(train_clips) * args.num_train_epochs / step_size)
    options = {"weight_decay": args.adam_weight_decay, "eps": args.adam_epsilon, "foreach": True}
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), **options
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=num_steps
    )
    model, optimizer = accelerator.prepare(Autoencoder(vae, args.freeze_encoder), optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)  # stepped by hand, once for each optimizer step
    models = [model]
    if discriminator is not None:
        discriminator_optimizer = torch.optim.AdamW(
            discriminator.parameters(),
            lr=args.discriminator_learning_rate,
            betas=(0.5, args.adam_beta2),  # with momentum it would lag behind the VAE
            **options,
        )
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        models.append(discriminator)
    ema = make_ema(accelerator, parameters, args.ema_decay) if args.use_ema else None

    names = ("seed", "train_batch_size", "gradient_accumulation_steps", "crop", "audio_length_in_s", "length_factors")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"num_clips": len(train_clips), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, settings)
    log = open_log(accelerator, output_dir, args, first_step, "pipeline-tango-vae")
    loader = step_loader(
        dataset,
        accelerator,
        range(first_step, num_steps),
        args.num_workers,
        seed=args.seed,
        batch_size=args.train_batch_size,
        num_micro_steps=args.gradient_accumulation_steps,
    )
    num_parameters = sum(parameter.numel() for parameter in parameters)
    logger.info(
        f"training a VAE of {num_parameters:,} parameters on {device}, {accelerator.num_processes} process(es), "
        f"{accelerator.mixed_precision} mixed precision"
    )
    logger.info(
        f"data: {len(train_clips)} clips, cut or padded to {num_frames} frames, {num_crop_frames} at a time; "
        f"validation: {len(validation_clips)}"
    )
    log_plan(first_step, num_steps, step_size, len(train_clips))

    # 4. The loop
    latent_shape = (vae.config.latent_channels, *(size // vae_factor(vae) for size in (num_crop_frames, NUM_MEL_BINS)))
    best = min(log.values("validation_error"), default=None)
    step, figures = first_step, []
    started = time.monotonic()
    bar = progress_bar(accelerator, first_step, num_steps)
    for batch in loader:
        generators = [keyed_generator(args.seed, NOISE, *key) for key in zip(batch["epoch"], batch["index"])]
        mel = torch.stack(batch["mel"]).unsqueeze(1).to(device)  # (batch, 1, num_crop_frames, num_mel_bins)
        noise = sample_noise((len(mel), *latent_shape), generators, device)
        draw = torch.randint(len(args.length_factors), (), generator=keyed_generator(args.seed, LENGTH, step))
        length_factor = args.length_factors[int(draw)]
        is_adversarial = discriminator is not None and step >= args.adversarial_start_step

        with accelerator.accumulate(*models):
            with accelerator.autocast():
                reconstruction, mean, logvar = model(mel, noise, round(mel.shape[2] * length_factor))
            error = reconstruction_error(reconstruction - mel, args.pool_frames)
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()  # equation (10) of Kingma and Welling 2013
            loss = args.reconstruction_weight * error + args.kl_weight * kl
            figures.append({"loss": loss, "error": error, "kl": kl})
            if is_adversarial:
                with accelerator.autocast():
                    adversarial_loss = score_reconstruction(accelerator.unwrap_model(discriminator), reconstruction)
                loss = loss + args.adversarial_weight * adversarial_loss
                figures[-1] |= {"loss": loss, "adversarial_loss": adversarial_loss}
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if is_adversarial:
                with accelerator.autocast():
                    logits = discriminator(torch.cat([mel, reconstruction.detach()])).float()
                discriminator_loss = hinge_loss(*logits.chunk(2))
                figures[-1]["discriminator_loss"] = discriminator_loss
                accelerator.backward(discriminator_loss)
                discriminator_optimizer.step()
                discriminator_optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        # one optimizer step is done
        step += 1
        learning_rate = optimizer.param_groups[0]["lr"]  # the one that this step used
        lr_scheduler.step()
        if ema is not None:
            ema.step(parameters)
        means = mean_figures(accelerator, figures, step, bar)
        log.write(step, **means, lr=learning_rate)
        bar.update()
        bar.set_postfix(error=f"{means['error']:.4f}", lr=f"{learning_rate:.2e}")

        if (step % args.validation_steps == 0 or step == num_steps) and validation_clips:
            with averaged(ema, parameters):
                errors = validate(accelerator, vae, validation_dataset)
                validation_error = errors.mean().item()
                log.write(step, validation_error=validation_error)
                if accelerator.is_main_process:
                    write_table(output_dir / "validation" / f"step-{step}.csv", validation_clips, errors)
                logger.info(f"step {step}: validation error {validation_error:.4f}")
                if best is None or validation_error < best:
                    best = validation_error
                    summary = {"step": step, "validation error": f"{best:.4f}"}
                    save_result(args, accelerator, vae, scale_dataset, "best", summary)
            accelerator.wait_for_everyone()

        stop = stop_requested(accelerator, signals)
        if step % args.checkpointing_steps == 0 or stop or step == num_steps:
            save_checkpoint(accelerator, output_dir, step, settings, args.checkpoints_total_limit)
        if stop and step < num_steps:
            return stop_early(accelerator, bar, step, num_steps)
    bar.close()

    # 5. The end
    if ema is not None:
        ema.copy_to(parameters)
    summary = {
        "steps": step,
        "clips": len(train_clips),
        "parameters": f"{num_parameters:,}",
        "training error (last 5% of the steps)": f"{tail_mean(log.values('error')):.4f}",
        "best validation error": "none" if best is None else f"{best:.4f}",
        "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
    }
    save_result(args, accelerator, vae, scale_dataset, "model", summary)
    return end(accelerator)


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
