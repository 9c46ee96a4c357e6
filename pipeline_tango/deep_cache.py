"""DeepCache: hooks of a UNet that computes only its shallowest branch in some evaluations."""

import contextlib

import torch
from diffusers.hooks import ModelHook


DEEP_CACHE_HOOK = "deep_cache"


class DeepCache:
    """What the hooks of a UNet share that computes only its shallowest branch in some evaluations.

    That branch is the first convolution, the last resnet and attention of the last up block, which that convolution
    skips to, and the last convolution. What the rest makes, the other input of that resnet, changes slowly from one
    evaluation to the next and is kept: DeepCache (Ma et al. 2023, arXiv 2312.00858).

    Args:
        interval (`int`): every how many evaluations everything is computed.
        num_skip_channels (`int`): channels of the first convolution's output.
    """

    def __init__(self, interval, num_skip_channels):
        self.interval = interval
        self.num_skip_channels = num_skip_channels
        self.mode = "off"  # for the hooks: "keep" sets `features`, "reuse" reads them
        self.features = None  # (rows, channels, frames, bins)
        self.reset()

    def reset(self):
        """Forget what was kept, so that everything is computed next."""
        self.kept = {}  # first frame of a window -> features
        self.age = 0  # evaluations since the last full one
        self.is_guided = False  # whether `kept` has the unconditional rows

    def advance(self, is_guided):
        """Begin an evaluation: a full one if what is kept is too old or lacks the unconditional rows."""
        self.age += 1
        if not self.kept or self.age == self.interval or (is_guided and not self.is_guided):
            self.kept, self.age, self.is_guided = {}, 0, is_guided

    @contextlib.contextmanager
    def window(self, start, num_rows):
        """Within this context the UNet gets the windows from frame `start` on, as `num_rows` rows."""
        self.mode = "reuse" if self.age else "keep"
        if self.age:
            self.features = self.kept[start][-num_rows:]  # the conditional rows are the last
        try:
            yield
            if not self.age:
                self.kept[start] = self.features.clone()  # without the tensor that it is a part of
        finally:
            self.mode, self.features = "off", None


class DeepModuleHook(ModelHook):
    """Skips a module while kept features are reused.

    Args:
        cache ([`DeepCache`])
        placeholder (`Callable`): makes of a tensor without channels what the module's caller expects.
    """

    def __init__(self, cache, placeholder):
        super().__init__()
        self.cache = cache
        self.placeholder = placeholder

    def new_forward(self, module, hidden_states, *args, **kwargs):
        if self.cache.mode == "reuse":
            return self.placeholder(hidden_states[:, :0])
        return self.fn_ref.original_forward(hidden_states, *args, **kwargs)


class ShallowResnetHook(ModelHook):
    """Keeps the deep features among the input channels of the last resnet, or puts kept ones there."""

    _is_stateful = True

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def pre_forward(self, module, hidden_states, *args, **kwargs):
        if self.cache.mode == "keep":
            self.cache.features = hidden_states[:, : -self.cache.num_skip_channels]
        elif self.cache.mode == "reuse":
            hidden_states = torch.cat([self.cache.features, hidden_states], dim=1)  # (rows, channels, frames, bins)
        return (hidden_states, *args), kwargs

    def reset_state(self, module):
        self.cache.reset()
        return module
