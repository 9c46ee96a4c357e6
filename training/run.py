"""What every training run has: an output folder with checkpoints, a log and results, and ways to stop and resume."""

import json
import logging
import math
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from pipeline_tango.sound_files import draw_spectrogram, encode_wav, write_atomically


logger = get_logger(__name__)


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


def save_checkpoint(accelerator, output_dir, step, settings, total_limit=None):
    """Write `checkpoint-<step>` such that a folder of that name is always complete, and remove the oldest ones.

    Args:
        settings (`dict`): what a resumed run should have in common with this one; see `load_checkpoint`.
        total_limit (`int`, *optional*): number of checkpoints to keep.
    """
    partial, final = output_dir / f".checkpoint-{step}.partial", output_dir / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (partial / "trainer_state.json").write_text(json.dumps({"step": step, "settings": settings}, indent=2))
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        logger.info(f"saved {final}")
        if total_limit:
            for old in find_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoints(output_dir):
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(accelerator, output_dir, resume_from_checkpoint, settings):
    """Load the state to resume from. Returns its step, 0 without a checkpoint.

    Args:
        resume_from_checkpoint (`str` or None): `"latest"`, or a checkpoint's folder.
        settings (`dict`): those that differ from the checkpoint's are logged as a warning.

    Raises:
        ValueError: if that folder holds no complete checkpoint, or if nothing is to be resumed and `output_dir` holds
            the checkpoints of an earlier run, which are never overwritten.
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
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(resume_from_checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ValueError(f"`--resume_from_checkpoint`: {checkpoint} is no complete checkpoint")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            logger.warning(f"--{name} was {state['settings'].get(name)!r} in {checkpoint}, now {value!r}")
    accelerator.load_state(str(checkpoint))
    logger.info(f"resumed from {checkpoint}")
    return state["step"]


# Log


class Log:
    """`log.jsonl` in the output folder, one JSON object for each step and validation, and the same as text in
    `log.txt`. A resumed run drops the entries after the `step` of its checkpoint."""

    def __init__(self, path, step, accelerator):
        self.path, self.accelerator = path, accelerator
        if accelerator.is_main_process:
            lines = path.read_text().splitlines(keepends=True) if path.exists() and step else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            write_atomically(path, "".join(kept).encode())
            write_atomically(
                path.with_suffix(".txt"), "".join(self.as_text(json.loads(line)) for line in kept).encode()
            )
        accelerator.wait_for_everyone()  # before another process reads what is kept

    @staticmethod
    def as_text(entry):
        figures = "  ".join(f"{name} {value}" for name, value in entry.items() if name != "step")
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


def open_log(accelerator, output_dir, args, first_step, project):
    """The log of a run from `first_step` on. Saves all flags as `args.json` and starts the trackers."""
    if accelerator.is_main_process:
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
    log = Log(output_dir / "log.jsonl", first_step, accelerator)
    if args.report_to != "none":
        accelerator.init_trackers(project, config={name: str(value) for name, value in vars(args).items()})
    return log


def read_log(path):
    """Entries of a `log.jsonl`; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def tail_mean(values):
    """Mean of the last 5% of `values`, 0 if there are none."""
    tail = values[-max(1, len(values) // 20) :]
    return sum(tail) / max(1, len(tail))


def log_plan(first_step, num_steps, step_size, num_clips):
    """Log the length of a run whose optimizer steps take `step_size` clips."""
    num_epochs = num_steps * step_size / num_clips
    logger.info(f"{num_steps} steps of {step_size} clips ({num_epochs:.1f} epochs), from step {first_step}")


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


@contextmanager
def replacing(final):
    """A new folder to fill, which takes the place of the folder `final` when it is complete."""
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    yield partial
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    if old.exists():
        shutil.rmtree(old)
    logger.info(f"saved {final}")


def write_sound(folder, name, audio, sampling_rate, title):
    """A validation sound as `name.wav` and, with matplotlib, its spectrogram as `name.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.wav", encode_wav(audio, sampling_rate))
    try:
        write_atomically(folder / f"{name}.png", draw_spectrogram(audio, sampling_rate, title))
    except ImportError:
        logger.warning('spectrograms of validation sounds need matplotlib: pip install "pipeline-tango[demo]"')
