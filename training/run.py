"""What every run of a trainer has: checkpoints to resume from, a log, results that appear when complete."""

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from accelerate.logging import get_logger

from pipeline_tango.sound_files import write_atomically


logger = get_logger(__name__)


def run(train, args):
    """Exit status of `train(args)`; what the user can mend is one line on standard error."""
    try:
        return train(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


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


def save_checkpoint(args, accelerator, step, settings):
    """Write `checkpoint-<step>` such that a folder of that name is always complete."""
    folder = Path(args.output_dir)
    partial, final = folder / f".checkpoint-{step}.partial", folder / f"checkpoint-{step}"
    if accelerator.is_main_process:
        for leftover in folder.glob(".checkpoint-*.partial"):
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
        if args.checkpoints_total_limit:
            for old in find_checkpoints(folder)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def find_checkpoints(folder):
    """Complete checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(args, accelerator, settings):
    """Step to go on from: 0 without a checkpoint. Checkpoints of an earlier run are never written over."""
    if not args.resume_from_checkpoint:
        if find_checkpoints(args.output_dir):
            raise ValueError(
                f"`--output_dir`: {args.output_dir} holds the checkpoints of another run. Give another folder, or go "
                "on with --resume_from_checkpoint latest"
            )
        return 0
    if args.resume_from_checkpoint == "latest":
        checkpoints = find_checkpoints(args.output_dir)
        if not checkpoints:
            logger.info(f"no checkpoint in {args.output_dir} yet: starting from the beginning")
            return 0
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(args.resume_from_checkpoint)
        if not (checkpoint / "trainer_state.json").is_file():
            raise ValueError(f"`--resume_from_checkpoint`: {checkpoint} is no complete checkpoint")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            logger.warning(f"--{name} was {state['settings'].get(name)!r} in {checkpoint}, now {value!r}")
    accelerator.load_state(str(checkpoint))
    logger.info(f"resumed from {checkpoint}")
    return state["step"]


class Log:
    """`log.jsonl` in the output folder, one JSON object for each step and validation, and the same to read in
    `log.txt`. A resumed run takes up where its checkpoint was."""

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


def read_log(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]
