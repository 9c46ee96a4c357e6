"""The kernels that compute a pipeline: attention, memory formats, convolutions, compilation, and their memory."""

import ctypes

import torch
import torch.nn.functional as F

from .attention import BlockedAttnProcessor


MAX_NARROW_BINS = 4  # of [`TransposedConv2d`]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Conv1dAs2d(torch.nn.Conv1d):
    """A 1-D convolution that is computed as a 2-D one on channels-last tensors: the same function of the same weights,
    for which processors have faster kernels."""

    def _conv_forward(self, hidden_states, weight, bias):
        """`hidden_states`, and the result, are `(channels, time)` or `(batch, channels, time)`."""
        padding, dilation = (0, *self.padding), (1, *self.dilation)
        return F.conv2d(as_image(hidden_states), weight.unsqueeze(2), bias, (1, 1), padding, dilation).squeeze(-2)


class ConvTranspose1dAs2d(torch.nn.ConvTranspose1d):
    """The same of a transposed convolution."""

    def forward(self, hidden_states, output_size=None):
        """`hidden_states`, and the result, are `(channels, time)` or `(batch, channels, time)`."""
        if output_size is not None:
            return super().forward(hidden_states, output_size)
        return F.conv_transpose2d(
            as_image(hidden_states),
            self.weight.unsqueeze(2),
            self.bias,
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            output_padding=(0, *self.output_padding),
            dilation=(1, *self.dilation),
        ).squeeze(-2)


def as_image(hidden_states):
    """`(channels, time)` as `(channels, 1, time)`, or a batch of these with channels last in memory."""
    image = hidden_states.unsqueeze(-2)  # (batch, channels, 1, time)
    return image.contiguous(memory_format=torch.channels_last) if image.ndim == 4 else image


FASTER_CLASSES = {torch.nn.Conv1d: Conv1dAs2d, torch.nn.ConvTranspose1d: ConvTranspose1dAs2d}


def use_conv2d(module, enabled=True):
    """Compute the 1-D convolutions in `module` as 2-D ones, or as before if not `enabled`.

    The module's class, its weights and what is saved stay as they are. Left alone are convolutions with groups, weight
    normalisation or another padding than zeros, those with a stride unless transposed, and subclasses.
    """
    classes = FASTER_CLASSES if enabled else {faster: plain for plain, faster in FASTER_CLASSES.items()}
    for layer in module.modules():
        if type(layer) not in classes or layer.groups > 1:
            continue
        is_plain = layer.stride == (1,) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if is_plain or isinstance(layer, torch.nn.ConvTranspose1d):
            layer.__class__ = classes[type(layer)]


class TransposedConv2d(torch.nn.Conv2d):
    """A convolution of images with few columns, computed on the transposed image: the same function of the same
    weights. CPUs convolve a row at a time, and do not get up to speed on short ones."""

    def _conv_forward(self, hidden_states, weight, bias):
        """`hidden_states`, and the result, are `(batch, channels, frames, bins)`."""
        num_frames, num_bins = hidden_states.shape[2:]
        if num_bins > MAX_NARROW_BINS or num_frames <= num_bins:
            return super()._conv_forward(hidden_states, weight, bias)
        image = hidden_states.transpose(2, 3).contiguous(memory_format=torch.channels_last)
        options = (each[::-1] for each in (self.stride, self.padding, self.dilation))
        image = F.conv2d(image, weight.transpose(2, 3), bias, *options)  # (batch, channels, bins, frames)
        return image.transpose(2, 3).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def use_transposed_convs(unet, num_bins):
    """Compute the convolutions of a UNet of narrow images on the transposed images, and all others with channels last.

    Classes of models, weights and what is saved stay as they are; weights are in another order in memory.

    Args:
        unet ([`UNet2DConditionModel`])
        num_bins (`int`): of latents. Each level has half as many as the one before.
    """
    unet.to(memory_format=torch.channels_last)
    blocks = [unet.mid_block, *unet.down_blocks, *reversed(unet.up_blocks)]
    last = len(unet.down_blocks) - 1
    for block, level in zip(blocks, (last, *range(last + 1), *range(last + 1))):
        for layer in block.modules() if block is not None and num_bins >> level <= MAX_NARROW_BINS else ():
            is_plain = type(layer) is torch.nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
            if is_plain and layer.kernel_size > (1, 1) and not isinstance(layer.padding, str):
                layer.__class__ = TransposedConv2d
                weight = layer.weight.transpose(2, 3).contiguous(memory_format=torch.channels_last)
                layer.weight.data = weight.transpose(2, 3)


def keep_memory():
    """Let this process keep up to 1 GiB of the memory that tensors free, for those that come next. With glibc's own
    settings the system takes back large tensors one by one, and clears the same pages again for the next ones.

    It holds for the rest of the process. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS or musl, no libraries, Windows
        return
    mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that all versions accept
    mallopt(M_TRIM_THRESHOLD, 2**30)


def use_kernels(pipe, names):
    """Compute the models of a pipeline by the kernels `names`, those of `KERNELS` in `presets`.

    Weights, and what is saved, stay as they are. Call it when the models have their dtype, device and adapters.
    """
    for name, model in (("blocked-attention", pipe.unet), ("blocked-attention-vae", pipe.vae)):
        if name in names:
            model.set_attn_processor(BlockedAttnProcessor())
    for name in ("vae", "unet"):
        if f"channels-last-{name}" in names:
            getattr(pipe, name).to(memory_format=torch.channels_last)
    if "transposed-convs" in names:
        use_transposed_convs(pipe.unet, pipe.num_mel_bins // pipe.vae_scale_factor)
    if "conv2d-vocoder" in names:
        use_conv2d(pipe.vocoder)
    if "compile-unet" in names:
        pipe.unet.compile()
    if "keep-memory" in names:
        keep_memory()
