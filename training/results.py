"""What a training of the UNet leaves: sounds for the validation prompts, and weights with a card."""

import copy
from pathlib import Path

import torch
from accelerate.logging import get_logger
from huggingface_hub import HfApi

from .denoiser import gather_weights, save_lora
from .model_card import base_model, copy_sounds, write_card
from .run import replacing, write_sound


logger = get_logger(__name__)


def make_sounds(args, accelerator, pipe, step, scheduler, **options):
    """Sounds and spectrograms for the validation prompts, in `samples/step-<step>`.

    Args:
        scheduler ([`SchedulerMixin`]): samples with.
        options: further arguments of the pipeline's call.
    """
    folder = Path(args.output_dir) / "samples" / f"step-{step}"
    pipe = copy.copy(pipe)  # `from_pipe` would cast the models that are being trained
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(desc="validation sounds", leave=False)
    sampling_rate = pipe.vocoder.config.sampling_rate
    pipe.unet.eval()
    for i, prompt in enumerate(args.validation_prompts):
        with accelerator.autocast():
            audio = pipe(prompt, generator=torch.Generator().manual_seed(args.seed + i), **options).audios[0]
        write_sound(folder, i + 1, audio, sampling_rate, prompt)
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_audio(prompt, torch.from_numpy(audio)[None], step, sample_rate=sampling_rate)
            if tracker.name == "wandb":
                import wandb

                tracker.log({prompt: wandb.Audio(audio, sample_rate=sampling_rate, caption=prompt)}, step=step)
    pipe.unet.train()


def save_result(
    args, accelerator, pipe, model, name, summary, made="Trained with `training.train`", tags=(), student=None
):
    """The trained weights with a card under `output_dir/name`: a diffusers folder, or with `--lora_rank` a LoRA file.
    Collective: every process takes part.

    Args:
        summary (`dict`): figures of the card.
        made (`str`): how the card begins.
        tags (`Sequence[str]`): of the card, beside the usual ones.
        student (`dict`, *optional*): what the weights are where they were distilled; see [`check_student`].
    """
    if not args.lora_rank:
        gather_weights(accelerator, pipe, model)
    if not accelerator.is_main_process:
        return
    metadata = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-audio",
        "tags": ["tango", "text-to-audio", *tags, *(["lora"] if args.lora_rank else [])],
    }
    base = args.pretrained_model_name_or_path
    metadata |= base_model(base)
    about = f"{made} of pipeline-tango{f', starting from `{base}`' if base else ''}."
    code = "from pipeline_tango import TangoPipeline\n\npipe = TangoPipeline.from_pretrained("
    with replacing(Path(args.output_dir) / name) as folder:
        if args.lora_rank:
            save_lora(pipe, folder, student)
            code += '"BASE")\npipe.load_lora_weights("THIS_FOLDER_OR_REPO")'
        else:
            if student is not None:
                pipe.register_student(student)
            pipe.save_pretrained(folder)
            code += '"THIS_FOLDER_OR_REPO")'
        sounds = copy_sounds(Path(args.output_dir) / "samples", folder, args.validation_prompts)
        write_card(folder, args, metadata, about, code, summary, sounds)


def report_result(args, accelerator, name, summary):
    """Log the figures of a result, `output_dir/name`, and upload it where `--push_to_hub` asks for that."""
    if not accelerator.is_main_process:
        return
    for key, value in summary.items():
        logger.info(f"{key}: {value}")
    if args.push_to_hub:
        output_dir = Path(args.output_dir)
        push_result(output_dir / name, args.hub_model_id or output_dir.resolve().name, args.private)


def push_result(folder, repo_id, private):
    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload training result")
    logger.info(f"pushed to {api.endpoint}/{repo_id}")
