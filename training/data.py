"""From a manifest to waveforms and captions: reading, checking, cropping."""

import csv
import functools
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate.logging import get_logger
from scipy.signal import resample_poly
from tqdm.auto import tqdm

from pipeline_tango.sound_files import open_sound


logger = get_logger(__name__)

AUDIO_COLUMNS = ("location", "file_name", "audio", "path")
CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")
SILENCE = 1e-4  # a sound whose peak is lower counts as silent: three steps of 16-bit audio
SEEK_MARGIN = 2**16  # frames decoded before a part: libsndfile seeks a block too far in an Ogg file's last page
CROPS = ("random", "head")


@dataclass(frozen=True)
class Clip:
    """A sound file and its captions.

    Args:
        read (`Callable[[], bytes]`, *optional*): gives the bytes of the file if they are stored elsewhere, for
            example in a row of a data set. `path` is then only a name.
    """

    path: str
    captions: tuple[str, ...]
    read: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    def open(self):
        """The file, opened for reading bytes."""
        return open(self.path, "rb") if self.read is None else io.BytesIO(self.read())

    @contextmanager
    def decode(self):
        """The file as a `soundfile.SoundFile`. What cannot be decoded is a ValueError that names the clip."""
        with self.open() as stream, open_sound(stream, self.path) as file:
            yield file


@dataclass(frozen=True)
class Fault:
    """Why a clip cannot be used."""

    path: str
    reason: str
    detail: str = ""


# Manifests


def read_manifest(path, *, audio_column=None, caption_column=None, audio_root=None):
    """Clips of a manifest, in its order. The sounds themselves are not read: see `inspect_clips`.

    Args:
        path (`str` or `Path`): a `.csv` file with a header, a file of one JSON object per line (any other name), or a
            folder that holds `metadata.csv` or `metadata.jsonl`.
        audio_column, caption_column (`str`, *optional*): by default the first present of `AUDIO_COLUMNS` and of
            `CAPTION_COLUMNS`. In JSON a caption may be a list of captions.
        audio_root (`str` or `Path`, *optional*): what relative paths start from; by default the manifest's folder.

    Raises:
        ValueError: naming file and line, if a line cannot be parsed, a column is missing, a path is empty or no text,
            or a caption is no text. Empty captions are left to `inspect_clips`.
        FileNotFoundError: if there is no such manifest.
    """
    path = Path(path)
    if path.is_dir():
        names = [path / "metadata.csv", path / "metadata.jsonl"]
        path = next((name for name in names if name.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"No metadata.csv or metadata.jsonl in the folder {names[0].parent}.")
    root = path.parent if audio_root is None else audio_root
    clips = []
    for number, record in (csv_records if path.suffix.lower() == ".csv" else json_records)(path):
        try:
            location = record[find_column(record, audio_column, AUDIO_COLUMNS)]
            captions = as_captions(record[find_column(record, caption_column, CAPTION_COLUMNS)])
            if not isinstance(location, str) or not location.strip():
                raise ValueError(f"the path of the sound must be text, got {location!r:.80}")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}.") from None
        clips.append(Clip(os.path.join(root, location), captions))
    if not clips:
        raise ValueError(f"{path} lists no sounds.")
    return clips


def json_records(path):
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line = line.decode("utf-8-sig")
                record = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
            if not line.strip():
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, got {line.strip():.80}.")
            yield number, record


def csv_records(path):
    try:
        rows = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}).") from None
    try:
        for record in rows:
            if None in record or None in record.values():
                raise ValueError(f"{path}, line {rows.line_num}: expected {len(rows.fieldnames)} fields.")
            yield rows.line_num, record
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num}: not CSV ({error}).") from None


def find_column(names, column, candidates):
    """`column` if given, else the first of `candidates` that is among `names`."""
    found = next((name for name in candidates if name in names), None) if column is None else column
    if found not in names:
        wanted = f"no column {column!r}" if column else f"none of the columns {', '.join(candidates)}"
        raise ValueError(f"{wanted}, only {', '.join(map(repr, names))}")
    return found


def as_captions(captions):
    """A caption or a list of captions as a tuple, which is empty for what other programs write where there is none."""
    if captions is None or isinstance(captions, float) and math.isnan(captions):
        return ()
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"captions must be text or a list of texts, got {captions!r:.80}")
    return tuple(captions)


def has_caption(captions):
    return len(captions) > 0 and all(caption.strip() for caption in captions)


