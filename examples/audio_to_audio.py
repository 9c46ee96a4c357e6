"""Audio input of a Tango model: inpainting, variations, continuation and bandwidth extension of `examples/sounds`.

    python -m examples.audio_to_audio [EXAMPLE ...] [--model FOLDER_OR_REPO] [--output_dir out] [--pictures FOLDER]

fill      removes one second of birdsong and regenerates it
vary      turns rain into fire, at several strengths, and prints the similarity of the results to the rain
continue  generates birdsong after the end of a recording and before its start
band      removes everything above 4 kHz from the recordings, regenerates it, and prints the errors
seams     inpaints and continues recordings, and prints the steps of level and spectrum across the seams, beside steps
          within the recordings
long      generates two minutes of rain that becomes thunder, jointly, and window by window as a stream

Each writes WAV files; fill, vary, continue, band and long also draw spectrograms. Needs the extra `demo`.
"""

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
import soundfile
import torch
from transformers.audio_utils import hertz_to_mel

from pipeline_tango import SCHEDULERS, TANGO_TINY, TangoPipeline, log_mel_spectrogram
from pipeline_tango.seams import split_band
from pipeline_tango.sound_files import encode_wav, write_atomically


SOUNDS = Path(__file__).parent / "sounds"
RATE = 16000
NUM_TAKES = 2
STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)

CUTOFF_IN_HZ = 4000
AUDIBLE_DB = 60.0  # below the loudest part of a sound: lower levels are raised to this

SIDE_IN_S = 0.2  # length of the audio on each side of a seam that is compared
SEAM_CLIP_IN_S = 2.56
SEAM_REGION_IN_S = (0.8, 1.4)  # regenerated
SEAM_END_IN_S = 2.0  # continued from here on


def read(name, seconds):
    samples, sampling_rate = soundfile.read(SOUNDS / f"{name}.flac")
    return samples[: round(seconds * sampling_rate)], sampling_rate


def read_manifest(path):
    """Name, caption and samples at 16 kHz of each recording in a JSON lines file of `location` and `captions`."""
    recordings = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        samples, sampling_rate = soundfile.read(path.parent / row["location"])
        if sampling_rate != RATE or samples.ndim > 1:
            raise ValueError(f"`--data` has to list 16 kHz mono recordings, unlike {row['location']}.")
        recordings.append((Path(row["location"]).stem, row["captions"], samples))
    return recordings


def write(folder, name, audio, title):
    write_atomically(folder / f"{name}.wav", encode_wav(audio, RATE))
    print(f"{folder / name}.wav  {len(audio) / RATE:g} s  {title}", flush=True)


def draw(path, sounds):
    """Write a PNG of spectrograms, one below the other.

    Args:
        path (`Path`)
        sounds (`list[tuple[str, np.ndarray, list[tuple[float, float]]]]`): title, samples at 16 kHz, and the
            generated regions in seconds.
    """
    from matplotlib.figure import Figure

    levels = [level_db(audio) for _, audio, _ in sounds]
    loudest = max(each.max() for each in levels)
    longest = max(len(audio) for _, audio, _ in sounds) / RATE
    figure = Figure(figsize=(8, 0.5 + 1.25 * len(sounds)), layout="constrained")
    for axes, (title, audio, made), level in zip(
        figure.subplots(len(sounds), sharex=True, squeeze=False)[:, 0], sounds, levels
    ):
        axes.imshow(
            level,
            origin="lower",
            aspect="auto",
            cmap="magma",
            interpolation="nearest",
            vmin=loudest - AUDIBLE_DB,
            vmax=loudest,
            extent=(0, len(audio) / RATE, 0, len(level)),
        )
        for edge in {edge for region in made for edge in region}:
            axes.axvline(edge, color="white", linewidth=1, linestyle=":")
        axes.set(xlim=(0, longest), yticks=[], ylabel="0-8 kHz")
        axes.set_title(title, fontsize=9, loc="left", pad=3)
    axes.set_xlabel("Time (s)")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=72, pil_kwargs={"optimize": True})
    write_atomically(path, content.getvalue())
    print(path, flush=True)


