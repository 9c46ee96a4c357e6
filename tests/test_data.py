import csv
import io
import json
import math
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDENS, golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.signal import correlate
from torch.utils.data import DataLoader

from training.batches import EpochSampler
from training.data import (
    Clip,
    ClipDataset,
    Fault,
    count_samples,
    format_report,
    inspect_clips,
    normalise,
    read_dataset,
    read_manifest,
    read_waveform,
    select_clips,
    write_report,
)


ROOT = Path(__file__).parents[1]
WAV = GOLDENS / "golden" / "wav"


def clip(path, *captions):
    return Clip(str(path), captions or ("a sound",))


def noise(num_frames, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (num_frames, channels)).astype(np.float32)


def write(path, waveform, sampling_rate=16000, **kwargs):
    soundfile.write(path, waveform, sampling_rate, **kwargs)
    return clip(path)


def write_lines(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


# Manifests


def test_json_lines_of_the_original_are_read(tmp_path):
    path = write_lines(
        tmp_path / "train.json",
        {"dataset": "x", "location": "a.wav", "captions": "a dog"},
        "",
        {"dataset": "x", "location": "/elsewhere/b.wav", "captions": ["a cat", "a cat meows\u2028twice"]},
    )
    expected = [clip(tmp_path / "a.wav", "a dog"), clip("/elsewhere/b.wav", "a cat", "a cat meows\u2028twice")]
    assert read_manifest(path) == expected
    assert read_manifest(path, audio_root="/sounds")[0].path == "/sounds/a.wav"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_manifest(path) == expected


def test_csv_columns_are_found_or_given(tmp_path):
    path = tmp_path / "data.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["file", "text", "label"], ["a.wav", 'rain, "heavy"\nand wind', "rain"]])
    assert read_manifest(path, audio_column="file") == [clip(tmp_path / "a.wav", 'rain, "heavy"\nand wind')]
    assert read_manifest(path, audio_column="file", caption_column="label") == [clip(tmp_path / "a.wav", "rain")]
    with pytest.raises(ValueError, match=r"data.csv, line 3: no column 'sound', only 'file', 'text', 'label'"):
        read_manifest(path, audio_column="sound")
    with pytest.raises(ValueError, match="none of the columns location, file_name"):
        read_manifest(path)


@pytest.mark.parametrize("name, text", [("metadata.csv", "file_name,text\nx/a.flac,wind\n"), ("metadata.jsonl", None)])
def test_a_folder_with_metadata_is_read(tmp_path, name, text):
    (tmp_path / name).write_text(text or json.dumps({"file_name": "x/a.flac", "text": "wind"}))
    assert read_manifest(tmp_path) == [clip(tmp_path / "x/a.flac", "wind")]


def test_a_manifest_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata"):
        read_manifest(tmp_path)
    for name in ("none.json", "none.csv"):
        with pytest.raises(FileNotFoundError, match=name):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"location": "a.wav"', "not JSON"),
        ("[" * 100000, "not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"captions": "x"}', "none of the columns location"),
        ('{"location": "a.wav", "label": "x"}', "none of the columns captions"),
        ('{"location": "a.wav", "captions": 3}', "captions must be text or a list of texts, got 3"),
        ('{"location": "a.wav", "captions": [null]}', "captions must be text"),
        ('{"location": null, "captions": "x"}', "the path of the sound must be text, got None"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write_lines(tmp_path / "data.jsonl", {"location": "a.wav", "captions": "x"}, "", line)
    with pytest.raises(ValueError, match=rf"data.jsonl, line 3: {message}"):
        read_manifest(path)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"location,captions\na.wav\n", "line 2: expected 2 fields"),
        (b"location,captions\na.wav,x,y\n", "line 2: expected 2 fields"),
        (b"location,captions\na.wav," + b"x" * 200000, "line 2: not CSV"),
        (b"location,captions\na.wav,\xff\n", "not UTF-8"),
        (b"location,captions\n", "lists no sounds"),
        (b"", "lists no sounds"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path, text, message):
    (tmp_path / "data.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path / "data.csv")


@pytest.mark.parametrize(
    "name, text",
    [
        ("data.jsonl", '{"location": "a.wav", "captions": ""}'),
        ("data.jsonl", '{"location": "a.wav", "captions": []}'),
        ("data.jsonl", '{"location": "a.wav", "captions": ["x", "  "]}'),
        ("data.jsonl", '{"location": "a.wav", "captions": null}'),
        ("data.jsonl", '{"location": "a.wav", "captions": NaN}'),
        ("data.csv", "location,captions\na.wav,\n"),
    ],
)
def test_an_empty_caption_is_a_fault_of_its_sound_and_not_of_the_manifest(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    [clip] = read_manifest(tmp_path / name)
    assert clip.path == str(tmp_path / "a.wav")
    assert inspect_clips([clip]) == ([], [Fault(clip.path, "no caption")])


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["location", "captions"]), values),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80)
    | st.text(alphabet='abc",\n\r\0\u2028{}[]:é ', max_size=40).map(lambda text: f"location,captions\n{text}".encode())
    | st.lists(JSON, max_size=3).map(lambda records: "\n".join(map(json.dumps, records)).encode()),
    name=st.sampled_from(["fuzz.jsonl", "fuzz.csv"]),
)
def test_any_bytes_are_clips_or_a_value_error(tmp_path, data, name):
    path = tmp_path / name
    path.write_bytes(data)
    try:
        clips = read_manifest(path)
    except ValueError as error:
        assert name in str(error)
    else:
        assert clips and all(isinstance(text, str) for clip in clips for text in clip.captions)
        empty = [clip for clip in clips if not clip.captions or not all(text.strip() for text in clip.captions)]
        assert inspect_clips(empty)[1] == [Fault(clip.path, "no caption") for clip in empty]


