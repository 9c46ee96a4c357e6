"""Generation of sounds: a sweep of models and settings over a list of prompts, resumable and on several processes.

The initial noise of each sound is keyed by the seed, the id of its prompt and its take, and the composition of a batch
does not depend on which sounds exist already. A run that is interrupted and resumed, or distributed over processes, is
therefore bitwise reproducible; another batch size changes sounds by float32 rounding only.
"""

import hashlib
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from pipeline_tango import SCHEDULERS, TangoPipeline
from pipeline_tango.json_files import read_json
from pipeline_tango.presets import most_steps
from pipeline_tango.sound_files import encode_wav, write_atomically
from pipeline_tango.sound_folder import locked
from pipeline_tango.student import STUDENT_KEY, call_defaults

from ..batches import keyed_generator
from ..latents import fingerprint
from .items import Item, System, read_records


@dataclass(frozen=True)
class GenerationSettings:
    """What the sounds of all systems of a run have in common.

    Args:
        num_takes (`int`): sounds per prompt.
        dtype (`str`): of the UNet: `"float32"`, `"bfloat16"` or `"float16"`.
    """

    num_takes: int = 1
    batch_size: int = 1
    audio_length_in_s: float | None = None
    negative_prompt: str | None = None
    seed: int = 0
    dtype: str = "float32"


def load_configs(model):
    """Configs of a model's pipeline and scheduler, without its weights.

    Raises:
        ValueError: if there is none.
    """
    try:
        return TangoPipeline.load_config(model), SCHEDULERS["ddpm"].load_config(model, subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: no pipeline in {model} ({str(error).splitlines()[0]:.200})") from error


def own_values(model):
    """Number of steps and guidance scale that a model's pipeline takes where nothing is said."""
    index, _ = load_configs(model)
    return call_defaults(index, index.get(STUDENT_KEY))


def plan_sweep(models, schedulers, num_inference_steps, guidance_scales, folder):
    """A system for each combination of model, scheduler, number of steps and guidance scale.

    Args:
        models (`dict[str, str]`): folders or Hub repos by short name.
        num_inference_steps (`list[int]`, *optional*): by default each model's own, or the scheduler's most.
        guidance_scales (`list[float]`, *optional*): by default each model's own.
        folder (`Path`): holds a subfolder of sounds for each system.
    """
    systems = []
    for name, model in models.items():
        own_steps, own_guidance = own_values(model)
        for scheduler in schedulers:
            limit = own_steps if scheduler == "own" else most_steps(model, SCHEDULERS[scheduler].__name__)
            for steps in num_inference_steps or [min(own_steps, limit)]:
                for guidance in guidance_scales or [own_guidance]:
                    label = f"{name}-{scheduler}-{steps}-g{guidance:g}"
                    systems.append(System(label, model, scheduler, steps, guidance, folder / label))
    return systems


def check_schedulers(systems):
    """Check that the scheduler of every system of `plan_sweep` accepts its number of steps.

    Raises:
        ValueError: naming the argument.
    """
    for model, name, steps in dict.fromkeys((each.model, *each.settings[:2]) for each in systems):
        index, config = load_configs(model)
        own = [each for each in SCHEDULERS.values() if each.__name__ == index["scheduler"][1]]
        if name == "own" and not own:
            raise ValueError(f"--scheduler: {model} has {index['scheduler'][1]}; name one of {', '.join(SCHEDULERS)}")
        scheduler = (own[0] if name == "own" else SCHEDULERS[name]).from_config(config)
        try:
            scheduler.set_timesteps(steps)
            if float(scheduler.timesteps.max()) > scheduler.config.num_train_timesteps - 1:
                raise ValueError("it would start beyond the last timestep of training")
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"--num_inference_steps: {steps} is not supported by the scheduler {name} ({error})"
            ) from None


def generate(systems, prompts, settings, state, device):
    """Generate the missing sounds of the systems, of which this process takes its share in whole batches.

    A batch holds one take of consecutive prompts, whichever of them exist already, so that the composition of the
    batch, and with it every bit of a sound, is the same in every run.

    Args:
        systems (`list[System]`): those of `plan_sweep`.
        state (`accelerate.PartialState`): the processes.
    """
    if not systems:
        return
    # a second run that knows nothing of this one would lose lines of the manifests
    with locked(systems[0].folder.parent) if state.is_main_process else nullcontext():
        for system in systems:  # sounds of other settings would count as those asked for
            check_settings(system, settings)
        missing = {system.name: find_missing(system, prompts, settings) for system in systems}
        state.wait_for_everyone()  # every process has looked before one writes
        for model in dict.fromkeys(system.model for system in systems):
            pipe = None
            for system in [system for system in systems if system.model == model]:
                if state.is_main_process:
                    start_manifest(system)
                state.wait_for_everyone()
                batches = missing[system.name][state.process_index :: state.num_processes]
                if not batches:
                    continue
                if pipe is None:
                    dtype = {"default": torch.float32, "unet": getattr(torch, settings.dtype)}
                    pipe = TangoPipeline.from_pretrained(model, dtype=dtype).to(device)
                    pipe.set_progress_bar_config(disable=True)
                    own_scheduler = pipe.scheduler
                    weights = [fingerprint(each) for each in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.vocoder)]
                    weights = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
                check_settings(system, settings, weights)
                scheduler_class = type(own_scheduler) if system.scheduler == "own" else SCHEDULERS[system.scheduler]
                pipe.scheduler = scheduler_class.from_config(own_scheduler.config)
                generate_sounds(pipe, system, batches, settings, show_progress=state.is_main_process)
        state.wait_for_everyone()


