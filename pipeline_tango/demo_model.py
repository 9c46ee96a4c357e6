"""The model of the demo: which ones may be loaded, one call at a time, stopping, and what each sound was made from."""

import json
import logging
import math
import random
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from . import TANGO_TINY
from .__main__ import (
    CommandError,
    check_student_sounds,
    choose_device,
    is_whole,
    load_pipeline,
    model_name,
    parse_arguments,
    plan_sounds,
    read_model_defaults,
)
from .presets import choose_dtypes, choose_kernels, fast_settings, is_large_model, most_steps
from .sound_files import AudioFileError, open_sound


logger = logging.getLogger(__name__)

QUALITIES = ("fast", "full")
MODES = ("variation", "inpainting", "continuation")
OWN_SCHEDULER = "the model's own"
MAX_TEXT_LENGTH = 1000  # characters; the models read about 400
MAX_CHANNELS = 8
NUM_PEAKS = 400  # of a drawn waveform


class DemoError(Exception):
    """A sentence for the person at the page, without paths of this machine."""


class Stopped(Exception):
    """The stop button was pressed while the model ran."""


@dataclass
class Request:
    """What a person asks for. `None` stands for the model's own value, for the seed for one chosen at random."""

    prompt: str | list[tuple[float, str]]
    negative_prompt: str = ""
    seconds: float | None = None
    takes: int = 1
    quality: str = "full"
    scheduler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    model: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    audio: str | None = None  # path of an upload
    audio_flags: dict = field(default_factory=dict)  # flags of the command, by `audio_flags`