def read_dataset(name, split="train", *, audio_column=None, caption_column=None):
    """Clips of a `datasets` data set. Nothing is decoded before a clip is read, and soundfile decodes it.

    Args:
        name (`str`): as for `datasets.load_dataset`, or a folder made by `save_to_disk`.
        audio_column (`str`, *optional*): holds `Audio`, paths, or `{"array": ..., "sampling_rate": ...}` with
            arrays of shape `(num_samples,)` or `(channels, num_samples)`.

    Raises:
        ValueError: if a column is missing or a caption is no text. Empty captions are left to `inspect_clips`.
    """
    import datasets

    if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
        dataset = datasets.load_from_disk(name)
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"`split` must be one of {', '.join(dataset)} for {name}, got {split!r}.")
            dataset = dataset[split]
    else:
        dataset = datasets.load_dataset(name, split=split)
    try:
        audio_column = find_column(dataset.column_names, audio_column, AUDIO_COLUMNS)
        captions = dataset[find_column(dataset.column_names, caption_column, CAPTION_COLUMNS)]
        captions = [as_captions(texts) for texts in captions]
    except ValueError as error:
        raise ValueError(f"{name} ({split}): {error}.") from None
    dataset = dataset.select_columns([audio_column])
    if isinstance(dataset.features[audio_column], datasets.Audio):
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    read = functools.partial(read_row, dataset, audio_column)
    return [Clip(f"{name}/{split}/{row}", texts, functools.partial(read, row)) for row, texts in enumerate(captions)]


def read_row(dataset, audio_column, row):
    import soundfile

    audio = dataset[row][audio_column]
    audio = {"path": audio} if isinstance(audio, str) else audio or {}
    if audio.get("array") is not None:
        file = io.BytesIO()
        soundfile.write(file, np.asarray(audio["array"]).T, audio["sampling_rate"], format="WAV", subtype="DOUBLE")
        return file.getvalue()
    if audio.get("bytes") is not None:
        return audio["bytes"]
    if audio.get("path") is None:
        raise FileNotFoundError(f"Row {row} holds no sound.")
    return Path(audio["path"]).read_bytes()


def select_clips(clips, max_train_samples, seed):
    """`max_train_samples` of the clips in a shuffled order, always the same ones for a seed."""
    return [clips[index] for index in np.random.default_rng(seed).permutation(len(clips))[:max_train_samples]]


# Faults


def inspect_clips(clips, *, min_length_in_s=0.0, num_workers=0):
    """Decode every clip once to find those that cannot be trained on.

    Args:
        num_workers (`int`): number of threads; soundfile decodes outside of Python's lock.

    Returns:
        `(list[Clip], list[Fault])`: the good clips in their order, and one fault for each of the others. The reasons
        are "no caption", "missing", "empty", "unreadable", "not finite", "too short", "silent" and "channels cancel".
    """
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        faults = pool.map(functools.partial(find_fault, min_length_in_s=min_length_in_s), clips)
        faults = list(tqdm(faults, total=len(clips), desc="Checking sounds", disable=None))
    good = [clip for clip, fault in zip(clips, faults, strict=True) if fault is None]
    return good, [fault for fault in faults if fault is not None]


def find_fault(clip, min_length_in_s):
    if not has_caption(clip.captions):
        return Fault(clip.path, "no caption")
    num_frames, total, low, high = 0, 0.0, math.inf, -math.inf
    channel_low, channel_high = math.inf, -math.inf
    try:
        with clip.open() as stream:
            if not stream.read(1):
                return Fault(clip.path, "empty", "0 bytes")
        with clip.decode() as file:
            while len(frames := file.read(2**16, dtype="float32", always_2d=True)):
                block = to_mono(frames)
                if not np.isfinite(block).all():
                    return Fault(clip.path, "not finite", f"near {num_frames / file.samplerate:.2f} s")
                num_frames += len(block)
                total += float(block.sum(dtype=np.float64))
                low, high = min(low, float(block.min())), max(high, float(block.max()))
                if file.channels > 1:
                    channel_low = np.minimum(channel_low, frames.min(axis=0))
                    channel_high = np.maximum(channel_high, frames.max(axis=0))
    except FileNotFoundError:
        return Fault(clip.path, "missing")
    except (OSError, ValueError) as error:  # ValueError also: a name that no file can have
        return Fault(clip.path, "unreadable", getattr(error, "reason", str(error)))
    if file.frames == 0:
        return Fault(clip.path, "empty", "0 samples")
    if num_frames < file.frames:
        return Fault(clip.path, "unreadable", f"{num_frames} of {file.frames} samples can be decoded")
    length_in_s = num_frames / file.samplerate
    if length_in_s < min_length_in_s:
        return Fault(clip.path, "too short", f"{length_in_s:.3f} s of at least {min_length_in_s:g} s")
    mean = total / num_frames
    if max(high - mean, mean - low) < SILENCE:
        channel_peak = float(np.max(channel_high - channel_low)) / 2
        if channel_peak >= file.channels * SILENCE:  # more than averaging takes from a channel beside silent ones
            detail = f"the {file.channels} channels, of peak {channel_peak:.2g}, cancel each other when averaged"
            return Fault(clip.path, "channels cancel", detail)
        return Fault(clip.path, "silent", f"peak {max(high - mean, mean - low):.1e}")
    return None


