"""What every training run has: an output folder with checkpoints, a log and results, and ways to stop and resume."""

import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from pipeline_tango.json_files import read_json
from pipeline_tango.sound_files import beside, draw_spectrogram, encode_wav, remove_leftovers, write_atomically


logger = get_logger(__name__)

STATE_FILE = "trainer_state.json"  # written last: a checkpoint without it is not complete
CARD = "README.md"  # every result has one
RESULTS = ("args.json", "log.jsonl", "log.txt", "model", "lora", "vae")  # what a training run replaces


def run(command, args):
    """Exit status of `command(args)`. An error that the user can correct is one line on standard error."""
    try:
        return command(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


# Start and stop


def start(output_dir, mixed_precision, report_to, gradient_accumulation_steps=1):
    """The `Accelerator` of a run, whose output folder it makes."""
    check_output_dir(output_dir, RESULTS)
    accelerator = Accelerator(
        gradient_accumulation_steps=gradient_accumulation_steps,
        mixed_precision=mixed_precision,
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return accelerator


def check_output_dir(output_dir, names):
    """None of the named files and folders, which a run replaces, is there without the `args.json` of an earlier run.

    Raises:
        ValueError: naming the first of those that are.
    """
    found = [output_dir / name for name in names if (output_dir / name).exists()]
    try:
        is_ours = "output_dir" in json.loads((output_dir / "args.json").read_text())
    except (OSError, ValueError, TypeError):
        is_ours = False
    if found and not is_ours:
        raise ValueError(
            f"`--output_dir`: {found[0]} is there already and no run has left an args.json beside it: give a new or "
            "empty folder"
        )


def shards_weights(accelerator):
    """Whether FSDP or DeepSpeed split the weights between processes."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def catch_sigterm():
    """A list that gets an item when this process receives SIGTERM, for `stop_requested`."""
    signals = []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(True))
    return signals


def stop_requested(accelerator, signals):
    """Whether any process has received SIGTERM. Collective: every process takes part."""
    if accelerator.num_processes == 1:
        return bool(signals)
    received = torch.tensor(float(bool(signals)), device=accelerator.device)
    return bool(accelerator.reduce(received, reduction="sum") > 0)


def stop_early(accelerator, bar, step, num_steps):
    """End a run before its last step, after its checkpoint is saved. Returns the exit status."""
    bar.close()
    logger.info(f"stopped at step {step} of {num_steps}; resume with --resume_from_checkpoint latest")
    return end(accelerator)


def end(accelerator):
    """End a run. Returns the exit status."""
    accelerator.wait_for_everyone()  # a process that leaves while another still works could make that one hang
    accelerator.end_training()
    return 0


# Checkpoints


def numbered(folder, prefix):
    """Paths in `folder` called `<prefix>-<number>`, by number. What else has a name that begins so is the user's."""
    matches = [(re.fullmatch(re.escape(prefix) + r"-(0|[1-9][0-9]*)", path.name), path) for path in folder.glob("*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def set_aside(path):
    """Rename what is in the way and not ours, such that nothing is lost."""
    names = (path.with_name(f"{path.name}.bak{i}") for i in ["", *range(2, 1000)])
    free = next(name for name in names if not os.path.lexists(name))
    try:
        os.rename(path, free)
    except FileNotFoundError:  # another process was faster
        return
    logging.getLogger(__name__).warning(f"{path} was not written by this program and is in the way: renamed to {free}")


def make_folder(folder):
    """Make a folder and the one above it. A file in the way of either is set aside."""
    for path in (folder.parent, folder):
        if os.path.lexists(path) and not path.is_dir():
            set_aside(path)
        path.mkdir(parents=True, exist_ok=True)


def save_checkpoint(accelerator, output_dir, step, settings, total_limit=None):
    """Write `checkpoint-<step>` such that a folder of that name is always complete, and remove the oldest ones.

    Args:
        settings (`dict`): what a resumed run should have in common with this one; see `load_checkpoint`.
        total_limit (`int`, *optional*): number of checkpoints to keep.
    """
    partial, final = output_dir / f".checkpoint-{step}.partial", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(".checkpoint-*.partial"):
            if leftover.is_dir() and re.fullmatch(r"\.checkpoint-[0-9]+\.partial", leftover.name):
                shutil.rmtree(leftover)
        if os.path.lexists(partial):
            set_aside(partial)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in paths}
        state = {"step": step, "settings": settings, "files": sizes}
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2))
        for path in [*paths, partial / STATE_FILE]:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        if os.path.lexists(final) and not is_checkpoint(final):
            set_aside(final)
        elif final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        logger.info(f"saved {final}")
        if total_limit:
            found = find_checkpoints(output_dir)
            # those of later steps stay: a run that was resumed from an earlier one has yet to replace them
            earlier = [path for path in found if step_of(path) < step and not path.is_symlink()]
            for path in earlier[: max(0, len(found) - total_limit)]:
                shutil.rmtree(path)
    accelerator.wait_for_everyone()


def is_checkpoint(path):
    return path.is_dir() and not path.is_symlink() and (path / STATE_FILE).is_file()


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])


