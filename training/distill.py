"""Distil a Tango into a student of few steps: `accelerate launch -m training.distill --train_manifest ...`.

The equations are in `consistency`. Everything random is drawn from generators keyed by the seed and by what is drawn
(see `batches`), so a run that was killed and resumed is bitwise equal to an unbroken one.
"""

import contextlib
import copy
import math
import sys
import time
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from tqdm import tqdm

from pipeline_tango import SCHEDULERS
from pipeline_tango.flags import COUNT, DECAY, FRACTION, INDEX, POSITIVE, Number
from pipeline_tango.mel import NUM_MEL_BINS
from pipeline_tango.student import check_student, student_scheduler, timesteps_of_call

from .arguments import (
    add_checkpoint_arguments,
    add_data_arguments,
    add_ema_arguments,
    add_lora_arguments,
    add_optimisation_arguments,
    add_optimizer_arguments,
    add_precision_arguments,
    add_push_arguments,
    add_report_arguments,
    build_parser,
    check_libraries,
    check_numbers,
    clip_sources,
)
from .batches import keyed_generator, step_loader
from .consistency import (
    ENDPOINTS,
    consistency_function,
    grid_timesteps,
    guidance_of_steps,
    guided,
    pseudo_huber_loss,
    sample_endpoints,
    sample_grid_steps,
    sample_guidance,
    solver_step,
    step_ends,
    step_target,
    student_timesteps,
)
from .data import (
    CAPTION_COLUMNS,
    Clip,
    ClipDataset,
    as_captions,
    csv_records,
    find_column,
    json_records,
    prepare_clips,
)
from .denoiser import (
    Denoiser,
    adapters_off,
    build_lr_scheduler,
    build_optimizer,
    checkpoint_trained_weights_only,
    load_pretrained,
    log_memory,
    lora_config,
    prepare_denoiser,
    trained_parameters,
)
from .latents import CachedDataset, Encoders, LatentCache, cache_dataset, cache_key, fingerprint
from .objective import check_scheduler, sample_noise
from .results import make_sounds, report_result, save_result
from .run import (
    averaged,
    catch_sigterm,
    end,
    load_checkpoint,
    log_plan,
    make_ema,
    mean_figures,
    open_log,
    progress_bar,
    run,
    save_checkpoint,
    shards_weights,
    start,
    stop_early,
    stop_requested,
    tail_mean,
)


logger = get_logger(__name__)

# what is drawn: after the seed the first number of a generator's key
NOISE, DROPOUT, VALIDATION, TEACHER = range(4)
# layers that LoRA of a student is on: those of latent consistency's LoRA (Luo et al. 2023, arXiv 2311.05556)
LORA_TARGETS = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut downsamplers.0.conv "
    "upsamplers.0.conv time_emb_proj"
).split()
ODE_SOLVERS = ("ddim", "dpm++", "unipc")  # without noise in their steps, on samples as the UNet reads them
GUIDANCE_CHANNELS = 256  # of the embedding of a guidance scale that is fed to the UNet


