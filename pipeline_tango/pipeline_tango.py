# Copyright 2026 The pipeline-tango authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Text-to-audio, audio-to-audio and inpainting with Tango (Ghosal et al. 2023, arXiv 2304.13731).

"The original" below is the code that the released checkpoints were trained with.
"""

import contextlib
import functools
import inspect
import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import HookRegistry
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torch_xla_available, logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer
from transformers.audio_utils import hertz_to_mel, mel_to_hertz

from .attention import BlockedAttnProcessor  # noqa: F401
from .deep_cache import DEEP_CACHE_HOOK, DeepCache, DeepModuleHook, ShallowResnetHook
from .input_audio import fill_by_mirror, place_audio, read_clips, read_masks
from .lora import TangoLoraLoaderMixin
from .mel import (
    MEL_FFT_LENGTH,
    MEL_HOP_LENGTH,
    MEL_SAMPLING_RATE,
    NUM_MEL_BINS,
    log_mel_spectrogram,
    match_mel_spectrogram,
)
from .prompts import read_prompts, texts_at
from .schedule import SCHEDULERS, step_of_evaluation  # noqa: F401
from .seams import join_at_seams, match_level, split_band
from .single_file import single_file
from .windows import blend_windows, window_starts, window_weights


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm


logger = logging.get_logger(__name__)


class TangoPipeline(DiffusionPipeline, TangoLoraLoaderMixin):
    """Text-to-audio by latent diffusion, as in Tango.

    A T5 encoder reads the prompt, a UNet denoises a latent under classifier-free guidance, a VAE turns the latent into
    a log-mel spectrogram, and a HiFi-GAN turns that into a waveform.

    Inherits loading, saving, device placement and offloading from [`DiffusionPipeline`], and LoRA loading as above.

    Args:
        vae ([`AutoencoderKL`]): between latents and log-mel spectrograms (one channel, frames x mel bins).
        text_encoder ([`~transformers.T5EncoderModel`]): FLAN-T5 in the released checkpoints.
        tokenizer ([`~transformers.T5Tokenizer`]): its `model_max_length` limits the prompt.
        unet ([`UNet2DConditionModel`]): denoises latents of shape `(batch, channels, latent frames, latent mel bins)`.
        scheduler ([`SchedulerMixin`]): any of `KarrasDiffusionSchedulers`, LCM or TCD.
        vocoder ([`~transformers.SpeechT5HifiGan`]): its rates and sampling rate fix the hop length.
        default_audio_length_in_s (`float`, *optional*, defaults to 10.24): length of what is generated when
            `audio_length_in_s` is not given; what the checkpoint was trained on.
        default_num_inference_steps (`int`, *optional*, defaults to 100): the same for `num_inference_steps`.
        default_guidance_scale (`float`, *optional*, defaults to 3.0): the same for `guidance_scale`.
        default_guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): the same for
            `guidance_interval`.
        num_noise_channels (`int`, *optional*, defaults to 0): how many of the vocoder's inputs, the last ones, are
            white noise that it takes chance from (`training.train_vocoder`). The others are mel bins.
        num_mel_corrections (`int`, *optional*, defaults to 0): iterations of [`match_mel_spectrogram`] on what the
            vocoder makes. Small vocoders need them.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae->vocoder"
    _optional_components = []
    _callback_tensor_inputs = ["latents", "prompt_embeds", "attention_mask"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: T5EncoderModel,
        tokenizer: T5Tokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        vocoder: SpeechT5HifiGan,
        default_audio_length_in_s: float = 10.24,
        default_num_inference_steps: int = 100,
        default_guidance_scale: float = 3.0,
        default_guidance_interval: tuple[float, float] | list[float] = (0.0, 1.0),  # JSON knows lists only
        num_noise_channels: int = 0,
        num_mel_corrections: int = 0,
    ):
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, vocoder=vocoder
        )
        self.register_to_config(
            default_audio_length_in_s=default_audio_length_in_s,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
            num_noise_channels=num_noise_channels,
            num_mel_corrections=num_mel_corrections,
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if vae is not None else 4
        self.unet_scale_factor = 2 ** (len(self.unet.config.block_out_channels) - 1) if unet is not None else 8
        self.hop_length = math.prod(self.vocoder.config.upsample_rates) if vocoder is not None else MEL_HOP_LENGTH

    @property
    def _num_mel_bins(self):
        return self.vocoder.config.model_in_dim - self.config.num_noise_channels

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        """Equation (2) of Imagen's form: a weight of 1 means no guidance. UNets that were distilled with the weight as
        an input (`time_cond_proj_dim`) get it there instead of in a second pass."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def cross_attention_kwargs(self):
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self):
        return self._num_timesteps

    @property
    def interrupt(self):
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        num_waveforms_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
    ):
        """Text as the UNet reads it.

        Prompt and negative prompt are padded to one length, the longer of the two, so that they can share a batch. The
        masks say which tokens are real; they belong with the embeddings wherever those go, since without them the
        padding is read as text. Without a negative prompt the unconditional text is the encoded "", of which only the
        end token is unmasked: what the released checkpoints were guided with (the original's training zeroes the
        states instead, an option that those were trained without).

        Args:
            prompt (`str` or `list[str]`, *optional*): not needed with `prompt_embeds`.
            device (`torch.device`, *optional*): defaults to the pipeline's execution device.
            num_waveforms_per_prompt (`int`, *optional*, defaults to 1): copies of each row, next to each other.
            do_classifier_free_guidance (`bool`, *optional*, defaults to `True`): whether to encode a negative prompt.
            negative_prompt (`str` or `list[str]`, *optional*): "" if not given. One string serves all prompts.
            prompt_embeds, negative_prompt_embeds (`torch.Tensor` of shape `(batch, tokens, hidden)`, *optional*):
                used instead of the texts, together with their masks.
            attention_mask, negative_attention_mask (`torch.Tensor` of shape `(batch, tokens)`, *optional*): 1 = keep.

        Returns:
            `prompt_embeds`, `attention_mask`, `negative_prompt_embeds`, `negative_attention_mask`: each with
            `batch * num_waveforms_per_prompt` rows; the negative ones `None` without guidance. They can be passed to
            `__call__` by these names.
        """
        device = device or self._execution_device
        if prompt_embeds is None:
            prompt = [prompt] if isinstance(prompt, str) else prompt
        if negative_prompt is None or isinstance(negative_prompt, str):
            batch_size = len(prompt) if prompt_embeds is None else prompt_embeds.shape[0]
            negative_prompt = [negative_prompt or ""] * batch_size
        conditions = [(prompt, prompt_embeds, attention_mask)]
        if do_classifier_free_guidance:
            conditions.append((negative_prompt, negative_prompt_embeds, negative_attention_mask))

        num_tokens = 0
        for text, embeds, _ in conditions:
            if embeds is not None:
                num_tokens = max(num_tokens, embeds.shape[1])
            else:
                num_tokens = max(num_tokens, *map(len, self.tokenizer(text, truncation=True).input_ids))

        dtype = self.unet.dtype if self.unet is not None else None
        outputs = []
        for text, embeds, mask in conditions:
            if embeds is None:
                if num_tokens == self.tokenizer.model_max_length:
                    for ids in self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids:
                        if len(ids) >= num_tokens:  # the end token takes the last place
                            logger.warning(
                                f"The text encoder reads at most {num_tokens} tokens. This end of the prompt was cut "
                                f"off: {self.tokenizer.decode(ids[num_tokens - 1 :])!r}"
                            )
                distinct = list(dict.fromkeys(text))  # each is encoded once, as the one negative prompt of a batch
                inputs = self.tokenizer(
                    distinct, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
                )
                mask = inputs.attention_mask.to(device)
                embeds = self.text_encoder(inputs.input_ids.to(device), attention_mask=mask)[0]
                rows = [distinct.index(each) for each in text]
                embeds, mask = embeds[rows], mask[rows]
            padding = num_tokens - embeds.shape[1]
            embeds = F.pad(embeds.to(device, dtype), (0, 0, 0, padding))  # (batch, tokens, hidden)
            mask = F.pad(mask.to(device), (0, padding))  # (batch, tokens)
            outputs.append(embeds.repeat_interleave(num_waveforms_per_prompt, dim=0))
            outputs.append(mask.repeat_interleave(num_waveforms_per_prompt, dim=0))
        outputs += [None] * (4 - len(outputs))
        prompt_embeds, attention_mask, negative_prompt_embeds, negative_attention_mask = outputs
        return prompt_embeds, attention_mask, negative_prompt_embeds, negative_attention_mask

    def enable_deep_cache(self, interval: int = 3):
        """Compute the whole UNet only in every `interval`-th evaluation, and its shallowest branch, a thirteenth of
        the work, in between.

        Counted are evaluations: second-order schedulers take two for a step. A window keeps its own features, 5 MB a
        row at full size in float32, until the call ends. Where guidance begins everything is computed, since the
        features have no unconditional rows. Works with LoRA, offloading and `torch.compile`, but not with group
        offloading by streams, which needs modules to run in one order.

        It belongs to the UNet, so to every pipeline that shares it, and is not saved.

        Args:
            interval (`int`, *optional*, defaults to 3): 1 computes everything always.

        Raises:
            ValueError: if `interval` is no positive integer, or the UNet has blocks of other kinds.

        Source: DeepCache (Ma et al. 2023, arXiv 2312.00858).
        """
        if not isinstance(interval, Integral) or isinstance(interval, bool) or interval < 1:
            raise ValueError(f"`interval` has to be an integer of at least 1, not {interval!r}.")
        if self.unet is None:
            raise ValueError("This pipeline was built without `unet`, which a deep cache is for.")
        known = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
        strangers = {type(block).__name__ for block in (*self.unet.down_blocks, *self.unet.up_blocks)} - known
        if strangers:
            raise ValueError(f"`unet` has blocks that a deep cache cannot skip: {sorted(strangers)}.")
        self.disable_deep_cache()

        def skip(module, placeholder):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(
                DeepModuleHook(cache, placeholder), DEEP_CACHE_HOOK
            )

        cache = DeepCache(interval, self.unet.conv_in.out_channels)
        for block in self.unet.down_blocks:
            num_outputs = len(block.resnets) + len(block.downsamplers or ())
            skip(block, lambda nothing, num_outputs=num_outputs: (nothing, (nothing,) * num_outputs))
        *up_blocks, last_block = self.unet.up_blocks
        *resnets, last_resnet = last_block.resnets
        for module in (self.unet.mid_block, *up_blocks, *resnets):
            if module is not None:
                skip(module, lambda nothing: nothing)
        for attention in getattr(last_block, "attentions", [])[:-1]:
            skip(attention, lambda nothing: (nothing,))
        HookRegistry.check_if_exists_or_initialize(last_resnet).register_hook(
            ShallowResnetHook(cache), DEEP_CACHE_HOOK
        )

    def disable_deep_cache(self):
        """Undo `enable_deep_cache`. Does nothing if there is no deep cache."""
        if self.deep_cache is None:
            return
        for module in self.unet.modules():
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook(DEEP_CACHE_HOOK, recurse=False)

    @property
    def deep_cache(self):
        """The UNet's [`DeepCache`], `None` if it has none."""
        if self.unet is None:
            return None
        registry = getattr(self.unet.up_blocks[-1].resnets[-1], "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook(DEEP_CACHE_HOOK)
        return None if hook is None else hook.cache

    def maybe_free_model_hooks(self):
        """Offload the models after a call, and drop what a deep cache kept for it."""
        super().maybe_free_model_hooks()
        if self.deep_cache is not None:
            self.deep_cache.reset()

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        variant=None,
        max_shard_size=None,
        push_to_hub=False,
        **push_to_hub_kwargs,
    ):
        """Save as [`DiffusionPipeline.save_pretrained`] does, which `push_to_hub` calls, with the code as one file,
        `pipeline.py`, so that `custom_pipeline` loads the folder or repo where this package is not installed."""
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "wb") as file:
            file.write(single_file(__file__).encode())
        super().save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, push_to_hub, **push_to_hub_kwargs
        )

    def prepare_extra_step_kwargs(self, generator, eta):
        """The arguments among `generator` and `eta` that this scheduler's `step` has. `eta=None` keeps its default."""
        accepted = inspect.signature(self.scheduler.step).parameters
        extra_step_kwargs = {}
        if "generator" in accepted:
            extra_step_kwargs["generator"] = generator
        if "eta" in accepted and eta is not None:
            extra_step_kwargs["eta"] = eta
        return extra_step_kwargs

    def prepare_latents(self, batch_size, num_latent_frames, device, generator=None, latents=None):
        """Noise to start from, of the scheduler's initial sigma.

        Always float32, whatever the UNet's dtype: the scheduler's arithmetic loses too much in half precision, and the
        same seed gives the same noise in every precision.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, num_latent_frames, latent mel bins)`.
        """
        if latents is None:
            shape = (batch_size, *self._latent_shape(num_latent_frames))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def _latent_shape(self, num_latent_frames):
        return self.unet.config.in_channels, num_latent_frames, self._num_mel_bins // self.vae_scale_factor

    def _encode_audio(self, placed, num_latent_frames, num_frames_in_window, num_copies, device, generator):
        """Scaled latents of `placed`, drawn from the VAE's posterior, each clip `num_copies` times: shape
        `(batch * num_copies, channels, num_latent_frames, latent mel bins)`."""
        num_mel_frames = num_latent_frames * self.vae_scale_factor
        is_unknown = np.zeros_like(placed.waveform, dtype=bool) if placed.is_made is None else placed.is_made
        num_given = placed.waveform.shape[1]
        missing = num_mel_frames * self.hop_length - num_given
        mels = []
        for given, gaps, mean, gain in zip(placed.waveform, is_unknown, placed.mean, placed.gain):
            waveform = np.zeros(num_given + missing, dtype=np.float32)
            np.subtract(given, mean, out=waveform[:num_given])
            waveform *= gain
            gaps = np.pad(gaps, (0, missing), constant_values=True)
            mels.append(self._mel_in_chunks(fill_by_mirror(waveform, gaps), device))
        mel_spectrogram = torch.stack(mels)[:, None].repeat_interleave(num_copies, dim=0)  # (batch, 1, frames, bins)

        def encode(windows, starts):
            return self.vae.encode(windows.to(self.vae.dtype)).latent_dist.parameters.float()

        parameters = blend_windows(encode, mel_spectrogram, num_frames_in_window, factor_in=self.vae_scale_factor)
        return DiagonalGaussianDistribution(parameters).sample(generator) * self.vae.config.scaling_factor

    def _mel_in_chunks(self, waveform, device, num_frames=4096):
        """`log_mel_spectrogram` of a 1-D array, a bounded stretch at a time: the spectrum of minutes is large."""
        context = math.ceil(MEL_FFT_LENGTH / 2 / MEL_HOP_LENGTH)  # frames that see beyond a stretch
        num_all_frames = len(waveform) // MEL_HOP_LENGTH
        mels = []
        for start in range(0, num_all_frames, num_frames):
            end = min(start + num_frames, num_all_frames)
            if num_all_frames - end <= context:
                end = num_all_frames
            first, last = max(start - context, 0), min(end + context, num_all_frames)
            part = torch.from_numpy(waveform[first * MEL_HOP_LENGTH : last * MEL_HOP_LENGTH]).to(device)
            mels.append(log_mel_spectrogram(part[None])[0, start - first : end - first])
            if end == num_all_frames:
                break
        return torch.cat(mels)  # (num_frames, num_mel_bins)

    def _latent_mask(self, is_made, num_latent_frames, frequency_mask_in_hz, device):
        """1 where latents are to be made, 0 where they are the audio's: `(batch, 1, frames, bins)`.

        A latent is made if any sample or frequency that it was computed from is."""
        if is_made is None:
            in_time = torch.ones(1, num_latent_frames, device=device)
        else:
            num_samples = self.hop_length * self.vae_scale_factor
            missing = num_latent_frames * num_samples - is_made.shape[1]
            samples = torch.from_numpy(np.pad(is_made, ((0, 0), (0, missing)), "edge")).to(device, torch.float32)
            margin = MEL_FFT_LENGTH // 2
            in_time = F.max_pool1d(samples, num_samples + 2 * margin, num_samples, margin)  # (batch, frames)
        num_bins = self._latent_shape(num_latent_frames)[2]
        in_frequency = torch.ones(num_bins, device=device)
        if frequency_mask_in_hz is not None:
            low, high = frequency_mask_in_hz
            highest = hertz_to_mel(MEL_SAMPLING_RATE / 2, mel_scale="slaney")
            edges = mel_to_hertz(np.linspace(0, highest, NUM_MEL_BINS + 2), mel_scale="slaney")  # bin k: k to k + 2
            for row in range(num_bins):
                row_low, row_high = edges[row * self.vae_scale_factor], edges[(row + 1) * self.vae_scale_factor + 1]
                in_frequency[row] = float(row_low < high and row_high > low)
        return in_time[:, None, :, None] * in_frequency  # (batch, 1, frames, bins)

    def _join_with_audio(self, made, placed, num_copies, frequency_mask_in_hz):
        """Sound of the level that the VAE was trained on, back at the level of the audio and, where there is something
        to keep of that, joined with it."""
        sampling_rate = self.vocoder.config.sampling_rate
        joined = np.empty(made.shape, dtype=np.float32)
        for i, waveform in enumerate(made.float().cpu().numpy()):
            row = i // num_copies
            audio = placed.waveform[row]
            waveform = waveform / placed.gain[row]
            waveform += placed.mean[row]
            is_made = placed.is_made[row] if placed.is_made is not None else None
            if frequency_mask_in_hz is not None:
                low, high = frequency_mask_in_hz
                beside = (low / 2, low) if low > 0 else (high, min(2 * high, sampling_rate / 2))
                beside = (0, 200) if beside[1] - beside[0] < 200 else beside
                level_db = match_level(*(split_band(each, beside, sampling_rate) for each in (waveform, audio)))
                waveform = audio + split_band(
                    waveform * 10 ** (level_db / 20) - audio, frequency_mask_in_hz, sampling_rate
                )
            if is_made is not None:
                is_matched = frequency_mask_in_hz is not None
                waveform = join_at_seams(waveform, audio, is_made, sampling_rate, is_matched)
            elif frequency_mask_in_hz is None:
                waveform /= max(waveform.max(), -waveform.min(), 1.0)  # loud input would be clipped
            np.clip(waveform, -1.0, 1.0, out=joined[i])
        return torch.from_numpy(joined).to(made.device)

    def mel_spectrogram_to_waveform(self, mel_spectrogram, noise=None):
        """Vocode a log-mel spectrogram.

        Args:
            mel_spectrogram (`torch.Tensor` of shape `(batch, 1, num_frames, num_mel_bins)`).
            noise (`torch.Tensor` of shape `(batch, 1, num_frames, num_noise_channels)`, *optional*): what a vocoder
                with noise channels takes chance from. Drawn anew by default.

        Returns:
            `torch.Tensor` of shape `(batch, num_samples)`: float32 in [-1, 1]. The released vocoder makes 32 samples
            more than frames times hop.
        """
        if noise is None:
            shape = (*mel_spectrogram.shape[:3], self.config.num_noise_channels)
            noise = randn_tensor(shape, device=mel_spectrogram.device)
        inputs = torch.cat([mel_spectrogram, noise.to(mel_spectrogram.dtype)], dim=3).squeeze(1)
        dtype = get_parameter_dtype(self.vocoder)  # not `.dtype`, which is the storage type under layerwise casting
        waveform = self.vocoder(inputs.to(dtype)).float()
        waveform = match_mel_spectrogram(waveform, mel_spectrogram[:, 0].float(), self.config.num_mel_corrections)
        return waveform.clamp(-1, 1)

    def check_inputs(
        self,
        prompt,
        audio_length_in_s,
        num_inference_steps=100,
        guidance_scale=3.0,
        guidance_rescale=0.0,
        negative_prompt=None,
        num_waveforms_per_prompt=1,
        eta=None,
        timesteps=None,
        sigmas=None,
        generator=None,
        latents=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        attention_mask=None,
        negative_attention_mask=None,
        cross_attention_kwargs=None,
        output_type="np",
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=None,
        audio=None,
        audio_sampling_rate=None,
        strength=None,
        mask=None,
        frequency_mask_in_hz=None,
        audio_start_in_s=0.0,
        window_length_in_s=None,
        window_batch_size=1,
        window_order="joint",
        stream=False,
        guidance_interval=(0.0, 1.0),
    ):
        """Raise a `ValueError` that names the argument for everything that can be known to be wrong before a model
        runs. Arguments as in `__call__`."""
        for name in ("unet", "scheduler", "vae", "vocoder"):
            if getattr(self, name) is None:
                raise ValueError(f"This pipeline was built without `{name}`, which it needs to generate.")
        if not hasattr(self.scheduler, "init_noise_sigma") or not hasattr(self.scheduler, "scale_model_input"):
            raise ValueError(
                f"`scheduler` cannot be a {type(self.scheduler).__name__}: flow-matching schedulers do not fit this "
                f"UNet. Use one of {[s.name for s in KarrasDiffusionSchedulers]}, LCMScheduler or TCDScheduler."
            )
        if self.scheduler.config.get("prediction_type") == "flow_prediction":
            raise ValueError("`scheduler` has prediction_type 'flow_prediction', which does not fit this UNet.")
        if self._num_mel_bins % self.vae_scale_factor != 0:
            raise ValueError(
                f"`vocoder` has {self._num_mel_bins} mel bins, which the `vae`'s factor "
                f"{self.vae_scale_factor} does not divide."
            )
        if self.vae.config.latent_channels != self.unet.config.in_channels:
            raise ValueError(
                f"`vae` has {self.vae.config.latent_channels} latent channels, `unet` takes "
                f"{self.unet.config.in_channels}: they do not belong together."
            )

        # numbers
        for name, value, minimum in (
            ("num_inference_steps", num_inference_steps, 1),
            ("num_waveforms_per_prompt", num_waveforms_per_prompt, 1),
            ("window_batch_size", window_batch_size, 1),
        ):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"`{name}` has to be an integer of at least {minimum}, not {value!r}.")
        for name, value in (
            ("audio_length_in_s", audio_length_in_s),
            ("guidance_scale", guidance_scale),
            ("guidance_rescale", guidance_rescale),
            ("eta", 0.0 if eta is None else eta),
            ("strength", 1.0 if strength is None else strength),
            ("audio_start_in_s", audio_start_in_s),
            ("window_length_in_s", 1.0 if window_length_in_s is None else window_length_in_s),
        ):
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"`{name}` has to be a finite number, not {value!r}.")
        sampling_rate = self.vocoder.config.sampling_rate
        if not 0.5 < audio_length_in_s * sampling_rate < math.inf:
            raise ValueError(
                f"`audio_length_in_s` has to be positive, at least one sample of 1/{sampling_rate} s, "
                f"not {audio_length_in_s}."
            )
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"`guidance_rescale` has to be between 0 and 1, not {guidance_rescale}.")
        if (
            not isinstance(guidance_interval, (list, tuple))
            or len(guidance_interval) != 2
            or not all(isinstance(each, Real) and not isinstance(each, bool) for each in guidance_interval)
            or not 0 <= guidance_interval[0] < guidance_interval[1] <= 1
        ):
            raise ValueError(
                "`guidance_interval` has to be (start, stop) with 0 <= start < stop <= 1, not "
                f"{guidance_interval!r:.200}."
            )
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"`eta` has to be between 0 and 1, not {eta}.")
        if window_length_in_s is not None and not 0 < window_length_in_s < 1e9:
            raise ValueError(f"`window_length_in_s` has to be positive, not {window_length_in_s}.")

        # schedule
        if timesteps is not None and sigmas is not None:
            raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
        for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
            if value is None:
                continue
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"`{name}` cannot be set by hand with {type(self.scheduler).__name__}.")
            kind = Integral if name == "timesteps" else Real
            if not isinstance(value, (list, tuple, np.ndarray)) or not all(isinstance(each, kind) for each in value):
                raise ValueError(f"`{name}` has to be a list of {kind.__name__} numbers, not {value!r}.")
            if len(value) == 0 or not all(math.isfinite(each) for each in value):
                raise ValueError(f"`{name}` has to hold at least one number, all of them finite, not {value!r}.")
            if any(later >= earlier for earlier, later in zip(value, value[1:])):
                raise ValueError(f"`{name}` has to be in descending order, not {value!r}.")
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        if timesteps is not None and (timesteps[0] >= num_train_timesteps or timesteps[-1] < 0):
            raise ValueError(f"`timesteps` have to be from 0 to {num_train_timesteps - 1}, not {timesteps!r}.")

        if isinstance(self.scheduler, PNDMScheduler) and not self.scheduler.config.skip_prk_steps:
            if num_inference_steps < 4:
                raise ValueError(
                    f"`num_inference_steps` has to be at least 4 for PNDM with its Runge-Kutta warm-up, not "
                    f"{num_inference_steps}. Set the scheduler's `skip_prk_steps` for fewer."
                )

        # text
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("Only one of `prompt` and `prompt_embeds` can be given.")
        if prompt is None and prompt_embeds is None:
            raise ValueError("One of `prompt` and `prompt_embeds` has to be given.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
        prompts = None if prompt is None else read_prompts(prompt)
        if negative_prompt is not None and not isinstance(negative_prompt, str):
            texts = negative_prompt
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"`negative_prompt` has to be a string or a list of at least one string, not {texts!r}."
                )
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            if getattr(prompt_embeds, "shape", None) != getattr(negative_prompt_embeds, "shape", None):
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but got "
                    f"{getattr(prompt_embeds, 'shape', None)} and {getattr(negative_prompt_embeds, 'shape', None)}."
                )
        width = self.unet.config.cross_attention_dim
        for prefix, embeds, text_mask in (
            ("", prompt_embeds, attention_mask),
            ("negative_", negative_prompt_embeds, negative_attention_mask),
        ):
            embeds_name, mask_name = f"{prefix}prompt_embeds", f"{prefix}attention_mask"
            if embeds is None:
                if text_mask is not None:
                    raise ValueError(f"`{mask_name}` belongs to `{embeds_name}` and cannot be given without it.")
                continue
            if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width:
                described = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds)
                raise ValueError(f"`{embeds_name}` has to be a tensor (batch, tokens, {width}), not {described}.")
            if not embeds.is_floating_point() or not embeds.numel() or not torch.isfinite(embeds).all():
                raise ValueError(f"`{embeds_name}` has to hold finite floating-point numbers.")
            if text_mask is None:
                raise ValueError(
                    f"`{embeds_name}` needs its `{mask_name}`: without it padding would be read as text. "
                    "`encode_prompt` returns both; for embeddings without padding pass a mask of ones."
                )
            if not isinstance(text_mask, torch.Tensor) or text_mask.shape != embeds.shape[:2]:
                described = tuple(text_mask.shape) if isinstance(text_mask, torch.Tensor) else type(text_mask)
                raise ValueError(f"`{mask_name}` has to be a tensor {tuple(embeds.shape[:2])}, not {described}.")
            if not ((text_mask == 0) | (text_mask == 1)).all() or not (text_mask == 1).any(dim=1).all():
                raise ValueError(f"`{mask_name}` has to be 0 or 1, with a 1 in every row.")
        batch_size = len(prompts) if prompts is not None else prompt_embeds.shape[0]
        for keyframes in prompts or []:
            if len(keyframes) > 1 and keyframes[-1][0] > audio_length_in_s:
                raise ValueError(f"`prompt` moves until {keyframes[-1][0]} s in a sound of {audio_length_in_s} s.")
            if len(keyframes) > 1 and self._num_windows(audio_length_in_s, window_length_in_s) == 1:
                raise ValueError(
                    "`prompt` cannot move within one window, which reads one text: give a longer `audio_length_in_s` "
                    "or a shorter `window_length_in_s`."
                )
        for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
            if value is not None and not isinstance(value, str) and len(value) != batch_size:
                raise ValueError(f"`{name}` has {len(value)} rows for {batch_size} prompts.")
        if self.text_encoder is None or self.tokenizer is None:
            for name, embeds in (("prompt", prompt_embeds), ("negative_prompt", negative_prompt_embeds)):
                if embeds is None and (name == "prompt" or guidance_scale > 1):
                    raise ValueError(
                        f"This pipeline was built without `text_encoder` or `tokenizer`: pass `{name}_embeds`."
                    )
        elif self.text_encoder.config.d_model != width:
            raise ValueError(
                f"`text_encoder` is {self.text_encoder.config.d_model} wide, `unet` reads {width}: they do not belong "
                "together."
            )

        # latents and noise
        num_waveforms = batch_size * num_waveforms_per_prompt
        if latents is not None:
            expected = (num_waveforms, *self._latent_shape(self._num_latent_frames(audio_length_in_s)))
            if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != expected:
                described = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents)
                raise ValueError(
                    f"`latents` for {num_waveforms} waveforms of {audio_length_in_s} s has to be a tensor of shape "
                    f"{expected}, not {described}."
                )
            if not latents.is_floating_point() or not torch.isfinite(latents).all():
                raise ValueError("`latents` has to hold finite floating-point numbers.")
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
            raise ValueError(f"`generator` has to be a torch.Generator or a list of them, not {generator!r}.")
        if isinstance(generator, list) and len(generator) != num_waveforms:
            raise ValueError(f"`generator` is a list of {len(generator)} for {num_waveforms} waveforms.")

        # the rest
        if cross_attention_kwargs is not None and not isinstance(cross_attention_kwargs, dict):
            raise ValueError(f"`cross_attention_kwargs` has to be a dict, not {type(cross_attention_kwargs)}.")
        if not isinstance(window_order, str) or window_order not in ("joint", "sequential"):
            raise ValueError(f"`window_order` has to be 'joint' or 'sequential', not {window_order!r}.")
        if not isinstance(stream, bool):
            raise ValueError(f"`stream` has to be True or False, not {stream!r}.")
        if not isinstance(output_type, str) or output_type not in ("np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'np', 'pt' or 'latent', not {output_type!r}.")
        if stream and output_type == "latent":
            raise ValueError("`stream` yields sound: `output_type` has to be 'np' or 'pt'.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` has to be callable, not {type(callback_on_step_end)}.")
        names = callback_on_step_end_tensor_inputs
        if names is not None and (
            not isinstance(names, (list, tuple))
            or not all(isinstance(name, str) and name in self._callback_tensor_inputs for name in names)
        ):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be a list of some of "
                f"{self._callback_tensor_inputs}, not {names!r}."
            )
        self._check_audio_inputs(
            batch_size,
            audio_length_in_s,
            num_inference_steps,
            audio,
            audio_sampling_rate,
            strength,
            mask,
            frequency_mask_in_hz,
            audio_start_in_s,
            stream,
        )

    def _check_audio_inputs(
        self,
        batch_size,
        audio_length_in_s,
        num_inference_steps,
        audio,
        audio_sampling_rate,
        strength,
        mask,
        frequency_mask_in_hz,
        audio_start_in_s,
        stream,
    ):
        if audio is None:
            for name, value in (
                ("audio_sampling_rate", audio_sampling_rate),
                ("strength", strength),
                ("mask", mask),
                ("frequency_mask_in_hz", frequency_mask_in_hz),
                ("audio_start_in_s", audio_start_in_s or None),
            ):
                if value is not None:
                    raise ValueError(f"`{name}` belongs to `audio` and cannot be given without it.")
            return
        clips = read_clips(audio, audio_sampling_rate)
        if len(clips) not in (1, batch_size):
            raise ValueError(f"`audio` has {len(clips)} clips for {batch_size} prompts: give one, or one for each.")
        if mask is not None:
            read_masks(mask, clips, audio_sampling_rate)
        if stream:
            raise ValueError("`stream` cannot be used with `audio`: the seams need the sound on both of their sides.")
        front_end = (self.vocoder.config.sampling_rate, self.hop_length, self._num_mel_bins)
        if front_end != (MEL_SAMPLING_RATE, MEL_HOP_LENGTH, NUM_MEL_BINS):
            raise ValueError(
                f"`audio` is read at {MEL_SAMPLING_RATE} Hz into {NUM_MEL_BINS} mel bins, a frame every "
                f"{MEL_HOP_LENGTH} samples, but `vocoder` has {front_end[0]} Hz, {front_end[2]} bins, {front_end[1]}."
            )
        if not 0 <= audio_start_in_s < audio_length_in_s:
            raise ValueError(
                f"`audio_start_in_s` has to lie in the {audio_length_in_s:g} s of the result, not {audio_start_in_s}."
            )
        if frequency_mask_in_hz is not None:
            band = frequency_mask_in_hz
            if (
                not isinstance(band, (list, tuple))
                or len(band) != 2
                or not all(isinstance(edge, Real) and not isinstance(edge, bool) for edge in band)
                or not 0 <= band[0] < band[1] <= MEL_SAMPLING_RATE / 2
                or band[1] - band[0] < 200
                or (band[0] == 0 and band[1] == MEL_SAMPLING_RATE / 2)
            ):
                raise ValueError(
                    "`frequency_mask_in_hz` has to be the band (low, high) to make anew, at least 200 Hz wide and "
                    f"less than all of 0 to {MEL_SAMPLING_RATE // 2} Hz, not {band!r}."
                )

        lengths_in_s = [len(clip) / audio_sampling_rate for clip in clips]
        inpaints = self._inpaints(clips, audio_sampling_rate, audio_length_in_s, audio_start_in_s, mask)
        inpaints = inpaints or frequency_mask_in_hz is not None
        half_sample = 0.5 / self.vocoder.config.sampling_rate
        goes_beyond = audio_start_in_s > half_sample or (
            audio_start_in_s + min(lengths_in_s) < audio_length_in_s - half_sample
        )
        if frequency_mask_in_hz is not None and goes_beyond:
            raise ValueError(
                "`frequency_mask_in_hz` needs a band to keep, but `audio` does not fill the whole result."
            )
        if strength is None:
            return
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` has to be above 0 and up to 1, not {strength}.")
        if strength == 1:
            return
        if inpaints and goes_beyond:
            raise ValueError("`strength` has to be 1 where there is no `audio` to start from: before and after it.")
        if int(num_inference_steps * strength) == 0:
            raise ValueError(f"`strength` {strength} leaves none of the {num_inference_steps} steps.")
        if isinstance(self.scheduler, LMSDiscreteScheduler):
            # its `step` takes coefficients for outputs that it has not seen (diffusers 0.42)
            raise ValueError("`strength` has to be 1 with LMSDiscreteScheduler, which cannot start midway.")
        if isinstance(self.scheduler, PNDMScheduler) and not self.scheduler.config.skip_prk_steps:
            raise ValueError(
                "`strength` has to be 1 for PNDM with its Runge-Kutta warm-up, which cannot start midway. Set the "
                "scheduler's `skip_prk_steps`."
            )

    def _inpaints(self, clips, audio_sampling_rate, audio_length_in_s, audio_start_in_s, mask):
        """Whether some of the result is `audio` and some is made, in time."""
        ends_in_s = audio_start_in_s + max(map(len, clips)) / audio_sampling_rate
        half_sample = 0.5 / self.vocoder.config.sampling_rate
        return mask is not None or audio_start_in_s > half_sample or ends_in_s < audio_length_in_s - half_sample

    def _num_windows(self, audio_length_in_s, window_length_in_s):
        num_frames_in_window = self._num_latent_frames(window_length_in_s or self.config.default_audio_length_in_s)
        return len(window_starts(self._num_latent_frames(audio_length_in_s), num_frames_in_window))

    def _num_latent_frames(self, audio_length_in_s):
        """Latent frames that hold `audio_length_in_s`, rounded up to what the UNet can halve and double again."""
        num_samples = round(audio_length_in_s * self.vocoder.config.sampling_rate)
        num_blocks = math.ceil(num_samples / (self.hop_length * self.vae_scale_factor * self.unet_scale_factor))
        return num_blocks * self.unet_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[tuple[float, str]] | list[list[tuple[float, str]]] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        negative_prompt: str | list[str] | None = None,
        num_waveforms_per_prompt: int = 1,
        eta: float | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        negative_attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        audio: np.ndarray | torch.Tensor | list[np.ndarray] | list[torch.Tensor] | None = None,
        audio_sampling_rate: int | None = None,
        strength: float | None = None,
        mask: list | np.ndarray | torch.Tensor | None = None,
        frequency_mask_in_hz: tuple[float, float] | None = None,
        audio_start_in_s: float = 0.0,
        window_length_in_s: float | None = None,
        window_batch_size: int = 1,
        window_order: str = "joint",
        stream: bool = False,
        guidance_interval: tuple[float, float] | None = None,
    ):
        """Generate sound from text, or from text and sound.

        With `audio` alone the result is a variation of it, as near as `strength` says. With a `mask`, or with
        `audio_length_in_s` beyond the audio's end, only that part is made; the rest is the audio, sample for sample.
        With `frequency_mask_in_hz` only that band is made.

        Sound longer than a window, the length that the checkpoint was trained on, is made of overlapping windows.

        Args:
            prompt (`str`, `list[str]`, `list[tuple[float, str]]` or a list of such lists, *optional*):
                What to hear. Either this or `prompt_embeds` has to be given. `[(0, "rain"), (60, "thunder")]`
                moves: each window is guided by a mixture of the predictions for the texts before and after its middle.
            audio_length_in_s (`float`, *optional*):
                Length of the sound in seconds, any positive number. Defaults to the length of `latents` or to the end
                of the longest `audio` if those are given, else to the checkpoint's own
                (`pipe.config.default_audio_length_in_s`).
            num_inference_steps (`int`, *optional*):
                Number of denoising steps. More are slower and usually better. Defaults to the checkpoint's own
                (`pipe.config.default_num_inference_steps`), 100 for Tango.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance (https://huggingface.co/papers/2207.12598). 1 or less turns it off,
                which halves the work. Defaults to the checkpoint's own (`pipe.config.default_guidance_scale`), 3 for
                Tango.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                From 0 to 1: how far to pull the guided prediction back to the spread of the unguided one (equation 16
                of https://huggingface.co/papers/2305.08891), against over-exposure at high guidance.
            negative_prompt (`str` or `list[str]`, *optional*):
                What not to hear. One string serves all prompts. Has no effect without guidance.
            num_waveforms_per_prompt (`int`, *optional*, defaults to 1):
                Number of takes of each prompt; a prompt's takes are next to each other in the output.
            eta (`float`, *optional*):
                DDIM's share of fresh noise (https://huggingface.co/papers/2010.02502), and TCD's gamma. Defaults to
                the scheduler's own; other schedulers ignore it.
            timesteps (`list[int]`, *optional*):
                Timesteps to use, descending, instead of `num_inference_steps` evenly spaced ones, with schedulers that
                support it.
            sigmas (`list[float]`, *optional*):
                Noise levels to use instead, descending, with schedulers that support it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result reproducible. With a list, one per waveform, a sound does not depend on the batch that
                it is made in.
            latents (`torch.Tensor`, *optional*):
                Noise of unit variance to start from, of shape `(batch, channels, latent frames, latent mel bins)`.
            prompt_embeds (`torch.Tensor`, *optional*):
                Encoded prompt as `encode_prompt` returns it, of shape `(batch, tokens, hidden)`.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Encoded negative prompt, of the same shape as `prompt_embeds` if both are given.
            attention_mask (`torch.Tensor`, *optional*):
                Belongs to `prompt_embeds`: shape `(batch, tokens)`, 1 for tokens and 0 for padding.
            negative_attention_mask (`torch.Tensor`, *optional*):
                Belongs to `negative_prompt_embeds` in the same way.
            cross_attention_kwargs (`dict`, *optional*):
                Passed to the UNet's attention processors; `{"scale": 0.5}` scales LoRA layers for this call.
            output_type (`str`, *optional*, defaults to `"np"`):
                `"np"` for a NumPy array, `"pt"` for a tensor, `"latent"` for the denoised latents, not decoded.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an [`~pipelines.AudioPipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, `PipelineCallback` or `MultiPipelineCallbacks`, *optional*):
                Called as `callback(pipeline, step_index, timestep, callback_kwargs)` after every step; the tensors in
                the dict that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Which of `latents`, `prompt_embeds` and `attention_mask` the callback gets. The text ones hold the
                negative rows first, then the positive ones.
            audio (`np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                Floating-point sound in [-1, 1] to start from, of shape `(samples,)`, `(batch, samples)` or `(batch,
                channels, samples)`, or a list of `(samples,)` or `(channels, samples)` of any lengths. One for all
                prompts or one for each. Channels are averaged, the rate becomes the pipeline's. The level is the
                audio's again in the result.
            audio_sampling_rate (`int`, *optional*):
                Rate of `audio`, which needs it.
            strength (`float`, *optional*):
                From above 0 to 1: which share of the steps is taken, and so how far what is made may go from the
                audio. At 1 nothing of it is left. Defaults to 1 where a mask says what to keep, else to 0.5.
            mask (`list`, `np.ndarray` or `torch.Tensor`, *optional*):
                Which part of `audio` to make anew: regions `[(start, end), ...]` in seconds of the audio, for all
                clips; a list of such lists, one for each clip; or an array, of 1 where to make and 0 where to keep,
                for each sample of `audio`. What is kept is the audio sample for sample, but for 20 ms beside the mask
                where the two are cross-faded.
            frequency_mask_in_hz (`tuple[float, float]`, *optional*):
                Which band of `audio` to make anew, such as `(4000, 8000)` for a sound that has nothing above 4 kHz.
            audio_start_in_s (`float`, *optional*, defaults to 0.0):
                Where in the result `audio` begins. What comes before is made.
            window_length_in_s (`float`, *optional*):
                Longest sound that is denoised and decoded in one piece. Defaults to what the checkpoint was trained
                on. Memory follows this, not the length of the sound.
            window_batch_size (`int`, *optional*, defaults to 1):
                Number of windows that the UNet gets at once. More are faster on a GPU and take more memory.
            window_order (`str`, *optional*, defaults to `"joint"`):
                `"joint"` takes each step in all windows, averaged where they overlap; `"sequential"` finishes one
                window after the other, each going on from the last quarter or more of the one before.
            stream (`bool`, *optional*, defaults to `False`):
                Whether to return an iterator of stretches of sound, `(batch, some samples)` each, which joined are
                the whole. With `window_order="sequential"` each comes as soon as its window is done. A call that is
                streaming has to be exhausted before the next.
            guidance_interval (`tuple[float, float]`, *optional*):
                Which part of the steps that are taken is guided: step k of n, counted from 0, if `start <= k / n <
                stop`. The others cost half. Has no effect without guidance, nor on UNets that were distilled with it.
                Defaults to the checkpoint's own (`pipe.config.default_guidance_interval`), all of them for Tango.
                (https://huggingface.co/papers/2404.07724)

        Returns:
            [`~pipelines.AudioPipelineOutput`] or `tuple`: `audios` of shape `(batch, num_samples)`, float32 in
            [-1, 1], exactly `round(audio_length_in_s * sampling_rate)` samples (the original returns 32 more, as
            int16 that wraps round at full scale); for `"latent"`, latents of the shape described above. With `stream`
            an iterator of such arrays or tensors.

        Raises:
            ValueError: for a wrong argument, before any model runs.
            RuntimeError: if the models produce NaN or infinity.

        Examples:
            >>> from pipeline_tango import TangoPipeline
            >>> from scipy.io import wavfile

            >>> pipe = TangoPipeline.from_pretrained("path/to/converted/tango")
            >>> audio = pipe("rain and thunder", generator=torch.Generator().manual_seed(0)).audios[0]
            >>> wavfile.write("rain.wav", pipe.vocoder.config.sampling_rate, audio)
        """
        # 0. Callback objects bring their own tensor list
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Defaults, length and inputs
        if num_inference_steps is None:
            num_inference_steps = self.config.default_num_inference_steps
        if guidance_scale is None:
            guidance_scale = self.config.default_guidance_scale
        if guidance_interval is None:
            guidance_interval = self.config.default_guidance_interval
        clips = None if audio is None else read_clips(audio, audio_sampling_rate)
        if audio_length_in_s is None:
            audio_length_in_s = self.config.default_audio_length_in_s
            if isinstance(latents, torch.Tensor) and latents.ndim == 4 and self.vocoder is not None:
                num_frames = latents.shape[2] * self.vae_scale_factor
                audio_length_in_s = num_frames * self.hop_length / self.vocoder.config.sampling_rate
            elif clips is not None and isinstance(audio_start_in_s, Real):
                audio_length_in_s = audio_start_in_s + max(map(len, clips)) / audio_sampling_rate
        self.check_inputs(
            prompt,
            audio_length_in_s,
            num_inference_steps,
            guidance_scale,
            guidance_rescale,
            negative_prompt,
            num_waveforms_per_prompt,
            eta,
            timesteps,
            sigmas,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            attention_mask,
            negative_attention_mask,
            cross_attention_kwargs,
            output_type,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            audio,
            audio_sampling_rate,
            strength,
            mask,
            frequency_mask_in_hz,
            audio_start_in_s,
            window_length_in_s,
            window_batch_size,
            window_order,
            stream,
            guidance_interval,
        )
        sampling_rate = self.vocoder.config.sampling_rate
        num_samples = round(audio_length_in_s * sampling_rate)
        num_latent_frames = self._num_latent_frames(audio_length_in_s)
        num_frames_in_window = self._num_latent_frames(window_length_in_s or self.config.default_audio_length_in_s)
        starts = window_starts(num_latent_frames, num_frames_in_window)
        spans = [(0, num_latent_frames)]  # what is denoised at a time, in latent frames
        if window_order == "sequential" and len(starts) > 1:
            spans = [(start, start + num_frames_in_window) for start in starts]

        # 2. Call state
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 3. Audio on the time line of the result
        placed = None
        if clips is not None:
            inpaints = self._inpaints(clips, audio_sampling_rate, audio_length_in_s, audio_start_in_s, mask)
            if strength is None:
                strength = 1.0 if inpaints or frequency_mask_in_hz is not None else 0.5
            if inpaints or frequency_mask_in_hz is not None or strength < 1:
                masks = [np.zeros(len(clip), bool) for clip in clips]
                if mask is not None:
                    masks = read_masks(mask, clips, audio_sampling_rate)
                placed = place_audio(
                    clips, masks, audio_sampling_rate, sampling_rate, num_samples, audio_start_in_s, inpaints, strength
                )

        # 4. Timesteps, before any model runs since the scheduler has conditions of its own
        set_timesteps = functools.partial(
            self._set_timesteps,
            num_inference_steps,
            timesteps,
            sigmas,
            strength=1.0 if strength is None else strength,
            adds_noise=placed is not None or len(spans) > 1,
        )
        self._num_timesteps = len(set_timesteps()[0])

        # 5. Encode text
        keyframes = [[(0.0, None)]] * len(prompt_embeds) if prompt is None else read_prompts(prompt)
        if prompt is not None:
            prompt = [text for each in keyframes for _, text in each]
        if isinstance(negative_prompt, list):
            negative_prompt = [text for text, each in zip(negative_prompt, keyframes) for _ in each]
        prompt_embeds, attention_mask, negative_prompt_embeds, negative_attention_mask = self.encode_prompt(
            prompt,
            device,
            num_waveforms_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            attention_mask=attention_mask,
            negative_attention_mask=negative_attention_mask,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])  # (2 * texts, tokens, hidden)
            attention_mask = torch.cat([negative_attention_mask, attention_mask])  # (2 * texts, tokens)

        # 6. Latents: noise, those of the audio, and which of them to make
        num_waveforms = len(keyframes) * num_waveforms_per_prompt
        latents = self.prepare_latents(num_waveforms, num_latent_frames, device, generator, latents)
        audio_latents = latent_mask = None
        if placed is not None:
            num_copies = num_waveforms // len(clips)
            audio_latents = self._encode_audio(
                placed, num_latent_frames, num_frames_in_window, num_copies, device, generator
            )
            if inpaints or frequency_mask_in_hz is not None:
                latent_mask = self._latent_mask(placed.is_made, num_latent_frames, frequency_mask_in_hz, device)
                latent_mask = latent_mask.repeat_interleave(num_waveforms // len(latent_mask), dim=0)

        # 7. Denoise and decode: two iterators, where nothing runs before the result is asked for
        denoised = self._denoise(
            latents,
            audio_latents,
            latent_mask,
            spans,
            set_timesteps,
            strength is not None and strength < 1,
            prompt_embeds,
            attention_mask,
            keyframes,
            num_waveforms_per_prompt,
            num_frames_in_window,
            window_batch_size,
            guidance_rescale,
            guidance_interval,
            self.prepare_extra_step_kwargs(generator, eta),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        stretches = self._decode(denoised, num_frames_in_window, num_samples, generator)
        if stream:
            return self._stream(stretches, output_type)
        if output_type == "latent":
            for audio, _ in denoised:
                pass
        else:
            audio, num_done = torch.empty(num_waveforms, num_samples, device=latents.device), 0
            for stretch in stretches:
                audio[:, num_done : num_done + stretch.shape[1]] = stretch
                num_done += stretch.shape[1]
            if placed is not None:
                audio = self._join_with_audio(audio, placed, num_copies, frequency_mask_in_hz)
        self.maybe_free_model_hooks()

        # 8. Result
        peaks = self._finite_peaks(audio)
        if output_type != "latent" and (peaks < 1e-3).any():
            silent = [i for i, peak in enumerate(peaks.tolist()) if peak < 1e-3]
            logger.warning(f"Waveform(s) {silent} are silent: no sample reaches 0.001 (-60 dB).")
        if output_type == "np":
            audio = audio.cpu().numpy()

        if not return_dict:
            return (audio,)
        return AudioPipelineOutput(audios=audio)

    def _set_timesteps(self, num_inference_steps, timesteps, sigmas, strength, adds_noise):
        """Set up the scheduler, which forgets what it remembered of an earlier run. It works on the CPU, where its
        tables are: looking up a timestep of a GPU in them would wait for that at every step.

        Returns:
            The timesteps to take, after leaving out the share that `strength` says, and the number of steps.
        """
        if timesteps is not None:
            self.scheduler.set_timesteps(timesteps=timesteps, device="cpu")
        elif sigmas is not None:
            self.scheduler.set_timesteps(sigmas=sigmas, device="cpu")
        else:
            self.scheduler.set_timesteps(num_inference_steps, device="cpu")
        order = self.scheduler.order
        if timesteps is not None or sigmas is not None:
            num_inference_steps = math.ceil(len(self.scheduler.timesteps) / order)
        timesteps = self.scheduler.timesteps
        if timesteps.max() > self.scheduler.config.num_train_timesteps - 1:
            # for example 1000 steps with "leading" spacing and an offset of 1, where the original fails midway
            raise ValueError(
                f"`num_inference_steps` of {num_inference_steps} makes {type(self.scheduler).__name__} start at "
                f"timestep {float(timesteps.max()):g}, beyond the last one of training, "
                f"{self.scheduler.config.num_train_timesteps - 1}. Use fewer steps."
            )
        num_skipped = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        if num_skipped == num_inference_steps:
            raise ValueError(f"`strength` {strength} leaves none of the {num_inference_steps} steps.")
        if num_skipped > 0 and isinstance(self.scheduler, PNDMScheduler):
            # its second step is taken twice: that belongs to the start of a run, not to a timestep
            timesteps = timesteps.unique().flip(0)[num_skipped:]
            timesteps = torch.cat([timesteps[:2], timesteps[1:]])
        else:
            timesteps = timesteps[num_skipped * order :]
        if adds_noise and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(num_skipped * order)  # `add_noise` follows the steps from here on
        return timesteps, num_inference_steps - num_skipped

    @torch.no_grad()
    def _denoise(
        self,
        latents,
        audio_latents,
        latent_mask,
        spans,
        set_timesteps,
        starts_from_audio,
        prompt_embeds,
        attention_mask,
        keyframes,
        num_waveforms_per_prompt,
        num_frames_in_window,
        window_batch_size,
        guidance_rescale,
        guidance_interval,
        extra_step_kwargs,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
    ):
        """The denoising loop, once for each of `spans`, which all but the first begin with the end of the one before.

        Where `latent_mask` is 0, and where a span is known from the one before, latents are replaced after each step
        by the known ones with the noise of the next step (as in RePaint, Lugmayr et al. 2022, arXiv 2201.09865).

        Yields:
            All latents, and how many frames of them are finished.
        """
        all_latents, noise = latents, latents / self.scheduler.init_noise_sigma
        known, is_made = audio_latents, latent_mask
        if len(spans) > 1:
            known = torch.zeros_like(latents) if known is None else known.clone()
            is_made = torch.ones_like(latents[:, :1]) if is_made is None else is_made.clone()
        num_texts = sum(map(len, keyframes)) * num_waveforms_per_prompt
        frames_per_s = self.vocoder.config.sampling_rate / (self.hop_length * self.vae_scale_factor)

        for begin, end in spans:
            timesteps, num_inference_steps = set_timesteps()
            unet_timesteps = timesteps.float().to(latents.device)  # exact, and some devices have no float64
            num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
            frames = slice(begin, end)
            latents = all_latents[:, :, frames]
            if starts_from_audio:
                latents = self.scheduler.add_noise(audio_latents[:, :, frames], noise[:, :, frames], timesteps[:1])
            if is_made is not None:
                noisy = self.scheduler.add_noise(known[:, :, frames], noise[:, :, frames], timesteps[:1])
                latents = torch.where(is_made[:, :, frames] > 0, latents, noisy)

            texts = {}  # of windows, by the first frame and whether they are guided
            deep_cache = self.deep_cache
            if deep_cache is not None:
                deep_cache.reset()
            with self.progress_bar(total=num_inference_steps) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue

                    progress = step_of_evaluation(i, self.scheduler) / num_inference_steps
                    is_in_interval = guidance_interval[0] <= progress < guidance_interval[1]
                    is_guided = self.do_classifier_free_guidance and is_in_interval
                    if deep_cache is not None:
                        deep_cache.advance(is_guided)
                    num_rows = num_texts * 2 if is_guided else num_texts
                    if min(prompt_embeds.shape[0], attention_mask.shape[0]) < num_rows:
                        raise ValueError(
                            f"`callback_on_step_end` left {prompt_embeds.shape[0]} rows of `prompt_embeds` and "
                            f"{attention_mask.shape[0]} of `attention_mask`, but {num_rows} are needed."
                        )

                    def predict(windows, starts):
                        key = starts[0], is_guided
                        if key not in texts:
                            middles = [(begin + start + windows.shape[2] / 2) / frames_per_s for start in starts]
                            texts[key] = self._window_texts(
                                prompt_embeds, attention_mask, middles, keyframes, num_waveforms_per_prompt, is_guided
                            )
                        context = contextlib.nullcontext()
                        if deep_cache is not None:
                            context = deep_cache.window(starts[0], len(texts[key][0]))
                        with context:
                            return self._guided_prediction(
                                windows, unet_timesteps[i], *texts[key], is_guided, guidance_rescale
                            )

                    latent_model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
                    model_pred = blend_windows(predict, latent_model_input, num_frames_in_window, window_batch_size)
                    latents = self.scheduler.step(model_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
                    latents = latents.float()  # some schedulers return float64
                    if is_made is not None:
                        noisy = known[:, :, frames]
                        if i + 1 < len(timesteps):
                            noisy = self.scheduler.add_noise(noisy, noise[:, :, frames], timesteps[i + 1 : i + 2])
                        latents = torch.where(is_made[:, :, frames] > 0, latents, noisy)

                    if callback_on_step_end is not None:
                        callback_kwargs = {}
                        for name in callback_on_step_end_tensor_inputs:
                            callback_kwargs[name] = locals()[name]
                        callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                        if not {"prompt_embeds", "attention_mask"}.isdisjoint({*callback_kwargs, *callback_outputs}):
                            texts.clear()
                        latents = callback_outputs.pop("latents", latents)
                        prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                        attention_mask = callback_outputs.pop("attention_mask", attention_mask)

                    if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                        progress_bar.update()
                    if is_torch_xla_available():
                        xm.mark_step()

            if len(spans) == 1:
                all_latents = latents
            else:
                for each in (all_latents, known):
                    each[:, :, frames] = latents
                is_made[:, :, frames] = 0
            yield all_latents, end

    def _window_texts(
        self, prompt_embeds, attention_mask, middles_in_s, keyframes, num_waveforms_per_prompt, is_guided
    ):
        """Text that guides windows around `middles_in_s`: negative rows if `is_guided`, those of the prompt, and those
        of what it moves to, if any does.

        Returns:
            Embeddings and their mask, of as many rows, and the share of what the prompt moves to, of shape
            `(windows * batch, 1, 1, 1)`, `None` if none moves.
        """
        texts = [texts_at(each, keyframes, num_waveforms_per_prompt) for each in middles_in_s]
        rows, next_rows, shares = (torch.cat(each) for each in zip(*texts))  # (windows * batch,)
        # counted from the end, since a callback that turns guidance off may leave the negative rows in place
        num_texts = sum(map(len, keyframes)) * num_waveforms_per_prompt
        parts = [rows - 2 * num_texts, rows - num_texts] if is_guided else [rows - num_texts]
        is_moving = (shares > 0).any()
        if is_moving:
            parts.append(next_rows - num_texts)
        rows = torch.cat(parts).to(prompt_embeds.device)
        shares = shares[:, None, None, None].to(prompt_embeds.device) if is_moving else None
        return prompt_embeds[rows], attention_mask[rows], shares

    def _guided_prediction(
        self,
        latent_model_input,
        t,
        encoder_hidden_states,
        encoder_attention_mask,
        shares,
        is_guided,
        guidance_rescale,
    ):
        """The UNet's prediction, under classifier-free guidance if `is_guided`, in one batch. The texts are those of
        `_window_texts`."""
        num_parts = len(encoder_hidden_states) // len(latent_model_input)
        latent_model_input = torch.cat([latent_model_input] * num_parts)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            # a guidance-distilled UNet reads w - 1 (https://huggingface.co/papers/2310.04378)
            weights = torch.full(
                (len(latent_model_input),), (self.guidance_scale - 1) * 1000.0, device=latent_model_input.device
            )
            timestep_cond = get_timestep_embedding(
                weights, self.unet.config.time_cond_proj_dim, downscale_freq_shift=1
            ).to(self.unet.dtype)
        model_preds = self.unet(
            latent_model_input,
            t,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            return_dict=False,
        )[0].float()

        *model_preds, model_pred = model_preds.chunk(num_parts)
        if shares is not None:
            model_pred = torch.lerp(model_preds.pop(), model_pred, shares)
        if is_guided:
            model_pred_uncond, model_pred_text = model_preds[0], model_pred
            model_pred = model_pred_uncond + self.guidance_scale * (model_pred_text - model_pred_uncond)
            if guidance_rescale > 0:
                # equations (15) and (16) of https://huggingface.co/papers/2305.08891
                ratio = model_pred_text.std((1, 2, 3), keepdim=True) / model_pred.std((1, 2, 3), keepdim=True)
                model_pred = model_pred * (guidance_rescale * ratio + 1 - guidance_rescale)
        return model_pred

    @torch.no_grad()
    def _decode(self, denoised, num_frames_in_window, num_samples, generator=None):
        """Waveform of the latents in `denoised`, in stretches, each as soon as nothing that is still to come has a
        part in it. Mel spectrograms of overlapping windows are blended; the vocoder, which is a convolution, sees as
        much on both sides of a stretch as it would in the whole.

        Yields:
            `torch.Tensor` of shape `(batch, some samples)`, `num_samples` in all.
        """
        context = self._vocoder_context()
        num_windows_done = num_frames_done = 0
        for latents, num_finished in denoised:
            starts = window_starts(latents.shape[2], num_frames_in_window)
            if num_windows_done == 0:
                shape = (latents.shape[0], 1, latents.shape[2] * self.vae_scale_factor, self._num_mel_bins)
                total, total_weights = latents.new_zeros(shape), latents.new_zeros(shape[2], 1)
                shape = (*shape[:3], self.config.num_noise_channels)
                noise = randn_tensor(shape, generator=generator, device=latents.device)
            for start in starts[num_windows_done:]:
                window = latents[:, :, start : start + num_frames_in_window]
                if start + window.shape[2] > num_finished:
                    break
                mel_spectrogram = self.vae.decode(
                    (window / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False
                )[0].float()  # (batch, 1, num_frames, num_mel_bins)
                num_frames = mel_spectrogram.shape[2]
                weights = window_weights(num_frames, latents.device) if len(starts) > 1 else 1.0
                frames = slice(start * self.vae_scale_factor, start * self.vae_scale_factor + num_frames)
                total[:, :, frames] += mel_spectrogram * weights
                total_weights[frames] += weights
                num_windows_done += 1

                ready = end = total.shape[2]
                if num_windows_done < len(starts):
                    ready = starts[num_windows_done] * self.vae_scale_factor
                    end = max(ready - context, num_frames_done)
                first = max(num_frames_done - context, 0)
                if end > num_frames_done and num_frames_done * self.hop_length < num_samples:
                    waveform = self.mel_spectrogram_to_waveform(
                        total[:, :, first:ready] / total_weights[first:ready], noise[:, :, first:ready]
                    )  # (batch, at least num_frames * hop)
                    stop = min(end * self.hop_length, num_samples)
                    yield waveform[:, (num_frames_done - first) * self.hop_length : stop - first * self.hop_length]
                    num_frames_done = end

    def _vocoder_context(self):
        """Mel frames on either side that a sample depends on: half the kernels, each at its layer's rate."""
        config = self.vocoder.config
        context, rate = 3.0, 1  # the first convolution has a kernel of 7
        for upsample_rate, upsample_kernel_size in zip(config.upsample_rates, config.upsample_kernel_sizes):
            rate *= upsample_rate
            context += upsample_kernel_size / 2 / rate
            context += (
                max(
                    sum((kernel_size - 1) / 2 * (dilation + 1) for dilation in dilations)
                    for kernel_size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes)
                )
                / rate
            )
        # half a window to the frames that a correction changes, half a one to the samples that they are measured by
        context += self.config.num_mel_corrections * MEL_FFT_LENGTH / MEL_HOP_LENGTH
        return math.ceil(context + 3 / rate) + 1  # the last convolution has a kernel of 7

    def _stream(self, stretches, output_type):
        try:
            for stretch in stretches:
                self._finite_peaks(stretch)
                yield stretch.cpu().numpy() if output_type == "np" else stretch
        finally:
            self.maybe_free_model_hooks()

    def _finite_peaks(self, audio):
        """Peak of each row, without a copy of what may be long. Raises `RuntimeError` for NaN and infinity."""
        lowest, highest = audio.flatten(1).aminmax(dim=1)
        peaks = torch.maximum(-lowest, highest)  # (batch,), NaN where there is one
        if not torch.isfinite(peaks).all():
            broken = [i for i, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
            raise RuntimeError(
                f"The models produced NaN or infinity in waveform(s) {broken}. float16 overflows in some of them: use "
                "torch.bfloat16 or torch.float32, at least for `text_encoder`, `vae` and `vocoder`."
            )
        return peaks
