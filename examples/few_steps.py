"""tango-tiny and its student at few steps: sounds to measure, and a picture of quality against seconds.

    python -m examples.few_steps sounds OUT                      # OUT/<system>-<steps>/ID-TAKE.wav, OUT/seconds.json
    tango-evaluate --generated OUT/teacher-* OUT/student-* --prompts examples/sound_library/prompts.jsonl \\
        --label_column category --class_map examples/sound_library/classes.json --references library/heldout.jsonl \\
        --output_dir OUT/evaluation
    python -m examples.few_steps plot OUT few_steps.png

`library` is built by `examples.sound_library.build`. The seconds are those of single sounds, medians of alternating
rounds.
"""

import argparse
import csv
import json
import time
from pathlib import Path
from statistics import median

import torch
from scipy.io import wavfile
from tqdm import tqdm

from pipeline_tango import TANGO_TINY, TANGO_TINY_STUDENT, TangoPipeline
from pipeline_tango.sound_files import write_atomically


PROMPTS = Path(__file__).parent / "sound_library" / "prompts.jsonl"
STEPS = {"teacher": (20, 4, 3, 2), "student": (4, 2, 1)}
NUM_TAKES = 4
BATCH_SIZE = 13


def load(system):
    pipe = TangoPipeline.from_pretrained(TANGO_TINY, dtype=torch.float32)
    if system == "student":
        pipe.merge_lora_weights(TANGO_TINY_STUDENT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sounds(output, seed, rounds):
    """Sounds of each system and number of steps for the prompts, from the same noise, and the seconds of one."""
    prompts = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    pipes = {system: load(system) for system in STEPS}
    variants = [(system, steps) for system, numbers in STEPS.items() for steps in numbers]
    bar = tqdm(total=len(variants) * NUM_TAKES * len(prompts), unit="sound")
    for system, steps in variants:
        folder = output / f"{system}-{steps}"
        folder.mkdir(parents=True)
        for take in range(1, NUM_TAKES + 1):
            for start in range(0, len(prompts), BATCH_SIZE):
                rows = prompts[start : start + BATCH_SIZE]
                seeds = [seed + 1000 * take + start + i for i in range(len(rows))]
                generators = [torch.Generator().manual_seed(each) for each in seeds]
                texts = [row["caption"] for row in rows]
                audios = pipes[system](texts, num_inference_steps=steps, generator=generators).audios
                sampling_rate = pipes[system].vocoder.config.sampling_rate
                for row, audio in zip(rows, audios):
                    wavfile.write(folder / f"{row['id']}-{take}.wav", sampling_rate, audio)
                bar.update(len(rows))
    bar.close()
    seconds = {f"{system}-{steps}": [] for system, steps in variants}
    for _ in range(rounds):
        for system, steps in variants:
            start = time.perf_counter()
            pipes[system]("rain and thunder", num_inference_steps=steps)
            seconds[f"{system}-{steps}"].append(time.perf_counter() - start)
    medians = {name: median(each) for name, each in seconds.items()}
    write_atomically(output / "seconds.json", json.dumps(medians, indent=1).encode())


def plot(output, picture):
    """Class recall, with its interval, against seconds, from `results.csv` of the evaluation."""
    from matplotlib.figure import Figure

    seconds = json.loads((output / "seconds.json").read_text())
    with open(output / "evaluation" / "results.csv", newline="") as file:
        rows = {row["system"]: row for row in csv.DictReader(file) if row["metric"] == "recall"}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for system, numbers in STEPS.items():
        names = [f"{system}-{steps}" for steps in numbers]
        values = [float(rows[name]["value"]) for name in names]
        low, high = ([float(rows[name][end]) for name in names] for end in ("low", "high"))
        errors = [[v - each for v, each in zip(values, low)], [each - v for v, each in zip(values, high)]]
        axes.errorbar([seconds[name] for name in names], values, errors, marker="o", capsize=3, label=system)
        for name, steps, value in zip(names, numbers, values):
            axes.annotate(f" {steps}", (seconds[name], value), va="bottom")
    axes.set(xlabel="seconds for 5.12 s of sound", ylabel="class recall", ylim=(0, 1))
    axes.set_title("tango-tiny by number of steps; bars: 95% intervals", fontsize="medium")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sounds = commands.add_parser("sounds")
    sounds.add_argument("output", type=Path, help="folder to write")
    sounds.add_argument("--seed", type=int, default=91000, help="(default: 91000)")
    sounds.add_argument("--rounds", type=int, default=5, help="of the timing (default: 5)")
    picture = commands.add_parser("plot")
    picture.add_argument("output", type=Path, help="folder with seconds.json and evaluation")
    picture.add_argument("picture", type=Path, help="PNG to write")
    args = parser.parse_args(argv)
    if args.command == "plot":
        plot(args.output, args.picture)
    elif any((args.output / f"{system}-{steps}").exists() for system in STEPS for steps in STEPS[system]):
        parser.error(f"{args.output} has such sounds already: give another folder")
    else:
        make_sounds(args.output, args.seed, args.rounds)


if __name__ == "__main__":
    main()
