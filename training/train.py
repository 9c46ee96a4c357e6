"""Train or fine-tune a Tango: `accelerate launch -m training.train --pretrained_model_name_or_path FOLDER ...`.

Everything random is drawn from generators keyed by the seed and by what is drawn (see `batches`), so a run that was
killed and resumed is bitwise equal to an unbroken one.
"""

import math
import sys
import time
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from tqdm import tqdm

from pipeline_tango.flags import FRACTION, INDEX, NOT_NEGATIVE, POSITIVE

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
    clip_sources,
)
from .batches import keyed_generator, step_loader
from .data import ClipDataset, prepare_clips
from .denoiser import (
    build_lr_scheduler,
    build_optimizer,
    build_pipeline,
    checkpoint_trained_weights_only,
    load_pretrained,
    log_memory,
    lora_config,
    prepare_denoiser,
    set_schedule,
    trained_parameters,
)
from .latents import Encoders, cache_dataset
from .mixing import augment
from .objective import (
    check_scheduler,
    diffusion_loss,
    diffusion_target,
    loss_weights,
    perturb_noise,
    sample_noise,
    sample_timesteps,
)
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
NOISE, MIXES, DROPOUT, VALIDATION = range(4)


def parse_args(argv=None):
    parser = build_parser(__spec__.name, "Train or fine-tune a Tango on captioned sounds.")
    start = parser.add_argument_group("start", "a whole pipeline, or its parts")
    start.add_argument("--pretrained_model_name_or_path", help="diffusers folder or Hub repo to fine-tune")
    start.add_argument("--revision", help="revision of the Hub repo")
    start.add_argument("--variant", help="variant of its weights, for example fp16")
    start.add_argument("--unet_config", help="JSON config of a UNet to train from random weights")
    start.add_argument("--vae", help="folder or Hub repo of a VAE or of a pipeline with one, with --unet_config")
    start.add_argument("--vocoder", help="the same for the vocoder")
    start.add_argument("--text_encoder", help="the same for the T5 encoder and its tokenizer")

    data = add_data_arguments(parser)
    data.add_argument("--caption_column", help="column of the caption or list of captions (default: by convention)")
    data.add_argument("--audio_length_in_s", type=POSITIVE, help="length of clips, in seconds (default: the model's)")
    data.add_argument("--crop", choices=("random", "head"), default="random", help="part kept of longer sounds")
    data.add_argument("--prefix", default="", help="text put before every caption")
    data.add_argument("--num_workers", type=INDEX, default=2, help="processes that read sounds")
    data.add_argument(
        "--cache_dir",
        help="folder of cached latents and, if the text encoder is frozen, text states: epochs then run the UNet only",
    )

    mixing = parser.add_argument_group("mixing", "pairs of a batch mixed into further training examples")
    mixing.add_argument("--augment", choices=("none", "pressure", "random"), default="none", help="weights of a pair")
    mixing.add_argument(
        "--mix_ratio", type=FRACTION, default=0.5, help="perceived share of the first sound, for `pressure`"
    )
    mixing.add_argument("--num_mixes", type=INDEX, default=4, help="mixes added to each batch, at most")

    objective = parser.add_argument_group("objective")
    objective.add_argument(
        "--prediction_type", choices=("epsilon", "v_prediction"), help="what the UNet predicts (default: as before)"
    )
    objective.add_argument(
        "--snr_gamma", type=POSITIVE, help="gamma of min-SNR weighting; 5 is usual (default: no weighting)"
    )
    objective.add_argument(
        "--snr_weighting",
        choices=("min_snr", "original"),
        default="min_snr",
        help="`original` applies the weight for epsilon to v_prediction too, as the original code does",
    )
    objective.add_argument(
        "--proportion_empty_prompts",
        type=FRACTION,
        default=0.0,
        help='probability that a caption is replaced by "", for classifier-free guidance',
    )
    objective.add_argument(
        "--input_perturbation",
        type=NOT_NEGATIVE,
        default=0.0,
        help="deviation of noise added to the input only; 0.1 is usual",
    )
    objective.add_argument(
        "--noise_offset",
        type=NOT_NEGATIVE,
        default=0.0,
        help="deviation of noise that is constant over each channel; 0.1 is usual",
    )
    objective.add_argument(
        "--rescale_betas_zero_snr", action="store_true", help="rescale the schedule to zero terminal SNR"
    )

    trained = parser.add_argument_group("trained weights")
    add_lora_arguments(trained)
    trained.add_argument(
        "--train_text_encoder",
        action="store_true",
        help="train the text encoder too, which else is frozen and in eval mode",
    )
    add_ema_arguments(trained, ema_decay=0.9999)
    add_precision_arguments(trained)

    add_optimizer_arguments(add_optimisation_arguments(parser))

    add_checkpoint_arguments(parser)

    add_validation_arguments(parser)

    add_push_arguments(add_report_arguments(parser))

    args = parser.parse_args(argv)
    parts = (args.unet_config, args.vae, args.vocoder, args.text_encoder)
    if bool(args.pretrained_model_name_or_path) == any(parts) or (any(parts) and not all(parts)):
        parser.error("give --pretrained_model_name_or_path, or all of --unet_config --vae --vocoder --text_encoder")
    if args.cache_dir and args.augment != "none":
        parser.error("--cache_dir holds latents of single clips: leave out --augment")
    if args.train_text_encoder and args.lora_rank:
        parser.error("--lora_rank trains the UNet's layers only: leave out --train_text_encoder")
    if args.use_dora and not args.lora_rank:
        parser.error("--use_dora needs --lora_rank")
    if args.use_ema and args.lora_rank:
        parser.error("--use_ema averages the whole UNet: leave out --lora_rank")
    check_arguments(parser, args)
    return args


