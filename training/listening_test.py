"""Listening tests as one HTML page: overall quality (OVL) and relevance (REL), as in the paper, rated by participants.

    python -m training.listening_test build --system ours=out/sounds/a --system real=recordings --output test.html
    python -m training.listening_test summarize answers-*.json --key test.key.json

The page contains the sounds and works offline, on phones too. It does not tell which system a sound is of: that is in
the key, a separate file that is not given to participants.
"""

import argparse
import base64
import csv
import hashlib
import html
import io
import json
import logging
import math
import secrets
import sys
from pathlib import Path

import numpy as np

from pipeline_tango.flags import COUNT, INDEX, POSITIVE, Number, check_numbers
from pipeline_tango.sound_files import encode_wav, write_atomically

from .arguments import program_name
from .data import Clip, read_waveform, select_clips
from .evaluation.items import check_sound_reader, find_manifest, find_readable, read_generated, read_items
from .evaluation.measuring import set_level
from .evaluation.metrics import interval, probability_better, resample
from .run import run


logger = logging.getLogger(__name__)

SCALES = {"ovl": "overall quality", "rel": "relevance"}
PAGE = Path(__file__).with_suffix(".html")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog=program_name(__spec__.name),
        description="Build a listening test as one HTML page, or summarize its answers as means with intervals.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser(
        "build",
        help="write the page and its key",
        description="Build a listening test as one HTML page, with ratings of overall quality (OVL) and relevance "
        "(REL).",
    )
    build.add_argument(
        "--system",
        action="append",
        required=True,
        metavar="NAME=SOUNDS",
        help="a folder of generated sounds, or recordings in a folder or manifest; once for each system",
    )
    build.add_argument(
        "--prompts", metavar="FILE", help="prompts with the ids of the sounds (default: those that the folders name)"
    )
    build.add_argument("--output", required=True, metavar="HTML", help="the page; its key is written beside it")
    build.add_argument(
        "--num_prompts",
        type=COUNT,
        default=20,
        metavar="N",
        help="size of a random subset of the prompts (default: 20)",
    )
    build.add_argument(
        "--max_length_in_s",
        type=POSITIVE,
        default=10.0,
        metavar="S",
        help="cut longer sounds, in seconds (default: 10)",
    )
    build.add_argument(
        "--level",
        choices=("peak", "own"),
        default="peak",
        help="scale all sounds to the same peak, so that loudness has no influence (default), or keep their own level",
    )
    build.add_argument("--title", default="Listening test", help="title of the page (default: Listening test)")
    build.add_argument("--seed", type=INDEX, default=0, metavar="N", help="seed of the subset (default: 0)")

    summarize = commands.add_parser(
        "summarize",
        help="means with intervals",
        description="Means of all ratings with bootstrap intervals, and comparisons with the first system.",
    )
    summarize.add_argument("answers", nargs="+", help="answer files of the participants")
    summarize.add_argument("--key", required=True, metavar="FILE", help="the page's key")
    summarize.add_argument("--output", metavar="CSV", help="also write every rating, with its system and prompt")
    summarize.add_argument(
        "--num_resamples", type=Number(int, 20), default=2000, metavar="N", help="bootstrap resamples (default: 2000)"
    )
    summarize.add_argument(
        "--confidence",
        type=Number(float, above=0, below=1),
        default=0.95,
        metavar="P",
        help="confidence level of the intervals (default: 0.95)",
    )
    summarize.add_argument("--seed", type=INDEX, default=0, metavar="N", help="seed of the resamples (default: 0)")

    args = parser.parse_args(argv)
    if args.command == "build":
        args.systems = dict(each.split("=", 1) for each in args.system if "=" in each)
        if len(args.systems) < len(args.system) or not all(args.systems):
            parser.error("--system has to be NAME=SOUNDS, each name once")
        if Path(args.output).suffix != ".html":
            parser.error(f"--output has to end in .html, not {args.output!r}")
    check_numbers(build if args.command == "build" else summarize, args)
    return args


