"""Train or fine-tune a Tango: `accelerate launch -m training.train --pretrained_model_name_or_path FOLDER ...`.

Everything random is drawn from generators keyed by the seed and by what it is for (which clip in which epoch, which
step), never from a running stream. So a run that was killed and resumed does exactly what an unbroken one does, and a
batch is the same however it is spread over processes and accumulation steps.
"""

import argparse
import copy
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, cast_training_params
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer

from pipeline_tango import TangoPipeline, log_mel_spectrogram
from pipeline_tango.pipeline_tango import NUM_MEL_BINS
from pipeline_tango.sound_files import draw_spectrogram, encode_wav, write_atomically

from .batches import StepSampler, ignore_sigterm, keyed_generator, list_of_items
from .data import (
    ClipDataset,
    format_report,
    inspect_clips,
    read_dataset,
    read_manifest,
    select_clips,
    write_report,
)
from .latents import CachedDataset, LatentCache, cache_key, fingerprint
from .mixing import augment
from .objective import (
    check_scheduler,
    diffusion_loss,
    diffusion_target,
    empty_prompt_rows,
    min_snr_weight,
    perturb_noise,
    sample_noise,
    sample_timesteps,
    snr,
)
from .run import Log, load_checkpoint, read_log, replacing, run, save_checkpoint


logger = get_logger(__name__)

# SD 2.1's schedule, which the released checkpoints were trained with
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# piecewise_constant needs rules that no flag gives
LR_SCHEDULERS = [each.value for each in SchedulerType if each != SchedulerType.PIECEWISE_CONSTANT]
# what a random draw is for: the first word of its key
NOISE, MIXES, DROPOUT, VALIDATION = range(4)


def add_data_arguments(parser, description=None):
    """Which sounds a training script trains on. Returns the group, for what else the script asks of them."""
    data = parser.add_argument_group("data", description)
    data.add_argument("--train_manifest", help="JSON lines, CSV, or a folder with metadata.csv or metadata.jsonl")
    data.add_argument("--validation_manifest", help="the same for validation")
    data.add_argument("--dataset_name", help="a `datasets` data set by name or path, instead of a manifest")
    data.add_argument("--dataset_split", default="train", help="its split")
    data.add_argument("--audio_column", help="column of the sound (default: by convention)")
    data.add_argument("--audio_root", help="folder that relative paths start from (default: the manifest's)")
    data.add_argument("--min_length_in_s", type=float, default=0.1, help="shorter sounds are bad data")
    data.add_argument("--on_bad_data", choices=("skip", "refuse"), default="skip", help="what to do about bad data")
    data.add_argument("--max_train_samples", type=int, help="train on a fixed random choice of this many clips")
    return data


def add_checkpoint_arguments(parser):
    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument("--output_dir", required=True)
    checkpoints.add_argument("--checkpointing_steps", type=int, default=500)
    checkpoints.add_argument("--checkpoints_total_limit", type=int, help="older ones are removed")
    checkpoints.add_argument("--resume_from_checkpoint", help="`latest`, or a checkpoint's folder")