def find_checkpoints(output_dir):
    """Complete checkpoints, oldest first."""
    return [path for _, path in numbered(output_dir, "checkpoint") if (path / STATE_FILE).is_file()]


def read_checkpoint(checkpoint):
    """Step and settings of a checkpoint whose files are whole.

    Raises:
        ValueError: naming the first file that is missing, cut short or damaged.
    """
    state = read_json(checkpoint / STATE_FILE)
    step, settings, sizes = state.get("step"), state.get("settings"), state.get("files", {})
    if not isinstance(step, int) or not isinstance(settings, dict) or not isinstance(sizes, dict):
        raise ValueError(f"{checkpoint / STATE_FILE} has to hold `step`, `settings` and `files`")
    for name, size in sizes.items():  # older checkpoints do not name their files
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {size}")
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if sizes and path.relative_to(checkpoint).as_posix() not in sizes:
            continue  # the user's
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".bin", ".pkl", ".pt"):
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"checksum of {damaged}")
        except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
            raise ValueError(f"{path} is cut short or damaged: {error}") from None
    return step, settings


def load_checkpoint(accelerator, output_dir, resume_from_checkpoint, settings):
    """Load the state to resume from. Returns its step, 0 without a checkpoint.

    Args:
        resume_from_checkpoint (`str` or None): `"latest"`, or a checkpoint's folder. Where the latest is damaged, the
            one before it is used, with a warning.
        settings (`dict`): those that differ from the checkpoint's are logged as a warning.

    Raises:
        ValueError: if that folder holds no complete checkpoint or does not fit the models, or if nothing is to be
            resumed and `output_dir` holds the checkpoints of an earlier run, which are never overwritten.
    """
    if not resume_from_checkpoint:
        if find_checkpoints(output_dir):
            raise ValueError(
                f"`--output_dir`: {output_dir} holds the checkpoints of another run. Give another folder, or resume "
                "with --resume_from_checkpoint latest"
            )
        return 0
    if resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(output_dir)
        if not checkpoints:
            logger.info(f"no checkpoint in {output_dir} yet: starting from the beginning")
            return 0
    else:
        checkpoints = [Path(resume_from_checkpoint)]
        if not (checkpoints[0] / STATE_FILE).is_file():
            raise ValueError(f"`--resume_from_checkpoint`: {checkpoints[0]} is no complete checkpoint")
    for checkpoint in reversed(checkpoints):
        try:
            step, before = read_checkpoint(checkpoint)
            break
        except (ValueError, OSError) as error:
            problem = f"{checkpoint} is damaged: {error}"
            if resume_from_checkpoint == "latest":
                logger.warning(f"{problem}. Trying the checkpoint before it")
    else:
        advice = "" if len(checkpoints) == 1 else f", and so are the {len(checkpoints) - 1} others in {output_dir}"
        raise ValueError(f"`--resume_from_checkpoint`: {problem}{advice}. Resume from another, or start a new folder")
    for name, value in settings.items():
        if before.get(name) != value:
            logger.warning(f"--{name} was {before.get(name)!r} in {checkpoint}, now {value!r}")
    try:
        accelerator.load_state(str(checkpoint))
    except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"`--resume_from_checkpoint`: {checkpoint} does not fit this run, whose models or optimizer are others: "
            f"{' '.join(str(error).split()):.300}"
        ) from error
    logger.info(f"resumed from {checkpoint}")
    return step


# Log


