"""Align a Tango with preferences: `accelerate launch -m training.train_dpo --train_manifest PAIRS.jsonl ...`.

Diffusion DPO as in Tango 2, on pairs of a chosen and a rejected sound (`training.preferences` makes some). Both sounds
of a pair get the same noise, timestep and text. The reference is the model that training starts from. Everything
random is drawn from generators keyed by the seed and by what is drawn (see `batches`), so a run that was killed and
resumed is bitwise equal to an unbroken one.
"""

import math
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from pipeline_tango.flags import FRACTION, INDEX, NOT_NEGATIVE, POSITIVE, Number
from pipeline_tango.student import STUDENT_KEY

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
    add_validation_arguments,
    build_parser,
    check_arguments,
    check_libraries,
)
from .batches import keyed_generator, shared_indices, step_loader
from .data import ClipDataset, ClipSources
from .denoiser import (
    Reference,
    build_lr_scheduler,
    build_optimizer,
    checkpoint_trained_weights_only,
    load_pretrained,
    log_memory,
    lora_config,
    prepare_denoiser,
    trained_parameters,
)
from .latents import Encoders, cache_dataset
from .objective import (
    check_scheduler,
    clip_progress,
    diffusion_loss,
    diffusion_target,
    dpo_gap,
    dpo_loss,
    loss_weights,
    sample_noise,
    sample_timesteps,
)
from .pairs import PairDataset, encode_pairs, prepare_pairs
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
NOISE, DROPOUT, VALIDATION = range(3)


def parse_args(argv=None):
    parser = build_parser(__spec__.name, "Align a Tango with preferences between pairs of sounds, by diffusion DPO.")
    start = parser.add_argument_group("start", "the model to align, which is the reference too")
    start.add_argument("--pretrained_model_name_or_path", required=True, help="diffusers folder or Hub repo")
    start.add_argument("--revision", help="revision of the Hub repo")
    start.add_argument("--variant", help="variant of its weights, for example fp16")
    start.add_argument(
        "--reference_dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the reference's copy of the UNet (default: float32); LoRA needs no copy",
    )

    data = add_data_arguments(
        parser, "each line is a prompt with a chosen and a rejected sound; a prompt may have several", False
    )
    data.add_argument("--prompt_column", help="column of the prompt (default: by convention)")
    data.add_argument("--chosen_column", default="chosen", help="column of the chosen sound")
    data.add_argument("--rejected_column", default="rejected", help="column of the rejected sound")
    data.add_argument("--audio_length_in_s", type=POSITIVE, help="length of clips, in seconds (default: the model's)")
    data.add_argument("--prefix", default="", help="text put before every prompt")
    data.add_argument("--num_workers", type=INDEX, default=2, help="processes that read sounds")
    data.add_argument("--cache_dir", help="folder of cached latents and text states: epochs then run the UNet only")

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--beta", type=POSITIVE, default=2000.0, help="how soon a pair that is ranked rightly stops to count"
    )
    objective.add_argument(
        "--num_supervised_steps",
        type=INDEX,
        default=0,
        help="steps of warm-up before, which train on the chosen sounds by the diffusion loss",
    )
    objective.add_argument(
        "--chosen_weight",
        type=NOT_NEGATIVE,
        default=0.0,
        help="weight of the diffusion loss of the chosen sounds beside the preference loss, which alone may let both "
        "sounds of a pair become less likely",
    )
    objective.add_argument(
        "--clip_progress",
        type=Number(float, above=0, below=1),
        help="no gradient from an error that is better than the reference's by this share (default: no clipping)",
    )
    objective.add_argument(
        "--timestep_range",
        type=INDEX,
        nargs=2,
        metavar=("FIRST", "END"),
        help="draw timesteps from FIRST to END - 1 only (default: all)",
    )
    objective.add_argument(
        "--snr_gamma", type=POSITIVE, help="gamma of min-SNR weighting of the diffusion loss (default: no weighting)"
    )
    objective.add_argument(
        "--proportion_empty_prompts",
        type=FRACTION,
        default=0.0,
        help='probability that the prompt of a pair is replaced by "", for classifier-free guidance',
    )

    trained = parser.add_argument_group("trained weights")
    add_lora_arguments(trained)
    add_ema_arguments(trained, ema_decay=0.9999)
    add_precision_arguments(trained)

    steps = add_optimisation_arguments(parser)
    add_optimizer_arguments(steps)
    parser.set_defaults(learning_rate=1e-5, num_train_epochs=5)

    add_checkpoint_arguments(parser)
    add_validation_arguments(parser)
    add_push_arguments(add_report_arguments(parser))

    args = parser.parse_args(argv)
    if args.use_dora and not args.lora_rank:
        parser.error("--use_dora needs --lora_rank")
    if args.use_ema and args.lora_rank:
        parser.error("--use_ema averages the whole UNet: leave out --lora_rank")
    if args.reference_dtype and args.lora_rank:
        parser.error("--reference_dtype is that of a copy, which --lora_rank does without: leave out one of them")
    check_arguments(parser, args)
    return args


