"""Lists of prompts and recordings, and the sounds that models make for them.

Each sound is made from noise keyed by the seed, its prompt's id and its take, in a batch that does not depend on what
is there already. So a run that was killed and started again, or shared by more processes, makes the same files, bit
for bit; another batch size changes no more than the rounding of float32.
"""

import hashlib
import json
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline_tango import SCHEDULERS, TangoPipeline
from pipeline_tango.sound_files import encode_wav, write_atomically
from training.batches import keyed_generator
from training.data import AUDIO_COLUMNS, CAPTION_COLUMNS, as_captions, csv_records, find_column, json_records
from training.latents import fingerprint


SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff")
ID_COLUMNS = ("id", "name")


@dataclass(frozen=True)
class Item:
    """A line of a list: something to say, to hear, or both.

    Args:
        id (`str`): what prompts, references and sounds are paired by.
        path (`str`, *optional*): of its sound.
        columns (`dict`): the whole line.
        take (`int`): of a generated sound.
    """

    id: str
    text: str | None = None
    path: str | None = None
    columns: dict = field(default_factory=dict, compare=False)
    take: int = 1


@dataclass
class System:
    """Sounds made in one way."""

    name: str
    model: str
    scheduler: str = ""
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    folder: Path | None = None
    sounds: list = field(default_factory=list)
    seconds_per_clip: float | None = None
    devices: set = field(default_factory=set)

    @property
    def settings(self):
        return self.scheduler, self.num_inference_steps, self.guidance_scale


def read_items(source, argument, *, with_text=False, with_path=False):
    """Prompts or recordings: a folder of sounds, JSON lines, CSV, or a text file with a prompt a line.

    The id is a column `id` or `name`, else the name of the sound without its ending, else the number of the line.

    Raises:
        ValueError: naming argument, file and line.
    """
    path = Path(source)
    if path.is_dir():
        manifest = next((path / name for name in ("metadata.csv", "metadata.jsonl") if (path / name).is_file()), None)
        if manifest is None:
            files = sorted(each for each in path.iterdir() if each.suffix.lower() in SOUND_SUFFIXES)
            return check_ids([Item(each.stem, path=str(each)) for each in files], argument, source)
        path = manifest
    try:
        if path.suffix.lower() == ".csv":
            records = list(csv_records(path))
        elif path.suffix.lower() in (".json", ".jsonl") or path.read_text("utf-8-sig").lstrip().startswith("{"):
            records = list(json_records(path))
        else:
            lines = enumerate(path.read_text("utf-8-sig").splitlines(), 1)
            records = [(n, {"prompt": line.strip()}) for n, line in lines if line.strip() and line.strip()[0] != "#"]
    except (OSError, ValueError) as error:
        raise ValueError(f"--{argument}: {error}") from None
    items = []
    for number, record in records:
        try:
            text = location = None
            if with_text or any(name in record for name in CAPTION_COLUMNS):
                text = as_captions(record[find_column(record, None, CAPTION_COLUMNS)])[0]
                if not text.strip():
                    raise ValueError("the caption is empty")
            if with_path or any(name in record for name in AUDIO_COLUMNS):
                location = record[find_column(record, None, AUDIO_COLUMNS)]
                if not isinstance(location, str) or not location.strip():
                    raise ValueError(f"the path of the sound must be text, got {location!r:.80}")
            id_column = next((name for name in ID_COLUMNS if record.get(name) not in (None, "")), None)
            if id_column:
                id = str(record[id_column])
            else:
                id = Path(location).stem if location else f"{number:05d}"
            if not id or "/" in id or "\\" in id or "\0" in id or id.startswith(".") or len(id) > 200:
                raise ValueError(f"the id must be good as a file name, got {id!r:.80}")
        except (ValueError, IndexError) as error:
            raise ValueError(f"--{argument}: {path}, line {number}: {error}") from None
        items.append(Item(id, text, location and os.path.join(path.parent, location), record))
    return check_ids(items, argument, source)


def check_ids(items, argument, source):
    if not items:
        raise ValueError(f"--{argument}: nothing in {source}")
    counts = Counter(item.id.casefold() for item in items)
    if twice := [item.id for item in items if counts[item.id.casefold()] > 1]:
        raise ValueError(f"--{argument}: {source} has the id {twice[0]!r} more than once: add a column `id`")
    return items