def format_report(faults, num_clips):
    """Counts by reason, then a line for each fault."""
    counts = Counter(fault.reason for fault in faults)
    lines = [f"{len(faults)} of {num_clips} sounds cannot be used."]
    lines += [f"{count:8d} {reason}" for reason, count in counts.most_common()]
    for reason, _ in counts.most_common():
        for fault in faults:
            if fault.reason == reason:
                lines.append(f"{reason}: {fault.path}" + (f" ({fault.detail})" if fault.detail else ""))
    return "\n".join(lines)


def write_report(faults, num_clips, path):
    """Write the report as JSON if `path` ends in `.json`, else as the text of `format_report`."""
    path = Path(path)
    if path.suffix == ".json":
        counts = Counter(fault.reason for fault in faults)
        report = {"num_clips": num_clips, "counts": counts, "faults": [asdict(fault) for fault in faults]}
        text = json.dumps(report, indent=2)
    else:
        text = format_report(faults, num_clips)
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")  # a name may hold lone surrogates


# Waveforms


def to_mono(frames):
    return sum(frames.T) / frames.shape[1]  # ten times as fast as frames.mean(axis=1)


def resampling_ratio(file, sampling_rate):
    divisor = math.gcd(sampling_rate, file.samplerate)
    return sampling_rate // divisor, file.samplerate // divisor


def count_samples(clip, sampling_rate):
    """Length in samples of the whole clip as `read_waveform` returns it, from the file's header."""
    with clip.decode() as file:
        up, down = resampling_ratio(file, sampling_rate)
        return math.ceil(file.frames * up / down)


def read_waveform(clip, sampling_rate, start=0, num_samples=None):
    """A clip or a part of it as mono at `sampling_rate`.

    Channels are averaged; the original keeps the first and loses what only the others hold. A part equals that part of
    the whole clip: only `SEEK_MARGIN` frames before it and what the resampling filter reaches are decoded with it.

    Args:
        start, num_samples (`int`): the part, in samples at `sampling_rate`; by default all of it.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`, float32, at the file's own level; shorter where the file ends.

    Raises:
        ValueError: naming the clip, if it cannot be decoded.
        OSError: if the file cannot be opened.
    """
    with clip.decode() as file:
        up, down = resampling_ratio(file, sampling_rate)
        reach = 10 // min(up, down) + 1  # in blocks of `down` frames, which give `up` samples
        first = max(start // up - max(reach, math.ceil(SEEK_MARGIN / down)), 0)
        last = math.ceil(file.frames / down)
        if num_samples is not None:
            last = min(last, math.ceil((start + num_samples) / up) + reach)
        first = min(first, last)
        if file.seekable():
            file.seek(min(first * down, file.frames))
        else:  # GSM: what lies before has to be decoded
            file.read(first * down)
        waveform = to_mono(file.read((last - first) * down, dtype="float32", always_2d=True))
    if up != down and len(waveform):
        waveform = resample_poly(waveform, up, down)
    start -= first * up
    waveform = waveform[start:] if num_samples is None else waveform[start : start + num_samples]
    return torch.from_numpy(waveform.copy())


def is_silent(waveform):
    return bool((waveform - waveform.mean()).abs().max() < SILENCE)


def normalise(waveform, num_samples):
    """The level that the VAE was trained on: mean removed, cut or padded with zeros at the end, peak 0.5.

    As in the original the mean and a first peak are those of all that is given, and the kept part is scaled again.
    Unlike there, silence (nowhere `SILENCE` from its own mean) is not scaled: no division 0/0, no amplified noise.

    Args:
        waveform (`torch.Tensor` of shape `(any_num_samples,)`)

    Returns:
        `torch.Tensor` of shape `(num_samples,)`

    Raises:
        ValueError: if `waveform` is empty or holds NaN or infinity.
    """
    if not len(waveform) or not waveform.isfinite().all():
        raise ValueError("`waveform` must hold at least one sample and only finite ones.")
    waveform = waveform - waveform.mean()
    if not is_silent(waveform):
        waveform = 0.5 * waveform / (waveform.abs().max() + 1e-8)
    waveform = torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))  # negative padding cuts
    return waveform if is_silent(waveform) else 0.5 * waveform / waveform.abs().max()