@dataclass
class Sound:
    """A generated sound, mono samples in [-1, 1], and the Python that makes it again."""

    samples: object
    sampling_rate: int
    prompt: str
    seed: int
    steps: int
    compute_in_s: float
    code: str

    @property
    def seconds(self):
        return len(self.samples) / self.sampling_rate

    @property
    def facts(self):
        """What a page or a program shows beside the sound."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "steps": self.steps,
            "compute_in_s": round(self.compute_in_s, 3),
            "real_time_factor": round(self.compute_in_s / self.seconds, 4),
        }


class DemoModel:
    """One loaded pipeline, which one call at a time uses.

    Args:
        model, lora (`str`): folder or repo of the command line, which everybody may use.
        models (`str` or `Path`, *optional*): the folder whose subfolders may be loaded too.
        allow_repos (`bool`, *optional*, defaults to `False`): whether Hub repos may be loaded too.
        max_seconds (`float`, *optional*, defaults to 120): the longest sound, given or generated.
        max_takes (`int`, *optional*, defaults to 4): sounds of one request.
        device, dtype (`str`, *optional*): as the flags of `tango`.

    Raises:
        DemoError: if `models` is no folder.
    """

    def __init__(
        self,
        model=TANGO_TINY,
        lora=None,
        models=None,
        allow_repos=False,
        max_seconds=120.0,
        max_takes=4,
        device=None,
        dtype="auto",
    ):
        self.models = None if models is None else Path(models).resolve()
        if self.models is not None and not self.models.is_dir():
            raise DemoError(f"--models must be a folder, got {str(models)!r}")
        self.allow_repos, self.max_seconds, self.max_takes = allow_repos, max_seconds, max_takes
        self.device, self.dtype = device, dtype
        self.given = {short_name(model): model}
        self.given_loras = {} if lora is None else {short_name(lora): lora}
        self.lock = threading.Lock()
        self.pipe, self.own_scheduler, self.loaded = None, None, None
        self.job, self.is_stopping = None, False

    def model_names(self):
        return list(dict.fromkeys([*self.given, *self.find_folders("model_index.json", "main_config.json")]))

    def lora_names(self):
        return list(dict.fromkeys([*self.given_loras, *self.find_folders("pytorch_lora_weights.safetensors")]))

    def find_folders(self, *files):
        """Names of the folders below `models`, at most two levels deep, that have one of the files."""
        if self.models is None:
            return []
        found = {
            path.parent for name in files for depth in ("*", "*/*") for path in self.models.glob(f"{depth}/{name}")
        }
        inside = [path for path in found if path.resolve().is_relative_to(self.models)]
        return sorted(path.relative_to(self.models).as_posix() for path in inside)

    def locate(self, name, given, names, what):
        """The folder or repo that a name stands for. Only names that the page offers are folders.

        Raises:
            DemoError: if it may not be loaded.
        """
        if name in given:
            return given[name]
        if name in names:
            return str(self.models / name)
        if self.allow_repos and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            if not Path(name).exists():  # else a library would take it for a folder
                return name
        accepted = ", ".join(map(repr, names)) or "none"
        raise DemoError(
            f"the {what} must be one of {accepted}{', or a Hub repo such as owner/name' if self.allow_repos else ''}, "
            f"got {name!r:.100}"
        )

    def stop(self, session, kind=None):
        """Stop the call of a session that runs, if it is of that kind. Returns whether there is one."""
        job = self.job
        if job is None or session is None or job[0] != session or kind not in (None, job[1]):
            return False
        self.is_stopping = True
        return True

    def generate(self, request, job, report):
        """The sounds of a request, each as `tango` makes it with the same settings and seed.

        Args:
            request ([`Request`])
            job (`tuple[str, str]`): session and kind of the call, for `stop`.
            report (`Callable`): called as `report(fraction or None, text)`.

        Raises:
            DemoError: for what a person can mend.
            Stopped: by `stop`.
        """
        with self.running(job):
            args, sounds = self.prepare(request, report)
            result = []
            for position, sound in enumerate(sounds):
                where = f"take {position + 1} of {len(sounds)}, " if len(sounds) > 1 else ""
                start = time.perf_counter()
                audio = self.pipe(**self.call_options(args, request, sound, report, where)).audios[0]
                result.append(self.sound_of(args, request, sound, audio, time.perf_counter() - start))
            return result

    def stream(self, request, job, report):
        """As `generate`, for one sound, window after window.

        Yields:
            Parts of the samples, `numpy.ndarray`, as soon as they are there, and at last the [`Sound`].
        """
        import numpy as np

        with self.running(job):
            args, [sound] = self.prepare(request, report)
            start = time.perf_counter()
            parts, num_samples = [], 0
            options = self.call_options(args, request, sound, report, lambda: f"{done():.0f} s are there, ")
            sampling_rate = self.pipe.vocoder.config.sampling_rate

            def done():
                return num_samples / sampling_rate

            for part in self.pipe(**options, window_order="sequential", stream=True):
                parts.append(part[0])
                num_samples += len(part[0])
                yield part[0]
            audio = np.concatenate(parts)
            yield self.sound_of(args, request, sound, audio, time.perf_counter() - start)

    def running(self, job):
        """Context of a call: the others wait, and `stop` knows whose it is."""
        return Running(self, job)

    def prepare(self, request, report):
        """Check a request, load its model, and plan its sounds as the command plans them.

        Returns:
            The command's arguments, and its records of the sounds.
        """
        self.check(request)
        if request.audio:
            check_upload(request.audio, self.max_seconds)
        model = self.locate(request.model or next(iter(self.given)), self.given, self.model_names(), "model")
        lora = None
        if request.lora:
            lora = self.locate(request.lora, self.given_loras, self.lora_names(), "LoRA")
        try:
            args = parse_arguments(command_line(request, model, lora, self.device, self.dtype))
            device = choose_device(args, OneProcess())
            dtypes = choose_dtypes(args.dtype, device, args.fast)
            if self.loaded is None or self.loaded[0] != model:
                report(None, f"loading {short_name(model)}")
            defaults = read_model_defaults(args, dtypes)
            student = defaults["student"]
            for name, value in fast_settings(args.source).items() if args.fast and student is None else ():
                if getattr(args, name) is None:
                    setattr(args, name, value)
            args.kernels = ()
            if args.fast:
                args.kernels, _ = choose_kernels(dtypes, device, is_large=is_large_model(args.source))
            self.load(args, device, dtypes)
        except CommandError as error:
            raise DemoError(str(error)) from error
        except Exception as error:  # files of others: anything may be wrong with them
            logger.debug("where the error came from", exc_info=True)
            raise DemoError(self.without_paths(f"{error}")) from error
        defaults["scheduler"] = type(self.pipe.scheduler).__name__
        defaults["most_steps"] = most_steps(args.source, defaults["scheduler"])
        if student is not None and math.isfinite(defaults["most_steps"]):
            options = student["scheduler_options"]
            defaults["most_steps"] = options.get("original_inference_steps", defaults["most_steps"])
        seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
        try:
            sounds = plan_sounds(args, seed, defaults)
            if student is not None:
                check_student_sounds(args, sounds, student)
        except CommandError as error:
            raise DemoError(str(error)) from error
        if sounds[0]["seconds"] > self.max_seconds:
            raise DemoError(f"seconds must be at most {self.max_seconds:g} in all, got {sounds[0]['seconds']:g}")
        return args, sounds

    def check(self, request):
        texts = [request.prompt] if isinstance(request.prompt, str) else [text for _, text in request.prompt]
        if not texts:
            raise DemoError("the list of prompts is empty")
        for name, text in [*(("prompt", text) for text in texts), ("negative_prompt", request.negative_prompt)]:
            if len(text) > MAX_TEXT_LENGTH:
                raise DemoError(f"{name} must have at most {MAX_TEXT_LENGTH} characters, got {len(text)}")
        if not all(text.strip() for text in texts):
            raise DemoError("the prompt is empty: describe a sound, such as 'rain and thunder'")
        if request.seconds is not None and request.seconds > self.max_seconds:
            raise DemoError(f"seconds must be at most {self.max_seconds:g}, got {request.seconds:g}")
        if not is_whole(request.takes, 1, self.max_takes):
            raise DemoError(f"takes must be a whole number from 1 to {self.max_takes}, got {request.takes}")
        if request.quality not in QUALITIES:
            raise DemoError(f"quality must be fast or full, got {request.quality!r:.100}")
        if not 0 <= request.lora_scale <= 4:
            raise DemoError(f"the scale of the LoRA must be a number from 0 to 4, got {request.lora_scale}")
        if request.lora and request.lora_scale != 1 and request.quality == "fast":
            raise DemoError("the quality fast merges the LoRA as it is: for another scale than 1 choose full")

    def load(self, args, device, dtypes):
        """Make `pipe` the pipeline of the arguments, with their scheduler. At most one is in memory."""
        from . import SCHEDULERS

        scheduler, args.scheduler = args.scheduler, None  # the scheduler alone is exchanged without loading again
        wanted = (args.model, args.source, args.lora, args.student, args.fast, args.deep_cache, args.dtype)
        if self.loaded != wanted:
            self.pipe = self.loaded = None
            self.pipe = load_pipeline(args, device, dtypes)
            self.pipe.set_progress_bar_config(disable=True)
            self.own_scheduler = self.pipe.scheduler
            self.loaded = wanted
        args.scheduler = scheduler
        self.pipe.scheduler = self.own_scheduler
        if scheduler:
            self.pipe.scheduler = SCHEDULERS[scheduler].from_config(self.own_scheduler.config)

    def call_options(self, args, request, sound, report, where):
        """Arguments of the pipeline, as the command passes them, with a callback that reports and stops."""
        import torch

        def on_step_end(pipe, i, timestep, tensors):
            if self.is_stopping:  # by an exception, since after `_interrupt` the noise would be decoded yet
                raise Stopped
            text = where() if callable(where) else where
            report((i + 1) / pipe.num_timesteps, f"{text}step {i + 1} of {pipe.num_timesteps}")
            return {}

        return {
            "prompt": [request.prompt],
            "negative_prompt": sound["negative_prompt"] and [sound["negative_prompt"]],
            "audio_length_in_s": sound["seconds"],
            "num_inference_steps": sound["steps"],
            "guidance_scale": sound["guidance"],
            "guidance_interval": args.guidance_interval,
            "generator": [torch.Generator().manual_seed(sound["seed"])],
            "cross_attention_kwargs": lora_scale(request),
            "callback_on_step_end": on_step_end,
            **args.audio_options,
        }

    def sound_of(self, args, request, sound, audio, compute_in_s):
        prompt = request.prompt if isinstance(request.prompt, str) else "; ".join(text for _, text in request.prompt)
        return Sound(
            audio,
            self.pipe.vocoder.config.sampling_rate,
            prompt,
            sound["seed"],
            sound["steps"],
            compute_in_s,
            self.code(args, request, sound),
        )

    def code(self, args, request, sound):
        """Python that makes a sound again, given the same model and the same version of the libraries."""
        import torch

        device, models = self.pipe.device, self.pipe.components.items()
        dtypes = {name: model.dtype for name, model in models if isinstance(model, torch.nn.Module)}
        default = dtypes["vae"]
        others = {"default": default} | {name: dtype for name, dtype in dtypes.items() if dtype != default}
        dtype = ", ".join(f'"{name}": {value}' for name, value in others.items())
        names = ["SCHEDULERS"] * bool(args.scheduler) + ["TANGO_TINY"] * (args.model == TANGO_TINY)
        names += ["TANGO_TINY_STUDENT"] * bool(args.student)
        names.append("TangoPipeline")
        model = "TANGO_TINY" if args.model == TANGO_TINY else quoted(short_name(args.model))
        lines = ["import torch", f"from pipeline_tango import {', '.join(sorted(names))}"]
        lines += ["from pipeline_tango.kernels import use_kernels"] * bool(args.kernels)
        lines += ["from pipeline_tango.sound_files import read_audio"] * bool(request.audio)
        lines += ["from scipy.io import wavfile", ""]
        lines += [f"pipe = TangoPipeline.from_pretrained({model}, dtype={{{dtype}}})", f'pipe.to("{device}")']
        if args.student:
            lines.append("pipe.merge_lora_weights(TANGO_TINY_STUDENT)")
        if args.lora:
            lines.append(f"pipe.load_lora_weights({quoted(short_name(args.lora))})")
            lines += ["pipe.fuse_lora()", "pipe.unload_lora_weights()"] * args.fast
        if args.scheduler:
            lines.append(f'pipe.scheduler = SCHEDULERS["{args.scheduler}"].from_config(pipe.scheduler.config)')
        if args.deep_cache is not None:
            lines.append(f"pipe.enable_deep_cache(interval={args.deep_cache})")
        if args.kernels:
            lines.append(f"use_kernels(pipe, {quoted(args.kernels)})")
        if request.audio:
            lines.append(f"samples, sampling_rate = read_audio({quoted(Path(request.audio).name)})")
        options = {
            "negative_prompt": sound["negative_prompt"],
            "audio_length_in_s": sound["seconds"],
            "num_inference_steps": sound["steps"],
            "guidance_scale": sound["guidance"],
            "guidance_interval": args.guidance_interval,
            "cross_attention_kwargs": lora_scale(request),
            "window_order": None if isinstance(request.prompt, str) else "sequential",
            **{name: args.audio_options.get(name) for name in ("strength", "mask")},
        }
        lines += ["audio = pipe(", f"    {quoted(request.prompt)},"]
        lines += [f"    {name}={quoted(value)}," for name, value in options.items() if value is not None]
        lines += ["    audio=[samples],", "    audio_sampling_rate=sampling_rate,"] if request.audio else []
        lines += [f"    generator=torch.Generator().manual_seed({sound['seed']}),", ").audios[0]"]
        name = file_name(request.prompt, sound["seed"])
        lines.append(f"wavfile.write({quoted(name)}, pipe.vocoder.config.sampling_rate, audio)")
        return "\n".join(lines) + "\n"

    def without_paths(self, text):
        """One line of an error of a library, with names in place of folders of this machine."""
        for path in filter(None, (self.models, *self.given.values(), *self.given_loras.values(), Path.home())):
            text = text.replace(str(path), short_name(str(path)))
        return re.sub(r"(?<![\w:/])/(?:[\w.-]+/)+", "", " ".join(text.split()))[:400]


class Running:
    """For a `with` statement: the lock of a [`DemoModel`], and whose call holds it."""

    def __init__(self, model, job):
        self.model, self.job = model, job

    def __enter__(self):
        self.model.lock.acquire()
        self.model.job, self.model.is_stopping = self.job, False

    def __exit__(self, *_):
        self.model.job = None
        self.model.lock.release()


class OneProcess:
    """What `choose_device` reads of accelerate's state."""

    num_processes = 1

    @property
    def device(self):
        import torch
        from diffusers.utils.torch_utils import get_device

        return torch.device(get_device())


