"""The `tango` command: text-to-audio for one prompt or for a list of prompts, written as WAV files."""

import argparse
import atexit
import csv
import gc
import io
import json
import logging
import math
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

from . import TANGO_TINY, TANGO_TINY_STUDENT, __version__
from .deferred_imports import deferred_imports
from .presets import (
    FAST,
    KERNELS,
    SCHEDULER_NAMES,
    choose_dtypes,
    choose_kernels,
    fast_settings,
    is_large_model,
    most_steps,
)
from .sound_files import (
    AudioFileError,
    draw_spectrogram,
    encode_wav,
    is_own_picture,
    read_audio,
    remove_leftovers,
    write_atomically,
)
from .sound_folder import (
    FolderError,
    add_sound,
    check_ours,
    check_unchanged,
    check_writable,
    encode_manifest,
    locked,
    read_manifest,
)


logger = logging.getLogger(__name__)

# Torch and diffusers take seconds to import: functions do it, after the arguments have been checked.

AUDIO_SETTINGS = ("audio", "strength", "mask", "frequency_mask")  # in the manifest of audio-to-audio
SPEED_SETTINGS = ("guidance_interval", "deep_cache")  # in the manifest where they are used
MOST_STUDENT_STEPS = 8  # that `--fast` takes with a student which does not say
SEEDS_PER_PROMPT = 1000  # takes of one prompt in a list share no seed with those of the next prompt
PROMPT_COLUMNS = ("prompt", "captions", "caption", "text")  # as in training, after our own name
NO_MODEL = (
    "no model in {model}, which must be a folder or a Hub repo, with model_index.json or in the original's layout: "
    "{error}"
)


def is_text(value):
    """Whether `value` is a `str` that can be encoded: arguments and JSON may carry lone surrogates."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high


def is_whole(value, low, high):
    return type(value) is int and low <= value <= high


# Settings of a sound, given by a flag or in a line of a list: name -> (check, what is accepted).
SETTINGS = {
    "prompt": (lambda value: is_text(value) and value.strip(), "a text that is not empty"),
    "negative_prompt": (is_text, "a text"),
    "seconds": (lambda value: is_number(value, 0.001, 86400), "a number of seconds from 0.001 to 86400"),
    "steps": (lambda value: is_whole(value, 1, 1000), "a whole number from 1 to 1000"),
    "guidance": (lambda value: is_number(value, 0, 1000), "a number from 0 to 1000"),
    "seed": (lambda value: is_whole(value, 0, 2**63 - 1), "a whole number from 0 to 2**63 - 1"),
    "name": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[\w-][\w .-]{0,49}", value),
        "up to 50 letters, digits, spaces and -_. with no dot or space in front",
    ),
}


class CommandError(Exception):
    """An argument or a list is invalid: reported in one line, exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise CommandError(message)


def say(text):
    """Print one line on standard error. Characters that cannot be encoded are escaped."""
    with suppress(OSError, ValueError):  # nobody listens any more, which stops nothing
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr, flush=True)


def check_settings(settings, where=""):
    for name, value in settings.items():
        is_valid, accepted = SETTINGS[name]
        if not is_valid(value):
            raise CommandError(f"{where}{name} must be {accepted}, got {value!r:.100}")


