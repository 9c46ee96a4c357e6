"""Position channels: input channels of a UNet that tell it where in the clip each latent frame is.

A convolution knows the position of a frame by the padding at the ends of the clip, which does not reach far, and where
all else is noise nothing tells the middle's two sides apart: a UNet without such channels cannot know which of the
sounds of "a dog barks, then rain falls" is heard when, until noise has become sound. With coordinates as further
channels of the input it knows from the first step (CoordConv, Liu et al. 2018, arXiv 1807.03247).
"""

import math

import torch


def count_positions(unet_config, vae_config):
    """How many of a UNet's input channels are position channels: those that the VAE's latents leave.

    Args:
        unet_config, vae_config (mappings): with `in_channels` and with `latent_channels`.
    """
    return unet_config["in_channels"] - vae_config["latent_channels"]


def with_positions(latents, unet):
    """The input of a UNet: latents with as many position channels after their own as the UNet takes.

    At the middle of frame i of n, `u = (i + 0.5) / n`, the k-th is `cos(pi k u)`, the same in all mel bins: the first
    falls from 1 at the start of the clip, or of the window that is denoised, to -1 at its end.

    Args:
        latents (`torch.Tensor` of shape `(batch, channels, num_frames, num_bins)`)
        unet ([`UNet2DConditionModel`]): if it takes no more channels than latents have, they come back as they are.

    Returns:
        `torch.Tensor` of shape `(batch, unet.config.in_channels, num_frames, num_bins)`, of the latents' dtype.
    """
    batch_size, num_latent_channels, num_frames, num_bins = latents.shape
    num_channels = unet.config.in_channels - num_latent_channels
    if num_channels == 0:
        return latents
    u = (torch.arange(num_frames, device=latents.device) + 0.5) / num_frames
    k = torch.arange(1, num_channels + 1, device=latents.device)
    positions = torch.cos(math.pi * k[:, None] * u).to(latents.dtype)  # (num_channels, num_frames)
    return torch.cat([latents, positions[None, :, :, None].expand(batch_size, -1, -1, num_bins)], 1)