def command_line(request, model, lora, device, dtype):
    """The arguments of `tango` that stand for a request."""
    flags = {
        "model": model,
        "lora": lora,
        "device": device,
        "dtype": dtype,
        "seconds": request.seconds,
        "takes": request.takes,
        "steps": request.steps,
        "guidance": request.guidance,
        "seed": request.seed,
        "scheduler": request.scheduler,
        "negative_prompt": request.negative_prompt or None,
        "audio": request.audio,
        **request.audio_flags,
    }
    prompt = request.prompt if isinstance(request.prompt, str) else request.prompt[0][1]
    flags = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    return [*flags, *(["--fast"] if request.quality == "fast" else []), "--", prompt]


def audio_flags(mode, strength, start, end, seconds):
    """The flags of `tango` for what the page does with a given sound.

    Raises:
        DemoError: if a region is none.
    """
    if mode not in MODES:
        raise DemoError(f"what to do with the sound must be {', '.join(MODES)}, got {mode!r:.100}")
    if mode == "variation":
        return {"strength": strength}
    if mode == "continuation":
        return {"continue": seconds}
    if start is None or end is None or not 0 <= start < end:
        raise DemoError(f"the region must end after it starts, got {start} s to {end} s")
    return {"mask": f"{start:.3f}-{end:.3f}"}


