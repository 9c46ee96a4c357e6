"""Compose clips of one length from the recordings of the sound library.

    python -m examples.sound_library.compose LIBRARY OUT --seconds 5.12 --num_clips 3000 --seed 0
    python -m examples.sound_library.compose LIBRARY OUT --seconds 5.12 --prompts prompts/pairs_held.jsonl --split all

The first writes 16 kHz mono FLAC files of scenes (`scenes.py`) and `data.jsonl`, a manifest for `training` with
several captions per clip; each clip depends on the seed and its own index only, so that a larger number of clips does
not change the first ones. `--captions_only` leaves out the sounds. The second writes recordings in the sequence that
each prompt names (column `sequence`), or mixed (column `together`), for `tango-evaluate --real_recordings OUT`. Needs
the extra `train`.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from examples.sound_library.recordings import SAMPLING_RATE, Recordings
from examples.sound_library.scenes import draw_scene, make_scene, render
from pipeline_tango.sound_files import write_atomically


def compose(recordings, index, *, num_samples, seed=0, num_captions=8, captions_only=False):
    """One training clip: its waveform, float32 of shape `(num_samples,)`, or None if `captions_only`, and its line of
    the manifest without `location`."""
    rng = np.random.default_rng([seed, index])
    scene = draw_scene(rng, recordings, num_samples, num_captions)
    captions = list(dict.fromkeys(scene.captions))
    record = {"captions": captions, "category": "+".join(scene.categories), "relation": scene.relation}
    if captions_only:
        return None, record
    return render(scene.events, recordings.waveforms, num_samples, rng.uniform(0.5, 0.9)), record


def write_sound(path, waveform):
    content = io.BytesIO()
    soundfile.write(content, waveform, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    write_atomically(path, content.getvalue())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="folder written by examples.sound_library.build")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seconds", type=float, default=5.12, help="length of a clip (default: 5.12)")
    parser.add_argument("--num_clips", type=int, default=3000, help="number of clips (default: 3000)")
    parser.add_argument("--num_captions", type=int, default=8, help="captions of a clip, at most (default: 8)")
    parser.add_argument("--captions_only", action="store_true", help="write the manifest alone")
    parser.add_argument("--prompts", type=Path, help="JSON lines with id and sequence or together, to compose")
    parser.add_argument("--split", default="train", help="split of the recordings: train, heldout or all")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args(argv)
    if not 0.5 <= args.seconds <= 30:
        parser.error(f"--seconds has to be from 0.5 to 30, not {args.seconds:g}")
    if args.num_clips < 1 or args.num_captions < 1 or args.seed < 0:
        parser.error("--num_clips and --num_captions have to be at least 1 and --seed not negative")
    num_samples = round(args.seconds * SAMPLING_RATE)
    try:
        recordings = Recordings.read(args.library, args.split)
        prompts = [json.loads(line) for line in args.prompts.read_text().splitlines()] if args.prompts else []
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        raise SystemExit(f"error: {error}") from None

    if (args.output / "data.jsonl").exists():  # written last: an interrupted run has left none
        parser.error(f"{args.output / 'data.jsonl'} is there already: give another folder")
    args.output.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(prompts):
        relation = "sequence" if "sequence" in prompt else "mixed"
        categories = prompt["sequence" if relation == "sequence" else "together"]
        missing = [each for each in categories if each not in recordings.indices]
        if missing:
            raise SystemExit(f"error: --split {args.split} has no recording of {missing[0]} ({prompt['id']})")
        rng = np.random.default_rng([args.seed, number])
        scene = make_scene(rng, recordings, num_samples, relation, categories)
        write_sound(args.output / f"{prompt['id']}.flac", render(scene.events, recordings.waveforms, num_samples))
    if prompts:
        print(f"{len(prompts)} sounds: {args.output}")
        return
    options = {"seed": args.seed, "num_captions": args.num_captions, "captions_only": args.captions_only}
    lines = []
    for index in tqdm(range(args.num_clips), desc="Composing", unit="clip"):
        waveform, record = compose(recordings, index, num_samples=num_samples, **options)
        location = f"{index:06d}.flac"
        if waveform is not None:
            write_sound(args.output / location, waveform)
        lines.append(json.dumps({"location": location, **record}) + "\n")
    write_atomically(args.output / "data.jsonl", "".join(lines).encode())
    print(f"{args.num_clips} clips: {args.output / 'data.jsonl'}")


if __name__ == "__main__":
    main()
