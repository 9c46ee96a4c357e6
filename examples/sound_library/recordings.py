"""The recordings of the sound library: reading them, their levels, and how often each is drawn."""

import csv
from pathlib import Path

import numpy as np
import soundfile


SAMPLING_RATE = 16000
FADE = 80  # samples: 5 ms, against clicks
BLOCK = 4000  # samples: a quarter of a second

# Drawn twice as often as others: what AudioCaps asks for most, and the categories of the evaluation.
FREQUENT = set(
    "rain thunder wind water fire birds_ambience insects sheep cow horse bee footsteps door bell explosion gunshot "
    "glass metal splash drum machine car airplane train applause laugh baby_cry cat dog duck frog waves leaves siren "
    "car_horn bird".split()
)
# Shares of all sounds that speech and music get; AudioCaps names speech in a third of its captions
FIXED_SHARES = {"speech": 0.14, "music": 0.06}
# Pairs that are plausible together, with weights. Four of ten pairs are drawn from them.
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
    ("speech", "birds_ambience"): 2,
    ("speech", "wind"): 2,
    ("speech", "music"): 2,
    ("speech", "car"): 2,
    ("speech", "machine"): 2,
    ("speech", "dog"): 1,
    ("speech", "crowd"): 1,
    ("speech", "laugh"): 2,
    ("speech", "applause"): 2,
    ("speech", "water"): 1,
    ("speech", "train"): 1,
    ("speech", "airplane"): 1,
    ("speech", "footsteps"): 1,
    ("speech", "door"): 1,
    ("speech", "insects"): 1,
    ("waves", "wind"): 2,
    ("boat", "waves"): 1,
    ("leaves", "birds_ambience"): 1,
    ("horse", "wind"): 1,
    ("dog", "cat"): 1,
    ("music", "applause"): 1,
    ("siren", "car_horn"): 1,
}


class Recordings:
    """The recordings of one split, with the probabilities of drawing them.

    Args:
        rows (`list[dict]`): with `caption`, `category` and `tagger_agrees` of each, as in the manifest.
        waveforms (`list[np.ndarray]`): see [`read_recording`].
        levels (`list[float]`, *optional*): their `pressure_level_db`, where it is known.
    """

    def __init__(self, rows, waveforms, levels=None):
        self.rows, self.waveforms = rows, waveforms
        self.lengths = np.array([len(waveform) for waveform in waveforms])
        self.levels = np.array([pressure_level_db(waveform) for waveform in waveforms] if levels is None else levels)
        self.powers = [block_powers(waveform) for waveform in waveforms]
        # recordings that the tagger did not classify as their category are drawn half as often
        seconds = self.lengths / SAMPLING_RATE
        weights = np.sqrt(seconds) * [0.5 if row["tagger_agrees"] == "no" else 1.0 for row in rows]
        self.indices, self.cumulated, self.alike, shares = {}, {}, {}, {}
        for index, row in enumerate(rows):
            self.indices.setdefault(row["category"], []).append(index)
            self.alike.setdefault((row["category"], row["caption"]), []).append(index)
        for category, indices in sorted(self.indices.items()):
            self.cumulated[category] = np.cumsum(weights[indices]) / weights[indices].sum()
            total = min(seconds[indices].sum(), 100.0)
            shares[category] = 2 * max(total, 20.0) ** 0.5 if category in FREQUENT else max(total, 4.0) ** 0.5
        fixed = {category: share for category, share in FIXED_SHARES.items() if category in shares}
        scale = (1 - sum(fixed.values())) / max(sum(share for c, share in shares.items() if c not in fixed), 1e-9)
        self.categories = list(shares)
        self.shares = np.cumsum([fixed.get(c, share * scale) for c, share in shares.items()])
        pairs = {pair: n for pair, n in LIKELY_PAIRS.items() if all(each in shares for each in pair)}
        self.pairs, self.pair_shares = list(pairs), np.cumsum(list(pairs.values())) if pairs else None

    @classmethod
    def read(cls, folder, split="train"):
        """The recordings of a folder that `examples.sound_library.build` wrote, those of `split` or of "all".

        Raises:
            ValueError: if the split has no recordings, or one is not 16 kHz mono or silent.
            FileNotFoundError: naming a recording that is not in `folder`.
        """
        folder = Path(folder)
        manifest = folder / "manifest.csv"
        manifest = manifest if manifest.is_file() else Path(__file__).with_name("manifest.csv")
        with open(manifest, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if split in ("all", row["split"])]
        if not rows:
            raise ValueError(f"`split` has to be one of the manifest's or 'all', not {split!r}.")
        return cls(rows, [read_recording(folder / row["file"]) for row in rows])

    def draw_category(self, rng):
        return self.categories[min(np.searchsorted(self.shares, rng.random()), len(self.categories) - 1)]

    def draw_categories(self, rng, number):
        """Different ones. Of two, four of ten pairs are likely ones."""
        if number == 2 and self.pairs and rng.random() < 0.4:
            pair = self.pairs[np.searchsorted(self.pair_shares, rng.random() * self.pair_shares[-1])]
            return list(pair if rng.random() < 0.5 else pair[::-1])
        categories = []
        while len(categories) < min(number, len(self.categories)):
            categories = list(dict.fromkeys([*categories, self.draw_category(rng)]))
        return categories

    def draw_recording(self, rng, category):
        """Index of a recording of the category; long ones more often."""
        indices = self.indices[category]
        return indices[min(np.searchsorted(self.cumulated[category], rng.random()), len(indices) - 1)]


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


def pressure_level_db(waveform):
    """A-weighted level of the loudest frame, as in `training.mixing`, which examples may not import."""
    frames = np.pad(waveform, (0, max(-len(waveform) % 1024, 2048 - len(waveform))))
    frames = np.lib.stride_tricks.sliding_window_view(frames, 2048)[::1024]  # (num_frames, 2048)
    power = np.abs(np.fft.rfft(frames * np.hanning(2049)[:-1])) ** 2  # (num_frames, 1025)
    squared = np.fft.rfftfreq(2048, 1 / SAMPLING_RATE) ** 2
    weighting = 12194.0**2 * squared**2 / ((squared + 12194.0**2) * (squared + 20.6**2))  # IEC 61672-1
    weighting = 10**0.1 * weighting / np.sqrt((squared + 107.7**2) * (squared + 737.9**2))
    return 10 * np.log10(max((power @ weighting**2).max(), 1e-8))


def block_powers(waveform):
    """Cumulated power of a recording by quarters of a second, with a zero before."""
    padded = np.pad(waveform, (0, -len(waveform) % BLOCK)).reshape(-1, BLOCK)
    return np.concatenate([[0.0], np.cumsum(np.square(padded, dtype=np.float64).mean(1))])
