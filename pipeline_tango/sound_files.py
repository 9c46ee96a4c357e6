"""Audio files in and out: reading, WAV encoding, spectrogram pictures, atomic writing."""

import io
import os
import warnings
from importlib.util import find_spec


class AudioFileError(ValueError):
    """A file that cannot be read as audio, with a message for the user."""


def read_audio(path):
    """Float32 samples `(channels, num_samples)` in [-1, 1], and their rate: WAV by scipy, the rest by soundfile.

    Raises:
        AudioFileError: naming `path`, if it cannot be read or holds no samples.
    """
    import numpy as np
    from scipy.io import wavfile

    try:
        with open(path, "rb") as file:
            is_wav = file.read(4) in (b"RIFF", b"RIFX", b"RF64")
        if is_wav:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that hold no sound
                sampling_rate, samples = wavfile.read(path)
            if samples.dtype.kind == "u":  # 8 bits are stored from 0 to 255
                samples = samples.astype(np.float32) / 128 - 1
            elif samples.dtype.kind == "i":
                samples = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
        elif find_spec("soundfile"):
            import soundfile

            samples, sampling_rate = soundfile.read(path, dtype="float32")
        else:
            raise AudioFileError(f'{path} is no WAV file; others need soundfile: pip install "pipeline-tango[demo]"')
    except AudioFileError:
        raise
    except Exception as error:  # a file that is not ours: anything may be wrong with it
        raise AudioFileError(f"cannot read the sound {path}: {error!s:.200}") from error
    if not samples.size:
        raise AudioFileError(f"the sound {path} is empty")
    return samples.reshape(len(samples), -1).T.astype(np.float32, copy=False), int(sampling_rate)


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
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def write_atomically(path, content):
    """Write bytes such that `path` holds all of them or what it held before."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
