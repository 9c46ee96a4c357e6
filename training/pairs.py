"""Pairs of a chosen and a rejected sound for one prompt: reading and checking them, and the data set of them."""

from dataclasses import replace

import torch

from .data import select_clips, usable_clips


def read_pairs(sources):
    """Pairs of clips `(chosen, rejected)` by use, `"train"` and, if there is a manifest for it, `"validation"`.

    Args:
        sources (`tuple[ClipSources, ClipSources]`): of the chosen and of the rejected sounds, which differ in
            `audio_column` only.

    Raises:
        ValueError: naming the pair, if both are the same file; and as `ClipSources.read`.
    """
    chosen, rejected = (
        {use: [named(clip, each.audio_column) for clip in clips] for use, clips in each.read().items()}
        for each in sources
    )
    result = {use: list(zip(chosen[use], rejected[use], strict=True)) for use in chosen}
    for use, pairs in result.items():
        for number, (first, second) in enumerate(pairs, 1):
            if first.path == second.path:
                raise ValueError(f"{use} data: pair {number} has the same sound as chosen and rejected, {first.path}")
    return result


def named(clip, column):
    """A clip of a row of a data set has the name of its column too, since the row has two sounds."""
    return clip if clip.read is None else replace(clip, path=f"{clip.path}/{column}")


def prepare_pairs(sources, accelerator, output_dir, num_workers, seed):
    """Training and validation pairs, after every file was decoded once: pairs of which a sound cannot be used are left
    out, or with `on_bad_data` `"refuse"` are a ValueError."""
    result = {"validation": []}
    for use, pairs in read_pairs(sources).items():
        clips = list({clip.path: clip for pair in pairs for clip in pair}.values())
        good = {clip.path for clip in usable_clips(use, clips, sources[0], accelerator, output_dir, num_workers)}
        result[use] = [pair for pair in pairs if all(clip.path in good for clip in pair)]
        if not result[use]:
            raise ValueError(f"{use} data: of none of the {len(pairs)} pairs both sounds can be used")
    limit = sources[0].max_train_samples
    if limit and limit < len(result["train"]):
        result["train"] = select_clips(result["train"], limit, seed)
    return result["train"], result["validation"]


class PairDataset(torch.utils.data.Dataset):
    """Both sounds of each pair, with one caption. Items are asked for by `(epoch, index)`.

    Args:
        sounds ([`ClipDataset`] or [`CachedDataset`]): of the chosen sounds of all pairs, and after them of the
            rejected ones in the same order.

    An item is one of `sounds`, of the chosen sound, and has what there is of the rejected one under
    `"rejected_waveform"` or `"rejected_moments"` beside it.
    """

    def __init__(self, sounds):
        self.sounds = sounds

    def __len__(self):
        return len(self.sounds) // 2

    def __getitem__(self, key):
        epoch, index = key
        item, rejected = self.sounds[key], self.sounds[(epoch, len(self) + index)]
        return item | {f"rejected_{name}": rejected[name] for name in ("waveform", "moments") if name in rejected}


def encode_pairs(encoders, batch, generators, same_generators, proportion_empty_prompts=0.0):
    """Latents, text and attention mask of a batch of a `PairDataset`, the chosen sounds before the rejected ones:
    `(2 * batch, ...)`. Of a pair both have the same text, which is dropped for both or for neither.

    Args:
        generators, same_generators (`list[torch.Generator]`): two equal ones for each pair, so that both sounds get
            the same noise in their draw from the VAE's posterior too.
    """
    latents, text, mask = encoders.encode(batch, generators, proportion_empty_prompts)
    rejected = {name: batch[f"rejected_{name}"] for name in ("waveform", "moments") if f"rejected_{name}" in batch}
    rejected_latents = encoders.latents_of(encoders.moments_of_batch(rejected), same_generators)
    return torch.cat([latents, rejected_latents]), *(torch.cat([each, each]) for each in (text, mask))
