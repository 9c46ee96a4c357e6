"""DeepCache: a UNet that computes only its shallowest branch in some evaluations."""

import contextlib
import functools
import threading
from numbers import Integral

import torch


class DeepCacheSwitch:
    """What the modules of one UNet see of its deep cache, and the lock for calls that share the UNet.

    Args:
        num_skip_channels (`int`): channels of the first convolution's output.
    """

    def __init__(self, num_skip_channels):
        self.num_skip_channels = num_skip_channels
        self.mode = "off"  # "keep" sets `features`, "reuse" reads them
        self.features = None  # (rows, channels, frames, bins)
        self.lock = threading.Lock()

    def __getstate__(self):  # of copies, which begin without a call
        return self.num_skip_channels

    def __setstate__(self, num_skip_channels):
        self.__init__(num_skip_channels)


class DeepCache:
    """The features that one call keeps of a UNet.

    The shallowest branch is the first convolution, the last resnet and attention of the last up block, where the skip
    connection from that convolution ends, and the last convolution. The output of all other layers, which is the other
    input of that resnet, changes slowly from one evaluation to the next and is reused: DeepCache (Ma et al. 2023,
    arXiv 2312.00858).

    Args:
        interval (`int`): the whole UNet is computed in one of so many evaluations.
        switch ([`DeepCacheSwitch`]): the UNet's.
    """

    def __init__(self, interval, switch):
        self.interval = interval
        self.switch = switch
        self.kept = {}  # first frame of a window -> features
        self.age = 0  # evaluations since the last full one
        self.is_guided = False  # whether `kept` has the unconditional rows

    def for_a_call(self):
        """An empty cache of the same UNet, so that calls that share it do not get each other's features."""
        return DeepCache(self.interval, self.switch)

    @property
    def mode(self):
        return self.switch.mode

    @property
    def features(self):
        return self.switch.features

    @features.setter
    def features(self, features):
        self.switch.features = features

    def advance(self, is_guided):
        """Begin an evaluation: a full one if the features are too old or lack the unconditional rows."""
        self.age += 1
        if not self.kept or self.age == self.interval or (is_guided and not self.is_guided):
            self.kept, self.age, self.is_guided = {}, 0, is_guided

    @contextlib.contextmanager
    def window(self, start, num_rows):
        """Context in which the UNet is called with the windows from frame `start` on, as `num_rows` rows. Other calls
        of this UNet in such a context wait for its end."""
        switch = self.switch
        with switch.lock:
            switch.mode = "reuse" if self.age else "keep"
            if self.age:
                switch.features = self.kept[start][-num_rows:]  # the conditional rows are the last
            try:
                yield
                if not self.age:
                    self.kept[start] = switch.features.clone()  # a view would keep the whole tensor alive
            finally:
                switch.mode, switch.features = "off", None


# In place of the `forward` of modules: module-level functions, whose partials can be copied and pickled with a UNet.


def own_forward(module, forward):
    """The `forward` that a module had before, that of its class if `forward` is `None`."""
    return functools.partial(type(module).forward, module) if forward is None else forward


def skipped_forward(module, switch, forward, placeholder, hidden_states, *args, **kwargs):
    """Of a module that is skipped while features are reused. `placeholder` turns a tensor without channels into the
    form of its output."""
    if switch.mode == "reuse":
        return placeholder(hidden_states[:, :0])
    return own_forward(module, forward)(hidden_states, *args, **kwargs)


def shallow_forward(module, switch, forward, hidden_states, *args, **kwargs):
    """Of the last resnet: stores the deep features among its input channels, or inserts the stored ones there."""
    if switch.mode == "keep":
        switch.features = hidden_states[:, : -switch.num_skip_channels]
    elif switch.mode == "reuse":
        hidden_states = torch.cat([switch.features, hidden_states], dim=1)  # (rows, channels, frames, bins)
    return own_forward(module, forward)(hidden_states, *args, **kwargs)


def like_a_resnet(nothing):
    return nothing


def like_attention(nothing):
    return (nothing,)


def like_a_down_block(num_outputs, nothing):
    return nothing, (nothing,) * num_outputs


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

    switch = DeepCacheSwitch(unet.conv_in.out_channels)

    def replace_forward(module, function, *args):
        forward = vars(module).get("forward")  # that of another wrapper, such as a hook that offloads
        module.forward = functools.partial(function, module, switch, forward, *args)

    for block in unet.down_blocks:
        num_outputs = len(block.resnets) + len(block.downsamplers or ())
        replace_forward(block, skipped_forward, functools.partial(like_a_down_block, num_outputs))
    *up_blocks, last_block = unet.up_blocks
    *resnets, last_resnet = last_block.resnets
    for module in (unet.mid_block, *up_blocks, *resnets):
        if module is not None:
            replace_forward(module, skipped_forward, like_a_resnet)
    for attention in getattr(last_block, "attentions", [])[:-1]:
        replace_forward(attention, skipped_forward, like_attention)
    replace_forward(last_resnet, shallow_forward)
    last_resnet._deep_cache = DeepCache(interval, switch)


def remove_deep_cache(unet):
    """Undo [`install_deep_cache`]. Does nothing if `unet` has no deep cache."""
    if find_deep_cache(unet) is None:
        return
    for module in unet.modules():
        forward = vars(module).get("forward")
        if getattr(forward, "func", None) not in (skipped_forward, shallow_forward):
            continue  # below a wrapper that came later, a forward of a removed cache does what the one before did
        _, _, forward, *_ = forward.args
        if forward is None:
            del module.forward
        else:
            module.forward = forward
    del unet.up_blocks[-1].resnets[-1]._deep_cache


def find_deep_cache(unet):
    """The [`DeepCache`] of `unet`, `None` if it has none."""
    return None if unet is None else getattr(unet.up_blocks[-1].resnets[-1], "_deep_cache", None)
