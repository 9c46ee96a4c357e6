"""Initial weights of a VAE: a linear transform, written into an AutoencoderKL.

Log-mel spectrograms are smooth: of the 16 values in a cell of 4 frames and 4 bands, 8 principal components leave a
mean error of 0.07 nepers, which random weights do not reach in hours of training on a CPU. Here a VAE starts as that
transform, as far as its upsamplers can compute it, and learns the rest.

Group norms normalise the level of a sound away. So the group that carries the sound gets two channels of a large
constant, which make the deviation that the norm divides by nearly constant.
"""

import torch
from torch import nn
from torch.nn.functional import interpolate, pixel_unshuffle, unfold


CONSTANT = 50.0  # beside sound of unit variance
EVENNESS = 0.5  # each component is divided by this power of its deviation: 0 is no change, 1 whitens
RIDGE = 1e-2  # of the ridge regression, as a variance of noise on an upsampler's inputs
POSTERIOR_DEVIATION = 0.02  # beside latents of unit variance


def can_initialise(vae):
    """Whether a VAE is wide enough for the transform: enough channels at each level and in each group of the last
    norms, and a last level of another width than the one before, on the way down and up."""
    config = vae.config
    widths, factor = config.block_out_channels, 2 ** (len(config.block_out_channels) - 1)
    return (
        factor > 1
        and config.latent_channels <= factor**2
        and config.use_quant_conv
        and config.use_post_quant_conv
        and widths[-1] != widths[-2]
        and widths[0] != widths[1]
        and all(4 ** (level + 1) <= width for level, width in enumerate(widths[:-1]))
        and carrier_channels(vae.encoder.conv_norm_out, factor**2) is not None
        and carrier_channels(vae.decoder.conv_norm_out, 1) is not None
    )