def read_prompts(path):
    """Read a list of prompts into dicts of SETTINGS, each with at least a `prompt`.

    A file named .csv or .tsv has a header; its prompts are in the first present of `PROMPT_COLUMNS`, and columns named
    as SETTINGS are settings where they are not blank. A file named .json or .jsonl, or with `{` as its first
    character, holds one JSON object a line. Any other file holds one prompt a line, and lines that start with `#` are
    comments. Blank lines are skipped. Of the original's manifests (`captions`, `dataset`, `location`) the captions are
    read.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the list {path}: {error}") from error
    if path.lower().endswith((".csv", ".tsv")):
        lines = read_table(path, text)
    elif path.lower().endswith((".json", ".jsonl")) or text.lstrip().startswith("{"):
        lines = read_json_lines(path, text)
    else:
        lines = ((number, {"prompt": line.strip()}) for number, line in enumerate(text.split("\n"), 1))
        lines = ((number, request) for number, request in lines if request["prompt"][:1] not in ("", "#"))
    requests, names = [], set()
    for number, request in lines:
        where = f"{path}, line {number}: "
        if "prompt" not in request:
            raise CommandError(f"{where}no prompt")
        check_settings(request, where)
        request.setdefault("name", f"{len(requests) + 1:05d}")
        if request["name"].casefold() in names:
            raise CommandError(f"{where}name {request['name']!r} was used before")
        names.add(request["name"].casefold())
        requests.append(request)
    if not requests:
        raise CommandError(f"no prompt in the list {path}")
    return requests


def read_json_lines(path, text):
    """Line number and settings of each JSON object."""
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}, line {number}: "
        line = line.strip()
        if not line:
            continue
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{where}not JSON: {error}") from error
        if not isinstance(request, dict):
            raise CommandError(f"{where}not a JSON object: {line:.100}")
        if "captions" in request and "prompt" not in request:
            request = {"prompt" if key == "captions" else key: value for key, value in request.items()}
            request = {key: value for key, value in request.items() if key not in ("dataset", "location")}
        request = {key: value for key, value in request.items() if value is not None}
        if unknown := request.keys() - SETTINGS.keys():
            raise CommandError(f"{where}unknown {sorted(unknown)}, known are {', '.join(SETTINGS)}")
        yield number, request


def read_table(path, text):
    """Line number and settings of each row of comma- or tab-separated values, which may have other columns too."""
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
    try:
        columns = rows.fieldnames or []
        prompt_column = next((name for name in PROMPT_COLUMNS if name in columns), None)
        if columns and prompt_column is None:
            raise CommandError(f"{path}: none of the columns {', '.join(PROMPT_COLUMNS)}, only {', '.join(columns)}")
        used = {name: name for name in SETTINGS if name in columns} | {"prompt": prompt_column}
        if twice := [column for column in used.values() if columns.count(column) > 1]:
            raise CommandError(f"{path}: two columns are called {twice[0]!r}")
        if unused := [column for column in columns if column not in used.values()]:
            say(f"{path}: not used are the columns {', '.join(map(repr, unused))}")
        for row in rows:
            where = f"{path}, line {rows.line_num}: "
            if None in row or None in row.values():
                raise CommandError(f"{where}expected {len(columns)} fields")
            request = {name: row[column].strip() for name, column in used.items()}
            request = {name: value for name, value in request.items() if value or name == "prompt"}
            for name, kind in (("seconds", float), ("guidance", float), ("steps", int), ("seed", int)):
                if name in request:
                    try:
                        request[name] = kind(request[name])
                    except ValueError:
                        pass  # `check_settings` says what is accepted
            yield rows.line_num, request
    except csv.Error as error:
        raise CommandError(f"{path}, line {rows.reader.line_num}: not CSV: {error}") from error


def read_regions(text, name, unit):
    """`[[2.0, 4.5], ...]` from `2.0-4.5,6-7`."""
    regions = []
    for part in text.split(","):
        number = r"\d+\.?\d*"
        if not re.fullmatch(rf"\s*{number}-{number}\s*", part):
            raise CommandError(f"{name} must be regions in {unit} such as {'2.0-4.5,6-7'!r}, got {text!r:.100}")
        regions.append([float(edge) for edge in part.split("-")])
    return regions


def check_speed_arguments(args):
    """Read `--guidance_interval` as two numbers and `--kernels` as names, and check `--deep_cache`."""
    if args.guidance_interval is not None:
        number = r"\d+\.?\d*"
        if not re.fullmatch(rf"{number}-{number}", args.guidance_interval):
            raise CommandError(f"guidance_interval must be such as 0.25-0.75, got {args.guidance_interval!r:.100}")
        start, stop = (float(edge) for edge in args.guidance_interval.split("-"))
        if not 0 <= start < stop <= 1:
            raise CommandError(f"guidance_interval must ascend from 0 to 1, got {args.guidance_interval!r:.100}")
        args.guidance_interval = [start, stop]  # as JSON has it
    if args.kernels is not None:
        names = [] if args.kernels == "plain" else args.kernels.split(",")
        if unknown := [name for name in names if name not in KERNELS]:
            raise CommandError(f"kernels must be plain, or of {', '.join(KERNELS)}, got {unknown[0]!r:.100}")
        args.kernels = tuple(names)
    if args.deep_cache is not None and not is_whole(args.deep_cache, 1, 100):
        raise CommandError(f"deep_cache must be a whole number from 1 to 100, got {args.deep_cache}")


def check_audio_arguments(args):
    """Read `--audio`, and the flags that go with it, into `args.audio_settings` and `args.audio_options`."""
    args.audio_settings, args.audio_options, args.audio_seconds = {}, {}, None
    flags = {name: getattr(args, name) for name in ("strength", "mask", "frequency_mask", "continuation")}
    if args.audio is None:
        for name, value in flags.items():
            if value is not None:
                raise CommandError(
                    f"--{name.replace('continuation', 'continue')} needs a sound to start from: --audio"
                )
        return
    if args.strength is not None and not is_number(args.strength, 1e-3, 1):
        raise CommandError(f"strength must be a number from 0.001 to 1, got {args.strength}")
    if args.continuation is not None and not is_number(args.continuation, 1e-3, 86400):
        raise CommandError(f"continue must be a number of seconds from 0.001 to 86400, got {args.continuation}")
    if args.continuation is not None and args.seconds is not None:
        raise CommandError("give either --continue, what is added to the sound, or --seconds, the length in all")
    mask = None if args.mask is None else read_regions(args.mask, "mask", "seconds")
    bands = None if args.frequency_mask is None else read_regions(args.frequency_mask, "frequency_mask", "Hz")
    if bands is not None and len(bands) > 1:
        raise CommandError(f"frequency_mask must be one band, got {args.frequency_mask!r:.100}")
    try:
        samples, sampling_rate = read_audio(args.audio)
    except AudioFileError as error:
        raise CommandError(str(error)) from error
    args.audio_seconds = samples.shape[1] / sampling_rate + (args.continuation or 0)
    args.audio_settings = {
        "audio": args.audio,
        "strength": args.strength,
        "mask": mask,
        "frequency_mask": bands and bands[0],
    }
    args.audio_options = {
        "audio": [samples],
        "audio_sampling_rate": sampling_rate,
        "strength": args.strength,
        "mask": mask,
        "frequency_mask_in_hz": bands and bands[0],
    }


def parse_arguments(argv):
    """Arguments, checked as far as is possible without importing torch; `requests` has the sounds to generate."""
    parser = Parser(
        prog="tango",
        description="Generate sounds from text with a Tango model.",
        epilog="Several processes share a list under `accelerate launch -m pipeline_tango ...`, and on CPUs under "
        "`torchrun --nproc_per_node N -m pipeline_tango ...`.",
        allow_abbrev=False,
    )
    parser.add_argument("prompt", nargs="?", help="text that describes the sound, such as 'rain and thunder'")
    parser.add_argument("--version", action="version", version=f"tango {__version__}")
    parser.add_argument(
        "--model",
        metavar="FOLDER_OR_REPO",
        default=TANGO_TINY,
        help="diffusers folder, or Hub repo such as owner/name, or a checkpoint in the original's layout such as "
        "declare-lab/tango2, which is converted once (default: tango-tiny, which comes with the package)",
    )
    parser.add_argument(
        "--remove_originals",
        action="store_true",
        help="delete the downloaded weights in the original's layout once they are converted",
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="which weights of the model to load, such as fp16 (default: the plain ones, or those of the only variant "
        "that a folder has)",
    )
    parser.add_argument(
        "--lora",
        metavar="FOLDER_OR_REPO",
        help="LoRA weights to add to the model. Of one that makes it a student, scheduler, steps and guidance are the "
        "default. With --fast they are merged into the model's",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="WAV file, replaced if it is there (default: tango.wav); with --prompts a folder",
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")

    sound = parser.add_argument_group("the sound")
    sound.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="length in seconds, also of several minutes (default: the model's own, or that of --audio)",
    )
    sound.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: the model's own, usually 100)"
    )
    sound.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help="guidance scale; 1 or less turns classifier-free guidance off (default: the model's own, usually 3)",
    )
    sound.add_argument("--negative_prompt", metavar="TEXT", help="text that describes what the sound must not contain")
    sound.add_argument("--scheduler", choices=SCHEDULER_NAMES, help="noise scheduler (default: the model's own)")
    sound.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="random seed; take k uses N + k - 1 (default: chosen at random and printed; with --prompts 0). Line n of "
        f"a list adds {SEEDS_PER_PROMPT} * (n - 1)",
    )
    sound.add_argument(
        "--takes",
        type=int,
        default=1,
        metavar="N",
        help="sounds per prompt, each with a seed of its own: rain.wav becomes rain-1.wav, rain-2.wav",
    )
    sound.add_argument(
        "--spectrogram",
        nargs="?",
        const="",
        metavar="PNG",
        help="also save a mel-scaled spectrogram (default: beside the sound). Needs the extra `demo`",
    )

    speed = parser.add_argument_group("faster")
    interval = "-".join(map(str, FAST["guidance_interval"]))
    speed.add_argument(
        "--fast",
        action="store_true",
        help="with tango-tiny, --student, if no other flag asks for what a student cannot do. With other models, and "
        f"with --no_student, --scheduler {FAST['scheduler']} --steps {FAST['steps']} --guidance {FAST['guidance']:g} "
        f"--guidance_interval {interval} and, for models of the released size, --deep_cache {FAST['deep_cache']}. "
        "Explicit flags override these. Where the UNet is in bfloat16, so are the VAE and the vocoder, and they are "
        "computed by the --kernels that suit the processor",
    )
    speed.add_argument(
        "--kernels",
        metavar="NAMES",
        help=f"how the models are computed, which changes the last bits only: plain, or any of {', '.join(KERNELS)}, "
        "joined by commas (default: plain, with --fast those that suit the processor)",
    )
    student = speed.add_mutually_exclusive_group()
    student.add_argument(
        "--student",
        action="store_true",
        default=None,
        help="the student that comes with tango-tiny, which was distilled to a few steps without guidance",
    )
    student.add_argument(
        "--no_student", dest="student", action="store_false", default=None, help="--fast without this student"
    )
    speed.add_argument(
        "--guidance_interval",
        metavar="START-STOP",
        help="apply guidance in this part of the steps only, as fractions from 0 to 1 (default: the model's own)",
    )
    speed.add_argument(
        "--deep_cache",
        type=int,
        metavar="N",
        help="DeepCache: compute the UNet's inner blocks at every Nth step only (default: 1, at every step)",
    )

    source = parser.add_argument_group("audio-to-audio")
    source.add_argument(
        "--audio",
        metavar="FILE",
        help="start from this WAV file, or from any other format that libsndfile reads (needs the extra `demo`)",
    )
    source.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="fraction of the schedule to run, as in image-to-image (default: 0.5, with an inpainting mask 1)",
    )
    source.add_argument(
        "--mask",
        metavar="S-S",
        help="inpainting mask in seconds: regenerate these regions and keep the rest, such as 2.0-4.5 or 0-1,6-7.5",
    )
    source.add_argument(
        "--frequency_mask",
        metavar="HZ-HZ",
        help="inpainting mask in Hz: regenerate this band and keep the rest, such as 4000-8000",
    )
    source.add_argument(
        "--continue",
        dest="continuation",
        type=float,
        metavar="S",
        help="keep the file and append this many seconds (--seconds gives the length in all instead)",
    )

    several = parser.add_argument_group("a list of prompts")
    several.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt a line (# starts a comment), or JSON lines or a CSV file with prompt and optionally "
        "negative_prompt, seconds, steps, guidance, seed, name. The output folder gets 00001.wav ... (or the names) "
        "and manifest.jsonl; sounds that it already holds are skipped",
    )
    several.add_argument(
        "--overwrite",
        action="store_true",
        help="replace sounds in the folder that were generated with other settings, and files that are not the "
        "command's; without a list the files of --takes, and pictures beside sounds",
    )
    several.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="sounds generated in one batch (default: 1). Larger batches are faster on a GPU, and the sounds may "
        "differ in the last bits",
    )

    machine = parser.add_argument_group("device")
    machine.add_argument(
        "--device", help="cpu, cuda, cuda:1, xpu, mps (default: an accelerator where there is one, else cpu)"
    )
    machine.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the UNet, which takes nearly all of the time; without --fast the VAE and the vocoder stay in float32 "
        "(default: auto, that is bfloat16 where the device computes in it, float16 on other CUDA devices, else "
        "float32)",
    )
    machine.add_argument("--cpu_offload", action="store_true", help="keep only the model in use on the accelerator")

    args = parser.parse_args(argv)
    if args.spectrogram and not args.spectrogram.lower().endswith(".png"):
        raise CommandError(f"--spectrogram saves a PNG, give it a path that ends in .png, not {args.spectrogram!r}")
    if args.spectrogram is not None and not find_spec("matplotlib"):
        raise CommandError('--spectrogram needs matplotlib: pip install "pipeline-tango[demo]"')
    if (args.prompt is None) == (args.prompts is None):
        raise CommandError("give either a prompt or --prompts FILE")
    if not args.model:
        raise CommandError("--model must be a diffusers folder, or a Hub repo such as owner/name")
    if args.lora == "":
        raise CommandError("--lora must be a folder, or a Hub repo such as owner/name")
    if args.variant is not None and not re.fullmatch(r"[\w-]+", args.variant):
        raise CommandError(f"--variant must be a name such as fp16, got {args.variant!r:.100}")
    flags = {name: getattr(args, name) for name in SETTINGS if name != "name"}
    check_settings({name: value for name, value in flags.items() if value is not None})
    for name in ("takes", "batch_size"):
        if not is_whole(getattr(args, name), 1, SEEDS_PER_PROMPT):
            raise CommandError(f"{name} must be a whole number from 1 to {SEEDS_PER_PROMPT}")
    if args.device is not None and not re.fullmatch(r"(cpu|cuda|xpu|mps)(:\d+)?", args.device):
        raise CommandError(
            f"device must be cpu, cuda, xpu or mps, or one of several as in cuda:1, got {args.device!r}"
        )
    check_speed_arguments(args)
    check_audio_arguments(args)
    if args.prompts is not None:
        if not args.output:
            raise CommandError("--prompts makes many files: give a folder for them with -o")
        args.folder = Path(args.output)
        args.requests = read_prompts(args.prompts)
    else:
        output = Path(args.output or "tango.wav")
        if output.suffix != ".wav":
            raise CommandError(f"the output must end in .wav, not {str(output)!r}")
        args.folder = output.parent
        args.requests = [{"prompt": args.prompt, "name": output.stem}]
    if args.spectrogram and len(args.requests) * args.takes > 1:
        raise CommandError("one PNG cannot hold several spectrograms: give --spectrogram without a path")
    return args


def plan_sounds(args, first_seed, defaults):
    """The manifest's record of each sound to generate, prompt by prompt and take by take."""
    most_steps = defaults["most_steps"]
    steps = min(defaults["steps"], most_steps) if args.steps is None else args.steps
    guidance = defaults["guidance"] if args.guidance is None else args.guidance
    sounds = []
    for position, request in enumerate(args.requests):
        seed = request.get("seed", first_seed + SEEDS_PER_PROMPT * position)
        if (asked := request.get("steps", steps)) > most_steps:
            raise CommandError(f"steps must be at most {most_steps} with the {defaults['scheduler']}, got {asked}")
        for take in range(args.takes):
            sounds.append(
                {
                    "file": request["name"] + (f"-{take + 1}.wav" if args.takes > 1 else ".wav"),
                    "prompt": request["prompt"],
                    "negative_prompt": request.get("negative_prompt", args.negative_prompt),
                    "seed": seed + take,
                    "take": take + 1,
                    "seconds": request.get("seconds", args.seconds or args.audio_seconds or defaults["seconds"]),
                    "steps": request.get("steps", steps),
                    "guidance": request.get("guidance", guidance),
                    "scheduler": defaults["scheduler"],
                    "model": model_name(args.model),
                    **({"variant": args.variant} if args.variant else {}),
                    **({"lora": args.lora} if args.lora else {}),
                    **({"student": True} if args.student else {}),
                    **{name: getattr(args, name) for name in SPEED_SETTINGS if getattr(args, name) is not None},
                    **args.audio_settings,
                }
            )
    return sounds


