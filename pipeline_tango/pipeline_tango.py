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

"The original" is the code that the released checkpoints were trained with.
"""

import contextlib
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import is_torch_xla_available, logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer

from .attention import BlockedAttnProcessor  # noqa: F401
from .checks import (
    check_callback,
    check_components,
    check_counts,
    check_front_end,
    check_generator,
    check_input_audio,
    check_latents,
    check_moving_prompts,
    check_negative_rows,
    check_no_audio_arguments,
    check_num_clips,
    check_numbers,
    check_options,
    check_placed_audio,
    check_ranges,
    check_rows_of_callback,
    check_schedule,
    check_strength,
    check_student_call,
    check_text_encoder,
    check_timesteps,
    read_clips,
    read_masks,
    read_text,
)
from .deep_cache import find_deep_cache, install_deep_cache, remove_deep_cache
from .input_audio import AudioClips, InputAudio, KnownLatents, place_audio
from .lora import TangoLoraLoaderMixin
from .mel import (  # noqa: F401
    MEL_FFT_LENGTH,
    MEL_HOP_LENGTH,
    MEL_SAMPLING_RATE,
    NUM_MEL_BINS,
    log_mel_spectrogram,
    log_mel_spectrogram_in_chunks,
    match_mel_spectrogram,
)
from .model_files import check_loaded, check_savable, check_weights, find_model
from .positions import with_positions
from .prompts import TextTrack, describe_loss
from .schedule import SCHEDULERS, Schedule, can_keep_num_steps, check_not_in_use, in_use  # noqa: F401
from .seams import composite, split_band, used_samples  # noqa: F401
from .single_file import single_file
from .student import (
    STUDENT_KEY,
    call_defaults,
    check_guidance_input,
    check_student,
    describe_misuse,
    student_adapters,
    student_scheduler,
    timesteps_of_call,
)
from .torch_settings import in_own_torch_settings, own_torch_settings
from .windows import WindowPlan, blend_windows, window_weights, windows_over


if is_torch_xla_available():
    import torch_xla.core.xla_model as xm


logger = logging.get_logger(__name__)


class StepCallback(NamedTuple):
    """A `callback_on_step_end`, which may be `None`, and the names of the tensors that it gets."""

    function: Callable | None
    tensor_inputs: list[str]

    def __call__(self, pipe, i, t, latents, text):
        """Replace the tensors of `text`, a [`TextTrack`], and return latents, as the function says."""
        if self.function is None:
            return latents
        tensors = {"latents": latents, "prompt_embeds": text.prompt_embeds, "attention_mask": text.attention_mask}
        callback_kwargs = {name: tensors[name] for name in self.tensor_inputs}
        outputs = self.function(pipe, i, t, callback_kwargs) or {}
        if not {"prompt_embeds", "attention_mask"}.isdisjoint({*callback_kwargs, *outputs}):
            text.selected.clear()  # they may have been changed in place
        text.prompt_embeds = outputs.pop("prompt_embeds", text.prompt_embeds)
        text.attention_mask = outputs.pop("attention_mask", text.attention_mask)
        return outputs.pop("latents", latents)


def load_without_converter(source, attempt):
    """What `attempt` loads from `source`, or an error that says what checkpoints in the original's layout need."""
    folder = str(source)
    has_index = os.path.isfile(os.path.join(folder, "model_index.json"))
    is_original = not has_index and os.path.isfile(os.path.join(folder, "main_config.json"))
    try:
        return attempt(source)
    except (OSError, ValueError) as error:
        if is_original or isinstance(error, RemoteEntryNotFoundError):
            raise OSError(
                f"{source} has no model_index.json. To load a checkpoint in the original's layout, either install the "
                "package pipeline-tango, or convert it by tango-convert where that is installed and load the result."
            ) from error
        raise


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
            `audio_length_in_s` is not given; the length that the checkpoint was trained on.
        default_num_inference_steps (`int`, *optional*, defaults to 100): the same for `num_inference_steps`.
        default_guidance_scale (`float`, *optional*, defaults to 3.0): the same for `guidance_scale`.
        default_guidance_interval (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`): the same for
            `guidance_interval`.
        num_noise_channels (`int`, *optional*, defaults to 0): how many input channels of the vocoder, the last ones,
            are white noise (`training.train_vocoder`). The others are mel bins.
        num_position_channels (`int`, *optional*, defaults to 0): how many input channels of the UNet, the last ones,
            tell where in the clip a frame is ([`with_positions`]). The others are latents.
        num_mel_corrections (`int`, *optional*, defaults to 0): iterations of [`match_mel_spectrogram`] on the output
            of the vocoder. Small vocoders need them.
        student (`dict`, *optional*): what [`check_student`] describes, if the UNet is a student, distilled to a few
            steps. `register_student` sets it.
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
        num_position_channels: int = 0,
        num_mel_corrections: int = 0,
        student: dict | None = None,
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
            num_position_channels=num_position_channels,
            num_mel_corrections=num_mel_corrections,
        )
        if student is not None:  # so that others are saved without the entry, as they were before there were students
            self.register_to_config(**{STUDENT_KEY: check_student(student)})
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if vae is not None else 4
        self.unet_scale_factor = 2 ** (len(self.unet.config.block_out_channels) - 1) if unet is not None else 8
        self.hop_length = math.prod(self.vocoder.config.upsample_rates) if vocoder is not None else MEL_HOP_LENGTH

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, remove_originals=False, **kwargs):
        """Load as [`DiffusionPipeline.from_pretrained`] does, but never with something missing, and checkpoints in the
        original's layout too.

        A checkpoint in the original's layout, such as "declare-lab/tango2" or a folder of its training, is downloaded
        and converted once, one component at a time. The result is kept in the Hub's cache for each commit and `dtype`,
        and is what later calls load, offline too. `tango-cache` lists and removes what is kept.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Hub id or folder, of either layout.
            remove_originals (`bool`, *optional*, defaults to `False`): delete the weights in the original's layout
                from the Hub's cache once they are converted. Folders outside of it are never changed.
            kwargs: as in diffusers. `dtype` is also what is converted to, float32 if not given.

        Raises:
            OSError: there is no such repo or folder, the Hub cannot be reached, or the disk is full.
            ValueError: naming the component and the file or tensors that are missing, unexpected or damaged; or
                `variant` is given for a checkpoint in the original's layout.
        """

        def attempt(source, **more):
            options, folder = {**kwargs, **more}, source
            if not os.path.isdir(folder) and str(folder).count("/") < 2:
                folder = cls.download(folder, **options)
            if not os.path.isdir(folder):
                return super(TangoPipeline, cls).from_pretrained(folder, **options)  # says what is wrong with the name
            return cls._from_folder(folder, pretrained_model_name_or_path, **options)

        try:  # by its name, since the code file of a Hub repo has nothing beside it and may do without the package
            converted = import_module("pipeline_tango.converted")
        except ImportError:
            return load_without_converter(pretrained_model_name_or_path, attempt)
        names = ("variant", "revision", "token", "cache_dir", "local_files_only", "force_download")
        return converted.with_conversion(
            pretrained_model_name_or_path,
            attempt,
            cls,
            dtype=kwargs.get("dtype", kwargs.get("torch_dtype")),
            remove_originals=remove_originals,
            **{name: kwargs[name] for name in names if name in kwargs},
        )

    @classmethod
    def _from_folder(cls, folder, name_or_path, **kwargs):
        """The pipeline in a diffusers folder, which a repo or folder called `name_or_path` was found to be."""
        files = find_model(
            folder,
            class_names=[each.__name__ for each in cls.__mro__ if issubclass(each, TangoPipeline)],
            variant=kwargs.get("variant"),
            passed=kwargs,
            use_safetensors=kwargs.get("use_safetensors"),
        )
        try:
            pipe = super().from_pretrained(folder, **kwargs)
        except Exception:
            check_weights(*files)  # which names the tensors, where they were the reason
            raise
        check_weights(*files, models=pipe.components)
        pipe.register_to_config(_name_or_path=name_or_path)
        return pipe

    def register_to_config(self, **kwargs):
        """As [`ConfigMixin`]'s. [`DiffusionPipeline.from_pretrained`], which loads this file as a `custom_pipeline`,
        ends with it: what it has loaded is checked here as `from_pretrained` above checks it."""
        super().register_to_config(**kwargs)
        if "_name_or_path" in kwargs and type(self).__module__.startswith("diffusers_modules."):
            check_loaded(kwargs["_name_or_path"], self.components, [type(self).__name__])

    def register_student(self, student):
        """Say in the config, which `save_pretrained` saves, that the UNet is a student, and take the scheduler that
        the student was distilled for, with the betas and the prediction type of the one before.

        Args:
            student (`dict`): see [`check_student`].

        Raises:
            ValueError: if `student` is none, or not one for the UNet, or a LoRA makes one of the UNet already.
        """
        student = check_student(student)
        if student_adapters(self.unet):
            raise ValueError(
                "A LoRA makes the UNet a student already: to keep it, call `fuse_lora()`, `unload_lora_weights()`."
            )
        check_guidance_input(student, self.unet, self.config.default_guidance_scale)
        self.register_to_config(**{STUDENT_KEY: student})
        self.scheduler = student_scheduler(student, self.scheduler)

    @property
    def student(self):
        """What the checkpoint of a student says of it, a `dict` as [`check_student`] describes, where the UNet is one:
        by a LoRA that is active or fused, or by the pipeline's config. Else `None`."""
        return next(iter(student_adapters(self.unet).values()), self.config.get(STUDENT_KEY))

    @property
    def num_mel_bins(self):
        return self.vocoder.config.model_in_dim - self.config.num_noise_channels

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        """Whether the UNet gets unconditional rows. The weight is that of equation (2) of Imagen, where 1 means no
        guidance. UNets that were distilled with it as an input (`time_cond_proj_dim`) need no such rows."""
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

    @own_torch_settings()
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
        """Encode prompts and negative prompts into embeddings and attention masks.

        Prompt and negative prompt are padded to the length of the longer one, so that they can share a batch. The
        attention masks say which tokens are not padding; without them the UNet reads padding as text. Without a
        negative prompt the unconditional text is the encoded "", of which only the end token is unmasked, as the
        released checkpoints were guided (the original has an option to train with zeroed states instead, which they
        were trained without).

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
                distinct = list(dict.fromkeys(text))  # each is encoded once, as the one negative prompt of a batch
                for sentence in (sentence for each in distinct for sentence in describe_loss(each, self.tokenizer)):
                    logger.warning(sentence)
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
        """Compute the whole UNet only in one of `interval` evaluations, and its shallowest branch in the others, which
        takes 1/13 of the operations in Tango's UNet.

        Evaluations are counted, of which second-order schedulers take two for a step. Each window has features of its
        own until the call ends, 5 MB a row at full size in float32. The first guided evaluation computes the whole
        UNet, since the features have no unconditional rows before. Works with LoRA, offloading and `torch.compile`,
        but not with group offloading by streams, which needs modules to run in one order.

        The cache is part of the UNet, so all pipelines that share the UNet have it, and it is not saved.

        Args:
            interval (`int`, *optional*, defaults to 3): 1 computes the whole UNet in each evaluation.

        Raises:
            ValueError: if `interval` is not a positive integer, or if the UNet has other kinds of blocks.

        Source: DeepCache (Ma et al. 2023, arXiv 2312.00858).
        """
        install_deep_cache(self.unet, interval)

    def disable_deep_cache(self):
        """Undo `enable_deep_cache`. Does nothing if there is no deep cache."""
        remove_deep_cache(self.unet)

    @property
    def deep_cache(self):
        """The UNet's [`DeepCache`], `None` if it has none."""
        return find_deep_cache(self.unet)

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
        `pipeline.py`, so that `custom_pipeline` loads the folder or repo where this package is not installed.

        Raises:
            ValueError: before anything is written, if a model has adapters or offloaded weights, or could not be
                loaded again for another reason.
        """
        check_savable(self.components)
        os.makedirs(save_directory, exist_ok=True)
        with open(os.path.join(save_directory, "pipeline.py"), "wb") as file:
            file.write(single_file(__file__).encode())
        super().save_pretrained(
            save_directory, safe_serialization, variant, max_shard_size, push_to_hub, **push_to_hub_kwargs
        )

    def push_to_hub(self, *args, **kwargs):
        """Upload what `save_pretrained` saves, as [`DiffusionPipeline.push_to_hub`] does."""
        check_savable(self.components)  # before a repo is created
        return super().push_to_hub(*args, **kwargs)

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
        """Initial noise, with the standard deviation that the scheduler starts from.

        Always float32, whatever the dtype of the UNet: the arithmetic of schedulers is not exact enough in half
        precision, and the same seed gives the same noise in every precision.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, num_latent_frames, latent mel bins)`.
        """
        if latents is None:
            shape = (batch_size, *self._latent_shape(num_latent_frames))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def _latent_shape(self, num_latent_frames):
        return self.vae.config.latent_channels, num_latent_frames, self.num_mel_bins // self.vae_scale_factor

    def _encode_audio(self, placed, windows, num_copies, device, generator, decoded):
        """Scaled latents of a [`PlacedAudio`], sampled from the VAE's posterior: `(batch * num_copies, channels,
        num_latent_frames, latent mel bins)`, the copies of a clip next to each other. Only those that windows which
        are denoised or `decoded`, a set of first frames, have are encoded; all if that is `None`."""
        num_samples = windows.num_latent_frames * self.vae_scale_factor * self.hop_length
        mels = [log_mel_spectrogram_in_chunks(each, device) for each in placed.encoder_inputs(num_samples)]
        mel_spectrogram = torch.stack(mels)[:, None].repeat_interleave(num_copies, dim=0)  # (batch, 1, frames, bins)

        def encode(mel_windows, starts):
            return self.vae.encode(mel_windows.to(self.vae.dtype)).latent_dist.parameters.float()

        length, needed = windows.num_frames_in_window, windows.starts
        if decoded is not None:
            read = {start for start in windows.starts if windows.is_denoised(start)} | decoded
            needed = windows_over([(start, start + length) for start in read], windows.starts, length)
        parameters = blend_windows(
            encode, mel_spectrogram, length, factor_in=self.vae_scale_factor, is_needed=set(needed).__contains__
        )
        return DiagonalGaussianDistribution(parameters).sample(generator) * self.vae.config.scaling_factor

    def mel_spectrogram_to_waveform(self, mel_spectrogram, noise=None):
        """Vocode a log-mel spectrogram.

        Args:
            mel_spectrogram (`torch.Tensor` of shape `(batch, 1, num_frames, num_mel_bins)`).
            noise (`torch.Tensor` of shape `(batch, 1, num_frames, num_noise_channels)`, *optional*): input of a
                vocoder with noise channels, random by default.

        Returns:
            `torch.Tensor` of shape `(batch, num_samples)`: float32 in [-1, 1]. The released vocoder generates 32
            samples more than `num_frames * hop_length`.
        """
        if noise is None:
            shape = (*mel_spectrogram.shape[:3], self.config.num_noise_channels)
            noise = randn_tensor(shape, device=mel_spectrogram.device, dtype=torch.float32)
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
        """Raise a `ValueError` that names the argument for everything that is known to be wrong before a model runs.
        Arguments as in `__call__`, `audio` also as [`AudioClips`], which are not checked again.

        Returns:
            What `__call__` needs next: the [`WindowPlan`], for each sound its texts over time as lists of `(seconds,
            text)`, and the [`InputAudio`], `None` without `audio`.
        """
        check_components(self)
        sampling_rate = self.vocoder.config.sampling_rate
        check_counts(
            num_inference_steps=num_inference_steps,
            num_waveforms_per_prompt=num_waveforms_per_prompt,
            window_batch_size=window_batch_size,
        )
        check_numbers(
            audio_length_in_s=audio_length_in_s,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
            strength=strength,
            audio_start_in_s=audio_start_in_s,
            window_length_in_s=window_length_in_s,
        )
        check_ranges(sampling_rate, audio_length_in_s, guidance_rescale, guidance_interval, eta, window_length_in_s)
        check_timesteps(self.scheduler, num_inference_steps, timesteps, sigmas)
        windows = self._plan_windows(audio_length_in_s, window_length_in_s, window_batch_size, window_order)

        keyframes = read_text(
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            attention_mask,
            negative_attention_mask,
            self.unet.config.cross_attention_dim,
        )
        check_moving_prompts(keyframes, audio_length_in_s, windows)
        check_negative_rows(negative_prompt, negative_prompt_embeds, len(keyframes))
        check_text_encoder(self, prompt_embeds, negative_prompt_embeds, guidance_scale)
        num_waveforms = len(keyframes) * num_waveforms_per_prompt
        check_latents(latents, (num_waveforms, *self._latent_shape(windows.num_latent_frames)), audio_length_in_s)
        check_generator(generator, num_waveforms)
        check_options(cross_attention_kwargs, window_order, stream, output_type)
        check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)

        if audio is None:
            check_no_audio_arguments(
                audio_sampling_rate=audio_sampling_rate,
                strength=strength,
                mask=mask,
                frequency_mask_in_hz=frequency_mask_in_hz,
                audio_start_in_s=audio_start_in_s or None,
            )
            return windows, keyframes, None
        clips = audio if isinstance(audio, AudioClips) else read_clips(audio, audio_sampling_rate)
        check_num_clips(clips, len(keyframes))
        masks = None if mask is None else read_masks(mask, clips)
        check_front_end(sampling_rate, self.hop_length, self.num_mel_bins)
        input_audio = InputAudio(clips, masks, audio_start_in_s, audio_length_in_s, frequency_mask_in_hz, strength)
        check_input_audio(input_audio, stream)
        has_own_steps = timesteps is not None or sigmas is not None
        may_keep_steps = self.student is not None and can_keep_num_steps(self.scheduler)
        check_strength(input_audio, None if has_own_steps or may_keep_steps else num_inference_steps, self.scheduler)
        return windows, keyframes, input_audio

    def _plan_windows(self, audio_length_in_s, window_length_in_s, window_batch_size, window_order):
        sampling_rate = self.vocoder.config.sampling_rate
        return WindowPlan(
            num_samples=round(audio_length_in_s * sampling_rate),
            num_latent_frames=self._num_latent_frames(audio_length_in_s),
            num_frames_in_window=self._num_latent_frames(window_length_in_s or self.config.default_audio_length_in_s),
            num_windows_at_once=window_batch_size,
            order=window_order,
            frames_per_s=sampling_rate / (self.hop_length * self.vae_scale_factor),
        )

    def _num_latent_frames(self, audio_length_in_s):
        """Latent frames that hold `audio_length_in_s`, rounded up to a multiple of the UNet's scale factor."""
        num_samples = round(audio_length_in_s * self.vocoder.config.sampling_rate)
        num_blocks = math.ceil(num_samples / (self.hop_length * self.vae_scale_factor * self.unet_scale_factor))
        return num_blocks * self.unet_scale_factor

    @own_torch_settings()
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

        With `audio` alone the result is a variation of it, as in image-to-image. With a `mask`, or with
        `audio_length_in_s` beyond the end of the audio, only that part is generated; the rest is the audio, sample for
        sample. With `frequency_mask_in_hz` only that band is generated.

        Sound longer than a window, the length that the checkpoint was trained on, is generated in overlapping windows.

        Args:
            prompt (`str`, `list[str]`, `list[tuple[float, str]]` or a list of such lists, *optional*):
                Description of the sound. Either this or `prompt_embeds` has to be given. `[(0, "rain"), (60,
                "thunder")]` is a prompt that moves: the predictions for the texts before and after the middle of a
                window are interpolated.
            audio_length_in_s (`float`, *optional*):
                Length of the sound in seconds, any positive number. Defaults to the length of `latents` or to the end
                of the longest `audio` if those are given, else to the checkpoint's own
                (`pipe.config.default_audio_length_in_s`).
            num_inference_steps (`int`, *optional*):
                Number of denoising steps. More are slower and usually better. Defaults to the checkpoint's own
                (`pipe.config.default_num_inference_steps`), 100 for Tango, or to the student's.
            guidance_scale (`float`, *optional*):
                Weight of classifier-free guidance (https://huggingface.co/papers/2207.12598). 1 or less turns it off,
                which halves the work. Defaults to the checkpoint's own (`pipe.config.default_guidance_scale`), 3 for
                Tango, or to 1 for a student that has guidance of one scale inside.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                From 0 to 1: how far to rescale the guided prediction to the standard deviation of the conditional one
                (equation 16 of https://huggingface.co/papers/2305.08891), against over-exposure at high guidance.
            negative_prompt (`str` or `list[str]`, *optional*):
                Description of what the sound is guided away from. One string serves all prompts. Has no effect without
                guidance.
            num_waveforms_per_prompt (`int`, *optional*, defaults to 1):
                Number of waveforms for each prompt; those of a prompt are next to each other in the output.
            eta (`float`, *optional*):
                The eta of DDIM (https://huggingface.co/papers/2010.02502), and the gamma of TCD. Defaults to the
                scheduler's own, or the student's; other schedulers ignore it.
            timesteps (`list[int]`, *optional*):
                Timesteps to use, descending, instead of `num_inference_steps` evenly spaced ones, with schedulers that
                support it.
            sigmas (`list[float]`, *optional*):
                Noise levels to use instead, descending, with schedulers that support it.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the result reproducible. With a list, one for each waveform, a waveform does not depend on the
                batch that it is generated in.
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
                prompts or one for each. Channels are averaged, and the sound is resampled to the rate of the pipeline.
                The result has the level of the audio.
            audio_sampling_rate (`int`, *optional*):
                Sampling rate of `audio`, to be given with it.
            strength (`float`, *optional*):
                Fraction of the schedule that is run from the noised audio, above 0 and up to 1, as in image-to-image.
                At 1 the audio has no influence where it is regenerated. Defaults to 1 for inpainting, else to 0.5. It
                takes that fraction of the steps; a student, with LCM or TCD, takes all its steps in that fraction.
            mask (`list`, `np.ndarray` or `torch.Tensor`, *optional*):
                Inpainting mask, the part of `audio` to regenerate: regions `[(start, end), ...]` in seconds of the
                audio, for all clips; a list of such lists, one for each clip; or an array, of 1 where to regenerate
                and 0 where to keep, for each sample of `audio`. The rest of the audio is kept sample for sample,
                except for a crossfade of 20 ms beside each region; if it goes beyond [-1, 1] there, the whole result
                is turned down by one factor, with a warning. Only windows with something to regenerate are computed.
            frequency_mask_in_hz (`tuple[float, float]`, *optional*):
                Band of `audio` to regenerate, such as `(4000, 8000)` for a sound that has nothing above 4 kHz.
            audio_start_in_s (`float`, *optional*, defaults to 0.0):
                Where in the result `audio` begins. What comes before is generated.
            window_length_in_s (`float`, *optional*):
                Longest sound that is denoised and decoded in one piece. Defaults to the length that the checkpoint was
                trained on. Memory grows with this, hardly with the length of the sound.
            window_batch_size (`int`, *optional*, defaults to 1):
                Number of windows that the UNet gets in one batch. More are faster on a GPU and take more memory.
            window_order (`str`, *optional*, defaults to `"joint"`):
                `"joint"` takes each step in all windows, averaged where they overlap; `"sequential"` denoises one
                window after the other, each continuing the last quarter or more of the one before.
            stream (`bool`, *optional*, defaults to `False`):
                Whether to return an iterator of chunks of sound, `(batch, some samples)` each, whose concatenation is
                the whole. With `window_order="sequential"` each comes as soon as its window is denoised. An iterator
                has to be exhausted before the next call.
            guidance_interval (`tuple[float, float]`, *optional*):
                Part of the steps that is guided (https://huggingface.co/papers/2404.07724): of n steps that are taken,
                step k, counted from 0, if `start <= k / n < stop`. The others cost half. Has no effect without
                guidance, nor on UNets that were distilled with it. Defaults to the checkpoint's own
                (`pipe.config.default_guidance_interval`), all steps for Tango.

        Returns:
            [`~pipelines.AudioPipelineOutput`] or `tuple`: `audios` of shape `(batch, num_samples)`, float32 in
            [-1, 1], exactly `round(audio_length_in_s * sampling_rate)` samples (the original returns 32 more, as
            int16 that overflows at full scale); for `"latent"`, latents of the shape described above. With `stream`
            an iterator of such arrays or tensors.

        Raises:
            ValueError: for a wrong argument, before any model runs.
            RuntimeError: if the models produce NaN or infinity, or if another call with this pipeline or its scheduler
                is not over.

        Examples:
            >>> from pipeline_tango import TangoPipeline
            >>> from scipy.io import wavfile

            >>> pipe = TangoPipeline.from_pretrained("path/to/converted/tango")
            >>> audio = pipe("rain and thunder", generator=torch.Generator().manual_seed(0)).audios[0]
            >>> wavfile.write("rain.wav", pipe.vocoder.config.sampling_rate, audio)
        """
        # 1. Defaults and inputs
        check_not_in_use(self, self.scheduler)
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if callback_on_step_end_tensor_inputs is None:
            callback_on_step_end_tensor_inputs = ["latents"]
        student = self.student
        own_num_steps, own_guidance_scale = call_defaults(self.config, student)
        if num_inference_steps is None:
            num_inference_steps = own_num_steps
        if guidance_scale is None:
            guidance_scale = own_guidance_scale
        if student is not None:
            eta = student.get("eta") if eta is None else eta
            if timesteps is None and sigmas is None:
                timesteps = timesteps_of_call(student, self.scheduler, num_inference_steps)
        given_guidance_interval = guidance_interval
        if guidance_interval is None:
            guidance_interval = self.config.default_guidance_interval
        if audio is not None:
            audio = read_clips(audio, audio_sampling_rate)
        if audio_length_in_s is None:
            audio_length_in_s = self._default_length_in_s(latents, audio, audio_start_in_s)
        windows, keyframes, input_audio = self.check_inputs(
            prompt, audio_length_in_s, num_inference_steps, guidance_scale, guidance_rescale, negative_prompt,
            num_waveforms_per_prompt, eta, timesteps, sigmas, generator, latents, prompt_embeds,
            negative_prompt_embeds, attention_mask, negative_attention_mask, cross_attention_kwargs, output_type,
            callback_on_step_end, callback_on_step_end_tensor_inputs, audio, audio_sampling_rate, strength, mask,
            frequency_mask_in_hz, audio_start_in_s, window_length_in_s, window_batch_size, window_order, stream,
            guidance_interval,
        )  # fmt: skip
        if student is not None:
            given = guidance_scale, guidance_rescale, given_guidance_interval, negative_prompt, negative_prompt_embeds
            check_student_call(self, *given)
            for sentence in describe_misuse(student, self.scheduler, guidance_scale):
                logger.warning(sentence)
        num_waveforms = len(keyframes) * num_waveforms_per_prompt

        # 2. Call state, which callbacks may change
        call_state = {
            "_guidance_scale": guidance_scale,
            "_guidance_rescale": guidance_rescale,
            "_guidance_interval": guidance_interval,
            "_cross_attention_kwargs": cross_attention_kwargs,
            "_interrupt": False,
        }
        vars(self).update(call_state)
        device = self._execution_device

        # 3. Audio on the time line of the result
        placed = None
        if input_audio is not None and input_audio.is_used:
            placed = place_audio(input_audio, windows.num_samples)
            check_placed_audio(placed, input_audio.strength)
            if placed.mask is not None:
                num_frames, num_bins = self._latent_shape(windows.num_latent_frames)[1:]
                mask = placed.latent_mask(num_frames, num_bins, self.vae_scale_factor, "cpu")
                windows = replace(
                    windows,
                    regenerated_frames=mask.amax((0, 1, 3)).numpy() > 0,  # (num_latent_frames,)
                    used_samples=used_samples(placed),
                )

        # 4. Schedule, before any model runs since the scheduler has conditions of its own
        schedule = Schedule(
            self.scheduler,
            num_inference_steps,
            timesteps,
            sigmas,
            strength=1.0 if input_audio is None else input_audio.strength,
            step_kwargs=self.prepare_extra_step_kwargs(generator, eta),
            keeps_num_steps=student is not None,
        )
        check_schedule(schedule, self.vae.config.latent_channels)
        call_state["_num_timesteps"] = self._num_timesteps = len(schedule.timesteps)

        # 5. Text
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
        text = TextTrack(prompt_embeds, attention_mask, keyframes, num_waveforms_per_prompt)

        # 6. Latents, and those that are known
        latents = self.prepare_latents(num_waveforms, windows.num_latent_frames, device, generator, latents)
        decoded = None if output_type == "latent" else self._decoded_windows(windows)
        known = self._prepare_known_latents(latents, placed, windows, generator, decoded)

        # 7. Denoise and decode: iterators, which run when the result is asked for
        callback = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        denoised = self._denoise(latents, known, text, windows, schedule, callback, call_state)
        if output_type == "latent":
            for result, _ in in_use(denoised, self, self.scheduler):
                pass
        else:
            chunks = in_use(self._decode(denoised, windows, generator), self, self.scheduler)
            if stream:
                return in_own_torch_settings(self._stream(chunks, output_type))
            num_done = 0
            result = torch.empty(num_waveforms, windows.num_samples, dtype=torch.float32, device=latents.device)
            for chunk in chunks:
                result[:, num_done : num_done + chunk.shape[1]] = chunk
                num_done += chunk.shape[1]
            if placed is not None:
                num_copies = num_waveforms // len(placed.waveform)
                result, factors = composite(result, placed, num_copies, windows.used_samples)
                if min(factors) < 1:
                    loud = {i: round(factor, 3) for i, factor in enumerate(factors) if factor < 1}
                    logger.warning(
                        f"`audio` reaches beyond [-1, 1] where it is kept. To clip nothing, waveforms were multiplied "
                        f"by {loud}."
                    )
        self.maybe_free_model_hooks()

        # 8. Result
        peaks = self._finite_peaks(result)
        if output_type != "latent" and (peaks < 1e-3).any():
            silent = [i for i, peak in enumerate(peaks.tolist()) if peak < 1e-3]
            logger.warning(f"Waveform(s) {silent} are silent: no sample reaches 0.001 (-60 dB).")
        if output_type == "np":
            result = result.cpu().numpy()

        if not return_dict:
            return (result,)
        return AudioPipelineOutput(audios=result)

    def _default_length_in_s(self, latents, clips, audio_start_in_s):
        """The length of given latents, or the end of the longest clip, or the checkpoint's own."""
        if isinstance(latents, torch.Tensor) and latents.ndim == 4 and self.vocoder is not None:
            num_frames = latents.shape[2] * self.vae_scale_factor
            return num_frames * self.hop_length / self.vocoder.config.sampling_rate
        if clips is not None and isinstance(audio_start_in_s, Real):
            return audio_start_in_s + max(clips.lengths_in_s)
        return self.config.default_audio_length_in_s

    def _prepare_known_latents(self, latents, placed, windows, generator, decoded):
        """[`KnownLatents`] of a [`PlacedAudio`], or of windows that go on from the one before. `None` for neither."""
        is_sequential = len(windows.spans) > 1
        if placed is not None:
            num_copies = len(latents) // len(placed.waveform)
            known_latents = self._encode_audio(placed, windows, num_copies, latents.device, generator, decoded)
        elif is_sequential:
            known_latents = torch.zeros_like(latents)
        else:
            return None
        mask = None
        if placed is not None and (placed.mask is not None or placed.frequency_mask_in_hz is not None):
            mask = placed.latent_mask(*latents.shape[2:], self.vae_scale_factor, latents.device)
            mask = mask.repeat_interleave(len(latents) // len(mask), dim=0)
        elif is_sequential:
            mask = torch.ones_like(latents[:, :1])
        return KnownLatents(self.scheduler, known_latents, latents / self.scheduler.init_noise_sigma, mask)

    @torch.no_grad()
    def _denoise(self, latents, known, text, windows, schedule, callback, call_state):
        """The denoising loop, once for each span of a [`WindowPlan`].

        Args:
            latents (`torch.Tensor`): noise. Several spans are denoised in place.
            known ([`KnownLatents`] or `None`): what a schedule that `strength` shortens starts from. The end of a
                span, with which the next one begins, becomes known.
            text ([`TextTrack`])
            windows ([`WindowPlan`])
            schedule ([`Schedule`])
            callback ([`StepCallback`])
            call_state (`dict`): attributes of the pipeline. A stream may begin after other calls, which change them.

        Yields:
            All latents, and how many frames of them are finished.
        """
        vars(self).update(call_state)
        all_latents, spans = latents, windows.spans
        for begin, end in spans:
            if len(spans) > 1 and not windows.is_denoised(begin):
                all_latents[:, :, begin:end] = known.latents[:, :, begin:end]
                yield all_latents, end
                continue
            schedule.restart()
            timesteps = schedule.timesteps
            unet_timesteps = timesteps.float().to(latents.device)  # exact, and some devices have no float64
            frames = slice(begin, end)
            latents = all_latents[:, :, frames]
            if schedule.strength < 1:
                latents = known.noised(frames, timesteps[:1])
            if known is not None:
                latents = known.restore(latents, frames, timesteps[:1])

            text.selected.clear()
            deep_cache = None if self.deep_cache is None else self.deep_cache.for_a_call()
            with self.progress_bar(total=schedule.num_steps) as progress_bar:
                for i, t in enumerate(timesteps):
                    if self.interrupt:
                        continue

                    start, stop = self._guidance_interval
                    is_guided = self.do_classifier_free_guidance and start <= schedule.progress(i) < stop
                    check_rows_of_callback(text, is_guided)
                    if deep_cache is not None:
                        deep_cache.advance(is_guided)

                    def predict(inputs, starts):
                        middles_in_s = [(begin + s + inputs.shape[2] / 2) / windows.frames_per_s for s in starts]
                        selected = text.select(middles_in_s, is_guided)
                        context = contextlib.nullcontext()
                        if deep_cache is not None:
                            context = deep_cache.window(starts[0], len(selected[0]))
                        with context:
                            return self._guided_prediction(inputs, unet_timesteps[i], *selected, is_guided)

                    latent_model_input = self.scheduler.scale_model_input(latents, t).to(self.unet.dtype)
                    model_pred = blend_windows(
                        predict,
                        latent_model_input,
                        windows.num_frames_in_window,
                        windows.num_windows_at_once,
                        is_needed=windows.is_denoised,
                    )
                    latents = schedule.step(model_pred, t, latents)
                    if known is not None:
                        latents = known.restore(latents, frames, timesteps[i + 1 : i + 2])
                    latents = callback(self, i, t, latents, text)

                    if schedule.ends_step(i):
                        progress_bar.update()
                    if is_torch_xla_available():
                        xm.mark_step()

            if len(spans) == 1:
                all_latents = latents
            else:
                all_latents[:, :, frames] = latents
                known.keep(latents, frames)
            yield all_latents, end

    def _guided_prediction(
        self,
        latent_model_input,
        t,
        encoder_hidden_states,
        encoder_attention_mask,
        text_weights,
        is_guided,
    ):
        """The UNet's prediction, under classifier-free guidance if `is_guided`, in one batch. The text is that of
        [`TextTrack.select`]."""
        num_parts = len(encoder_hidden_states) // len(latent_model_input)
        latent_model_input = torch.cat([latent_model_input] * num_parts)
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            # a guidance-distilled UNet reads w - 1 (https://huggingface.co/papers/2310.04378)
            weights = torch.full(
                (len(latent_model_input),),
                (self.guidance_scale - 1) * 1000.0,
                dtype=torch.float32,
                device=latent_model_input.device,
            )
            timestep_cond = get_timestep_embedding(
                weights, self.unet.config.time_cond_proj_dim, downscale_freq_shift=1
            ).to(self.unet.dtype)
        model_preds = self.unet(
            with_positions(latent_model_input, self.unet),
            t,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep_cond=timestep_cond,
            cross_attention_kwargs=self.cross_attention_kwargs,
            return_dict=False,
        )[0].float()

        *model_preds, model_pred = model_preds.chunk(num_parts)
        if text_weights is not None:
            model_pred = torch.lerp(model_preds.pop(), model_pred, text_weights)
        if is_guided:
            model_pred_uncond, model_pred_text = model_preds[0], model_pred
            model_pred = model_pred_uncond + self.guidance_scale * (model_pred_text - model_pred_uncond)
            if self._guidance_rescale > 0:
                # equations (15) and (16) of https://huggingface.co/papers/2305.08891
                ratio = model_pred_text.std((1, 2, 3), keepdim=True) / model_pred.std((1, 2, 3), keepdim=True)
                model_pred = model_pred * (self._guidance_rescale * ratio + 1 - self._guidance_rescale)
        return model_pred

    @torch.no_grad()
    def _decode(self, denoised, windows, generator=None):
        """Waveform of the latents that `denoised` yields, in chunks, each as soon as all windows that overlap it are
        finished. Mel spectrograms of overlapping windows are blended. The vocoder, which is a convolution, gets its
        receptive field on both sides of a chunk, so that chunks are the same as parts of the whole.

        Yields:
            `torch.Tensor` of shape `(batch, some samples)`, `windows.num_samples` in all.
        """
        starts, num_samples, factor = windows.starts, windows.num_samples, self.vae_scale_factor
        chunks, decoded, num_windows_done = self._chunks(windows), self._decoded_windows(windows), 0
        for latents, num_finished in denoised:
            if num_windows_done == 0:
                shape = (latents.shape[0], 1, latents.shape[2] * factor, self.num_mel_bins)
                total, total_weights = latents.new_zeros(shape), latents.new_zeros(shape[2], 1)
                shape = (*shape[:3], self.config.num_noise_channels)
                noise = randn_tensor(shape, generator=generator, device=latents.device, dtype=torch.float32)
            for start, (first, chunk_start, chunk_end, ready) in zip(
                starts[num_windows_done:], chunks[num_windows_done:]
            ):
                window = latents[:, :, start : start + windows.num_frames_in_window]
                if start + window.shape[2] > num_finished:
                    break
                if start in decoded:
                    mel_spectrogram = self.vae.decode(
                        (window / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False
                    )[0].float()  # (batch, 1, num_frames, num_mel_bins)
                    num_frames = mel_spectrogram.shape[2]
                    weights = window_weights(num_frames, latents.device) if len(starts) > 1 else 1.0
                    frames = slice(start * factor, start * factor + num_frames)
                    total[:, :, frames] += mel_spectrogram * weights
                    total_weights[frames] += weights
                num_windows_done += 1

                first_sample, start_sample, end_sample = (
                    min(each * self.hop_length, num_samples) for each in (first, chunk_start, chunk_end)
                )
                if start_sample == end_sample:
                    continue
                if not windows.is_used(start_sample, end_sample):
                    yield total.new_zeros(total.shape[0], end_sample - start_sample)
                    continue
                waveform = self.mel_spectrogram_to_waveform(
                    total[:, :, first:ready] / total_weights[first:ready], noise[:, :, first:ready]
                )  # (batch, at least num_frames * hop)
                yield waveform[:, start_sample - first_sample : end_sample - first_sample]

    def _chunks(self, windows):
        return windows.chunks(self.vae_scale_factor, self._vocoder_context())

    def _decoded_windows(self, windows):
        """First frames of the windows that are decoded, a set: those of chunks that the result depends on."""
        ranges = [
            (first / self.vae_scale_factor, ready / self.vae_scale_factor)
            for first, start, end, ready in self._chunks(windows)
            if start < end and windows.is_used(start * self.hop_length, end * self.hop_length)
        ]
        return set(windows_over(ranges, windows.starts, windows.num_frames_in_window))

    def _vocoder_context(self):
        """Half the receptive field in mel frames: half of each kernel, at the rate of its layer."""
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
        # a correction changes frames that are half a window away, measured from samples half a window further
        context += self.config.num_mel_corrections * MEL_FFT_LENGTH / MEL_HOP_LENGTH
        return math.ceil(context + 3 / rate) + 1  # the last convolution has a kernel of 7

    def _stream(self, chunks, output_type):
        try:
            for chunk in chunks:
                self._finite_peaks(chunk)
                yield chunk.cpu().numpy() if output_type == "np" else chunk
        finally:
            chunks.close()
            self.maybe_free_model_hooks()

    def _finite_peaks(self, audio):
        """Peak of each row, without a copy of the waveforms. Raises `RuntimeError` for NaN and infinity."""
        lowest, highest = audio.flatten(1).aminmax(dim=1)
        peaks = torch.maximum(-lowest, highest)  # (batch,), NaN where there is one
        if not torch.isfinite(peaks).all():
            broken = [i for i, peak in enumerate(peaks.tolist()) if not math.isfinite(peak)]
            models = {name: each for name, each in self.components.items() if isinstance(each, torch.nn.Module)}
            dtypes = {name: str(get_parameter_dtype(model)).removeprefix("torch.") for name, model in models.items()}
            advice = "Weights (of a LoRA as well), `latents` or what a callback returned may be broken."
            if overflowing := [name for name, dtype in dtypes.items() if dtype == "float16"]:
                advice = f"float16 overflows in some of them: use bfloat16 or float32 for {overflowing}."
            raise RuntimeError(f"The models, in {dtypes}, produced NaN or infinity in waveform(s) {broken}. {advice}")
        return peaks