def pair_sources(args):
    """The `ClipSources` of the chosen and of the rejected sounds."""
    shared = {"caption_column": args.prompt_column}
    shared |= {field.name: getattr(args, field.name) for field in fields(ClipSources) if hasattr(args, field.name)}
    columns = (args.chosen_column, args.rejected_column)
    return tuple(ClipSources(**shared, audio_column=column) for column in columns)


def pair_errors(denoiser, scheduler, latents, noise, timesteps, text, mask):
    """Mean squared errors of the chosen and of the rejected sounds.

    Args:
        denoiser (`Callable`): a `Denoiser` or a `Reference`.
        latents (`torch.Tensor` of shape `(2 * batch, ...)`), text, mask: as `encode_pairs` returns them.
        noise (`torch.Tensor` of shape `(batch, ...)`), timesteps (`torch.Tensor` of shape `(batch,)`): those of each
            pair, which both of its sounds get.

    Returns:
        `torch.Tensor` of shape `(2, batch)`
    """
    noise, timesteps = torch.cat([noise, noise]), torch.cat([timesteps, timesteps])
    model_pred = denoiser(scheduler.add_noise(latents, noise, timesteps), timesteps, text, mask)
    return diffusion_loss(model_pred, diffusion_target(scheduler, latents, noise, timesteps)).unflatten(0, (2, -1))


def pair_figures(errors, reference_errors):
    """What a log says of pairs: the share ranked rightly, and how errors have changed from the reference's."""
    gap = dpo_gap(*errors.detach(), *reference_errors)
    chosen_change, rejected_change = (errors.detach() - reference_errors).mean(1)
    ranked_rightly = ((gap < 0).float() + 0.5 * (gap == 0).float()).mean()
    return {"ranked_rightly": ranked_rightly, "chosen_change": chosen_change, "rejected_change": rejected_change}


@torch.no_grad()
def validate(accelerator, model, reference, scheduler, encoders, dataset, num_timesteps, beta):
    """Figures of held-out pairs, with the same noise at the same timesteps every time.

    Returns:
        `dict[str, float]`: the preference loss, a mean over pairs and timesteps; the share of the pairs whose mean gap
        over the timesteps is on the side of the chosen sound, which is 0.5 for the reference itself; and the mean
        changes of the errors from the reference's.
    """
    timesteps = (torch.arange(num_timesteps) + 0.5) * scheduler.config.num_train_timesteps / num_timesteps
    timesteps = timesteps.long().to(accelerator.device)
    names = ("validation_loss", "ranked_rightly", "chosen_change", "rejected_change")
    sums = torch.zeros(len(names), dtype=torch.float64, device=accelerator.device)
    model.eval()
    unwrapped = accelerator.unwrap_model(model)  # processes have different numbers of pairs
    for index in shared_indices(accelerator, len(dataset), "validation"):
        batch = {name: [value] for name, value in dataset[(0, index)].items()}
        generators = [[keyed_generator(dataset.sounds.seed, VALIDATION, index)] for _ in range(2)]
        latents, text, mask = encode_pairs(encoders, batch, *generators)
        errors = []
        for i, timestep in enumerate(timesteps):
            generator = keyed_generator(dataset.sounds.seed, VALIDATION, index, i)
            noise = sample_noise((1, *latents.shape[1:]), [generator], latents.device)
            inputs = (scheduler, latents, noise, timestep[None], text, mask)
            with accelerator.autocast():
                errors.append([pair_errors(denoiser, *inputs) for denoiser in (unwrapped, reference)])
        # (2, num_timesteps) each
        errors, reference_errors = (torch.cat(each, 1).double() for each in zip(*errors, strict=True))
        means = (errors.mean(1, keepdim=True), reference_errors.mean(1, keepdim=True))
        loss = dpo_loss(*errors, *reference_errors, beta).mean()
        sums += torch.stack([loss, *pair_figures(*means).values()])
    model.train()
    sums = accelerator.reduce(sums, reduction="sum") / len(dataset)
    return dict(zip(names, sums.tolist(), strict=True))