def split_into_batches(sounds, batch_size):
    """Groups of at most `batch_size` neighbours that one call can generate."""
    shared = ("negative_prompt", "seconds", "steps", "guidance")
    batches = []
    for sound in sounds:
        last = batches[-1] if batches else []
        if 0 < len(last) < batch_size and all(last[0][name] == sound[name] for name in shared):
            last.append(sound)
        else:
            batches.append([sound])
    return batches


def read_model_defaults(args, dtypes):
    """Length in seconds, steps, guidance scale, the scheduler's class name, and the student that the UNet is and what
    says so, read from the model's index and the LoRA only.

    `args.source` becomes what is loaded: `args.model`, or what a checkpoint in the original's layout is converted to.
    """
    import diffusers
    import huggingface_hub
    import transformers

    from . import SCHEDULERS, TangoPipeline
    from .converted import with_conversion
    from .student import call_defaults, check_student

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if args.quiet:
        huggingface_hub.utils.disable_progress_bars()

    def attempt(source, **options):
        args.source = source
        return TangoPipeline.load_config(source, **options)

    try:
        config = with_conversion(
            args.model,
            attempt,
            TangoPipeline,
            dtype=dtypes,
            variant=args.variant,
            remove_originals=args.remove_originals,
        )
        class_name = config["_class_name"]
    except Exception as error:  # a file or a Hub of others: anything may be wrong with it
        raise OSError(NO_MODEL.format(model=args.model, error=str(error)[:350])) from error
    if class_name != "TangoPipeline":
        raise OSError(f"the model in {args.model} is of the class {class_name}, not TangoPipeline")
    student, note = None, ""
    if args.lora:
        try:
            student = TangoPipeline.lora_student(args.lora)
        except Exception as error:
            raise RuntimeError(f"cannot load LoRA weights from {args.lora}: {error}") from error
    try:
        if config.get("student") is not None:
            student = check_student(config["student"])
    except ValueError as error:
        raise OSError(NO_MODEL.format(model=args.model, error=error)) from error
    if student is None:
        student, note = choose_student(args)
    elif args.student:
        raise CommandError("--student adds a student to tango-tiny, but the model is one already: leave it out")
    else:
        note = ", a student"
    try:
        steps, guidance = call_defaults(config, student)
        return {
            "seconds": config["default_audio_length_in_s"],
            "steps": steps,
            "guidance": guidance,
            "scheduler": config["scheduler"][1] if student is None else SCHEDULERS[student["scheduler"]].__name__,
            "student": student,
            "student_note": note,
        }
    except (KeyError, TypeError, IndexError) as error:
        raise OSError(NO_MODEL.format(model=args.model, error=repr(error)[:120])) from error