class ClipDataset(torch.utils.data.Dataset):
    """Normalised waveforms with a caption each. Items are asked for by `(epoch, index)`: see `EpochSampler`.

    Which caption and which part of a sound come from `(seed, epoch, index)` alone, so they are the same for any number
    of processes and workers, and after a resume.

    Args:
        num_samples (`int`): length of every item at `sampling_rate`. Shorter sounds are padded with zeros at the end.
        crop (`str`): what is kept of longer sounds. "head" is the original's: the whole file is read, its mean removed
            and its start kept. "random" reads a part and removes the mean of that part; a part that is silent is drawn
            again, up to three times.

    An item is `{"waveform": (num_samples,), "caption": str, "index": int, "epoch": int}`.
    """

    def __init__(self, clips, *, sampling_rate, num_samples, crop="random", seed=0):
        if crop not in CROPS:
            raise ValueError(f"`crop` must be one of {', '.join(CROPS)}, got {crop!r}.")
        if num_samples < 1:
            raise ValueError(f"`num_samples` must be at least 1, got {num_samples}.")
        if seed < 0:
            raise ValueError(f"`seed` must not be negative, got {seed}.")
        self.clips = clips
        self.sampling_rate = sampling_rate
        self.num_samples = num_samples
        self.crop = crop
        self.seed = seed

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, index = key
        clip = self.clips[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        caption = clip.captions[rng.integers(len(clip.captions))]
        num_spare = 0 if self.crop == "head" else count_samples(clip, self.sampling_rate) - self.num_samples
        if num_spare <= 0:
            waveform = read_waveform(clip, self.sampling_rate)
        else:
            for _ in range(4):
                start = int(rng.integers(num_spare + 1))
                waveform = read_waveform(clip, self.sampling_rate, start, self.num_samples)
                if not is_silent(waveform):
                    break
        try:
            waveform = normalise(waveform, self.num_samples)
        except ValueError as error:
            raise ValueError(f"{clip.path}: {error}") from None
        return {"waveform": waveform, "caption": caption, "index": index, "epoch": epoch}


# What a run trains on


@dataclass(frozen=True)
class ClipSources:
    """Where the clips of a run come from and which of them are used; the fields are flags of the training scripts."""

    train_manifest: str | None
    validation_manifest: str | None
    dataset_name: str | None
    dataset_split: str
    audio_column: str | None
    caption_column: str | None
    audio_root: str | None
    min_length_in_s: float
    on_bad_data: str
    max_train_samples: int | None

    def read(self):
        """Clips by use, `"train"` and, if there is a manifest for it, `"validation"`."""
        columns = {"audio_column": self.audio_column or None, "caption_column": self.caption_column or None}
        if self.dataset_name:
            clips = {"train": read_dataset(self.dataset_name, self.dataset_split, **columns)}
        else:
            clips = {"train": read_manifest(self.train_manifest, audio_root=self.audio_root, **columns)}
        if self.validation_manifest is not None:
            clips["validation"] = read_manifest(self.validation_manifest, audio_root=self.audio_root, **columns)
        return clips


def prepare_clips(sources, accelerator, output_dir, num_workers, seed):
    """Training and validation clips of `ClipSources`, after every file was decoded once: see `usable_clips`."""
    result = {"validation": []}
    for use, clips in sources.read().items():
        result[use] = usable_clips(use, clips, sources, accelerator, output_dir, num_workers)
    if sources.max_train_samples and sources.max_train_samples < len(result["train"]):
        result["train"] = select_clips(result["train"], sources.max_train_samples, seed)
    return result["train"], result["validation"]


def usable_clips(use, clips, sources, accelerator, output_dir, num_workers):
    """Those of the clips for `use` that can be trained on. A report of the others goes to `output_dir`; with
    `on_bad_data` `"refuse"` it is a ValueError."""
    good, faults = inspect_clips(clips, min_length_in_s=sources.min_length_in_s, num_workers=num_workers)
    report = format_report(faults, len(clips))
    if faults and accelerator.is_main_process:
        path = output_dir / f"bad_{use}_data.json"
        write_report(faults, len(clips), path)
        logger.warning(f"{use} data: {report}\n(also in {path})")
    if faults and sources.on_bad_data == "refuse":
        raise ValueError(f"{use} data: {report}")
    if not good:
        raise ValueError(f"{use} data: nothing is left. {report}")
    return good