LOCATIONS = st.sampled_from(["good.wav", "bad.wav", "none.wav", "", " ", "a\0b.wav", "x" * 300, ".", "\ud800.wav"])
TEXTS = st.sampled_from(["rain", "", " \t", "\u2028", "\ud800", '"', ",", "x" * 2000, "\n"]) | st.text(max_size=4)
ROWS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "location": LOCATIONS | JSON,
            "file_name": LOCATIONS,
            "captions": TEXTS | st.lists(TEXTS, max_size=3) | JSON,
            "caption": TEXTS | st.none(),
            "other": JSON,
        },
    ),
    max_size=4,
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, name=st.sampled_from(["fuzz.jsonl", "fuzz.csv"]))
def test_any_rows_are_good_clips_or_named_faults_or_a_value_error(tmp_path, rows, name):
    """As many good clips and faults as clips; what is good has a sound and captions, and each fault has its name."""
    if not (tmp_path / "good.wav").exists():
        soundfile.write(tmp_path / "good.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 400), 16000)
        (tmp_path / "bad.wav").write_bytes(b"RIFF")
    if name.endswith(".csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["location", "captions", "other"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        (tmp_path / name).write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    else:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    try:
        clips = read_manifest(tmp_path / name)
    except ValueError as error:
        assert name in str(error)
        return
    good, faults = inspect_clips(clips)
    assert len(good) + len(faults) == len(clips)
    assert all(Path(clip.path).name == "good.wav" and all(map(str.strip, clip.captions)) for clip in good)
    assert {fault.path for fault in faults} <= {clip.path for clip in clips}
    assert all(fault.reason in ("no caption", "missing", "unreadable", "empty") for fault in faults)
    write_report(faults, len(clips), tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["num_clips"] == len(clips)


# Data sets by name


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def audio_dataset(datasets):
    file = io.BytesIO()
    soundfile.write(file, noise(8000, 2), 8000, format="FLAC")
    path = datasets.Value("string")
    encoded = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": path}, "caption": datasets.Value("string")}
    )
    rows = {
        "audio": [{"bytes": file.getvalue(), "path": "x.flac"}, {"bytes": b"", "path": None}, None],
        "caption": ["a", "b", " "],
    }
    dataset = datasets.Dataset.from_dict(rows, features=encoded)
    return dataset.cast_column("audio", datasets.Audio())


@pytest.mark.parametrize("layout", ["dataset", "splits", "parquet"])
def test_a_data_set_is_read_without_its_own_decoder(datasets, tmp_path, layout):
    folder = tmp_path / "set"
    dataset = audio_dataset(datasets)
    if layout == "dataset":
        dataset.save_to_disk(folder)
    elif layout == "splits":
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder)
    else:
        folder.mkdir()
        dataset.to_parquet(folder / "train.parquet")
    clips = read_dataset(str(folder), "train")
    assert [clip.path for clip in clips] == [f"{folder}/train/{row}" for row in range(3)]
    clips = pickle.loads(pickle.dumps(clips))  # as for a spawned worker
    expected = read_waveform(write(tmp_path / "same.flac", noise(8000, 2), 8000), 16000)
    assert torch.equal(read_waveform(clips[0], 16000), expected)
    good, faults = inspect_clips(clips)
    assert good == clips[:1] and [fault.reason for fault in faults] == ["empty", "no caption"]
    _, faults = inspect_clips([Clip(clips[2].path, ("text",), clips[2].read)])
    assert faults[0].reason == "missing"
    with pytest.raises(ValueError, match="no column 'sound', only 'audio', 'caption'"):
        read_dataset(str(folder), "train", audio_column="sound")
    if layout != "dataset":
        with pytest.raises(ValueError, match="test"):
            read_dataset(str(folder), "test")


def test_a_data_set_may_hold_paths_or_arrays(datasets, tmp_path):
    wave = noise(4000, 2)
    single = write(tmp_path / "a.wav", wave, subtype="FLOAT")
    paths = {"location": [single.path], "captions": [["one", "two"]]}
    arrays = {"location": [{"array": wave.T.tolist(), "sampling_rate": 16000}], "captions": [["one", "two"]]}
    for name, columns in (("paths", paths), ("arrays", arrays)):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
        clips = read_dataset(str(tmp_path / name))
        assert clips[0].captions == ("one", "two")
        assert torch.equal(read_waveform(clips[0], 16000), read_waveform(single, 16000))


# Waveforms


@pytest.mark.parametrize("name, suffix", [("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg")])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_a_sine_keeps_frequency_and_level_at_any_rate_and_format(tmp_path, name, suffix, rate):
    seconds = np.arange(rate) / rate
    sine = 0.4 * np.sin(2 * np.pi * 1000 * seconds)
    waveform = read_waveform(write(tmp_path / f"a.{suffix}", np.stack([sine, sine], 1), rate, format=name), 16000)
    assert waveform.dtype == torch.float32 and waveform.shape == (16000,)
    expected = 0.4 * torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)
    assert (waveform - expected)[500:-500].abs().max() < (0.05 if suffix == "ogg" else 2e-3)