class Log:
    """`log.jsonl` in the output folder, one JSON object for each step and validation, and the same as text in
    `log.txt`. A resumed run drops the entries after the `step` of its checkpoint."""

    def __init__(self, path, step, accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            kept = [entry for entry in read_log(path) if entry["step"] <= step] if step else []
            write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
            write_atomically(path.with_suffix(".txt"), "".join(map(self.as_text, kept)).encode())
        accelerator.wait_for_everyone()  # before another process reads what is kept

    @staticmethod
    def as_text(entry):
        def shown(value):  # JSON has texts for the keys that a run has as numbers
            if not isinstance(value, dict):
                return value
            return f"{{{', '.join(f'{key}: {each}' for key, each in value.items())}}}"

        figures = "  ".join(f"{name} {shown(value)}" for name, value in entry.items() if name != "step")
        return f"step {entry['step']:7d}  {figures}\n"

    def write(self, step, **values):
        self.accelerator.log(
            {name: value for name, value in values.items() if isinstance(value, (int, float))}, step=step
        )
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            with open(self.path.with_suffix(".txt"), "a") as file:
                file.write(self.as_text({"step": step, **values}))

    def values(self, name):
        """All values logged as `name` so far, in order."""
        return [entry[name] for entry in read_log(self.path) if name in entry]


def open_log(accelerator, output_dir, args, first_step, project, results=("best", "model")):
    """The log of a run from `first_step` on. Saves all flags as `args.json`, starts the trackers, and sets aside what
    is in the way of `results`, the folders that the run will write beside the log."""
    if accelerator.is_main_process:
        clear_the_way(output_dir, results)
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
    log = Log(output_dir / "log.jsonl", first_step, accelerator)
    if args.report_to != "none":
        if accelerator.is_main_process:
            make_folder(output_dir / "logs")
        accelerator.init_trackers(project, config={name: str(value) for name, value in vars(args).items()})
    return log


def read_log(path):
    """Entries of a `log.jsonl`; none if there is no such file. A line that a killed run has cut, or that somebody else
    wrote, is left out."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            entry = json.loads(line) if line.strip() else None
            if entry is not None and isinstance(entry["step"], int):
                entries.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            logging.getLogger(__name__).warning(f"{path}, line {number} is no entry of the log: left out")
    return entries


def tail_mean(values):
    """Mean of the last 5% of `values`, 0 if there are none."""
    tail = values[-max(1, len(values) // 20) :]
    return sum(tail) / max(1, len(tail))


def log_plan(first_step, num_steps, step_size, num_clips, what="clips"):
    """Log the length of a run whose optimizer steps take `step_size` clips, or pairs."""
    num_epochs = num_steps * step_size / num_clips
    logger.info(f"{num_steps} steps of {step_size} {what} ({num_epochs:.1f} epochs), from step {first_step}")


def progress_bar(accelerator, first_step, num_steps):
    return tqdm(
        total=num_steps,
        initial=first_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )


# Steps


def mean_figures(accelerator, figures, step, bar):
    """Means of the losses of an optimizer step over its accumulation steps and the processes, as a dict of floats.

    Args:
        figures (`list[dict[str, torch.Tensor]]`): one dict of scalars for each accumulation step; it is emptied.

    Raises:
        FloatingPointError: if a mean is not finite.
    """
    means = torch.stack([torch.stack([value.detach() for value in each.values()]) for each in figures]).mean(0)
    means = dict(zip(figures[0], accelerator.reduce(means, reduction="mean").tolist()))
    figures.clear()
    for name, value in means.items():
        if not math.isfinite(value):
            bar.close()
            advice = ", or use bf16 instead of fp16" if accelerator.mixed_precision == "fp16" else ""
            name = "the loss" if name == "loss" else name
            raise FloatingPointError(f"{name} is {value} at step {step}: lower --learning_rate{advice}")
    return means


def make_ema(accelerator, parameters, decay):
    """A moving average of the parameters, which checkpoints hold too."""
    ema = EMAModel(parameters, decay=decay, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    return ema


@contextmanager
def averaged(ema, parameters):
    """Let the moving average take the place of the parameters for a while. `ema` may be None."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    yield
    ema.restore(parameters)


# Results


def clear_the_way(output_dir, results):
    """Set aside what has the name of a result that the run will write and has not our card."""
    for path in (output_dir / name for name in results):
        if os.path.lexists(path) and not (path.is_dir() and is_result(path)):
            set_aside(path)


def is_result(folder):
    """Whether a training run wrote this folder: `replacing` may replace it then."""
    card = folder / CARD
    return not any(folder.iterdir()) or (card.is_file() and b"of pipeline-tango" in card.read_bytes())


@contextmanager
def replacing(final):
    """A new folder to fill, which takes the place of the folder `final` when it is complete. Files that somebody else
    put into `final` move on with it."""
    partial, old = beside(final, "partial"), final.with_name(f".{final.name}.old")
    if old.is_dir() and not os.path.lexists(final):  # killed between the two renames below
        os.replace(old, final)
    remove_leftovers([final], "partial")
    if old.is_dir():
        shutil.rmtree(old)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial)
        raise
    if os.path.lexists(final) and (final.is_symlink() or not final.is_dir()):
        set_aside(final)
    if final.exists():
        keep_strangers(final, partial)
        os.replace(final, old)
    os.replace(partial, final)
    if old.exists():
        shutil.rmtree(old)
    logger.info(f"saved {final}")


def keep_strangers(old, new):
    """Copy the files of `old` that no run writes into `new`."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        ours = path.name.endswith((".safetensors", ".safetensors.index.json")) or (
            name.parts[0] == "samples" and re.fullmatch(r"[0-9]+\.(wav|png)", path.name)
        )
        if path.is_file() and not ours and not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)


def write_sound(folder, name, audio, sampling_rate, title):
    """A validation sound as `name.wav` and, with matplotlib, its spectrogram as `name.png`."""
    make_folder(folder)
    write_atomically(folder / f"{name}.wav", encode_wav(audio, sampling_rate))
    try:
        write_atomically(folder / f"{name}.png", draw_spectrogram(audio, sampling_rate, title))
    except ImportError:
        logger.warning('spectrograms of validation sounds need matplotlib: pip install "pipeline-tango[demo]"')