def level_db(audio):
    """Log-mel spectrogram in decibels, of shape `(64, num_frames)`."""
    mel = log_mel_spectrogram(torch.from_numpy(np.asarray(audio, np.float32))[None])[0].T.numpy()
    return mel * 20 / np.log(10)


def audible_db(audio, reference):
    """`level_db`, clamped from below at 60 dB under the loudest value of `reference`."""
    return np.maximum(level_db(audio), level_db(reference).max() - AUDIBLE_DB)


def similarity(first, second):
    """Correlation of two log-mel spectrograms of equal length over all their frames and bands."""
    return float(np.corrcoef(audible_db(first, first).ravel(), audible_db(second, second).ravel())[0, 1])


def fill(make, args):
    birds, rate = read("birds", 5.0)
    birds[2 * rate : 3 * rate] = 0.0
    write(args.output_dir, "fill-before", birds, "birds singing, one second missing")
    audio = make("birds singing", audio=birds, audio_sampling_rate=rate, mask=[(2.0, 3.0)])[0]
    write(args.output_dir, "fill-after", audio, "the same, the second regenerated")
    made = [(2.0, 3.0)]
    draw(
        args.pictures / "fill.png",
        [("Birds, one second missing", birds, made), ("The second regenerated", audio, made)],
    )


def vary(make, args):
    rain, rate = read("rain", 2.56)
    fire, _ = read("fire", 2.56)
    write(args.output_dir, "vary-before", rain, "heavy rain falling")
    sounds = [("Heavy rain, a recording", rain, [])]
    options = {"audio": rain, "audio_sampling_rate": rate, "num_waveforms_per_prompt": NUM_TAKES}
    rows = []
    for strength in STRENGTHS:
        takes = make("a fire crackling", strength=strength, **options)
        write(args.output_dir, f"vary-{strength}", takes[0], f"a fire crackling, strength {strength}")
        rows.append((strength, np.mean([similarity(take, rain) for take in takes])))
        if strength in (0.3, 0.7, 0.9):
            sounds.append((f'"a fire crackling", strength {strength}', takes[0], []))
    draw(args.pictures / "vary.png", sounds)
    print(f"\nCorrelation of the log-mel spectrograms of the result and the rain, mean of {NUM_TAKES} takes\n")
    print("| strength | " + " | ".join(f"{strength:g}" for strength, _ in rows) + " | recorded fire |")
    print("|---|" + "---|" * (len(rows) + 1))
    print("| similarity | " + " | ".join(f"{value:.2f}" for _, value in rows) + f" | {similarity(fire, rain):.2f} |\n")