def read_rows(rows):
    """`[(seconds, prompt), ...]` of a table, in order, without its empty rows.

    Raises:
        DemoError: if it is no such table.
    """
    keyframes = []
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, (list, tuple)) or len(row) != 2:
            raise DemoError("each row must have two cells, seconds and prompt")
        seconds, prompt = row
        if seconds in (None, "") and prompt in (None, ""):
            continue
        try:
            seconds = float(seconds or 0)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise DemoError(f"the time of a row must be a number of seconds from 0 on, got {row[0]!r:.100}")
        keyframes.append((seconds, str(prompt or "")))
    return sorted(keyframes)


def check_upload(path, max_seconds):
    """Decode the start of an uploaded sound, no more than is accepted, before anything else reads it.

    Returns:
        Samples of shape `(num_samples, channels)`, and their rate.

    Raises:
        DemoError: if it cannot be read, or is longer than `max_seconds`.
    """
    try:
        with open(path, "rb") as stream, open_sound(stream, Path(path).name) as file:
            if file.channels > MAX_CHANNELS:
                raise DemoError(f"the sound must have at most {MAX_CHANNELS} channels, it has {file.channels}")
            most = math.floor(max_seconds * file.samplerate)
            # a header may be wrong, so one sample more than is accepted is asked for
            if file.frames > most or len(samples := file.read(most + 1, dtype="float32", always_2d=True)) > most:
                raise DemoError(f"the sound must be at most {max_seconds:g} s long")
            sampling_rate = file.samplerate
    except AudioFileError as error:
        raise DemoError(f"the sound cannot be read: {error.reason}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DemoError("the sound cannot be read") from error
    if not len(samples):
        raise DemoError("the sound is empty")
    return samples, sampling_rate


def find_peaks(samples):
    """The largest magnitude in each of at most `NUM_PEAKS` parts of samples `(num_samples, channels)`."""
    import numpy as np

    magnitude = np.abs(samples).max(axis=1)
    edges = np.linspace(0, len(magnitude), min(NUM_PEAKS, len(magnitude)), endpoint=False).astype(int)
    return [round(float(peak), 3) for peak in np.maximum.reduceat(magnitude, edges)]


def lora_scale(request):
    return None if not request.lora or request.lora_scale == 1 else {"scale": request.lora_scale}


def short_name(source):
    """The name of a model on the page: its folder's name, or the repo."""
    is_folder = source != TANGO_TINY and (Path(source).is_absolute() or Path(source).exists())
    return Path(source).name if is_folder else model_name(source)


def quoted(value):
    """A literal of Python, texts in double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(quoted, value))}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(quoted, value))}{',' * (len(value) == 1)})"
    return repr(value)


def file_name(prompt, seed):
    text = prompt if isinstance(prompt, str) else prompt[0][1]
    return f"{re.sub(r'[^a-z0-9]+', '-', text.lower())[:40].strip('-') or 'sound'}-{seed}.wav"
