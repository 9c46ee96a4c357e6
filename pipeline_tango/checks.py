"""Checks of the inputs of a call, by subject: `read_*` return an argument in one form, `check_*` only raise."""

import inspect
import math
from numbers import Integral, Real

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler, PNDMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers

from .input_audio import SILENT_PEAK, AudioClips
from .mel import MEL_HOP_LENGTH, MEL_SAMPLING_RATE, NUM_MEL_BINS
from .positions import count_positions
from .student import check_guidance_input, student_adapters


OPTIONAL_NUMBERS = ("eta", "strength", "window_length_in_s")  # `None` is a value of theirs


def is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def check_components(pipe):
    """The components of a pipeline are there and fit each other."""
    for name in ("unet", "scheduler", "vae", "vocoder"):
        if getattr(pipe, name) is None:
            raise ValueError(f"This pipeline was built without `{name}`, which it needs to generate.")
    scheduler, num_mel_bins = pipe.scheduler, pipe.num_mel_bins
    if not hasattr(scheduler, "init_noise_sigma") or not hasattr(scheduler, "scale_model_input"):
        raise ValueError(
            f"`scheduler` cannot be a {type(scheduler).__name__}: flow-matching schedulers do not fit this "
            f"UNet. Use one of {[s.name for s in KarrasDiffusionSchedulers]}, LCMScheduler or TCDScheduler."
        )
    if scheduler.config.get("prediction_type") == "flow_prediction":
        raise ValueError("`scheduler` has prediction_type 'flow_prediction', which does not fit this UNet.")
    if scheduler.config.get("use_flow_sigmas"):
        raise ValueError("`scheduler` has use_flow_sigmas, whose noise levels do not fit this UNet: leave it out.")
    if num_mel_bins % pipe.vae_scale_factor != 0:
        raise ValueError(
            f"`vocoder` has {num_mel_bins} mel bins, which the `vae`'s factor {pipe.vae_scale_factor} does not divide."
        )
    num_positions = pipe.config.num_position_channels
    left = count_positions(pipe.unet.config, pipe.vae.config)
    if num_positions < 0 or num_positions != left:
        positions = f" beside `num_position_channels` {num_positions}" if num_positions else ""
        hint = f", unless the other {left} are position channels (`num_position_channels` {left})" if left > 0 else ""
        raise ValueError(
            f"`vae` has {pipe.vae.config.latent_channels} latent channels{positions}, `unet` takes "
            f"{pipe.unet.config.in_channels}: they do not belong together{hint}."
        )


# numbers