def build(args):
    output = Path(args.output)
    key_path = output.with_suffix(".key.json")
    if output.exists() or key_path.exists():
        raise ValueError(f"`--output`: {output} exists already, and its answers need its key: give another name")
    check_sound_reader()
    sounds, texts = read_systems(args.systems, args.prompts)
    common = [id for id in texts if all(id in items for items in sounds.values())]
    if not common:
        counts = ", ".join(f"{name} has {len(items)} sounds" for name, items in sounds.items())
        raise ValueError(f"`--system`: no sound with a prompt is in all of them ({counts}). Sounds are paired by id")
    chosen = select_clips(sorted(common), args.num_prompts, args.seed)

    stimuli, key = [], {}
    for id in chosen:
        for name, items in sounds.items():
            stimulus, content = secrets.token_hex(8), encode_sound(items[id].path, args.max_length_in_s, args.level)
            stimuli.append({"id": stimulus, "prompt": texts[id], "audio": base64.b64encode(content).decode()})
            key[stimulus] = {"system": name, "prompt": id, "text": texts[id]}
    stimuli.sort(key=lambda each: each["id"])  # the order tells nothing; the page shuffles for each participant
    test = hashlib.sha256(json.dumps(stimuli).encode()).hexdigest()[:12]
    data = json.dumps({"test": test, "title": args.title, "sounds": stimuli}, ensure_ascii=True)
    data = data.replace("<", "\\u003c")  # or a prompt could end the script
    page = PAGE.read_text("utf-8").replace(
        "<title>Listening test</title>", f"<title>{html.escape(args.title)}</title>"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(key_path, (json.dumps({"test": test, "sounds": key}, indent=1) + "\n").encode())
    write_atomically(output, page.replace("__DATA__", data).encode())
    logger.info(
        f"{output}: {len(stimuli)} sounds ({len(chosen)} prompts, {len(sounds)} systems), "
        f"{output.stat().st_size / 1e6:.1f} MB. Do not give {key_path} to participants"
    )
    return 0


def read_systems(systems, prompts):
    """First takes of each system, and all texts.

    Args:
        systems (`dict[str, str]`): folders or manifests by name.
        prompts (`str`, *optional*): a list of prompts, whose texts come before those of the folders.

    Returns:
        `dict[str, dict[str, Item]]` of sounds by system and id, and `dict[str, str]` of texts by id.
    """
    items = read_items(prompts, "prompts", with_text=True) if prompts else []
    texts = {item.id: item.text for item in items}
    sounds = {}
    for name, source in systems.items():
        known = set(texts) or {item.id for each in sounds.values() for item in each.values()}
        if Path(source).is_dir() and find_manifest(source) is None:
            items = read_generated(source, known)
        else:
            items = read_items(source, "system", with_path=True)
        problems = []
        items = find_readable([item for item in items if item.take == 1], name, problems, keep_silent=True)
        for problem in problems:
            logger.warning(f"{name}: {problem['path']}: {problem['reason']}")
        sounds[name] = {item.id: item for item in items}
        texts = {item.id: item.text for item in items if item.text} | texts
    return sounds, texts


def encode_sound(path, max_length_in_s, level):
    """WAV of a sound at its own sampling rate."""
    clip = Clip(path, ())
    with clip.decode() as file:
        sampling_rate = file.samplerate
    waveform = read_waveform(clip, sampling_rate, 0, math.ceil(max_length_in_s * sampling_rate))
    return encode_wav(set_level(waveform, level).numpy(), sampling_rate)


def read_answers(paths, key):
    """Rows of session, listener (the participant's name), system, prompt, text, ovl and rel. Of several files of a
    session the last one counts."""
    sessions = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            test, session, answers = content["test"], content["session"], content["answers"]
            ratings = {
                id: {scale: int(answer[scale]) for scale in SCALES if scale in answer}
                for id, answer in answers.items()
            }
            saved, listener = str(content.get("saved", "")), str(content.get("listener", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`answers`: {path} is not a file of answers ({type(error).__name__}: {error})") from None
        if test != key["test"]:
            raise ValueError(f"`answers`: {path} belongs to the test {test}, the key to {key['test']}")
        for id, each in ratings.items():
            if id not in key["sounds"] or not all(1 <= value <= 100 for value in each.values()):
                raise ValueError(f"`answers`: {path} has a rating that the page cannot give, for sound {id}: {each}")
        if session not in sessions or saved >= sessions[session][0]:
            sessions[session] = (saved, listener, ratings)
    rows = []
    for session, (_, listener, ratings) in sorted(sessions.items()):
        for id, each in ratings.items():
            rows.append({"session": session, "listener": listener, **key["sounds"][id], **each})
    if not rows:
        raise ValueError("`answers`: no ratings in any of the files")
    return rows


def summarize(args):
    try:
        key = json.loads(Path(args.key).read_text("utf-8"))
        systems = list(dict.fromkeys(each["system"] for each in key["sounds"].values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`--key`: {args.key} is not a key ({type(error).__name__}: {error})") from None
    rows = read_answers(args.answers, key)
    if args.output:
        columns = ["session", "listener", "system", "prompt", "text", *SCALES]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(Path(args.output), text.getvalue().encode())
    sys.stdout.write(as_markdown(rows, systems, args.num_resamples, args.confidence, args.seed))
    return 0


def as_markdown(rows, systems, num_resamples, confidence, seed):
    """Tables of the mean ratings by system, and of their differences from those of the first system."""
    sessions, prompts = (sorted({row[name] for row in rows}) for name in ("session", "prompt"))
    # both participants and prompts are resampled, so that the intervals hold for other participants and prompts: the
    # pigeonhole bootstrap, Owen 2007, arXiv 0712.1111, which is conservative
    session_weights = resample(len(sessions), num_resamples, seed)
    prompt_weights = resample(len(prompts), num_resamples, seed + 1)
    lines = [f"{len(sessions)} participants, {len(prompts)} prompts, {len(rows)} sounds rated.", ""]
    headings = " | ".join(f"{scale.upper()} ({name})" for scale, name in SCALES.items())
    lines += [f"| system | {headings} | ratings |", "|---|---|---|---|"]
    means = {}
    for system in systems:
        cells = [system]
        for scale in SCALES:
            own = [row for row in rows if row["system"] == system and scale in row]
            values = np.array([row[scale] for row in own], np.float64)
            weights = (
                session_weights[:, [sessions.index(row["session"]) for row in own]]
                * prompt_weights[:, [prompts.index(row["prompt"]) for row in own]]
            )
            totals = weights.sum(1)
            resampled = np.where(totals > 0, weights @ values / np.maximum(totals, 1), math.nan)
            mean = float(values.mean()) if len(values) else math.nan
            means[system, scale] = mean, resampled
            cells += [with_interval(mean, *interval(mean, resampled, confidence))]
        lines += [f"| {' | '.join(cells)} | {sum(row['system'] == system for row in rows)} |"]
    if len(systems) > 1:
        lines += ["", f"Compared with {systems[0]}:", ""]
        lines += ["| system | scale | difference | probability of being better |", "|---|---|---|---|"]
        for system in systems[1:]:
            for scale in SCALES:
                (mean, resampled), (baseline, baseline_resampled) = means[system, scale], means[systems[0], scale]
                difference, differences = mean - baseline, resampled - baseline_resampled
                text = with_interval(difference, *interval(difference, differences, confidence), "+")
                probability = probability_better(difference, differences, True)
                lines += [f"| {system} | {scale.upper()} | {text} | {100 * probability:.0f}% |"]
    if len(sessions) < 5:
        lines += ["", "With fewer than 5 participants the intervals do not represent other participants."]
    return "\n".join([*lines, ""])


def with_interval(value, low, high, sign=""):
    return f"{value:{sign}.1f}" if math.isnan(low) else f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    return run(build if args.command == "build" else summarize, args)


if __name__ == "__main__":
    sys.exit(main())
