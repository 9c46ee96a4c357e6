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
"""Text-to-audio with Tango (Ghosal et al. 2023, arXiv 2304.13731).

This file is the whole inference path and imports no other file of its package: a model repository carries the same
bytes as `pipeline.py`. "The original" below is the code that the released checkpoints were trained with.
"""

import functools
import inspect
import math
import os
import shutil
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torch_xla_available, logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer
from transformers.audio_utils import mel_filter_bank


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm


logger = logging.get_logger(__name__)

SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
    "lcm": LCMScheduler,
}

MEL_SAMPLING_RATE = 16000
MEL_FFT_LENGTH = 1024
MEL_HOP_LENGTH = 160
NUM_MEL_BINS = 64
MIN_MEL_MAGNITUDE = 1e-5


@functools.lru_cache(maxsize=1)
def _mel_filters():
    filters = mel_filter_bank(
        num_frequency_bins=MEL_FFT_LENGTH // 2 + 1,
        num_mel_filters=NUM_MEL_BINS,
        min_frequency=0.0,
        max_frequency=MEL_SAMPLING_RATE / 2,
        sampling_rate=MEL_SAMPLING_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float()  # (num_frequency_bins, num_mel_bins)


def log_mel_spectrogram(waveform):
    """Log-mel spectrogram as the VAE and the vocoder of the released checkpoints were trained on.

    Args:
        waveform (`torch.Tensor` of shape `(batch, num_samples)`):
            16 kHz mono in [-1, 1], more than 512 samples. Its level is left alone.

    Returns:
        `torch.Tensor` of shape `(batch, num_frames, num_mel_bins)`: float32, natural log of the magnitude in 64 Slaney
        mel bands from 0 to 8 kHz, floored at ln(1e-5); one frame for each started hop of 160 samples. (A centred
        transform has one more when the hops come out even; the original cuts it off later.)

    Raises:
        ValueError: if `waveform` is not a 2-D floating-point tensor or is too short to be padded by reflection.

    Source: HiFi-GAN (Kong et al. 2020), as set up by AudioLDM (Liu et al. 2023): periodic Hann window of 1024 samples.
    """
    if not isinstance(waveform, torch.Tensor) or waveform.ndim != 2 or not waveform.is_floating_point():
        came = f"{tuple(waveform.shape)} {waveform.dtype}" if isinstance(waveform, torch.Tensor) else type(waveform)
        raise ValueError(f"`waveform` has to be a floating-point tensor (batch, num_samples), not {came}.")
    if waveform.shape[1] <= MEL_FFT_LENGTH // 2:
        raise ValueError(f"`waveform` needs more than {MEL_FFT_LENGTH // 2} samples, not {waveform.shape[1]}.")

    # in float64 first: the float32 window is off by 1e-7, which shows in quiet bands beside loud ones
    window = torch.hann_window(MEL_FFT_LENGTH, dtype=torch.float64).float().to(waveform.device)
    spectrum = torch.stft(
        waveform.float(), MEL_FFT_LENGTH, MEL_HOP_LENGTH, window=window, pad_mode="reflect", return_complex=True
    )  # (batch, num_frequency_bins, num_frames)
    num_frames = math.ceil(waveform.shape[1] / MEL_HOP_LENGTH)
    magnitude = spectrum[..., :num_frames].abs().transpose(1, 2)  # (batch, num_frames, num_frequency_bins)
    return (magnitude @ _mel_filters().to(waveform.device)).clamp(min=MIN_MEL_MAGNITUDE).log()


class TangoLoraLoaderMixin(LoraBaseMixin):
    """Loads and saves LoRA adapters of the UNet. The rest (`set_adapters`, `unload_lora_weights`,
    `enable_lora_hotswap`, ...) is [`~loaders.lora_base.LoraBaseMixin`]'s."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, *, return_lora_metadata=False, **kwargs):
        """State dict of a LoRA file, and its metadata if `return_lora_metadata`.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Hub repo, folder, or state dict.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): also return the adapter's configuration.
            kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `force_download`, `local_files_only`, `token`.
        """
        options = ("weight_name", "subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token")
        fetch_options = {name: kwargs.pop(name, None) for name in options}
        if kwargs:
            raise ValueError(f"Unknown arguments {sorted(kwargs)}; known ones are {list(options)}.")
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            proxies=None,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            **fetch_options,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name=None,
        hotswap=False,
        low_cpu_mem_usage=True,
        **kwargs,
    ):
        """Load a LoRA adapter into the UNet.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): see `lora_state_dict`, which also
                gets `kwargs`. Only safetensors files are read. A passed dict is not changed.
            adapter_name (`str`, *optional*): name to call the adapter by, `default_{i}` if not given.
            hotswap (`bool`, *optional*, defaults to `False`): replace the weights of the loaded adapter
                `adapter_name` in place, without recompiling a compiled UNet.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `True`): do not initialise weights that get loaded.

        Raises:
            ValueError: if the file is no LoRA of this UNet.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            pretrained_model_name_or_path_or_dict = dict(pretrained_model_name_or_path_or_dict)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        strangers = [key for key in state_dict if "lora" not in key or not key.startswith(f"{self.unet_name}.")]
        if strangers or not state_dict:
            raise ValueError(
                f"Not a LoRA file for the UNet: every key has to start with '{self.unet_name}.' and contain 'lora', "
                f"but {f'{len(strangers)} do not, such as {strangers[0]!r}' if strangers else 'there is none'}."
            )
        self.load_lora_into_unet(
            state_dict,
            self.unet,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict,
        unet,
        adapter_name=None,
        metadata=None,
        _pipeline=None,
        low_cpu_mem_usage=True,
        hotswap=False,
    ):
        """Load the keys of `state_dict` that start with `unet.` into `unet` (`UNet2DConditionModel`)."""
        unet.load_lora_adapter(
            state_dict,
            prefix=cls.unet_name,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory,
        unet_lora_layers=None,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        unet_lora_adapter_metadata=None,
    ):
        """Save the LoRA layers of the UNet in the format that `load_lora_weights` reads.

        Args:
            save_directory (`str` or `os.PathLike`): folder, made if missing.
            unet_lora_layers (`dict[str, torch.Tensor]` or `torch.nn.Module`): for example
                `peft.utils.get_peft_model_state_dict(unet)`.
            is_main_process (`bool`, *optional*, defaults to `True`): `False` on the other processes of a
                distributed run; they write nothing.
            weight_name (`str`, *optional*): file name, `pytorch_lora_weights.safetensors` if not given.
            save_function (`Callable`, *optional*): replaces the safetensors writer.
            safe_serialization (`bool`, *optional*, defaults to `True`): `False` writes a pickle.
            unet_lora_adapter_metadata (`dict`, *optional*): configuration of the adapter (rank, alpha, targets),
                for example `unet.peft_config["default"].to_dict()`.

        Raises:
            ValueError: if `unet_lora_layers` is empty.
        """
        if not unet_lora_layers:
            raise ValueError("`unet_lora_layers` is empty: there is nothing to save.")
        if not is_main_process:
            return
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.unet_name: unet_lora_layers},
            lora_metadata={cls.unet_name: unet_lora_adapter_metadata},
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(self, components=("unet",), lora_scale=1.0, safe_fusing=False, adapter_names=None):
        """Add the adapters' weights, times `lora_scale`, to the UNet's own (see `LoraBaseMixin.fuse_lora`)."""
        super().fuse_lora(list(components), lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def unfuse_lora(self, components=("unet",)):
        """Undo `fuse_lora`."""
        super().unfuse_lora(list(components))


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
    ):
        super().__init__()
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, vocoder=vocoder
        )
        self.register_to_config(default_audio_length_in_s=default_audio_length_in_s)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if vae is not None else 4
        self.unet_scale_factor = 2 ** (len(self.unet.config.block_out_channels) - 1) if unet is not None else 8
        self.hop_length = math.prod(self.vocoder.config.upsample_rates) if vocoder is not None else MEL_HOP_LENGTH

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
                inputs = self.tokenizer(
                    text, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
                )
                mask = inputs.attention_mask.to(device)
                embeds = self.text_encoder(inputs.input_ids.to(device), attention_mask=mask)[0]
            padding = num_tokens - embeds.shape[1]
            embeds = F.pad(embeds.to(device, dtype), (0, 0, 0, padding))  # (batch, tokens, hidden)
            mask = F.pad(mask.to(device), (0, padding))  # (batch, tokens)
            outputs.append(embeds.repeat_interleave(num_waveforms_per_prompt, dim=0))
            outputs.append(mask.repeat_interleave(num_waveforms_per_prompt, dim=0))
        outputs += [None] * (4 - len(outputs))
        prompt_embeds, attention_mask, negative_prompt_embeds, negative_attention_mask = outputs
        return prompt_embeds, attention_mask, negative_prompt_embeds, negative_attention_mask

    def save_pretrained(
        self,
        save_directory,
        safe_serialization=True,
        variant=None,
        max_shard_size=None,
        push_to_hub=False,
        **push_to_hub_kwargs,
    ):
        """Save as [`DiffusionPipeline.save_pretrained`] does, which `push_to_hub` uses too, with this file beside the
        index as `pipeline.py`, so that `custom_pipeline` loads the folder or repo where this package is missing."""
        os.makedirs(save_directory, exist_ok=True)
        shutil.copyfile(__file__, os.path.join(save_directory, "pipeline.py"))
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
        num_latent_bins = self.vocoder.config.model_in_dim // self.vae_scale_factor
        return self.unet.config.in_channels, num_latent_frames, num_latent_bins

    def mel_spectrogram_to_waveform(self, mel_spectrogram):
        """Vocode a log-mel spectrogram.

        Args:
            mel_spectrogram (`torch.Tensor` of shape `(batch, 1, num_frames, num_mel_bins)`).

        Returns:
            `torch.Tensor` of shape `(batch, num_samples)`: float32 in [-1, 1]. The released vocoder makes 32 samples
            more than frames times hop.
        """
        dtype = get_parameter_dtype(self.vocoder)  # not `.dtype`, which is the storage type under layerwise casting
        return self.vocoder(mel_spectrogram.squeeze(1).to(dtype)).float()

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
        if self.vocoder.config.model_in_dim % self.vae_scale_factor != 0:
            raise ValueError(
                f"`vocoder` has {self.vocoder.config.model_in_dim} mel bins, which the `vae`'s factor "
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
        ):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < minimum:
                raise ValueError(f"`{name}` has to be an integer of at least {minimum}, not {value!r}.")
        for name, value in (
            ("audio_length_in_s", audio_length_in_s),
            ("guidance_scale", guidance_scale),
            ("guidance_rescale", guidance_rescale),
            ("eta", 0.0 if eta is None else eta),
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
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"`eta` has to be between 0 and 1, not {eta}.")

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
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = [value] if isinstance(value, str) else value
            if value is not None and (
                not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts)
            ):
                raise ValueError(f"`{name}` has to be a string or a list of at least one string, not {value!r}.")
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            if getattr(prompt_embeds, "shape", None) != getattr(negative_prompt_embeds, "shape", None):
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but got "
                    f"{getattr(prompt_embeds, 'shape', None)} and {getattr(negative_prompt_embeds, 'shape', None)}."
                )
        width = self.unet.config.cross_attention_dim
        for prefix, embeds, mask in (
            ("", prompt_embeds, attention_mask),
            ("negative_", negative_prompt_embeds, negative_attention_mask),
        ):
            embeds_name, mask_name = f"{prefix}prompt_embeds", f"{prefix}attention_mask"
            if embeds is None:
                if mask is not None:
                    raise ValueError(f"`{mask_name}` belongs to `{embeds_name}` and cannot be given without it.")
                continue
            if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width:
                described = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds)
                raise ValueError(f"`{embeds_name}` has to be a tensor (batch, tokens, {width}), not {described}.")
            if not embeds.is_floating_point() or not embeds.numel() or not torch.isfinite(embeds).all():
                raise ValueError(f"`{embeds_name}` has to hold finite floating-point numbers.")
            if mask is None:
                raise ValueError(
                    f"`{embeds_name}` needs its `{mask_name}`: without it padding would be read as text. "
                    "`encode_prompt` returns both; for embeddings without padding pass a mask of ones."
                )
            if not isinstance(mask, torch.Tensor) or mask.shape != embeds.shape[:2]:
                described = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask)
                raise ValueError(f"`{mask_name}` has to be a tensor {tuple(embeds.shape[:2])}, not {described}.")
            if not ((mask == 0) | (mask == 1)).all() or not (mask == 1).any(dim=1).all():
                raise ValueError(f"`{mask_name}` has to be 0 or 1, with a 1 in every row.")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) if prompts is not None else prompt_embeds.shape[0]
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
        if not isinstance(output_type, str) or output_type not in ("np", "pt", "latent"):
            raise ValueError(f"`output_type` has to be 'np', 'pt' or 'latent', not {output_type!r}.")
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

    def _num_latent_frames(self, audio_length_in_s):
        """Latent frames that hold `audio_length_in_s`, rounded up to what the UNet can halve and double again."""
        num_samples = round(audio_length_in_s * self.vocoder.config.sampling_rate)
        num_blocks = math.ceil(num_samples / (self.hop_length * self.vae_scale_factor * self.unet_scale_factor))
        return num_blocks * self.unet_scale_factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        audio_length_in_s: float | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 3.0,
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
    ):
        """Generate sound from text.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to hear. Either this or `prompt_embeds` has to be given.
            audio_length_in_s (`float`, *optional*):
                Length of the sound in seconds, any positive number. Defaults to the length of `latents` if those are
                given, else to the checkpoint's own (`pipe.config.default_audio_length_in_s`).
            num_inference_steps (`int`, *optional*, defaults to 100):
                Number of denoising steps. More are slower and usually better.
            guidance_scale (`float`, *optional*, defaults to 3.0):
                Weight of classifier-free guidance (https://huggingface.co/papers/2207.12598). 1 or less turns it off,
                which halves the work.
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

        Returns:
            [`~pipelines.AudioPipelineOutput`] or `tuple`: `audios` of shape `(batch, num_samples)`, float32 in
            [-1, 1], exactly `round(audio_length_in_s * sampling_rate)` samples (the original returns 32 more, as
            int16 that wraps round at full scale); for `"latent"`, latents of the shape described above.

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

        # 1. Length and inputs
        if audio_length_in_s is None:
            audio_length_in_s = self.config.default_audio_length_in_s
            if isinstance(latents, torch.Tensor) and latents.ndim == 4 and self.vocoder is not None:
                num_frames = latents.shape[2] * self.vae_scale_factor
                audio_length_in_s = num_frames * self.hop_length / self.vocoder.config.sampling_rate
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
        )
        num_samples = round(audio_length_in_s * self.vocoder.config.sampling_rate)
        num_latent_frames = self._num_latent_frames(audio_length_in_s)

        # 2. Call state
        self._guidance_scale = guidance_scale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False
        device = self._execution_device

        # 3. Timesteps, before any model runs since the scheduler has conditions of its own
        timesteps_device = "cpu" if is_torch_xla_available() else device
        if timesteps is not None:
            self.scheduler.set_timesteps(timesteps=timesteps, device=timesteps_device)
        elif sigmas is not None:
            self.scheduler.set_timesteps(sigmas=sigmas, device=timesteps_device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=timesteps_device)
        order = self.scheduler.order
        if timesteps is not None or sigmas is not None:
            num_inference_steps = math.ceil(len(self.scheduler.timesteps) / order)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        if timesteps.max() > self.scheduler.config.num_train_timesteps - 1:
            # for example 1000 steps with "leading" spacing and an offset of 1, where the original fails midway
            raise ValueError(
                f"`num_inference_steps` of {num_inference_steps} makes {type(self.scheduler).__name__} start at "
                f"timestep {float(timesteps.max()):g}, beyond the last one of training, "
                f"{self.scheduler.config.num_train_timesteps - 1}. Use fewer steps."
            )

        # 4. Encode text
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
        num_waveforms = prompt_embeds.shape[0]
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])  # (2 * batch, tokens, hidden)
            attention_mask = torch.cat([negative_attention_mask, attention_mask])  # (2 * batch, tokens)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            # a guidance-distilled UNet reads w - 1 (https://huggingface.co/papers/2310.04378)
            weights = torch.full((num_waveforms,), (guidance_scale - 1) * 1000.0, device=device)
            timestep_cond = get_timestep_embedding(
                weights, self.unet.config.time_cond_proj_dim, downscale_freq_shift=1
            ).to(self.unet.dtype)

        # 5. Latents and step arguments
        latents = self.prepare_latents(num_waveforms, num_latent_frames, device, generator, latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 6. Denoising loop
        num_warmup_steps = len(timesteps) - num_inference_steps * order
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t).to(self.unet.dtype)
                num_rows = latent_model_input.shape[0]
                if min(prompt_embeds.shape[0], attention_mask.shape[0]) < num_rows:
                    raise ValueError(
                        f"`callback_on_step_end` left {prompt_embeds.shape[0]} rows of `prompt_embeds` and "
                        f"{attention_mask.shape[0]} of `attention_mask`, but {num_rows} are needed."
                    )
                # the last rows, since a callback that turns guidance off may leave the negative ones in place
                model_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=prompt_embeds[-num_rows:],
                    encoder_attention_mask=attention_mask[-num_rows:],
                    timestep_cond=timestep_cond,
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    return_dict=False,
                )[0].float()

                if self.do_classifier_free_guidance:
                    model_pred_uncond, model_pred_text = model_pred.chunk(2)
                    model_pred = model_pred_uncond + self.guidance_scale * (model_pred_text - model_pred_uncond)
                    if guidance_rescale > 0:
                        # equations (15) and (16) of https://huggingface.co/papers/2305.08891
                        ratio = model_pred_text.std((1, 2, 3), keepdim=True) / model_pred.std((1, 2, 3), keepdim=True)
                        model_pred = model_pred * (guidance_rescale * ratio + 1 - guidance_rescale)

                latents = self.scheduler.step(model_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
                latents = latents.float()  # some schedulers return float64

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    attention_mask = callback_outputs.pop("attention_mask", attention_mask)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % order == 0):
                    progress_bar.update()
                if is_torch_xla_available():
                    xm.mark_step()

        # 7. Decode
        if output_type == "latent":
            audio = latents
        else:
            mel_spectrogram = self.vae.decode(
                (latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False
            )[0]  # (batch, 1, num_frames, num_mel_bins)
            audio = self.mel_spectrogram_to_waveform(mel_spectrogram)[:, :num_samples]  # (batch, num_samples)
        self.maybe_free_model_hooks()

        peaks = audio.abs().flatten(1).amax(1)  # (batch,), NaN where there is one
        if not torch.isfinite(peaks).all():
            broken = [i for i, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
            raise RuntimeError(
                f"The models produced NaN or infinity in waveform(s) {broken}. float16 overflows in some of them: use "
                "torch.bfloat16 or torch.float32, at least for `text_encoder`, `vae` and `vocoder`."
            )
        if output_type != "latent" and (peaks < 1e-3).any():
            silent = [i for i, peak in enumerate(peaks.tolist()) if peak < 1e-3]
            logger.warning(f"Waveform(s) {silent} are silent: no sample reaches 0.001 (-60 dB).")
        if output_type == "np":
            audio = audio.cpu().numpy()

        if not return_dict:
            return (audio,)
        return AudioPipelineOutput(audios=audio)