def check_arguments(parser, args, *counts):
    """What every training script asks of its arguments: one source of data, and at least 1 for each of `counts`."""
    if bool(args.train_manifest) == bool(args.dataset_name):
        parser.error("give one of --train_manifest and --dataset_name")
    for name in counts:
        value = getattr(args, name)
        for count in value if isinstance(value, list) else [value]:
            if count is not None and count < 1:
                parser.error(f"--{name} has to be at least 1, not {count}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train or fine-tune a Tango on captioned sounds. Run it as it is or by `accelerate launch -m "
        "training.train ...` on any number of processes and machines.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    start = parser.add_argument_group("start", "a whole pipeline, or its parts")
    start.add_argument("--pretrained_model_name_or_path", help="diffusers folder or Hub repo to fine-tune")
    start.add_argument("--revision", help="revision of the Hub repo")
    start.add_argument("--variant", help="variant of its weights, for example fp16")
    start.add_argument("--unet_config", help="JSON config of a UNet to train from random weights")
    start.add_argument("--vae", help="folder or repo of the VAE (or of a pipeline that has one), with --unet_config")
    start.add_argument("--vocoder", help="the same for the vocoder")
    start.add_argument("--text_encoder", help="the same for the T5 encoder and its tokenizer")

    data = add_data_arguments(parser)
    data.add_argument("--caption_column", help="column of the caption or list of captions (default: by convention)")
    data.add_argument("--audio_length_in_s", type=float, help="length to train on, in seconds (default: the model's)")
    data.add_argument("--crop", choices=("random", "head"), default="random", help="part taken from longer sounds")
    data.add_argument("--prefix", default="", help="text put before every caption")
    data.add_argument("--num_workers", type=int, default=2, help="processes that read sounds")
    data.add_argument(
        "--cache_dir",
        help="folder to keep latents and states of a fixed text encoder in, so that epochs cost only the UNet",
    )

    mixing = parser.add_argument_group("mixing", "sounds and captions of a batch joined in pairs")
    mixing.add_argument("--augment", choices=("none", "pressure", "random"), default="none", help="rule of the mix")
    mixing.add_argument("--mix_ratio", type=float, default=0.5, help="share of the first sound, by pressure level")
    mixing.add_argument("--num_mixes", type=int, default=4, help="mixes added to each batch, at most")

    objective = parser.add_argument_group("objective")
    objective.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), help="default: the scheduler's")
    objective.add_argument("--snr_gamma", type=float, help="min-SNR weighting; 5 is usual (default: none)")
    objective.add_argument(
        "--snr_weighting",
        choices=("min_snr", "original"),
        default="min_snr",
        help="`original` uses the weight for epsilon with v_prediction too, as the original did",
    )
    objective.add_argument("--proportion_empty_prompts", type=float, default=0.0, help="share of captions made empty")
    objective.add_argument(
        "--input_perturbation", type=float, default=0.0, help="extra noise on the input; 0.1 is usual"
    )
    objective.add_argument(
        "--noise_offset", type=float, default=0.0, help="scale of a per-channel constant in the noise"
    )
    objective.add_argument("--rescale_betas_zero_snr", action="store_true", help="zero terminal SNR")

    trained = parser.add_argument_group("what trains")
    trained.add_argument("--lora_rank", type=int, help="train LoRA layers of this rank instead of the whole UNet")
    trained.add_argument("--lora_alpha", type=float, help="scale of LoRA (default: the rank)")
    trained.add_argument("--lora_dropout", type=float, default=0.0, help="dropout before LoRA layers")
    trained.add_argument(
        "--lora_targets", nargs="+", default=["to_q", "to_k", "to_v", "to_out.0"], help="layers that get LoRA"
    )
    trained.add_argument("--use_dora", action="store_true", help="weight-decomposed LoRA")
    trained.add_argument(
        "--train_text_encoder", action="store_true", help="train T5 as well (else frozen, in eval mode)"
    )
    trained.add_argument("--use_ema", action="store_true", help="keep an exponential moving average and save that")
    trained.add_argument("--ema_decay", type=float, default=0.9999, help="its decay")
    trained.add_argument("--gradient_checkpointing", action="store_true", help="less memory for about 30%% more time")
    trained.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: accelerate's setting")

    steps = parser.add_argument_group("optimisation", "steps are optimizer steps, whatever the accumulation")
    steps.add_argument("--train_batch_size", type=int, default=4, help="clips per process and accumulation step")
    steps.add_argument("--gradient_accumulation_steps", type=int, default=1)
    steps.add_argument("--max_train_steps", type=int, help="overrides --num_train_epochs")
    steps.add_argument("--num_train_epochs", type=int, default=40)
    steps.add_argument("--learning_rate", type=float, default=3e-5)
    steps.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="linear")
    steps.add_argument("--lr_warmup_steps", type=int, default=0)
    steps.add_argument("--lr_num_cycles", type=int, default=1, help="hard restarts of cosine_with_restarts")
    steps.add_argument("--lr_power", type=float, default=1.0, help="power of polynomial")
    steps.add_argument("--adam_beta1", type=float, default=0.9)
    steps.add_argument("--adam_beta2", type=float, default=0.999)
    steps.add_argument("--adam_weight_decay", type=float, default=1e-2)
    steps.add_argument("--adam_epsilon", type=float, default=1e-8)
    steps.add_argument("--use_8bit_adam", action="store_true", help="by bitsandbytes")
    steps.add_argument("--fused_adam", action="store_true", help="one kernel for all parameters")
    steps.add_argument("--max_grad_norm", type=float, default=1.0, help="0 turns clipping off")
    steps.add_argument("--seed", type=int, default=0)

    add_checkpoint_arguments(parser)

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_steps", type=int, default=500, help="steps between validations")
    validation.add_argument("--num_validation_timesteps", type=int, default=8, help="spread over the schedule")
    validation.add_argument("--validation_prompts", nargs="+", default=[], help="sounds to make every so often")
    validation.add_argument("--num_validation_inference_steps", type=int, default=25, help="their DPM++ steps")
    validation.add_argument("--validation_guidance_scale", type=float, default=3.0)

    reports = parser.add_argument_group("reports")
    reports.add_argument("--report_to", choices=("none", "tensorboard", "wandb"), default="none")
    reports.add_argument("--push_to_hub", action="store_true")
    reports.add_argument("--hub_model_id", help="owner/name (default: the name of the output folder)")
    reports.add_argument("--private", action="store_true", help="make the repo a private one")

    args = parser.parse_args(argv)
    parts = (args.unet_config, args.vae, args.vocoder, args.text_encoder)
    if bool(args.pretrained_model_name_or_path) == any(parts) or (any(parts) and not all(parts)):
        parser.error("give --pretrained_model_name_or_path, or all of --unet_config --vae --vocoder --text_encoder")
    if args.cache_dir and args.augment != "none":
        parser.error("--cache_dir holds single clips: leave out --augment")
    if args.train_text_encoder and args.lora_rank:
        parser.error("--lora_rank trains the UNet's layers only: leave out --train_text_encoder")
    if args.use_dora and not args.lora_rank:
        parser.error("--use_dora needs --lora_rank")
    if args.use_ema and args.lora_rank:
        parser.error("--use_ema averages the whole UNet: leave out --lora_rank")
    check_arguments(
        parser,
        args,
        "train_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "num_train_epochs",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
        "num_validation_timesteps",
        "lora_rank",
        "max_train_samples",
    )
    if args.seed < 0:
        parser.error(f"--seed has to be at least 0, not {args.seed}")
    if not 0 <= args.proportion_empty_prompts <= 1:
        parser.error(f"--proportion_empty_prompts has to be between 0 and 1, not {args.proportion_empty_prompts}")
    return args


