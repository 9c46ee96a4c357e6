"""Batches of scenes: drawn on a CPU as arrays, without a sound being read, then mixed on a GPU and made latents there.

    scenes = SceneBatches(recordings, tokenizer, {81920: (128, 1.0)}, seed=0)
    sounds = Sounds(samples, linear_encoder(vae), vae.config.scaling_factor, device)
    latents = sounds.latents(next(load_batches(scenes, num_workers=4)))

Worker processes draw them, so that a GPU does not wait.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from examples.sound_library.scenes import draw_scene, sounds_of_tokens
from examples.sound_library.train_text import MAX_TOKENS
from pipeline_tango import log_mel_spectrogram


SAMPLES_PER_FRAME = 640  # of the latents
MAX_SOUNDS = 3  # of a scene
FRAMES_OF_CUTS = 8  # of the latents, whose multiple a common cut is
LATENT_NOISE = 0.02  # standard deviation of the VAE's posterior


class SceneBatches(torch.utils.data.Dataset):
    """Batches of scenes as arrays, without the sounds: batch i, its length included, depends on `seed` and i alone.

    Args:
        lengths (`dict[int, tuple[int, float]]`): for each number of samples of a clip, how many clips a batch has, and
            the share of the batches.
        sequence_share (`float`, *optional*): share of the scenes that are sequences, where not that of `scenes`.
        start (`int`): number of the first batch.
        common_cut (`bool`): let the second of two sounds in sequence begin at the same frame in all clips of a batch,
            and add what a teacher is told (see `sounds_alone`).
    """

    def __init__(self, recordings, tokenizer, lengths, seed, sequence_share=None, start=0, common_cut=False):
        self.recordings, self.tokenizer, self.lengths, self.seed = recordings, tokenizer, lengths, seed
        self.sequence_share, self.start, self.common_cut = sequence_share, start, common_cut

    def __len__(self):
        return 10**7

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, self.start + i])
        num_samples = int(rng.choice(list(self.lengths), p=[share for _, share in self.lengths.values()]))
        cut = None
        if self.common_cut:
            num_frames = num_samples // SAMPLES_PER_FRAME
            cut = FRAMES_OF_CUTS * round(num_frames * rng.uniform(0.375, 0.625) / FRAMES_OF_CUTS) * SAMPLES_PER_FRAME
        scenes = [
            draw_scene(rng, self.recordings, num_samples, sequence_share=self.sequence_share, cut=cut)
            for _ in range(self.lengths[num_samples][0])
        ]
        return self.as_arrays(scenes, num_samples, rng, cut) | {"number": self.start + i}

    def sounds_alone(self, scenes):
        """What a teacher is told of a scene: the words for each of two sounds in sequence, nothing of sequences of
        more, and the caption of all others. `num_told` `(batch,)`, and token ids and attention mask of the first and
        the second text, both `(2, batch, MAX_TOKENS)`."""
        texts = []
        for scene in scenes:
            caption, spans = scene.captions[0], scene.spans[0]
            in_sequence = [caption[slice(*span)] for span in spans] if len(spans) == 2 else []
            texts.append(in_sequence if scene.relation.startswith("sequence") else [caption])
        num_told = list(map(len, texts))
        captions = [(text + ["", ""])[sound] for sound in range(2) for text in texts]
        ids, mask, _ = self.tokens(captions)
        shape = 2, len(scenes), MAX_TOKENS
        return {"num_told": np.array(num_told), "alone_ids": ids.reshape(shape), "alone_mask": mask.reshape(shape)}

    def tokens(self, captions, spans=None):
        """Token ids, attention mask, and the sound that each token is a word for, or -1; all `(batch, MAX_TOKENS)`."""
        options = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS}
        inputs = self.tokenizer(captions, **options, return_offsets_mapping=True)
        ids, mask = (np.array(inputs[name], np.int64) for name in ("input_ids", "attention_mask"))
        words = [sounds_of_tokens(*each) for each in zip(inputs["offset_mapping"], spans or [()] * len(captions))]
        return ids, mask, np.array(words, np.int64)

    def as_arrays(self, scenes, num_samples, rng, cut=None):
        events = [
            (
                self.recordings.rows[event.recording]["offset"] + event.start,
                number * num_samples + event.place,
                event.length,
                event.fade_in,
                event.fade_out,
            )
            for number, scene in enumerate(scenes)
            for event in scene.events
        ]
        captions, spans = zip(*((scene.captions[0], scene.spans[0]) for scene in scenes), strict=True)
        ids, mask, words = self.tokens(list(captions), spans)
        told = {} if cut is None else self.sounds_alone(scenes) | {"cut": cut // SAMPLES_PER_FRAME}
        return told | {
            "num_samples": num_samples,
            "events": np.array(events, np.int64).T.copy(),  # (5, num_events)
            "gains": np.array([event.gain for scene in scenes for event in scene.events], np.float32),
            "peaks": rng.uniform(0.5, 0.9, len(scenes)).astype(np.float32),
            "ids": ids,
            "mask": mask,
            "words": words,
            "heard": np.stack([self.frames_heard(scene, num_samples) for scene in scenes]),
        }

    def frames_heard(self, scene, num_samples):
        """Which sounds of a scene go on in each latent frame: `(num_frames, MAX_SOUNDS)`, 0 or 1. Outside of
        sequences all of them do."""
        heard = np.zeros((num_samples // SAMPLES_PER_FRAME, MAX_SOUNDS), np.float32)
        for sound, category in enumerate(scene.categories):
            begin, end = 0, num_samples
            if scene.relation.startswith("sequence"):
                own = [e for e in scene.events if self.recordings.rows[e.recording]["category"] == category]
                begin = min((event.place for event in own), default=0)
                end = max((event.place + event.length for event in own), default=0)
            heard[begin // SAMPLES_PER_FRAME : math.ceil(end / SAMPLES_PER_FRAME), sound] = 1
        return heard


def validation_scenes(batches, num_scenes):
    """Held-out scenes of 5.12 s by kind, as `(scenes, arrays)`."""
    kinds = {
        "single": lambda scene: scene.relation == "single",
        "mixed": lambda scene: scene.relation in ("mixed", "background"),
        "sequence": lambda scene: scene.relation == "sequence",
        "three": lambda scene: scene.relation.startswith("sequence ") and len(scene.categories) == 3,
        "speech": lambda scene: scene.relation == "single" and scene.categories[0] == "speech",
        "music": lambda scene: scene.relation == "single" and scene.categories[0] == "music",
    }
    chosen, cut = {kind: [] for kind in kinds}, 40960 if batches.common_cut else None
    for number in range(200 * num_scenes):
        scene = draw_scene(np.random.default_rng([26, number]), batches.recordings, 81920, cut=cut)
        for kind, wanted in kinds.items():
            if wanted(scene) and len(chosen[kind]) < num_scenes:
                chosen[kind].append(scene)
        if all(len(scenes) == num_scenes for scenes in chosen.values()):
            break
    rng = np.random.default_rng(27)
    return {k: (scenes, batches.as_arrays(scenes, 81920, rng, cut)) for k, scenes in chosen.items() if scenes}


def load_batches(dataset, num_workers):
    # forked, so that the workers share the recordings; NumPy arrays through a pipe need no shared memory
    options = {"prefetch_factor": 6, "multiprocessing_context": "fork"} if num_workers else {}
    loader = torch.utils.data.DataLoader(
        dataset, 1, num_workers=num_workers, collate_fn=first, worker_init_fn=use_one_thread, **options
    )
    return iter(loader)


def first(items):
    return items[0]


def use_one_thread(worker):
    torch.set_num_threads(1)


class Sounds:
    """The recordings on the device: mixes scenes, and makes latents of them.

    Args:
        samples (`np.ndarray` of int16): all recordings, one after the other.
        encoder (`torch.Tensor`): see `linear_encoder`.
    """

    def __init__(self, samples, encoder, scaling_factor, device):
        self.samples, self.encoder = torch.from_numpy(samples).to(device), encoder.to(device)
        self.scaling_factor, self.device = scaling_factor, device

    @torch.no_grad()
    def mix(self, batch):
        """Waveforms `(batch, num_samples)`; what `scenes.render` gives for each scene."""
        source, place, length, fade_in, fade_out = torch.from_numpy(batch["events"]).to(self.device)
        gains, peaks = (torch.from_numpy(batch[name]).to(self.device) for name in ("gains", "peaks"))
        total = int(batch["events"][2].sum())
        event = torch.repeat_interleave(torch.arange(len(length), device=self.device), length, output_size=total)
        at = torch.arange(total, device=self.device) - (length.cumsum(0) - length)[event]  # samples since the start
        ramp = at.float() + 0.5
        fades = torch.sin(math.pi / 2 * (ramp / fade_in.float()[event]).clamp(max=1))
        rest = length.float()[event] - ramp
        fades *= torch.sin(math.pi / 2 * (rest / fade_out.clamp(min=1).float()[event]).clamp(max=1))
        values = self.samples[source[event] + at].float() * (fades * (gains / 32768)[event])
        waveforms = torch.zeros(len(peaks) * batch["num_samples"], device=self.device)
        waveforms = waveforms.index_add_(0, place[event] + at, values).view(len(peaks), -1)
        return waveforms * (peaks / waveforms.abs().amax(1).clamp(min=1e-9))[:, None]

    @torch.no_grad()
    def mel(self, batch):
        with torch.autocast(self.device.type, enabled=False):
            return log_mel_spectrogram(self.mix(batch)).unsqueeze(1)  # (batch, 1, num_frames, num_mel_bins)

    @torch.no_grad()
    def latents(self, batch):
        cells = F.pixel_unshuffle(self.mel(batch), 4).movedim(1, -1)  # (batch, num_frames / 4, num_mel_bins / 4, 16)
        latents = cells @ self.encoder[:-1] + self.encoder[-1]
        latents = latents + LATENT_NOISE * torch.randn_like(latents)
        return (self.scaling_factor * latents).movedim(-1, 1).contiguous()


@torch.no_grad()
def linear_encoder(vae):
    """The VAE's encoder as a matrix `(17, channels)`: from the 16 values of a cell of 4 x 4, and 1, to a latent.

    That of tango-tiny was made linear and frozen (`training/linear_autoencoder.py`); as a matrix it costs nothing.

    Raises:
        ValueError: if the encoder is not linear.
    """
    mel = torch.empty(4, 1, 64, 64).uniform_(-11, 1, generator=torch.Generator().manual_seed(0))
    latents = vae.encode(mel).latent_dist.mean.movedim(1, -1).flatten(0, 2)  # (num_cells, channels)
    cells = F.pixel_unshuffle(mel, 4).movedim(1, -1).flatten(0, 2)  # (num_cells, 16)
    cells = torch.cat([cells, torch.ones(len(cells), 1)], 1).double()
    matrix = torch.linalg.lstsq(cells, latents.double()).solution
    error = float((cells @ matrix - latents).abs().mean())
    if error > LATENT_NOISE / 2:
        raise ValueError(f"`vae` has to have a linear encoder, as tango-tiny's; this one is off by {error:.3g}.")
    return matrix.float()
