"""Pack the recordings of the sound library into a folder small enough to send to a machine with a GPU.

    python -m examples.sound_library.pack LIBRARY OUT

The recordings, trimmed and normalised, follow each other in Opus files of four minutes; `index.json` has caption,
category, split, level and place of each. Of music the middle 36 s are kept. All 217 minutes take about 35 MB. Needs
the extra `train`.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from examples.sound_library.recordings import SAMPLING_RATE, Recordings
from pipeline_tango.sound_files import write_atomically


KBIT_PER_S = {"speech": 18, "music": 24, "effects": 32}
MAX_MUSIC_IN_S = 36
FILE_LENGTH_IN_S = 240
GAP = 320  # samples between two recordings
PEAK = 0.89  # Opus overshoots


def write_opus(path, waveform, kbit_per_s):
    # libsndfile maps this level to 6 to 256 kbit/s
    level = 1 - (kbit_per_s - 6) / 250
    with soundfile.SoundFile(path, "w", SAMPLING_RATE, 1, "OPUS", format="OGG", compression_level=level) as file:
        for start in range(0, len(waveform), SAMPLING_RATE):
            file.write(waveform[start : start + SAMPLING_RATE])


def pack(recordings, output):
    """Write the Opus files and `index.json`."""
    output.mkdir(parents=True, exist_ok=True)
    files, index = {}, []  # parts of each Opus file by its name
    for kind in KBIT_PER_S:
        number = length = 0
        for row, waveform, level in zip(recordings.rows, recordings.waveforms, recordings.levels, strict=True):
            category = row["category"]
            if (category if category in KBIT_PER_S else "effects") != kind:
                continue
            if kind == "music":
                start = max(len(waveform) - MAX_MUSIC_IN_S * SAMPLING_RATE, 0) // 2
                waveform = waveform[start : start + MAX_MUSIC_IN_S * SAMPLING_RATE]
            if length > FILE_LENGTH_IN_S * SAMPLING_RATE:
                number, length = number + 1, 0
            name = f"{kind}-{number:02d}.opus"
            entry = {key: row[key] for key in ("file", "caption", "category", "split", "tagger_agrees")}
            place = {"opus": name, "start": length, "length": len(waveform), "level": round(float(level), 2)}
            index.append(entry | place)
            files.setdefault(name, []).extend([PEAK * waveform, np.zeros(GAP, np.float32)])
            length += len(waveform) + GAP
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(write_opus, output / name, np.concatenate(parts), KBIT_PER_S[name.split("-")[0]])
            for name, parts in files.items()
        ]
        for job in jobs:
            job.result()
    write_atomically(output / "index.json", json.dumps(index).encode())
    return index


def read_packed(folder, max_recordings=None):
    """All recordings of a packed folder: int16 samples, one after the other, and the rows of the index, each with its
    `offset` in them.

    Args:
        max_recordings (`int`, *optional*): read about so many, evenly spaced.
    """
    folder = Path(folder)
    index = json.loads((folder / "index.json").read_text())
    if max_recordings:
        index = index[:: max(len(index) // max_recordings, 1)]
    names = sorted({row["opus"] for row in index})

    def read(name):
        samples, sampling_rate = soundfile.read(folder / name, dtype="int16")
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"{folder / name} has to be at {SAMPLING_RATE} Hz, not {sampling_rate}.")
        return samples

    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(read, names), strict=True))
    parts, offset = [], 0
    for row in index:
        part = files[row["opus"]][row["start"] : row["start"] + row["length"]]
        parts.append(np.pad(part, (0, row["length"] - len(part))))
        row["offset"] = offset
        offset += row["length"]
    return np.concatenate(parts), index


def recordings_of(samples, index, split):
    """The `Recordings` of one split of a packed folder, or None if there are none."""
    rows = [row for row in index if row["split"] == split]
    waveforms = [samples[row["offset"] : row["offset"] + row["length"]] for row in rows]
    return Recordings(rows, waveforms, [row["level"] for row in rows]) if rows else None


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path, help="folder written by examples.sound_library.build")
    parser.add_argument("output", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    try:
        recordings = Recordings.read(args.library, "all")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    index = pack(recordings, args.output)
    size = sum(path.stat().st_size for path in args.output.iterdir())
    print(f"{len(index)} recordings, {size / 1e6:.1f} MB: {args.output}")


if __name__ == "__main__":
    main()