def continue_(make, args):
    birds, rate = read("birds", 2.5)
    write(args.output_dir, "continue-before", birds, "birds singing")
    audio = make("birds singing", audio=birds, audio_sampling_rate=rate, audio_start_in_s=1.0, audio_length_in_s=6.0)
    write(args.output_dir, "continue-after", audio[0], "begun one second earlier and continued for 2.5 s")
    placed = np.concatenate([np.zeros(rate), birds, np.zeros(5 * rate // 2)])
    made = [(1.0, 3.5)]
    draw(
        args.pictures / "continue.png",
        [("Birds, 2.5 s", placed, made), ("Begun 1 s earlier and continued for 2.5 s", audio[0], made)],
    )


def band(make, args):
    recordings = read_manifest(args.data)
    # mel band k spans the edges k to k + 2 of 66 evenly spaced ones
    first = math.ceil(hertz_to_mel(CUTOFF_IN_HZ, mel_scale="slaney") / hertz_to_mel(RATE / 2, mel_scale="slaney") * 65)
    errors, sounds = [], []
    for name, caption, recording in recordings:
        recording = recording[: round(SEAM_CLIP_IN_S * RATE)]
        limited = split_band(recording, (0, CUTOFF_IN_HZ), RATE)
        made = make(caption, audio=limited, audio_sampling_rate=RATE, frequency_mask_in_hz=(CUTOFF_IN_HZ, RATE / 2))[0]
        levels = [audible_db(each, recording) for each in (recording, limited, made)]
        errors.append([])
        for bands in (slice(first, None), slice(first - 2)):
            for level in levels[1:]:
                difference = level[bands] - levels[0][bands]
                errors[-1] += [np.abs(difference).mean(), np.abs(difference.mean(axis=1)).mean()]
        if len(sounds) == 0:
            titles = (caption, f"{caption}, nothing above 4 kHz", f"{caption}, the band above 4 kHz regenerated")
            for part, each, title in zip(("original", "before", "after"), (recording, limited, made), titles):
                write(args.output_dir, f"band-{part}", each, title)
                sounds.append((title.capitalize(), each, []))
    draw(args.pictures / "band.png", sounds)
    errors = np.array(errors)
    print("\nMean error in dB of the log-mel spectrogram above 4 kHz: by frame, and of its mean over time\n")
    print("| recording | band-limited | regenerated | band-limited, mean | regenerated, mean |")
    print("|---|---|---|---|---|")
    for name, row in [*zip((name for name, _, _ in recordings), errors), ("all", errors.mean(axis=0))]:
        print(f"| {name} | " + " | ".join(f"{row[i]:.1f}" for i in (0, 2, 1, 3)) + " |")
    print(f"\nBelow 4 kHz the result is within {errors[:, 6].max():.2f} dB of the recordings.\n")


def steps_at(audio, positions):
    """Changes of a sound at some positions, from the 0.2 s before to the 0.2 s after.

    Args:
        audio (`np.ndarray` of shape `(num_samples,)`)
        positions (`list[int]`): samples, at least 0.2 s from the ends.

    Returns:
        `np.ndarray` of shape `(positions, 2)`, in dB: the change of the level, and the mean over the mel bands of the
        change of their mean log-mel level. Levels are clamped at 60 dB below the loudest of the sound.
    """
    side = round(SIDE_IN_S * RATE)
    floor = level_db(audio).max() - AUDIBLE_DB
    power_floor = np.mean(np.square(audio)) * 10 ** (-AUDIBLE_DB / 10)
    inner = slice(4, -4)  # frames whose window does not reach beyond the side
    steps = []
    for position in positions:
        sides = audio[position - side : position], audio[position : position + side]
        levels = [10 * np.log10(np.mean(np.square(each)) + power_floor) for each in sides]
        bands = [np.maximum(level_db(each)[:, inner], floor).mean(axis=1) for each in sides]
        steps.append((abs(levels[1] - levels[0]), np.abs(bands[1] - bands[0]).mean()))
    return np.array(steps)


def measure_seams(results, recordings):
    """Compare the seams in `results` with positions within the recordings that they continue.

    Args:
        results (`np.ndarray` of shape `(recordings, num_samples)`)
        recordings (`list[np.ndarray]`)

    Returns:
        Three arrays of shape `(recordings, seams, 2)` for level and spectrum: steps in dB at the seams, the 90th
        percentiles of steps every 20 ms in the recording, and the fraction of those that is smaller than the seam's.
    """
    seams = [round(edge * RATE) for edge in (*SEAM_REGION_IN_S, SEAM_END_IN_S)]
    side = round(SIDE_IN_S * RATE)
    found = []
    for result, recording in zip(results, recordings):
        inside = steps_at(recording, range(side, len(recording) - side + 1, RATE // 50))
        at_seams = steps_at(result, seams)
        usual = np.broadcast_to(np.quantile(inside, 0.9, axis=0), at_seams.shape)
        ranks = (inside[None] < at_seams[:, None]).mean(axis=1)
        found.append((at_seams, usual, ranks))
    return tuple(np.array(each) for each in zip(*found))


def seams(make, args):
    recordings = [each for each in read_manifest(args.data) if len(each[2]) >= SEAM_END_IN_S * RATE]
    if not recordings:
        raise ValueError(f"`--data` has to list a recording of at least {SEAM_END_IN_S:g} s.")
    names, captions, sounds = zip(*recordings)
    results = make(
        list(captions),
        audio=[each[: round(SEAM_END_IN_S * RATE)] for each in sounds],
        audio_sampling_rate=RATE,
        mask=[SEAM_REGION_IN_S],
        audio_length_in_s=SEAM_CLIP_IN_S,
    )
    for name, result in zip(names, results):
        write(args.output_dir, f"seams-{name}", result, "0.8 to 1.4 s and everything from 2 s on is generated")
    steps, usual, ranks = measure_seams(results, sounds)
    print("\nSteps across seams in dB, in brackets the 90th percentile of those within the recording\n")
    print("| recording | level | spectrum |")
    print("|---|---|---|")
    rows = [*zip(names, steps.mean(axis=1), usual[:, 0]), ("all", steps.mean(axis=(0, 1)), usual.mean(axis=(0, 1)))]
    for name, step, limit in rows:
        print(f"| {name} | {step[0]:.1f} ({limit[0]:.1f}) | {step[1]:.1f} ({limit[1]:.1f}) |")
    beyond = (ranks > 0.9).mean(axis=(0, 1))
    typical = np.median(ranks, axis=(0, 1))
    print(
        f"\nOf {ranks[..., 0].size} seams {beyond[0]:.0%} have a larger step in level and {beyond[1]:.0%} in spectrum "
        f"than nine tenths of the positions within the recording (10% if seams were like any position). The step of "
        f"the median seam is larger than {typical[0]:.0%} and {typical[1]:.0%} of them (50%).\n"
    )


def long(make, args):
    prompt = [(0, "heavy rain falling"), (40, "heavy rain falling"), (80, "thunder"), (120, "thunder")]
    joint = make(prompt, audio_length_in_s=120.0)[0]
    write(args.output_dir, "long", joint, "rain that becomes thunder, jointly denoised")
    stretches = []
    for stretch in make(prompt, audio_length_in_s=120.0, window_order="sequential", stream=True):
        stretches.append(stretch[0])
        print(f"{sum(map(len, stretches)) / RATE:6.2f} s generated", flush=True)
    streamed = np.concatenate(stretches)
    write(args.output_dir, "long-streamed", streamed, "rain that becomes thunder, window by window")
    draw(args.pictures / "long.png", [("All windows at once", joint, []), ("Window by window", streamed, [])])


EXAMPLES = {"fill": fill, "vary": vary, "continue": continue_, "band": band, "seams": seams, "long": long}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help=f"any of {', '.join(EXAMPLES)} (default: all)")
    parser.add_argument("--model", default=TANGO_TINY, help="diffusers folder or repo (default: tango-tiny)")
    parser.add_argument("--output_dir", type=Path, default=Path("out"))
    parser.add_argument("--pictures", type=Path, help="folder for the pictures (default: the output folder)")
    parser.add_argument(
        "--data",
        type=Path,
        default=SOUNDS / "data.jsonl",
        help="recordings for band and seams: JSON lines of location and captions (default: examples/sounds)",
    )
    parser.add_argument("--num_inference_steps", type=int, default=25)
    args = parser.parse_args(argv)
    if unknown := set(args.examples) - set(EXAMPLES):
        parser.error(f"no example {sorted(unknown)}; the examples are {', '.join(EXAMPLES)}")
    if not args.data.is_file():
        parser.error(f"--data {args.data} is not a file")
    args.pictures = args.pictures or args.output_dir

    pipe = TangoPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(leave=False)
    for folder in (args.output_dir, args.pictures):
        folder.mkdir(parents=True, exist_ok=True)

    def make(prompt, stream=False, **options):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": args.num_inference_steps, "generator": generator} | options
        return pipe(prompt, stream=True, **options) if stream else pipe(prompt, **options).audios

    for name in args.examples or EXAMPLES:
        EXAMPLES[name](make, args)


if __name__ == "__main__":
    main()
