"""Compose training clips of one length from the recordings of the sound library.

    python -m examples.sound_library.compose LIBRARY OUT --seconds 2.56 --num_clips 3000 --seed 0

writes 16 kHz mono FLAC files and `data.jsonl`, a manifest for `training` with several captions per clip. A clip is a
part of a recording, a short sound repeated, or two sounds mixed or in sequence. Each clip depends on the seed and its
own index only, so that a larger number of clips does not change the first ones. Needs the extra `train`.
"""

import argparse
import csv
import io
import json
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from examples.sound_library.captions import sentence_case, variants, widen
from pipeline_tango.sound_files import write_atomically


SAMPLING_RATE = 16000
FADE = 80  # samples: 5 ms, against clicks
CROSSFADE = 1600  # samples, where a texture is looped or one sound follows another

# Drawn twice as often as others: the categories of the evaluation.
FREQUENT = set(
    "rain thunder wind water fire birds_ambience insects sheep cow horse bee footsteps door bell explosion gunshot "
    "glass metal splash drum machine car airplane train applause laugh".split()
)
# Continuous sounds: any part is representative, and a short recording is looped unless it fades.
TEXTURES = set(
    "airplane applause bee birds_ambience bubbles car chainsaw crowd electricity fire helicopter insects machine "
    "mosquito motorcycle noise rain sawing siren steam train water wind".split()
)
# Sounds that repeat at a regular pace: seconds from one onset to the next.
PACES_IN_S = {
    "drip": (0.3, 0.9),
    "drum": (0.25, 0.8),
    "footsteps": (0.42, 0.68),
    "hammering": (0.5, 0.9),
    "metal": (0.35, 0.9),
    "wood": (0.25, 0.8),
    "wood_chopping": (0.6, 1.0),
}
OFTEN_ONCE = {"burp", "crash", "door", "explosion", "glass", "gunshot", "pop", "sneeze", "splash", "thunder"}
# Pairs that are plausible together, with weights. Half of all pairs are drawn from them.
LIKELY_PAIRS = {
    ("rain", "thunder"): 5,
    ("wind", "rain"): 2,
    ("wind", "thunder"): 2,
    ("fire", "wind"): 2,
    ("birds_ambience", "water"): 3,
    ("birds_ambience", "wind"): 1,
    ("birds_ambience", "sheep"): 1,
    ("birds_ambience", "cow"): 1,
    ("birds_ambience", "footsteps"): 1,
    ("birds_ambience", "bee"): 1,
    ("birds_ambience", "bell"): 1,
    ("insects", "fire"): 1,
    ("insects", "owl"): 1,
    ("insects", "water"): 1,
    ("rain", "footsteps"): 1,
    ("rain", "car"): 1,
    ("wind", "wolf"): 1,
    ("water", "splash"): 1,
    ("footsteps", "door"): 2,
    ("footsteps", "dog"): 1,
    ("door", "bell"): 1,
    ("horse", "footsteps"): 1,
    ("car", "car_horn"): 1,
    ("car", "siren"): 1,
    ("train", "bell"): 1,
    ("machine", "metal"): 1,
    ("machine", "hammering"): 1,
    ("explosion", "gunshot"): 2,
    ("explosion", "glass"): 1,
    ("applause", "laugh"): 2,
    ("crowd", "laugh"): 1,
    ("water", "ship_horn"): 1,
}


class Library:
    """The recordings of one split, with the probabilities of drawing them.

    Args:
        folder (`str` or `Path`): folder with the sounds, and with `manifest.csv` unless the one beside this file
            describes them.

    Raises:
        ValueError: if the split has no recordings, or one is not 16 kHz mono or silent.
        FileNotFoundError: naming a recording that is not in `folder`.
    """

    def __init__(self, folder, split="train"):
        folder = Path(folder)
        manifest = folder / "manifest.csv"
        manifest = manifest if manifest.is_file() else Path(__file__).with_name("manifest.csv")
        with open(manifest, newline="", encoding="utf-8") as file:
            self.rows = [row for row in csv.DictReader(file) if row["split"] == split]
        if not self.rows:
            raise ValueError(f"`split` has to be one of the manifest's, not {split!r}.")
        self.waveforms = [read_recording(folder / row["file"]) for row in self.rows]
        # recordings that the tagger did not classify as their category are drawn half as often
        lengths_in_s = np.array([len(waveform) / SAMPLING_RATE for waveform in self.waveforms])
        weights = np.sqrt(lengths_in_s) * [0.5 if row["tagger_agrees"] == "no" else 1.0 for row in self.rows]
        self.indices, self.weights, shares = {}, {}, {}
        for category in sorted({row["category"] for row in self.rows}):
            indices = [i for i, row in enumerate(self.rows) if row["category"] == category]
            self.indices[category] = indices
            self.weights[category] = weights[indices] / weights[indices].sum()
            seconds = min(lengths_in_s[indices].sum(), 100.0)
            shares[category] = 2 * max(seconds, 20.0) ** 0.5 if category in FREQUENT else seconds**0.5
        total = sum(shares.values())
        self.shares = {category: share / total for category, share in shares.items()}
        self.pairs = {pair: n for pair, n in LIKELY_PAIRS.items() if all(each in shares for each in pair)}

    def draw_category(self, rng):
        return str(rng.choice(list(self.shares), p=list(self.shares.values())))

    def draw_recording(self, rng, category):
        """Index of a recording of the category; long ones more often."""
        return int(rng.choice(self.indices[category], p=self.weights[category]))