def train(args):
    check_libraries(args)
    output_dir = Path(args.output_dir)
    accelerator = start(output_dir, args.mixed_precision, args.report_to, args.gradient_accumulation_steps)
    signals = catch_sigterm()
    if shards_weights(accelerator):
        raise ValueError("FSDP and DeepSpeed split the weights, and the reference needs them whole: use DDP")
    device = accelerator.device

    # 1. Models
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pretrained(args, weight_dtype)
    if pipe.config.get(STUDENT_KEY) or pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError(
            f"`--pretrained_model_name_or_path`: {args.pretrained_model_name_or_path} is a student of few steps, "
            "which training would undo: align its teacher, and distil that"
        )
    if args.audio_length_in_s:
        pipe.register_to_config(default_audio_length_in_s=args.audio_length_in_s)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # adds noise by any timestep, and has velocities
    check_scheduler(scheduler)
    first_timestep, end_timestep = args.timestep_range or (0, scheduler.config.num_train_timesteps)
    if not first_timestep < end_timestep <= scheduler.config.num_train_timesteps:
        raise ValueError(
            f"`--timestep_range` has to be FIRST < END <= {scheduler.config.num_train_timesteps}, not "
            f"{first_timestep} {end_timestep}"
        )
    model = prepare_denoiser(
        pipe,
        device,
        weight_dtype,
        lora=lora_config(args),
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    reference = Reference(pipe.unet, bool(args.lora_rank), getattr(torch, args.reference_dtype or "float32"))
    encoders = Encoders(pipe, device, prefix=args.prefix)

    # 2. Data
    train_pairs, validation_pairs = prepare_pairs(
        pair_sources(args), accelerator, output_dir, args.num_workers, args.seed
    )
    sampling_rate = pipe.vocoder.config.sampling_rate
    num_samples = pipe._num_latent_frames(pipe.config.default_audio_length_in_s)
    num_samples *= pipe.vae_scale_factor * pipe.hop_length
    datasets = []
    for pairs in (train_pairs, validation_pairs):
        clips = [clip for side in zip(*pairs, strict=True) for clip in side]  # all chosen ones, then the rejected
        sounds = ClipDataset(clips, sampling_rate=sampling_rate, num_samples=num_samples, crop="head", seed=args.seed)
        if args.cache_dir and pairs:
            sounds = cache_dataset(accelerator, encoders, sounds, args.cache_dir)
        datasets.append(PairDataset(sounds))
    dataset, validation_dataset = datasets
    if args.cache_dir and not args.validation_prompts:
        encoders.unload()

    # 3. Optimizer and schedule, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(dataset) * args.num_train_epochs / step_size)
    optimizer = build_optimizer(args, trained_parameters(model))
    lr_scheduler = build_lr_scheduler(args, optimizer, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = trained_parameters(model)
    accelerator.register_for_checkpointing(lr_scheduler)  # stepped by hand, once for each optimizer step
    ema = make_ema(accelerator, parameters, args.ema_decay) if args.use_ema else None
    if args.lora_rank:
        checkpoint_trained_weights_only(accelerator)

    names = ("seed", "train_batch_size", "gradient_accumulation_steps", "beta", "num_supervised_steps")
    names += ("chosen_weight", "clip_progress", "timestep_range", "snr_gamma", "proportion_empty_prompts")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"num_pairs": len(dataset), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, settings)
    name = "lora" if args.lora_rank else "model"
    log = open_log(accelerator, output_dir, args, first_step, "pipeline-tango", ("best", name))
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
    if not args.lora_rank:
        num_bytes = sum(each.numel() * each.element_size() for each in reference.unet.parameters())
        logger.info(f"the reference is a copy of the UNet, which takes {num_bytes / 2**30:.1f} GiB more")
    logger.info(f"data: {len(dataset)} pairs; validation: {len(validation_dataset)}")
    log_plan(first_step, num_steps, step_size, len(dataset), "pairs")

    # 4. The loop
    best = min(log.values("validation_loss"), default=None)
    step, figures, grad_norm = first_step, [], None
    started = time.monotonic()
    bar = progress_bar(accelerator, first_step, num_steps)
    for i, batch in enumerate(loader):
        micro_step = first_step * args.gradient_accumulation_steps + i
        seed = keyed_generator(args.seed, DROPOUT, micro_step, accelerator.process_index).initial_seed()
        keys = list(zip(batch["epoch"], batch["index"], strict=True))
        generators, same_generators = ([keyed_generator(args.seed, NOISE, *key) for key in keys] for _ in range(2))
        is_supervised = step < args.num_supervised_steps
        if is_supervised:
            latents, text, mask = encoders.encode(batch, generators, args.proportion_empty_prompts)
        else:
            latents, text, mask = encode_pairs(
                encoders, batch, generators, same_generators, args.proportion_empty_prompts
            )
        timesteps = first_timestep + sample_timesteps(end_timestep - first_timestep, generators, device)
        noise = sample_noise((len(keys), *latents.shape[1:]), generators, device)
        weights = loss_weights(scheduler, timesteps, args.snr_gamma)

        with accelerator.accumulate(model):
            if is_supervised:
                torch.manual_seed(seed)
                with accelerator.autocast():
                    model_pred = model(scheduler.add_noise(latents, noise, timesteps), timesteps, text, mask)
                target = diffusion_target(scheduler, latents, noise, timesteps)
                loss = diffusion_loss(model_pred, target, weights).mean()
                figures.append({"loss": loss.detach()})
            else:
                inputs = (scheduler, latents, noise, timesteps, text, mask)
                with accelerator.autocast():
                    reference_errors = pair_errors(reference, *inputs)
                    torch.manual_seed(seed)
                    errors = pair_errors(model, *inputs)
                counted = errors
                if args.clip_progress:
                    counted = clip_progress(*errors, *reference_errors, args.clip_progress)
                loss = dpo_loss(*counted, *reference_errors, args.beta).mean()
                if args.chosen_weight:
                    chosen_loss = errors[0] if weights is None else weights * errors[0]
                    loss = loss + args.chosen_weight * chosen_loss.mean()
                figures.append({"loss": loss.detach()} | pair_figures(errors, reference_errors))
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
        if ema is not None:
            ema.step(parameters)
        means = mean_figures(accelerator, figures, step, bar)
        norms = {} if grad_norm is None else {"grad_norm": float(grad_norm)}
        log.write(step, **means, lr=learning_rate, **norms)
        bar.update()
        bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{learning_rate:.2e}")

        if step % args.validation_steps == 0 or step == num_steps:
            with averaged(ema, parameters):
                if validation_pairs:
                    measured = validate(
                        accelerator,
                        model,
                        reference,
                        scheduler,
                        encoders,
                        validation_dataset,
                        args.num_validation_timesteps,
                        args.beta,
                    )
                    validation_loss = measured.pop("validation_loss")
                    measured = {f"validation_{key}": value for key, value in measured.items()}
                    log.write(step, validation_loss=validation_loss, **measured)
                    logger.info(
                        f"step {step}: validation loss {validation_loss:.5f}, ranked rightly "
                        f"{measured['validation_ranked_rightly']:.3f}"
                    )
                    if best is None or validation_loss < best:
                        best = validation_loss
                        save_aligned(args, accelerator, pipe, model, "best", {"step": step} | measured)
                if args.validation_prompts and accelerator.is_main_process:
                    make_sounds(
                        args,
                        accelerator,
                        pipe,
                        step,
                        DPMSolverMultistepScheduler.from_config(pipe.scheduler.config),
                        num_inference_steps=args.num_validation_inference_steps,
                        guidance_scale=args.validation_guidance_scale,
                    )
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
    ranked = log.values("validation_ranked_rightly")
    summary = {
        "steps": step,
        "pairs": len(dataset),
        "training loss (last 5% of the steps)": f"{tail_mean(log.values('loss')):.5f}",
        "best validation loss": "none" if best is None else f"{best:.5f}",
        "held-out pairs ranked rightly": f"{ranked[-1]:.3f} of {len(validation_dataset)}" if ranked else "none",
        "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
    }
    save_aligned(args, accelerator, pipe, model, name, summary)
    report_result(args, accelerator, name, summary)
    return end(accelerator)


def save_aligned(args, accelerator, pipe, model, name, summary):
    made = "Aligned with preferences by `training.train_dpo`"
    save_result(args, accelerator, pipe, model, name, summary, made, ("dpo",))


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
