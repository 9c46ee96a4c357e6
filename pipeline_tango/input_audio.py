"""Given audio: mono clips and their inpainting masks, on the time line of the result and as known latents."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # loads scipy.signal, which takes a second, when that is first used
import torch
import torch.nn.functional as F

from .mel import MEL_FFT_LENGTH, MEL_HOP_LENGTH, MEL_SAMPLING_RATE, mel_band_edges


TRAINING_PEAK = 0.5  # of the sounds that the VAE was trained on, after removal of their mean
SILENT_PEAK = 1e-4  # three steps of 16-bit audio


@dataclass(frozen=True)
class AudioClips:
    """Mono clips at their own sampling rate, checked."""

    waveforms: list[np.ndarray]  # (num_samples,) each, float32
    sampling_rate: int

    @property
    def lengths_in_s(self):
        return [len(waveform) / self.sampling_rate for waveform in self.waveforms]


@dataclass
class InputAudio:
    """The audio of a call, and what is asked of it.

    Args:
        clips ([`AudioClips`])
        masks (`list[np.ndarray]` or `None`): inpainting masks of the clips, `True` where to regenerate.
        start_in_s (`float`): where in the result the clips begin.
        result_length_in_s (`float`)
        frequency_mask_in_hz (`tuple[float, float]` or `None`): band to regenerate.
        strength (`float` or `None`): fraction of the steps that is taken. Defaults to 1 for inpainting, else to 0.5.
    """

    clips: AudioClips
    masks: list[np.ndarray] | None
    start_in_s: float
    result_length_in_s: float
    frequency_mask_in_hz: tuple[float, float] | None
    strength: float | None

    def __post_init__(self):
        half_sample = 0.5 / MEL_SAMPLING_RATE
        last_end_in_s = self.result_length_in_s - half_sample
        ends_early = [self.start_in_s + length_in_s < last_end_in_s for length_in_s in self.clips.lengths_in_s]
        starts_late = self.start_in_s > half_sample
        self.is_incomplete = starts_late or any(ends_early)  # some clip does not fill the result
        self.inpaints_in_time = self.masks is not None or starts_late or all(ends_early)
        self.inpaints = self.inpaints_in_time or self.frequency_mask_in_hz is not None
        if self.strength is None:
            self.strength = 1.0 if self.inpaints else 0.5

    @property
    def is_used(self):
        """Whether the result depends on more than the length of the clips."""
        return self.inpaints or self.strength < 1


@dataclass
class PlacedAudio:
    """Clips on the time line of the result, one row each, at the sampling rate of the result."""

    waveform: np.ndarray  # (batch, num_samples), float32
    mask: np.ndarray | None  # (batch, num_samples), True where to regenerate. None: everywhere
    mean: np.ndarray  # (batch, 1), of the samples that fix the level
    peak: np.ndarray  # (batch, 1), their largest distance from the mean, 0 if there are none
    frequency_mask_in_hz: tuple[float, float] | None

    @property
    def gain(self):
        """From the level of the clips to the one that the VAE was trained on."""
        return TRAINING_PEAK / self.peak  # (batch, 1)

    def encoder_inputs(self, num_samples):
        """Each clip at the level that the VAE was trained on, extended to `num_samples`, its masked regions filled."""
        masks = np.zeros_like(self.waveform, dtype=bool) if self.mask is None else self.mask
        num_given = self.waveform.shape[1]
        for given, mask, mean, gain in zip(self.waveform, masks, self.mean, self.gain):
            waveform = np.zeros(num_samples, dtype=np.float32)
            np.subtract(given, mean, out=waveform[:num_given])
            waveform *= gain
            mask = np.pad(mask, (0, num_samples - num_given), constant_values=True)
            yield fill_by_reflection(waveform, mask)  # (num_samples,)

    def latent_mask(self, num_latent_frames, num_latent_bins, vae_scale_factor, device):
        """1 where latents are regenerated, 0 where they are known: `(batch, 1, num_latent_frames, num_latent_bins)`.

        A latent is regenerated if any sample or frequency that it is computed from is."""
        if self.mask is None:
            in_time = torch.ones(1, num_latent_frames, dtype=torch.float32, device=device)
        else:
            num_samples = MEL_HOP_LENGTH * vae_scale_factor
            missing = num_latent_frames * num_samples - self.mask.shape[1]
            samples = torch.from_numpy(np.pad(self.mask, ((0, 0), (0, missing)), "edge")).to(device, torch.float32)
            margin = MEL_FFT_LENGTH // 2
            in_time = F.max_pool1d(samples, num_samples + 2 * margin, num_samples, margin)  # (batch, frames)
        in_frequency = torch.ones(num_latent_bins, dtype=torch.float32, device=device)
        if self.frequency_mask_in_hz is not None:
            low, high = self.frequency_mask_in_hz
            edges = mel_band_edges()
            for row in range(num_latent_bins):
                row_low, row_high = edges[row * vae_scale_factor], edges[(row + 1) * vae_scale_factor + 1]
                in_frequency[row] = float(row_low < high and row_high > low)
        return in_time[:, None, :, None] * in_frequency  # (batch, 1, frames, bins)


@dataclass
class KnownLatents:
    """Latents that denoising starts from, and that it keeps where a mask says so.

    Args:
        scheduler ([`SchedulerMixin`]): its `add_noise` is used.
        latents (`torch.Tensor` of shape `(batch, channels, frames, bins)`)
        noise (`torch.Tensor` of that shape): the one that is added to them.
        mask (`torch.Tensor` of shape `(batch, 1, frames, bins)` or `None`): 1 where to regenerate. `None`: everywhere.
    """

    scheduler: Any
    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor | None

    def noised(self, frames, timestep):
        """The latents of a slice of frames with the noise of `timestep`, a tensor of one element; without noise if it
        is empty, as it is after the last step."""
        if not len(timestep):
            return self.latents[:, :, frames]
        return self.scheduler.add_noise(self.latents[:, :, frames], self.noise[:, :, frames], timestep)

    def restore(self, latents, frames, timestep):
        """`latents` of a slice of frames, replaced by the known ones where they are not regenerated, as in RePaint
        (Lugmayr et al. 2022, arXiv 2201.09865)."""
        if self.mask is None:
            return latents
        return torch.where(self.mask[:, :, frames] > 0, latents, self.noised(frames, timestep))

    def keep(self, latents, frames):
        """From now on `latents` are the known ones of a slice of frames."""
        self.latents[:, :, frames] = latents
        self.mask[:, :, frames] = 0


def place_audio(audio, num_samples):
    """Resample the clips of an [`InputAudio`] and lay them out on the time line of a result of `num_samples`.

    Returns:
        [`PlacedAudio`]
    """
    clips = audio.clips
    start = round(audio.start_in_s * MEL_SAMPLING_RATE)
    divisor = math.gcd(MEL_SAMPLING_RATE, clips.sampling_rate)
    num_clips = len(clips.waveforms)
    waveform = np.zeros((num_clips, num_samples), dtype=np.float32)
    mask = np.ones((num_clips, num_samples), dtype=bool)
    for row, clip in enumerate(clips.waveforms):
        if clips.sampling_rate != MEL_SAMPLING_RATE:
            clip = scipy.signal.resample_poly(clip, MEL_SAMPLING_RATE // divisor, clips.sampling_rate // divisor)
        clip = clip[: num_samples - start]
        waveform[row, start : start + len(clip)] = clip
        mask[row, start : start + len(clip)] = False
        for region in find_regions(audio.masks[row]) if audio.masks is not None else ():
            first, last = (round(edge * MEL_SAMPLING_RATE / clips.sampling_rate) for edge in region)
            mask[row, start + first : min(start + last, num_samples)] = True

    mean, peak = np.zeros((2, num_clips, 1), dtype=np.float32)
    for row in range(num_clips):
        # the level of what is kept, if nothing is left of what is regenerated
        heard = waveform[row, ~mask[row]] if audio.inpaints_in_time and audio.strength == 1 else waveform[row]
        if len(heard):
            mean[row] = heard.mean(dtype=np.float64)
            peak[row] = max(heard.max() - mean[row, 0], mean[row, 0] - heard.min())
    return PlacedAudio(waveform, mask if audio.inpaints_in_time else None, mean, peak, audio.frequency_mask_in_hz)


def fill_by_reflection(waveform, mask):
    """Fill the masked regions by reflection padding from both sides, crossfaded, so that an encoder whose receptive
    field reaches into a region gets neither silence nor the sound that is regenerated there.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`)
        mask (`np.ndarray` of shape `(num_samples,)`): `True` in the regions. At least one sample is `False`.
    """

    def pad_to_the_right(waveform, regions):
        waveform = waveform.copy()
        for start, end in regions:
            if start > 0:
                waveform[start:end] = np.pad(waveform[:start], (0, end - start), "symmetric")[start:]
        return waveform

    num_samples = len(waveform)
    regions = find_regions(mask)
    if not regions:
        return waveform
    from_left = pad_to_the_right(waveform, regions)
    backwards = [(num_samples - end, num_samples - start) for start, end in reversed(regions)]
    from_right = pad_to_the_right(waveform[::-1], backwards)[::-1]
    filled = waveform.copy()
    for start, end in regions:
        weight = np.linspace(0, 1, end - start) * (end < num_samples) if start > 0 else np.ones(end - start)
        filled[start:end] = (1 - weight) * from_left[start:end] + weight * from_right[start:end]
    return filled


def find_regions(mask):
    """`(start, end)` of each run of `True` in a 1-D array."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
