"""A loss on the cross-attention of a UNet: at each moment it is to look at the words for what is heard then.

The diffusion loss tells a UNet the order of the sounds of a scene only in passing, since most of its steps see what is
heard already. Where the words for each sound are known, and when it is heard, its attention can be told directly.
"""

import torch
from diffusers.models.attention_processor import Attention


class ObservedAttention:
    """Cross-attention that keeps its weights, `(batch, num_queries, num_tokens)`, means over the heads."""

    def __init__(self):
        self.weights = None

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states, attention_mask=None):
        query, key, value = (
            attn.head_to_batch_dim(project(states), out_dim=4)  # (batch, heads, queries or tokens, channels)
            for project, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        scores = (query @ key.transpose(2, 3)).float() * attn.scale
        if attention_mask is not None:
            scores = scores + attention_mask[:, None]  # (batch, 1, 1, num_tokens)
        weights = scores.softmax(dim=-1)
        self.weights = weights.mean(1)
        hidden_states = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states


def observe(unet):
    """Make the UNet keep the weights of its cross-attention. Returns what keeps them."""
    observed = [ObservedAttention() for name in unet.attn_processors if ".attn2." in name]
    rest = iter(observed)
    unet.set_attn_processor(
        {name: next(rest) if ".attn2." in name else each for name, each in unet.attn_processors.items()}
    )
    return observed


def layer_shape(num_places, shape):
    """Frames and bands of a layer's states, of those of the latents (`shape`), which are larger by one factor."""
    factor = round((shape[0] * shape[1] / num_places) ** 0.5)
    return shape[0] // factor, shape[1] // factor


def attention_loss(observed, words, heard, shape):
    """How surprising what is heard is to the attention, in nats, a mean over the layers and over all moments at which
    not all of the sounds of a caption are heard. Forgets the weights.

    Args:
        observed (`list[ObservedAttention]`): after a forward pass.
        words (`torch.Tensor` of shape `(batch, num_tokens)`): which sound each token is a word for, or -1.
        heard (`torch.Tensor` of shape `(batch, num_frames, num_sounds)`): whether each sound is heard in each latent
            frame, from 0 to 1.
        shape (`tuple[int, int]`): frames and bands of the latents.
    """
    words = (words[..., None] == torch.arange(heard.shape[2], device=words.device)).float()
    named = words.amax(1)[:, None]  # (batch, 1, num_sounds)
    losses = []
    for each in observed:
        weights, each.weights = each.weights, None
        num_frames, num_bands = layer_shape(weights.shape[1], shape)
        weights = weights.unflatten(1, (num_frames, num_bands)).mean(2) @ words  # (batch, num_frames, num_sounds)
        present = heard.unflatten(1, (num_frames, -1)).mean(2) * named
        some = (present.sum(2) > 0) & (present.sum(2) < named.sum(2) - 1e-3)
        surprise = -((weights * present).sum(2) + 1e-6).log()
        losses.append((surprise * some).sum() / some.sum().clamp(min=1))
    return torch.stack(losses).mean()
