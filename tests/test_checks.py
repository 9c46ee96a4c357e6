import inspect
import re

import numpy as np
import pytest
import torch
from conftest import RATE, SHORT, latents_of, noise
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_tango import TangoPipeline
from pipeline_tango.checks import read_clips, read_masks
from pipeline_tango.input_audio import find_regions


# Bad input


def embeds(*shape):
    return torch.zeros(*shape)


BAD_INPUTS = [
    ({"prompt": None}, "`prompt`"),
    ({"prompt": 3}, "`prompt`"),
    ({"prompt": []}, "`prompt`"),
    ({"prompt": ["rain", 3]}, "`prompt`"),
    ({"prompt": ("rain",)}, "`prompt`"),
    ({"prompt_embeds": embeds(1, 3, 16)}, "`prompt_embeds`"),
    ({"prompt": None, "prompt_embeds": embeds(1, 3, 16)}, "`attention_mask`"),
    ({"prompt": None, "prompt_embeds": embeds(1, 3, 5), "attention_mask": embeds(1, 3)}, "`prompt_embeds`"),
    ({"prompt": None, "prompt_embeds": embeds(3, 16), "attention_mask": embeds(3)}, "`prompt_embeds`"),
    ({"prompt": None, "prompt_embeds": embeds(1, 3, 16), "attention_mask": embeds(1, 4)}, "`attention_mask`"),
    ({"prompt": None, "prompt_embeds": embeds(1, 3, 16), "attention_mask": embeds(1, 3)}, "`attention_mask`.*a 1 in"),
    (
        {"prompt": None, "prompt_embeds": embeds(1, 3, 16) / 0, "attention_mask": embeds(1, 3) + 1},
        "`prompt_embeds`.*finite",
    ),
    (
        {
            "prompt": None,
            "prompt_embeds": embeds(1, 3, 16),
            "attention_mask": embeds(1, 3) + 1,
            "negative_prompt_embeds": embeds(1, 4, 16),
            "negative_attention_mask": embeds(1, 4) + 1,
        },
        "same shape",
    ),
    ({"attention_mask": embeds(1, 3)}, "`attention_mask`"),
    ({"negative_prompt": 3}, "`negative_prompt`"),
    ({"negative_prompt": ["wind", "bell"]}, "`negative_prompt`"),
    ({"negative_prompt": "wind", "negative_prompt_embeds": embeds(1, 3, 16)}, "`negative_prompt_embeds`"),
    ({"negative_prompt_embeds": embeds(1, 3, 16)}, "`negative_attention_mask`"),
    (
        {"negative_prompt_embeds": embeds(2, 3, 16), "negative_attention_mask": embeds(2, 3) + 1},
        "`negative_prompt_embeds` has 2 rows",
    ),
    ({"audio_length_in_s": 0}, "`audio_length_in_s`"),
    ({"audio_length_in_s": -1.0}, "`audio_length_in_s`"),
    ({"audio_length_in_s": 1e-6}, "`audio_length_in_s`"),
    ({"audio_length_in_s": float("nan")}, "`audio_length_in_s`"),
    ({"audio_length_in_s": float("inf")}, "`audio_length_in_s`"),
    ({"audio_length_in_s": "10"}, "`audio_length_in_s`"),
    ({"num_inference_steps": 0}, "`num_inference_steps`"),
    ({"num_inference_steps": 2.5}, "`num_inference_steps`"),
    ({"num_inference_steps": True}, "`num_inference_steps`"),
    ({"num_waveforms_per_prompt": 0}, "`num_waveforms_per_prompt`"),
    ({"guidance_scale": "3"}, "`guidance_scale`"),
    ({"guidance_scale": float("nan")}, "`guidance_scale`"),
    ({"guidance_rescale": 1.5}, "`guidance_rescale`"),
    ({"eta": 2.0}, "`eta`"),
    ({"timesteps": [500], "sigmas": [1.0]}, "`timesteps` and `sigmas`"),
    ({"timesteps": []}, "`timesteps`"),
    ({"timesteps": [100, 500]}, "`timesteps`.*descending"),
    ({"timesteps": [1000, 500]}, "`timesteps`.*0 to 999"),
    ({"timesteps": [500, -1]}, "`timesteps`.*0 to 999"),
    ({"timesteps": [500.5]}, "`timesteps`"),
    ({"timesteps": "500"}, "`timesteps`"),
    ({"sigmas": [1.0, 0.5]}, "`sigmas` cannot be set"),
    ({"latents": embeds(1, 4, 9, 16), "audio_length_in_s": 0.3}, r"`latents`.*\(1, 4, 8, 16\)"),
    ({"latents": embeds(1, 4, 9, 16)}, "`latents`"),
    ({"latents": embeds(1, 4, 8, 16).int(), "audio_length_in_s": 0.3}, "`latents`"),
    ({"latents": embeds(1, 4, 8, 16) / 0, "audio_length_in_s": 0.3}, "`latents`"),
    ({"generator": 0}, "`generator`"),
    ({"generator": [torch.Generator()] * 2}, "`generator`.*2 for 1"),
    ({"cross_attention_kwargs": 0.5}, "`cross_attention_kwargs`"),
    ({"output_type": "wav"}, "`output_type`"),
    ({"output_type": np.array(["np", "pt"]), "stream": True}, "`output_type`"),
    ({"callback_on_step_end": 3}, "`callback_on_step_end`"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, "`callback_on_step_end_tensor_inputs`"),
]