def parse_args(argv=None):
    parser = build_parser(__spec__.name, "Distil a Tango into a student of one to eight steps without guidance.")
    start = parser.add_argument_group("teacher")
    start.add_argument("--pretrained_model_name_or_path", required=True, help="diffusers folder or Hub repo")
    start.add_argument("--revision", help="revision of the Hub repo")
    start.add_argument("--variant", help="variant of its weights, for example fp16")
    start.add_argument(
        "--teacher_scheduler",
        choices=list(SCHEDULERS),
        help="samples from --prompts (default: the model's own); for trajectories one of " + ", ".join(ODE_SOLVERS),
    )

    data = add_data_arguments(parser, "captioned sounds, or prompts alone, for which the teacher makes the latents")
    data.add_argument("--prompts", help="text file of prompts, one a line, or JSON lines with captions")
    data.add_argument("--num_takes", type=COUNT, default=1, help="latents that the teacher makes for each prompt")
    data.add_argument("--num_teacher_steps", type=COUNT, help="steps of these latents (default: the model's)")
    data.add_argument("--teacher_batch_size", type=COUNT, default=8, help="of these latents")
    data.add_argument("--caption_column", help="column of the caption or list of captions (default: by convention)")
    data.add_argument("--audio_length_in_s", type=POSITIVE, help="length of clips, in seconds (default: the model's)")
    data.add_argument("--crop", choices=("random", "head"), default="random", help="part kept of longer sounds")
    data.add_argument("--num_workers", type=INDEX, default=2, help="processes that read sounds or latents")
    data.add_argument(
        "--cache_dir",
        help="folder of latents and text states (default: for prompts `latents` in the output folder, else none)",
    )

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--objective",
        choices=("consistency", "trajectory"),
        default="trajectory",
        help="`trajectory`: the student's steps go where the teacher's sampling went from --prompts. `consistency`: "
        "neighbouring timesteps have to agree, for any data, which takes many more training steps",
    )
    objective.add_argument(
        "--student_steps",
        type=COUNT,
        nargs="+",
        default=[4, 2, 1],
        help="numbers of steps that the student learns, with `trajectory`, the first of which is its default",
    )
    objective.add_argument(
        "--endpoint",
        choices=ENDPOINTS,
        default="clean",
        help="what the student goes to in one evaluation: clean latents (LCM), any earlier timestep (TCD), or the end "
        "of one of --num_phases",
    )
    objective.add_argument("--num_phases", type=COUNT, default=4, help="parts of the trajectory, with `phases`")
    objective.add_argument(
        "--num_grid_steps", type=COUNT, default=50, help="timesteps of the grid whose neighbours have to agree"
    )
    objective.add_argument("--solver", choices=("ddim", "heun"), default="heun", help="of the teacher's steps")
    objective.add_argument(
        "--guidance_scale",
        type=Number(float, 1),
        nargs="+",
        help="the teacher's guidance scale; two values are a range, from which scales are drawn and fed to the whole "
        "UNet (default: the model's)",
    )
    objective.add_argument(
        "--guidance_interval",
        type=FRACTION,
        nargs=2,
        help="fractions of the trajectory, from the noise, within which the teacher is guided (default: the model's)",
    )
    objective.add_argument("--huber_delta", type=POSITIVE, default=0.001, help="delta of the pseudo-Huber loss")
    objective.add_argument(
        "--target_decay", type=DECAY, default=0.95, help="decay of the average that gives the target; 0: no average"
    )

    trained = parser.add_argument_group("trained weights")
    add_lora_arguments(trained)
    trained.set_defaults(lora_targets=LORA_TARGETS)
    trained.add_argument(
        "--lora_dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the LoRA file, which trains in float32",
    )
    add_ema_arguments(trained, ema_decay=0.999)
    add_precision_arguments(trained)

    steps = add_optimisation_arguments(parser)
    steps.set_defaults(learning_rate=1e-4, lr_scheduler="constant_with_warmup")
    add_optimizer_arguments(steps)

    add_checkpoint_arguments(parser)

    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_steps", type=COUNT, default=500, help="steps between validations")
    validation.add_argument(
        "--validation_prompts", nargs="+", default=[], help="generate sounds for these at each validation"
    )
    validation.add_argument(
        "--num_validation_inference_steps",
        type=COUNT,
        default=4,
        help="steps of these sounds, and the student's default; with `trajectory` the first of --student_steps",
    )

    add_push_arguments(add_report_arguments(parser))

    args = parser.parse_args(argv)
    if sum(map(bool, (args.train_manifest, args.dataset_name, args.prompts))) != 1:
        parser.error("give one of --train_manifest, --dataset_name and --prompts")
    check_numbers(parser, args)
    if args.prompts and not Path(args.prompts).is_file():
        parser.error(f"--prompts: there is no file {args.prompts}")
    if args.prompts and args.validation_manifest:
        parser.error("--validation_manifest goes with sounds to train on, not with --prompts: leave it out")
    if args.guidance_scale and len(args.guidance_scale) > 2:
        parser.error("--guidance_scale takes one scale, or the two ends of a range")
    if args.guidance_scale and len(args.guidance_scale) == 2 and args.lora_rank:
        parser.error("--lora_rank: a range of guidance is fed to the whole UNet, give one --guidance_scale")
    if args.guidance_scale and args.guidance_scale != sorted(args.guidance_scale):
        parser.error(f"--guidance_scale: a range has to ascend, got {args.guidance_scale}")
    if args.guidance_interval and args.guidance_interval[0] >= args.guidance_interval[1]:
        parser.error(f"--guidance_interval has to ascend, got {args.guidance_interval}")
    if args.objective == "trajectory":
        if not args.prompts:
            parser.error("--objective trajectory learns from what the teacher samples: give --prompts")
        if args.guidance_scale and len(args.guidance_scale) == 2:
            parser.error("--objective trajectory takes one --guidance_scale")
        if args.student_steps != sorted(set(args.student_steps), reverse=True):
            parser.error(f"--student_steps have to descend, got {args.student_steps}")
    if args.endpoint == "phases" and args.num_grid_steps % args.num_phases:
        parser.error(f"--num_phases has to divide --num_grid_steps ({args.num_grid_steps}), got {args.num_phases}")
    if args.use_dora and not args.lora_rank:
        parser.error("--use_dora needs --lora_rank")
    return args


