"""Generated sound composited into given audio: level, spectrum, crossfade and bands."""

import math

import numpy as np
import scipy  # loads scipy.signal, which takes a second, when that is first used
import torch

from .input_audio import SILENT_PEAK, find_regions
from .mel import MEL_FFT_LENGTH, MEL_HOP_LENGTH, MEL_SAMPLING_RATE, log_mel_spectrogram, mel_band_edges


CROSSFADE_IN_S = 0.02
SEAM_CONTEXT_IN_S = 0.5  # kept sound beside a seam that the spectrum of the generated one is matched to
MAX_MATCH_DB = 12.0
SEAM_SIDE_IN_S = 0.2  # sound on either side of a seam whose spectra are compared
SEAM_FADE_IN_S = 0.4  # how far into the generated sound the correction of their difference reaches
MAX_STEP_DB = 24.0
FULL_SCALE = 32768 / 32767 + 1e-6  # what the lowest 16-bit value becomes where 32767 is taken for full scale
AUDIBLE_DB = 60.0  # below the loudest mel band: quieter levels are not matched


def used_samples(placed):
    """Which samples of the generated sound the composite of a [`PlacedAudio`] depends on: those that are regenerated
    in any clip, and their surroundings that the spectrum is matched to. `None`: all.

    Returns:
        `np.ndarray` of shape `(num_samples,)` or `None`
    """
    if placed.mask is None:
        return None
    margin = round(SEAM_CONTEXT_IN_S * MEL_SAMPLING_RATE) + 2 * MEL_FFT_LENGTH  # and the windows of the filters
    used = placed.mask.any(axis=0)
    for start, end in find_regions(used):
        used[max(start - margin, 0) : end + margin] = True
    return used


def composite(generated, placed, num_copies, used=None):
    """Generated sound at the level of the given audio and, where some of that is kept, joined with it.

    Kept sound that goes beyond [-1, 1], which clips after a lossy format or resampling may, is not clipped: the whole
    result is turned down.

    Args:
        generated (`torch.Tensor` of shape `(batch * num_copies, num_samples)`): at the level of the VAE's training.
        placed ([`PlacedAudio`])
        num_copies (`int`): waveforms of each clip, next to each other.
        used (`np.ndarray` of shape `(num_samples,)`, *optional*): samples of `generated` that there are.

    Returns:
        `torch.Tensor` of the shape of `generated`, float32 in [-1, 1], and a list of the factors, 1 or less, that each
        row was turned down by because of kept sound.
    """
    result, factors = np.empty(generated.shape, dtype=np.float32), []
    for i, waveform in enumerate(generated.float().cpu().numpy()):
        row = i // num_copies
        audio = placed.waveform[row]
        waveform = waveform / placed.gain[row]
        waveform += placed.mean[row]
        if placed.frequency_mask_in_hz is not None:
            waveform = replace_band(audio, waveform, placed.frequency_mask_in_hz, used)
        if placed.mask is not None:
            is_matched = placed.frequency_mask_in_hz is not None
            waveform = join_at_seams(waveform, audio, placed.mask[row], MEL_SAMPLING_RATE, is_matched)
        elif placed.frequency_mask_in_hz is None:
            waveform /= max(waveform.max(), -waveform.min(), 1.0)  # loud input would be clipped
        kept = waveform
        if placed.mask is not None and placed.frequency_mask_in_hz is None:
            kept = audio[~placed.mask[row]]
        peak = max(kept.max(initial=0.0), -kept.min(initial=0.0))
        factors.append(1 / float(peak) if peak > FULL_SCALE else 1.0)
        if factors[-1] < 1:
            waveform = waveform / peak
        np.clip(waveform, -1.0, 1.0, out=result[i])
    return torch.from_numpy(result).to(generated.device), factors


