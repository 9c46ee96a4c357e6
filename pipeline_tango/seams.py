"""Generated sound composited into given audio: level, spectrum, crossfade and bands."""

import math

import numpy as np
import scipy  # loads scipy.signal, which takes a second, when that is first used
import torch
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from .input_audio import SILENT_PEAK, find_regions
from .mel import MEL_FFT_LENGTH, MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS, log_mel_spectrogram


CROSSFADE_IN_S = 0.02
SEAM_CONTEXT_IN_S = 0.5  # over how much kept sound the made version of it is matched to it
MAX_MATCH_DB = 12.0
SEAM_SIDE_IN_S = 0.2  # how much sound on either side of a seam is compared to make it even
SEAM_FADE_IN_S = 0.4  # how far into the made sound that reaches
MAX_STEP_DB = 24.0
AUDIBLE_DB = 60.0  # below the loudest mel band: what is quieter there is not matched


def match_level(made, kept, max_db=MAX_MATCH_DB):
    """Decibels that bring `made` to the level of `kept`, within `max_db` up or down; 0 beside silence."""
    made_level, kept_level = np.sqrt(np.mean(made**2)), np.sqrt(np.mean(kept**2))
    if min(made_level, kept_level) < SILENT_PEAK:
        return 0.0
    return float(np.clip(20 * math.log10(kept_level / made_level), -max_db, max_db))


