"""Overlapping windows along the frames: the lengths of a call, where windows start, their weights, and blending."""

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class WindowPlan:
    """The lengths of a call, in samples and latent frames, and the windows that it is denoised and decoded in.

    Args:
        num_samples (`int`): length of the result.
        num_latent_frames (`int`): latent frames that hold it.
        num_frames_in_window (`int`): most latent frames that the UNet and the VAE get in one piece.
        num_windows_at_once (`int`): most windows that the UNet gets in one batch.
        order (`str`): `"joint"` denoises all windows together, `"sequential"` one after the other.
        frames_per_s (`float`): latent frames in a second.
        regenerated_frames (`np.ndarray` or `None`): `True` for the latent frames in which something is regenerated.
            `None`: all. Windows without one are not denoised.
        used_samples (`np.ndarray` or `None`): `True` for the samples of the generated sound that the result depends
            on. `None`: all. Chunks without one are not decoded.
    """

    num_samples: int
    num_latent_frames: int
    num_frames_in_window: int
    num_windows_at_once: int
    order: str
    frames_per_s: float
    regenerated_frames: np.ndarray | None = None
    used_samples: np.ndarray | None = None

    @property
    def starts(self):
        """First latent frames of the windows."""
        return window_starts(self.num_latent_frames, self.num_frames_in_window)

    @property
    def spans(self):
        """`(start, end)` in latent frames of each part that is denoised on its own."""
        starts = self.starts
        if self.order == "sequential" and len(starts) > 1:
            return [(start, start + self.num_frames_in_window) for start in starts]
        return [(0, self.num_latent_frames)]

    def is_denoised(self, start):
        """Whether something is regenerated in the window from frame `start` on."""
        frames = slice(start, start + self.num_frames_in_window)
        return self.regenerated_frames is None or bool(self.regenerated_frames[frames].any())

    def chunks(self, num_frames_per_latent, context):
        """For each window the mel frames that can be vocoded once it is decoded: `(first, start, end, ready)`. Those
        from `start` to `end` are a chunk of the result, those from `first` to `ready` are the input for it: the chunk
        and up to `context` frames on its sides. A chunk can be empty."""
        chunks, num_all, num_done = [], self.num_latent_frames * num_frames_per_latent, 0
        for following in [*self.starts[1:], None]:
            ready = end = num_all
            if following is not None:
                ready = following * num_frames_per_latent
                end = max(ready - context, num_done)
            chunks.append((max(num_done - context, 0), num_done, end, ready))
            num_done = end
        return chunks

    def is_used(self, start, end):
        """Whether the result depends on a generated sample in a range."""
        return self.used_samples is None or bool(self.used_samples[start:end].any())


def windows_over(ranges, starts, length):
    """Those of `starts` whose windows, of `length`, overlap one of `ranges`, pairs of start and end."""
    return [s for s in starts if any(s < end and start < s + length for start, end in ranges)]


def window_starts(num_frames, num_frames_in_window):
    """First frames of evenly spaced windows over `num_frames`, each overlapping the next by a quarter or more."""
    if num_frames <= num_frames_in_window:
        return [0]
    stride = max(num_frames_in_window * 3 // 4, 1)
    num_windows = math.ceil((num_frames - num_frames_in_window) / stride) + 1
    return [round(i * (num_frames - num_frames_in_window) / (num_windows - 1)) for i in range(num_windows)]


def window_weights(num_frames, device):
    """Hann weights, positive everywhere, for blending overlapping windows along the frames."""
    weights = torch.hann_window(num_frames + 2, periodic=False, dtype=torch.float32, device=device)[
        1:-1
    ]  # (num_frames,)
    return weights[:, None]  # (num_frames, 1)


def blend_windows(
    function,
    inputs,
    num_frames_in_window,
    num_windows_at_once=1,
    factor_in=1,
    factor_out=1,
    is_needed=lambda start: True,
):
    """Apply `function` to overlapping windows along the frames, and average its outputs where they overlap.

    For a UNet this is equation (5) of MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113), with weights that fade
    towards the ends of a window, so that there is no step where windows begin and end.

    Args:
        function (`Callable`): called with `num_windows * batch` rows, window by window, and the windows' first frames.
        inputs (`torch.Tensor` of shape `(batch, channels, num_frames * factor_in, bins)`)
        num_frames_in_window (`int`): more frames than this are split into windows.
        num_windows_at_once (`int`, *optional*, defaults to 1): most windows in one call of `function`.
        factor_in, factor_out (`int`, *optional*, default to 1): input and output frames for each counted frame.
        is_needed (`Callable`, *optional*): whether to compute the window from a first frame on, if there are several.
            The result is 0 where no window is computed.
    """
    starts = window_starts(inputs.shape[2] // factor_in, num_frames_in_window)
    if len(starts) == 1:
        return function(inputs, starts)
    starts = [start for start in starts if is_needed(start)]
    total, total_weights = None, None
    for i in range(0, len(starts), num_windows_at_once):
        group = starts[i : i + num_windows_at_once]
        windows = [inputs[:, :, s * factor_in : (s + num_frames_in_window) * factor_in] for s in group]
        for start, output in zip(group, function(torch.cat(windows), group).chunk(len(group))):
            if total is None:
                num_frames = inputs.shape[2] // factor_in * factor_out
                total = output.new_zeros((*output.shape[:2], num_frames, output.shape[3]))
                total_weights = output.new_zeros((num_frames, 1))
                weights = window_weights(output.shape[2], output.device)
            frames = slice(start * factor_out, start * factor_out + output.shape[2])
            total[:, :, frames] += output * weights
            total_weights[frames] += weights
    return total / total_weights.clamp(min=torch.finfo(total_weights.dtype).tiny)
