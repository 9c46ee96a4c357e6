"""DeepCache: a UNet that computes only its shallowest branch in some evaluations."""

import contextlib
from numbers import Integral

import torch
from diffusers.hooks import HookRegistry, ModelHook


DEEP_CACHE_HOOK = "deep_cache"


class DeepCache:
    """State that the hooks of one UNet share.

    The shallowest branch is the first convolution, the last resnet and attention of the last up block, where the skip
    connection from that convolution ends, and the last convolution. The output of all other layers, which is the other
    input of that resnet, changes slowly from one evaluation to the next and is reused: DeepCache (Ma et al. 2023,
    arXiv 2312.00858).

    Args:
        interval (`int`): the whole UNet is computed in one of so many evaluations.
        num_skip_channels (`int`): channels of the first convolution's output.
    """

    def __init__(self, interval, num_skip_channels):
        self.interval = interval
        self.num_skip_channels = num_skip_channels
        self.mode = "off"  # for the hooks: "keep" sets `features`, "reuse" reads them
        self.features = None  # (rows, channels, frames, bins)
        self.reset()

    def reset(self):
        """Drop all features, so that the next evaluation computes the whole UNet."""
        self.kept = {}  # first frame of a window -> features
        self.age = 0  # evaluations since the last full one
        self.is_guided = False  # whether `kept` has the unconditional rows

    def advance(self, is_guided):
        """Begin an evaluation: a full one if the features are too old or lack the unconditional rows."""
        self.age += 1
        if not self.kept or self.age == self.interval or (is_guided and not self.is_guided):
            self.kept, self.age, self.is_guided = {}, 0, is_guided

    @contextlib.contextmanager
    def window(self, start, num_rows):
        """Context in which the UNet is called with the windows from frame `start` on, as `num_rows` rows."""
        self.mode = "reuse" if self.age else "keep"
        if self.age:
            self.features = self.kept[start][-num_rows:]  # the conditional rows are the last
        try:
            yield
            if not self.age:
                self.kept[start] = self.features.clone()  # a view would keep the whole tensor alive
        finally:
            self.mode, self.features = "off", None


class DeepModuleHook(ModelHook):
    """Skips a module while features are reused.

    Args:
        cache ([`DeepCache`])
        placeholder (`Callable`): turns a tensor without channels into the form of the module's output.
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
    """Stores the deep features among the input channels of the last resnet, or inserts the stored ones there."""

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


def install_deep_cache(unet, interval):
    """Hook a [`DeepCache`] into `unet`, in place of one that it has.

    Raises:
        ValueError: if `interval` is not a positive integer, if `unet` is `None` or has other kinds of blocks.
    """
    if not isinstance(interval, Integral) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"`interval` has to be an integer of at least 1, not {interval!r}.")
    if unet is None:
        raise ValueError("This pipeline was built without `unet`, which a deep cache is for.")
    known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
    strangers = {type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)} - known
    if strangers:
        raise ValueError(f"`unet` has blocks that a deep cache cannot skip: {sorted(strangers)}.")
    remove_deep_cache(unet)

    def skip(module, placeholder):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(
            DeepModuleHook(cache, placeholder), DEEP_CACHE_HOOK
        )

    cache = DeepCache(interval, unet.conv_in.out_channels)
    for block in unet.down_blocks:
        num_outputs = len(block.resnets) + len(block.downsamplers or ())
        skip(block, lambda nothing, num_outputs=num_outputs: (nothing, (nothing,) * num_outputs))
    *up_blocks, last_block = unet.up_blocks
    *resnets, last_resnet = last_block.resnets
    for module in (unet.mid_block, *up_blocks, *resnets):
        if module is not None:
            skip(module, lambda nothing: nothing)
    for attention in getattr(last_block, "attentions", [])[:-1]:
        skip(attention, lambda nothing: (nothing,))
    HookRegistry.check_if_exists_or_initialize(last_resnet).register_hook(ShallowResnetHook(cache), DEEP_CACHE_HOOK)


def remove_deep_cache(unet):
    """Undo [`install_deep_cache`]. Does nothing if `unet` has no deep cache."""
    if find_deep_cache(unet) is None:
        return
    for module in unet.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook(DEEP_CACHE_HOOK, recurse=False)


def find_deep_cache(unet):
    """The [`DeepCache`] of `unet`, `None` if it has none."""
    if unet is None:
        return None
    registry = getattr(unet.up_blocks[-1].resnets[-1], "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(DEEP_CACHE_HOOK)
    return None if hook is None else hook.cache
