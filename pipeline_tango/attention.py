"""Self-attention of the UNet in blocks, for CPUs."""

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


MAX_BLOCK_SCORES = 2**22  # of `BlockedAttnProcessor`: 8 MB in bfloat16


class BlockedAttnProcessor(AttnProcessor2_0):
    """Self-attention of the UNet in blocks of queries, whose scores fit into the cache of a CPU.

    For bfloat16 on CPUs, where torch 2.13 multiplies matrices several times faster than in float32 but its attention
    is no faster: `pipe.unet.set_attn_processor(BlockedAttnProcessor())`. Scores are rounded to the dtype of the
    queries. Cross-attention, a compiled UNet and training use `AttnProcessor2_0`, and so does the UNet
    once that is set again.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        """`hidden_states`, and the result, are `(batch, tokens, channels)`."""
        is_masked = attention_mask is not None
        if encoder_hidden_states is not None or is_masked or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        query, key, value = (
            attn.head_to_batch_dim(project(hidden_states), out_dim=4).contiguous()  # (batch, heads, tokens, channels)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = query * attn.scale, key.transpose(2, 3)
        block_length = max(MAX_BLOCK_SCORES // (attn.heads * key.shape[3]), 1)
        for clip in range(len(query)):
            for block in query[clip].split(block_length, dim=1):
                block.copy_((block @ key[clip]).softmax(dim=-1) @ value[clip])
        hidden_states = query.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states
