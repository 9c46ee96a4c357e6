"""Recordings to evaluate, and the figures of a run of `training.evaluate`."""

import csv
import json
import math
import shutil
from pathlib import Path

import soundfile


ROOT = Path(__file__).parents[1]
NAMES = ("rain", "thunder", "birds", "cow", "saw", "wind")
CAPTIONS = {
    "rain": "rain falls while a dog barks",
    "thunder": "thunder",
    "birds": "birds sing, then a door closes",
    "cow": "a cow",
    "saw": "a saw",
    "wind": "wind before rain",
}


def read_results(folder, table="results"):
    """Rows by system and metric."""
    with open(folder / f"{table}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("value", "low", "high", "difference", "probability_that_system_is_better"):
            if name in row:
                row[name] = float(row[name]) if row[name] else math.nan
    return rows


def value_of(rows, metric, **columns):
    [row] = [row for row in rows if row["metric"] == metric and all(row[k] == v for k, v in columns.items())]
    return row["value"]


def copy_recordings(recordings, folder, sources=NAMES):
    """The recordings as if they had been generated, the sound of `sources[i]` under the i-th name."""
    folder.mkdir()
    for name, source in zip(NAMES, sources, strict=True):
        shutil.copy(recordings.parent / f"{source}.wav", folder / f"{name}.wav")
    return folder


def sounds_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "sounds").rglob("*.wav"))}


def write_recordings(folder):
    """Manifest of six short recordings with captions, a class of the listener as label, and a place."""
    lines = []
    for i, name in enumerate(NAMES):
        waveform, rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=12000)
        soundfile.write(folder / f"{name}.wav", waveform, rate)
        line = {
            "location": f"{name}.wav",
            "captions": CAPTIONS[name],
            "place": "field" if name in ("cow",) else "town",
        }
        lines.append(json.dumps(line | {"labels": f"/m/{i:05d}" + (",/m/00500" if i % 2 else "")}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"
