"""Prompts: what of them the text encoder does not read, and which texts of one that moves guide a window."""

from dataclasses import dataclass, field

import numpy as np
import torch


NUM_QUOTED_TOKENS = 24  # a few words


def describe_loss(text, tokenizer):
    """Sentences about what of a prompt the tokenizer loses: the end of a long one, characters that it does not know.

    Returns:
        `list[str]`, empty if nothing is lost.
    """
    sentences, limit = [], tokenizer.model_max_length
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) >= limit:  # the end token takes the last place
        before = tokenizer.decode(ids[limit - 1 - NUM_QUOTED_TOKENS : limit - 1])
        after = tokenizer.decode(ids[limit - 1 : limit - 1 + NUM_QUOTED_TOKENS])
        sentences.append(
            f"A prompt has {len(ids) + 1} tokens, of which the text encoder reads {limit}: it was cut off between "
            f"'... {before}' and '{after} ...'."
        )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        unknown = [
            character
            for character in dict.fromkeys(text)
            if tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False).input_ids
        ]
        if unknown:
            quoted = " ".join(unknown[:20]) + (" ..." if len(unknown) > 20 else "")
            sentences.append(
                f"The tokenizer does not know {len(unknown)} character(s) of a prompt: {quoted}. All unknown ones are "
                "the same to the text encoder: use words of the language that the checkpoint was trained on."
            )
    return sentences


@dataclass
class TextTrack:
    """Encoded texts of a call, from which each window takes those of its time. Callbacks may replace the tensors.

    Args:
        prompt_embeds (`torch.Tensor` of shape `(rows, tokens, hidden)`): with guidance the negative rows come first.
        attention_mask (`torch.Tensor` of shape `(rows, tokens)`)
        keyframes (`list[list[tuple[float, str]]]`): for each sound its texts over time.
        num_waveforms_per_prompt (`int`): copies of each text, next to each other.
    """

    prompt_embeds: torch.Tensor
    attention_mask: torch.Tensor
    keyframes: list
    num_waveforms_per_prompt: int
    selected: dict = field(default_factory=dict)  # results of `select`, which are the same at every step

    def num_rows(self, is_guided):
        """How many rows guide the UNet."""
        num_texts = sum(map(len, self.keyframes)) * self.num_waveforms_per_prompt
        return num_texts * 2 if is_guided else num_texts

    def select(self, middles_in_s, is_guided):
        """Text for windows around `middles_in_s`: negative rows if `is_guided`, those of the prompt, and those of the
        text that the prompt moves to, if any prompt moves there.

        Returns:
            Embeddings and their mask, of as many rows, and the weight of the text that the prompt moves to, of shape
            `(windows * batch, 1, 1, 1)`, `None` if no prompt moves.
        """
        key = (*middles_in_s, is_guided)
        if key not in self.selected:
            texts = [texts_at(each, self.keyframes, self.num_waveforms_per_prompt) for each in middles_in_s]
            rows, next_rows, weights = (torch.cat(each) for each in zip(*texts))  # (windows * batch,)
            # counted from the end, since a callback that turns guidance off may leave the negative rows in place
            num_texts = self.num_rows(is_guided=False)
            parts = [rows - 2 * num_texts, rows - num_texts] if is_guided else [rows - num_texts]
            is_moving = (weights > 0).any()
            if is_moving:
                parts.append(next_rows - num_texts)
            rows = torch.cat(parts).to(self.prompt_embeds.device)
            weights = weights[:, None, None, None].to(self.prompt_embeds.device) if is_moving else None
            self.selected[key] = self.prompt_embeds[rows], self.attention_mask[rows], weights
        return self.selected[key]


def texts_at(seconds, keyframes, num_copies):
    """Which text guides each sound at a time.

    Args:
        seconds (`float`)
        keyframes (`list[list[tuple[float, str]]]`): for each sound its texts over time.
        num_copies (`int`): waveforms of each sound, next to each other.

    Returns:
        Three tensors of shape `(batch * num_copies,)`: row of the text, row of the next one, weight of the next one.
    """
    rows, next_rows, weights, num_rows = [], [], [], 0
    for each in keyframes:
        position = float(np.interp(seconds, [time for time, _ in each], np.arange(len(each))))
        index = int(position)
        following = min(index + 1, len(each) - 1)
        for copy in range(num_copies):
            rows.append((num_rows + index) * num_copies + copy)
            next_rows.append((num_rows + following) * num_copies + copy)
            weights.append(position - index)
        num_rows += len(each)
    return torch.tensor(rows), torch.tensor(next_rows), torch.tensor(weights, dtype=torch.float32)