def load_pipeline(args, weight_dtype):
    """The pipeline to start from, with the scheduler to save it with: `weight_dtype` where weights are large and stay
    frozen, else float32, which costs the VAE little and the latents nothing."""
    if args.pretrained_model_name_or_path:
        pipe = TangoPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype={
                "unet": weight_dtype if args.lora_rank else torch.float32,
                "text_encoder": torch.float32 if args.train_text_encoder else weight_dtype,
                "default": torch.float32,
            },
        )
    else:

        def load(cls, path, subfolder):
            inside = (Path(path) / subfolder).is_dir()
            return cls.from_pretrained(path, subfolder=subfolder if inside else "")

        text_subfolder = "tokenizer" if (Path(args.text_encoder) / "tokenizer").is_dir() else ""
        vocoder = load(SpeechT5HifiGan, args.vocoder, "vocoder")
        torch.manual_seed(args.seed)  # of the random weights
        pipe = TangoPipeline(
            vae=load(AutoencoderKL, args.vae, "vae"),
            text_encoder=load(T5EncoderModel, args.text_encoder, "text_encoder"),
            tokenizer=T5Tokenizer.from_pretrained(args.text_encoder, subfolder=text_subfolder),
            unet=UNet2DConditionModel.from_config(json.loads(Path(args.unet_config).read_text())),
            scheduler=DDPMScheduler(**SCHEDULER_CONFIG),
            vocoder=vocoder,
            num_noise_channels=vocoder.config.model_in_dim - NUM_MEL_BINS,
        )
    scheduler_config, sampler = dict(pipe.scheduler.config), type(pipe.scheduler)
    if args.prediction_type:
        scheduler_config["prediction_type"] = args.prediction_type
    if args.rescale_betas_zero_snr:
        scheduler_config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        sampler = DDPMScheduler  # few others can
    pipe.scheduler = sampler.from_config(scheduler_config)
    if args.audio_length_in_s:
        pipe.register_to_config(default_audio_length_in_s=args.audio_length_in_s)
    return pipe


class Denoiser(torch.nn.Module):
    """What gets gradients: the UNet, and the text encoder if that is trained, as one module for DDP, FSDP and
    DeepSpeed to wrap."""

    def __init__(self, unet, text_encoder=None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy_latents, timesteps, text, attention_mask):
        """`text`: hidden states (batch, tokens, hidden), or token ids (batch, tokens) if the encoder is trained."""
        if self.text_encoder is not None:
            text = self.text_encoder(text, attention_mask=attention_mask)[0]
        return self.unet(noisy_latents, timesteps, text, encoder_attention_mask=attention_mask, return_dict=False)[0]