# Models


def load_pipeline(args, weight_dtype):
    """The teacher's pipeline, with what the flags leave open set from its config.

    Raises:
        ValueError: if it is a student already, or has no trajectories to follow.
    """
    pipe = load_pretrained(args, weight_dtype)
    if pipe.student is not None or pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError("`pretrained_model_name_or_path` has to be a teacher: this UNet is distilled already")
    if args.teacher_scheduler:
        pipe.scheduler = SCHEDULERS[args.teacher_scheduler].from_config(pipe.scheduler.config)
    if args.objective == "trajectory":
        check_solver(pipe.scheduler)
    if args.guidance_scale is None:
        args.guidance_scale = [float(pipe.config.default_guidance_scale)]
    if args.num_teacher_steps is None:
        args.num_teacher_steps = pipe.config.default_num_inference_steps
    if args.guidance_interval is None:
        args.guidance_interval = list(map(float, pipe.config.default_guidance_interval))
    if not args.guidance_scale[0] <= pipe.config.default_guidance_scale <= args.guidance_scale[-1]:
        pipe.register_to_config(default_guidance_scale=mean_guidance(args))
    if args.audio_length_in_s:
        pipe.register_to_config(default_audio_length_in_s=args.audio_length_in_s)
    return pipe


def check_solver(scheduler):
    """The teacher's sampling follows its ODE: with noise in the steps there is nothing for a student to learn.

    Raises:
        ValueError: if `scheduler` does not.
    """
    is_stochastic = scheduler.config.get("algorithm_type", "").startswith("sde")
    if not isinstance(scheduler, tuple(SCHEDULERS[name] for name in ODE_SOLVERS)) or is_stochastic:
        raise ValueError(
            f"--objective trajectory follows the teacher's ODE, which {type(scheduler).__name__} does not"
            f"{' by this `algorithm_type`' if is_stochastic else ''}: give --teacher_scheduler, one of "
            f"{', '.join(ODE_SOLVERS)}, and --num_teacher_steps, such as 25"
        )


def with_guidance_input(unet):
    """A copy of a UNet that reads a guidance scale beside the timestep; until it is trained, it ignores it."""
    student = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=GUIDANCE_CHANNELS)
    student.load_state_dict(unet.state_dict(), strict=False)
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student.to(unet.dtype)