def read_generated(folder, known_ids):
    """Sounds of a folder with their ids and takes: as its manifest.jsonl says, else by their names.

    `known_ids` decide what `rain-2.wav` is: the sound `rain-2` if there is such an id, else the second take of `rain`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"--generated: no folder {folder}")
    records = read_log(folder / "manifest.jsonl")
    items = []
    for path in sorted(each for each in folder.iterdir() if each.suffix.lower() in SOUND_SUFFIXES):
        record = records.get(path.name, {})
        id, take = record.get("id"), record.get("take", 1)
        if id is None:
            id = path.stem
            match = re.fullmatch(r"(.+)-(\d+)", path.stem)
            if match and path.stem not in known_ids and (match[1] in known_ids or "take" in record):
                id, take = match[1], int(match[2])
        items.append(Item(id, record.get("prompt"), str(path), record, take))
    if not items:
        raise ValueError(f"--generated: no sounds in {folder}")
    return items


def read_log(path):
    """Records of a manifest by file name. A line cut short by a killed run is passed over."""
    records = {}
    if path.exists():
        for line in path.read_text("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
                records[record["file"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return records


def short_names(paths):
    """The last part of each path, with a number where two are the same."""
    names = [re.sub(r"[^\w.+-]", "_", Path(path).name or str(path)) for path in paths]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


# Generation


def plan_systems(args):
    names = short_names([*args.model, *args.generated])
    systems = []
    for name, model in zip(names, args.model):
        for scheduler in args.scheduler:
            for steps in args.num_inference_steps:
                for guidance in args.guidance_scale:
                    label = f"{name}-{scheduler}-{steps}-g{guidance:g}"
                    folder = Path(args.output_dir) / "sounds" / label
                    systems.append(System(label, model, scheduler, steps, guidance, folder))
    for name, folder in zip(names[len(args.model) :], args.generated):
        systems.append(System(name, name, folder=Path(folder)))
    return systems


def check_schedulers(args):
    """Try every scheduler with every number of steps, from the models' configs alone."""
    for model in args.model:
        try:
            index = TangoPipeline.load_config(model)
            config = SCHEDULERS["ddpm"].load_config(model, subfolder="scheduler")
        except (OSError, ValueError) as error:
            raise ValueError(f"--model: no pipeline in {model} ({str(error).splitlines()[0]:.200})") from error
        own = [each for each in SCHEDULERS.values() if each.__name__ == index["scheduler"][1]]
        if "own" in args.scheduler and not own:
            raise ValueError(f"--scheduler: {model} has {index['scheduler'][1]}; name one of {', '.join(SCHEDULERS)}")
        for name in args.scheduler:
            scheduler = (own[0] if name == "own" else SCHEDULERS[name]).from_config(config)
            for steps in args.num_inference_steps:
                try:
                    scheduler.set_timesteps(steps)
                    if float(scheduler.timesteps.max()) > scheduler.config.num_train_timesteps - 1:
                        raise ValueError("it would start beyond the last timestep of training")
                except (ValueError, IndexError) as error:
                    raise ValueError(f"--num_inference_steps: {steps} does not go with {name} ({error})") from None


def generate(args, systems, prompts, state):
    """Make what is missing of the systems' sounds: this process its share, in whole batches.

    Batches hold neighbours in the list of prompts, one take of each, whatever is there already: so a sound is always
    made in the same company, and has the same bits.
    """
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    todo = {}
    for system in systems:
        todo[system.name] = find_missing(args, system, prompts)
    state.wait_for_everyone()  # all have looked, before one writes
    for model in dict.fromkeys(system.model for system in systems):
        its_systems = [system for system in systems if system.model == model and system.scheduler]
        if not its_systems:
            continue
        pipe = None
        for system in its_systems:
            if state.is_main_process:
                start_manifest(system)
            state.wait_for_everyone()
            batches = todo[system.name][state.process_index :: state.num_processes]
            if batches and pipe is None:
                dtype = {"default": torch.float32, "unet": getattr(torch, args.dtype)}
                pipe = TangoPipeline.from_pretrained(model, dtype=dtype).to(device)
                pipe.set_progress_bar_config(disable=True)
                own_scheduler = pipe.scheduler
                weights = [fingerprint(each) for each in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.vocoder)]
                weights = hashlib.sha256(json.dumps(weights).encode()).hexdigest()
            if batches:
                check_settings(args, system, weights)
                if system.scheduler == "own":
                    pipe.scheduler = type(own_scheduler).from_config(own_scheduler.config)
                else:
                    pipe.scheduler = SCHEDULERS[system.scheduler].from_config(own_scheduler.config)
            make_sounds(args, system, pipe, batches, state)
    state.wait_for_everyone()