@pytest.mark.parametrize("arguments, message", BAD_INPUTS)
def test_bad_input_names_the_argument_before_any_model_runs(guarded_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        guarded_pipe(**({"prompt": "rain"} | arguments))


def test_components_that_do_not_fit_are_named(components):
    vae = AutoencoderKL(**(dict(components["vae"].config) | {"latent_channels": 8}))
    with pytest.raises(ValueError, match="`vae` has 8 latent channels, `unet` takes 4"):
        TangoPipeline(**(components | {"vae": vae}))("rain", **SHORT)
    with pytest.raises(ValueError, match="without `vocoder`"):
        TangoPipeline(**(components | {"vocoder": None}))("rain", **SHORT)
    with pytest.raises(ValueError, match="`text_encoder`.*`prompt_embeds`"):
        TangoPipeline(**(components | {"text_encoder": None}))("rain", **SHORT)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(), st.integers(), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
    st.just(torch.zeros(2, 3)),
    st.just(np.zeros(3)),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(inspect.signature(TangoPipeline.check_inputs).parameters)[:-1]), JUNK))
def test_check_inputs_raises_nothing_but_value_errors(guarded_pipe, arguments):
    arguments.pop("self", None)
    arguments = {"prompt": "rain", "audio_length_in_s": 0.3} | arguments
    try:
        guarded_pipe.check_inputs(**arguments)
    except ValueError as error:
        assert re.search("`[a-z_]+`", str(error))  # names an argument


CLIP = noise(4000)