def carrier_channels(norm, num_values):
    """Channels of a group norm for values, for their negatives and for constants, as three lists; None if there
    are too few. Each group has two constants, of opposite sign, and pairs of a value and its negative."""
    size = norm.num_channels // norm.num_groups
    pairs_in_group = (size - 2) // 2
    num_groups = -(-num_values // pairs_in_group) if pairs_in_group > 0 else norm.num_groups + 1
    if num_groups > norm.num_groups:
        return None
    values, constants = [], []
    for group in range(num_groups):
        first = group * size
        constants += [first, first + 1]
        values += range(first + 2, first + 2 + 2 * pairs_in_group, 2)
    values = values[:num_values]
    return values, [channel + 1 for channel in values], constants


@torch.no_grad()
def initialise(vae, mel_spectrograms):
    """Write the transform over the random weights of a VAE. Training can change every weight.

    - Encoder: the first convolution centres and scales, the downsamplers collect the values of a cell in channels, the
      last convolution computes their principal components. Resnets add nothing yet.
    - Decoder: the first convolution computes values from components; the upsamplers, which repeat a value and then
      convolve, get the weights of least squares.

    Args:
        vae (`AutoencoderKL`): one for which [`can_initialise`] is true.
        mel_spectrograms (`torch.Tensor` of shape `(batch, 1, num_frames, num_mel_bins)`): log-mel spectrograms like
            those to be trained on, of a few dozen sounds at least; both sizes are multiples of the VAE's factor.
    """
    mean, deviation = mel_spectrograms.mean(), mel_spectrograms.std()
    centred = (mel_spectrograms - mean) / deviation
    num_levels = len(vae.config.block_out_channels)
    num_latents = vae.config.latent_channels
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.bias.zero_()
    for block in (vae.encoder.mid_block, vae.decoder.mid_block, *vae.encoder.down_blocks, *vae.decoder.up_blocks):
        for resnet in block.resnets:
            resnet.conv2.weight.zero_()
        for attention in getattr(block, "attentions", None) or ():
            if attention is not None:
                attention.to_out[0].weight.zero_()
                attention.to_out[0].bias.zero_()

    # 1. Encoder: cells, by one level after the other
    first = vae.encoder.conv_in
    first.weight.div_(deviation)
    set_rows(first, [0], 1 / deviation)
    first.bias.copy_(-mean * first.weight.sum((1, 2, 3)))
    values, num_values = centred, 1
    for block in vae.encoder.down_blocks[:-1]:
        pass_on(block, range(num_values))
        down = block.downsamplers[0].conv  # sees rows 2i to 2i + 2
        down.weight[: 4 * num_values] = 0
        for channel in range(4 * num_values):
            down.weight[channel, channel // 4, channel % 4 // 2, channel % 2] = 1
        values, num_values = pixel_unshuffle(values, 2), 4 * num_values
    neutralise(vae.encoder.conv_norm_out, vae.encoder.down_blocks[-1], vae.encoder.mid_block.resnets, num_values)

    # 2. Principal components
    rows = values.transpose(0, 1).flatten(1).T  # (cells, num_values)
    components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:num_latents]
    spread = ((rows - rows.mean(0)) @ components.T).std(0).clamp(min=1e-4)  # 0 if all sounds are alike
    scales = spread**-EVENNESS
    scales /= (spread * scales).square().mean().sqrt()
    analysis = scales[:, None] * components  # (num_latents, num_values)
    set_difference(vae.encoder.conv_out, analysis, vae.encoder.conv_norm_out, num_values)
    vae.encoder.conv_out.bias[:num_latents] = -analysis @ rows.mean(0)
    vae.encoder.conv_out.weight[num_latents:] = 0
    vae.encoder.conv_out.bias[num_latents:] = 2 * torch.tensor(POSTERIOR_DEVIATION).log()
    for layer in (vae.quant_conv, vae.post_quant_conv):
        set_rows(layer, range(len(layer.weight)), 1.0, range(len(layer.weight)))

    # 3. Decoder: upsampling by least squares, one level after the other
    synthesis = components.T / scales  # (num_values, num_latents)
    first = vae.decoder.conv_in
    first.weight[:num_values] = 0
    first.weight[:num_values, :, 1, 1] = synthesis
    first.bias[:num_values] = rows.mean(0)
    decoded = (rows - rows.mean(0)) @ components.T @ components + rows.mean(0)
    decoded = decoded.T.unflatten(1, (len(values), *values.shape[2:])).transpose(0, 1)  # as `values`
    for level, block in enumerate(vae.decoder.up_blocks[:-1]):
        pass_on(block, range(num_values))
        target = centred
        for _ in range(num_levels - 2 - level):
            target = pixel_unshuffle(target, 2)
        repeated = interpolate(decoded, scale_factor=2, mode="nearest")
        patches = unfold(repeated, 3, padding=1).transpose(1, 2).flatten(0, 1)  # (positions, num_values * 9)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
        wanted = target.flatten(2).transpose(1, 2).flatten(0, 1)  # (positions, num_values / 4)
        # ridge regression: least squares would have weights of thousands that cancel each other
        covariance = patches.T @ patches / len(patches) + RIDGE * torch.eye(patches.shape[1])
        solution = torch.linalg.solve(covariance, patches.T @ wanted / len(patches))
        decoded = (patches @ solution).unflatten(0, (len(target), -1)).transpose(1, 2).reshape(target.shape)
        up = block.upsamplers[0].conv
        up.weight[: target.shape[1]] = 0
        up.weight[: target.shape[1], :num_values] = solution[:-1].T.unflatten(1, (num_values, 3, 3))
        up.bias[: target.shape[1]] = solution[-1]
        num_values = target.shape[1]
    last_block = vae.decoder.up_blocks[-1]
    neutralise(vae.decoder.conv_norm_out, last_block, last_block.resnets[1:], 1)
    set_difference(vae.decoder.conv_out, deviation.reshape(1, 1), vae.decoder.conv_norm_out, 1)
    vae.decoder.conv_out.bias[0] = mean


def set_rows(layer, rows, weight, columns=(0,)):
    """Let some output channels of a convolution be one input channel each, times a weight."""
    layer.weight[list(rows)] = 0
    middle = layer.kernel_size[0] // 2
    layer.weight[list(rows), list(columns), middle, middle] = weight


def pass_on(block, channels):
    """Pass channels on unchanged where the resnets of a block change the width."""
    for resnet in block.resnets:
        if resnet.conv_shortcut is not None:
            set_rows(resnet.conv_shortcut, channels, 1.0, channels)


def neutralise(norm, block, resnets, num_values):
    """Let a group norm pass values on, which are the first input channels of `block`.

    The shortcut of the block turns them into pairs and adds constants, which `resnets` must not read: the output of
    weights that read a large constant would change by large steps.
    """
    positive, negative, constants = carrier_channels(norm, num_values)
    shortcut = block.resnets[0].conv_shortcut
    set_rows(shortcut, positive, 1.0, range(num_values))
    set_rows(shortcut, negative, -1.0, range(num_values))
    shortcut.weight[constants] = 0
    shortcut.bias[constants] = CONSTANT * (-1.0) ** torch.arange(len(constants))
    size = norm.num_channels // norm.num_groups
    num_channels = size * (len(constants) // 2)  # of the groups in use
    # deviation of the group: of its two constants, and of its other channels of unit variance
    factor = ((2 * CONSTANT**2 + size - 2) / size) ** 0.5
    for each in (norm, *(resnet.norm1 for resnet in [*block.resnets[1:], *resnets])):
        each.weight[:num_channels] = factor
        each.weight[constants] = 0


def set_difference(layer, matrix, norm, num_values):
    """Let the first output channels of a convolution be linear in the values that a norm and SiLU pass on in pairs:
    silu(x) - silu(-x) = x."""
    positive, negative, constants = carrier_channels(norm, num_values)
    layer.weight[: len(matrix)] = 0
    layer.weight[: len(matrix), positive, 1, 1] = matrix
    layer.weight[: len(matrix), negative, 1, 1] = -matrix