def test_channels_are_averaged(tmp_path):
    waves = noise(1000, 3)
    waveform = read_waveform(write(tmp_path / "a.wav", waves, subtype="FLOAT"), 16000)
    assert np.allclose(waveform, waves.mean(axis=1), atol=1e-7)


@pytest.mark.parametrize(
    "suffix, rate", [("wav", 16000), ("wav", 11025), ("flac", 44100), ("flac", 8000), ("ogg", 22050), ("mp3", 44100)]
)
def test_a_part_equals_that_part_of_the_whole(tmp_path, suffix, rate):
    sound = write(tmp_path / f"a.{suffix}", noise(7 * rate + 17, 2), rate)
    whole = read_waveform(sound, 16000)
    assert len(whole) == count_samples(sound, 16000) == math.ceil((7 * rate + 17) * 16000 / rate)
    for start, num_samples in ((0, 999), (70001, 8000), (len(whole) - 700, 700), (len(whole) - 5, 99), (10**6, 9)):
        part = read_waveform(sound, 16000, start, num_samples)
        expected = whole[start : start + num_samples]
        assert part.shape == expected.shape and torch.allclose(part, expected, atol=1e-6)


def test_a_part_of_a_long_file_is_not_paid_for_with_all_of_it(tmp_path):
    long = tmp_path / "long.flac"
    with soundfile.SoundFile(long, "w", 16000, 1) as file:
        for second in range(600):
            file.write(noise(16000, seed=second))
    start = time.process_time()
    read_waveform(clip(long), 16000)
    whole_in_s = time.process_time() - start
    start = time.process_time()
    read_waveform(clip(long), 16000, 8_000_000, 16000)
    assert time.process_time() - start < whole_in_s / 4


def test_what_cannot_be_decoded_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    for name in ("text.wav", "a.raw"):
        for read in (read_waveform, count_samples):
            with pytest.raises(ValueError, match=name):
                read(clip(tmp_path / name), 16000)


def test_normalised_files_are_the_originals():
    expected = golden("mel")
    for row, name in enumerate(("a.wav", "b.wav")):  # one is cut, the other padded
        waveform = normalise(read_waveform(clip(WAV / name), 16000), 40960)
        assert torch.equal(waveform[:1000], expected["waveform_256_first_1000"][row])
        assert torch.equal(waveform[31500:32500], expected["waveform_256_samples_31500_to_32500"][row])


