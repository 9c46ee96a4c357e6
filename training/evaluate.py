"""Evaluate Tango models or folders of sounds: `python -m training.evaluate --model M --prompts FILE --output_dir OUT`.

Missing sounds are generated, each listener (a pretrained audio classifier, or CLAP) computes embeddings and class
posteriors of every sound and reference, and metrics of these are written with bootstrap intervals over prompts. The
same command resumes an interrupted run.
"""

import argparse
import json
import logging
import math
import shlex
import sys
from dataclasses import fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers.utils.torch_utils import get_device
from tqdm import tqdm

from pipeline_tango import SCHEDULERS
from pipeline_tango.flags import COUNT, POSITIVE, Number, check_numbers
from pipeline_tango.sound_files import write_atomically

from .arguments import (
    HelpFormatter,
    add_generation_arguments,
    add_label_arguments,
    add_listener_arguments,
    program_name,
    read_class_map,
)
from .data import select_clips
from .evaluation.generation import GenerationSettings, check_schedulers, collect_sounds, generate, plan_sweep
from .evaluation.items import (
    System,
    check_sound_reader,
    find_readable,
    find_unpaired,
    group_of,
    length_in_s,
    read_generated,
    read_items,
    short_names,
    write_problems,
)
from .evaluation.listeners import LISTENERS, load_listener
from .evaluation.measuring import (
    Classes,
    FeatureExtractor,
    Measure,
    MetricSettings,
    best_of,
    candidate_counts,
    compare_systems,
    measure_system,
)
from .evaluation.plots import draw_plots
from .evaluation.report import Tables, as_markdown, describe_run
from .run import check_output_dir, run


logger = get_logger(__name__)


def build_parser():
    parser = argparse.ArgumentParser(
        prog=program_name(__spec__.name),
        description="Generate sounds for a list of prompts, and measure their similarity to reference recordings and "
        "to the prompts. A listener, which is a pretrained audio classifier or CLAP, computes an embedding and class "
        "posteriors of each sound; the metrics are computed from these. Writes results.md, the same figures as CSV, "
        "and plots of sweeps.",
        epilog=f"`accelerate launch -m {__spec__.name} ...` distributes the generation over devices, and `torchrun "
        f"--nproc_per_node N -m {__spec__.name} ...` over processes on CPUs. The same command resumes an interrupted "
        "run.",
        formatter_class=HelpFormatter,
    )
    what = parser.add_argument_group("input and output")
    what.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="FOLDER_OR_REPO",
        help="diffusers folders or Hub repos to generate with; the first is the baseline",
    )
    what.add_argument(
        "--generated",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="folders of sounds to measure, named ID.wav or ID-TAKE.wav",
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines or CSV with a caption, paired with sounds by id, name or sound file; or a text file with one "
        "prompt per line",
    )
    what.add_argument(
        "--references", metavar="SOUNDS", help="reference recordings: a folder, or a manifest as for training"
    )
    what.add_argument(
        "--real_recordings",
        metavar="SOUNDS",
        help="other recordings, measured as if generated: an upper bound for a model (default: one half of the "
        "references against the other)",
    )
    what.add_argument(
        "--training_recordings",
        metavar="SOUNDS",
        help="what the models were trained on: measures how similar each sound is to the nearest of these recordings",
    )
    what.add_argument(
        "--output_dir", required=True, metavar="FOLDER", help="folder for sounds, cached features, tables and plots"
    )
    what.add_argument(
        "--num_prompts", type=COUNT, metavar="N", help="size of a random subset of the prompts, fixed by the seed"
    )

    sounds = parser.add_argument_group("generation", "comma-separated lists are swept in all combinations")
    sounds.add_argument(
        "--num_inference_steps",
        metavar="N,...",
        help="denoising steps, such as 4,10,25,50,100,200 (default: each model's own)",
    )
    sounds.add_argument(
        "--guidance_scale", metavar="G,...", help="guidance scales, such as 1,2.5,3,5,10 (default: each model's own)"
    )
    sounds.add_argument(
        "--scheduler", default="own", metavar="NAME,...", help=f"any of own (the model's), {', '.join(SCHEDULERS)}"
    )
    sounds.add_argument(
        "--num_takes", type=COUNT, default=1, metavar="N", help="sounds per prompt; all of them are measured"
    )
    add_generation_arguments(sounds, "seed of the initial noise and of the resampling")

    listening = parser.add_argument_group(
        "listeners", "pretrained models whose embeddings and class posteriors the metrics are computed from"
    )
    listening.add_argument("--listener", default="yamnet", metavar="NAME,...", help=f"any of {', '.join(LISTENERS)}")
    add_listener_arguments(listening)
    listening.add_argument(
        "--max_length_in_s",
        type=POSITIVE,
        metavar="S",
        help="use at most this many seconds of each sound, from its start (default: the length of the longest "
        "generated sound)",
    )

    figures = parser.add_argument_group("metrics")
    figures.add_argument(
        "--num_resamples", type=Number(int, 20), default=200, metavar="N", help="bootstrap resamples of each interval"
    )
    figures.add_argument(
        "--confidence",
        type=Number(float, above=0, below=1),
        default=0.95,
        metavar="P",
        help="confidence level of the intervals",
    )
    figures.add_argument(
        "--num_inception_splits",
        type=COUNT,
        default=1,
        metavar="N",
        help="parts to average the inception score over; 10 in published figures",
    )
    figures.add_argument(
        "--recall_k",
        type=COUNT,
        default=5,
        metavar="K",
        help="class recall counts a clip if one of its labels is among this many most probable classes",
    )
    add_label_arguments(figures)
    figures.add_argument(
        "--group_by",
        default="",
        metavar="RULE,...",
        help="rules to group tables by: `events` (several or one), `labels` (their number), `kind` (speech, "
        "animals, vehicles and so on, by the labels), or any column",
    )

    best = parser.add_argument_group("best of N")
    best.add_argument(
        "--num_candidates",
        type=COUNT,
        metavar="N",
        help="largest N: the best of 1, 2, 4, ..., N takes of each prompt is measured",
    )
    best.add_argument(
        "--rank_by", choices=[name for name in LISTENERS if name != "vggish"], help="listener that ranks the takes"
    )
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.model and not args.generated:
        parser.error("give --model, --generated, or both")
    if args.model and not args.prompts:
        parser.error("--model needs --prompts")
    for name, number, low in (("num_inference_steps", int, 1), ("guidance_scale", float, 0)):
        if getattr(args, name) is None:
            continue
        try:
            values = [number(each) for each in getattr(args, name).split(",")]
        except ValueError:
            parser.error(f"--{name} has to be numbers separated by commas, not {getattr(args, name)!r}")
        if min(values) < low or not all(map(math.isfinite, values)):
            parser.error(f"--{name} has to be at least {low}, not {getattr(args, name)!r}")
        setattr(args, name, list(dict.fromkeys(values)))
    for name, known in (("scheduler", ("own", *SCHEDULERS)), ("listener", tuple(LISTENERS))):
        values = getattr(args, name).split(",")
        if unknown := [each for each in values if each not in known]:
            parser.error(f"--{name} has to be of {', '.join(known)}, not {unknown[0]!r}")
        setattr(args, name, list(dict.fromkeys(values)))
    args.group_by = [name for name in args.group_by.split(",") if name]
    check_numbers(parser, args)
    if bool(args.num_candidates) != bool(args.rank_by):
        parser.error("--num_candidates and --rank_by go together")
    if args.num_candidates:
        args.num_takes = max(args.num_takes, args.num_candidates)
    read_class_map(parser, args)
    return args


