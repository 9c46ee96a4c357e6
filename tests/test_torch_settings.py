import contextlib

import numpy as np
import pytest
import torch
from conftest import LONG, QUICK, build_components, latents_of, noise, seeds

from pipeline_tango import TangoPipeline
from pipeline_tango.mel import _mel_filters, log_mel_spectrogram


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic": deterministic,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_sound_does_not_depend_on_pytorchs_settings(shared_pipe, name):
    options = QUICK | {"guidance_scale": 3.0}
    inpainting = {"audio": noise(9600), "audio_sampling_rate": 16000, "mask": [(0.1, 0.2)]}
    sequential = LONG | {"window_order": "sequential", "stream": True}
    expected = shared_pipe("rain", generator=seeds(0)[0], **options, **inpainting).audios
    expected_stream = np.concatenate(list(shared_pipe("rain", generator=seeds(0)[0], **options, **sequential)), axis=1)
    before = torch.get_default_dtype()
    with SETTINGS[name]():
        during = torch.get_default_dtype()
        sound = shared_pipe("rain", generator=seeds(0)[0], output_type="pt", **options, **inpainting).audios
        chunks = []
        for chunk in shared_pipe("rain", generator=seeds(0)[0], **options, **sequential):
            chunks.append(chunk)
            assert torch.get_default_dtype() == during
    assert torch.get_default_dtype() == before
    assert sound.dtype == torch.float32 and np.array_equal(sound.numpy(), expected)
    assert np.array_equal(np.concatenate(chunks, axis=1), expected_stream)


def test_a_stream_that_begins_in_inference_mode_goes_on_outside_of_it(shared_pipe):
    with torch.inference_mode():
        stream = shared_pipe("rain", window_order="sequential", stream=True, **QUICK, **LONG)
        next(stream)
    assert len(list(stream)) > 1


def test_what_is_cached_in_inference_mode_can_be_trained_with():
    _mel_filters.cache_clear()
    with torch.inference_mode():
        log_mel_spectrogram(torch.ones(1, 2000))
    waveform = torch.randn(1, 2000, requires_grad=True)
    log_mel_spectrogram(waveform).sum().backward()
    assert waveform.grad.abs().max() > 0


# Calls at the same time


def test_a_second_call_while_a_stream_is_open_is_refused(pipe):
    stream = pipe("rain", window_order="sequential", stream=True, **QUICK, **LONG)
    next(stream)
    for other in (pipe, TangoPipeline.from_pipe(pipe)):  # which has the same scheduler
        with pytest.raises(RuntimeError, match="not over.*`close"):
            latents_of(other)
    own = TangoPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config))
    latents = latents_of(own)
    assert len(list(stream)) > 0
    assert torch.equal(latents_of(pipe), latents)
    with pytest.raises(RuntimeError, match="not over"):
        latents_of(pipe, callback_on_step_end=lambda *args: latents_of(pipe))
    assert torch.equal(latents_of(pipe), latents)
    stream = pipe("rain", window_order="sequential", stream=True, **QUICK, **LONG)
    next(stream)
    stream.close()
    assert torch.equal(latents_of(pipe), latents)


def test_a_stream_that_begins_after_another_call_has_its_own_options():
    pipe = TangoPipeline(**build_components())
    options = {"window_order": "sequential", **LONG}
    whole = pipe("rain", generator=seeds(0)[0], num_inference_steps=2, guidance_scale=5.0, **options).audios
    stream = pipe("rain", generator=seeds(0)[0], num_inference_steps=2, guidance_scale=5.0, stream=True, **options)
    latents_of(pipe, guidance_scale=1.0, num_inference_steps=3)
    assert np.array_equal(np.concatenate(list(stream), axis=1), whole)
