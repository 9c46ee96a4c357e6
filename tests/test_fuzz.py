"""Any combination of arguments gives finite audio of exactly the right length, or a `ValueError` that names an
argument before a model runs. By hand for longer: `TANGO_FUZZ_EXAMPLES=5000 pytest -n 0 tests/test_fuzz.py`."""

import os
import re

import numpy as np
import pytest
from conftest import build_components, noise, seeds
from diffusers import schedulers as diffusers_schedulers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_tango import TangoPipeline


NUM_EXAMPLES = int(os.environ.get("TANGO_FUZZ_EXAMPLES", 40))
NAMES = [
    "DDPM",
    "DDIM",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "EulerDiscrete",
    "HeunDiscrete",
    "PNDM",
    "LMSDiscrete",
]
NAMES += ["LCM", "TCD", "DEISMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "EulerAncestralDiscrete"]
CONFIGS = [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}, {"timestep_spacing": "trailing"}]
CONFIGS += [{"use_exponential_sigmas": True, "rescale_betas_zero_snr": True}, {"skip_prk_steps": True}]
SECONDS = st.one_of(st.floats(-0.1, 1.2), st.sampled_from([0.0, 1e-9, 0.3, 0.5]))
REGION = st.tuples(SECONDS, SECONDS).map(lambda edges: tuple(sorted(edges)))
CALLBACKS = [None, lambda *args: None, lambda pipe, i, t, tensors: tensors]
ARGUMENTS = {
    "prompt": st.one_of(
        st.text(max_size=8), st.just(["rain", "dog"]), st.just([(0.0, "rain"), (0.4, "dog")]), st.none()
    ),
    "audio_length_in_s": st.one_of(SECONDS, st.none()),
    "num_inference_steps": st.one_of(st.integers(0, 6), st.just(150)),
    "guidance_scale": st.floats(-2, 9),
    "guidance_rescale": st.floats(-0.1, 1.1),
    "guidance_interval": st.tuples(st.floats(0, 1), st.floats(0, 1)),
    "num_waveforms_per_prompt": st.integers(0, 2),
    "eta": st.floats(-0.1, 1.1),
    "timesteps": st.lists(st.integers(-1, 1000), max_size=4).map(lambda each: sorted(each, reverse=True)),
    "sigmas": st.lists(st.floats(-1, 200), max_size=4).map(lambda each: sorted(each, reverse=True)),
    "output_type": st.sampled_from(["np", "pt", "latent"]),
    "callback_on_step_end": st.sampled_from(CALLBACKS),
    "callback_on_step_end_tensor_inputs": st.sampled_from([None, [], ["latents"], ["prompt_embeds", "latents"]]),
    "strength": st.floats(-0.1, 1.1),
    "mask": st.one_of(st.lists(REGION, max_size=3), st.lists(st.lists(REGION, max_size=2), max_size=2)),
    "frequency_mask_in_hz": st.sampled_from([(4000, 8000), (0, 2000), (100, 200), (8000, 4000)]),
    "audio_start_in_s": SECONDS,
    "window_length_in_s": SECONDS,
    "window_batch_size": st.integers(0, 3),
    "window_order": st.sampled_from(["joint", "sequential"]),
    "stream": st.booleans(),
}
AUDIO = st.sampled_from([0, 1, 400, 5000, 12000])
LEVEL = st.sampled_from([1e-6, 0.1, 0.45, 0.6])


@pytest.fixture(scope="module")
def fuzzed():
    """A pipeline, and a list of the models that ran."""
    pipe, ran = TangoPipeline(**build_components(), default_audio_length_in_s=0.3), []
    pipe.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "unet", "vae", "vocoder"):
        getattr(pipe, name).register_forward_pre_hook(lambda *args, name=name: ran.append(name))
    return pipe, ran, pipe.scheduler.config


def make(pipe, num_samples, level, rate, arguments):
    if num_samples is not None:
        arguments = {"audio": noise(num_samples, level=level), "audio_sampling_rate": rate} | arguments
    result = pipe(**{"prompt": "rain", "num_inference_steps": 2, "generator": seeds(0)[0]} | arguments)
    return np.concatenate([np.asarray(each) for each in result], axis=1) if arguments.get("stream") else result.audios


@settings(
    max_examples=NUM_EXAMPLES, deadline=None, derandomize="TANGO_FUZZ_EXAMPLES" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    name=st.sampled_from(NAMES),
    config=st.sampled_from(CONFIGS),
    num_samples=st.one_of(st.none(), AUDIO),
    level=LEVEL,
    rate=st.sampled_from([8000, 16000, 44100]),
    arguments=st.lists(st.sampled_from(sorted(ARGUMENTS)), max_size=5, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: ARGUMENTS[name] for name in names})
    ),
)
def test_any_call_gives_sound_or_names_an_argument(fuzzed, name, config, num_samples, level, rate, arguments):
    pipe, ran, base = fuzzed
    pipe.scheduler = getattr(diffusers_schedulers, f"{name}Scheduler").from_config(base, **config)
    ran.clear()
    try:
        audio = np.asarray(make(pipe, num_samples, level, rate, arguments))
    except ValueError as error:
        assert re.search("`[a-z_0-9]+`", str(error)) and not ran
        return
    assert np.isfinite(audio).all()
    if arguments.get("output_type") == "latent":
        return
    seconds, start = arguments.get("audio_length_in_s"), arguments.get("audio_start_in_s", 0.0)
    if seconds is None:
        seconds = 0.3 if num_samples is None else start + num_samples / rate
    num_prompts = 2 if arguments.get("prompt") == ["rain", "dog"] else 1
    assert audio.shape == (num_prompts * arguments.get("num_waveforms_per_prompt", 1), round(seconds * 16000))
    assert audio.dtype == np.float32 and np.abs(audio).max() <= 1