def load_pipeline(args, weight_dtype):
    """The pipeline to start from, with the scheduler to save it with."""
    if args.pretrained_model_name_or_path:
        pipe = load_pretrained(args, weight_dtype, args.train_text_encoder)
    else:
        pipe = build_pipeline(args.unet_config, args.vae, args.vocoder, args.text_encoder, args.seed)
    set_schedule(pipe, args.prediction_type, args.rescale_betas_zero_snr)
    if args.audio_length_in_s:
        pipe.register_to_config(default_audio_length_in_s=args.audio_length_in_s)
    return pipe


def add_mixes(batch, sampling_rate, rule, num_mixes, ratio, key):
    """Append mixes of its pairs to a batch. Returns their generators; `key` is that of the batch."""
    waveforms, captions = augment(
        torch.stack(batch["waveform"]),
        batch["caption"],
        sampling_rate,
        rule=rule,
        num_mixes=num_mixes,
        ratio=ratio,
        generator=keyed_generator(*key),
    )
    batch["waveform"], batch["caption"] = list(waveforms), captions
    return [keyed_generator(*key, i) for i in range(len(captions) - len(batch["index"]))]


@torch.no_grad()
def validate(accelerator, model, scheduler, encoders, dataset, num_timesteps):
    """Mean loss over clips and timesteps, with the same noise at the same timesteps every time.

    Returns:
        The mean, and a dict from timestep to its own mean.
    """
    timesteps = (torch.arange(num_timesteps) + 0.5) * scheduler.config.num_train_timesteps / num_timesteps
    timesteps = timesteps.long()
    sums = torch.zeros(num_timesteps + 1, dtype=torch.float64, device=accelerator.device)
    model.eval()
    rounds = range(math.ceil(len(dataset) / accelerator.num_processes))  # as many in each process: FSDP waits for all
    for position in tqdm(rounds, desc="validation", leave=False, disable=not accelerator.is_local_main_process):
        index = position * accelerator.num_processes + accelerator.process_index
        weight, index = float(index < len(dataset)), index % len(dataset)
        item = dataset[(0, index)]
        moments = encoders.moments_of(item["waveform"][None].to(accelerator.device))
        latents = encoders.latents_of(moments, [keyed_generator(dataset.seed, VALIDATION, index)])
        text, mask = encoders.text_of([encoders.prefix + item["caption"]])
        for i, timestep in enumerate(timesteps):
            noise = sample_noise(latents.shape, [keyed_generator(dataset.seed, VALIDATION, index, i)], latents.device)
            t = timestep[None].to(latents.device)
            with accelerator.autocast():
                model_pred = model(scheduler.add_noise(latents, noise, t), t, text, mask)
            target = diffusion_target(scheduler, latents, noise, t)
            sums[i] += weight * diffusion_loss(model_pred, target)[0].double()
        sums[-1] += weight
    model.train()
    sums = accelerator.reduce(sums, reduction="sum")
    means = (sums[:-1] / sums[-1]).tolist()
    return sum(means) / len(means), dict(zip(timesteps.tolist(), means))