def choose_student(args):
    """The student in the package, `None` if it is not used, and a note that says so. `args.student` becomes whether it
    is used: where the flag asks for it, and by `--fast` unless another flag or the list asks for what it cannot do."""
    from . import TangoPipeline

    there_is_one = args.model == TANGO_TINY and os.path.isdir(TANGO_TINY_STUDENT)
    if args.student and not there_is_one:
        raise CommandError("--student belongs to tango-tiny: other models become students by --lora")
    may_use_it = args.fast if args.student is None else args.student
    if not may_use_it or not there_is_one:
        return None, ""
    student = TangoPipeline.lora_student(TANGO_TINY_STUDENT)
    if args.student is None:
        requests = [vars(args), *args.requests]
        asked = [name for name in ("lora", "scheduler", "guidance_interval", "deep_cache") if getattr(args, name)]
        asked += ["guidance" for each in requests if (each.get("guidance") or 0) > 1]
        asked += ["negative_prompt" for each in requests if each.get("negative_prompt")]
        asked += ["steps" for each in requests if each.get("steps") and not takes_steps(student, each["steps"])]
        if asked:
            return None, f" without its student, because of --{asked[0]}"
        args.student = True
    return student, " with its student"


def takes_steps(student, steps):
    """Whether `--fast` lets a student take so many steps: one for any number takes at most eight."""
    return str(steps) in student["timesteps"] if "timesteps" in student else steps <= MOST_STUDENT_STEPS