def file_name(prompt, take):
    return f"{prompt.id}-{take}.wav"


def find_missing(args, system, prompts):
    """Batches `[(prompt, take), ...]` of which a sound is missing."""
    if not system.scheduler:
        return []
    records = read_log(system.folder / "manifest.jsonl")
    batches = []
    for take in range(1, args.num_takes + 1):
        for first in range(0, len(prompts), args.batch_size):
            batch = [(prompt, take) for prompt in prompts[first : first + args.batch_size]]
            for prompt, _ in batch:
                record = records.get(file_name(prompt, take))
                if record and record["prompt"] != prompt.text:
                    raise ValueError(
                        f"--output_dir: {system.folder / file_name(prompt, take)} was made for {record['prompt']!r}, "
                        f"not {prompt.text!r}: give another folder"
                    )
            names = [file_name(*each) for each in batch]
            if not all(name in records and (system.folder / name).exists() for name in names):
                batches.append(batch)
    return batches


def start_manifest(system):
    """Make the folder, and rid its manifest of a line that a kill cut short."""
    system.folder.mkdir(parents=True, exist_ok=True)
    manifest = system.folder / "manifest.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in read_log(manifest).values()]
    write_atomically(manifest, "".join(lines).encode())


def check_settings(args, system, weights):
    """Refuse to add to sounds that were made in another way."""
    settings = {
        "weights": weights,
        "scheduler": system.scheduler,
        "num_inference_steps": system.num_inference_steps,
        "guidance_scale": system.guidance_scale,
        "audio_length_in_s": args.audio_length_in_s,
        "negative_prompt": args.negative_prompt,
        "seed": args.seed,
        "dtype": args.dtype,
    }
    path = system.folder / "settings.json"
    if not path.exists():
        # every process may write it: the same content
        part = path.with_name(f".settings.{os.getpid()}.part")
        part.write_text(json.dumps(settings, indent=2) + "\n")
        os.replace(part, path)
    before = json.loads(path.read_text())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"--output_dir: the sounds in {system.folder} were made with {name} {before.get(name)!r}, not "
                f"{value!r}: give another folder"
            )


def make_sounds(args, system, pipe, batches, state):
    num_sounds = sum(len(batch) for batch in batches)
    bar = tqdm(total=num_sounds, desc=system.name, unit="sound", disable=not (batches and state.is_main_process))
    for batch in batches:
        generators = []
        for prompt, take in batch:
            digest = hashlib.sha256(prompt.id.encode("utf-8", "surrogatepass")).digest()
            generators.append(keyed_generator(args.seed, int.from_bytes(digest[:8], "big"), take))
        start = time.perf_counter()
        audios = pipe(
            [prompt.text for prompt, _ in batch],
            negative_prompt=args.negative_prompt,
            audio_length_in_s=args.audio_length_in_s,
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
            with open(system.folder / "manifest.jsonl", "ab", buffering=0) as file:  # one write a line
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        bar.update(len(batch))
    bar.close()


def collect(args, system, prompts, known_ids):
    """Fill in the system's sounds."""
    if not system.scheduler:
        system.sounds = read_generated(system.folder, known_ids)
        return
    records = read_log(system.folder / "manifest.jsonl")
    wanted = [(prompt, take) for prompt in prompts for take in range(1, args.num_takes + 1)]
    system.sounds = [
        Item(prompt.id, prompt.text, str(system.folder / file_name(prompt, take)), prompt.columns, take)
        for prompt, take in wanted
    ]
    made = [records[name] for name in (file_name(*each) for each in wanted) if name in records]
    system.seconds_per_clip = float(np.median([record["compute_in_s"] for record in made])) if made else None
    system.devices = {record["device"] for record in made}
