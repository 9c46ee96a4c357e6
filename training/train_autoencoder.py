"""Train or fine-tune the VAE of a Tango: `accelerate launch -m training.train_autoencoder --train_manifest FILE ...`.

The first of the stages that build a Tango from nothing; `--vae OUT/model` hands its result to `training.train`. Sounds
are cut and levelled as in the last stage, so that the VAE sees what the UNet will, and trained on in shorter crops.
Everything random is drawn from keyed generators, as in `training.train`.
"""

import argparse
import csv
import inspect
import io
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pipeline_tango import log_mel_spectrogram
from pipeline_tango.pipeline_tango import MEL_FFT_LENGTH, MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS
from pipeline_tango.sound_files import write_atomically

from .batches import StepSampler, ignore_sigterm, keyed_generator, list_of_items
from .data import ClipDataset, count_samples, select_clips
from .linear_autoencoder import can_initialise, initialise
from .objective import sample_noise
from .run import Log, load_checkpoint, read_log, replacing, run, save_checkpoint
from .train import LR_SCHEDULERS, add_checkpoint_arguments, add_data_arguments, check_arguments, prepare_clips


logger = get_logger(__name__)

# the released VAE at a quarter of its width, without what makes longer sounds louder: attention, and norms of single
# channels, which take the level away
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
NUM_START_FRAMES = 25600  # at most, that a new VAE is fitted to before the first step
# what a random draw is for: the first word of its key
NOISE, CROP, LENGTH = range(3)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m training.train_autoencoder",
        description="Train or fine-tune the VAE of a Tango on sounds. Run it as it is or by `accelerate launch -m "
        "training.train_autoencoder ...` on any number of processes and machines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    start = parser.add_argument_group(
        "start",
        "by default a VAE of 2.6 million weights that is a linear transform, fitted to the data, before any training",
    )
    start.add_argument(
        "--config",
        help="JSON file with arguments of AutoencoderKL that differ from the default's. For a VAE that the converter "
        "can write in the original's layout: norm_num_groups 32 and mid_block_add_attention true, which take 128 "
        "channels at the top level to begin as a linear transform",
    )
    start.add_argument(
        "--pretrained_model_name_or_path", help="folder or Hub repo of a VAE, or of a pipeline with one"
    )
    start.add_argument(
        "--freeze_encoder",
        action="store_true",
        help="train the decoder only: latents, and with them a UNet trained on them, stay. The encoder of a new VAE "
        "then stays a linear transform",
    )
    start.add_argument(
        "--no_decoder_attention",
        action="store_true",
        help="set the attention in the middle of the decoder to zero for good: how much of it a frame gets depends on "
        "how many there are. It alone does not keep the level of longer sounds, see --length_factors",
    )

    data = add_data_arguments(parser)
    data.add_argument("--caption_column", help="column of a text, which is not used (default: by convention)")
    data.add_argument(
        "--audio_length_in_s", type=float, default=10.24, help="length that the last stage will train on, in seconds"
    )
    data.add_argument("--crop", choices=("random", "head"), default="random", help="part taken from longer sounds")
    data.add_argument("--num_crop_frames", type=int, default=128, help="frames of that length to train on at a time")
    data.add_argument(
        "--length_factors",
        type=float,
        nargs="+",
        default=[0.5, 1, 2],
        metavar="F",
        help="in each step a batch is laid out as rows of --num_crop_frames times one of these: crops halved, or "
        "several in a line. Seen at one length only, a VAE learns to be right at that length: twice as long was half "
        "a neper too loud. With --freeze_encoder, of the decoder (default: 0.5 1 2)",
    )
    data.add_argument("--num_workers", type=int, default=2, help="processes that read sounds")

    objective = parser.add_argument_group("objective", "the sum of three terms")
    objective.add_argument(
        "--reconstruction_weight", type=float, default=1.0, help="of the mean absolute error of a log-mel value"
    )
    add_pool_argument(objective)
    objective.add_argument(
        "--kl_weight",
        type=float,
        default=1e-4,
        help="of the KL divergence from a standard normal, in nats, mean over the latent's elements (not their sum, "
        "and not divided by the spectrogram's size: it means the same for any shape)",
    )
    objective.add_argument(
        "--adversarial_weight",
        type=float,
        default=0.0,
        help="of the hinge loss against a discriminator of patches, for sharper spectrograms; 0.05 is usual",
    )
    objective.add_argument("--adversarial_start_step", type=int, default=0, help="step that it begins at")
    objective.add_argument("--discriminator_learning_rate", type=float, default=2e-4, help="constant")

    trained = parser.add_argument_group("how it trains")
    trained.add_argument("--use_ema", action="store_true", help="keep an exponential moving average and save that")
    trained.add_argument("--ema_decay", type=float, default=0.999, help="its decay")
    trained.add_argument("--mixed_precision", choices=("no", "bf16"), help="default: accelerate's setting")

    steps = parser.add_argument_group("optimisation", "steps are optimizer steps, whatever the accumulation")
    steps.add_argument("--train_batch_size", type=int, default=8, help="clips per process and accumulation step")
    steps.add_argument("--gradient_accumulation_steps", type=int, default=1)
    steps.add_argument("--max_train_steps", type=int, help="overrides --num_train_epochs")
    steps.add_argument("--num_train_epochs", type=int, default=40)
    steps.add_argument("--learning_rate", type=float, default=3e-4)
    steps.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="cosine")
    steps.add_argument("--lr_warmup_steps", type=int, default=0)
    steps.add_argument("--adam_beta1", type=float, default=0.9)
    steps.add_argument("--adam_beta2", type=float, default=0.99)
    steps.add_argument("--adam_weight_decay", type=float, default=0.0)
    steps.add_argument("--adam_epsilon", type=float, default=1e-8)
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="0 turns clipping off")
    steps.add_argument("--seed", type=int, default=0)

    add_checkpoint_arguments(parser)

    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--validation_steps", type=int, default=500, help="steps between validations")
    measuring.add_argument(
        "--num_scale_clips", type=int, default=1000, help="training clips that the scale of latents is measured on"
    )

    reports = parser.add_argument_group("reports")
    reports.add_argument("--report_to", choices=("none", "tensorboard", "wandb"), default="none")

    args = parser.parse_args(argv)
    if args.config and args.pretrained_model_name_or_path:
        parser.error("give --config or --pretrained_model_name_or_path, not both")
    check_arguments(
        parser,
        args,
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "num_train_epochs",
        "num_crop_frames",
        "pool_frames",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "num_scale_clips",
        "max_train_samples",
    )
    for name in ("seed", "reconstruction_weight", "kl_weight", "adversarial_weight", "adversarial_start_step"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name} has to be at least 0, not {getattr(args, name)}")
    if args.audio_length_in_s * MEL_SAMPLING_RATE <= MEL_FFT_LENGTH // 2:
        parser.error(f"--audio_length_in_s of {args.audio_length_in_s} is too short for a spectrogram")
    return args


