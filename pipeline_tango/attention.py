"""Self-attention in blocks, for CPUs."""

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


MAX_BLOCK_SCORES = 2**20  # of `BlockedAttnProcessor`: 2 MB in bfloat16


class BlockedAttnProcessor(AttnProcessor2_0):
    """Self-attention of the UNet and the VAE in blocks of queries, whose scores fit into the cache of a CPU.

    For bfloat16 on CPUs, where torch 2.13 multiplies matrices several times faster than in float32 but its attention
    is no faster: `pipe.unet.set_attn_processor(BlockedAttnProcessor())`, and the same of `pipe.vae`. Scores are
    rounded to the dtype of the queries. Cross-attention, a compiled UNet and training use `AttnProcessor2_0`, and so
    does the UNet once that is set again.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **kwargs):
        """`hidden_states`, and the result, are `(batch, tokens, channels)`, those of a VAE `(batch, channels, frames,
        bins)`."""
        is_plain = encoder_hidden_states is None and attention_mask is None and attn.spatial_norm is None
        if not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        residual = hidden_states
        if residual.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # (batch, tokens, channels)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query, key, value = (
            attn.head_to_batch_dim(project(hidden_states), out_dim=4).contiguous()  # (batch, heads, tokens, channels)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = query * attn.scale, key.transpose(2, 3)
        block_length = max(MAX_BLOCK_SCORES // key.shape[3], 1)
        for queries, keys, values in zip(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)):
            for block in queries.split(block_length):  # products of two matrices are faster than batches of them
                block.copy_((block @ keys).softmax(dim=-1) @ values)
        hidden_states = query.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(1, 2).unflatten(2, residual.shape[2:])
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor
