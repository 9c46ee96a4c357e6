"""From waveforms and captions to what the UNet reads, latents and text, and a cache of both."""

import hashlib
import io
import json
import os
import uuid
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from pipeline_tango import log_mel_spectrogram

from .batches import shared_indices
from .objective import empty_prompt_rows, sample_noise
from .run import make_folder, set_aside


class Encoders:
    """The VAE's encoder and the text encoder of a pipeline, which make the UNet's inputs.

    Args:
        train_text_encoder (`bool`, *optional*, defaults to `False`): the text encoder trains with the UNet. Text then
            stays token ids here.
        prefix (`str`, *optional*, defaults to `""`): put before every caption that is not made empty.
    """

    def __init__(self, pipe, device, train_text_encoder=False, prefix=""):
        self.pipe, self.device, self.train_text_encoder, self.prefix = pipe, device, train_text_encoder, prefix
        self.empty_states = None

    @torch.no_grad()
    def moments_of(self, waveforms):
        """Posterior mean and log-variance of `(batch, num_samples)`: float32, (batch, 2 * channels, latent frames,
        latent mel bins)."""
        mel = log_mel_spectrogram(waveforms).unsqueeze(1)  # (batch, 1, num_frames, num_mel_bins)
        posterior = self.pipe.vae.encode(mel.to(self.pipe.vae.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    def latents_of(self, moments, generators):
        """Latents drawn from the posterior, one generator a clip, scaled as the UNet reads them."""
        return draw_latents(DiagonalGaussianDistribution(moments), generators) * self.pipe.vae.config.scaling_factor

    def text_of(self, captions):
        """What the denoiser reads, and its mask: token ids if the text encoder trains, else hidden states."""
        if self.train_text_encoder:
            inputs = self.pipe.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
            return inputs.input_ids.to(self.device), inputs.attention_mask.to(self.device)
        with torch.no_grad():
            text, mask, *_ = self.pipe.encode_prompt(captions, self.device, do_classifier_free_guidance=False)
        return text, mask

    def states_of(self, caption):
        """Hidden states of one caption for the cache: float32, `(tokens, hidden)`, without padding."""
        text, mask = self.text_of([caption])
        return text[0, : int(mask.sum())].float()

    def keep_empty_states(self):
        """Encode "" once, for batches with cached text states. The text encoder is not needed for them any more."""
        self.empty_states = self.states_of("").cpu()

    def unload(self):
        """Move the models that cached batches do not need to the CPU."""
        self.pipe.vae.to("cpu")
        if not self.train_text_encoder:
            self.pipe.text_encoder.to("cpu")

    def moments_of_batch(self, batch):
        """Posterior moments of a batch: cached ones, or those of its waveforms."""
        if "moments" in batch:
            return torch.stack(batch["moments"]).to(self.device)
        return self.moments_of(torch.stack(batch["waveform"]).to(self.device))

    def encode(self, batch, generators, proportion_empty_prompts=0.0):
        """Latents, text and attention mask of a batch of a `ClipDataset` or `CachedDataset`.

        Args:
            batch (`dict`): lists, as `list_of_items` makes them.
            generators (`list[torch.Generator]`): one for each clip.
            proportion_empty_prompts (`float`, *optional*): probability that the text of a clip becomes "".
        """
        latents = self.latents_of(self.moments_of_batch(batch), generators)
        is_empty = empty_prompt_rows(proportion_empty_prompts, generators).tolist()
        if "moments" in batch and not self.train_text_encoder:
            states = [self.empty_states if empty else each for empty, each in zip(is_empty, batch["text_states"])]
            masks = [torch.ones(len(each), dtype=torch.long) for each in states]
            text, mask = (pad_sequence(rows, batch_first=True).to(self.device) for rows in (states, masks))
        else:
            text, mask = self.text_of(
                ["" if empty else self.prefix + caption for empty, caption in zip(is_empty, batch["caption"])]
            )
        return latents, text, mask


def draw_latents(posterior, generators):
    """A sample of the posterior with one generator for each clip; not scaled."""
    return posterior.mean + posterior.std * sample_noise(posterior.mean.shape, generators, posterior.mean.device)


def vae_factor(vae):
    """Frames, and mel bins, to one element of the latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


# Cache


def fingerprint(model):
    """Sums of a model's weights: enough to tell one checkpoint from another."""
    return [f"{float(p.detach().double().sum()):.12e}" for p in list(model.parameters())[::7]]


def cache_key(content, settings):
    """Hash of a sound or text and of all that its cached tensors depend on.

    Args:
        content (`Clip` or `bytes`): of a clip the bytes of its file count and not the name. They are read at every
            call, since times and sizes are no proof: ask once per run.
        settings (`dict`): anything JSON can hold.
    """
    digest = hashlib.sha256(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest())
    with io.BytesIO(content) if isinstance(content, bytes) else content.open() as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class LatentCache:
    """Tensors by `cache_key`, a safetensors file each, in a folder that any number of processes may share.

    A file appears under its name only when it is complete. One that is damaged or was made for another key counts as
    absent.
    """

    def __init__(self, folder):
        self.folder = Path(folder)

    def path(self, key):
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key):
        """The tensors put under `key`, or None."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    return {name: file.get_tensor(name) for name in file.keys()}
        except PermissionError:
            raise
        except (OSError, SafetensorError):  # also: folders and files of others under these names
            pass
        return None

    def put(self, key, tensors):
        """Store a `dict[str, torch.Tensor]`, in place of any that `key` had."""
        path = self.path(key)
        make_folder(path.parent)
        if path.is_dir():
            set_aside(path)
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"key": key})
        partial = path.with_name(f"{key}.{uuid.uuid4().hex}.partial")
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave the name without the data
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def __contains__(self, key):
        return self.get(key) is not None


def cache_dataset(accelerator, encoders, dataset, folder):
    """Compute what the cache in `folder` lacks of a `ClipDataset`, each process a share of it. Returns a data set that
    reads the cache."""
    has_text = not encoders.train_text_encoder
    is_random = dataset.crop == "random"
    config = {
        "vae": fingerprint(encoders.pipe.vae),
        "text_encoder": fingerprint(encoders.pipe.text_encoder) if has_text else None,
        "num_samples": dataset.num_samples,
        "sampling_rate": dataset.sampling_rate,
        "crop": dataset.crop,
        "seed": dataset.seed if is_random else None,
    }
    cache = LatentCache(folder)
    keys, texts = [], []
    for index, clip in enumerate(dataset.clips):
        texts.append([encoders.prefix + caption for caption in clip.captions] if has_text else [])
        position = index if is_random else None
        keys.append(cache_key(clip, config | {"captions": texts[index], "position": position}))
    missing = [index for index, key in enumerate(keys) if key not in cache]
    for i in shared_indices(accelerator, len(missing), "caching", leave=True):
        index = missing[i]
        item = dataset[(0, index)]
        tensors = {"moments": encoders.moments_of(item["waveform"][None].to(encoders.device))[0]}
        tensors |= {f"text_states.{j}": encoders.states_of(text) for j, text in enumerate(texts[index])}
        cache.put(keys[index], tensors)
    accelerator.wait_for_everyone()
    if has_text:
        encoders.keep_empty_states()
    return CachedDataset(dataset.clips, cache, keys, dataset.seed)


class CachedDataset(Dataset):
    """Clips as a `LatentCache` holds them: posterior moments instead of waveforms, unless the text encoder trains text
    states beside captions, and further tensors by the names `extras`."""

    def __init__(self, clips, cache, keys, seed, extras=()):
        self.clips, self.cache, self.keys, self.seed, self.extras = clips, cache, keys, seed, extras

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, index = key
        tensors = self.cache.get(self.keys[index])
        if tensors is None:
            raise RuntimeError(f"the cache no longer holds {self.clips[index].path}: start the run again to fill it")
        captions = self.clips[index].captions
        caption = np.random.default_rng([self.seed, epoch, index]).integers(len(captions))
        return {
            "moments": tensors["moments"],
            "caption": captions[caption],
            "text_states": tensors.get(f"text_states.{caption}"),
            "epoch": epoch,
            "index": index,
            **{name: tensors[name] for name in self.extras},
        }
