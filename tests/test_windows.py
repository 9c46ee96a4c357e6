import numpy as np
import pytest
import torch
from conftest import QUICK, WINDOW, noise, seeds

from pipeline_tango import TangoPipeline
from pipeline_tango.windows import WindowPlan, blend_windows, window_starts


# Long sound


def test_windows_cover_everything_and_overlap_by_a_quarter():
    for num_frames in (1, 255, 256, 257, 264, 400, 1500, 15000):
        starts = window_starts(num_frames, 256)
        assert starts[0] == 0 and max(starts[-1] + 256, 256) == max(num_frames, 256)
        assert all(0 < later - earlier <= 192 for earlier, later in zip(starts, starts[1:]))


def test_windows_are_denoised_together_or_one_after_the_other():
    spans = {order: WindowPlan(16000, 40, 16, 1, order, 25.0).spans for order in ("joint", "sequential")}
    assert spans == {"joint": [(0, 40)], "sequential": [(0, 16), (12, 28), (24, 40)]}
    assert WindowPlan(16000, 16, 16, 1, "sequential", 25.0).spans == [(0, 16)]


@pytest.mark.parametrize("num_windows_at_once", [1, 3, 100])
def test_windows_that_agree_blend_to_the_whole(num_windows_at_once):
    inputs = torch.randn(2, 3, 100, 5, generator=seeds(0)[0])
    seen = []

    def double(windows, starts):
        seen.append(len(starts))
        assert windows.shape == (2 * len(starts), 3, 16, 5)
        return 2 * windows

    blended = blend_windows(double, inputs, 16, num_windows_at_once)
    assert (blended - 2 * inputs).abs().max() < 1e-5
    assert max(seen) <= num_windows_at_once and sum(seen) == 8
    halves = blend_windows(lambda w, s: w[:, :, ::4], inputs, 8, factor_in=4)
    assert halves.shape == (2, 3, 25, 5) and (halves - inputs[:, :, ::4]).abs().max() < 1e-5


def test_disagreeing_windows_change_over_smoothly():
    def by_position(windows, starts):
        return torch.cat([torch.full_like(windows[:1], float(start)) for start in starts])

    blended = blend_windows(by_position, torch.zeros(1, 1, 100, 1), 40)[0, 0, :, 0]
    starts = window_starts(100, 40)
    assert blended[0] == 0 and blended[-1] == starts[-1]
    assert (blended.diff() > -1e-4).all() and blended.diff().max() < 0.3 * starts[1]


def test_the_unet_never_sees_more_than_a_window(pipe, call):
    shapes = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kw: shapes.append(args[0].shape), with_kwargs=True)
    options = {"pipe": pipe, "audio_length_in_s": 1.5, "window_length_in_s": WINDOW, "guidance_scale": 3.0}
    one = call(window_batch_size=1, output_type="latent", **options)
    assert set(shapes) == {(2, 4, 8, 16)}
    num_calls = len(shapes)
    shapes.clear()
    four = call(window_batch_size=4, output_type="latent", **options)
    assert max(shape[0] for shape in shapes) == 8 and len(shapes) < num_calls / 3
    assert (one - four).abs().max() < 1e-4
    assert call(**options).shape == (1, 24000)


@pytest.mark.parametrize("num_mel_corrections", [0, 2])
def test_chunks_decode_to_the_same_as_the_whole(pipe, monkeypatch, num_mel_corrections):
    # a VAE without attention, which looks no further than a frame: what is left to test is the vocoder's context
    def decode(latents, return_dict):
        return (latents.mean(1, keepdim=True).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3),)

    pipe = TangoPipeline(**pipe.components, num_mel_corrections=num_mel_corrections)
    monkeypatch.setattr(pipe.vae, "decode", decode)
    latents = torch.randn(2, 4, 200, 16, generator=seeds(0)[0])

    def decoded(num_frames_in_window):
        windows = WindowPlan(
            127000, 200, num_frames_in_window, num_windows_at_once=1, order="joint", frames_per_s=25.0
        )
        return list(pipe._decode(iter([(latents, 200)]), windows))

    (whole,), chunks = decoded(200), decoded(48)
    assert len(chunks) > 4
    joined = torch.cat(chunks, dim=1)
    assert joined.shape == whole.shape == (2, 127000)
    assert (joined - whole).abs().max() < 1e-4
    monkeypatch.setattr(pipe, "_vocoder_context", lambda: 1)
    assert (torch.cat(decoded(48), dim=1) - whole).abs().max() > 1e-3  # the context is needed


def test_a_window_may_be_longer_than_the_sound_and_sounds_short(call):
    assert np.array_equal(call(audio_length_in_s=0.3), call(audio_length_in_s=0.3, window_length_in_s=20.0))
    assert call(audio_length_in_s=0.1).shape == (1, 1600)
    assert call(audio=noise(1600), strength=0.5).shape == (1, 1600)
    assert call(audio=noise(40), audio_length_in_s=0.1).shape == (1, 1600)


# Streaming


@pytest.mark.parametrize("window_order", ["joint", "sequential"])
def test_a_stream_joined_is_the_whole(call, window_order, shared_pipe):
    options = {"audio_length_in_s": 2.0, "window_length_in_s": WINDOW, "window_order": window_order}
    whole = call(**options)
    stretches = list(shared_pipe("rain", generator=seeds(0)[0], stream=True, **QUICK, **options))
    assert len(stretches) > 4 and all(each.shape[1] > 0 for each in stretches)
    assert np.array_equal(np.concatenate(stretches, axis=1), whole)


def test_a_stream_comes_while_later_windows_are_still_to_come(pipe):
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    stretches = pipe(
        "rain", audio_length_in_s=2.0, window_length_in_s=WINDOW, window_order="sequential", stream=True, **QUICK
    )
    assert not calls
    first = next(stretches)
    assert first.shape[1] > 1000 and len(calls) == QUICK["num_inference_steps"] * 1
    rest = list(stretches)
    assert len(calls) == QUICK["num_inference_steps"] * len(window_starts(52, 8))
    assert first.shape[1] + sum(each.shape[1] for each in rest) == 32000


def test_a_window_goes_on_from_the_one_before(call):
    finished = []
    options = {"audio_length_in_s": 1.0, "window_length_in_s": WINDOW, "window_order": "sequential"}

    def look(pipe, step, timestep, callback_kwargs):
        if step == QUICK["num_inference_steps"] - 1:
            finished.append(callback_kwargs["latents"])
        return {}

    latents = call(output_type="latent", callback_on_step_end=look, **options)
    starts = window_starts(latents.shape[2], 8)
    assert len(finished) == len(starts) == 5
    for start, window in zip(starts, finished):
        assert torch.equal(latents[:, :, start : start + 8], window)


def test_a_stream_frees_its_hooks_even_if_left(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    stretches = pipe("rain", audio_length_in_s=1.0, window_length_in_s=WINDOW, stream=True, **QUICK)
    next(stretches)
    stretches.close()
    assert freed == [True]