def check_counts(**counts):
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` has to be an integer of at least 1, not {value!r}.")


def check_numbers(**numbers):
    for name, value in numbers.items():
        if value is None and name in OPTIONAL_NUMBERS:
            continue
        if not is_number(value) or not math.isfinite(value):
            raise ValueError(f"`{name}` has to be a finite number, not {value!r}.")


def check_ranges(
    sampling_rate, audio_length_in_s, guidance_rescale, guidance_interval, eta=None, window_length_in_s=None
):
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
        or not all(is_number(each) for each in guidance_interval)
        or not 0 <= guidance_interval[0] < guidance_interval[1] <= 1
    ):
        raise ValueError(
            f"`guidance_interval` has to be (start, stop) with 0 <= start < stop <= 1, not {guidance_interval!r:.200}."
        )
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"`eta` has to be between 0 and 1, not {eta}.")
    if window_length_in_s is not None and not 0.5 < window_length_in_s * sampling_rate < 1e9 * sampling_rate:
        raise ValueError(
            f"`window_length_in_s` has to be positive, at least one sample of 1/{sampling_rate} s, and below 1e9, not "
            f"{window_length_in_s}."
        )


# student


def check_student_call(
    pipe, guidance_scale, guidance_rescale, guidance_interval, negative_prompt, negative_prompt_embeds
):
    """A pipeline whose UNet is a student can do what a call asks for. `guidance_interval` is `None` where it is not
    given."""
    adapters = student_adapters(pipe.unet)
    if len(adapters) > 1:
        raise ValueError(
            f"The LoRAs {list(adapters)} are students, of which one can be active: say which by `set_adapters`."
        )
    check_guidance_input(pipe.student, pipe.unet, pipe.config.default_guidance_scale)
    if pipe.deep_cache is not None and pipe.deep_cache.interval > 1:
        raise ValueError(
            "A student cannot have a deep cache: the features of its few steps differ too much. Call "
            "`disable_deep_cache()`."
        )
    weights = pipe.student["guidance_scale"]
    if isinstance(weights, list) and not weights[0] <= guidance_scale <= weights[1]:
        raise ValueError(f"`guidance_scale` has to be in {weights}, the range of the student, not {guidance_scale}.")
    if guidance_scale > 1 and not isinstance(weights, list):
        return
    without_effect = {
        "guidance_rescale": guidance_rescale > 0,
        "guidance_interval": guidance_interval is not None and tuple(guidance_interval) != (0, 1),
        "negative_prompt": negative_prompt not in (None, ""),
        "negative_prompt_embeds": negative_prompt_embeds is not None,
    }
    advice = "" if isinstance(weights, list) else ", or give a `guidance_scale` above 1, such as 1.5"
    for name, is_given in without_effect.items():
        if is_given:
            raise ValueError(f"`{name}` has no effect on a student with its guidance inside: leave it out{advice}.")


# schedule


def check_timesteps(scheduler, num_inference_steps, timesteps, sigmas):
    if timesteps is not None and sigmas is not None:
        raise ValueError("Only one of `timesteps` and `sigmas` can be given.")
    for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is None:
            continue
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"`{name}` cannot be set by hand with {type(scheduler).__name__}.")
        kind = Integral if name == "timesteps" else Real
        if not isinstance(value, (list, tuple, np.ndarray)) or not all(isinstance(each, kind) for each in value):
            raise ValueError(f"`{name}` has to be a list of {kind.__name__} numbers, not {value!r}.")
        if len(value) == 0 or not all(math.isfinite(each) for each in value):
            raise ValueError(f"`{name}` has to hold at least one number, all of them finite, not {value!r}.")
        if any(later >= earlier for earlier, later in zip(value, value[1:])):
            raise ValueError(f"`{name}` has to be in descending order, not {value!r}.")
    num_train_timesteps = scheduler.config.num_train_timesteps
    if timesteps is not None and (timesteps[0] >= num_train_timesteps or timesteps[-1] < 0):
        raise ValueError(f"`timesteps` have to be from 0 to {num_train_timesteps - 1}, not {timesteps!r}.")
    if sigmas is not None and sigmas[-1] < 0:
        raise ValueError(f"`sigmas` cannot be below 0, but end at {sigmas[-1]}.")
    if warms_up_by_runge_kutta(scheduler) and num_inference_steps < 4:
        raise ValueError(
            f"`num_inference_steps` has to be at least 4 for PNDM with its Runge-Kutta warm-up, not "
            f"{num_inference_steps}. Set the scheduler's `skip_prk_steps` for fewer."
        )


def warms_up_by_runge_kutta(scheduler):
    return isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps


def check_schedule(schedule, num_channels):
    """A [`Schedule`] can run, which is known once its scheduler is set up, for latents of `num_channels`."""
    scheduler = schedule.scheduler
    if len(scheduler.timesteps) == 0:  # Euler after a single sigma of 0
        ((name, value),) = schedule.given.items()
        raise ValueError(f"`{name}` of {value!r} leaves {type(scheduler).__name__} no step to take.")
    last, start = scheduler.config.num_train_timesteps - 1, scheduler.timesteps.max()
    if start > last:
        # for example 1000 steps with "leading" spacing and an offset of 1, where the original fails midway
        raise ValueError(
            f"`num_inference_steps` of {schedule.num_all_steps} makes {type(scheduler).__name__} start at timestep "
            f"{float(start):g}, beyond the last one of training, {last}. Use fewer steps."
        )
    if not schedule.keeps_num_steps:
        check_steps_remain(schedule.strength, schedule.num_all_steps)
    schedule.rehearse(num_channels)


def check_steps_remain(strength, num_inference_steps):
    if int(num_inference_steps * strength) == 0:
        raise ValueError(f"`strength` {strength} leaves none of the {num_inference_steps} steps.")


# text


def read_prompts(prompt):
    """For each sound its texts over time: a list of `(seconds, text)`, of one element unless the prompt moves."""

    def is_timed(value):
        return (
            isinstance(value, (list, tuple)) and len(value) == 2 and is_number(value[0]) and isinstance(value[1], str)
        )

    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, list) and prompts and all(is_timed(each) for each in prompts):
        prompts = [prompts]
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"`prompt` has to be a string or a list of at least one string, not {prompt!r}.")
    result = []
    for each in prompts:
        keyframes = [(0.0, each)] if isinstance(each, str) else each
        if not isinstance(keyframes, list) or not keyframes or not all(is_timed(pair) for pair in keyframes):
            raise ValueError(
                "`prompt` has to hold strings, or lists of (seconds, string) for prompts that move, not "
                f"{each!r:.200}."
            )
        times = [seconds for seconds, _ in keyframes]
        if not all(math.isfinite(time) for time in times) or times[0] < 0 or sorted(set(times)) != times:
            raise ValueError(f"`prompt` has to move through ascending seconds from 0 on, not {times}.")
        result.append(keyframes)
    return result


def read_text(
    prompt,
    negative_prompt,
    prompt_embeds,
    negative_prompt_embeds,
    attention_mask,
    negative_attention_mask,
    width,
):
    """For each sound its texts over time, as `read_prompts` returns them, `None` in place of what is encoded already.
    Embeddings have to be of `width` channels."""
    if prompt is not None and prompt_embeds is not None:
        raise ValueError("Only one of `prompt` and `prompt_embeds` can be given.")
    if prompt is None and prompt_embeds is None:
        raise ValueError("One of `prompt` and `prompt_embeds` has to be given.")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
    keyframes = None if prompt is None else read_prompts(prompt)
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        texts = negative_prompt
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`negative_prompt` has to be a string or a list of at least one string, not {texts!r}.")
    if prompt_embeds is not None and negative_prompt_embeds is not None:
        if getattr(prompt_embeds, "shape", None) != getattr(negative_prompt_embeds, "shape", None):
            raise ValueError(
                "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but got "
                f"{getattr(prompt_embeds, 'shape', None)} and {getattr(negative_prompt_embeds, 'shape', None)}."
            )
    check_embeds("", prompt_embeds, attention_mask, width)
    check_embeds("negative_", negative_prompt_embeds, negative_attention_mask, width)
    return [[(0.0, None)]] * len(prompt_embeds) if keyframes is None else keyframes


def check_embeds(prefix, embeds, attention_mask, width):
    embeds_name, mask_name = f"{prefix}prompt_embeds", f"{prefix}attention_mask"
    if embeds is None:
        if attention_mask is not None:
            raise ValueError(f"`{mask_name}` belongs to `{embeds_name}` and cannot be given without it.")
        return
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 3 or embeds.shape[-1] != width:
        came = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds)
        raise ValueError(f"`{embeds_name}` has to be a tensor (batch, tokens, {width}), not {came}.")
    if not embeds.is_floating_point() or not embeds.numel() or not torch.isfinite(embeds).all():
        raise ValueError(f"`{embeds_name}` has to hold finite floating-point numbers.")
    if attention_mask is None:
        raise ValueError(
            f"`{embeds_name}` needs its `{mask_name}`: without it padding would be read as text. "
            "`encode_prompt` returns both; for embeddings without padding pass a mask of ones."
        )
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != embeds.shape[:2]:
        came = tuple(attention_mask.shape) if isinstance(attention_mask, torch.Tensor) else type(attention_mask)
        raise ValueError(f"`{mask_name}` has to be a tensor {tuple(embeds.shape[:2])}, not {came}.")
    if not ((attention_mask == 0) | (attention_mask == 1)).all() or not (attention_mask == 1).any(dim=1).all():
        raise ValueError(f"`{mask_name}` has to be 0 or 1, with a 1 in every row.")


def check_moving_prompts(keyframes, audio_length_in_s, windows):
    for each in keyframes:
        if len(each) > 1 and each[-1][0] > audio_length_in_s:
            raise ValueError(f"`prompt` moves until {each[-1][0]} s in a sound of {audio_length_in_s} s.")
        if len(each) > 1 and len(windows.starts) == 1:
            raise ValueError(
                "`prompt` cannot move within one window, which reads one text: give a longer `audio_length_in_s` "
                "or a shorter `window_length_in_s`."
            )


def check_negative_rows(negative_prompt, negative_prompt_embeds, batch_size):
    for name, value in (("negative_prompt", negative_prompt), ("negative_prompt_embeds", negative_prompt_embeds)):
        if value is not None and not isinstance(value, str) and len(value) != batch_size:
            raise ValueError(f"`{name}` has {len(value)} rows for {batch_size} prompts.")


def check_text_encoder(pipe, prompt_embeds, negative_prompt_embeds, guidance_scale):
    """A pipeline can encode the texts that are not given as embeddings."""
    if pipe.text_encoder is None or pipe.tokenizer is None:
        for name, embeds in (("prompt", prompt_embeds), ("negative_prompt", negative_prompt_embeds)):
            if embeds is None and (name == "prompt" or guidance_scale > 1):
                raise ValueError(
                    f"This pipeline was built without `text_encoder` or `tokenizer`: pass `{name}_embeds`."
                )
        return
    width, expected = pipe.text_encoder.config.d_model, pipe.unet.config.cross_attention_dim
    if width != expected:
        raise ValueError(f"`text_encoder` is {width} wide, `unet` reads {expected}: they do not belong together.")


def check_rows_of_callback(text, is_guided):
    """A callback left a [`TextTrack`] as many rows as the UNet needs."""
    num_rows = text.num_rows(is_guided)
    if min(text.prompt_embeds.shape[0], text.attention_mask.shape[0]) < num_rows:
        raise ValueError(
            f"`callback_on_step_end` left {text.prompt_embeds.shape[0]} rows of `prompt_embeds` and "
            f"{text.attention_mask.shape[0]} of `attention_mask`, but {num_rows} are needed."
        )


# latents and noise


def check_latents(latents, expected_shape, audio_length_in_s):
    if latents is None:
        return
    if not isinstance(latents, torch.Tensor) or tuple(latents.shape) != expected_shape:
        came = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents)
        raise ValueError(
            f"`latents` for {expected_shape[0]} waveforms of {audio_length_in_s} s has to be a tensor of shape "
            f"{expected_shape}, not {came}."
        )
    if not latents.is_floating_point() or not torch.isfinite(latents).all():
        raise ValueError("`latents` has to hold finite floating-point numbers.")


def check_generator(generator, num_waveforms):
    generators = generator if isinstance(generator, list) else [generator]
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError(f"`generator` has to be a torch.Generator or a list of them, not {generator!r}.")
    if isinstance(generator, list) and len(generator) != num_waveforms:
        raise ValueError(f"`generator` is a list of {len(generator)} for {num_waveforms} waveforms.")


# options


def check_options(cross_attention_kwargs, window_order, stream, output_type):
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


def check_callback(callback_on_step_end, tensor_inputs, known_tensor_inputs):
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise ValueError(f"`callback_on_step_end` has to be callable, not {type(callback_on_step_end)}.")
    if tensor_inputs is not None and (
        not isinstance(tensor_inputs, (list, tuple))
        or not all(isinstance(name, str) and name in known_tensor_inputs for name in tensor_inputs)
    ):
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has to be a list of some of {known_tensor_inputs}, not "
            f"{tensor_inputs!r}."
        )


# audio


def check_no_audio_arguments(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"`{name}` belongs to `audio` and cannot be given without it.")


def read_clips(audio, audio_sampling_rate):
    """The sounds in `audio` as [`AudioClips`]: floating-point samples around [-1, 1] in the order `(samples,)`,
    `(channels, samples)` or `(batch, channels, samples)`, or a list of such arrays or tensors."""
    rate = audio_sampling_rate
    if not isinstance(rate, Integral) or isinstance(rate, bool) or not 1000 <= rate <= 1_000_000:
        raise ValueError(f"`audio_sampling_rate` has to be the rate of `audio`, 1000 to 1000000 Hz, not {rate!r}.")
    arrays = list(audio) if isinstance(audio, (list, tuple)) else [audio]
    if not arrays or not all(isinstance(each, (np.ndarray, torch.Tensor)) for each in arrays):
        raise ValueError(f"`audio` has to be an array, a tensor, or a list of them, not {type(audio)}.")
    if not isinstance(audio, (list, tuple)) and audio.ndim in (2, 3):
        if audio.ndim == 2 and audio.shape[0] > audio.shape[1]:
            raise ValueError(
                f"`audio` of shape {tuple(audio.shape)} is in the wrong order: a batch is (batch, samples), stereo is "
                "[(channels, samples)], so transpose it."
            )
        arrays = list(audio)
    return AudioClips([read_clip(array) for array in arrays], rate)


def read_clip(array):
    """A mono float32 array."""
    is_float = array.is_floating_point() if isinstance(array, torch.Tensor) else array.dtype.kind == "f"
    if not is_float:
        raise ValueError(
            f"`audio` has to hold floating-point samples in [-1, 1], not {array.dtype}. Integer PCM has to be "
            "divided by its full scale, such as 32768 for 16 bits."
        )
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().float().numpy()
    array = array.astype(np.float32, copy=False)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"`audio` has to be (samples,), (batch, samples) or a list of (samples,) or (channels, samples), with "
            f"at least one sample, but holds {array.shape}."
        )
    if array.ndim == 2 and array.shape[0] > array.shape[1]:
        raise ValueError(f"`audio` holds {array.shape}, the wrong order: stereo is (channels, samples).")
    if not np.isfinite(array).all():
        raise ValueError("`audio` has to hold finite samples, not NaN or infinity.")
    channels = array if array.ndim == 2 else array[None]
    if array.ndim == 2:
        array = array.mean(axis=0, dtype=np.float64).astype(np.float32) if len(array) > 1 else array[0]
    lowest, highest, mean = array.min(), array.max(), array.mean()
    if max(highest, -lowest) > 2:  # what lossy formats decode to is often a little beyond 1
        raise ValueError(f"`audio` has to be in [-1, 1], but reaches {max(highest, -lowest):g}.")
    if max(highest - mean, mean - lowest) < SILENT_PEAK:
        channel_peak = (channels.max(axis=1) - channels.min(axis=1)).max() / 2
        if channel_peak >= len(channels) * SILENT_PEAK:  # more than averaging takes from a channel beside silent ones
            raise ValueError(
                f"`audio` has {len(channels)} channels, of peak {channel_peak:.2g}, that cancel each other when they "
                "are averaged to mono, as two of opposite polarity do: give one of them, or invert one."
            )
        raise ValueError(f"`audio` is silent: no sample is {SILENT_PEAK} from the mean.")
    return array


def check_num_clips(clips, batch_size):
    if len(clips.waveforms) not in (1, batch_size):
        raise ValueError(
            f"`audio` has {len(clips.waveforms)} clips for {batch_size} prompts: give one, or one for each."
        )


def read_masks(mask, clips):
    """For each of [`AudioClips`] a boolean array of its length, `True` where to regenerate."""

    def is_region(value):
        return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(each, Real) for each in value)

    num_clips = len(clips.waveforms)
    if isinstance(mask, (np.ndarray, torch.Tensor)):
        masks = list(mask) if mask.ndim == 2 else [mask] * num_clips
    elif isinstance(mask, (list, tuple)) and mask and all(is_region(each) for each in mask):
        masks = [mask] * num_clips
    elif isinstance(mask, list) and mask and all(isinstance(each, (list, np.ndarray, torch.Tensor)) for each in mask):
        masks = mask
    else:
        raise ValueError(
            "`mask` has to be a list of regions (start, end) in seconds such as [(2.0, 4.5)], one such list for each "
            f"clip, or an array of samples, not {mask!r:.200}."
        )
    if len(masks) != num_clips:
        raise ValueError(f"`mask` is for {len(masks)} clips, but `audio` has {num_clips}.")

    result = []
    for each, waveform, length_in_s in zip(masks, clips.waveforms, clips.lengths_in_s):
        if isinstance(each, (np.ndarray, torch.Tensor)):
            samples = np.asarray(each.cpu() if isinstance(each, torch.Tensor) else each)
            if samples.shape != waveform.shape:
                raise ValueError(
                    f"`mask` as an array needs a value for each sample of `audio`, {waveform.shape}, not "
                    f"{samples.shape}."
                )
            if samples.dtype.kind not in "biuf" or not np.isin(samples, (0, 1)).all():
                raise ValueError("`mask` as an array has to hold 0 (keep) and 1 (regenerate) only.")
            result.append(samples.astype(bool))
            continue
        samples = np.zeros(len(waveform), dtype=bool)
        if not all(is_region(region) for region in each):
            raise ValueError(f"`mask` has to hold regions (start, end) in seconds, not {each!r:.200}.")
        last_end = 0.0
        for start, end in sorted(each):
            if not 0 <= start < end <= length_in_s + 0.5 / clips.sampling_rate:  # NaN fails as well
                raise ValueError(f"`mask` region ({start}, {end}) does not lie in the {length_in_s:g} s of `audio`.")
            if start < last_end:
                raise ValueError(f"`mask` regions overlap: one starts at {start} s, before the end of another.")
            last_end = end
            samples[round(start * clips.sampling_rate) : round(end * clips.sampling_rate)] = True
        result.append(samples)
    return result


def check_front_end(sampling_rate, hop_length, num_mel_bins):
    """The vocoder was trained on the mel spectrograms that audio is read into."""
    if (sampling_rate, hop_length, num_mel_bins) != (MEL_SAMPLING_RATE, MEL_HOP_LENGTH, NUM_MEL_BINS):
        raise ValueError(
            f"`audio` is read at {MEL_SAMPLING_RATE} Hz into {NUM_MEL_BINS} mel bins, a frame every "
            f"{MEL_HOP_LENGTH} samples, but `vocoder` has {sampling_rate} Hz, {num_mel_bins} bins, {hop_length}."
        )


def check_input_audio(audio, stream):
    """An [`InputAudio`] lies in the result, and its band can be regenerated."""
    if stream:
        raise ValueError("`stream` cannot be used with `audio`: the seams need the sound on both of their sides.")
    if not 0 <= audio.start_in_s < audio.result_length_in_s:
        raise ValueError(
            f"`audio_start_in_s` has to lie in the {audio.result_length_in_s:g} s of the result, not "
            f"{audio.start_in_s}."
        )
    band = audio.frequency_mask_in_hz
    if band is None:
        return
    if (
        not isinstance(band, (list, tuple))
        or len(band) != 2
        or not all(is_number(edge) for edge in band)
        or not 0 <= band[0] < band[1] <= MEL_SAMPLING_RATE / 2
        or band[1] - band[0] < 200
        or (band[0] == 0 and band[1] == MEL_SAMPLING_RATE / 2)
    ):
        raise ValueError(
            "`frequency_mask_in_hz` has to be the band (low, high) to regenerate, at least 200 Hz wide and "
            f"less than all of 0 to {MEL_SAMPLING_RATE // 2} Hz, not {band!r}."
        )
    if audio.is_incomplete:
        raise ValueError("`frequency_mask_in_hz` needs a band to keep, but `audio` does not fill the whole result.")


def check_strength(audio, num_inference_steps, scheduler):
    """A run can start midway from an [`InputAudio`], if its strength, given or the default, says so. The number of
    steps is `None` if it is not known yet."""
    strength = audio.strength
    if not 0 < strength <= 1:
        raise ValueError(f"`strength` has to be above 0 and up to 1, not {strength}.")
    if strength == 1:
        return
    if audio.inpaints and audio.is_incomplete:
        raise ValueError("`strength` has to be 1 where there is no `audio` to start from: before and after it.")
    if num_inference_steps is not None:
        check_steps_remain(strength, num_inference_steps)
    if isinstance(scheduler, LMSDiscreteScheduler):
        # its `step` takes coefficients for outputs that it has not seen (diffusers 0.42)
        raise ValueError(f"`strength` has to be 1, not {strength}, with LMSDiscreteScheduler: it cannot start midway.")
    if warms_up_by_runge_kutta(scheduler):
        raise ValueError(
            f"`strength` has to be 1, not {strength}, for PNDM with its Runge-Kutta warm-up, which cannot start "
            "midway. Set the scheduler's `skip_prk_steps`."
        )


def check_placed_audio(placed, strength):
    """A [`PlacedAudio`] has something to regenerate and something audible to keep."""
    if placed.mask is not None and not placed.mask.any():
        raise ValueError("`mask` leaves nothing to regenerate.")
    for row, peak in enumerate(placed.peak):
        if placed.mask is not None and strength == 1 and placed.mask[row].all():
            raise ValueError("`mask` leaves nothing of `audio` to keep: leave out both, and give `audio_length_in_s`.")
        if peak < SILENT_PEAK:
            raise ValueError("`audio` is silent in the part that is kept.")
