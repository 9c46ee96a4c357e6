"""The kernels that compute a pipeline: attention, memory formats, the vocoder's convolutions, compilation."""

import torch
import torch.nn.functional as F

from .attention import BlockedAttnProcessor


class Conv1dAs2d(torch.nn.Conv1d):
    """A 1-D convolution that is computed as a 2-D one on channels-last tensors: the same function of the same weights,
    for which processors have faster kernels."""

    def _conv_forward(self, hidden_states, weight, bias):
        """`hidden_states`, and the result, are `(channels, time)` or `(batch, channels, time)`."""
        image = hidden_states.unsqueeze(-2)  # (batch, channels, 1, time)
        if image.ndim == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        padding, dilation = (0, *self.padding), (1, *self.dilation)
        return F.conv2d(image, weight.unsqueeze(2), bias, (1, 1), padding, dilation).squeeze(-2)


def use_conv2d(module, enabled=True):
    """Compute the 1-D convolutions in `module` as 2-D ones, or as before if not `enabled`.

    The module's class, its weights and what is saved stay as they are. Convolutions with a stride, groups, weight
    normalisation or another padding than zeros are left alone, and so are subclasses.
    """
    for layer in module.modules():
        if type(layer) is Conv1dAs2d and not enabled:
            layer.__class__ = torch.nn.Conv1d
        elif type(layer) is torch.nn.Conv1d and enabled:
            is_plain = layer.stride == (1,) and layer.groups == 1 and layer.padding_mode == "zeros"
            if is_plain and not isinstance(layer.padding, str):
                layer.__class__ = Conv1dAs2d


def use_kernels(pipe, names):
    """Compute the models of a pipeline by the kernels `names`, those of `KERNELS` in `presets`.

    Weights, and what is saved, stay as they are. Call it when the models have their dtype, device and adapters.
    """
    if "blocked-attention" in names:
        pipe.unet.set_attn_processor(BlockedAttnProcessor())
    for name in ("vae", "unet"):
        if f"channels-last-{name}" in names:
            getattr(pipe, name).to(memory_format=torch.channels_last)
    if "conv2d-vocoder" in names:
        use_conv2d(pipe.vocoder)
    if "compile-unet" in names:
        pipe.unet.compile()
