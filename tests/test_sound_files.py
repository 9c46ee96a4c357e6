import inspect
import io
import os
import struct
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile

from pipeline_tango.sound_files import (
    AudioFileError,
    beside,
    draw_spectrogram,
    encode_wav,
    is_own_picture,
    read_audio,
    remove_leftovers,
    write_atomically,
)
from training.data import Clip, find_fault, read_waveform


def tone(num_samples=4000, rate=16000):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) + 0.01


def test_int16_is_rounded_and_never_wraps():
    audio = np.array([1.0, -1.0, 0.5, 0.0, 1.6 / 32768, 2.0, -2.0], dtype=np.float32)
    sampling_rate, samples = wavfile.read(io.BytesIO(encode_wav(audio, 16000)))
    assert sampling_rate == 16000 and samples.dtype == np.int16
    assert samples.tolist() == [32767, -32768, 16384, 0, 2, 32767, -32768]


def test_spectrogram_shows_a_tone_where_it_is():
    time_in_s = np.arange(32000) / 16000
    tone = np.where(time_in_s < 1, 0.5 * np.sin(2 * np.pi * 1000 * time_in_s), 0).astype(np.float32)
    picture = Image.open(io.BytesIO(draw_spectrogram(tone, 16000, "a $tone% of 1 kHz " * 20)))
    assert picture.format == "PNG" and picture.size == (1200, 504)
    pixels = np.asarray(picture.convert("L"), dtype=float)
    inside = pixels[150:400, 150:1000]  # away from axes, title and colour bar
    assert inside.std() > 20
    left, right = inside[:, :300], inside[:, 600:]
    assert right.max() < 30 and left.max() > 200
    rows = np.argwhere(left.mean(axis=1) > 150).ravel()
    assert 0 < len(rows) < 20  # one thin line


@pytest.mark.parametrize("num_samples", [1, 16, 700, 1025])
def test_spectrogram_of_next_to_nothing(num_samples):
    picture = Image.open(io.BytesIO(draw_spectrogram(np.zeros(num_samples, dtype=np.float32), 16000, "silence")))
    assert picture.size == (1200, 504)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64"])
def test_wav_files_of_every_kind_are_read_alike(tmp_path, dtype):
    samples = np.stack([tone(), -0.5 * tone()], axis=1)
    if dtype == "uint8":
        stored = np.rint(samples * 128 + 128).astype(np.uint8)
    else:
        stored = (samples * (np.iinfo(dtype).max if "int" in dtype else 1)).astype(dtype)
    wavfile.write(tmp_path / "tone.wav", 22050, stored)
    read, sampling_rate = read_audio(tmp_path / "tone.wav")
    assert sampling_rate == 22050 and read.shape == (2, 4000)
    assert np.abs(read.T - samples).max() < (1e-2 if dtype == "uint8" else 1e-4)


@pytest.fixture
def without_soundfile(monkeypatch):
    monkeypatch.setattr("pipeline_tango.sound_files.find_spec", lambda name: None)


def with_sizes(content, riff, data):
    """A WAV file of 44 bytes of header with other sizes in it."""
    return content[:4] + struct.pack("<I", riff) + content[8:40] + struct.pack("<I", data) + content[44:]