def file_name(prompt, take):
    return f"{prompt.id}-{take}.wav"


def own_records(system):
    """Records of the sounds that this module generated. What lacks a field was written by somebody else."""
    records = read_records(system.folder / "manifest.jsonl")
    return {name: record for name, record in records.items() if {"prompt", "compute_in_s", "device"} <= record.keys()}


def find_missing(system, prompts, settings):
    """Batches `[(prompt, take), ...]` with at least one missing sound."""
    records = own_records(system)
    batches = []
    for take in range(1, settings.num_takes + 1):
        for first in range(0, len(prompts), settings.batch_size):
            batch = [(prompt, take) for prompt in prompts[first : first + settings.batch_size]]
            for prompt, _ in batch:
                record = records.get(file_name(prompt, take))
                path = system.folder / file_name(prompt, take)
                # an interrupted run leaves sounds without a record, but then it has left its settings too
                if record is None and path.exists() and not (system.folder / "settings.json").exists():
                    raise ValueError(
                        f"--output_dir: {path} is there already and was not made by this command: give another folder"
                    )
                if record and record["prompt"] != prompt.text:
                    raise ValueError(
                        f"--output_dir: {path} was made for {record['prompt']!r}, "
                        f"not {prompt.text!r}: give another folder"
                    )
            names = [file_name(*each) for each in batch]
            if not all(name in records and (system.folder / name).is_file() for name in names):
                batches.append(batch)
    return batches


def start_manifest(system):
    """Create the folder, and remove from its manifest a line that an interrupted run left incomplete."""
    system.folder.mkdir(parents=True, exist_ok=True)
    manifest = system.folder / "manifest.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in read_records(manifest).values()]
    write_atomically(manifest, "".join(lines).encode())


def check_settings(system, settings, weights=None):
    """Refuse to add sounds to a folder whose sounds were generated with other settings.

    Args:
        weights (`str`, *optional*): hash of the model's weights, with which the settings of a new folder are written.
            Without it only the rest is compared, and a new folder is left alone.
    """
    current = {
        "weights": weights,
        "scheduler": system.scheduler,
        "num_inference_steps": system.num_inference_steps,
        "guidance_scale": system.guidance_scale,
        "audio_length_in_s": settings.audio_length_in_s,
        "negative_prompt": settings.negative_prompt,
        "seed": settings.seed,
        "dtype": settings.dtype,
    }
    path = system.folder / "settings.json"
    if weights is None:
        current.pop("weights")
        if not path.exists():
            return
    if not path.exists():
        # every process may write it: the same content
        write_atomically(path, (json.dumps(current, indent=2) + "\n").encode())
    try:
        before = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"--output_dir: {error}, so that nothing says how the sounds beside it were made: give another folder"
        ) from None
    for name, value in current.items():
        if before.get(name) != value:
            raise ValueError(
                f"--output_dir: the sounds in {system.folder} were made with {name} {before.get(name)!r}, not "
                f"{value!r}: give another folder"
            )


def generate_sounds(pipe, system, batches, settings, show_progress=True):
    num_sounds = sum(len(batch) for batch in batches)
    bar = tqdm(total=num_sounds, desc=system.name, unit="sound", disable=not show_progress)
    for batch in batches:
        generators = []
        for prompt, take in batch:
            digest = hashlib.sha256(prompt.id.encode("utf-8", "surrogatepass")).digest()
            generators.append(keyed_generator(settings.seed, int.from_bytes(digest[:8], "big"), take))
        start = time.perf_counter()
        audios = pipe(
            [prompt.text for prompt, _ in batch],
            negative_prompt=settings.negative_prompt,
            audio_length_in_s=settings.audio_length_in_s,
            num_inference_steps=system.num_inference_steps,
            guidance_scale=system.guidance_scale,
            generator=generators,
        ).audios
        seconds = (time.perf_counter() - start) / len(batch)
        for (prompt, take), audio in zip(batch, audios, strict=True):
            path = system.folder / file_name(prompt, take)
            write_atomically(path, encode_wav(audio, pipe.vocoder.config.sampling_rate))
            record = {"file": path.name, "id": prompt.id, "take": take, "prompt": prompt.text}
            record |= {"compute_in_s": round(seconds, 4), "batch_size": len(batch), "device": pipe.device.type}
            with open(system.folder / "manifest.jsonl", "ab", buffering=0) as file:  # one write per line
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        bar.update(len(batch))
    bar.close()


def collect_sounds(system, prompts, num_takes):
    """Set the sounds, compute time and devices of a generated system."""
    records = own_records(system)
    wanted = [(prompt, take) for prompt in prompts for take in range(1, num_takes + 1)]
    system.sounds = [
        Item(prompt.id, prompt.text, str(system.folder / file_name(prompt, take)), prompt.columns, take)
        for prompt, take in wanted
    ]
    made = [records[name] for name in (file_name(*each) for each in wanted) if name in records]
    system.seconds_per_clip = float(np.median([record["compute_in_s"] for record in made])) if made else None
    system.devices = {record["device"] for record in made}