def replace_band(audio, generated, band_in_hz, used=None):
    """`audio` with one band of `generated`, at the level that fits the octave of `audio` beside the band, measured in
    the samples in which `used` is `True`, by default in all."""
    low, high = band_in_hz
    beside = (low / 2, low) if low > 0 else (high, min(2 * high, MEL_SAMPLING_RATE / 2))
    beside = (0, 200) if beside[1] - beside[0] < 200 else beside
    octaves = (split_band(each, beside, MEL_SAMPLING_RATE) for each in (generated, audio))
    level_db = match_level(*(each if used is None else each[used] for each in octaves))
    return audio + split_band(generated * 10 ** (level_db / 20) - audio, band_in_hz, MEL_SAMPLING_RATE)


def match_level(generated, kept, max_db=MAX_MATCH_DB):
    """Decibels that bring `generated` to the level of `kept`, within `max_db` up or down; 0 if either is silent."""
    generated_level, kept_level = np.sqrt(np.mean(generated**2)), np.sqrt(np.mean(kept**2))
    if min(generated_level, kept_level) < SILENT_PEAK:
        return 0.0
    return float(np.clip(20 * math.log10(kept_level / generated_level), -max_db, max_db))


def match_spectrum(generated, kept, frequencies, max_db=MAX_MATCH_DB):
    """Decibels at each of `frequencies` that bring `generated` to the mean log-mel spectrum of `kept`, smoothed over
    three mel bands, within `max_db` up or down; those of [`match_level`] if the two are too short or silent."""
    if len(generated) < 2 * MEL_FFT_LENGTH or min(np.abs(generated).max(), np.abs(kept).max()) < SILENT_PEAK:
        return np.full(len(frequencies), match_level(generated, kept, max_db))
    # frames whose window does not reach into the padding
    inner = slice(MEL_FFT_LENGTH // 2 // MEL_HOP_LENGTH + 1, -MEL_FFT_LENGTH // 2 // MEL_HOP_LENGTH)
    waveforms = torch.from_numpy(np.stack([generated, kept]).astype(np.float32))
    mels_db = 20 / math.log(10) * log_mel_spectrogram(waveforms)[:, inner].numpy()  # (2, num_frames, num_mel_bins)
    generated_db, kept_db = np.maximum(mels_db, mels_db.max() - AUDIBLE_DB).mean(axis=1)
    match = np.convolve(np.pad(kept_db - generated_db, 1, "edge"), [0.25, 0.5, 0.25], "valid")
    return np.interp(frequencies, mel_band_edges()[1:-1], match.clip(-max_db, max_db))


def scale_spectrum(waveform, window_length, decibels, num_samples=2**19):
    """Filter a waveform in its short-time spectrum, in chunks of bounded size.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`)
        window_length (`int`): even, and no more than there are samples.
        decibels (`Callable`): returns the gains, an array `(window_length // 2 + 1, num_frames)`, for the middles of
            the frames, an array `(num_frames,)` of positions in samples.
        num_samples (`int`, *optional*, defaults to 2**19): length of a chunk, a multiple of half the window.
    """
    options = {"nperseg": window_length, "noverlap": window_length // 2}
    scaled = np.empty_like(waveform)
    for start in range(0, len(waveform), num_samples):
        first, end = max(start - window_length, 0), min(start + num_samples, len(waveform))
        _, times, spectrum = scipy.signal.stft(waveform[first : end + window_length], **options)
        spectrum *= 10 ** (decibels(first + times) / 20)
        scaled[start:end] = scipy.signal.istft(spectrum, **options)[1][start - first : end - first]
    return scaled


def join_at_seams(generated, audio, mask, sampling_rate, is_matched=False):
    """`audio`, with `generated` in its place where `mask` is `True`.

    Where `audio` is kept, `generated` is the same sound after VAE and vocoder. The spectrum of `generated` is
    corrected by their difference beside each seam, interpolated between seams. At the seam itself the generated side
    is also brought to the spectrum of the kept side, a correction that fades out within 0.4 s. On the kept side of a
    seam `generated` is crossfaded in over 20 ms, with weights that hold the power constant whatever the correlation of
    the two (Fink, Holters and Zölzer, DAFx 2016). All other kept samples are those of `audio`.

    Args:
        generated, audio (`np.ndarray` of shape `(num_samples,)`)
        mask (`np.ndarray` of shape `(num_samples,)`): inpainting mask.
        sampling_rate (`int`)
        is_matched (`bool`, *optional*, defaults to `False`): leave out the correction of the spectrum.
    """
    regions = find_regions(mask)
    if not regions:
        return audio
    fade_length, context_length, side_length, reach = (
        round(seconds * sampling_rate)
        for seconds in (CROSSFADE_IN_S, SEAM_CONTEXT_IN_S, SEAM_SIDE_IN_S, SEAM_FADE_IN_S)
    )
    edges = [0, *(edge for region in regions for edge in region), len(generated)]
    seams = []  # position, the kept side (-1 before, 1 after), samples kept there, samples generated on the other
    for i, (start, end) in enumerate(regions):
        if start > 0:
            seams.append((start, -1, start - edges[2 * i], end - start))
        if end < len(generated):
            seams.append((end, 1, edges[2 * i + 3] - end, end - start))

    def beside(position, side, length):
        """Positions of the samples on one side of a seam, beginning at the seam."""
        return position + np.arange(length) if side > 0 else position - 1 - np.arange(length)

    if not is_matched:
        window_length = min(MEL_FFT_LENGTH, len(generated) // 2 * 2)
        frequencies = np.fft.rfftfreq(window_length, 1 / sampling_rate)
        matches, steps = [], []
        for position, side, num_kept, num_generated in seams:
            context = beside(position, side, min(num_kept, context_length))
            matches.append(match_spectrum(generated[context], audio[context], frequencies))
            length = min(num_kept, num_generated, side_length)
            if length < MEL_FFT_LENGTH:
                continue  # too little to tell a step from random variation
            inside, outside = beside(position, -side, length), beside(position, side, length)
            step = match_spectrum(generated[inside], audio[outside], frequencies, MAX_STEP_DB) - matches[-1]
            steps.append((position, side, num_kept, min(num_generated / 2, reach), step))

        def match_at(positions):
            seam_positions = [position for position, *_ in seams]
            match = np.stack([np.interp(positions, seam_positions, each) for each in np.stack(matches, axis=1)])
            for position, side, num_kept, width, step in steps:
                depth = side * (position - positions)  # into the generated sound
                weight = np.clip(1 - depth / width, 0, 1) * (depth > -num_kept / 2)
                match += step[:, None] * weight
            return match

        generated = scale_spectrum(generated, window_length, match_at)

    joined = np.where(mask, generated, audio)
    for position, side, num_kept, _ in seams:
        fade = beside(position, side, min(num_kept // 2, fade_length))
        if not len(fade):
            continue
        kept_part, generated_part = audio[fade], generated[fade]
        energy = math.sqrt((kept_part**2).sum() * (generated_part**2).sum())
        correlation = max(float(kept_part @ generated_part) / energy, 0.0) if energy > 0 else 1.0
        weight = 1 - (np.arange(len(fade)) + 0.5) / len(fade)  # of the generated sound, falling outwards
        power = (1 - weight) ** 2 + weight**2 + 2 * weight * (1 - weight) * correlation
        joined[fade] = ((1 - weight) * kept_part + weight * generated_part) / np.sqrt(power)
    return joined


def split_band(waveform, band_in_hz, sampling_rate):
    """`waveform`, of shape `(num_samples,)`, through a zero-phase band-pass filter. Outside `band_in_hz` the filter
    attenuates by 80 dB; its transition lies in the outermost 100 Hz of the band."""
    low, high = band_in_hz
    nyquist = sampling_rate / 2
    num_taps, beta = scipy.signal.kaiserord(80, 100 / nyquist)
    cutoffs = [edge for edge, is_inside in ((low + 50, low > 0), (high - 50, high < nyquist)) if is_inside]
    taps = scipy.signal.firwin(num_taps | 1, cutoffs, window=("kaiser", beta), pass_zero=low <= 0, fs=sampling_rate)
    return scipy.signal.fftconvolve(waveform, taps, mode="same") if len(waveform) >= len(taps) else waveform