class Teacher:
    """The guided predictions of the weights that distillation started from.

    Args:
        unet ([`UNet2DConditionModel`]): a frozen copy, or the student's own UNet if it trains LoRA layers, which are
            off here.
        empty_states, empty_mask (`torch.Tensor`): the encoded "", `(1, tokens, hidden)` and `(1, tokens)`.
    """

    def __init__(self, unet, empty_states, empty_mask, has_adapters):
        self.unet, self.empty, self.empty_mask = unet, empty_states, empty_mask
        self.has_adapters = has_adapters

    def active(self):
        return adapters_off(self.unet) if self.has_adapters else contextlib.nullcontext()

    def predictor(self, text, mask, guidance_scale):
        """What [`solver_step`] asks for: guided predictions of `(sample, timesteps)`, with a scale for each sample.
        Samples whose scale is 1 take one evaluation."""
        is_guided = guidance_scale != 1
        num_guided = int(is_guided.sum())
        num_tokens = max(text.shape[1], self.empty.shape[1])
        text, mask = pad_tokens(text, mask, num_tokens)
        empty, empty_mask = pad_tokens(self.empty, self.empty_mask, num_tokens)
        text = torch.cat([text, empty.to(text.dtype).expand(num_guided, -1, -1)])
        mask = torch.cat([mask, empty_mask.to(mask.dtype).expand(num_guided, -1)])

        def predict(sample, timesteps):
            sample = torch.cat([sample, sample[is_guided]])
            timesteps = torch.cat([timesteps, timesteps[is_guided]])
            model_pred = Denoiser(self.unet)(sample, timesteps, text, mask).float()
            model_pred, pred_empty = model_pred[: len(is_guided)], model_pred[len(is_guided) :]
            model_pred[is_guided] = guided(model_pred[is_guided], pred_empty, guidance_scale[is_guided])
            return model_pred

        return predict


def pad_tokens(text, mask, num_tokens):
    padding = num_tokens - text.shape[1]
    return torch.nn.functional.pad(text, (0, 0, 0, padding)), torch.nn.functional.pad(mask, (0, padding))


def embed_guidance(guidance_scale, num_channels):
    """What a student whose guidance is an input reads: the pipeline gives the same."""
    return get_timestep_embedding((guidance_scale - 1) * 1000.0, num_channels, downscale_freq_shift=1)


# Data


def read_prompts(path, caption_column=None):
    """Prompts of a text file, one a line but for comments (`#`), of JSON lines, or of CSV.

    Raises:
        ValueError: naming file and line.
    """
    path = Path(path)
    readers = {".json": json_records, ".jsonl": json_records, ".csv": csv_records}
    prompts = []
    if path.suffix.lower() not in readers:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        prompts = [line for line in lines if not line.startswith("#")]
    else:
        for number, record in readers[path.suffix.lower()](path):
            try:
                prompts += as_captions(record[find_column(record, caption_column, CAPTION_COLUMNS)])
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from None
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"--prompts: {path} lists no prompts.")
    return prompts


def latent_shape(pipe, num_frames):
    """(channels, frames, bins) of the latents of a clip."""
    return pipe.vae.config.latent_channels, num_frames, NUM_MEL_BINS // pipe.vae_scale_factor