def read_recording(path):
    """A recording without its mean, normalised to a peak of 1, without leading and trailing silence."""
    with open(path, "rb") as file:  # which fails with an OSError where soundfile does not
        waveform, sampling_rate = soundfile.read(file, dtype="float32")
    if sampling_rate != SAMPLING_RATE or waveform.ndim != 1:
        raise ValueError(f"{path} has to be {SAMPLING_RATE} Hz mono, not {sampling_rate} Hz {waveform.shape}.")
    waveform -= waveform.mean(dtype=np.float64) if len(waveform) else 0
    peak = np.abs(waveform).max(initial=0)
    if peak < 1e-4:
        raise ValueError(f"{path} is silent.")
    audible = np.nonzero(np.abs(waveform) > peak * 10 ** (-45 / 20))[0]
    return waveform[max(audible[0] - FADE, 0) : audible[-1] + FADE] / peak


def rms(waveform):
    return np.sqrt(np.square(waveform, dtype=np.float64).mean())


def fade(waveform, num_in=FADE, num_out=FADE):
    """A copy with both ends faded by raised cosines."""
    waveform = waveform.copy()
    for part, num_samples in ((waveform, num_in), (waveform[::-1], num_out)):
        num_samples = min(num_samples, len(waveform) // 2)
        part[:num_samples] *= 0.5 - 0.5 * np.cos(np.pi * (np.arange(num_samples) + 0.5) / num_samples)
    return waveform


def join(first, second, num_samples):
    """`first`, then `second`, with an equal-power crossfade of `num_samples`."""
    angle = np.pi / 2 * (np.arange(num_samples, dtype=np.float32) + 0.5) / num_samples
    overlap = np.cos(angle) * first[-num_samples:] + np.sin(angle) * second[:num_samples]
    return np.concatenate([first[:-num_samples], overlap, second[num_samples:]])


def crop(rng, waveform, num_samples, category):
    """A part of a longer recording that is not silent: any part of a texture, mostly the beginning of events."""
    if category not in TEXTURES and rng.random() < 0.6:
        return waveform[:num_samples]
    starts = rng.integers(len(waveform) - num_samples + 1, size=8)
    for start in starts:
        part = waveform[start : start + num_samples]
        if rms(part) > 0.3 * rms(waveform):
            return part
    return max((waveform[start : start + num_samples] for start in starts), key=rms)


def loop(rng, waveform, num_samples):
    """A texture looped with crossfades, from a random position."""
    overlap = min(CROSSFADE, len(waveform) // 4)
    result = waveform[rng.integers(len(waveform) // 2) :]
    while len(result) < num_samples:
        result = join(result, waveform, overlap)
    return result[:num_samples]


def repeat(rng, events, num_samples, category):
    """Repeat events in turn, with gaps or at the category's pace. Returns the waveform and the number of events."""
    result = np.zeros(num_samples, np.float32)
    steady = category in PACES_IN_S and max(map(len, events)) < 1.2 * SAMPLING_RATE
    pace_in_s = rng.uniform(*PACES_IN_S[category]) if steady else None
    once = rng.random() < (0.3 if category in OFTEN_ONCE else 0.1)
    start = int(rng.uniform(0.0, 0.2) * SAMPLING_RATE)
    start = min(start, max(num_samples - len(events[0]), 0))
    num_events = 0
    while True:
        event = fade(events[num_events % len(events)]) * np.float32(10 ** (rng.uniform(-3, 0) / 20))
        room = num_samples - start
        if num_events > 0 and room < 0.6 * len(event):  # rather silence than the half of an event
            break
        if room < len(event):
            event = fade(event[:room], num_out=min(8 * FADE, room // 4))
        result[start : start + len(event)] += event
        num_events += 1
        if once:
            break
        if steady:
            start += int(pace_in_s * rng.uniform(0.92, 1.08) * SAMPLING_RATE)
        else:
            start += len(event) + int(rng.uniform(0.05, 0.7) * SAMPLING_RATE)
        if start >= num_samples:
            break
    return result, num_events


def draw_sound(rng, library, category, num_samples):
    """A sound of one category and the given length.

    Returns:
        `(np.ndarray, str, bool)`: float32 of shape `(num_samples,)` with a peak of 1, the caption, and whether a short
        recording is repeated.
    """
    index = library.draw_recording(rng, category)
    waveform, caption = library.waveforms[index], library.rows[index]["caption"]
    several = False
    ends = [rms(end) for end in (waveform[:CROSSFADE], waveform[-CROSSFADE:])]
    if len(waveform) >= num_samples:
        waveform = fade(crop(rng, waveform, num_samples, category))
    elif category in TEXTURES and len(waveform) > 4 * CROSSFADE and min(ends) > 0.1 * rms(waveform):
        waveform = fade(loop(rng, waveform, num_samples))
    else:
        events = [waveform]
        if category == "footsteps" or rng.random() < 0.5:  # alternating with others of the same caption
            others = [i for i in library.indices[category] if library.rows[i]["caption"] == caption and i != index]
            others = [i for i in others if len(library.waveforms[i]) < num_samples]
            num_others = min(len(others), int(rng.integers(1, 4)))
            events += [library.waveforms[i] for i in rng.choice(others, num_others, replace=False)] if others else []
        waveform, num_events = repeat(rng, events, num_samples, category)
        several = num_events > 1
    return waveform / np.abs(waveform).max(), caption, several


def pressure_level_db(waveform):
    """A-weighted level of the loudest frame, as in `training.mixing`, which examples may not import."""
    frames = np.pad(waveform, (0, max(-len(waveform) % 1024, 2048 - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(frames, 2048)[::1024]  # (num_frames, 2048)
    power = np.abs(np.fft.rfft(frames * np.hanning(2049)[:-1])) ** 2  # (num_frames, 1025)
    squared = np.fft.rfftfreq(2048, 1 / SAMPLING_RATE) ** 2
    weighting = 12194.0**2 * squared**2 / ((squared + 12194.0**2) * (squared + 20.6**2))  # IEC 61672-1
    weighting = 10**0.1 * weighting / np.sqrt((squared + 107.7**2) * (squared + 737.9**2))
    return 10 * np.log10(max((power @ weighting**2).max(), 1e-8))


def draw_names(rng, sound, num_names):
    """Draw phrases and clauses for a sound in a sentence: caption and plain name more often than the others."""
    caption, category, several = sound
    phrases, clauses = variants(caption, category, several)
    weights = np.array([0.4, 0.25, *[0.35 / (len(phrases) - 2)] * (len(phrases) - 2)])
    phrases = [str(phrase) for phrase in rng.choice(phrases, num_names, p=weights)]
    return phrases, [str(clause) for clause in rng.choice(clauses, num_names)]


TEMPLATES = {  # with phrases a and b, and clauses A and B
    "mixed": (
        "{a} and {b}; {b} and {a}; {a} with {b}; {A} while {B}; {A} and {B}; {a} and {b}; {B} as {A}; {a} while {B}; "
        "the sound of {a} and {b}; {b} and {a} together"
    ),
    "background": (
        "{a} with {b} in the background; {A} with {b} in the background; {a} and {b}; {a} over the sound of {b}; "
        "{a} with {b} in the distance; {a} and, more quietly, {b}; {A} while {B} in the background"
    ),
    "sequence": (
        "{a} followed by {b}; {a}, then {b}; {a} and then {b}; {A}, then {B}; {A}, followed by {b}; {A} and then {B}; "
        "first {a}, then {b}; {b} after {a}"
    ),
}


def write_captions(rng, sounds, relation):
    """Draw 4 to 16 captions for a clip. `sounds` are one or two of `(caption, category, several)`."""
    if len(sounds) == 1:
        captions = widen(*sounds[0])
        phrases, _ = variants(*sounds[0])
        kept = [phrases[0]] * 3 + [phrases[1]] * 2
        return kept + [str(caption) for caption in rng.choice(sorted(set(captions) - set(kept)), 9, replace=False)]
    templates = TEMPLATES[relation].split("; ")
    names = [draw_names(rng, sound, len(templates)) for sound in sounds]
    (a, b), (clauses_a, clauses_b) = zip(*names, strict=True)
    captions = [
        template.format(a=a[i], b=b[i], A=clauses_a[i], B=clauses_b[i]) for i, template in enumerate(templates)
    ]
    captions[0] = templates[0].format(a=sounds[0][0], b=sounds[1][0])
    captions.append(sentence_case(captions[int(rng.integers(len(captions)))]) + ".")
    return captions


def compose(library, index, *, num_samples, seed=0, proportion_mixed=0.3):
    """One training clip.

    Returns:
        `(np.ndarray, dict)`: float32 of shape `(num_samples,)` with a peak of 0.5 to 0.9, and its line of the manifest
        without `location`.
    """
    rng = np.random.default_rng([seed, index])
    categories = [library.draw_category(rng)]
    relation = "single"
    if rng.random() < proportion_mixed:
        relation = str(rng.choice(["mixed", "background", "sequence"], p=[0.4, 0.3, 0.3]))
        if library.pairs and rng.random() < 0.5:
            weights = np.array(list(library.pairs.values()))
            categories = list(list(library.pairs)[rng.choice(len(weights), p=weights / weights.sum())])
            if rng.random() < 0.5:
                categories.reverse()
        else:
            while len(categories) < 2:
                categories = list(dict.fromkeys([*categories, library.draw_category(rng)]))

    if relation == "sequence":
        overlap = int(rng.uniform(0.5, 1.0) * CROSSFADE)
        cut = int(rng.uniform(0.4, 0.6) * num_samples)
        lengths = [cut + overlap // 2, num_samples - cut - overlap // 2 + overlap]
    else:
        lengths = [num_samples] * len(categories)
    drawn = [draw_sound(rng, library, category, length) for category, length in zip(categories, lengths, strict=True)]
    waveform = drawn[0][0]
    if len(drawn) == 2:
        quieter_db = rng.uniform(6, 10) if relation == "background" else 0.0
        gain_db = pressure_level_db(waveform) - pressure_level_db(drawn[1][0]) - quieter_db
        second = drawn[1][0] * np.float32(10 ** (gain_db / 20))
        waveform = join(waveform, second, overlap) if relation == "sequence" else waveform + second
    waveform = waveform * np.float32(rng.uniform(0.5, 0.9) / np.abs(waveform).max())

    sounds = [(caption, category, several) for (_, caption, several), category in zip(drawn, categories, strict=True)]
    return waveform, {"captions": write_captions(rng, sounds, relation), "category": "+".join(categories)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="folder written by examples.sound_library.build")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--seconds", type=float, default=2.56, help="length of a clip (default: 2.56)")
    parser.add_argument("--num_clips", type=int, default=3000, help="number of clips (default: 3000)")
    parser.add_argument(
        "--proportion_mixed", type=float, default=0.3, help="share of clips of two sounds (default: 0.3)"
    )
    parser.add_argument("--split", default="train", help="split of the recordings: train or heldout (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    if not 0.5 <= args.seconds <= 30:
        parser.error(f"--seconds has to be from 0.5 to 30, not {args.seconds:g}")
    if args.num_clips < 1 or args.seed < 0:
        parser.error("--num_clips has to be at least 1 and --seed not negative")
    if not 0 <= args.proportion_mixed <= 1:
        parser.error(f"--proportion_mixed has to be from 0 to 1, not {args.proportion_mixed:g}")
    try:
        library = Library(args.library, args.split)
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        raise SystemExit(f"error: {error}") from None

    args.output.mkdir(parents=True, exist_ok=True)
    settings = {"num_samples": round(args.seconds * SAMPLING_RATE), "seed": args.seed}
    lines = []
    for index in tqdm(range(args.num_clips), desc="Composing", unit="clip"):
        waveform, record = compose(library, index, proportion_mixed=args.proportion_mixed, **settings)
        content = io.BytesIO()
        soundfile.write(content, waveform, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
        location = f"{index:06d}.flac"
        write_atomically(args.output / location, content.getvalue())
        lines.append(json.dumps({"location": location, **record}) + "\n")
    write_atomically(args.output / "data.jsonl", "".join(lines).encode())
    print(f"{args.num_clips} clips and {args.output / 'data.jsonl'}")


if __name__ == "__main__":
    main()
