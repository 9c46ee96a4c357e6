"""Prompts that move over time, and which of their texts guides a window."""

import math
from numbers import Real

import numpy as np
import torch


def read_prompts(prompt):
    """For each sound its texts over time: a list of `(seconds, text)`, of one element unless the prompt moves.

    Raises:
        ValueError: naming `prompt`.
    """

    def is_timed(value):
        return (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and isinstance(value[0], Real)
            and not isinstance(value[0], bool)
            and isinstance(value[1], str)
        )

    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list) and prompts and all(is_timed(each) for each in prompts):
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"`prompt` has to be a string or a list of at least one string, not {prompt!r}.")
    result = []
    for each in prompts:
        keyframes = [(0.0, each)] if isinstance(each, str) else each
        if not isinstance(keyframes, list) or not keyframes or not all(is_timed(pair) for pair in keyframes):
            raise ValueError(
                "`prompt` has to hold strings, or lists of (seconds, string) for prompts that move, not "
                f"{each!r:.200}."
            )
        times = [seconds for seconds, _ in keyframes]
        if not all(math.isfinite(time) for time in times) or times[0] < 0 or sorted(set(times)) != times:
            raise ValueError(f"`prompt` has to move through ascending seconds from 0 on, not {times}.")
        result.append(keyframes)
    return result


def texts_at(seconds, keyframes, num_copies):
    """Which text guides each sound at a time.

    Args:
        seconds (`float`)
        keyframes (`list[list[tuple[float, str]]]`): for each sound its texts over time.
        num_copies (`int`): waveforms of each sound, next to each other.

    Returns:
        Three tensors of shape `(batch * num_copies,)`: row of the text, row of the next one, share of the next one.
    """
    rows, next_rows, shares, num_rows = [], [], [], 0
    for each in keyframes:
        position = float(np.interp(seconds, [time for time, _ in each], np.arange(len(each))))
        index = int(position)
        following = min(index + 1, len(each) - 1)
        for copy in range(num_copies):
            rows.append((num_rows + index) * num_copies + copy)
            next_rows.append((num_rows + following) * num_copies + copy)
            shares.append(position - index)
        num_rows += len(each)
    return torch.tensor(rows), torch.tensor(next_rows), torch.tensor(shares)