def check_student_sounds(args, sounds, student):
    """The sounds, records of the manifest, ask for nothing that a student cannot do."""
    if (args.deep_cache or 1) > 1:
        raise CommandError("deep_cache is not for students: the features of their few steps differ too much")
    weights, schedules = student["guidance_scale"], student.get("timesteps")
    for sound in sounds:
        if schedules and not args.scheduler and str(sound["steps"]) not in schedules:
            numbers = ", ".join(schedules)
            raise CommandError(
                f"steps must be one of {numbers}, which the student was distilled for, got {sound['steps']}"
            )
        guidance, asked = sound["guidance"], {"negative_prompt": sound["negative_prompt"]}
        if isinstance(weights, list) and not weights[0] <= guidance <= weights[1]:
            raise CommandError(f"guidance must be from {weights[0]:g} to {weights[1]:g}, got {guidance}")
        if isinstance(weights, list) or guidance <= 1:
            asked["guidance_interval"] = args.guidance_interval != [0.0, 1.0] and args.guidance_interval
            for name in [name for name, value in asked.items() if value]:
                raise CommandError(f"{name} has no effect on a student, which has guidance inside: leave it out")


def model_name(model):
    return "tango-tiny" if model == TANGO_TINY else model


def choose_device(args, state):
    import torch

    if state.num_processes > 1 and args.device not in (None, state.device.type):
        raise CommandError(f"each process has its own device here: --device can only be {state.device.type}")
    if state.num_processes > 1 or args.device is None:
        device = state.device
    else:
        try:
            device = torch.device(args.device)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise CommandError(f"device {args.device} is not there: {str(error).splitlines()[0]}") from error
    if args.cpu_offload and device.type == "cpu":
        raise CommandError("--cpu_offload needs an accelerator, and this runs on the CPU")
    return device