BAD_AUDIO_INPUTS = [
    ({"audio_sampling_rate": None}, "`audio_sampling_rate`"),
    ({"audio_sampling_rate": 0}, "`audio_sampling_rate`"),
    ({"audio_sampling_rate": 16000.5}, "`audio_sampling_rate`"),
    ({"audio_sampling_rate": True}, "`audio_sampling_rate`"),
    ({"audio": "rain.wav"}, "`audio`"),
    ({"audio": []}, "`audio`"),
    ({"audio": [0.1, 0.2]}, "`audio`"),
    ({"audio": np.zeros(0)}, "`audio`.*at least one sample"),
    ({"audio": np.zeros(4000)}, "`audio` is silent"),
    ({"audio": np.full(4000, 0.5)}, "`audio` is silent"),
    ({"audio": np.append(CLIP, np.nan)}, "`audio`.*NaN"),
    ({"audio": np.append(CLIP, np.inf)}, "`audio`.*NaN or infinity"),
    ({"audio": np.stack([CLIP, CLIP], axis=1)}, "`audio`.*wrong order"),
    ({"audio": [np.stack([CLIP, CLIP], axis=1)]}, "`audio`.*wrong order"),
    ({"audio": (CLIP * 32767).astype(np.int16)}, "`audio`.*Integer PCM"),
    ({"audio": torch.ones(4000, dtype=torch.int32)}, "`audio`.*Integer PCM"),
    ({"audio": CLIP * 32767}, "`audio`.*reaches"),
    ({"audio": np.zeros((2, 2, 2, 4000))}, "`audio`"),
    ({"audio": [CLIP, CLIP]}, "`audio` has 2 clips for 1 prompts"),
    ({"strength": 0.0}, "`strength`"),
    ({"strength": 1.1}, "`strength`"),
    ({"strength": float("nan")}, "`strength`"),
    ({"strength": "half"}, "`strength`"),
    ({"strength": 0.3, "num_inference_steps": 3}, "`strength` 0.3 leaves none of the 3 steps"),
    ({"strength": 0.5, "audio_length_in_s": 0.4}, "`strength` has to be 1 where there is no `audio`"),
    ({"mask": [(0.1, 0.3)]}, r"`mask` region \(0.1, 0.3\) does not lie in the 0.25 s"),
    ({"mask": [(-0.1, 0.1)]}, "`mask` region"),
    ({"mask": [(0.2, 0.1)]}, "`mask` region"),
    ({"mask": [(0.1, 0.1)]}, "`mask` region"),
    ({"mask": [(0.1, float("nan"))]}, "`mask` region"),
    ({"mask": [(0.0, 0.15), (0.1, 0.2)]}, "`mask` regions overlap"),
    ({"mask": [(0.1, 0.15, 0.2)]}, "`mask`"),
    ({"mask": []}, "`mask`"),
    ({"mask": (0.1, 0.2)}, "`mask`"),
    ({"mask": "0.1-0.2"}, "`mask`"),
    ({"mask": [[(0.1, 0.2)], [(0.1, 0.2)]]}, "`mask` is for 2 clips"),
    ({"mask": np.zeros(3000)}, "`mask` as an array"),
    ({"mask": np.full(4000, 0.5)}, "`mask` as an array has to hold 0"),
    ({"mask": np.ones(4000)}, "`mask` leaves nothing"),
    ({"mask": [(0.0, 0.25)]}, "`mask` leaves nothing"),
    ({"mask": [[]]}, "`mask`.*nothing to regenerate"),
    ({"mask": np.zeros(4000)}, "`mask`.*nothing to regenerate"),
    ({"audio": np.append(CLIP, np.zeros(4000)), "mask": [(0.0, 0.25)]}, "`audio` is silent in the part"),
    ({"frequency_mask_in_hz": 4000}, "`frequency_mask_in_hz`"),
    ({"frequency_mask_in_hz": (4000, 3000)}, "`frequency_mask_in_hz`"),
    ({"frequency_mask_in_hz": (4000, 9000)}, "`frequency_mask_in_hz`"),
    ({"frequency_mask_in_hz": (0, 8000)}, "`frequency_mask_in_hz`"),
    ({"frequency_mask_in_hz": (4000, float("nan"))}, "`frequency_mask_in_hz`"),
    ({"frequency_mask_in_hz": (4000, 8000), "audio_length_in_s": 0.4}, "`frequency_mask_in_hz` needs a band to keep"),
    ({"audio_start_in_s": -0.1}, "`audio_start_in_s`"),
    ({"audio_start_in_s": 0.5, "audio_length_in_s": 0.5}, "`audio_start_in_s`"),
    ({"audio_start_in_s": None}, "`audio_start_in_s`"),
    ({"stream": True}, "`stream` cannot be used with `audio`"),
    ({"audio": None, "audio_sampling_rate": None, "mask": [(0.1, 0.2)]}, "`mask` belongs to `audio`"),
    ({"audio": None, "audio_sampling_rate": None, "strength": 0.5}, "`strength` belongs to `audio`"),
    ({"audio": None}, "`audio_sampling_rate` belongs to `audio`"),
    ({"window_length_in_s": 0.0}, "`window_length_in_s`"),
    ({"window_length_in_s": 1e-9}, "`window_length_in_s`.*at least one sample"),
    ({"window_length_in_s": "long"}, "`window_length_in_s`"),
    ({"window_batch_size": 0}, "`window_batch_size`"),
    ({"window_order": "random"}, "`window_order`"),
    ({"prompt": [(0, "rain"), (0, "dog")]}, "`prompt`.*ascending"),
    ({"prompt": [(0, "rain"), (float("nan"), "dog")]}, "`prompt`.*ascending"),
    ({"prompt": [(0, "rain"), (9, "dog")]}, "`prompt` moves until 9"),
    ({"prompt": [(0, "rain"), (0.2, "dog")]}, "`prompt` cannot move within one window"),
    ({"prompt": [[]]}, "`prompt`"),
]


