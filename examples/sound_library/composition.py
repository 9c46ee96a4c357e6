"""A teacher that is told one sound at a time, for a UNet that is told a whole sequence.

A UNet that knows sounds one by one gives "A followed by B" without being trained on sequences: it is told "A" of the
first part of the noisy latents, and "B" of the rest. A UNet that is given the whole caption can be trained to give the
same (composition as in Liu et al. 2022, arXiv 2206.01714, in time instead of in a sum). The diffusion loss has one
clip of the many that fit a caption as its target and hardly depends on the text; the difference to the teacher does.
"""

import torch

from pipeline_tango.positions import with_positions


EARLY = 350  # timestep of 1000 from which on most of what is heard is still open
EARLY_SHARE = 0.5  # of the clips that a teacher gives targets for: drawn from these timesteps only


def leaning(prediction, first, second):
    """How far a prediction goes from the one for one sound (1) to that for another (-1): `(batch,)`, 0 in the middle.

    Args:
        prediction, first, second (`torch.Tensor` of shape `(batch, ...)`): predictions of the same noisy latents.
    """
    prediction, first, second = (each.float().flatten(1) for each in (prediction, first, second))
    difference = first - second
    return 2 * ((prediction - (first + second) / 2) * difference).sum(1) / difference.square().sum(1)


def predict(unet, text_encoder, noisy, timesteps, ids, mask):
    """What a UNet predicts of noisy latents, told the text of the token ids."""
    states = text_encoder(ids, attention_mask=mask)[0].to(noisy.dtype)
    return unet(with_positions(noisy, unet), timesteps, states, encoder_attention_mask=mask, return_dict=False)[0]


class Teacher:
    """A frozen UNet with its text encoder, which are told of the sounds of a scene one by one."""

    def __init__(self, unet, text_encoder):
        self.unet, self.text_encoder = (each.eval().requires_grad_(False) for each in (unet, text_encoder))

    @torch.no_grad()
    def predict(self, noisy, timesteps, ids, mask):
        return predict(self.unet, self.text_encoder, noisy, timesteps, ids, mask)

    def targets(self, noisy, timesteps, num_told, ids, mask, cut):
        """What is predicted of scenes that have one text, or two of which the second holds from `cut` on.

        Args:
            noisy (`torch.Tensor` of shape `(batch, channels, num_frames, num_bands)`)
            timesteps (`torch.Tensor` of shape `(batch,)`)
            num_told (`torch.Tensor` of shape `(batch,)`): texts of each scene, 1 or 2.
            ids, mask (`torch.Tensor` of shape `(2, batch, num_tokens)`): the first and the second text.
            cut (`int`): a frame.

        Returns:
            `torch.Tensor`: of the shape of `noisy`.
        """
        targets = torch.empty_like(noisy)
        single, pair = num_told == 1, num_told == 2
        if single.any():
            targets[single] = self.predict(noisy[single], timesteps[single], ids[0, single], mask[0, single])
        if pair.any():
            for sound, frames in enumerate((slice(None, cut), slice(cut, None))):
                part = noisy[pair][:, :, frames].contiguous()
                told = ids[sound, pair], mask[sound, pair]
                targets[pair, :, frames] = self.predict(part, timesteps[pair], *told)
        return targets


def draw_timesteps(told, num_timesteps):
    """Timesteps `(batch,)`: early ones more often for clips that a teacher is told of."""
    timesteps = torch.randint(num_timesteps, told.shape, device=told.device)
    early = torch.randint(EARLY * num_timesteps // 1000, num_timesteps, told.shape, device=told.device)
    return torch.where(told & (torch.rand(told.shape, device=told.device) < EARLY_SHARE), early, timesteps)