def load_pipeline(args, device, dtypes):
    from . import SCHEDULERS, TangoPipeline
    from .kernels import use_kernels
    from .model_files import WEIGHT_SUFFIXES, WEIGHTS, find_variants

    try:
        variant = args.variant
        if variant is None and os.path.isdir(args.source):
            variants = find_variants(Path(args.source), tuple(WEIGHTS), WEIGHT_SUFFIXES)
            variant = variants[0] if len(variants) == 1 else None
        pipe = TangoPipeline.from_pretrained(args.source, dtype=dtypes, variant=variant)
    except Exception as error:  # files of others: anything may be wrong with them
        raise RuntimeError(f"cannot load {args.model}: {error}") from error
    if args.student:
        pipe.merge_lora_weights(TANGO_TINY_STUDENT)
    if args.lora:
        try:
            pipe.load_lora_weights(args.lora)
            if args.fast:  # layers of their own cost time
                pipe.fuse_lora()
                pipe.unload_lora_weights()
        except Exception as error:
            raise RuntimeError(f"cannot load LoRA weights from {args.lora}: {error}") from error
    if args.scheduler:
        pipe.scheduler = SCHEDULERS[args.scheduler].from_config(pipe.scheduler.config)
    if args.deep_cache is not None:
        pipe.enable_deep_cache(interval=args.deep_cache)
    if args.cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    use_kernels(pipe, args.kernels)
    return pipe


def check_files(args, sounds, paths):
    """The files of single sounds can be written. Those whose very names were given are replaced, and so are earlier
    spectrograms; others are not."""
    for sound in sounds:
        wav, *pictures = paths[sound["file"]]
        for path in (wav, *pictures):
            check_writable(path)
            is_named = args.takes == 1 if path == wav else bool(args.spectrogram)
            if path.exists() and not (args.overwrite or is_named or (path in pictures and is_own_picture(path))):
                raise FolderError(f"{path} is there already: give another name with -o, or --overwrite to replace it")