KINDS = [
    *(("WAV", each) for each in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")),
    *(("WAV", each) for each in ("IMA_ADPCM", "MS_ADPCM", "GSM610")),
    *(("WAVEX", each) for each in ("PCM_16", "PCM_24", "DOUBLE")),
    *(("RF64", each) for each in ("PCM_16", "FLOAT")),
    *(("W64", "PCM_16"), ("AIFF", "PCM_24"), ("AU", "ULAW"), ("CAF", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "VORBIS")),
]
BY_SCIPY = ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")


@pytest.mark.parametrize("container, encoding", KINDS)
def test_the_command_and_training_read_the_same_samples(tmp_path, monkeypatch, container, encoding):
    path = str(tmp_path / f"tone.{'ogg' if container == 'OGG' else 'wav'}")
    soundfile.write(path, tone(4001), 16000, format=container, subtype=encoding)
    samples, sampling_rate = read_audio(path)
    assert sampling_rate == 16000 and samples.dtype == np.float32 and 4001 <= samples.shape[1] < 4500
    lossy = encoding in ("ULAW", "ALAW", "IMA_ADPCM", "MS_ADPCM", "GSM610", "VORBIS", "PCM_U8")
    assert np.abs(samples[0, :4001] - tone(4001))[300:3700].max() < (0.15 if lossy else 1e-4)

    clip = Clip(path, ("a tone",))
    assert find_fault(clip, 0) is None
    assert np.array_equal(read_waveform(clip, 16000).numpy(), samples[0])
    assert np.array_equal(read_waveform(clip, 16000, 1000, 900).numpy(), samples[0, 1000:1900])

    monkeypatch.setattr("pipeline_tango.sound_files.find_spec", lambda name: None)
    reads_rf64 = "RF64" in inspect.getsource(wavfile)  # not in the oldest supported scipy
    if encoding in BY_SCIPY and (container in ("WAV", "WAVEX") or (container == "RF64" and reads_rf64)):
        assert np.array_equal(read_audio(path)[0], samples)
    else:
        with pytest.raises(AudioFileError, match=r"tone.*pip install .pipeline-tango\[demo\]"):
            read_audio(path)


@pytest.mark.parametrize("reader", ["soundfile", "scipy"])
@pytest.mark.parametrize(
    "riff, data", [(0, 0), (36, 0), (0, 8002), (2**32 - 1, 2**32 - 1), (0x7FFFFFFF, 0x7FFFFFDB), (8038, 8002 + 44)]
)
def test_a_wav_whose_header_was_never_completed_is_read_to_its_end(tmp_path, request, reader, riff, data):
    if reader == "scipy":
        request.getfixturevalue("without_soundfile")
    path, whole = tmp_path / "tone.wav", encode_wav(tone(4001), 16000)
    path.write_bytes(with_sizes(whole, riff, data))
    samples, _ = read_audio(path)
    assert np.array_equal(np.rint(samples[0] * 32768), np.rint(tone(4001) * 32768))
    if reader == "soundfile":
        clip = Clip(str(path), ("a tone",))
        assert find_fault(clip, 0) is None and np.array_equal(read_waveform(clip, 16000).numpy(), samples[0])


@pytest.mark.parametrize("reader", ["soundfile", "scipy"])
def test_chunks_around_the_sound_do_not_matter(tmp_path, request, reader):
    if reader == "scipy":
        request.getfixturevalue("without_soundfile")
    path, content = tmp_path / "tone.wav", encode_wav(tone(1000), 16000)
    chunks = b"note" + struct.pack("<I", 3) + b"abc\0"
    content = content[:12] + chunks + content[12:] + chunks
    path.write_bytes(content[:4] + struct.pack("<I", len(content) - 8) + content[8:])
    assert np.array_equal(np.rint(read_audio(path)[0][0] * 32768), np.rint(tone(1000) * 32768))
    empty = encode_wav(tone(0), 16000) + chunks  # a finished file without sound
    path.write_bytes(empty[:4] + struct.pack("<I", len(empty) - 8) + empty[8:])
    with pytest.raises(AudioFileError, match="tone.wav is empty"):
        read_audio(path)


@pytest.mark.parametrize("container", ["WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "FLAC", "CAF"])
def test_a_file_that_is_cut_short_is_refused_by_both(tmp_path, container):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(40000), 16000, format=container, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioFileError, match="cannot read the sound .*tone.wav: ") as error:
        read_audio(path)
    fault = find_fault(Clip(str(path), ("a tone",)), 0)
    assert fault.reason == "unreadable" and str(path) not in fault.detail
    assert "cut short" in error.value.reason or container in ("FLAC", "CAF")


def test_a_cut_file_is_refused_without_soundfile_too(tmp_path, without_soundfile):
    path = tmp_path / "tone.wav"
    for num_bytes, message in (
        (4001, "cut short: 3957 of 8000 bytes"),
        (30, "damaged"),
        (42, "damaged"),
        (3, "no WAV"),
    ):
        path.write_bytes(encode_wav(tone(4000), 16000)[:num_bytes])
        with pytest.raises(AudioFileError, match=message):
            read_audio(path)


def test_what_is_no_sound_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("not a sound")
    (tmp_path / "samples.raw").write_bytes(bytes(100))
    for name, message in (
        ("text.wav", "ormat"),
        ("samples.raw", "without a header"),
        ("", "directory"),
        ("no", "No such"),
    ):
        with pytest.raises(AudioFileError, match=message) as error:
            read_audio(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


FUZZ = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=100, **FUZZ)
@given(samples=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=300), rate=st.integers(1000, 200_000))
@example(samples=[1.0, -1.0, 0.5 / 32768], rate=16000)
def test_reading_gives_what_was_encoded_to_half_a_step(tmp_path, samples, rate):
    path = tmp_path / "fuzz.wav"
    path.write_bytes(encode_wav(np.array(samples, np.float32), rate))
    read, sampling_rate = read_audio(path)
    assert sampling_rate == rate and read.shape == (1, len(samples))
    assert np.abs(read[0] - np.clip(samples, -1, 32767 / 32768)).max() <= 0.5 / 32768 + 1e-9


@pytest.mark.filterwarnings("error")  # of an exception in the reader's callbacks, which prints a traceback
@settings(max_examples=150, **FUZZ)
@given(
    base=st.sampled_from(["WAV", "RF64", "AIFF", "W64", "FLAC"]),
    edits=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4),
    length=st.integers(0, 400),
    reader=st.sampled_from(["soundfile", None]),
)
def test_damaged_files_are_sound_or_an_error_that_names_them(tmp_path, base, edits, length, reader):
    path = tmp_path / "fuzz.wav"
    soundfile.write(path, tone(150), 16000, format=base, subtype="PCM_16")
    content = bytearray(path.read_bytes())
    for at, value in edits:
        content[at % len(content)] = value
    path.write_bytes(content[:length])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline_tango.sound_files.find_spec", lambda name: reader)
        try:
            samples, sampling_rate = read_audio(path)
        except AudioFileError as error:
            assert "fuzz.wav" in str(error)
        else:
            assert samples.ndim == 2 and samples.size and samples.dtype == np.float32 and sampling_rate > 0


