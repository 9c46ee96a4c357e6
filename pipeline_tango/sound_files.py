"""Audio files in and out: reading, WAV encoding, spectrogram pictures, atomic writing."""

import io
import os
import re
import shutil
import struct
import time
import uuid
import warnings
from contextlib import contextmanager, suppress
from importlib.util import find_spec


RIFF_NAMES = (b"RIFF", b"RIFX", b"RF64")
UNKNOWN_SIZE = 2**31 - 2**16  # sizes from here on stand for "not known yet" in headers of pipes and recorders
SIZE_TOLERANCE = 128  # bytes by which headers of whole files are wrong, whose writers counted the header too
PICTURE_SOFTWARE = "pipeline-tango"  # in the metadata of a spectrogram
SIZE_OF_DATA = re.compile(r"^\s*(?:SSND|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
STALE_AFTER_IN_S = 3600  # a temporary file that nobody has written to for that long is a killed process's


class AudioFileError(ValueError):
    """A file that cannot be read as audio. The message names it; `reason` does not."""

    def __init__(self, message, reason=None):
        super().__init__(message)
        self.reason = reason or message


def cannot_read(name, reason):
    return AudioFileError(f"cannot read the sound {name}: {reason}", reason)


def read_audio(path):
    """Float32 samples `(channels, num_samples)` at the file's own level, and their rate.

    By soundfile, as training reads; where that is not installed, WAV files with PCM or floating-point samples by
    scipy, with the same result.

    Raises:
        AudioFileError: naming `path`, if it cannot be read or holds no samples.
    """
    import numpy as np

    try:
        with open(path, "rb") as file:
            stream = file if file.seekable() else io.BytesIO(file.read())  # a pipe
            if find_spec("soundfile"):
                with open_sound(stream, path) as file:
                    blocks, sampling_rate = [], file.samplerate
                    while len(block := file.read(2**20, dtype="float32", always_2d=True)):
                        blocks.append(block)
                if (num_samples := sum(map(len, blocks))) < file.frames:
                    raise cannot_read(path, f"{num_samples} of {file.frames} samples can be decoded")
                samples = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
            else:
                sampling_rate, samples = read_wav(stream, path)
    except AudioFileError:
        raise
    except Exception as error:  # a file that is not ours: anything may be wrong with it
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise cannot_read(path, f"{reason:.200}") from error
    if not samples.size:
        raise AudioFileError(f"the sound {path} is empty", "it holds no samples")
    return np.ascontiguousarray(samples.T), int(sampling_rate)


def read_wav(stream, name):
    """Rate and float32 samples `(num_samples, channels)` of a WAV file, by scipy."""
    import numpy as np
    from scipy.io import wavfile

    extra = 'soundfile: pip install "pipeline-tango[demo]"'
    is_wav = stream.read(4) in RIFF_NAMES
    stream.seek(0)
    if not is_wav:
        raise AudioFileError(f"{name} is no WAV file; others need {extra}", f"it is no WAV file; others need {extra}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no sound
            sampling_rate, samples = wavfile.read(with_complete_header(stream, name))
    except AudioFileError:
        raise
    except Exception as error:  # scipy is no validator: anything may come of a damaged file
        raise cannot_read(name, f"damaged, or of a kind that needs {extra} ({error!s:.200})") from error
    if samples.dtype.kind == "u":  # 8 bits are stored from 0 to 255
        samples = samples.astype(np.float32) / 128 - 1
    elif samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    return sampling_rate, (samples[:, None] if samples.ndim == 1 else samples).astype(np.float32, copy=False)


@contextmanager
def open_sound(stream, name):
    """The sound in a seekable binary stream as a `soundfile.SoundFile`: how the command and training read.

    A WAV file whose header was never completed, as a recorder that was cut off leaves it, is read to its end.

    Raises:
        AudioFileError: naming `name`, if it cannot be decoded, or if the file is shorter than its header says.
    """
    import soundfile  # here and not above, since the command has to work without the extra

    if str(name).lower().endswith(".raw"):
        raise cannot_read(name, "samples without a header")
    try:
        with soundfile.SoundFile(with_complete_header(stream, name)) as file:
            for said, found in SIZE_OF_DATA.findall(file.extra_info):
                check_size(name, int(said), int(found))
            yield file
    except soundfile.LibsndfileError as error:
        raise cannot_read(name, error.error_string or "no format that libsndfile knows") from error


def check_size(name, said, found):
    if said < UNKNOWN_SIZE and said - found > SIZE_TOLERANCE:
        raise cannot_read(name, f"it is cut short: {found} of {said} bytes of sound are there")


def with_complete_header(stream, name):
    """The stream of a sound, with the sizes in a WAV file's header filled in if they never were.

    Raises:
        AudioFileError: naming `name`, if a WAV file is shorter than its header says.
    """
    num_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    riff = stream.read(12)
    if riff[:4] not in RIFF_NAMES or riff[8:] != b"WAVE":
        stream.seek(0)
        return SoundStream(stream, {})
    order = ">" if riff[:4] == b"RIFX" else "<"
    riff_size = struct.unpack(order + "I", riff[4:8])[0]
    position, large_size, replaced = 12, None, {}
    while len(chunk := stream.read(8)) == 8:
        kind, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        position += 8
        if kind == b"ds64":
            large_size = struct.unpack("<8xQ", stream.read(16).ljust(16, b"\0"))[0]
        elif kind == b"data":
            found = num_bytes - position
            if riff[:4] == b"RF64" and size == 2**32 - 1 and large_size and large_size < 2**63:
                size = large_size
                if size - found > SIZE_TOLERANCE:
                    raise cannot_read(name, f"it is cut short: {found} of {size} bytes of sound are there")
                break
            check_size(name, size, found)
            # an empty sound may have other chunks after it, but then the file is as long as it says
            unfinished = size == 0 < found and abs(riff_size + 8 - num_bytes) > 1
            if riff[:4] != b"RF64" and (unfinished or size > found or riff_size + 8 < position):
                size = found if unfinished else min(size, found)
                replaced = {4: min(num_bytes - 8, 2**32 - 1), position - 4: min(size, 2**32 - 1)}
            break
        position += size + size % 2
        stream.seek(position)
    stream.seek(0)
    return SoundStream(stream, {at: struct.pack(order + "I", value) for at, value in replaced.items()})


class SoundStream(io.RawIOBase):
    """A binary stream with other bytes in some places, `{position: bytes}`. To seek where damaged headers point to
    does nothing: soundfile would print a traceback of what is raised there."""

    def __init__(self, stream, replaced):
        self.stream, self.replaced = stream, replaced

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        try:
            return self.stream.seek(offset, whence)
        except (OSError, ValueError):
            return self.tell()

    def tell(self):
        return self.stream.tell()

    def readinto(self, buffer):
        if not self.replaced:
            return self.stream.readinto(buffer)
        first = self.stream.tell()
        content = bytearray(self.stream.read(len(buffer)))
        for at, replacement in self.replaced.items():
            for i, byte in enumerate(replacement, at - first):
                if 0 <= i < len(content):
                    content[i] = byte
        buffer[: len(content)] = content
        return len(content)


def encode_wav(audio, sampling_rate):
    """16-bit mono WAV. Rounded and clipped, where the original wraps: +1.0 becomes 32767."""
    import numpy as np
    from scipy.io import wavfile

    content = io.BytesIO()
    wavfile.write(content, sampling_rate, np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16))
    return content.getvalue()


def draw_spectrogram(audio, sampling_rate, title):
    """A PNG of the levels in `audio`, of shape `(num_samples,)`, on a mel-spaced frequency axis."""
    import textwrap

    import numpy as np
    from matplotlib.figure import Figure
    from scipy.signal import stft

    def to_mel(hz):
        return 2595 * np.log10(1 + np.asarray(hz) / 700)

    window = min(1024, len(audio))
    frequencies, _, spectrum = stft(audio, sampling_rate, nperseg=window, noverlap=window * 3 // 4, scaling="spectrum")
    mel = np.linspace(0, to_mel(sampling_rate / 2), 256)
    rows = np.interp(700 * (10 ** (mel / 2595) - 1), frequencies, np.arange(len(frequencies)))
    low = np.floor(rows).astype(int)
    high = np.minimum(low + 1, len(frequencies) - 1)
    part = (rows - low)[:, None]
    amplitude = 2 * np.abs(spectrum)  # two-sided: a full-scale sine has 0.5
    level_db = 20 * np.log10((1 - part) * amplitude[low] + part * amplitude[high] + 1e-6)  # (mel, frames)

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(
        level_db,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=level_db.max() - 80,
        vmax=level_db.max(),
        extent=(0, len(audio) / sampling_rate, 0, mel[-1]),
    )
    ticks_khz = [khz for khz in (0, 0.25, 0.5, 1, 2, 4, 8, 16) if khz * 2000 <= sampling_rate]
    axes.set_yticks(to_mel(1000 * np.array(ticks_khz)), labels=[f"{khz:g}" for khz in ticks_khz])
    axes.set_xlabel("Time (s)")
    axes.set_ylabel("Frequency (kHz)")
    axes.set_title(textwrap.fill(textwrap.shorten(title, 200, placeholder=" ..."), 90), parse_math=False)
    figure.colorbar(picture, label="Level (dB, full-scale sine = 0)", pad=0.01)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": PICTURE_SOFTWARE})
    return content.getvalue()


def is_own_picture(path):
    """Whether `draw_spectrogram` made a file."""
    with open(path, "rb") as file:
        return f"Software\0{PICTURE_SOFTWARE}".encode() in file.read(2**12)


def write_atomically(path, content):
    """Write bytes such that `path` holds all of them or what it held before, however many processes write it."""
    with written_beside(path, content) as part:
        os.replace(part, path)


@contextmanager
def written_beside(path, content):
    """A hidden file beside `path`, under a name that no other process uses, that holds the bytes `content`. It is to
    be renamed to `path`, and removed if that does not happen."""
    part = beside(path, "part")
    try:
        with open(part, "xb") as file:
            file.write(content)
        yield part
    finally:
        part.unlink(missing_ok=True)


def beside(path, suffix):
    """A hidden name beside `path` that no other process uses, also where that of `path` is as long as names can be."""
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.{suffix}")


def remove_leftovers(paths, suffix, older_than_in_s=STALE_AFTER_IN_S):
    """Remove the files or folders that killed processes left `beside` the paths."""
    names = {}
    for path in paths:
        names.setdefault(path.parent, set()).update((path.name, path.name[:50]))
    for folder in names:
        for leftover in folder.iterdir() if folder.is_dir() else ():
            match = re.fullmatch(rf"\.(.+?)(\.[0-9a-f]{{8}})?\.{suffix}", leftover.name, re.DOTALL)
            if match and match[1] in names[folder]:
                with suppress(OSError):  # another process may remove it too
                    if time.time() - leftover.stat().st_mtime >= older_than_in_s:
                        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