def find_missing(args, sounds, paths, manifest):
    """The manifest's records, and the sounds of a list that are missing, after a check that no file of others and no
    sound with other settings is in their place."""
    check_writable(paths[sounds[0]["file"]][0])
    try:
        records = read_manifest(manifest, strict=not args.overwrite)
    except OSError as error:
        raise FolderError(f"cannot read {manifest}: {error}") from error
    optional = ("variant", "lora", "student", *AUDIO_SETTINGS, *SPEED_SETTINGS)
    todo = []
    for sound in sounds:
        files = paths[sound["file"]]
        if any(path.is_dir() for path in files):
            raise FolderError(f"cannot write to {args.folder}: {next(filter(Path.is_dir, files))} is a folder")
        record = records.get(sound["file"])
        if record is None and not args.overwrite:
            check_ours(files, sound, manifest.exists())
        elif record is not None and files[0].exists() and not args.overwrite:
            check_unchanged(files[0], record, sound, optional)
        is_same = record is not None and all(record.get(name) == sound.get(name) for name in (*sound, *optional))
        if not is_same or not all(path.exists() for path in files):
            todo.append(sound)
    return records, todo


def lock_folder(stack, state, folder):
    """Keep other runs out of the folder until `stack` is left. The main process holds the lock for all."""
    error = None
    if state.is_main_process:
        try:
            stack.enter_context(locked(folder))
        except FolderError as reason:
            error = reason
    from accelerate.utils import broadcast_object_list

    (error,) = broadcast_object_list([error])
    if error is not None:
        raise error


def overall_bar(num_sounds, is_hidden):
    """The progress bar of a list of prompts: sounds done, of how many, and the time left."""
    from tqdm import tqdm

    return tqdm(total=num_sounds, desc="sounds", unit="sound", leave=False, disable=is_hidden or num_sounds < 2)


@contextmanager
def garbage_kept():
    """Context in which garbage is not collected until the function that it gives is called: what is loaded until then
    is no garbage, and collections, at exit too, would look through all of it several times."""
    collects = gc.isenabled()

    def loaded():
        gc.freeze()
        if collects:
            gc.enable()

    gc.disable()
    try:
        yield loaded
    finally:
        gc.unfreeze()
        if collects:
            gc.enable()
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)