def add_pool_argument(group):
    group.add_argument(
        "--pool_frames",
        type=int,
        nargs="+",
        default=[1],
        help="the error of what the VAE decodes is the mean of the errors of means over so many frames: with 1 8 64 "
        "what a sound's colour is off by for long counts more than what it is off by for a moment",
    )


def load_vae(args):
    """The VAE to start from, in float32."""
    source = args.pretrained_model_name_or_path
    if source:
        subfolder = "vae" if (Path(source) / "vae").is_dir() else ""
        vae = AutoencoderKL.from_pretrained(source, subfolder=subfolder, torch_dtype=torch.float32)
    else:
        config = VAE_CONFIG | (read_config(args.config) if args.config else {})
        num_levels = len(config["block_out_channels"])
        config.setdefault("down_block_types", ["DownEncoderBlock2D"] * num_levels)
        config.setdefault("up_block_types", ["UpDecoderBlock2D"] * num_levels)
        torch.manual_seed(args.seed)  # of the random weights
        vae = AutoencoderKL(**config)
        if args.freeze_encoder and not can_initialise(vae):
            raise ValueError(
                "`--freeze_encoder` needs --pretrained_model_name_or_path, or a --config with room for a linear "
                "transform: what random weights encode holds little"
            )
    if (vae.config.in_channels, vae.config.out_channels) != (1, 1):
        raise ValueError(
            "a VAE of spectrograms has `in_channels` and `out_channels` 1, not "
            f"{vae.config.in_channels} and {vae.config.out_channels}"
        )
    if args.no_decoder_attention:
        for attention in filter(None, vae.decoder.mid_block.attentions):
            for parameter in (*attention.to_v.parameters(), attention.to_out[0].weight):
                torch.nn.init.zeros_(parameter)  # each keeps the others' gradients at 0
    factor = vae_factor(vae)
    for name, number in (("--num_crop_frames", args.num_crop_frames), ("the number of mel bins", NUM_MEL_BINS)):
        if number % factor:
            raise ValueError(f"{name} is {number}, which the VAE's {factor} does not divide")
    _, num_crop_frames = count_frames(args, vae)
    for length_factor in args.length_factors:
        num_frames = num_crop_frames * length_factor
        if num_frames % factor or num_frames <= 0 or args.train_batch_size * num_crop_frames % num_frames:
            raise ValueError(
                f"--length_factors: {args.train_batch_size} rows of {num_crop_frames} frames cannot be laid out "
                f"as rows of {num_frames:g}, a multiple of {factor}: give other factors"
            )
    return vae


