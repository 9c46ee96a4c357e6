"""Mixing pairs of sounds into new training examples: section 2.3 of the Tango paper (Ghosal et al. 2023, arXiv
2304.13731), after Between-Class learning (Tokozume et al. 2018, arXiv 1711.10282). Pure functions."""

import math

import torch
import torch.nn.functional as F


MIN_LEVEL_DB = -80.0  # floor of levels and of the A-weighting curve
RULES = ("pressure", "random")


def a_weighting_db(frequencies_in_hz):
    """A-weighting curve: the sensitivity of hearing at each frequency, relative to 1 kHz.

    Args:
        frequencies_in_hz (`torch.Tensor`): non-negative, any shape.

    Returns:
        `torch.Tensor` of the same shape: decibels, floored at -80.

    Source: IEC 61672-1, with its constant of 2.00 dB rounded as usual, so that 1 kHz is at 0 dB to within 0.01.
    """
    squared = frequencies_in_hz.square()
    weighting_db = 2.0 + 20.0 * (
        2.0 * math.log10(12194.0)
        + 2.0 * squared.log10()
        - (squared + 12194.0**2).log10()
        - (squared + 20.6**2).log10()
        - 0.5 * (squared + 107.7**2).log10()
        - 0.5 * (squared + 737.9**2).log10()
    )
    return weighting_db.clamp(min=MIN_LEVEL_DB)


def pressure_level_db(waveform, sampling_rate):
    """A-weighted level of the loudest moment of a sound, the G of equation (9).

    Frames last 2048 samples at 16 kHz, at other rates the nearest power of two to the same time, and overlap by half.
    The end is padded with zeros to whole frames; the original leaves it out and fails on less than a frame.

    Args:
        waveform (`torch.Tensor` of shape `(num_samples,)` or `(batch, num_samples)`).
        sampling_rate (`int`): in Hz.

    Returns:
        `torch.Tensor` of shape `()` or `(batch,)`: decibels to an arbitrary reference, -80 for silence.

    Raises:
        ValueError: if `waveform` is empty, not finite or of another shape, or `sampling_rate` not positive.
    """
    _check_waveform(waveform, "waveform")
    if not sampling_rate > 0:
        raise ValueError(f"`sampling_rate` has to be positive, not {sampling_rate}.")

    frame_length = 2 ** max(round(math.log2(2048 * sampling_rate / 16000)), 1)
    hop_length = frame_length // 2
    num_hops = max(math.ceil(waveform.shape[-1] / hop_length), 2)
    padded = F.pad(waveform.float(), (0, num_hops * hop_length - waveform.shape[-1]))
    frames = padded.unfold(-1, frame_length, hop_length)  # (batch, num_frames, frame_length)
    window = torch.hann_window(frame_length, device=waveform.device)
    power = torch.fft.rfft(frames * window).abs().square()  # (batch, num_frames, num_frequency_bins)
    weighting_db = a_weighting_db(torch.fft.rfftfreq(frame_length, 1 / sampling_rate, device=waveform.device))
    weighted_power = power @ 10 ** (weighting_db / 10)  # (batch, num_frames)
    return (10 * weighted_power.clamp(min=10 ** (MIN_LEVEL_DB / 10)).log10()).amax(-1)


def pressure_weight(first, second, sampling_rate, ratio=0.5):
    """Weight p of `first` that gives it the perceived share `ratio`, whatever the levels of the two recordings.

        p = 1 / (1 + 10^((G1 - G2) / 20) (1 - ratio) / ratio)

    Source: equation (9), where `ratio` is 1/2; with it, Tokozume et al. 2018. `ratio` is in [0, 1], a number or
    `(batch,)`; the result is a float64 `torch.Tensor` of shape `()` or `(batch,)` on the CPU.
    """
    difference_db = pressure_level_db(first, sampling_rate) - pressure_level_db(second, sampling_rate)
    ratio = torch.as_tensor(ratio, dtype=torch.float64, device="cpu")
    # float64: float32 would round p to 1 where `first` is silence, and the other sound would be lost
    return ratio / (ratio + 10 ** (difference_db.cpu().double() / 20) * (1 - ratio))


def superpose(first, second, first_weight):
    """Weighted sum of two sounds that keeps the energy of uncorrelated ones, equation (10):
    (p x1 + (1 - p) x2) / sqrt(p^2 + (1 - p)^2). `first_weight`, the p, is a number or a tensor `()` or `(batch,)`."""
    weight = torch.as_tensor(first_weight, dtype=torch.float64, device="cpu").unsqueeze(-1)  # (batch, 1)
    energy = weight.square() + (1 - weight).square()
    return (weight / energy.sqrt()).to(first) * first + ((1 - weight) / energy.sqrt()).to(first) * second