def make_sounds(args, loaded=lambda: None):
    """Generate the sounds that `args` describe, or this process's share of them. `loaded` is called before the first
    one."""
    with deferred_imports() if args.prompts is None else nullcontext():
        import torch
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list
        from diffusers.utils.torch_utils import get_device

        from . import SCHEDULERS

    # On CPUs, processes form a group only if told so. The timeout is long: the slowest process is waited for.
    state = PartialState(cpu="cpu" in (args.device, get_device()), timeout=timedelta(days=30))
    device = choose_device(args, state)
    dtypes = choose_dtypes(args.dtype, device, args.fast)
    defaults = read_model_defaults(args, dtypes)
    student = defaults["student"]
    for name, value in fast_settings(args.source).items() if args.fast and student is None else ():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.scheduler:
        defaults["scheduler"] = SCHEDULERS[args.scheduler].__name__
    defaults["most_steps"] = most_steps(args.model, defaults["scheduler"])
    if student is not None and math.isfinite(defaults["most_steps"]):
        options = student["scheduler_options"]
        defaults["most_steps"] = options.get("original_inference_steps", defaults["most_steps"])

    seed, seed_note = args.seed, ""
    if seed is None and args.prompts is not None:
        seed = 0  # an interrupted list continues with the same seeds
    elif seed is None:
        (seed,) = broadcast_object_list([random.SystemRandom().randrange(2**32)])
        seed_note = " (chosen at random)"
    sounds = plan_sounds(args, seed, defaults)
    if student is not None:
        check_student_sounds(args, sounds, student)
    paths = {}  # file name in the manifest -> what to write
    for sound in sounds:
        wav = args.folder / sound["file"]
        picture = [] if args.spectrogram is None else [Path(args.spectrogram or wav.with_suffix(".png"))]
        paths[sound["file"]] = [wav, *picture]

    with ExitStack() as stack:
        if args.prompts is not None:
            lock_folder(stack, state, args.folder)
        manifest = args.folder / "manifest.jsonl"
        if args.prompts is None:
            check_files(args, sounds, paths)
            records, todo = {}, sounds
        else:
            records, todo = find_missing(args, sounds, paths, manifest)
        if not todo:
            if not args.quiet:
                say(f"all {len(sounds)} sounds are in {args.folder} already")
            return
        if state.is_main_process:
            files = [path for group in paths.values() for path in group]
            # nobody else writes into a folder that is locked
            remove_leftovers(files, "part", **({} if args.prompts is None else {"older_than_in_s": 0}))
        if args.prompts is not None and state.is_main_process:
            remade = {sound["file"] for sound in todo}
            write_atomically(manifest, encode_manifest(r for name, r in records.items() if name not in remade))
        state.wait_for_everyone()  # before anyone writes a sound

        if not args.quiet and state.is_main_process:
            share = f" by {state.num_processes} processes" if state.num_processes > 1 else ""
            there = f" ({len(sounds) - len(todo)} more are there already)" if len(todo) < len(sounds) else ""
            say(
                f"{model_name(args.model)}{defaults['student_note']} on {device} in "
                f"{str(dtypes.get('unet', dtypes['default'])).removeprefix('torch.')}, "
                f"{defaults['scheduler']}, seed {seed}{seed_note}, "
                f"sounds to make: {len(todo)}{there}{share}"
            )
        todo = todo[state.process_index :: state.num_processes]
        if args.kernels is None and args.fast:
            args.kernels, reason = choose_kernels(dtypes, device, len(todo), is_large_model(args.source))
            if not args.quiet and state.is_main_process:
                say(f"kernels: {', '.join(args.kernels) or 'plain'} ({reason})")
        args.kernels = args.kernels or ()
        pipe = load_pipeline(args, device, dtypes) if todo else None
        loaded()
        compute_in_s = sound_in_s = 0.0
        has_no_bars = args.quiet or not state.is_local_main_process
        overall = stack.enter_context(overall_bar(len(todo), has_no_bars or args.prompts is None))
        for batch in split_into_batches(todo, args.batch_size):
            pipe.set_progress_bar_config(
                desc=batch[0]["file"], unit="step", leave=False, position=1 - overall.disable, disable=has_no_bars
            )
            start = time.perf_counter()
            audios = pipe(
                prompt=[sound["prompt"] for sound in batch],
                negative_prompt=batch[0]["negative_prompt"] and [batch[0]["negative_prompt"]] * len(batch),
                audio_length_in_s=batch[0]["seconds"],
                num_inference_steps=batch[0]["steps"],
                guidance_scale=batch[0]["guidance"],
                generator=[torch.Generator().manual_seed(sound["seed"]) for sound in batch],
                guidance_interval=args.guidance_interval,
                **args.audio_options,
            ).audios
            compute_in_s += time.perf_counter() - start
            for sound, audio in zip(batch, audios):
                sampling_rate = pipe.vocoder.config.sampling_rate
                sound_in_s += len(audio) / sampling_rate
                wav, *pictures = paths[sound["file"]]
                contents = {path: draw_spectrogram(audio, sampling_rate, sound["prompt"]) for path in pictures}
                contents[wav] = encode_wav(audio, sampling_rate)
                if args.prompts is None:
                    for path, content in contents.items():
                        write_atomically(path, content)
                else:
                    add_sound(manifest, sound, contents, may_replace=args.overwrite or sound["file"] in records)
                overall.update()
                if not args.quiet:
                    with overall.external_write_mode(sys.stderr):  # also draws the bar anew
                        say(f"{wav}  {len(audio) / sampling_rate:g} s  seed {sound['seed']}")
        overall.close()
        if todo and not args.quiet:
            say(
                f"{sound_in_s:g} s of sound in {compute_in_s:.1f} s without loading: "
                f"real-time factor {compute_in_s / sound_in_s:.3g}"
            )

        if args.prompts is not None:
            state.wait_for_everyone()
            if state.is_main_process:
                records = read_manifest(manifest)
                in_order = [records.pop(sound["file"], sound) for sound in sounds]
                write_atomically(manifest, encode_manifest([*records.values(), *in_order]))
    state.destroy_process_group()


def stop(number, frame):
    """A handler of SIGTERM that cleans up as after Ctrl-C."""
    raise KeyboardInterrupt(number)


def release(interrupt):
    """Release what an interruption left half constructed, such as a progress bar, silently: its destructor fails."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        interrupt.__traceback__ = interrupt.__context__ = None
    finally:
        sys.unraisablehook = hook


def main(argv=None):
    """Run the command. Returns the exit status: 0, 1 (failed), 2 (invalid arguments), 130 (Ctrl-C) or 143
    (SIGTERM)."""
    before = None
    if threading.current_thread() is threading.main_thread():  # elsewhere handlers cannot be set
        before = signal.signal(signal.SIGTERM, stop)
    try:
        with warnings.catch_warnings():  # hide warnings that are for developers of the libraries
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
            args = parse_arguments(argv)
            with garbage_kept() as loaded:
                make_sounds(args, loaded)
    except SystemExit as exit:  # --help and --version
        return exit.code
    except KeyboardInterrupt as interrupt:
        release(interrupt)
        say("stopped")
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    except Exception as error:  # whatever a library raises over a broken file is one line to the user
        logger.debug("where the error came from", exc_info=True)
        say(f"error: {' '.join(str(error).split())[:500] or type(error).__name__}")
        return 2 if isinstance(error, (CommandError, FolderError)) else 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
