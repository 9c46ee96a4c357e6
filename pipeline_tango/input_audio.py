"""Given audio: mono clips, inpainting masks, and both on the time line of the result."""

import math
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import scipy  # loads scipy.signal, which takes a second, when that is first used
import torch


TRAINING_PEAK = 0.5  # of the sounds that the VAE was trained on, after removal of their mean
SILENT_PEAK = 1e-4  # three steps of 16-bit audio


def read_clips(audio, audio_sampling_rate):
    """The sounds in `audio`, as given to [`TangoPipeline`], as a list of mono float32 arrays at their own rate.

    Raises:
        ValueError: naming `audio` or `audio_sampling_rate`, for anything but floating-point samples around [-1, 1] in
            the order (samples,), (channels, samples) or (batch, channels, samples).
    """
    rate = audio_sampling_rate
    if not isinstance(rate, Integral) or isinstance(rate, bool) or not 1000 <= rate <= 1_000_000:
        raise ValueError(f"`audio_sampling_rate` has to be the rate of `audio`, 1000 to 1000000 Hz, not {rate!r}.")
    arrays = list(audio) if isinstance(audio, (list, tuple)) else [audio]
    if not arrays or not all(isinstance(each, (np.ndarray, torch.Tensor)) for each in arrays):
        raise ValueError(f"`audio` has to be an array, a tensor, or a list of them, not {type(audio)}.")
    if not isinstance(audio, (list, tuple)) and audio.ndim in (2, 3):
        if audio.ndim == 2 and audio.shape[0] > audio.shape[1]:
            raise ValueError(
                f"`audio` of shape {tuple(audio.shape)} is in the wrong order: a batch is (batch, samples), stereo is "
                "[(channels, samples)], so transpose it."
            )
        arrays = list(audio)
    clips = []
    for array in arrays:
        is_float = array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"
        if not is_float:
            raise ValueError(
                f"`audio` has to hold floating-point samples in [-1, 1], not {array.dtype}. Integer PCM has to be "
                "divided by its full scale, such as 32768 for 16 bits."
            )
        if isinstance(array, torch.Tensor):
            array = array.detach().cpu().float().numpy()
        array = array.astype(np.float32, copy=False)
        if array.ndim not in (1, 2) or not array.size:
            raise ValueError(
                f"`audio` has to be (samples,), (batch, samples) or a list of (samples,) or (channels, samples), with "
                f"at least one sample, but holds {array.shape}."
            )
        if array.ndim == 2 and array.shape[0] > array.shape[1]:
            raise ValueError(f"`audio` holds {array.shape}, the wrong order: stereo is (channels, samples).")
        if not np.isfinite(array).all():
            raise ValueError("`audio` has to hold finite samples, not NaN or infinity.")
        if array.ndim == 2:
            array = array.mean(axis=0, dtype=np.float64).astype(np.float32) if len(array) > 1 else array[0]
        lowest, highest, mean = array.min(), array.max(), array.mean()
        if max(highest, -lowest) > 2:  # what lossy formats decode to is often a little beyond 1
            raise ValueError(f"`audio` has to be in [-1, 1], but reaches {max(highest, -lowest):g}.")
        if max(highest - mean, mean - lowest) < SILENT_PEAK:
            raise ValueError(f"`audio` is silent: no sample is {SILENT_PEAK} from the mean.")
        clips.append(array)
    return clips


def read_masks(mask, clips, sampling_rate):
    """For each of `clips` a boolean array of its length, `True` where `mask`, as given to [`TangoPipeline`], says to
    make the sound anew.

    Raises:
        ValueError: naming `mask`, for regions outside a clip or over each other, and for arrays of another length.
    """

    def is_region(value):
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(each, Real) for each in value)

    if isinstance(mask, (np.ndarray, torch.Tensor)):
        masks = list(mask) if mask.ndim == 2 else [mask] * len(clips)
    elif isinstance(mask, (list, tuple)) and mask and all(is_region(each) for each in mask):
        masks = [mask] * len(clips)
    elif isinstance(mask, list) and mask and all(isinstance(each, (list, np.ndarray, torch.Tensor)) for each in mask):
        masks = mask
    else:
        raise ValueError(
            "`mask` has to be a list of regions (start, end) in seconds such as [(2.0, 4.5)], one such list for each "
            f"clip, or an array of samples, not {mask!r:.200}."
        )
    if len(masks) != len(clips):
        raise ValueError(f"`mask` is for {len(masks)} clips, but `audio` has {len(clips)}.")

    result = []
    for each, clip in zip(masks, clips):
        if isinstance(each, (np.ndarray, torch.Tensor)):
            samples = np.asarray(each.cpu() if isinstance(each, torch.Tensor) else each)
            if samples.shape != clip.shape:
                raise ValueError(
                    f"`mask` as an array needs a value for each sample of `audio`, {clip.shape}, not {samples.shape}."
                )
            if samples.dtype.kind not in "biuf" or not np.isin(samples, (0, 1)).all():
                raise ValueError("`mask` as an array has to hold 0 (keep) and 1 (make anew) only.")
            result.append(samples.astype(bool))
            continue
        samples = np.zeros(len(clip), dtype=bool)
        length_in_s = len(clip) / sampling_rate
        if not all(is_region(region) for region in each):
            raise ValueError(f"`mask` has to hold regions (start, end) in seconds, not {each!r:.200}.")
        last_end = 0.0
        for start, end in sorted(each):
            if not 0 <= start < end <= length_in_s + 0.5 / sampling_rate:  # NaN fails as well
                raise ValueError(f"`mask` region ({start}, {end}) does not lie in the {length_in_s:g} s of `audio`.")
            if start < last_end:
                raise ValueError(f"`mask` regions overlap: one starts at {start} s, before the end of another.")
            last_end = end
            samples[round(start * sampling_rate) : round(end * sampling_rate)] = True
        result.append(samples)
    return result