def count_frames(args, vae):
    """Frames of a sound, and of the part of it that is trained on at a time."""
    num_frames = math.ceil(round(args.audio_length_in_s * MEL_SAMPLING_RATE) / MEL_HOP_LENGTH)
    num_frames = math.ceil(num_frames / vae_factor(vae)) * vae_factor(vae)
    return num_frames, min(args.num_crop_frames, num_frames)


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


def vae_factor(vae):
    """Frames, and mel bins, to one element of the latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Autoencoder(torch.nn.Module):
    """Encoder and decoder as one module for DDP."""

    def __init__(self, vae, freeze_encoder):
        super().__init__()
        self.vae, self.freeze_encoder = vae, freeze_encoder

    def forward(self, mel, noise, num_frames):
        """Reconstruction of `(batch, 1, num_crop_frames, num_mel_bins)`, and mean and log-variance of the posterior
        that `noise` draws from. Rows of `num_frames` frames are worked on at a time, by a frozen encoder rows of the
        length that `mel` has."""
        num_crop_frames, num_latent_frames = mel.shape[2], num_frames // vae_factor(self.vae)
        if not self.freeze_encoder:
            mel, noise = lay_out(mel, num_frames), lay_out(noise, num_latent_frames)
        posterior = self.vae.encode(mel).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = lay_out(mean + torch.exp(0.5 * logvar) * noise, num_latent_frames)
        reconstruction = lay_out(self.vae.decode(latents).sample.float(), num_crop_frames)
        return reconstruction, mean, logvar


def lay_out(rows, num_frames):
    """`(batch, channels, frames, bins)` as rows of `num_frames` frames, parts of rows or several in a line."""
    return rows.transpose(0, 1).flatten(1, 2).unflatten(1, (-1, num_frames)).transpose(0, 1)


def reconstruction_error(difference, pool_frames):
    """Mean absolute value of the means of `(batch, 1, frames, bins)` over windows of frames, and the mean of that over
    all lengths of window in `pool_frames`. Windows do not overlap; the last may be shorter."""
    windows = [(min(num_frames, difference.shape[2]), 1) for num_frames in pool_frames]
    pooled = [F.avg_pool2d(difference, window, ceil_mode=True, count_include_pad=False) for window in windows]
    return torch.stack([means.abs().mean() for means in pooled]).mean()


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

    A crop is at least half sound where the sound is that long: of padding there is enough.

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
    for index in shared_indices(accelerator, dataset, "validation"):
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
    for index in shared_indices(accelerator, dataset, "measuring latents"):
        mel = dataset[(0, index)]["mel"][None, None].to(accelerator.device)  # (1, 1, num_frames, num_mel_bins)
        posterior = vae.encode(mel).latent_dist
        mean, variance = posterior.mean.double(), posterior.var.double()
        sums += torch.stack([torch.ones_like(mean).sum(), mean.sum(), (mean.square() + variance).sum()]).cpu()
    count, first, second = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
    return first / count, math.sqrt(second / count - (first / count) ** 2)


def shared_indices(accelerator, dataset, what):
    """This process's share of the data set, under a progress bar."""
    indices = range(accelerator.process_index, len(dataset), accelerator.num_processes)
    return tqdm(indices, desc=what, unit="clip", leave=False, disable=not accelerator.is_local_main_process)


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
        write_card(args, folder, summary)
    logger.info(", ".join(f"{key} {value}" for key, value in summary.items()))