def train(args):
    check_libraries(args)
    output_dir = Path(args.output_dir)
    accelerator = start(output_dir, args.mixed_precision, args.report_to, args.gradient_accumulation_steps)
    signals = catch_sigterm()
    if shards_weights(accelerator) and (args.use_ema or args.validation_prompts):
        raise ValueError(
            "--use_ema and --validation_prompts need whole weights in one process: FSDP and DeepSpeed split them"
        )
    device = accelerator.device

    # 1. Models
    weight_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    pipe = load_pipeline(args, weight_dtype)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # adds noise by any timestep, and has velocities
    check_scheduler(scheduler)
    model = prepare_denoiser(
        pipe,
        device,
        weight_dtype,
        lora=lora_config(args),
        train_text_encoder=args.train_text_encoder,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    encoders = Encoders(pipe, device, args.train_text_encoder, args.prefix)

    # 2. Data
    train_clips, validation_clips = prepare_clips(
        clip_sources(args), accelerator, output_dir, args.num_workers, args.seed
    )
    sampling_rate = pipe.vocoder.config.sampling_rate
    num_samples = pipe._num_latent_frames(pipe.config.default_audio_length_in_s)
    num_samples *= pipe.vae_scale_factor * pipe.hop_length
    options = {"sampling_rate": sampling_rate, "num_samples": num_samples, "seed": args.seed}
    dataset = ClipDataset(train_clips, crop=args.crop, **options)
    validation_dataset = ClipDataset(validation_clips, crop="head", **options)
    if args.cache_dir:
        dataset = cache_dataset(accelerator, encoders, dataset, args.cache_dir)
        if not validation_clips and not args.validation_prompts:
            encoders.unload()

    # 3. Optimizer and schedule, in optimizer steps
    step_size = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    num_steps = args.max_train_steps or math.ceil(len(train_clips) * args.num_train_epochs / step_size)
    optimizer = build_optimizer(args, trained_parameters(model))
    lr_scheduler = build_lr_scheduler(args, optimizer, num_steps)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    model, optimizer = accelerator.prepare(model, optimizer)
    parameters = trained_parameters(model)
    accelerator.register_for_checkpointing(lr_scheduler)  # stepped by hand, once for each optimizer step
    ema = make_ema(accelerator, parameters, args.ema_decay) if args.use_ema else None
    if args.lora_rank and not shards_weights(accelerator):
        checkpoint_trained_weights_only(accelerator)

    settings = {
        name: getattr(args, name)
        for name in ("seed", "train_batch_size", "gradient_accumulation_steps", "augment", "crop", "snr_gamma")
    } | {"num_clips": len(train_clips), "num_processes": accelerator.num_processes, "num_steps": num_steps}
    first_step = load_checkpoint(accelerator, output_dir, args.resume_from_checkpoint, settings)
    log = open_log(
        accelerator, output_dir, args, first_step, "pipeline-tango", ("best", "lora" if args.lora_rank else "model")
    )
    loader = step_loader(
        dataset,
        accelerator,
        range(first_step, num_steps),
        args.num_workers,
        seed=args.seed,
        batch_size=args.train_batch_size,
        num_micro_steps=args.gradient_accumulation_steps,
    )
    hours = len(train_clips) * num_samples / sampling_rate / 3600
    log_memory(args, accelerator, pipe, parameters)
    logger.info(
        f"data: {len(train_clips)} clips, {hours:.2f} h at {num_samples / sampling_rate:g} s each; validation: "
        f"{len(validation_clips)}"
    )
    log_plan(first_step, num_steps, step_size, len(train_clips))

    # 4. The loop
    best = min(log.values("validation_loss"), default=None)
    step, figures, grad_norm = first_step, [], None
    started = time.monotonic()
    bar = progress_bar(accelerator, first_step, num_steps)
    for i, batch in enumerate(loader):
        micro_step = first_step * args.gradient_accumulation_steps + i
        rank = accelerator.process_index
        torch.manual_seed(keyed_generator(args.seed, DROPOUT, micro_step, rank).initial_seed())
        generators = [keyed_generator(args.seed, NOISE, *key) for key in zip(batch["epoch"], batch["index"])]
        if args.augment != "none":
            batch["waveform"] = [waveform.to(device) for waveform in batch["waveform"]]
            mix_key = (args.seed, MIXES, micro_step, rank)
            generators += add_mixes(batch, sampling_rate, args.augment, args.num_mixes, args.mix_ratio, mix_key)
        latents, text, mask = encoders.encode(batch, generators, args.proportion_empty_prompts)
        timesteps = sample_timesteps(scheduler.config.num_train_timesteps, generators, device)
        noise = sample_noise(latents.shape, generators, device, args.noise_offset)
        added_noise = perturb_noise(noise, generators, args.input_perturbation) if args.input_perturbation else noise

        with accelerator.accumulate(model):
            noisy_latents = scheduler.add_noise(latents, added_noise, timesteps)
            with accelerator.autocast():
                model_pred = model(noisy_latents, timesteps, text, mask)
            target = diffusion_target(scheduler, latents, noise, timesteps)
            weights = loss_weights(scheduler, timesteps, args.snr_gamma, args.snr_weighting)
            loss = diffusion_loss(model_pred, target, weights).mean()
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
        if ema is not None:
            ema.step(parameters)
        means = mean_figures(accelerator, figures, step, bar)
        norms = {} if grad_norm is None else {"grad_norm": float(grad_norm)}  # DeepSpeed may have none
        log.write(step, **means, lr=learning_rate, **norms)
        bar.update()
        bar.set_postfix(loss=f"{means['loss']:.4f}", lr=f"{learning_rate:.2e}")

        if step % args.validation_steps == 0 or step == num_steps:
            with averaged(ema, parameters):
                if validation_clips:
                    validation_loss, by_timestep = validate(
                        accelerator, model, scheduler, encoders, validation_dataset, args.num_validation_timesteps
                    )
                    log.write(step, validation_loss=validation_loss, validation_loss_by_timestep=by_timestep)
                    logger.info(f"step {step}: validation loss {validation_loss:.5f}")
                    if best is None or validation_loss < best:
                        best = validation_loss
                        save_result(args, accelerator, pipe, model, "best", {"step": step, "validation loss": best})
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
    summary = {
        "steps": step,
        "clips": len(train_clips),
        "hours of sound": f"{hours:.2f}",
        "training loss (last 5% of the steps)": f"{tail_mean(log.values('loss')):.5f}",
        "best validation loss": "none" if best is None else f"{best:.5f}",
        "steps per second": f"{(step - first_step) / max(time.monotonic() - started, 1e-9):.3f}",
    }
    name = "lora" if args.lora_rank else "model"
    save_result(args, accelerator, pipe, model, name, summary)
    report_result(args, accelerator, name, summary)
    return end(accelerator)


def main(argv=None):
    return run(train, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
