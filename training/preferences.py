"""Make preference pairs: `python -m training.preferences --model M --prompts FILE --output_dir OUT`.

A model generates several takes of each prompt, a listener scores them, and takes of one prompt that score differently
become pairs of a chosen and a rejected sound for `train_dpo`. The same command resumes an interrupted run.
"""

import argparse
import itertools
import json
import logging
import math
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers.utils.torch_utils import get_device

from pipeline_tango import SCHEDULERS
from pipeline_tango.flags import COUNT, NOT_NEGATIVE, Number, check_numbers
from pipeline_tango.json_files import read_json
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
from .evaluation.generation import (
    GenerationSettings,
    check_schedulers,
    collect_sounds,
    generate,
    plan_sweep,
)
from .evaluation.items import check_sound_reader, length_in_s, read_items, short_names
from .evaluation.listeners import LISTENERS, load_listener
from .evaluation.measuring import FeatureExtractor, Measure, MetricSettings
from .run import check_output_dir, run


logger = get_logger(__name__)

PATHS = ("chosen", "rejected", "file")  # columns of the lists that are paths


def build_parser():
    parser = argparse.ArgumentParser(
        prog=program_name(__spec__.name),
        description="Generate several takes of each prompt, score them with a listener, and write pairs of a chosen "
        "and a rejected take to OUT/pairs.jsonl, the manifest that tango-dpo trains on, and all scores to "
        "OUT/scores.jsonl. A prompt that names events in its column `sequence` scores by how well the listener hears "
        "each of them and by their order, with the column `together` by the former; otherwise the labels, else the "
        "words of the prompt, say which classes are meant. With clap the score is the cosine of sound and prompt.",
        epilog=f"`accelerate launch -m {__spec__.name} ...` distributes the work over devices, and `torchrun "
        f"--nproc_per_node N -m {__spec__.name} ...` over processes on CPUs. The same command resumes an interrupted "
        "run.",
        formatter_class=HelpFormatter,
    )
    what = parser.add_argument_group("input and output")
    what.add_argument("--model", required=True, metavar="FOLDER_OR_REPO", help="diffusers folder or Hub repo")
    what.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSON lines or CSV with a caption and labels, or a text file with one prompt per line",
    )
    what.add_argument("--output_dir", required=True, metavar="FOLDER", help="folder for sounds, scores and pairs")
    what.add_argument(
        "--num_prompts", type=COUNT, metavar="N", help="size of a random subset of the prompts, fixed by the seed"
    )

    sounds = parser.add_argument_group("generation")
    sounds.add_argument("--num_takes", type=Number(int, 2), default=8, metavar="N", help="sounds per prompt")
    sounds.add_argument(
        "--num_inference_steps", type=COUNT, metavar="N", help="denoising steps (default: the model's own)"
    )
    sounds.add_argument("--guidance_scale", type=NOT_NEGATIVE, help="guidance scale (default: the model's own)")
    sounds.add_argument(
        "--scheduler", default="own", choices=("own", *SCHEDULERS), help="scheduler; own is that of the model"
    )
    add_generation_arguments(sounds, "seed of the initial noise; take another for each round")

    listening = parser.add_argument_group("scores")
    listening.add_argument(
        "--listener",
        default="yamnet",
        choices=[name for name in LISTENERS if name != "vggish"],
        help="pretrained audio classifier or audio-text model that scores the takes",
    )
    add_listener_arguments(listening)
    add_label_arguments(listening)
    listening.add_argument(
        "--order_weight",
        type=NOT_NEGATIVE,
        default=1.0,
        help="weight of the order of events in the score, beside their log-probabilities",
    )

    pairs = parser.add_argument_group("pairs")
    pairs.add_argument(
        "--pair_by",
        choices=("rank", "margin"),
        default="rank",
        help="best against worst, second best against second worst and so on, or the pairs with the largest margins",
    )
    pairs.add_argument("--num_pairs", type=COUNT, default=1, metavar="N", help="pairs per prompt, at most")
    pairs.add_argument(
        "--min_margin",
        type=NOT_NEGATIVE,
        default=0.0,
        help="least difference of the scores of a pair; equal scores never make a pair",
    )
    return parser


def parse_args(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    read_class_map(parser, args)
    return args


def choose_pairs(scores, pair_by="rank", num_pairs=1, min_margin=0.0):
    """Pairs of takes of one prompt, the most different ones first.

    Args:
        scores (`Sequence[float]`): of the takes; those that are NaN are left out.
        pair_by (`str`, *optional*): `"rank"`: best and worst, second best and second worst, and so on, so that no take
            is in two pairs. `"margin"`: any two takes, by their difference.
        num_pairs (`int`, *optional*): the most pairs.
        min_margin (`float`, *optional*): the least difference. Ties are left out in any case.

    Returns:
        `list[tuple[int, int]]`: the indices of the chosen and of the rejected take of each pair. Of equal scores the
        first take counts as the better one.
    """
    if pair_by not in ("rank", "margin"):
        raise ValueError(f"`pair_by` must be 'rank' or 'margin', got {pair_by!r}.")
    order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: (-scores[i], i))
    if pair_by == "rank":
        candidates = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
    else:
        candidates = sorted(
            itertools.combinations(order, 2), key=lambda pair: scores[pair[1]] - scores[pair[0]]
        )  # stable: by rank where margins are equal
    margins = {pair: scores[pair[0]] - scores[pair[1]] for pair in candidates}
    return [pair for pair in candidates if margins[pair] > 0 and margins[pair] >= min_margin][:num_pairs]