def write_card(args, folder, summary):
    data = ModelCardData(
        library_name="diffusers", tags=["tango", "vae"], base_model=args.pretrained_model_name_or_path
    )
    figures = "\n".join(f"- {name}: {value}" for name, value in summary.items())
    flags = "\n".join(f"    --{name} {value}" for name, value in sorted(vars(args).items()) if value is not None)
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(args.output_dir).resolve().name}\n\nVAE of log-mel spectrograms, "
        "trained with `training.train_autoencoder` of pipeline-tango.\n\n```python\n"
        'from diffusers import AutoencoderKL\n\nvae = AutoencoderKL.from_pretrained("THIS_FOLDER_OR_REPO")\n```\n\n'
        f"## Figures\n\n{figures}\n\n## Flags\n\n{flags}\n"
    )
    ModelCard(text).save(folder / "README.md")


def write_table(path, clips, errors):
    """CSV of the error of each clip, the worst first."""
    path.parent.mkdir(exist_ok=True)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("file_name", "mean_absolute_error"))
    for error, name in sorted(zip(errors.tolist(), [clip.path for clip in clips]), reverse=True):
        writer.writerow((name, f"{error:.4f}"))
    write_atomically(path, file.getvalue().encode())


def train(args):
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / "logs")),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError("a VAE is small: train it with plain data parallelism instead of FSDP or DeepSpeed")
    stop_requested = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.append(True))
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
    accelerator.wait_for_everyone()
    device = accelerator.device

    # 1. Models
    vae = load_vae(args)
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    factor = vae_factor(vae)
    discriminator = None
    if args.adversarial_weight:
        torch.manual_seed(args.seed)
        discriminator = PatchDiscriminator().to(device)

    # 2. Data
    num_frames, num_crop_frames = count_frames(args, vae)
    train_clips, validation_clips = prepare_clips(args, accelerator)

    def mel_dataset(clips, crop, num_crop_frames):
        dataset = ClipDataset(
            clips,
            sampling_rate=MEL_SAMPLING_RATE,
            num_samples=num_frames * MEL_HOP_LENGTH,
            crop=crop,
            seed=args.seed,
        )
        return MelDataset(dataset, num_crop_frames, args.seed)

    dataset = mel_dataset(train_clips, args.crop, num_crop_frames)
    scale_dataset = mel_dataset(select_clips(train_clips, args.num_scale_clips, args.seed), args.crop, num_frames)
    validation_dataset = mel_dataset(validation_clips, "head", num_frames)
    if not args.pretrained_model_name_or_path:
        num_clips = max(1, NUM_START_FRAMES // num_crop_frames)
        indices = range(0, len(dataset), math.ceil(len(dataset) / num_clips))
        mels = torch.stack([dataset[(0, index)]["mel"] for index in indices]).unsqueeze(1)
        if can_initialise(vae):
            initialise(vae, mels)
        else:  # log-mel values lie around -6, a long way for the optimizer to go
            torch.nn.init.constant_(vae.decoder.conv_out.bias, float(mels.mean()))
    vae.to(device)

    # 3. Optimizers and schedules, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(train_clips) * args.num_train_epochs / step_size)

    optimizer_options = {
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
        "foreach": True,
    }
    optimizer = torch.optim.AdamW(
        parameters, lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), **optimizer_options
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
            betas=(0.5, args.adam_beta2),  # momentum would lag behind a moving opponent
            **optimizer_options,
        )
        discriminator, discriminator_optimizer = accelerator.prepare(discriminator, discriminator_optimizer)
        models.append(discriminator)
    ema = None
    if args.use_ema:
        ema = EMAModel(parameters, decay=args.ema_decay, foreach=True)
        ema.to(device)
        accelerator.register_for_checkpointing(ema)

    settings = {
        name: getattr(args, name)
        for name in (
            "seed",
            "train_batch_size",
            "gradient_accumulation_steps",
            "crop",
            "audio_length_in_s",
            "length_factors",
        )
    } | {"num_clips": len(train_clips), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(args, accelerator, settings)
    log = Log(output_dir / "log.jsonl", first_step, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers("pipeline-tango-vae", config={k: str(v) for k, v in vars(args).items()})

    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(train_clips), args, accelerator, first_step, num_steps),
        collate_fn=list_of_items,
        num_workers=args.num_workers,
        worker_init_fn=ignore_sigterm,
    )
    logger.info(
        f"training a VAE of {sum(p.numel() for p in parameters):,} parameters on {device}, "
        f"{accelerator.num_processes} process(es), {accelerator.mixed_precision} mixed precision"
    )
    logger.info(
        f"data: {len(train_clips)} clips, cut or padded to {num_frames} frames, {num_crop_frames} at a time; "
        f"validation: {len(validation_clips)}"
    )
    logger.info(
        f"{num_steps} steps of {step_size} clips ({num_steps * step_size / len(train_clips):.1f} epochs), from step "
        f"{first_step}"
    )

    # 4. The loop
    latent_shape = (vae.config.latent_channels, num_crop_frames // factor, NUM_MEL_BINS // factor)
    best = min(
        (entry["validation_error"] for entry in read_log(log.path) if "validation_error" in entry), default=None
    )
    step, figures = first_step, []
    started = time.monotonic()
    bar = tqdm(
        total=num_steps,
        initial=first_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for batch in loader:
        generators = [
            keyed_generator(args.seed, NOISE, epoch, index) for epoch, index in zip(batch["epoch"], batch["index"])
        ]
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
                opponent = accelerator.unwrap_model(discriminator)  # no gradients of it for DDP to wait for
                opponent.requires_grad_(False)
                with accelerator.autocast():
                    adversarial_loss = -opponent(reconstruction).float().mean()
                opponent.requires_grad_(True)
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
                real, fake = logits.chunk(2)  # (batch, 1, num_crop_frames / 8, num_mel_bins / 8) each
                discriminator_loss = 0.5 * (torch.relu(1 - real) + torch.relu(1 + fake)).mean()
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
        means = torch.stack([torch.stack(list(each.values())).detach() for each in figures]).mean(0)
        means = dict(zip(figures[0], accelerator.reduce(means, reduction="mean").tolist()))
        figures.clear()
        if not math.isfinite(sum(means.values())):
            raise FloatingPointError(f"the loss is {means['loss']} at step {step}: lower --learning_rate")
        log.write(step, **means, lr=learning_rate)
        bar.update()
        bar.set_postfix(error=f"{means['error']:.4f}", lr=f"{learning_rate:.2e}")

        if (step % args.validation_steps == 0 or step == num_steps) and validation_clips:
            if ema is not None:
                ema.store(parameters)
                ema.copy_to(parameters)
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
            if ema is not None:
                ema.restore(parameters)
            accelerator.wait_for_everyone()

        stop = bool(stop_requested)
        if accelerator.num_processes > 1:
            stop = bool(accelerator.reduce(torch.tensor(float(stop), device=device), reduction="sum") > 0)
        if step % args.checkpointing_steps == 0 or stop or step == num_steps:
            save_checkpoint(args, accelerator, step, settings)
        if stop and step < num_steps:
            bar.close()
            logger.info(f"stopped at step {step} of {num_steps}; go on with --resume_from_checkpoint latest")
            accelerator.end_training()
            return 0
    bar.close()

    # 5. The end
    if ema is not None:
        ema.copy_to(parameters)
    entries = [entry for entry in read_log(log.path) if "error" in entry] if accelerator.is_main_process else []
    tail = entries[-max(1, len(entries) // 20) :]
    summary = {
        "steps": step,
        "clips": len(train_clips),
        "parameters": f"{sum(p.numel() for p in parameters):,}",
        "training error (last 5% of the steps)": f"{sum(e['error'] for e in tail) / max(1, len(tail)):.4f}",
        "best validation error": "none" if best is None else f"{best:.4f}",
        "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
    }
    save_result(args, accelerator, vae, scale_dataset, "model", summary)
    accelerator.wait_for_everyone()  # or a process may hang that leaves while another is still at work
    accelerator.end_training()
    return 0


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