@pytest.mark.parametrize("arguments, message", BAD_AUDIO_INPUTS)
def test_bad_audio_input_names_the_argument_before_any_model_runs(guarded_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        guarded_pipe(**({"prompt": "rain", "audio": CLIP, "audio_sampling_rate": RATE} | arguments))


def test_a_stream_has_no_latents(guarded_pipe):
    with pytest.raises(ValueError, match="`stream` yields sound"):
        guarded_pipe("rain", stream=True, output_type="latent")


def test_a_checkpoint_with_another_front_end_cannot_read_audio(components):
    components["vocoder"].config.sampling_rate = 22050
    with pytest.raises(ValueError, match="`audio` is read at 16000 Hz"):
        TangoPipeline(**components)("rain", audio=CLIP, audio_sampling_rate=RATE)


AUDIO_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20000),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.floats(), st.tuples(st.floats(-1, 1), st.floats(-1, 1)), st.text(max_size=2)), max_size=3),
    st.just(torch.zeros(2, 3)),
    st.just(CLIP),
    st.just([CLIP, CLIP[:100]]),
)


AUDIO_ARGUMENTS = [
    "audio",
    "audio_sampling_rate",
    "strength",
    "mask",
    "frequency_mask_in_hz",
    "audio_start_in_s",
    "stream",
]


AUDIO_ARGUMENTS += ["window_length_in_s", "window_batch_size", "window_order"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(AUDIO_ARGUMENTS), AUDIO_JUNK))
def test_audio_junk_raises_nothing_but_value_errors(guarded_pipe, arguments):
    assert set(AUDIO_ARGUMENTS) <= set(inspect.signature(TangoPipeline.check_inputs).parameters)
    arguments = {"prompt": "rain", "audio_length_in_s": 0.3, "audio": CLIP, "audio_sampling_rate": RATE} | arguments
    try:
        guarded_pipe.check_inputs(**arguments)
    except ValueError as error:
        assert re.search("`[a-z_]+`", str(error))  # names an argument


def test_readers_take_what_the_pipeline_takes():
    clips = read_clips(torch.tensor(CLIP, dtype=torch.bfloat16), RATE)
    (clip,) = clips.waveforms
    assert clip.dtype == np.float32 and np.abs(clip - CLIP).max() < 2e-3
    (mask,) = read_masks([(0.1, 0.25)], clips)
    assert find_regions(mask) == [(1600, 4000)]


# Guidance on a part of the steps


@pytest.mark.parametrize(
    "interval",
    [0.5, (0.5,), (0.5, 0.5), (0.6, 0.4), (-0.1, 1), (0, 1.1), (0, float("nan")), (False, True), "01"],
)
def test_a_bad_interval_is_named(pipe, interval):
    with pytest.raises(ValueError, match="`guidance_interval`"):
        latents_of(pipe, guidance_interval=interval)