def test_resampling_is_near_the_originals(tmp_path):
    waves, rate = soundfile.read(WAV / "c_44k_stereo.wav", dtype="float32")
    first_channel = write(tmp_path / "c.wav", waves[:, 0], rate, subtype="FLOAT")
    waveform = normalise(read_waveform(first_channel, 16000), 10240)
    expected = golden("mel")["waveform_c_64"][0]
    assert 10 * torch.log10(expected.square().sum() / (waveform - expected).square().sum()) > 70  # measured 78.5 dB


def test_normalise_keeps_silence_and_refuses_nan():
    silence = normalise(torch.full((100,), 0.3), 200)
    assert silence.shape == (200,) and silence.abs().max() < 1e-6
    quiet_start = torch.cat([torch.zeros(100), torch.tensor(noise(100)[:, 0])])  # its mean is not that of its start
    assert normalise(quiet_start, 50).abs().max() < 0.05
    assert normalise(quiet_start, 150).abs().max() == 0.5
    for bad in (torch.tensor([0.0, float("nan")]), torch.tensor([float("inf")]), torch.zeros(0)):
        with pytest.raises(ValueError, match="`waveform`"):
            normalise(bad, 10)


# Faults


def test_every_fault_is_found_and_named(tmp_path):
    good = [write(tmp_path / "good.flac", noise(16000)), write(tmp_path / "good.ogg", noise(8000, 2), 44100)]
    nan = noise(100000)
    nan[90000] = np.nan
    write(tmp_path / "cut.flac", noise(64000))
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    write(tmp_path / "cut.mp3", noise(64000))
    data = (tmp_path / "cut.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(data[: len(data) // 2])
    (tmp_path / "zero.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "folder.wav").mkdir()
    bad = [
        (clip(tmp_path / "none.wav"), "missing"),
        (clip(tmp_path / "zero.wav"), "empty"),
        (write(tmp_path / "header.wav", noise(0)), "empty"),
        (clip(tmp_path / "text.wav"), "unreadable"),
        (clip(tmp_path / "folder.wav"), "unreadable"),
        (clip("\0.wav"), "unreadable"),
        (clip("\ud800.wav"), "unreadable"),
        (clip(tmp_path / "cut.flac"), "unreadable"),
        (clip(tmp_path / "cut.mp3"), "unreadable"),
        (write(tmp_path / "nan.wav", nan, subtype="FLOAT"), "not finite"),
        (write(tmp_path / "inf.wav", np.full(9000, np.inf), subtype="FLOAT"), "not finite"),
        (write(tmp_path / "short.wav", noise(799)), "too short"),
        (write(tmp_path / "silent.wav", np.zeros(16000)), "silent"),
        (write(tmp_path / "dc.wav", np.full(16000, 0.3)), "silent"),
        (write(tmp_path / "opposite.wav", noise(16000) * [1, -1]), "channels cancel"),
        (Clip(good[0].path, ()), "no caption"),
        (Clip(good[0].path, ("a sound", " ")), "no caption"),
    ]
    clips = good[:1] + [clip for clip, _ in bad] + good[1:]
    for num_workers in (0, 4):
        kept, faults = inspect_clips(clips, min_length_in_s=0.05, num_workers=num_workers)
        assert kept == good
        assert [(fault.path, fault.reason) for fault in faults] == [(clip.path, reason) for clip, reason in bad]
    report = format_report(faults, len(clips))
    assert "17 of 19 sounds cannot be used." in report and "6 unreadable" in report
    assert f"too short: {tmp_path / 'short.wav'} (0.050 s of at least 0.05 s)" in report
    assert str(tmp_path / "text.wav") in report and "0x" not in report
    write_report(faults, len(clips), tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["counts"]["silent"] == 2 and saved["faults"][0]["reason"] == "missing"
    write_report(faults, len(clips), tmp_path / "report.txt")
    assert "17 of 19" in (tmp_path / "report.txt").read_text()


# Items


@pytest.fixture
def clips(tmp_path):
    rates = [16000, 22050, 44100, 8000, 16000, 48000, 16000]
    return [
        Clip(write(tmp_path / f"{n}.wav", noise(rate // 2 * (n + 1), n % 2 + 1, n), rate).path, (f"{n}a", f"{n}b"))
        for n, rate in enumerate(rates)
    ]


def clip_dataset(clips, **kwargs):
    return ClipDataset(clips, **{"sampling_rate": 16000, "num_samples": 16000, "seed": 5, **kwargs})


def items(clips, num_workers=0, epoch=0, start=0, **kwargs):
    loader = DataLoader(
        clip_dataset(clips, **kwargs),
        batch_size=1,
        sampler=EpochSampler(len(clips), seed=5, epoch=epoch, start=start),
        num_workers=num_workers,
    )
    return [(int(batch["index"][0]), batch["caption"][0], batch["waveform"][0]) for batch in loader]


def same(first, second):
    return len(first) == len(second) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(first, second, strict=True)
    )


def test_items_are_the_same_for_any_number_of_workers_and_after_skipping(clips):
    expected = items(clips, epoch=3)
    assert sorted(index for index, _, _ in expected) == list(range(len(clips)))
    assert same(items(clips, num_workers=2, epoch=3), expected)
    assert same(items(clips, num_workers=2, epoch=3, start=4), expected[4:])
    assert same(items(clips, epoch=3, start=len(clips)), [])


def test_epochs_differ_in_order_caption_and_crop(clips):
    epochs = [items(clips, epoch=epoch) for epoch in range(4)]
    assert len({tuple(index for index, _, _ in epoch) for epoch in epochs}) > 1
    last = [next(item for item in epoch if item[0] == len(clips) - 1) for epoch in epochs]
    assert {caption[-1] for epoch in epochs for _, caption, _ in epoch} == {"a", "b"}
    assert len({tuple(caption for _, caption, _ in sorted(epoch, key=lambda item: item[0])) for epoch in epochs}) == 4
    assert not torch.equal(last[0][2], last[1][2])


def test_items_are_batched_by_the_stock_collate(clips):
    loader = DataLoader(clip_dataset(clips), batch_size=4, sampler=EpochSampler(len(clips), seed=5))
    batch = next(iter(loader))
    assert batch["waveform"].shape == (4, 16000) and batch["waveform"].dtype == torch.float32
    assert batch["index"].shape == batch["epoch"].shape == (4,)
    assert len(batch["caption"]) == 4
    assert torch.allclose(batch["waveform"].abs().amax(1), torch.tensor(0.5))


def test_short_sounds_are_padded_and_long_ones_cut_from_their_head_as_in_the_original(clips):
    dataset = clip_dataset([clip(WAV / "a.wav"), clip(WAV / "b.wav")], num_samples=40960, crop="head")
    expected = golden("mel")["waveform_256_samples_31500_to_32500"]
    for row in range(2):
        assert torch.equal(dataset[0, row]["waveform"][31500:32500], expected[row])
    short = clip_dataset(clips)[0, 0]["waveform"]  # half a second of one
    assert short[:8000].abs().max() == 0.5 and not short[8000:].any()


def test_a_random_crop_is_a_part_of_the_sound(clips):
    whole = read_waveform(clips[6], 16000)
    item = clip_dataset(clips)[1, 6]["waveform"]
    start = int(correlate(whole.numpy(), item.numpy(), "valid").argmax())
    assert torch.equal(item, normalise(whole[start : start + 16000], 16000))


def test_a_random_crop_that_is_silent_is_drawn_again(tmp_path):
    wave = np.zeros((64000, 1), np.float32)
    wave[32000:] = noise(32000)
    dataset = clip_dataset([write(tmp_path / "a.wav", wave)], num_samples=800)
    silent = [not dataset[epoch, 0]["waveform"].any() for epoch in range(40)]
    assert sum(silent) < 10  # one in 16 instead of one in two


def test_dataset_arguments_are_checked(clips, tmp_path):
    for name, value in (("crop", "tail"), ("num_samples", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            clip_dataset(clips, **{name: value})
    with pytest.raises(ValueError, match="nan.wav.*finite"):
        clip_dataset([write(tmp_path / "nan.wav", np.full(99, np.nan), subtype="FLOAT")])[0, 0]


def test_a_selection_depends_on_its_seed_alone(clips):
    assert select_clips(clips, 3, seed=1) == select_clips(clips, 3, seed=1) != select_clips(clips, 3, seed=2)
    assert select_clips(clips, 3, seed=1) == select_clips(clips, 5, seed=1)[:3]
    assert sorted(clip.path for clip in select_clips(clips, 99, seed=1)) == [clip.path for clip in clips]


def test_the_example_sounds_are_good_and_credited():
    clips = read_manifest(ROOT / "examples" / "sounds" / "data.jsonl")
    good, faults = inspect_clips(clips, min_length_in_s=1.0, num_workers=2)
    assert len(good) == 10 and not faults
    credits = (ROOT / "examples" / "sounds" / "CREDITS.md").read_text()
    assert all(f"| {Path(clip.path).name} |" in credits for clip in clips)
    assert clip_dataset(clips, num_samples=163840)[0, 3]["waveform"].isfinite().all()
