"""Train a UNet, and the decoder of the VAE, on scenes that are mixed on the GPU, within a time limit.

    python -m examples.sound_library.train_scenes PACKED --text_encoder TEXT --output_dir OUT --seconds 480

PACKED is written by `examples.sound_library.pack`, TEXT by `examples.sound_library.train_text`, whose text encoder is
left as it is. Worker processes draw the scenes, and the GPU mixes them, so that no two steps see the same clip. Beside
the diffusion loss there is one on the UNet's cross-attention (`attention_loss.py`), and with `--teacher RUN` one on
the difference to a UNet that is told one sound at a time (`composition.py`). Then the decoder of the VAE is trained.
OUT gets folders of components for `assemble.py --components`, with averaged weights in float16, and `args.json` and
`log.jsonl` for its `--runs`. With `--checkpoint FILE` the training of the UNet can be stopped and goes on, by the same
command, from the last time that it was saved; with `--max_steps` it then gives the same weights as without the stop.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from examples.sound_library.attention_loss import attention_loss, observe
from examples.sound_library.composition import Teacher, draw_timesteps, leaning, predict
from examples.sound_library.pack import read_packed, recordings_of
from examples.sound_library.probe import read_text_encoder
from examples.sound_library.scene_batches import (
    SAMPLES_PER_FRAME,
    SceneBatches,
    Sounds,
    linear_encoder,
    load_batches,
    validation_scenes,
)
from examples.sound_library.train_text import decay, open_log, save
from pipeline_tango import TANGO_TINY


HERE = Path(__file__).parent
LENGTH_SHARES = {40960: 0.15, 81920: 0.6, 163840: 0.25}  # samples of a clip -> share of the batches
FRAMES_OF_PARTS = 64  # that a teacher needs for each sound, on average
LEANING_TIMESTEP = 937  # of 1000: almost nothing but noise
SAVING_IN_S = 14  # reserved for validating and saving at the end
SCHEDULER_CONFIG = {  # that of `training.train`
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder written by examples.sound_library.pack")
    parser.add_argument(
        "--text_encoder",
        type=Path,
        required=True,
        help="OUT of train_text, or of another run",
    )
    parser.add_argument("--unet_config", type=Path, default=HERE / "unet_second.json", help="config of the UNet")
    parser.add_argument("--unet", type=Path, help="folder of the weights to start from, instead of --unet_config")
    parser.add_argument(
        "--new_position_channels",
        type=int,
        default=0,
        help="inputs that --unet gets beside its own, which tell where in the clip a frame is",
    )
    parser.add_argument(
        "--position_scale", type=float, default=1.0, help="factor of the weights that position channels of --unet have"
    )
    parser.add_argument("--vae", type=Path, default=Path(TANGO_TINY) / "vae", help="VAE, whose encoder is kept")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the whole run")
    parser.add_argument("--decoder_seconds", type=float, default=40, help="of these, the decoder at the end")
    parser.add_argument("--batch_size", type=int, default=128, help="clips of 5.12 s; double of 2.56, half of 10.24")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the UNet")
    parser.add_argument("--attention_weight", type=float, default=0.1, help="of the loss on the cross-attention")
    parser.add_argument(
        "--teacher",
        type=Path,
        help="folder with unet and text_encoder, of another run, that are told the sounds of a scene one by one",
    )
    parser.add_argument("--teacher_weight", type=float, default=0.5, help="of the difference to its predictions")
    parser.add_argument(
        "--trained",
        nargs="+",
        metavar="PART[=FACTOR]",
        help="parts of the names of the UNet's parameters to train, as attn2.to_q (default: all), with a factor of "
        "the learning rate; of conv_in.weight only what reads position channels",
    )
    parser.add_argument("--lr_warmup_steps", type=int, default=200, help="steps of linear warm-up")
    parser.add_argument("--ema_decay", type=float, default=0.999, help="of the averaged weights")
    parser.add_argument("--num_workers", type=int, default=max((os.cpu_count() or 2) - 3, 0), help="of the scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on CPUs float32")
    parser.add_argument(
        "--memory_format",
        choices=("channels_last", "contiguous_format"),
        help="default: on a GPU the faster",
    )
    parser.add_argument("--save_every", type=float, default=90, help="seconds between two validations, with saving")
    parser.add_argument(
        "--sequence_share",
        type=float,
        help="share of sequences among the scenes (default: by length, 0.38 at 5.12 s)",
    )
    parser.add_argument("--num_validation_scenes", type=int, default=48, help="held-out scenes of each kind")
    parser.add_argument(
        "--max_steps", type=int, help="of each part; the UNet's learning rate then falls by steps, not by time"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="file to go on from, if it is there, and to write whenever the UNet is saved"
    )
    parser.add_argument("--max_recordings", type=int, help="read about so many recordings only")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if min(args.decoder_seconds, args.attention_weight, args.teacher_weight) < 0:
        parser.error("--decoder_seconds, --attention_weight and --teacher_weight have to be at least 0")
    if args.seconds <= args.decoder_seconds + SAVING_IN_S:
        parser.error(
            f"--seconds has to be more than {args.decoder_seconds + SAVING_IN_S:g}: those of the decoder, and "
            f"{SAVING_IN_S} for saving"
        )
    if args.batch_size < 1 or args.num_workers < 0 or (args.max_steps is not None and args.max_steps < 1):
        parser.error("--batch_size and --max_steps have to be at least 1, and --num_workers not negative")
    if args.sequence_share is not None and not 0 <= args.sequence_share <= 1:
        parser.error("--sequence_share has to be from 0 to 1")
    for name in ("packed", "text_encoder", "vae", "unet", "teacher"):
        if getattr(args, name) is not None and not getattr(args, name).is_dir():
            parser.error(f"`{name}` has to be a folder, not {getattr(args, name)}")
    if args.new_position_channels < 0 or not 0 <= args.position_scale < math.inf:
        parser.error("--new_position_channels and --position_scale have to be at least 0")
    if not args.unet and (args.new_position_channels or args.position_scale != 1):
        parser.error("--new_position_channels and --position_scale need --unet")
    try:
        rates_of(args.trained)
    except ValueError:
        parser.error("--trained: FACTOR has to be a number above 0")
    if args.teacher is not None and not (args.teacher / "unet").is_dir():
        parser.error(f"`teacher` {args.teacher} has no folder unet")
    return args


def rates_of(trained):
    """Factors of the learning rate by part of the name of a parameter; 1 for all if `trained` is `None`.

    >>> rates_of(["attn2", "conv_in=0.2"])
    {'attn2': 1.0, 'conv_in': 0.2}
    """
    rates = {}
    for each in [""] if trained is None else trained:
        part, _, factor = each.partition("=")
        rates[part] = float(factor or 1)
    if not all(0 < rate < math.inf for rate in rates.values()):
        raise ValueError
    return rates


# Losses


def v_losses(scheduler, model_pred, latents, noise, timesteps, snr_gamma=5.0):
    """Squared errors of v `(batch,)` with min-SNR weights, whose mean is the loss of `training.objective`, which
    examples may not import."""
    alpha_squared = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha_squared / (1 - alpha_squared)
    weights = snr.clamp(max=snr_gamma) / (snr + 1)  # Hang et al. 2023, arXiv 2303.09556
    target = scheduler.get_velocity(latents, noise, timesteps)
    errors = F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)
    return errors * weights


class Models:
    """UNet and text encoder, which is frozen, with the empty prompt that text is dropped for, and maybe a teacher."""

    def __init__(self, unet, text_encoder, scheduler, empty, teacher=None):
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder.eval().requires_grad_(False), scheduler
        self.empty_ids, self.empty_mask = empty
        self.teacher = teacher
        self.observed = observe(unet)

    def losses(self, sounds, batch, generator=None, drop=0.1, num_clips=None):
        """Diffusion loss, loss on the cross-attention, and difference to the teacher's prediction, averages over the
        first `num_clips` of a batch.

        Args:
            generator (`torch.Generator`, *optional*): of noise at fixed timesteps, for validation.
            drop (`float`): share of the captions that are replaced by the empty prompt.
        """
        latents = sounds.latents(batch)[:num_clips]
        names = ("ids", "mask", "words", "heard")
        ids, mask, words, heard = (self.on_device(batch[name])[:num_clips] for name in names)
        empty = torch.rand(len(ids), device=latents.device) < drop
        ids = torch.where(empty[:, None], self.empty_ids, ids)
        mask = torch.where(empty[:, None], self.empty_mask, mask)
        words = torch.where(empty[:, None], -1, words)
        num_told = self.num_told(batch, latents.shape[2])[:num_clips]
        if self.teacher is not None:
            num_told = torch.where(empty, 1, num_told)
        told, weights = num_told > 0, 1.0
        num_timesteps = self.scheduler.config.num_train_timesteps
        if generator is None:
            noise = torch.randn_like(latents)
            timesteps = draw_timesteps(told, num_timesteps)
            weights = (~told).float()  # the teacher knows better than a single clip
        else:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            timesteps = (torch.arange(len(latents), device=latents.device) * 125 + 62) % num_timesteps
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(self.unet.dtype)
        model_pred = predict(self.unet, self.text_encoder, noisy, timesteps, ids, mask)
        attention = attention_loss(self.observed, words, heard, latents.shape[2:])
        diffusion = (weights * v_losses(self.scheduler, model_pred, latents, noise, timesteps)).mean()
        if not told.any():
            return diffusion, attention, torch.zeros_like(diffusion)
        alone = (self.on_device(batch[name])[:, :num_clips] for name in ("alone_ids", "alone_mask"))
        ids, mask = (
            torch.where(empty[:, None], nothing, each)[:, told]
            for each, nothing in zip(alone, (self.empty_ids, self.empty_mask), strict=True)
        )
        targets = self.teacher.targets(noisy[told], timesteps[told], num_told[told], ids, mask, batch["cut"])
        return diffusion, attention, (model_pred[told] - targets).float().square().mean() * told.float().mean()

    def leanings(self, batch):
        """How far what is predicted of noise for sequences of two leans to the first sound, before the second begins
        and after: 1 and -1 if the UNet gives what the teacher gives that is told one sound at a time."""
        ids, mask, alone_ids, alone_mask = (
            self.on_device(batch[name]) for name in ("ids", "mask", "alone_ids", "alone_mask")
        )
        num_channels, (_, num_bands) = self.unet.config.out_channels, self.unet.config.sample_size
        shape = len(ids), num_channels, batch["num_samples"] // SAMPLES_PER_FRAME, num_bands
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(ids.device, self.unet.dtype)
        timesteps = torch.full((len(ids),), LEANING_TIMESTEP, device=ids.device)
        prediction = predict(self.unet, self.text_encoder, noise, timesteps, ids, mask)
        means = []
        for frames in (slice(None, batch["cut"]), slice(batch["cut"], None)):
            part = noise[:, :, frames].contiguous()
            told = [self.teacher.predict(part, timesteps, alone_ids[i], alone_mask[i]) for i in range(2)]
            means.append(round(float(leaning(prediction[:, :, frames], *told).mean()), 3))
        return means

    def on_device(self, array):
        return torch.from_numpy(array).to(self.empty_ids.device)

    def num_told(self, batch, num_frames):
        """How many texts the teacher is told of each scene `(batch,)`: none where their parts would be shorter than
        what it was trained on."""
        if self.teacher is None:
            return torch.zeros(len(batch["ids"]), dtype=torch.long, device=self.empty_ids.device)
        num_told = self.on_device(batch["num_told"])
        return num_told * (num_told <= num_frames // FRAMES_OF_PARTS)


# Training


def faster_layout(models, sounds, batch):
    """The memory format of the convolutions with which a step takes less time on this GPU."""
    seconds = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        models.unet.to(memory_format=layout)
        for number in range(9):
            if number == 4:
                torch.cuda.synchronize()
                begin = time.monotonic()
            sum(models.losses(sounds, batch)).backward()
            models.unet.zero_grad()
        torch.cuda.synchronize()
        seconds[layout] = (time.monotonic() - begin) / 5
    return min(seconds, key=seconds.get), {str(layout): round(each, 4) for layout, each in seconds.items()}


class Average:
    """Weights of a model in float32, which are optimized whatever the model's dtype, and their exponential moving
    average.

    Args:
        rates (`dict[str, float]`): factor of the learning rate of the parameters with a part in their names, the first
            that fits. Those that none fits are not trained.
    """

    def __init__(self, model, rates, decay):
        self.parameters, factors, self.decay = [], [], decay
        for name, parameter in model.named_parameters():
            factor = next((rate for part, rate in rates.items() if part in name), None)
            if factor is not None:
                self.parameters.append(parameter)
                factors.append(factor)
            parameter.requires_grad_(factor is not None)
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.averages = [p.clone() for p in self.weights]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        options = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": self.weights[0].is_cuda}
        by_factor = {}
        for weight, factor in zip(self.weights, factors, strict=True):
            by_factor.setdefault(factor, []).append(weight)
        groups = [{"params": weights, "factor": factor} for factor, weights in by_factor.items()]
        self.optimizer = torch.optim.AdamW(groups, **options)

    @torch.no_grad()
    def use(self, weights):
        torch._foreach_copy_(self.parameters, weights)

    @torch.no_grad()
    def update(self, step, learning_rate):
        """One step of the optimizer by the model's gradients. Returns the norm of the gradient."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            if parameter.grad is None:
                weight.grad.zero_()
        used = [(w.grad, p.grad) for w, p in zip(self.weights, self.parameters, strict=True) if p.grad is not None]
        torch._foreach_copy_(*map(list, zip(*used, strict=True)))
        for parameter in self.parameters:
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.optimizer.step()
        self.use(self.weights)
        torch._foreach_lerp_(self.averages, self.weights, 1 - min(self.decay, (1 + step) / (10 + step)))
        return norm

    def state_dict(self):
        return {"weights": self.weights, "averages": self.averages, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state):
        torch._foreach_copy_(self.weights, state["weights"])
        torch._foreach_copy_(self.averages, state["averages"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.use(self.weights)


KEPT_FLAGS = ("text_encoder", "teacher", "batch_size", "learning_rate", "trained", "lr_warmup_steps")
KEPT_FLAGS += ("ema_decay", "max_steps", "dtype", "attention_weight", "teacher_weight", "sequence_share")
KEPT_FLAGS += ("max_recordings", "new_position_channels", "position_scale")  # when a run goes on


def read_checkpoint(args):
    """What `save_checkpoint` wrote, or an empty `dict`.

    Raises:
        ValueError: if it was written with other flags.
    """
    if args.checkpoint is None or not args.checkpoint.exists():
        return {}
    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    for name in KEPT_FLAGS:
        before, now = state["flags"][name], str(getattr(args, name))
        if before != now:
            raise ValueError(f"`{name}` has to be {before}, as in the run that {args.checkpoint} is of, not {now}.")
    return state


def save_checkpoint(path, average, args, log, **progress):
    partial = path.with_name(f".{path.name}.part")
    state = {
        "flags": {name: str(getattr(args, name)) for name in KEPT_FLAGS},
        "step": log.step,
        "seconds": log.seconds(),
        **progress,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state() if args.device.startswith("cuda") else None,
        "average": average.state_dict(),
    }
    torch.save(state, partial)
    partial.replace(path)


def train_denoiser(models, sounds, batches, validation, state, args, log):
    """Train the UNet until what the decoder needs of the time is left, from `state` (see `read_checkpoint`) on. Saves
    the averages."""
    unet, device = models.unet.to(getattr(torch, args.dtype)), models.empty_ids.device
    if args.memory_format:
        unet.to(memory_format=getattr(torch, args.memory_format))
    elif device.type == "cuda":
        layout, seconds = faster_layout(models, sounds, next(batches))
        unet.to(memory_format=layout)
        log(memory_format=str(layout), seconds_per_step=seconds)
    average = Average(unet, rates_of(args.trained), args.ema_decay)
    if args.trained and unet.conv_in.weight.requires_grad:
        of_positions = torch.arange(unet.config.in_channels, device=device) >= unet.config.out_channels
        unet.conv_in.weight.register_hook(lambda gradient: gradient * of_positions[:, None, None])
    num_batches, num_clips = state.get("num_batches", 0), state.get("num_clips", 0)
    if state:
        average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])

    @torch.no_grad()
    def validate_and_save():
        average.use(average.averages)
        figures = {}
        random = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None
        for kind, (_, batch) in validation.items():
            torch.manual_seed(3)
            loss, attention, told = models.losses(sounds, batch, torch.Generator(device).manual_seed(3), drop=0)
            figures[f"validation_{kind}"] = round(float(loss), 5)
            if told:
                figures[f"teacher_{kind}"] = round(float(told), 5)
            if kind in ("sequence", "three"):
                figures[f"attention_{kind}"] = round(float(attention), 4)
        if models.teacher is not None and "sequence" in validation:
            figures["leaning_first"], figures["leaning_second"] = models.leanings(validation["sequence"][1])
        torch.set_rng_state(random[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(random[1])
        log(**figures)
        save(unet, args.output_dir / "unet")
        average.use(average.weights)
        if args.checkpoint:
            progress = {"begin": begin, "num_batches": num_batches, "num_clips": num_clips}
            save_checkpoint(args.checkpoint, average, args, log, **progress)

    end = args.seconds - args.decoder_seconds - SAVING_IN_S / 2
    logged = saved = log.seconds()
    begin = state.get("begin", logged)
    recent, parts = [], 1
    while log.seconds() < end and log.step != args.max_steps:
        batch = next(batches)
        num_batches = batch["number"] + 1
        progress = (log.seconds() - begin) / max(end - begin, 1e-6)
        progress = log.step / args.max_steps if args.max_steps else progress
        learning_rate = args.learning_rate * decay(progress) * min(1, (log.step + 1) / args.lr_warmup_steps)
        try:
            losses = models.losses(sounds, batch, num_clips=max(len(batch["ids"]) // parts, 1))
            weights = 1.0, args.attention_weight, args.teacher_weight
            sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
        except torch.cuda.OutOfMemoryError:
            unet.zero_grad()
            torch.cuda.empty_cache()
            parts *= 2
            log(out_of_memory_at=batch["num_samples"])
            continue
        norm = average.update(log.step, learning_rate)
        log.step += 1
        num_clips += len(batch["ids"]) // parts
        recent.append(torch.stack(losses).detach())
        if log.step in (1, 10) or log.seconds() - logged > 10:
            means = torch.stack(recent).mean(0).tolist()
            if not all(map(math.isfinite, means)):
                raise ValueError(f"the loss is {means[0]} at step {log.step}; the last saved weights are from before.")
            rates = {"lr": float(f"{learning_rate:.3g}"), "grad_norm": round(float(norm), 3), "num_clips": num_clips}
            if models.teacher is not None:
                rates["teacher_loss"] = round(means[2], 5)
            log(loss=round(means[0], 5), attention_loss=round(means[1], 4), **rates)
            recent, logged = [], log.seconds()
        if log.seconds() - saved > args.save_every:
            validate_and_save()
            saved = logged = log.seconds()
    validate_and_save()


def train_decoder(vae, sounds, batches, validation, args, log):
    """Train the decoder of the VAE for the rest of the time. Saves its average."""
    device = sounds.device
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    averages = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, betas=(0.9, 0.99), weight_decay=0.0)
    held_out = {
        k: sounds.mel(batch)[:16] for k, (_, batch) in validation.items() if k in ("single", "speech", "music")
    }

    @torch.no_grad()
    def errors():
        decoded = {kind: vae.decode(vae.encode(mel).latent_dist.mean).sample for kind, mel in held_out.items()}
        return {f"validation_{k}_mel": round(float((decoded[k] - mel).abs().mean()), 5) for k, mel in held_out.items()}

    log(**errors())
    begin, end, step, recent = log.seconds(), args.seconds - SAVING_IN_S / 2, 0, []
    while log.seconds() < end and step != args.max_steps:
        batch = next(batches)
        mel = sounds.mel(batch)
        mel = mel[: max(args.batch_size * 128 // mel.shape[2], 1)]  # a quarter of a batch
        progress = (log.seconds() - begin) / max(end - begin, 1e-6)
        decayed = max(0.02, math.cos(math.pi / 2 * min(progress, 1)))
        optimizer.param_groups[0]["lr"] = 4e-4 * min(1, (step + 1) / 50) * decayed
        with torch.no_grad():
            latents = vae.encode(mel).latent_dist.sample()
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            decoded = vae.decode(latents).sample
        loss = (decoded.float() - mel).abs().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        torch._foreach_lerp_(averages, [p.detach() for p in trained], 1 - min(0.998, step / (9 + step)))
        recent.append(loss.detach())
    if step:
        with torch.no_grad():
            for parameter, each in zip(trained, averages, strict=True):
                parameter.copy_(each)
        log(decoder_steps=step, mel_error=round(float(torch.stack(recent[-50:]).mean()), 5), **errors())
        save(vae, args.output_dir / "vae")


def with_position_channels(unet, num_channels, scale=1.0):
    """The same UNet with more input channels (`pipeline_tango.positions`), which it does not use yet, and the weights
    of those that it has times `scale`."""
    unet.conv_in.weight.data[:, unet.config.out_channels :] *= scale
    if num_channels == 0:
        return unet
    widened = UNet2DConditionModel.from_config(unet.config, in_channels=unet.config.in_channels + num_channels)
    weights = unet.state_dict()
    weights["conv_in.weight"] = F.pad(weights["conv_in.weight"], (0, 0, 0, 0, 0, num_channels))
    widened.load_state_dict(weights)
    return widened


def check_trained(trained, unet):
    """
    Raises:
        ValueError: if a part of names belongs to no parameter that can be trained on its own.
    """
    names = {name for name, _ in unet.named_parameters()}
    if unet.config.in_channels == unet.config.out_channels:
        names.remove("conv_in.weight")
    for part in rates_of(trained):
        if not any(part in name for name in names):
            raise ValueError(
                f"`trained` has to name parameters of the UNet that can be trained; {part!r} names none"
                + (", since this UNet has no position channels." if part in "conv_in.weight" else ".")
            )


def read_teacher(args, tokenizer):
    """The `Teacher` of `args.teacher`.

    Raises:
        ValueError: if its tokenizer is another, so that the same numbers are other words to it.
    """
    own_tokenizer, text_encoder = read_text_encoder(args.teacher)
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"`teacher` has to have the tokenizer of {args.text_encoder}; {args.teacher} has another.")
    unet = UNet2DConditionModel.from_pretrained(args.teacher / "unet", torch_dtype=torch.float32)
    return Teacher(unet.to(args.device, getattr(torch, args.dtype)), text_encoder.to(args.device))


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True

    try:
        samples, index = read_packed(args.packed, args.max_recordings)
        tokenizer, text_encoder = read_text_encoder(args.text_encoder)
        state = read_checkpoint(args)
        if args.unet:
            unet = UNet2DConditionModel.from_pretrained(args.unet, torch_dtype=torch.float32)
            unet = with_position_channels(unet, args.new_position_channels, args.position_scale)
        else:
            unet = UNet2DConditionModel.from_config(json.loads(args.unet_config.read_text()))
        teacher = args.teacher and read_teacher(args, tokenizer)
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
        encoder = linear_encoder(vae)
        check_trained(args.trained, unet)
        if unet.config.cross_attention_dim != text_encoder.config.d_model:
            raise ValueError(
                f"`{'unet' if args.unet else 'unet_config'}` has to have the `cross_attention_dim` "
                f"{text_encoder.config.d_model} of the text encoder, not {unet.config.cross_attention_dim}."
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    log = open_log(args, **({"step": state["step"], "seconds": state["seconds"], "mode": "a"} if state else {}))
    log(num_recordings=len(index), minutes=round(len(samples) / 960000, 1))

    # workers are forked before CUDA is initialised
    recordings = recordings_of(samples, index, "train")
    counts = {length: max(args.batch_size * 81920 // length, 1) for length in LENGTH_SHARES}
    lengths = {length: (counts[length], share) for length, share in LENGTH_SHARES.items()}
    start = state.get("num_batches", 0)
    scenes = SceneBatches(recordings, tokenizer, lengths, 24, args.sequence_share, start, teacher is not None)
    batches = load_batches(scenes, args.num_workers)
    held_out = recordings_of(samples, index, "heldout")
    validation = {}
    if held_out is not None:
        heldout_batches = SceneBatches(held_out, tokenizer, lengths, 26, common_cut=teacher is not None)
        validation = validation_scenes(heldout_batches, args.num_validation_scenes)

    sounds = Sounds(samples, encoder, vae.config.scaling_factor, device)
    vae.to(device)
    empty = [torch.from_numpy(each).to(device) for each in scenes.tokens([""])[:2]]
    models = Models(unet.to(device), text_encoder.to(device), DDPMScheduler(**SCHEDULER_CONFIG), empty, teacher)
    sizes = {name: sum(p.numel() for p in getattr(models, name).parameters()) for name in ("unet", "text_encoder")}
    log(num_parameters=sizes, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")

    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    save(models.text_encoder, args.output_dir / "text_encoder")
    train_denoiser(models, sounds, batches, validation, state, args, log)
    if args.decoder_seconds:
        train_decoder(vae, sounds, batches, validation, args, log)
    log.file.close()


if __name__ == "__main__":
    sys.exit(main())