def teacher_timesteps(args, scheduler):
    """The timesteps of the teacher's sampling, as a list of integers."""
    scheduler = type(scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(args.num_teacher_steps)
    return [round(t) for t in scheduler.timesteps.tolist()]


def sample_trajectories(args, pipe, prompts, noise):
    """Points of the teacher's sampling from `noise` `(batch, channels, frames, bins)`: float16, `(batch,
    num_teacher_steps + 1, channels, frames, bins)`, from the noise to the latents."""
    points = [noise]

    def keep(pipe, step, timestep, tensors):
        points.append(tensors["latents"])
        return {}

    pipe(
        prompts,
        audio_length_in_s=pipe.config.default_audio_length_in_s,
        num_inference_steps=args.num_teacher_steps,
        guidance_scale=mean_guidance(args),
        guidance_interval=tuple(args.guidance_interval),
        latents=noise,
        output_type="latent",
        callback_on_step_end=keep,
    )
    return torch.stack([each.float().cpu() for each in points], 1).half()


def teacher_dataset(args, accelerator, pipe, encoders, folder):
    """Latents that the teacher makes for prompts, and with `trajectory` the `points` on the way there, each process a
    share of those that the cache in `folder` lacks, as a data set that reads the cache."""
    extras = ("points",) if args.objective == "trajectory" else ()
    prompts = read_prompts(args.prompts, args.caption_column)
    prompts = [prompt for prompt in prompts for _ in range(args.num_takes)]
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = {
        "unet": fingerprint(pipe.unet),
        "text_encoder": fingerprint(pipe.text_encoder),
        "scheduler": [type(pipe.scheduler).__name__, repr(sorted(scheduler.items()))],
        "num_steps": args.num_teacher_steps,
        "guidance": [args.guidance_scale, args.guidance_interval],
        "audio_length_in_s": pipe.config.default_audio_length_in_s,
        "seed": args.seed,
        "extras": extras,
    }
    cache = LatentCache(folder)
    keys = [cache_key(prompt.encode(), settings | {"position": i}) for i, prompt in enumerate(prompts)]
    missing = [i for i, key in enumerate(keys) if key not in cache]
    missing = missing[accelerator.process_index :: accelerator.num_processes]
    pipe.set_progress_bar_config(disable=True)
    is_shown = accelerator.is_local_main_process and missing
    bar = tqdm(total=len(missing), desc="latents of the teacher", unit="clip", disable=not is_shown)
    num_frames = pipe._num_latent_frames(pipe.config.default_audio_length_in_s)
    for first in range(0, len(missing), args.teacher_batch_size):
        batch = missing[first : first + args.teacher_batch_size]
        shape = (len(batch), *latent_shape(pipe, num_frames))
        noise = sample_noise(shape, [keyed_generator(args.seed, TEACHER, i) for i in batch])
        with accelerator.autocast():
            points = sample_trajectories(args, pipe, [prompts[i] for i in batch], noise)
        for i, each in zip(batch, points):
            mean = each[-1].float() / pipe.vae.config.scaling_factor
            moments = torch.cat([mean, torch.full_like(mean, -30.0)])  # log-variance of a posterior without spread
            points_of_clip = dict.fromkeys(extras, each)
            cache.put(keys[i], {"moments": moments, "text_states.0": encoders.states_of(prompts[i])} | points_of_clip)
        bar.update(len(batch))
    bar.close()
    accelerator.wait_for_everyone()
    encoders.keep_empty_states()
    clips = [Clip(f"the latents of prompt {i + 1}", (prompt,)) for i, prompt in enumerate(prompts)]
    return CachedDataset(clips, cache, keys, args.seed, extras)


# Training


class Trajectories:
    """The loss of a student that goes along kept trajectories in steps of its own.

    Args:
        scheduler ([`DDPMScheduler`]): noise levels and prediction type.
        teacher_timesteps (`list[int]`): of the teacher's sampling.
    """

    def __init__(self, args, scheduler, teacher_timesteps):
        self.args, self.scheduler = args, scheduler
        self.timesteps = student_timesteps(teacher_timesteps, args.student_steps)
        # (number of steps, which of them): each as often as another
        self.steps = [(number, i) for number in args.student_steps for i in range(number)]

    def losses(self, model, points, text, mask, generators):
        """Loss of each sample, `(batch,)`, float32, of one step drawn for each.

        Args:
            model (`Callable`): the student, as it is trained.
            points (`torch.Tensor` of shape `(batch, num_points, channels, frames, bins)`)
        """
        draws = [int(torch.randint(len(self.steps), (), generator=g)) for g in generators]
        samples, ends, timesteps, levels, end_levels = [], [], [], [], []
        alphas_cumprod = self.scheduler.alphas_cumprod
        for row, draw in zip(points, draws):
            number, i = self.steps[draw]
            indices = step_ends(points.shape[1] - 1, number)
            samples.append(row[indices[i]])
            ends.append(row[indices[i + 1]])
            timesteps.append(self.timesteps[number][i])
            levels.append(alphas_cumprod[timesteps[-1]])
            is_last = i == number - 1
            end_levels.append(torch.ones(()) if is_last else alphas_cumprod[self.timesteps[number][i + 1]])

        def alpha_sigma(alpha_squared):
            alpha_squared = torch.stack(alpha_squared).float().to(points.device).view(-1, 1, 1, 1)
            return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

        samples, ends = torch.stack(samples), torch.stack(ends)
        kind = self.scheduler.config.prediction_type
        target = step_target(samples, ends, *alpha_sigma(levels), *alpha_sigma(end_levels), kind)
        pred = model(samples, torch.tensor(timesteps, device=points.device), text, mask)
        return pseudo_huber_loss(pred, target, self.args.huber_delta)


class Distillation:
    """The loss of a student against a teacher.

    Args:
        scheduler ([`DDPMScheduler`]): noise levels and prediction type.
        teacher ([`Teacher`])
        unet ([`UNet2DConditionModel`]): the student, for targets.
    """

    def __init__(self, args, scheduler, teacher, unet):
        self.args, self.scheduler, self.teacher, self.unet = args, scheduler, teacher, unet
        self.grid = grid_timesteps(scheduler.config.num_train_timesteps, args.num_grid_steps)

    def draw(self, generators, device):
        """Indices into the grid of t and of s, and guidance scales, `(batch,)` each."""
        args = self.args
        grid_steps = sample_grid_steps(args.num_grid_steps, generators, device)
        ends = sample_endpoints(grid_steps, args.endpoint, generators, args.num_grid_steps, args.num_phases)
        return grid_steps, ends, sample_guidance(args.guidance_scale[0], args.guidance_scale[-1], generators, device)

    def losses(self, model, averages, latents, text, mask, noise, grid_steps, ends, guidance_scale):
        """Loss of each sample, `(batch,)`, float32, with gradients into the student only.

        Args:
            model (`Callable`): the student, as it is trained.
            averages (`Callable`): a context in which the student has the weights of the targets.
        """
        args, alphas, kind = self.args, self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        grid = self.grid.to(latents.device)
        t, r, s = grid[grid_steps], grid[grid_steps - 1], grid[ends]
        noisy = self.scheduler.add_noise(latents, noise, t)
        channels = self.unet.config.time_cond_proj_dim
        condition = None if channels is None else embed_guidance(guidance_scale, channels)
        to_clean = args.endpoint == "clean"
        with torch.no_grad():
            scale = guidance_of_steps(guidance_scale, grid_steps, args.num_grid_steps, args.guidance_interval)
            with self.teacher.active():
                predict = self.teacher.predictor(text, mask, scale)
                neighbour = solver_step(predict, noisy, t, r, alphas, kind, args.solver)
            with averages():
                pred = Denoiser(self.unet)(neighbour, r, text, mask, condition)
            target = consistency_function(pred, neighbour, r, s, alphas, kind, to_clean)
        pred = model(noisy, t, text, mask, condition)
        output = consistency_function(pred, noisy, t, s, alphas, kind, to_clean)
        return pseudo_huber_loss(output, target, args.huber_delta)


@torch.no_grad()
def validate(accelerator, distillation, model, encoders, dataset):
    """Mean loss over clips, with the same draws every time. The weights of the targets are the student's."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    rounds = range(math.ceil(len(dataset) / accelerator.num_processes))
    for position in tqdm(rounds, desc="validation", leave=False, disable=not accelerator.is_local_main_process):
        index = position * accelerator.num_processes + accelerator.process_index
        weight, index = float(index < len(dataset)), index % len(dataset)
        item = dataset[(0, index)]
        moments = encoders.moments_of(item["waveform"][None].to(accelerator.device))
        text, mask = encoders.text_of([item["caption"]])
        generators = [keyed_generator(dataset.seed, VALIDATION, index, i) for i in range(4)]
        latents = encoders.latents_of(moments, generators[:1]).expand(4, -1, -1, -1)
        text, mask = text.expand(4, -1, -1), mask.expand(4, -1)
        noise = sample_noise(latents.shape, generators, latents.device)
        draws = distillation.draw(generators, latents.device)
        with accelerator.autocast():
            losses = distillation.losses(model, contextlib.nullcontext, latents, text, mask, noise, *draws)
        total += weight * torch.stack([losses.double().mean(), total.new_ones(())])
    model.train()
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1])


def mean_guidance(args):
    return sum(args.guidance_scale) / len(args.guidance_scale)


def describe_student(args, timesteps=None):
    """What the checkpoint says of the student: see [`check_student`]."""
    low, high = args.guidance_scale[0], args.guidance_scale[-1]
    if args.objective == "trajectory":
        return {
            "scheduler": "dpm++",
            # DDIM's steps, whatever the pipeline's own scheduler says
            "scheduler_options": {
                "algorithm_type": "dpmsolver++",
                "solver_order": 1,
                "final_sigmas_type": "zero",
                "use_karras_sigmas": False,
            },
            "num_inference_steps": args.student_steps[0],
            "guidance_scale": low,
            "timesteps": {str(number): each for number, each in timesteps.items()},
        }
    return {
        "scheduler": "lcm" if args.endpoint == "clean" else "tcd",
        "scheduler_options": {"original_inference_steps": args.num_grid_steps},
        "num_inference_steps": args.num_validation_inference_steps,
        "guidance_scale": low if low == high else [low, high],
    }


def distill(args):
    check_libraries(args)
    output_dir = Path(args.output_dir)
    accelerator = start(output_dir, args.mixed_precision, args.report_to, args.gradient_accumulation_steps)
    signals = catch_sigterm()
    if shards_weights(accelerator):
        raise ValueError("FSDP and DeepSpeed split the weights, of which distillation needs two sets in turn: use DDP")
    device = accelerator.device

    # 1. Models
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, weight_dtype)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    check_scheduler(scheduler)
    trajectories = None
    if args.objective == "trajectory":
        trajectories = Trajectories(args, scheduler, teacher_timesteps(args, pipe.scheduler))
    student = check_student(describe_student(args, trajectories and trajectories.timesteps))
    encoders = Encoders(pipe, device)
    pipe.to(device)
    pipe.unet.eval()

    # 2. Data, which the teacher makes before there is a student
    sampling_rate = pipe.vocoder.config.sampling_rate
    num_samples = pipe._num_latent_frames(pipe.config.default_audio_length_in_s)
    num_samples *= pipe.vae_scale_factor * pipe.hop_length
    validation_dataset = []
    if args.prompts:
        dataset = teacher_dataset(args, accelerator, pipe, encoders, args.cache_dir or output_dir / "latents")
        clips = dataset.clips
    else:
        clips, validation_clips = prepare_clips(
            clip_sources(args), accelerator, output_dir, args.num_workers, args.seed
        )
        options = {"sampling_rate": sampling_rate, "num_samples": num_samples, "seed": args.seed}
        dataset = ClipDataset(clips, crop=args.crop, **options)
        validation_dataset = ClipDataset(validation_clips, crop="head", **options)
        if args.cache_dir:
            dataset = cache_dataset(accelerator, encoders, dataset, args.cache_dir)
    empty_states, empty_mask = encoders.text_of([""])

    teacher_unet = pipe.unet
    if not args.lora_rank and trajectories is None:  # else the UNet is its own teacher, or has done its part
        teacher_unet = copy.deepcopy(pipe.unet).to(device, weight_dtype).requires_grad_(False)
        if len(args.guidance_scale) == 2:
            pipe.register_modules(unet=with_guidance_input(pipe.unet))
    model = prepare_denoiser(
        pipe,
        device,
        weight_dtype,
        lora=lora_config(args),
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    teacher = Teacher(teacher_unet, empty_states, empty_mask, has_adapters=bool(args.lora_rank))
    distillation = Distillation(args, scheduler, teacher, pipe.unet)
    if (args.prompts or args.cache_dir) and not validation_dataset and not args.validation_prompts:
        encoders.unload()

    # 3. Optimizer and schedule, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(clips) * args.num_train_epochs / step_size)
    optimizer = build_optimizer(args, trained_parameters(model))
    lr_scheduler = build_lr_scheduler(args, optimizer, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = trained_parameters(model)
    accelerator.register_for_checkpointing(lr_scheduler)  # stepped by hand, once for each optimizer step
    has_target_average = args.target_decay and trajectories is None
    target_ema = make_ema(accelerator, parameters, args.target_decay) if has_target_average else None
    ema = make_ema(accelerator, parameters, args.ema_decay) if args.use_ema else None
    if args.lora_rank:
        checkpoint_trained_weights_only(accelerator)

    def target_weights():
        return averaged(target_ema, parameters)

    settings = {
        name: getattr(args, name)
        for name in (
            "seed",
            "train_batch_size",
            "gradient_accumulation_steps",
            "crop",
            "objective",
            "student_steps",
            "endpoint",
            "num_phases",
            "num_grid_steps",
            "solver",
            "guidance_scale",
            "guidance_interval",
            "huber_delta",
            "target_decay",
        )
    } | {"num_clips": len(clips), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, settings)
    name = "lora" if args.lora_rank else "model"
    log = open_log(accelerator, output_dir, args, first_step, "pipeline-tango", (name,))
    loader = step_loader(
        dataset,
        accelerator,
        range(first_step, num_steps),
        args.num_workers,
        seed=args.seed,
        batch_size=args.train_batch_size,
        num_micro_steps=args.gradient_accumulation_steps,
    )
    log_memory(args, accelerator, pipe, parameters)
    logger.info(
        f"data: {len(clips)} clips at {num_samples / sampling_rate:g} s; validation: {len(validation_dataset)}"
    )
    log_plan(first_step, num_steps, step_size, len(clips))

    # 4. The loop
    step, figures, grad_norm = first_step, [], None
    started = time.monotonic()
    bar = progress_bar(accelerator, first_step, num_steps)
    for i, batch in enumerate(loader):
        micro_step = first_step * args.gradient_accumulation_steps + i
        dropout_key = (args.seed, DROPOUT, micro_step, accelerator.process_index)
        torch.manual_seed(keyed_generator(*dropout_key).initial_seed())
        generators = [keyed_generator(args.seed, NOISE, *key) for key in zip(batch["epoch"], batch["index"])]
        latents, text, mask = encoders.encode(batch, generators)
        if trajectories is None:
            draws = distillation.draw(generators, device)
            noise = sample_noise(latents.shape, generators, device)
        else:
            points = torch.stack(batch["points"]).float().to(device)

        with accelerator.accumulate(model):
            with accelerator.autocast():
                if trajectories is None:
                    losses = distillation.losses(model, target_weights, latents, text, mask, noise, *draws)
                else:
                    losses = trajectories.losses(model, points, text, mask, generators)
            loss = losses.mean()
            figures.append({"loss": loss.detach()})
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
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
        for each in (target_ema, ema):
            if each is not None:
                each.step(parameters)
        means = mean_figures(accelerator, figures, step, bar)
        norms = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
        log.write(step, **means, lr=learning_rate, **norms)
        bar.update()
        bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{learning_rate:.2e}")

        if step % args.validation_steps == 0 or step == num_steps:
            with averaged(ema or target_ema, parameters):
                if validation_dataset:
                    loss = validate(accelerator, distillation, model, encoders, validation_dataset)
                    log.write(step, validation_loss=loss)
                    logger.info(f"step {step}: validation loss {loss:.5f}")
                if args.validation_prompts and accelerator.is_main_process:
                    sampler, number = student_scheduler(student, pipe.scheduler), student["num_inference_steps"]
                    make_sounds(
                        args,
                        accelerator,
                        pipe,
                        step,
                        sampler,
                        num_inference_steps=number,
                        timesteps=timesteps_of_call(student, sampler, number),
                        guidance_scale=mean_guidance(args) if isinstance(student["guidance_scale"], list) else 1.0,
                    )
            accelerator.wait_for_everyone()

        stop = stop_requested(accelerator, signals)
        if step % args.checkpointing_steps == 0 or stop or step == num_steps:
            save_checkpoint(accelerator, output_dir, step, settings, args.checkpoints_total_limit)
        if stop and step < num_steps:
            return stop_early(accelerator, bar, step, num_steps)
    bar.close()

    # 5. The end
    if ema or target_ema:
        (ema or target_ema).copy_to(parameters)
    summary = {
        "steps": step,
        "clips": len(clips),
        "training loss (last 5% of the steps)": f"{tail_mean(log.values('loss')):.5f}",
        "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
    }
    if args.lora_rank:
        for parameter in parameters:
            parameter.data = parameter.data.to(getattr(torch, args.lora_dtype))
    made = "A student of few steps, distilled with `training.distill`"
    save_result(args, accelerator, pipe, model, name, summary, made, ["few-step"], student)
    report_result(args, accelerator, name, summary)
    return end(accelerator)


def main(argv=None):
    return run(distill, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
