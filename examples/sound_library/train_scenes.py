"""Train UNet, text encoder and VAE decoder on scenes that are mixed on the GPU, within a time limit.

    python -m examples.sound_library.train_scenes PACKED --text_encoder TEXT --output_dir OUT --seconds 480

PACKED is written by `examples.sound_library.pack`, TEXT by `training.train_tokenizer`. Worker processes draw the
scenes, and the GPU mixes them, so that no two steps see the same clip. First the text encoder alone learns to say
which sounds come first, between, last and throughout, which tells "A then B" from "B then A"; then it goes on with
that beside the UNet's diffusion loss, or is frozen (`--freeze_text_encoder`); then the decoder of the VAE is trained
on. OUT gets folders of components for `assemble.py --components`, with averaged weights in float16, and `args.json`
and `log.jsonl` for its `--runs`. A run cannot be resumed, but another can start from its text encoder and UNet.

The text encoder alone can be trained on a CPU (`--text_only`), which leaves all of the time on a GPU to the UNet:

    python -m examples.sound_library.train_scenes PACKED --text_encoder TEXT --output_dir ORDER --text_only \\
        --text_seconds 3600 --batch_size 16
    python -m examples.sound_library.train_scenes PACKED --text_encoder ORDER --output_dir OUT --text_seconds 0 \\
        --freeze_text_encoder
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import T5EncoderModel, T5Tokenizer

from examples.sound_library.pack import read_packed, recordings_of
from examples.sound_library.scenes import draw_scene
from pipeline_tango import TANGO_TINY, log_mel_spectrogram
from pipeline_tango.sound_files import write_atomically


HERE = Path(__file__).parent
MAX_TOKENS = 40
LENGTH_SHARES = {40960: 0.15, 81920: 0.6, 163840: 0.25}  # samples of a clip -> share of the batches
PLACES = ("first", "between", "last", "throughout")  # of a sound in a scene
PLACES_OF = {  # of the sounds of a scene, by relation; of all others: throughout
    "sequence": (0, 2),
    "sequence of three": (0, 1, 2),
    "sequence over background": (0, 2, 3),
}
LATENT_NOISE = 0.02  # standard deviation of the VAE's posterior
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
        help="folder of training.train_tokenizer, or OUT of another run",
    )
    parser.add_argument("--unet_config", type=Path, default=HERE / "unet_second.json", help="config of the UNet")
    parser.add_argument("--unet", type=Path, help="folder of the weights to start from, instead of --unet_config")
    parser.add_argument("--vae", type=Path, default=Path(TANGO_TINY) / "vae", help="VAE, whose encoder is kept")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, default=480, help="time limit of the whole run")
    parser.add_argument("--text_seconds", type=float, default=25, help="of these, the text encoder alone")
    parser.add_argument("--text_only", action="store_true", help="train the text encoder alone, then stop")
    parser.add_argument("--freeze_text_encoder", action="store_true", help="do not train it beside the UNet")
    parser.add_argument("--text_loss_weight", type=float, default=0.02, help="of the text's loss beside the UNet's")
    parser.add_argument("--decoder_seconds", type=float, default=40, help="of these, the decoder at the end")
    parser.add_argument("--batch_size", type=int, default=128, help="clips of 5.12 s; double of 2.56, half of 10.24")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of UNet, and of text encoder with it")
    parser.add_argument("--text_learning_rate", type=float, default=1e-3, help="of the text encoder alone")
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
    parser.add_argument("--num_validation_scenes", type=int, default=48, help="held-out scenes of each kind")
    parser.add_argument("--max_steps", type=int, default=10**9, help="of each of the three parts")
    parser.add_argument("--max_recordings", type=int, help="read about so many recordings only")
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.text_only and args.freeze_text_encoder:
        parser.error("--text_only and --freeze_text_encoder exclude each other")
    if min(args.text_seconds, args.decoder_seconds) < 0 or args.text_loss_weight < 0:
        parser.error("--text_seconds, --decoder_seconds and --text_loss_weight have to be at least 0")
    if not args.text_only and args.seconds <= args.text_seconds + args.decoder_seconds + SAVING_IN_S:
        parser.error(
            f"--seconds has to be more than {args.text_seconds + args.decoder_seconds + SAVING_IN_S:g}: those of the "
            "text encoder and the decoder, and 14 for saving"
        )
    if args.batch_size < 1 or args.max_steps < 1 or args.num_workers < 0:
        parser.error("--batch_size and --max_steps have to be at least 1, and --num_workers not negative")
    for name in ("packed", "text_encoder", "vae", "unet"):
        if getattr(args, name) is not None and not getattr(args, name).is_dir():
            parser.error(f"`{name}` has to be a folder, not {getattr(args, name)}")
    return args


class Log:
    """Prints figures and appends them to `log.jsonl`, each with its step and the time since the start."""

    def __init__(self, folder):
        self.started, self.step = time.monotonic(), 0
        self.file = open(folder / "log.jsonl", "w")

    def seconds(self):
        return time.monotonic() - self.started

    def __call__(self, **figures):
        line = json.dumps({"step": self.step, "seconds": round(self.seconds(), 1), **figures})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


# Scenes


class SceneBatches(torch.utils.data.Dataset):
    """Batches of scenes as arrays, without the sounds: batch i, its length included, depends on `seed` and i alone.

    Args:
        lengths (`dict[int, tuple[int, float]]`): for each number of samples of a clip, how many clips a batch has, and
            the share of the batches.
        names (`tuple[list[str], list[str]]`): all categories, and all captions of recordings.
    """

    def __init__(self, recordings, names, tokenizer, lengths, seed):
        self.recordings, self.tokenizer, self.lengths, self.seed = recordings, tokenizer, lengths, seed
        self.names = [{name: 1 + i for i, name in enumerate(each)} for each in names]

    def __len__(self):
        return 10**7

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        num_samples = int(rng.choice(list(self.lengths), p=[share for _, share in self.lengths.values()]))
        scenes = [draw_scene(rng, self.recordings, num_samples) for _ in range(self.lengths[num_samples][0])]
        return self.as_arrays(scenes, num_samples, rng)

    def tokens(self, captions):
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "np"}
        inputs = self.tokenizer(captions, **options)
        return inputs["input_ids"].astype(np.int64), inputs["attention_mask"].astype(np.int64)

    def as_arrays(self, scenes, num_samples, rng):
        events = [
            (
                self.recordings.rows[event.recording]["offset"] + event.start,
                number * num_samples + event.place,
                event.length,
                event.fade_in,
                event.fade_out,
            )
            for number, scene in enumerate(scenes)
            for event in scene.events
        ]
        ids, mask = self.tokens([scene.captions[0] for scene in scenes])
        return {
            "num_samples": num_samples,
            "events": np.array(events, np.int64).T.copy(),  # (5, num_events)
            "gains": np.array([event.gain for scene in scenes for event in scene.events], np.float32),
            "peaks": rng.uniform(0.5, 0.9, len(scenes)).astype(np.float32),
            "ids": ids,
            "mask": mask,
            "heard": np.stack([self.heard_at_places(scene) for scene in scenes]),
        }

    def heard_at_places(self, scene):
        """Which sounds are heard first, between, last and throughout.

        Returns:
            `np.ndarray` of int64 and shape `(4, 2, 2)`: by place (see `PLACES`) the first and the last sound, which
            are the same where there is one; of each category and caption, from 1, or 0 where nothing is heard.
        """
        captions = {}
        for event in scene.events:
            row = self.recordings.rows[event.recording]
            captions.setdefault(row["category"], row["caption"])
        categories, in_caption = self.names
        places = PLACES_OF.get(scene.relation, (3,) * len(scene.categories))
        heard = np.zeros((len(PLACES), 2, 2), np.int64)
        for place in set(places):
            here = [category for category, each in zip(scene.categories, places, strict=True) if each == place]
            for i, category in enumerate((here[0], here[-1])):
                heard[place, i] = categories[category], in_caption[captions[category]]
        return heard


def validation_scenes(batches, num_scenes):
    """Held-out scenes of 5.12 s by kind, as `(scenes, arrays)`."""
    kinds = {
        "single": lambda scene: scene.relation == "single",
        "mixed": lambda scene: scene.relation in ("mixed", "background"),
        "sequence": lambda scene: scene.relation == "sequence",
        "three": lambda scene: scene.relation.startswith("sequence ") and len(scene.categories) == 3,
        "speech": lambda scene: scene.relation == "single" and scene.categories[0] == "speech",
        "music": lambda scene: scene.relation == "single" and scene.categories[0] == "music",
    }
    chosen = {kind: [] for kind in kinds}
    for number in range(200 * num_scenes):
        scene = draw_scene(np.random.default_rng([26, number]), batches.recordings, 81920)
        for kind, wanted in kinds.items():
            if wanted(scene) and len(chosen[kind]) < num_scenes:
                chosen[kind].append(scene)
        if all(len(scenes) == num_scenes for scenes in chosen.values()):
            break
    rng = np.random.default_rng(27)
    return {k: (scenes, batches.as_arrays(scenes, 81920, rng)) for k, scenes in chosen.items() if scenes}


def load_batches(dataset, num_workers):
    # forked, so that the workers share the recordings; NumPy arrays through a pipe need no shared memory
    options = {"prefetch_factor": 6, "multiprocessing_context": "fork"} if num_workers else {}
    loader = torch.utils.data.DataLoader(
        dataset, 1, num_workers=num_workers, collate_fn=first, worker_init_fn=use_one_thread, **options
    )
    return iter(loader)


def first(items):
    return items[0]


def use_one_thread(worker):
    torch.set_num_threads(1)


class Sounds:
    """The recordings on the device: mixes scenes, and makes latents of them.

    Args:
        samples (`np.ndarray` of int16): all recordings, one after the other.
        encoder (`torch.Tensor`): see `linear_encoder`.
    """

    def __init__(self, samples, encoder, scaling_factor, device):
        self.samples, self.encoder = torch.from_numpy(samples).to(device), encoder.to(device)
        self.scaling_factor, self.device = scaling_factor, device

    @torch.no_grad()
    def mix(self, batch):
        """Waveforms `(batch, num_samples)`; what `scenes.render` gives for each scene."""
        source, place, length, fade_in, fade_out = torch.from_numpy(batch["events"]).to(self.device)
        gains, peaks = (torch.from_numpy(batch[name]).to(self.device) for name in ("gains", "peaks"))
        total = int(batch["events"][2].sum())
        event = torch.repeat_interleave(torch.arange(len(length), device=self.device), length, output_size=total)
        at = torch.arange(total, device=self.device) - (length.cumsum(0) - length)[event]  # samples since the start
        ramp = at.float() + 0.5
        fades = torch.sin(math.pi / 2 * (ramp / fade_in.float()[event]).clamp(max=1))
        rest = length.float()[event] - ramp
        fades *= torch.sin(math.pi / 2 * (rest / fade_out.clamp(min=1).float()[event]).clamp(max=1))
        values = self.samples[source[event] + at].float() * (fades * (gains / 32768)[event])
        waveforms = torch.zeros(len(peaks) * batch["num_samples"], device=self.device)
        waveforms = waveforms.index_add_(0, place[event] + at, values).view(len(peaks), -1)
        return waveforms * (peaks / waveforms.abs().amax(1).clamp(min=1e-9))[:, None]

    @torch.no_grad()
    def mel(self, batch):
        with torch.autocast(self.device.type, enabled=False):
            return log_mel_spectrogram(self.mix(batch)).unsqueeze(1)  # (batch, 1, num_frames, num_mel_bins)

    @torch.no_grad()
    def latents(self, batch):
        cells = F.pixel_unshuffle(self.mel(batch), 4).movedim(1, -1)  # (batch, num_frames / 4, num_mel_bins / 4, 16)
        latents = cells @ self.encoder[:-1] + self.encoder[-1]
        latents = latents + LATENT_NOISE * torch.randn_like(latents)
        return (self.scaling_factor * latents).movedim(-1, 1).contiguous()


@torch.no_grad()
def linear_encoder(vae):
    """The VAE's encoder as a matrix `(17, channels)`: from the 16 values of a cell of 4 x 4, and 1, to a latent.

    That of tango-tiny was made linear and frozen (`training/linear_autoencoder.py`); as a matrix it costs nothing.

    Raises:
        ValueError: if the encoder is not linear.
    """
    mel = torch.empty(4, 1, 64, 64).uniform_(-11, 1, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(mel).latent_dist.mean.movedim(1, -1).flatten(0, 2)  # (num_cells, channels)
    cells = F.pixel_unshuffle(mel, 4).movedim(1, -1).flatten(0, 2)  # (num_cells, 16)
    cells = torch.cat([cells, torch.ones(len(cells), 1)], 1).double()
    matrix = torch.linalg.lstsq(cells, latents.double()).solution
    error = float((cells @ matrix - latents).abs().mean())
    if error > LATENT_NOISE / 2:
        raise ValueError(f"`vae` has to have a linear encoder, as tango-tiny's; this one is off by {error:.3g}.")
    return matrix.float()


# Losses


def v_loss(scheduler, model_pred, latents, noise, timesteps, snr_gamma=5.0):
    """Mean squared error of v with min-SNR weights: that of `training.objective`, which examples may not import."""
    alpha_squared = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha_squared / (1 - alpha_squared)
    weights = snr.clamp(max=snr_gamma) / (snr + 1)  # Hang et al. 2023, arXiv 2303.09556
    target = scheduler.get_velocity(latents, noise, timesteps)
    errors = F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)
    return (errors * weights).mean()


class Heads(torch.nn.Module):
    """Logits of what is heard at each place of a scene, from the states of the text encoder, by linear layers.

    Twice: from the mean of the states, which can only tell the order if the states do, and from averages whose weights
    depend on the states, one for each place. Those are learnt sooner, since it is enough that the states of a sound
    tell its place; with them the states come to tell it, which the others then use.

    Returns:
        `list` of two pairs of logits, for categories and for captions, `(batch, 4, 1 + number)`. The first class is
        nothing.
    """

    def __init__(self, width, numbers):
        super().__init__()
        self.sizes = [1 + number for number in numbers]
        self.query = torch.nn.Linear(width, len(PLACES))
        self.of_mean = torch.nn.Linear(width, len(PLACES) * sum(self.sizes))
        self.of_average = torch.nn.Linear(width, sum(self.sizes))

    def forward(self, states, mask):
        mask = mask[..., None].to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)  # (batch, width)
        weights = self.query(states).masked_fill(mask == 0, -1e4).softmax(1)  # (batch, num_tokens, 4)
        averages = weights.transpose(1, 2) @ states  # (batch, 4, width)
        logits = (self.of_mean(mean).unflatten(1, (len(PLACES), -1)), self.of_average(averages))
        return [each.float().split(self.sizes, 2) for each in logits]


class Models:
    """UNet, text encoder and heads, with the empty prompt that text is dropped for. A frozen text encoder has no loss
    of its own."""

    def __init__(self, unet, text_encoder, heads, scheduler, empty):
        self.unet, self.text_encoder, self.heads, self.scheduler = unet, text_encoder, heads, scheduler
        self.empty_ids, self.empty_mask = empty
        self.frozen = False

    def freeze_text_encoder(self):
        self.frozen = True
        self.text_encoder.eval().requires_grad_(False)

    def parameters(self):
        trained = (self.unet,) if self.frozen else (self.unet, self.text_encoder, self.heads)
        return [p for model in trained for p in model.parameters()]

    def text_losses(self, ids, mask, heard):
        """Text states, and the loss of each caption for what is heard at each place, in nats; zero if frozen."""
        states = self.text_encoder(ids, attention_mask=mask)[0]
        if self.frozen:
            return states, torch.zeros(len(ids), device=states.device)
        losses = [
            F.cross_entropy(logits.transpose(1, 2), heard[..., sound, kind], reduction="none").sum(1) / 2
            for both in self.heads(states, mask)
            for kind, logits in enumerate(both)
            for sound in range(2)
        ]
        return states, sum(losses)  # sums, not means over the many classes: nearly all of them are absent

    def losses(self, sounds, batch, generator=None, drop=0.1, num_clips=None):
        """Diffusion loss and loss of the text, averages over the first `num_clips` of a batch.

        Args:
            generator (`torch.Generator`, *optional*): of noise at fixed timesteps, for validation.
            drop (`float`): share of the captions that are replaced by the empty prompt.
        """
        latents = sounds.latents(batch)[:num_clips]
        ids, mask, heard = (
            torch.from_numpy(batch[name][:num_clips]).to(latents.device) for name in ("ids", "mask", "heard")
        )
        empty = torch.rand(len(ids), device=latents.device) < drop
        ids = torch.where(empty[:, None], self.empty_ids, ids)
        mask = torch.where(empty[:, None], self.empty_mask, mask)
        num_timesteps = self.scheduler.config.num_train_timesteps
        if generator is None:
            noise = torch.randn_like(latents)
            timesteps = torch.randint(num_timesteps, (len(latents),), device=latents.device)
        else:
            noise = torch.randn(latents.shape, generator=generator, device=latents.device)
            timesteps = (torch.arange(len(latents), device=latents.device) * 125 + 62) % num_timesteps
        dtype = self.unet.dtype
        noisy = self.scheduler.add_noise(latents, noise, timesteps).to(dtype)
        states, text = self.text_losses(ids, mask, heard)
        model_pred = self.unet(noisy, timesteps, states, encoder_attention_mask=mask, return_dict=False)[0]
        kept = ~empty
        text = (text * kept).sum() / kept.sum().clamp(min=1)
        return v_loss(self.scheduler, model_pred, latents, noise, timesteps), text

    @torch.no_grad()
    def order_accuracy(self, scenes, batch, categories):
        """Share of "A then B" for which the heads put A before B; 0.5 by chance."""
        device = self.empty_ids.device
        ids, mask = (torch.from_numpy(batch[name]).to(device) for name in ("ids", "mask"))
        logits = self.heads(self.text_encoder(ids, attention_mask=mask)[0], mask)[0][0].log_softmax(2).cpu()
        pairs = [[1 + categories.index(category) for category in scene.categories] for scene in scenes]
        right = [row[0, a] + row[2, b] > row[2, a] + row[0, b] for row, (a, b) in zip(logits, pairs, strict=True)]
        return round(float(np.mean(right)), 3)


# The three parts


def by_length(batch, generator):
    """A batch of captions in four parts of captions of similar length, cut to the longest, in random order."""
    lengths = batch["mask"].sum(1)
    parts = np.array_split(np.argsort(lengths, kind="stable"), 4)
    for i in torch.randperm(len(parts), generator=generator).tolist():
        if len(parts[i]):
            length = lengths[parts[i]].max()
            cut = {name: batch[name][parts[i], :length] for name in ("ids", "mask")}
            yield cut | {"heard": batch["heard"][parts[i]]}


@torch.no_grad()
def look_to_both_sides(text_encoder, strength=3.0):
    """Let the first half of the attention heads look at earlier tokens and the others at later ones, where they do not
    tell sides yet.

    What is before a token and what is after it are the same to a new T5 encoder, whose bias by relative position is
    near zero, and training leaves them so for long: it has to learn what to look for and where at the same time.
    """
    (bias,) = (p for name, p in text_encoder.named_parameters() if "relative_attention_bias" in name)
    later, heads = len(bias) // 2, bias.shape[1] // 2  # (num_buckets, num_heads); tokens after have the second half
    if (bias[1:later].mean(0) - bias[later + 1 :].mean(0)).abs().max() < strength / 2:
        bias[later:, :heads] -= strength
        bias[1:later, heads:] -= strength


def train_text(models, batches, validation, categories, args, log):
    """Train the text encoder alone on what is heard first, between, last and throughout. Saves it.

    There is no dropout: captions are drawn anew without end, and the few steps there are teach more without it.
    """
    device = models.empty_ids.device
    models.text_encoder.eval()
    if args.text_seconds:
        look_to_both_sides(models.text_encoder)
    parameters = [*models.text_encoder.parameters(), *models.heads.parameters()]
    # the bias by relative position begins near zero, and has to become a few units before the attention tells sides
    biases = [p for name, p in models.text_encoder.named_parameters() if "relative_attention_bias" in name]
    others = [p for p in models.text_encoder.parameters() if all(p is not bias for bias in biases)]
    groups = [
        {"params": others, "lr_factor": 1},
        {"params": biases, "lr_factor": 10, "weight_decay": 0.0},
        {"params": models.heads.parameters(), "lr_factor": 5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.text_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(25)

    def report():
        figures = {}
        if "sequence" in validation:
            figures["order_accuracy"] = models.order_accuracy(*validation["sequence"], categories)
        log(text_steps=number, text_loss=round(float(torch.stack(recent).mean()), 5), **figures)
        save(models.text_encoder, args.output_dir / "text_encoder")

    number, recent, parts = 0, [], iter(())
    begin = logged = time.monotonic()
    while number < args.max_steps and time.monotonic() - begin < args.text_seconds:
        part = next(parts, None)
        if part is None:
            parts = by_length(next(batches), generator)
            continue
        ids, mask, heard = (torch.from_numpy(part[name]).to(device) for name in ("ids", "mask", "heard"))
        progress = min((time.monotonic() - begin) / args.text_seconds, 1)
        decayed = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.text_learning_rate * decayed * min(1, (number + 1) / 50) * group["lr_factor"]
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = models.text_losses(ids, mask, heard)[1].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        number += 1
        recent = [*recent[-199:], loss.detach()]
        if time.monotonic() - logged > args.save_every:
            report()
            logged = time.monotonic()
    if number:
        report()


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
            for p in models.parameters():
                p.grad = None
        torch.cuda.synchronize()
        seconds[layout] = (time.monotonic() - begin) / 5
    return min(seconds, key=seconds.get), {str(layout): round(each, 4) for layout, each in seconds.items()}


class Average:
    """The weights of the models in float32, which are optimized whatever the models' dtype, and their exponential
    moving average."""

    def __init__(self, models, learning_rate, decay):
        self.parameters, self.decay = models.parameters(), decay
        self.weights = [p.detach().float().clone() for p in self.parameters]
        self.averages = [p.clone() for p in self.weights]
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        options = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": self.weights[0].is_cuda}
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, **options)

    @torch.no_grad()
    def use(self, weights):
        torch._foreach_copy_(self.parameters, weights)

    @torch.no_grad()
    def update(self, step, learning_rate):
        """One step of the optimizer by the models' gradients. Returns the norm of the gradient."""
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            if parameter.grad is None:
                weight.grad.zero_()
        used = [(w.grad, p.grad) for w, p in zip(self.weights, self.parameters, strict=True) if p.grad is not None]
        torch._foreach_copy_(*map(list, zip(*used, strict=True)))
        for parameter in self.parameters:
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.use(self.weights)
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)
        return norm