def pair_records(prompts, sounds, rows, settings, *, pair_by, num_pairs, min_margin):
    """Lines of the manifest of pairs, in the order of the prompts, and the number of prompts without a pair.

    Args:
        sounds (`list[Item]`), rows (`list[dict]`): all takes and their scores, as `Measure.preferences` returns them.
        settings (`dict`): added to every line.
    """
    takes = {}
    for sound, row in zip(sounds, rows, strict=True):
        takes.setdefault(sound.id, []).append((sound, row["score"]))
    records, num_without = [], 0
    for prompt in prompts:
        scores = [score for _, score in takes[prompt.id]]
        pairs = choose_pairs(scores, pair_by, num_pairs, min_margin)
        num_without += not pairs
        for pair in pairs:
            record = {"id": prompt.id, "prompt": prompt.text}
            for side, index in zip(("chosen", "rejected"), pair, strict=True):
                sound, score = takes[prompt.id][index]
                record |= {side: sound.path, f"{side}_take": sound.take, f"{side}_score": score}
            records.append(record | {"margin": record["chosen_score"] - record["rejected_score"], **settings})
    return records, num_without


def write_lines(path, records, folder):
    """Records as JSON lines, the paths in them relative to `folder`."""
    lines = []
    for record in records:
        paths = {name: Path(record[name]).relative_to(folder).as_posix() for name in PATHS if name in record}
        lines.append(json.dumps(record | paths, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())


def make_preferences(args):
    state = PartialState(cpu="cpu" in (args.device, get_device()), timeout=timedelta(days=30))
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    device = torch.device(args.device) if args.device and state.num_processes == 1 else state.device
    output_dir = Path(args.output_dir)

    # 1. Checks of everything that can be checked before hours of generation
    check_sound_reader()
    prompts = read_items(args.prompts, "prompts", with_text=True)
    if args.num_prompts and args.num_prompts < len(prompts):
        prompts = select_clips(prompts, args.num_prompts, args.seed)
    [system] = plan_sweep(
        dict(zip(short_names([args.model]), [args.model])),
        [args.scheduler],
        args.num_inference_steps and [args.num_inference_steps],
        None if args.guidance_scale is None else [args.guidance_scale],
        output_dir / "sounds",
    )
    generation = GenerationSettings(**{each.name: getattr(args, each.name) for each in fields(GenerationSettings)})
    check_schedulers([system])
    check_output_dir(output_dir, ("args.json", "pairs.jsonl", "scores.jsonl"))
    listener = load_listener(args.listener, getattr(args, f"{args.listener}_weights"), device)
    names = [each.name for each in fields(MetricSettings) if hasattr(args, each.name)]
    measure = Measure(listener, [], [], prompts, MetricSettings(**{name: getattr(args, name) for name in names}))
    known = [item for item in prompts if hasattr(listener, "embed_text") or measure.asked_for(item)[0]]
    if not known:
        raise ValueError(
            f"--prompts: no prompt names a class of {args.listener}, such as {prompts[0].text!r}: add a column "
            f"{args.label_column!r}, and a --class_map if its labels are no classes"
        )
    if len(known) < len(prompts):
        num_unknown = len(prompts) - len(known)
        logger.warning(f"{num_unknown} of {len(prompts)} prompts name no class of {args.listener} and are left out")
    prompts = known
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / "args.json", json.dumps(vars(args), indent=2, sort_keys=True).encode())
        logger.info(f"{args.listener}: weights {listener.weights}, sha256 {listener.checksum}")

    # 2. Takes
    generate([system], prompts, generation, state, device)
    state.wait_for_everyone()
    collect_sounds(system, prompts, args.num_takes)
    sounds = system.sounds

    # 3. Scores, each process a share of the listening
    extractor = FeatureExtractor({args.listener: listener}, output_dir / "heard", args.level, length_in_s(sounds[0]))
    extractor(args.listener, sounds[state.process_index :: state.num_processes])
    state.wait_for_everyone()
    if not state.is_main_process:
        return 0
    rows = measure.preferences(sounds, extractor(args.listener, sounds), args.order_weight)
    settings = {"model": args.model, **read_json(system.folder / "settings.json")}
    settings |= {"listener": args.listener, "listener_sha256": listener.checksum, "level": args.level}
    scores = []
    for sound, row in zip(sounds, rows, strict=True):
        scores.append({"file": sound.path, "id": sound.id, "take": sound.take, **row})
    write_lines(output_dir / "scores.jsonl", scores, output_dir)

    # 4. Pairs
    options = {name: getattr(args, name) for name in ("pair_by", "num_pairs", "min_margin")}
    records, num_without = pair_records(prompts, sounds, rows, settings, **options)
    if not records:
        (output_dir / "pairs.jsonl").unlink(missing_ok=True)  # of an earlier run
        raise ValueError(
            f"no two takes of a prompt differ in their scores by --min_margin {args.min_margin:g} or more: lower it, "
            "or give more --num_takes"
        )
    write_lines(output_dir / "pairs.jsonl", records, output_dir)
    chosen, rejected = (np.mean([record[f"{side}_score"] for record in records]) for side in ("chosen", "rejected"))
    mean = np.mean([row["score"] for row in rows])
    logger.info(
        f"{output_dir / 'pairs.jsonl'}: {len(records)} pairs of {len(prompts)} prompts, {num_without} without one; "
        f"mean scores: all takes {mean:.3f}, chosen {chosen:.3f}, rejected {rejected:.3f}"
    )
    state.destroy_process_group()
    return 0


def main(argv=None):
    args = parse_args(argv)
    try:
        return run(make_preferences, args)
    except ImportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