# Writing


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    path, errors = tmp_path / "sound.wav", []
    contents = [bytes([i]) * 100_000 for i in range(4)]

    def write(content):
        try:
            for _ in range(50):
                write_atomically(path, content)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    assert not errors and os.listdir(tmp_path) == ["sound.wav"]
    umask = os.umask(0o027)
    try:
        write_atomically(path, b"new")
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_names_as_long_as_can_be_are_written(tmp_path):
    write_atomically(tmp_path / ("ü" * 125 + ".wav"), b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_only_what_killed_processes_left_of_a_file_is_removed(tmp_path):
    path = tmp_path / "rain.wav"
    old = time.time() - timedelta(hours=2).total_seconds()
    names = [beside(path, "part"), tmp_path / ".rain.wav.part"]
    others = [
        beside(path, "part"),
        tmp_path / ".other.wav.part",
        tmp_path / "rain.wav.part",
        tmp_path / ".rain.wav.txt",
    ]
    for each in (*names, *others):
        each.write_bytes(b"half")
        if each != others[0]:
            os.utime(each, (old, old))
    remove_leftovers([path], "part")
    assert sorted(tmp_path.iterdir()) == sorted(others)  # the first may be being written
    remove_leftovers([path], "part", older_than_in_s=0)
    assert sorted(tmp_path.iterdir()) == sorted(others[1:])


def test_a_spectrogram_is_known_from_other_pictures(tmp_path):
    (tmp_path / "own.png").write_bytes(draw_spectrogram(tone().astype(np.float32), 16000, "rain"))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    assert is_own_picture(tmp_path / "own.png") and not is_own_picture(tmp_path / "photo.png")
