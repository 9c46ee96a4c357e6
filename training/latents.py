"""From clips to latents and text states, and a cache of them."""

import hashlib
import io
import json
import os
import uuid
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.utils.data import Dataset


def fingerprint(model):
    """Sums of a model's weights: enough to tell one checkpoint from another."""
    return [f"{float(p.detach().double().sum()):.12e}" for p in list(model.parameters())[::7]]


def cache_key(content, settings):
    """Hash of a sound or text and of all that its cached tensors depend on.

    Args:
        content (`Clip` or `bytes`): of a clip the bytes of its file count and not the name. They are read at every
            call, since times and sizes can lie: ask once per run.
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
        except (FileNotFoundError, SafetensorError):
            pass
        return None

    def put(self, key, tensors):
        """Store a `dict[str, torch.Tensor]`, in place of any that `key` had."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
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


class CachedDataset(Dataset):
    """Clips as a `LatentCache` holds them: posterior moments instead of waveforms and, unless the text encoder
    trains, text states beside captions."""

    def __init__(self, clips, cache, keys, seed):
        self.clips, self.cache, self.keys, self.seed = clips, cache, keys, seed

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, key):
        epoch, index = key
        tensors = self.cache.get(self.keys[index])
        if tensors is None:
            raise RuntimeError(f"the cache lost {self.clips[index].path}: start again to fill it")
        captions = self.clips[index].captions
        caption = np.random.default_rng([self.seed, epoch, index]).integers(len(captions))
        return {
            "moments": tensors["moments"],
            "caption": captions[caption],
            "text_states": tensors.get(f"text_states.{caption}"),
            "epoch": epoch,
            "index": index,
        }