def match_spectrum(made, kept, frequencies, max_db=MAX_MATCH_DB):
    """Decibels at each of `frequencies` that bring `made` to the mean log-mel spectrum of `kept`, smoothed over about
    three mel bands, within `max_db` up or down; those of `match_level` where there is too little sound for that."""
    if len(made) < 2 * MEL_FFT_LENGTH or min(np.abs(made).max(), np.abs(kept).max()) < SILENT_PEAK:
        return np.full(len(frequencies), match_level(made, kept, max_db))
    inner = slice(MEL_FFT_LENGTH // 2 // MEL_HOP_LENGTH + 1, -MEL_FFT_LENGTH // 2 // MEL_HOP_LENGTH)  # frames inside
    waveforms = torch.from_numpy(np.stack([made, kept]).astype(np.float32))
    mels_db = 20 / math.log(10) * log_mel_spectrogram(waveforms)[:, inner].numpy()  # (2, num_frames, num_mel_bins)
    made_db, kept_db = np.maximum(mels_db, mels_db.max() - AUDIBLE_DB).mean(axis=1)
    match = np.convolve(np.pad(kept_db - made_db, 1, "edge"), [0.25, 0.5, 0.25], "valid")
    highest = hertz_to_mel(MEL_SAMPLING_RATE / 2, mel_scale="slaney")
    centres = mel_to_hertz(np.linspace(0, highest, NUM_MEL_BINS + 2), mel_scale="slaney")[1:-1]
    return np.interp(frequencies, centres, match.clip(-max_db, max_db))


def scale_spectrum(waveform, window_length, decibels, num_samples=2**19):
    """Change the short-time spectrum of a sound, a bounded stretch of it at a time.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`)
        window_length (`int`): even, and no more than there are samples.
        decibels (`Callable`): gives an array `(window_length // 2 + 1, num_frames)` for the middles of the frames, an
            array `(num_frames,)` of positions in samples.
        num_samples (`int`, *optional*, defaults to 2**19): a multiple of half the window.
    """
    options = {"nperseg": window_length, "noverlap": window_length // 2}
    scaled = np.empty_like(waveform)
    for start in range(0, len(waveform), num_samples):
        first, end = max(start - window_length, 0), min(start + num_samples, len(waveform))
        _, times, spectrum = scipy.signal.stft(waveform[first : end + window_length], **options)
        spectrum *= 10 ** (decibels(first + times) / 20)
        scaled[start:end] = scipy.signal.istft(spectrum, **options)[1][start - first : end - first]
    return scaled


def join_at_seams(made, audio, is_made, sampling_rate, is_matched=False):
    """`audio` with `made` in its place where `is_made`.

    Both are the same sound where `audio` is kept, `made` after VAE and vocoder: the spectrum of `made` is corrected by
    their difference beside each seam, going over from one seam's to the next one's. At the seam itself it is that of
    the kept sound on the other side, from which `made` goes over to its own within 0.4 s. On the kept side of a seam
    `made` fades in over 20 ms, with weights that hold the power constant whatever the correlation of the two (Fink,
    Holters and Zölzer, DAFx 2016). All other kept samples are those of `audio`.

    Args:
        made, audio (`np.ndarray` of shape `(num_samples,)`)
        is_made (`np.ndarray` of shape `(num_samples,)`)
        is_matched (`bool`, *optional*, defaults to `False`): whether `made` needs no correction.
    """
    regions = find_regions(is_made)
    if not regions:
        return audio
    fade_length, context_length, side_length, reach = (
        round(seconds * sampling_rate)
        for seconds in (CROSSFADE_IN_S, SEAM_CONTEXT_IN_S, SEAM_SIDE_IN_S, SEAM_FADE_IN_S)
    )
    edges = [0, *(edge for region in regions for edge in region), len(made)]
    seams = []  # position, the kept side (-1 before, 1 after), how much is kept there, how much made on the other
    for i, (start, end) in enumerate(regions):
        if start > 0:
            seams.append((start, -1, start - edges[2 * i], end - start))
        if end < len(made):
            seams.append((end, 1, edges[2 * i + 3] - end, end - start))

    def beside(position, side, length):
        """Samples from a seam outwards, to the one or the other side."""
        return position + np.arange(length) if side > 0 else position - 1 - np.arange(length)

    if not is_matched:
        window_length = min(MEL_FFT_LENGTH, len(made) // 2 * 2)
        frequencies = np.fft.rfftfreq(window_length, 1 / sampling_rate)
        matches, steps = [], []
        for position, side, num_kept, num_made in seams:
            context = beside(position, side, min(num_kept, context_length))
            matches.append(match_spectrum(made[context], audio[context], frequencies))
            length = min(num_kept, num_made, side_length)
            if length < MEL_FFT_LENGTH:
                continue  # too little to tell a step from chance
            inside, outside = beside(position, -side, length), beside(position, side, length)
            step = match_spectrum(made[inside], audio[outside], frequencies, MAX_STEP_DB) - matches[-1]
            steps.append((position, side, num_kept, min(num_made / 2, reach), step))

        def match_at(positions):
            seam_positions = [position for position, *_ in seams]
            match = np.stack([np.interp(positions, seam_positions, each) for each in np.stack(matches, axis=1)])
            for position, side, num_kept, width, step in steps:
                depth = side * (position - positions)  # into the made sound
                share = np.clip(1 - depth / width, 0, 1) * (depth > -num_kept / 2)
                match += step[:, None] * share
            return match

        made = scale_spectrum(made, window_length, match_at)

    joined = np.where(is_made, made, audio)
    for position, side, num_kept, _ in seams:
        fade = beside(position, side, min(num_kept // 2, fade_length))
        if not len(fade):
            continue
        kept_part, made_part = audio[fade], made[fade]
        energy = math.sqrt((kept_part**2).sum() * (made_part**2).sum())
        correlation = max(float(kept_part @ made_part) / energy, 0.0) if energy > 0 else 1.0
        share = 1 - (np.arange(len(fade)) + 0.5) / len(fade)  # of the made sound, falling outwards
        power = (1 - share) ** 2 + share**2 + 2 * share * (1 - share) * correlation
        joined[fade] = ((1 - share) * kept_part + share * made_part) / np.sqrt(power)
    return joined


def split_band(waveform, band_in_hz, sampling_rate):
    """The part of `waveform`, of shape `(num_samples,)`, within `band_in_hz`, without delay. Outside the band it is 80
    dB down, inside whole from 100 Hz on."""
    low, high = band_in_hz
    nyquist = sampling_rate / 2
    num_taps, beta = scipy.signal.kaiserord(80, 100 / nyquist)
    cutoffs = [edge for edge, is_inside in ((low + 50, low > 0), (high - 50, high < nyquist)) if is_inside]
    taps = scipy.signal.firwin(num_taps | 1, cutoffs, window=("kaiser", beta), pass_zero=low <= 0, fs=sampling_rate)
    return scipy.signal.fftconvolve(waveform, taps, mode="same") if len(waveform) >= len(taps) else waveform