class PlacedAudio(NamedTuple):
    """Given sounds on the time line of the result, one row each."""

    waveform: np.ndarray  # (batch, num_samples), float32, at the pipeline's rate
    is_made: np.ndarray | None  # (batch, num_samples), True where there is sound to make. None: everywhere
    mean: np.ndarray  # (batch, 1)
    gain: np.ndarray  # (batch, 1), from the sound's own level to the one that the VAE was trained on


def place_audio(clips, masks, clip_sampling_rate, sampling_rate, num_samples, start_in_s, inpaints, strength):
    """Resample `clips` and lay them out on the time line of the result.

    Returns:
        [`PlacedAudio`]

    Raises:
        ValueError: if nothing would be kept, or nothing made, or if what is kept is silent.
    """
    start = round(start_in_s * sampling_rate)
    divisor = math.gcd(sampling_rate, clip_sampling_rate)
    waveform = np.zeros((len(clips), num_samples), dtype=np.float32)
    is_made = np.ones((len(clips), num_samples), dtype=bool)
    for row, (clip, mask) in enumerate(zip(clips, masks)):
        if sampling_rate != clip_sampling_rate:
            clip = scipy.signal.resample_poly(clip, sampling_rate // divisor, clip_sampling_rate // divisor)
        clip = clip[: num_samples - start]
        waveform[row, start : start + len(clip)] = clip
        is_made[row, start : start + len(clip)] = False
        for first, last in find_regions(mask):
            first, last = (round(edge * sampling_rate / clip_sampling_rate) for edge in (first, last))
            is_made[row, start + first : min(start + last, num_samples)] = True

    if inpaints and not is_made.any():
        raise ValueError("`mask` leaves nothing to make.")
    mean, gain = np.zeros((2, len(clips), 1), dtype=np.float32)
    for row in range(len(clips)):
        # the level of what stays, not of what goes
        heard = waveform[row, ~is_made[row]] if inpaints and strength == 1 else waveform[row]
        if not len(heard):
            raise ValueError("`mask` leaves nothing of `audio` to keep: leave out both, and give `audio_length_in_s`.")
        mean[row] = heard.mean(dtype=np.float64)
        peak = max(heard.max() - mean[row, 0], mean[row, 0] - heard.min())
        if peak < SILENT_PEAK:
            raise ValueError("`audio` is silent in the part that is kept.")
        gain[row] = TRAINING_PEAK / peak
    return PlacedAudio(waveform, is_made if inpaints else None, mean, gain)


def fill_by_mirror(waveform, is_made):
    """Put the sound around each gap, played backwards, in its place, so that neither silence nor the sound that has to
    go is heard by an encoder that looks across the gap's edges.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`)
        is_made (`np.ndarray` of shape `(num_samples,)`): where the gaps are. At least one sample is kept.
    """

    def mirror_from_the_left(waveform, regions):
        waveform = waveform.copy()
        for start, end in regions:
            if start > 0:
                waveform[start:end] = np.pad(waveform[:start], (0, end - start), "symmetric")[start:]
        return waveform

    num_samples = len(waveform)
    regions = find_regions(is_made)
    if not regions:
        return waveform
    from_left = mirror_from_the_left(waveform, regions)
    backwards = [(num_samples - end, num_samples - start) for start, end in reversed(regions)]
    from_right = mirror_from_the_left(waveform[::-1], backwards)[::-1]
    filled = waveform.copy()
    for start, end in regions:
        share = np.linspace(0, 1, end - start) * (end < num_samples) if start > 0 else np.ones(end - start)
        filled[start:end] = (1 - share) * from_left[start:end] + share * from_right[start:end]
    return filled


def find_regions(is_made):
    """`(start, end)` of each run of `True` in a 1-D array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_made, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