def evaluate(args):
    state = PartialState(cpu="cpu" in (args.device, get_device()), timeout=timedelta(days=30))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    output_dir = Path(args.output_dir)

    # 1. Lists, and checks of everything that can be checked before hours of generation
    check_sound_reader()
    prompts = read_items(args.prompts, "prompts", with_text=True) if args.prompts else []
    if args.num_prompts and args.num_prompts < len(prompts):
        chosen = {item.id for item in select_clips(prompts, args.num_prompts, args.seed)}
        prompts = [prompt for prompt in prompts if prompt.id in chosen]
    references = read_items(args.references, "references", with_path=True) if args.references else []
    real = read_items(args.real_recordings, "real_recordings", with_path=True) if args.real_recordings else []
    trained_on = []
    if args.training_recordings:
        trained_on = read_items(args.training_recordings, "training_recordings", with_path=True)
    known = [*prompts, *references]
    for rule in args.group_by:
        if not any(group_of(item, rule, args.label_column) for item in known):
            raise ValueError(f"--group_by: {rule!r} applies to no entry of --prompts or --references")
    names = short_names([*args.model, *args.generated])
    swept = plan_sweep(
        dict(zip(names, args.model)),
        args.scheduler,
        args.num_inference_steps,
        args.guidance_scale,
        output_dir / "sounds",
    )
    check_schedulers(swept)
    known_ids = {item.id for item in known}
    given = []
    for name, folder in zip(names[len(args.model) :], args.generated):
        given.append(System(name, name, folder=Path(folder), sounds=read_generated(folder, known_ids)))
    systems = [*swept, *given]
    check_output_dir(output_dir, ("args.json", "results.md", "problems.json"))
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
        listeners = {}  # loaded now, since weights may be missing
        for name in dict.fromkeys([*args.listener, *([args.rank_by] if args.rank_by else [])]):
            listeners[name] = load_listener(name, getattr(args, f"{name}_weights"), device)
            logger.info(f"{name}: weights {listeners[name].weights}, sha256 {listeners[name].checksum}")
        if "kind" in args.group_by:
            classes = [Classes(listeners[name], args.class_map) for name in args.listener]
            if not any(group_of(item, "kind", args.label_column, each) for each in classes for item in known):
                listening = " or ".join(args.listener)
                raise ValueError(f"--group_by: 'kind' needs labels that are classes of {listening}, or a --class_map")
        if not find_spec("matplotlib"):
            logger.warning('no plots without matplotlib: pip install "pipeline-tango[evaluate]"')

    # 2. Sounds
    generation = GenerationSettings(**{each.name: getattr(args, each.name) for each in fields(GenerationSettings)})
    generate(swept, prompts, generation, state, device)
    if not state.is_main_process:
        return 0
    for system in swept:
        collect_sounds(system, prompts, args.num_takes)
    problems = []
    for system in systems:
        system.sounds = find_readable(system.sounds, f"sound of {system.name}", problems, keep_silent=True)
        if args.num_prompts and prompts:
            chosen = {prompt.id for prompt in prompts}
            system.sounds = [sound for sound in system.sounds if sound.id in chosen]
        if not system.sounds:
            raise ValueError(f"no sound of {system.name} can be read: {problems[-1]}")
    references = find_readable(references, "reference", problems) if references else []
    real = find_readable(real, "real recording", problems) if real else []
    trained_on = find_readable(trained_on, "training recording", problems) if trained_on else []
    if args.training_recordings and not trained_on:
        raise ValueError(f"--training_recordings: none in {args.training_recordings} can be read: {problems[-1]}")
    # a choice of the prompts leaves most references without a sound on purpose
    problems += find_unpaired(systems, prompts, [] if args.num_prompts else references)
    write_problems(problems, output_dir / "problems.json")
    real = real_system(real, args.real_recordings, references, max(len(each.sounds) for each in systems), args.seed)
    max_length_in_s = args.max_length_in_s
    if max_length_in_s is None:
        max_length_in_s = max(length_in_s(sound) for system in systems for sound in system.sounds)

    # 3. Embeddings and class posteriors
    extractor = FeatureExtractor(listeners, output_dir / "heard", args.level, max_length_in_s)
    settings = MetricSettings(**{each.name: getattr(args, each.name) for each in fields(MetricSettings)})
    measures, features = {}, {}
    for name, listener in listeners.items():
        measures[name] = Measure(
            listener, references, extractor(name, references), prompts, settings, extractor(name, trained_on)
        )
        features[name] = {system.name: extractor(name, system.sounds) for system in [*systems, *real]}
    best_takes = {}
    for system in systems if args.rank_by else []:
        scores = measures[args.rank_by].rank(system.sounds, features[args.rank_by][system.name])
        counts = candidate_counts(args.num_candidates)
        best_takes[system.name] = {count: best_of(system.sounds, scores, count) for count in counts}

    # 4. Figures
    tables, pictures = Tables(args.confidence), {}
    for name in args.listener:
        measure, figures = measures[name], {}
        for system in tqdm([*systems, *real], desc=f"metrics by {name}", unit="system", disable=None):
            figures[system.name] = measure_system(
                measure, system, features[name][system.name], tables, args.group_by, best_takes.get(system.name)
            )
        compare_systems(measure, systems, features[name], figures, tables)
        if find_spec("matplotlib"):
            pictures[name] = draw_plots(tables, name, args.rank_by, output_dir)
    tables.write_csv(output_dir)
    description = describe_run(
        tables,
        systems,
        extractor,
        settings,
        prompts=args.prompts,
        references=args.references,
        batch_size=args.batch_size,
        num_problems=len(problems),
        own_values=[name for name in ("num_inference_steps", "guidance_scale") if getattr(args, name) is None],
    )
    command = f"{program_name(__spec__.name)} {shlex.join(sys.argv[1:])}"
    text = as_markdown(tables, description, args.listener, args.rank_by, pictures, command)
    write_atomically(output_dir / "results.md", text.encode())
    shown = text.split("## By group")[0].split("## Comparison")[0].strip()
    logger.info(f"{output_dir / 'results.md'}:\n\n{shown}\n")
    state.destroy_process_group()
    return 0


def real_system(real, source, references, max_sounds, seed):
    """Recordings measured as if they were generated: a list of one system, or empty without recordings.

    Args:
        real (`list[Item]`), source (`str`): the recordings and where they come from. Without any, one half of the
            references is compared with the other.
        max_sounds (`int`): use no more recordings than a system has sounds, since distances depend on the count.
    """
    if real:
        name = f"real recordings ({Path(source).name})"
        return [System(name, name, sounds=select_clips(real, min(len(real), max_sounds), seed), paired=False)]
    if len(references) > 1:
        name = "real recordings (one half of the references against the other)"
        shuffled = select_clips(references, len(references), seed)
        middle = len(shuffled) // 2
        others = [item.id for item in shuffled[middle:]]
        return [System(name, name, sounds=shuffled[:middle], paired=False, reference_ids=others)]
    return []


def main(argv=None):
    args = parse_args(argv)
    try:
        return run(evaluate, args)
    except ImportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
