"""A listening test in one HTML file, and what came of it: the paper's overall quality (OVL) and relevance (REL).

    python -m training.listening_test build --system ours=out/sounds/a --system real=recordings --output test.html
    python -m training.listening_test summarize answers-*.json --key test.key.json

The page holds the sounds and works from disk, on a phone too. It does not say which system made which sound: that is
in the key, which stays with you.
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

from pipeline_tango.sound_files import encode_wav, write_atomically

from .data import Clip, read_waveform, select_clips
from .evaluation.items import find_readable, read_generated, read_items
from .evaluation.measuring import set_level
from .evaluation.metrics import interval, probability_better, resample
from .run import run


logger = logging.getLogger(__name__)

MARKS = {"ovl": "overall quality", "rel": "relevance"}
PAGE = Path(__file__).with_suffix(".html")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m training.listening_test",
        description="Build a listening test as one HTML page, or turn its answers into means with intervals.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="write the page and its key", description=__doc__.split("\n")[0])
    build.add_argument(
        "--system",
        action="append",
        required=True,
        metavar="NAME=SOUNDS",
        help="a folder of sounds, such as training.evaluate makes, or a manifest of recordings; once for each system",
    )
    build.add_argument("--prompts", help="list of prompts with the ids of the sounds (default: as the folders know)")
    build.add_argument("--output", required=True, metavar="HTML", help="the page; its key is put beside it")
    build.add_argument("--num_prompts", type=int, default=20, help="random choice of so many (default: 20)")
    build.add_argument("--max_length_in_s", type=float, default=10.0, help="longer sounds are cut (default: 10)")
    build.add_argument(
        "--level",
        choices=("peak", "own"),
        default="peak",
        help="all sounds at the same peak, so that loudness does not decide (default), or each at its own level",
    )
    build.add_argument("--title", default="Listening test")
    build.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")

    summarize = commands.add_parser("summarize", help="means with intervals", description="Means of all answers.")
    summarize.add_argument("answers", nargs="+", help="files that listeners saved")
    summarize.add_argument("--key", required=True, help="the page's key")
    summarize.add_argument("--output", metavar="CSV", help="also write every mark, with its system and prompt")
    summarize.add_argument("--num_resamples", type=int, default=2000, help="bootstrap resamples (default: 2000)")
    summarize.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
    summarize.add_argument("--seed", type=int, default=0)

    args = parser.parse_args(argv)
    if args.command == "build":
        args.systems = dict(each.split("=", 1) for each in args.system if "=" in each)
        if len(args.systems) < len(args.system) or not all(args.systems):
            parser.error("--system has to be NAME=SOUNDS, each name once")
        if Path(args.output).suffix != ".html":
            parser.error(f"--output has to end in .html, not {args.output!r}")
        if args.num_prompts < 1:
            parser.error(f"--num_prompts has to be at least 1, not {args.num_prompts}")
        if not 0 < args.max_length_in_s < math.inf:
            parser.error(f"--max_length_in_s has to be positive, not {args.max_length_in_s}")
    else:
        if args.num_resamples < 20:
            parser.error(f"--num_resamples has to be at least 20, not {args.num_resamples}")
        if not 0 < args.confidence < 1:
            parser.error(f"--confidence has to be between 0 and 1, not {args.confidence}")
    if args.seed < 0:
        parser.error(f"--seed has to be at least 0, not {args.seed}")
    return args


def build(args):
    output = Path(args.output)
    if output.exists() or output.with_suffix(".key.json").exists():
        raise ValueError(f"`--output`: {output} is there already, and its answers need its key: give another name")
    prompts = read_items(args.prompts, "prompts", with_text=True) if args.prompts else []
    texts = {prompt.id: prompt.text for prompt in prompts}
    sounds = {}
    for name, source in args.systems.items():
        is_folder = Path(source).is_dir() and not any(
            (Path(source) / manifest).is_file() for manifest in ("metadata.csv", "metadata.jsonl")
        )
        known = set(texts) or {item.id for each in sounds.values() for item in each.values()}
        items = read_generated(source, known) if is_folder else read_items(source, "system", with_path=True)
        problems = []
        items = find_readable([item for item in items if item.take == 1], name, problems, keep_silent=True)
        for problem in problems:
            logger.warning(f"{name}: {problem['path']}: {problem['reason']}")
        sounds[name] = {item.id: item for item in items}
        texts = {item.id: item.text for item in items if item.text} | texts
    common = [id for id in texts if all(id in items for items in sounds.values())]
    if not common:
        counts = ", ".join(f"{name} has {len(items)} sounds" for name, items in sounds.items())
        raise ValueError(f"`--system`: no sound with a prompt is in all of them ({counts}). Pairs have the same id")
    chosen = select_clips(sorted(common), args.num_prompts, args.seed)

    stimuli, key = [], {}
    for id in chosen:
        for name, items in sounds.items():
            clip = Clip(items[id].path, ())
            with clip.decode() as file:
                sampling_rate = file.samplerate
            waveform = read_waveform(clip, sampling_rate, 0, math.ceil(args.max_length_in_s * sampling_rate))
            content = encode_wav(set_level(waveform, args.level).numpy(), sampling_rate)
            stimulus = secrets.token_hex(8)
            stimuli.append({"id": stimulus, "prompt": texts[id], "audio": base64.b64encode(content).decode()})
            key[stimulus] = {"system": name, "prompt": id, "text": texts[id]}
    stimuli.sort(key=lambda each: each["id"])  # no order to guess from; the page shuffles for each listener
    test = hashlib.sha256(json.dumps(stimuli).encode()).hexdigest()[:12]
    data = json.dumps({"test": test, "title": args.title, "sounds": stimuli}, ensure_ascii=True)
    data = data.replace("<", "\\u003c")  # or a prompt could end the script
    page = PAGE.read_text("utf-8").replace(
        "<title>Listening test</title>", f"<title>{html.escape(args.title)}</title>"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    key_path = output.with_suffix(".key.json")
    write_atomically(key_path, (json.dumps({"test": test, "sounds": key}, indent=1) + "\n").encode())
    write_atomically(output, page.replace("__DATA__", data).encode())
    logger.info(
        f"{output}: {len(stimuli)} sounds ({len(chosen)} prompts, {len(sounds)} systems), "
        f"{output.stat().st_size / 1e6:.1f} MB. Keep {key_path} to yourself"
    )
    return 0


def read_answers(paths, key):
    """Marks as rows of listener, system, prompt, ovl and rel. One session counts once, by its last file."""
    sessions = {}
    for path in paths:
        try:
            content = json.loads(Path(path).read_text("utf-8"))
            test, session, answers = content["test"], content["session"], content["answers"]
            marks = {
                id: {mark: int(answer[mark]) for mark in MARKS if mark in answer} for id, answer in answers.items()
            }
            saved, listener = str(content.get("saved", "")), str(content.get("listener", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`answers`: {path} is not a file of answers ({type(error).__name__}: {error})") from None
        if test != key["test"]:
            raise ValueError(f"`answers`: {path} belongs to the test {test}, the key to {key['test']}")
        for id, each in marks.items():
            if id not in key["sounds"] or not all(1 <= value <= 100 for value in each.values()):
                raise ValueError(f"`answers`: {path} has a mark that the page cannot give, for sound {id}: {each}")
        if session not in sessions or saved >= sessions[session][0]:
            sessions[session] = (saved, listener, marks)
    rows = []
    for session, (_, listener, marks) in sorted(sessions.items()):
        for id, each in marks.items():
            rows.append({"session": session, "listener": listener, **key["sounds"][id], **each})
    if not rows:
        raise ValueError("`answers`: no marks in any of the files")
    return rows


def summarize(args):
    try:
        key = json.loads(Path(args.key).read_text("utf-8"))
        systems = list(dict.fromkeys(each["system"] for each in key["sounds"].values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`--key`: {args.key} is not a key ({type(error).__name__}: {error})") from None
    rows = read_answers(args.answers, key)
    sessions, prompts = (sorted({row[name] for row in rows}) for name in ("session", "prompt"))
    # both the listeners and the prompts are drawn anew, so that the intervals speak of other listeners and prompts:
    # the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111. It errs on the wide side
    listener_weights = resample(len(sessions), args.num_resamples, args.seed)
    prompt_weights = resample(len(prompts), args.num_resamples, args.seed + 1)
    lines = [f"{len(sessions)} listeners, {len(prompts)} prompts, {len(rows)} sounds marked.", ""]
    lines += ["| system | " + " | ".join(f"{mark.upper()} ({name})" for mark, name in MARKS.items()) + " | marks |"]
    lines += ["|---|---|---|---|"]
    means = {}
    for system in systems:
        cells = [system]
        for mark in MARKS:
            own = [row for row in rows if row["system"] == system and mark in row]
            values = np.array([row[mark] for row in own], np.float64)
            weights = (
                listener_weights[:, [sessions.index(row["session"]) for row in own]]
                * prompt_weights[:, [prompts.index(row["prompt"]) for row in own]]
            )
            totals = weights.sum(1)
            resampled = np.where(totals > 0, weights @ values / np.maximum(totals, 1), math.nan)
            mean = float(values.mean()) if len(values) else math.nan
            means[system, mark] = mean, resampled
            cells += [as_text(mean, *interval(mean, resampled, args.confidence))]
        lines += [f"| {' | '.join(cells)} | {sum(row['system'] == system for row in rows)} |"]
    if len(systems) > 1:
        lines += [
            "",
            f"Against {systems[0]}:",
            "",
            "| system | mark | difference | better with |",
            "|---|---|---|---|",
        ]
        for system in systems[1:]:
            for mark in MARKS:
                (mean, resampled), (baseline, baseline_resampled) = means[system, mark], means[systems[0], mark]
                difference, differences = mean - baseline, resampled - baseline_resampled
                text = as_text(difference, *interval(difference, differences, args.confidence), "+")
                sure = probability_better(difference, differences, True)
                lines += [f"| {system} | {mark.upper()} | {text} | {100 * sure:.0f}% |"]
    if len(sessions) < 5:
        lines += ["", "With so few listeners the intervals say little about other listeners."]
    if args.output:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["session", "listener", "system", "prompt", "text", *MARKS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(Path(args.output), text.getvalue().encode())
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def as_text(value, low, high, sign=""):
    return f"{value:{sign}.1f}" if math.isnan(low) else f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    return run(build if args.command == "build" else summarize, args)


if __name__ == "__main__":
    sys.exit(main())