def train_denoiser(models, sounds, batches, validation, categories, args, log):
    """Train UNet, and text encoder unless it is frozen, until what the decoder needs of the time is left. Saves the
    averages."""
    device = models.empty_ids.device
    for model in (models.unet, models.text_encoder, models.heads):
        model.to(getattr(torch, args.dtype))
    models.text_encoder.train(not models.frozen)
    if args.memory_format:
        models.unet.to(memory_format=getattr(torch, args.memory_format))
    elif device.type == "cuda":
        layout, seconds = faster_layout(models, sounds, next(batches))
        models.unet.to(memory_format=layout)
        log(memory_format=str(layout), seconds_per_step=seconds)
    average = Average(models, args.learning_rate, args.ema_decay)

    @torch.no_grad()
    def validate_and_save():
        models.text_encoder.eval()
        average.use(average.averages)
        figures = {}
        for kind, (_, batch) in validation.items():
            generator = torch.Generator(device).manual_seed(3)
            loss = models.losses(sounds, batch, generator, drop=0)[0]
            figures[f"validation_{kind}"] = round(float(loss), 5)
        if "sequence" in validation and not models.frozen:
            figures["order_accuracy"] = models.order_accuracy(*validation["sequence"], categories)
        log(**figures)
        save(models.unet, args.output_dir / "unet")
        if not models.frozen:
            save(models.text_encoder, args.output_dir / "text_encoder")
        average.use(average.weights)
        models.text_encoder.train(not models.frozen)

    end = args.seconds - args.decoder_seconds - SAVING_IN_S / 2
    begin = logged = saved = log.seconds()
    recent, num_clips, parts = [], 0, 1
    while log.seconds() < end and log.step < args.max_steps:
        batch = next(batches)
        progress = (log.seconds() - begin) / max(end - begin, 1e-6)
        decayed = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))
        learning_rate = args.learning_rate * decayed * min(1, (log.step + 1) / args.lr_warmup_steps)
        try:
            loss, text_loss = models.losses(sounds, batch, num_clips=max(len(batch["ids"]) // parts, 1))
            (loss + args.text_loss_weight * text_loss).backward()
        except torch.cuda.OutOfMemoryError:
            for p in models.parameters():
                p.grad = None
            torch.cuda.empty_cache()
            parts *= 2
            log(out_of_memory_at=batch["num_samples"])
            continue
        norm = average.update(log.step, learning_rate)
        log.step += 1
        num_clips += len(batch["ids"]) // parts
        recent.append(torch.stack([loss.detach(), text_loss.detach()]))
        if log.step in (1, 10) or log.seconds() - logged > 10:
            means = torch.stack(recent).mean(0).tolist()
            if not all(map(math.isfinite, means)):
                raise ValueError(f"the loss is {means[0]} at step {log.step}; the last saved weights are from before.")
            rates = {"lr": float(f"{learning_rate:.3g}"), "grad_norm": round(float(norm), 3), "num_clips": num_clips}
            texts = {} if models.frozen else {"text_loss": round(means[1], 5)}
            log(loss=round(means[0], 5), **texts, **rates)
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
    while log.seconds() < end and step < args.max_steps:
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
        decay = min(0.998, step / (9 + step))
        torch._foreach_lerp_(averages, [p.detach() for p in trained], 1 - decay)
        recent.append(loss.detach())
    if step:
        with torch.no_grad():
            for parameter, each in zip(trained, averages, strict=True):
                parameter.copy_(each)
        log(decoder_steps=step, mel_error=round(float(torch.stack(recent[-50:]).mean()), 5), **errors())
        save(vae, args.output_dir / "vae")


def save(model, folder):
    """Write a copy of the model in float16, in place of the folder."""
    partial = folder.with_name(f".{folder.name}.part")
    copy.deepcopy(model).cpu().half().save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def main(argv=None):
    args = parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_atomically(args.output_dir / "args.json", json.dumps(flags, indent=2).encode())
    log, device = Log(args.output_dir), torch.device(args.device)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True

    try:
        samples, index = read_packed(args.packed, args.max_recordings)
        folders = [args.text_encoder / name for name in ("tokenizer", "text_encoder")]
        folders = [folder if folder.is_dir() else args.text_encoder for folder in folders]
        tokenizer = T5Tokenizer.from_pretrained(folders[0])
        text_encoder = T5EncoderModel.from_pretrained(folders[1], dtype=torch.float32)
        if args.unet:
            unet = UNet2DConditionModel.from_pretrained(args.unet, torch_dtype=torch.float32)
        else:
            unet = UNet2DConditionModel.from_config(json.loads(args.unet_config.read_text()))
        vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).eval()
        encoder = linear_encoder(vae)
        if unet.config.cross_attention_dim != text_encoder.config.d_model:
            raise ValueError(
                f"`{'unet' if args.unet else 'unet_config'}` has to have the `cross_attention_dim` "
                f"{text_encoder.config.d_model} of the text encoder, not {unet.config.cross_attention_dim}."
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    log(num_recordings=len(index), minutes=round(len(samples) / 960000, 1))

    # workers are forked before CUDA is initialised
    categories = sorted({row["category"] for row in index})
    names = (categories, sorted({row["caption"] for row in index}))
    recordings = recordings_of(samples, index, "train")
    counts = {length: max(args.batch_size * 81920 // length, 1) for length in LENGTH_SHARES}
    lengths = {length: (counts[length], share) for length, share in LENGTH_SHARES.items()}
    captions = {163840: (4 * args.batch_size, 1.0)}  # of the longest scenes, of which half are in sequence
    scenes = SceneBatches(recordings, names, tokenizer, lengths, 24)
    text_batches = load_batches(SceneBatches(recordings, names, tokenizer, captions, 25), args.num_workers // 2)
    batches = load_batches(scenes, args.num_workers)
    held_out = recordings_of(samples, index, "heldout")
    validation = {}
    if held_out is not None:
        heldout_batches = SceneBatches(held_out, names, tokenizer, lengths, 26)
        validation = validation_scenes(heldout_batches, args.num_validation_scenes)

    sounds = Sounds(samples, encoder, vae.config.scaling_factor, device)
    vae.to(device)
    heads = Heads(text_encoder.config.d_model, list(map(len, names)))
    empty = [torch.from_numpy(each).to(device) for each in scenes.tokens([""])]
    scheduler = DDPMScheduler(**SCHEDULER_CONFIG)
    models = Models(unet.to(device), text_encoder.to(device).eval(), heads.to(device), scheduler, empty)
    sizes = {name: sum(p.numel() for p in getattr(models, name).parameters()) for name in ("unet", "text_encoder")}
    log(num_parameters=sizes, device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")

    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    save(models.text_encoder, args.output_dir / "text_encoder")
    train_text(models, text_batches, validation, categories, args, log)
    del text_batches
    if not args.text_only:
        if args.freeze_text_encoder:
            models.freeze_text_encoder()
        train_denoiser(models, sounds, batches, validation, categories, args, log)
        if args.decoder_seconds:
            train_decoder(vae, sounds, batches, validation, args, log)
    log.file.close()


if __name__ == "__main__":
    sys.exit(main())