class Latents:
    """From sounds and captions to the UNet's inputs, with the frozen models."""

    def __init__(self, pipe, args, device):
        self.pipe, self.args, self.device = pipe, args, device

    @torch.no_grad()
    def moments_of(self, waveforms):
        """Posterior mean and log-variance of `(batch, num_samples)`: float32, (batch, 2 * channels, latent frames,
        latent mel bins)."""
        mel = log_mel_spectrogram(waveforms).unsqueeze(1)  # (batch, 1, num_frames, num_mel_bins)
        posterior = self.pipe.vae.encode(mel.to(self.pipe.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def sample(self, moments, generators):
        """Latents drawn from the posterior, one generator a clip, scaled as the UNet reads them."""
        posterior = DiagonalGaussianDistribution(moments)
        noise = sample_noise(posterior.mean.shape, generators, moments.device)
        latents = posterior.mean + posterior.std * noise
        return latents * self.pipe.vae.config.scaling_factor

    def text_of(self, captions):
        """What the denoiser reads, and its mask: token ids if the encoder is trained, else hidden states."""
        if self.args.train_text_encoder:
            inputs = self.pipe.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            return inputs.input_ids.to(self.device), inputs.attention_mask.to(self.device)
        with torch.no_grad():
            text, mask, *_ = self.pipe.encode_prompt(captions, self.device, do_classifier_free_guidance=False)
        return text, mask

    def pad_text(self, states):
        """The same from states of `(tokens, hidden)` without padding."""
        mask = [torch.ones(len(each), dtype=torch.long) for each in states]
        text, mask = (torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (states, mask))
        return text.to(self.device), mask.to(self.device)


def read_clips(args, source, columns, what):
    if what == "train" and args.dataset_name:
        return read_dataset(args.dataset_name, args.dataset_split, **columns)
    return read_manifest(source, audio_root=args.audio_root, **columns)


def prepare_clips(args, accelerator):
    """Training and validation clips, after looking at every file. The report of what is wrong goes to the output
    folder; with `--on_bad_data refuse` it is an error."""
    columns = {
        name: value
        for name, value in (("audio_column", args.audio_column), ("caption_column", args.caption_column))
        if value
    }
    result = {}
    for what, source in (("train", args.train_manifest), ("validation", args.validation_manifest)):
        if what == "validation" and source is None:
            result[what] = []
            continue
        clips = read_clips(args, source, columns, what)
        good, faults = inspect_clips(clips, min_length_in_s=args.min_length_in_s, num_workers=args.num_workers)
        report = format_report(faults, len(clips))
        if faults and accelerator.is_main_process:
            path = Path(args.output_dir) / f"bad_{what}_data.json"
            write_report(faults, len(clips), path)
            logger.warning(f"{what} data: {report}\n(also in {path})")
        if faults and args.on_bad_data == "refuse":
            raise ValueError(f"{what} data: {report}")
        if not good:
            raise ValueError(f"{what} data: nothing is left. {report}")
        result[what] = good
    if args.max_train_samples and args.max_train_samples < len(result["train"]):
        result["train"] = select_clips(result["train"], args.max_train_samples, args.seed)
    return result["train"], result["validation"]


def fill_cache(args, accelerator, latents, dataset, cache):
    """Compute what the cache lacks, each process a share of it. Returns the clips' keys."""
    pipe = latents.pipe
    config = {
        "vae": fingerprint(pipe.vae),
        "text_encoder": None if args.train_text_encoder else fingerprint(pipe.text_encoder),
        "num_samples": dataset.num_samples,
        "sampling_rate": dataset.sampling_rate,
        "crop": args.crop,
        "seed": args.seed if args.crop == "random" else None,
    }
    keys = []
    for index, clip in enumerate(dataset.clips):
        captions = [] if args.train_text_encoder else [args.prefix + caption for caption in clip.captions]
        position = index if args.crop == "random" else None
        keys.append(cache_key(clip, config | {"captions": captions, "position": position}))
    missing = [index for index, key in enumerate(keys) if key not in cache]
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    for index in tqdm(missing, desc="caching", unit="clip", disable=not accelerator.is_local_main_process):
        item = dataset[(0, index)]
        tensors = {"moments": latents.moments_of(item["waveform"][None].to(latents.device))[0]}
        for i, caption in enumerate([] if args.train_text_encoder else dataset.clips[index].captions):
            text, mask = latents.text_of([args.prefix + caption])
            tensors[f"text_states.{i}"] = text[0, : int(mask.sum())].float()
        cache.put(keys[index], tensors)
    accelerator.wait_for_everyone()
    return keys


@torch.no_grad()
def validate(args, accelerator, model, scheduler, latents, dataset):
    """Mean loss over clips and timesteps, with the same noise at the same timesteps every time.

    Returns:
        The mean, and a dict from timestep to its own mean.
    """
    num_train_timesteps = scheduler.config.num_train_timesteps
    timesteps = (
        (torch.arange(args.num_validation_timesteps) + 0.5) * num_train_timesteps / args.num_validation_timesteps
    )
    timesteps = timesteps.long()
    sums = torch.zeros(args.num_validation_timesteps + 1, dtype=torch.float64, device=accelerator.device)
    model.eval()
    rounds = range(math.ceil(len(dataset) / accelerator.num_processes))  # as many in each process: FSDP waits for all
    for position in tqdm(rounds, desc="validation", leave=False, disable=not accelerator.is_local_main_process):
        index = position * accelerator.num_processes + accelerator.process_index
        weight, index = float(index < len(dataset)), index % len(dataset)
        item = dataset[(0, index)]
        moments = latents.moments_of(item["waveform"][None].to(accelerator.device))
        clean = latents.sample(moments, [keyed_generator(args.seed, VALIDATION, index)])
        text, mask = latents.text_of([args.prefix + item["caption"]])
        for i, timestep in enumerate(timesteps):
            noise = sample_noise(clean.shape, [keyed_generator(args.seed, VALIDATION, index, i)], clean.device)
            t = timestep[None].to(clean.device)
            with accelerator.autocast():
                model_pred = model(scheduler.add_noise(clean, noise, t), t, text, mask)
            target = diffusion_target(scheduler, clean, noise, t)
            sums[i] += weight * diffusion_loss(model_pred, target)[0].double()
        sums[-1] += weight
    model.train()
    sums = accelerator.reduce(sums, reduction="sum")
    means = (sums[:-1] / sums[-1]).tolist()
    return sum(means) / len(means), dict(zip(timesteps.tolist(), means))


def make_sounds(args, accelerator, pipe, step):
    """Validation prompts as WAV and PNG in `samples/step-<step>`."""
    folder = Path(args.output_dir) / "samples" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    pipe = copy.copy(pipe)  # `from_pipe` would cast the models that are being trained
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(desc="validation sounds", leave=False)
    sampling_rate = pipe.vocoder.config.sampling_rate
    pipe.unet.eval()
    for i, prompt in enumerate(args.validation_prompts):
        with accelerator.autocast():
            audio = pipe(
                prompt,
                num_inference_steps=args.num_validation_inference_steps,
                guidance_scale=args.validation_guidance_scale,
                generator=torch.Generator().manual_seed(args.seed + i),
            ).audios[0]
        write_atomically(folder / f"{i + 1}.wav", encode_wav(audio, sampling_rate))
        try:
            write_atomically(folder / f"{i + 1}.png", draw_spectrogram(audio, sampling_rate, prompt))
        except ImportError:
            logger.warning('no pictures without matplotlib: pip install "pipeline-tango[demo]"')
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_audio(prompt, torch.from_numpy(audio)[None], step, sample_rate=sampling_rate)
            if tracker.name == "wandb":
                import wandb

                tracker.log({prompt: wandb.Audio(audio, sample_rate=sampling_rate, caption=prompt)}, step=step)
    pipe.unet.train()


def save_result(args, accelerator, pipe, model, name, summary):
    """The trained weights under `output_dir/name`: a diffusers folder, or a LoRA file."""
    unet_state = None
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        unet_state = accelerator.get_state_dict(model)  # collective: every process takes part
    if not accelerator.is_main_process:
        return
    with replacing(Path(args.output_dir) / name) as folder:
        if args.lora_rank:
            from peft.utils import get_peft_model_state_dict

            TangoPipeline.save_lora_weights(
                folder,
                get_peft_model_state_dict(pipe.unet),
                unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict(),
            )
        else:
            for component in ("unet", "text_encoder") if unet_state is not None else ():
                prefix = f"{component}."
                state = {key.removeprefix(prefix): each for key, each in unet_state.items() if key.startswith(prefix)}
                if state:
                    getattr(pipe, component).load_state_dict(state)
            pipe.save_pretrained(folder)
        write_card(args, folder, summary)


def write_card(args, folder, summary):
    """Model card with figures, flags, and the last sounds for the validation prompts, which are copied beside it."""
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-audio",
        tags=["tango", "text-to-audio", *(["lora"] if args.lora_rank else [])],
    )
    base = args.pretrained_model_name_or_path
    if base and not Path(base).exists():
        data.base_model = base
    if args.lora_rank:
        use = 'pipe = TangoPipeline.from_pretrained("BASE")\npipe.load_lora_weights("THIS_FOLDER_OR_REPO")'
    else:
        use = 'pipe = TangoPipeline.from_pretrained("THIS_FOLDER_OR_REPO")'
    figures = "\n".join(f"- {name}: {value}" for name, value in summary.items())
    flags = "\n".join(f"    --{name} {value}" for name, value in sorted(vars(args).items()) if value not in (None, []))
    steps = sorted((Path(args.output_dir) / "samples").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    sounds = ""
    if steps:
        shutil.copytree(steps[-1], folder / "samples")
        for i, prompt in enumerate(args.validation_prompts, 1):
            sounds += f"\n[{prompt}](samples/{i}.wav)\n"
            if (folder / "samples" / f"{i}.png").exists():
                sounds += f"\n![spectrogram](samples/{i}.png)\n"
        sounds = f"## Sounds\n{sounds}\n"
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {Path(args.output_dir).resolve().name}\n\nTrained with `training.train` of "
        f"pipeline-tango{f', starting from `{base}`' if base else ''}.\n\n"
        f"```python\nfrom pipeline_tango import TangoPipeline\n\n{use}\n```\n\n"
        f"## Figures\n\n{figures}\n\n{sounds}## Flags\n\n{flags}\n"
    )
    ModelCard(text).save(folder / "README.md")


def train(args):
    output_dir = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(output_dir / "logs")),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop_requested = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requested.append(True))
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    device = accelerator.device

    # 1. Models
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, weight_dtype)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # adds noise by any timestep, and has velocities
    check_scheduler(scheduler)
    for frozen in (pipe.vae, pipe.vocoder, pipe.text_encoder, pipe.unet):
        frozen.requires_grad_(False)
        frozen.eval()
    pipe.vae.to(device)
    pipe.text_encoder.to(device, torch.float32 if args.train_text_encoder else weight_dtype)
    if args.lora_rank:
        from peft import LoraConfig

        pipe.unet.to(device, weight_dtype)
        torch.manual_seed(args.seed)
        pipe.unet.add_adapter(
            LoraConfig(
                r=args.lora_rank,
                lora_alpha=args.lora_alpha or args.lora_rank,
                lora_dropout=args.lora_dropout,
                target_modules=args.lora_targets,
                use_dora=args.use_dora,
            )
        )
        cast_training_params(pipe.unet, torch.float32)
    else:
        pipe.unet.to(device).requires_grad_(True)
    if args.train_text_encoder:
        pipe.text_encoder.requires_grad_(True)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            pipe.text_encoder.gradient_checkpointing_enable()
    model = Denoiser(pipe.unet, pipe.text_encoder if args.train_text_encoder else None).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # 2. Data
    sampling_rate = pipe.vocoder.config.sampling_rate
    audio_length_in_s = pipe.config.default_audio_length_in_s
    num_samples = pipe._num_latent_frames(audio_length_in_s) * pipe.vae_scale_factor * pipe.hop_length
    train_clips, validation_clips = prepare_clips(args, accelerator)
    datasets = [
        ClipDataset(clips, sampling_rate=sampling_rate, num_samples=num_samples, crop=crop, seed=args.seed)
        for clips, crop in ((train_clips, args.crop), (validation_clips, "head"))
    ]
    dataset, validation_dataset = datasets
    latents = Latents(pipe, args, device)
    empty_states = None
    if args.cache_dir:
        cache = LatentCache(args.cache_dir)
        keys = fill_cache(args, accelerator, latents, dataset, cache)
        if not args.train_text_encoder:
            text, mask = latents.text_of([""])
            empty_states = text[0, : int(mask.sum())].float().cpu()
        dataset = CachedDataset(train_clips, cache, keys, args.seed)
        if not validation_clips and not args.validation_prompts:
            pipe.vae.to("cpu")
            if not args.train_text_encoder:
                pipe.text_encoder.to("cpu")

    # 3. Optimizer and schedule, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(train_clips) * args.num_train_epochs / step_size)
    optimizer_options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if args.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
        optimizer = bitsandbytes.optim.AdamW8bit(parameters, **optimizer_options)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=args.fused_adam or None, **optimizer_options)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    accelerator.register_for_checkpointing(lr_scheduler)  # stepped by hand, once for each optimizer step
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if args.use_ema or args.validation_prompts:
            raise ValueError(
                "--use_ema and --validation_prompts need whole weights in one process: FSDP and DeepSpeed split them"
            )
    ema = None
    if args.use_ema:
        ema = EMAModel(parameters, decay=args.ema_decay, foreach=True)
        ema.to(device)
        accelerator.register_for_checkpointing(ema)
    if args.lora_rank and accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        checkpoint_trained_weights_only(accelerator)

    settings = {
        name: getattr(args, name)
        for name in ("seed", "train_batch_size", "gradient_accumulation_steps", "augment", "crop", "snr_gamma")
    } | {"num_clips": len(train_clips), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(args, accelerator, settings)
    if accelerator.is_main_process:
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
    log = Log(output_dir / "log.jsonl", first_step, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers("pipeline-tango", config={k: str(v) for k, v in vars(args).items()})

    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(len(train_clips), args, accelerator, first_step, num_steps),
        collate_fn=list_of_items,
        num_workers=args.num_workers,
        worker_init_fn=ignore_sigterm,
    )
    num_trained = sum(parameter.numel() for parameter in parameters)
    hours = len(train_clips) * num_samples / sampling_rate / 3600
    what = "LoRA layers" if args.lora_rank else "UNet and text encoder" if args.train_text_encoder else "UNet"
    weights_in_gib = sum(
        p.numel() * p.element_size() for m in (pipe.unet, pipe.text_encoder, pipe.vae) for p in m.parameters()
    )
    weights_in_gib = (weights_in_gib + num_trained * 4 * (3 if not args.use_8bit_adam else 1.5)) / 2**30
    logger.info(
        f"training the {what}: {num_trained:,} parameters on {device}, {accelerator.num_processes} process(es)"
    )
    logger.info(
        f"data: {len(train_clips)} clips, {hours:.2f} h at {num_samples / sampling_rate:g} s each; validation: "
        f"{len(validation_clips)}"
    )
    logger.info(
        f"{num_steps} steps of {step_size} clips ({num_steps * step_size / len(train_clips):.1f} epochs), from step "
        f"{first_step}; weights, gradients and optimizer take about {weights_in_gib:.1f} GiB, activations on top"
    )

    # 4. The loop
    best = min((entry["validation_loss"] for entry in read_log(log.path) if "validation_loss" in entry), default=None)
    step, losses, grad_norm = first_step, [], None
    started = time.monotonic()
    bar = tqdm(
        total=num_steps,
        initial=first_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    for i, batch in enumerate(loader):
        micro_step = first_step * args.gradient_accumulation_steps + i
        torch.manual_seed(keyed_generator(args.seed, DROPOUT, micro_step, accelerator.process_index).initial_seed())
        generators = [
            keyed_generator(args.seed, NOISE, epoch, index) for epoch, index in zip(batch["epoch"], batch["index"])
        ]
        if args.cache_dir:
            moments, captions = torch.stack(batch["moments"]).to(device), batch["caption"]
        else:
            waveforms, captions = torch.stack(batch["waveform"]).to(device), batch["caption"]
            if args.augment != "none":
                mix_key = (args.seed, MIXES, micro_step, accelerator.process_index)
                waveforms, captions = augment(
                    waveforms,
                    captions,
                    sampling_rate,
                    rule=args.augment,
                    num_mixes=args.num_mixes,
                    ratio=args.mix_ratio,
                    generator=keyed_generator(*mix_key),
                )
                generators += [keyed_generator(*mix_key, j) for j in range(len(captions) - len(generators))]
            moments = latents.moments_of(waveforms)
        clean = latents.sample(moments, generators)
        dropped = empty_prompt_rows(args.proportion_empty_prompts, generators).tolist()
        if args.cache_dir and not args.train_text_encoder:
            states = [empty_states if drop else each for drop, each in zip(dropped, batch["text_states"])]
            text, mask = latents.pad_text(states)
        else:
            captions = ["" if drop else args.prefix + caption for drop, caption in zip(dropped, captions)]
            text, mask = latents.text_of(captions)
        timesteps = sample_timesteps(scheduler.config.num_train_timesteps, generators, device)
        noise = sample_noise(clean.shape, generators, device, args.noise_offset)
        added_noise = perturb_noise(noise, generators, args.input_perturbation) if args.input_perturbation else noise

        with accelerator.accumulate(model):
            noisy_latents = scheduler.add_noise(clean, added_noise, timesteps)
            with accelerator.autocast():
                model_pred = model(noisy_latents, timesteps, text, mask)
            weights = None
            if args.snr_gamma is not None:
                weights = min_snr_weight(
                    snr(scheduler.alphas_cumprod, timesteps),
                    args.snr_gamma,
                    scheduler.config.prediction_type,
                    args.snr_weighting,
                )
            target = diffusion_target(scheduler, clean, noise, timesteps)
            loss = diffusion_loss(model_pred, target, weights).mean()
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                if args.max_grad_norm:
                    grad_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue

        # one optimizer step is done
        step += 1
        learning_rate = optimizer.param_groups[0]["lr"]  # the one that this step used
        if not accelerator.optimizer_step_was_skipped:
            lr_scheduler.step()
        if ema is not None:
            ema.step(parameters)
        mean_loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
        losses.clear()
        if not math.isfinite(mean_loss):
            bar.close()
            raise FloatingPointError(
                f"the loss is {mean_loss} at step {step}: lower --learning_rate, or use bf16 or no fp16"
            )
        figures = {"loss": mean_loss, "lr": learning_rate}
        if grad_norm is not None:
            figures["grad_norm"] = float(grad_norm)
        log.write(step, **figures)
        bar.update()
        bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{figures['lr']:.2e}")

        if step % args.validation_steps == 0 or step == num_steps:
            if ema is not None:
                ema.store(parameters)
                ema.copy_to(parameters)
            if validation_clips:
                validation_loss, by_timestep = validate(
                    args, accelerator, model, scheduler, latents, validation_dataset
                )
                log.write(step, validation_loss=validation_loss, validation_loss_by_timestep=by_timestep)
                logger.info(f"step {step}: validation loss {validation_loss:.5f}")
                if best is None or validation_loss < best:
                    best = validation_loss
                    save_result(args, accelerator, pipe, model, "best", {"step": step, "validation loss": best})
            if args.validation_prompts and accelerator.is_main_process:
                make_sounds(args, accelerator, pipe, step)
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
    steps_per_second = (step - first_step) / max(time.monotonic() - started, 1e-9)
    entries = [entry for entry in read_log(log.path) if "loss" in entry] if accelerator.is_main_process else []
    tail = entries[-max(1, len(entries) // 20) :]
    summary = {
        "steps": step,
        "clips": len(train_clips),
        "hours of sound": f"{hours:.2f}",
        "training loss (last 5% of the steps)": f"{sum(e['loss'] for e in tail) / max(1, len(tail)):.5f}",
        "best validation loss": "none" if best is None else f"{best:.5f}",
        "steps per second": f"{steps_per_second:.3f}",
    }
    name = "lora" if args.lora_rank else "model"
    save_result(args, accelerator, pipe, model, name, summary)
    if accelerator.is_main_process:
        for key, value in summary.items():
            logger.info(f"{key}: {value}")
        if args.push_to_hub:
            api = HfApi()
            repo_id = api.create_repo(
                args.hub_model_id or output_dir.resolve().name, private=args.private or None, exist_ok=True
            ).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=output_dir / name, commit_message="Upload training result")
            logger.info(f"pushed to {api.endpoint}/{repo_id}")
    accelerator.wait_for_everyone()  # or a process may hang that leaves while another is still at work
    accelerator.end_training()
    return 0


def checkpoint_trained_weights_only(accelerator):
    """Keep frozen weights out of the checkpoints: with LoRA they would be nearly all of them."""

    def save(models, weights, folder):
        if accelerator.is_main_process:
            trained = {
                n: p.detach() for n, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad
            }
            save_file(trained, os.path.join(folder, "trained.safetensors"))
        weights.clear()

    def load(models, folder):
        trained = load_file(os.path.join(folder, "trained.safetensors"))
        missing, unexpected = accelerator.unwrap_model(models.pop()).load_state_dict(trained, strict=False)
        if unexpected:
            raise ValueError(f"the checkpoint has other LoRA layers than asked for, such as {unexpected[0]}")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