def mix(first, second, sampling_rate, ratio=0.5, rule="pressure"):
    """Mix two sounds, or two batches of sounds pair by pair.

    Each mix is brought by itself to a peak of 0.5, as all waveforms are that the released VAEs have seen; the original
    divides all mixes of a batch by one maximum, so that their levels depend on each other. A mix with silence is
    the other sound, and silence mixed with silence is silence, not NaN.

    Args:
        first, second (`torch.Tensor` of shape `(num_samples,)` or `(batch, num_samples)`): of the same shape.
        sampling_rate (`int`): in Hz.
        ratio (`float` or `torch.Tensor` of shape `(batch,)`, *optional*, defaults to 0.5): share of `first`, 0 to 1.
        rule (`str`, *optional*, defaults to `"pressure"`): `"pressure"`: `ratio` is the perceived share, see
            `pressure_weight`. `"random"`: `ratio` is the weight itself, whatever the levels.

    Returns:
        `torch.Tensor` of the same shape, float32.

    Raises:
        ValueError: if a waveform is empty, not finite or of a wrong shape, or another argument outside its range.
    """
    _check_waveform(first, "first")
    _check_waveform(second, "second")
    if first.shape != second.shape:
        raise ValueError(
            f"`first` and `second` have to be of one shape, not {tuple(first.shape)} and {tuple(second.shape)}."
        )
    shares = torch.as_tensor(ratio)
    if shares.shape not in ((), first.shape[:-1]) or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"`ratio` has to be in [0, 1], one number or one for each pair, not {ratio}.")
    if rule not in RULES:
        raise ValueError(f"`rule` has to be one of {RULES}, not {rule!r}.")

    weight = pressure_weight(first, second, sampling_rate, shares) if rule == "pressure" else shares
    mixed = superpose(first.float(), second.float(), weight)
    peak = mixed.abs().amax(-1, keepdim=True)
    return torch.where(peak > 0, 0.5 * mixed / peak, 0.0)


def mix_captions(first, second):
    """Caption of a mix: `first and second`.

    Full stops that end `first` are dropped, where the original keeps them. The first letter of `second` is lowered,
    unless its first word is "I" or begins with two capitals ("TV"); a proper name is lowered too, as in the original.
    An empty caption adds nothing.

    >>> mix_captions("A dog barks.", "A man speaks.")
    'A dog barks and a man speaks.'
    """
    for name, caption in (("first", first), ("second", second)):
        if not isinstance(caption, str):
            raise ValueError(f"`{name}` has to be a string, not {type(caption)}.")
    first, second = first.strip(), second.strip()
    beginning = first.rstrip(". ")
    if not beginning or not second:
        return second or first
    is_pronoun = second[0] == "I" and not second[1:2].isalnum()
    if not is_pronoun and not second[1:2].isupper():
        second = second[0].lower() + second[1:]
    return f"{beginning} and {second}"


def mix_pairs(num_items, num_mixes, generator=None):
    """Draw which items of a batch to mix: distinct pairs, each equally likely.

    Args:
        num_items (`int`): size of the batch.
        num_mixes (`int`): how many pairs, all n (n - 1) / 2 if there are no more.
        generator (`torch.Generator`, *optional*): on the CPU.

    Returns:
        `torch.Tensor` of shape `(num_pairs, 2)`: indices, the lower one first.
    """
    for name, value in (("num_items", num_items), ("num_mixes", num_mixes)):
        if value < 0:
            raise ValueError(f"`{name}` has to be at least 0, not {value}.")
    pairs = torch.combinations(torch.arange(num_items))  # (n (n - 1) / 2, 2)
    return pairs[torch.randperm(len(pairs), generator=generator)[:num_mixes]]


def augment(waveforms, captions, sampling_rate, rule="pressure", num_mixes=4, ratio=0.5, generator=None):
    """A batch followed by mixes of its pairs. 2 items become 3, 3 become 6, more become `num_mixes` more.

    Silent sounds stay in the batch but are not mixed, since the caption would name an inaudible sound. Prefixes of
    prompts are to be put before the returned captions, not before `captions`.

    Args:
        waveforms (`torch.Tensor` of shape `(batch, num_samples)`).
        captions (`list[str]`): one for each waveform.
        sampling_rate (`int`): in Hz.
        rule (`str`, *optional*, defaults to `"pressure"`): see `mix`; `"none"` returns the batch as it is.
        num_mixes (`int`, *optional*, defaults to 4): the original's.
        ratio (`float`, *optional*, defaults to 0.5): the original's. `"random"` draws its own, uniform in [0, 1).
        generator (`torch.Generator`, *optional*): on the CPU.

    Returns:
        waveforms of shape `(batch + num_pairs, num_samples)` and a list of as many captions.

    Raises:
        ValueError: if `captions` does not fit `waveforms`, or as in `mix`.
    """
    if rule not in (*RULES, "none"):
        raise ValueError(f"`rule` has to be one of {(*RULES, 'none')}, not {rule!r}.")
    if waveforms.ndim != 2 or len(waveforms) != len(captions):
        raise ValueError(
            "`captions` has to hold one caption for each row of `waveforms` (batch, num_samples), not "
            f"{len(captions)} for {tuple(waveforms.shape)}."
        )
    if rule == "none":
        return waveforms, captions

    audible = (pressure_level_db(waveforms, sampling_rate) > MIN_LEVEL_DB).nonzero().squeeze(-1).cpu()
    pairs = audible[mix_pairs(len(audible), num_mixes, generator)]  # (num_pairs, 2)
    if len(pairs) == 0:
        return waveforms, captions
    shares = torch.rand(len(pairs), generator=generator) if rule == "random" else ratio
    mixes = mix(waveforms[pairs[:, 0]], waveforms[pairs[:, 1]], sampling_rate, shares, rule)
    mixed_captions = [mix_captions(captions[first], captions[second]) for first, second in pairs.tolist()]
    return torch.cat([waveforms, mixes.to(waveforms.dtype)]), [*captions, *mixed_captions]


def _check_waveform(waveform, name):
    if waveform.ndim not in (1, 2) or waveform.numel() == 0 or not waveform.is_floating_point():
        raise ValueError(
            f"`{name}` has to be a floating-point tensor (num_samples,) or (batch, num_samples) and not empty, not "
            f"{tuple(waveform.shape)} {waveform.dtype}."
        )
    if not waveform.isfinite().all():
        raise ValueError(f"`{name}` has to be finite, but holds NaN or infinity.")
