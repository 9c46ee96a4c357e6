import inspect
import logging
import math
import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    LONG,
    MOVING,
    SHORT,
    build_components,
    count_rows,
    golden,
    largest_difference,
    latents_of,
    read_wav,
    seeds,
    set_scheduler,
)
from diffusers import (
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from pipeline_tango import SCHEDULERS, TangoPipeline, log_mel_spectrogram
from pipeline_tango.mel import match_mel_spectrogram


def signal_to_difference_db(signal, other):
    signal, other = np.asarray(signal, np.float64), np.asarray(other, np.float64)
    return 10 * math.log10((signal**2).sum() / ((signal - other) ** 2).sum())


# Parity with the original implementation


@pytest.fixture(scope="module")
def golden_pipe(converted):
    pipe = TangoPipeline.from_pretrained(converted)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def golden_prompts():
    return [
        "A dog barks twice and then a man speaks while birds chirp in the background",
        "Rain falling on a metal roof",
    ]


def use_scheduler(pipe, name):
    pipe = TangoPipeline.from_pipe(pipe)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_states_are_the_originals(golden_pipe, golden_prompts):
    expected = golden("text")
    with torch.no_grad():
        prompt_embeds, mask, negative_prompt_embeds, negative_mask = golden_pipe.encode_prompt(golden_prompts)
    embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
    assert largest_difference(embeds, expected["prompt_embeds"]) < 1e-5
    assert torch.equal(torch.cat([negative_mask, mask]).bool(), expected["prompt_mask"])


def test_text_states_of_an_empty_prompt_and_punctuation_are_the_originals(golden_pipe):
    expected = golden("text")
    prompts = ["A car engine revving", "", "Wind blows, then thunder; a bell rings 3 times!"]
    with torch.no_grad():
        prompt_embeds, mask, *_ = golden_pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert largest_difference(prompt_embeds, expected["extra_hidden_states"]) < 1e-5
    assert torch.equal(mask.bool(), expected["extra_mask"])


def test_takes_of_a_prompt_stand_beside_each_other_as_in_the_original(golden_pipe, golden_prompts):
    expected = golden("text")
    with torch.no_grad():
        prompt_embeds, _, negative_prompt_embeds, _ = golden_pipe.encode_prompt(
            golden_prompts, num_waveforms_per_prompt=2
        )
    rows = expected["two_samples_row_of_one_sample"][0]
    embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
    assert largest_difference(embeds, expected["prompt_embeds"][rows]) < 1e-5


def test_one_unet_call_is_the_originals(golden_pipe):
    text = golden("text")
    latents = golden("sampling")["init_latents"][[1, 1]]
    with torch.no_grad():
        out = golden_pipe.unet(
            latents,
            torch.tensor(501),
            encoder_hidden_states=text["prompt_embeds"][[1, 3]],
            encoder_attention_mask=text["prompt_mask"][[1, 3]],
        ).sample
    assert largest_difference(out, golden("unet_step")["out"]) < 2e-5


def test_ddim_5_steps_of_two_prompts_are_the_originals(golden_pipe, golden_prompts):
    expected = golden("sampling")
    pipe = use_scheduler(golden_pipe, "ddim")
    latents = pipe(
        golden_prompts, num_inference_steps=5, latents=expected["init_latents"], output_type="latent"
    ).audios
    assert pipe.scheduler.timesteps.tolist() == expected["ddim5_timesteps"].tolist()
    assert largest_difference(latents, expected["ddim5_latents"]) < 1e-4


def test_ddim_10_steps_are_the_originals(golden_pipe, golden_prompts):
    expected = golden("sampling")
    pipe = use_scheduler(golden_pipe, "ddim")
    latents = pipe(
        golden_prompts[0], num_inference_steps=10, latents=expected["init_latents"][:1], output_type="latent"
    ).audios
    assert pipe.scheduler.timesteps.tolist() == expected["ddim10_timesteps"].tolist()
    assert largest_difference(latents, expected["ddim10_latents"]) < 1e-4


def test_steps_without_guidance_are_the_originals(golden_pipe, golden_prompts):
    expected = golden("sampling")
    pipe = use_scheduler(golden_pipe, "ddim")
    latents = pipe(
        golden_prompts[1],
        num_inference_steps=3,
        guidance_scale=1.0,
        latents=expected["init_latents"][1:],
        output_type="latent",
    ).audios
    assert largest_difference(latents, expected["ddim3_noguidance_latents"]) < 1e-4


def test_ddpm_4_steps_with_the_stored_noise_are_the_originals(golden_pipe, golden_prompts, monkeypatch):
    # DDPM draws its noise inside the scheduler, so the stored noise stands in for the random stream
    expected = golden("sampling")
    noises = iter(expected["ddpm4_noise"])
    module = sys.modules[type(golden_pipe.scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **kwargs: next(noises).reshape(shape))
    latents = golden_pipe(
        golden_prompts[0], num_inference_steps=4, latents=expected["init_latents"][:1], output_type="latent"
    ).audios
    assert golden_pipe.scheduler.timesteps.tolist() == expected["ddpm4_timesteps"].tolist()
    assert largest_difference(latents, expected["ddpm4_latents"]) < 3e-4


def test_vae_posterior_is_the_originals(golden_pipe):
    expected = golden("vae_encode")
    mel = golden("mel")["fbank_256"].unsqueeze(1)  # (batch, 1, num_frames, num_mel_bins)
    with torch.no_grad():
        posterior = golden_pipe.vae.encode(mel).latent_dist
    assert largest_difference(posterior.mean, expected["mean"]) < 1e-4
    assert largest_difference(posterior.logvar, expected["logvar"]) < 1e-4
    latents = (posterior.mean + posterior.std * expected["noise"]) * golden_pipe.vae.config.scaling_factor
    assert largest_difference(latents, expected["scaled_latent"]) < 1e-4


def test_decoded_mel_is_the_originals(golden_pipe):
    latents = golden("sampling")["ddim5_latents"][:1] / golden_pipe.vae.config.scaling_factor
    with torch.no_grad():
        mel = golden_pipe.vae.decode(latents).sample
    assert largest_difference(mel, golden("decode")["mel"]) < 1e-3


def test_waveform_from_noise_is_the_originals(golden_pipe, golden_prompts):
    expected = golden("decode")
    pipe = use_scheduler(golden_pipe, "ddim")
    audio = pipe(golden_prompts, num_inference_steps=5, latents=golden("sampling")["init_latents"]).audios
    assert audio.shape == (2, 163840)
    original = expected["waveform"][0, :163840]  # the original's last 32 samples are beyond the 10.24 s
    assert largest_difference(audio[0], original) < 1e-3
    assert signal_to_difference_db(original, audio[0]) > 60
    original_int16 = expected["waveform_int16_first_40000"][0].numpy().astype(int)
    assert np.abs(np.trunc(audio[0, :40000] * 32768) - original_int16).max() <= 33  # 1e-3 of full scale


# Lengths


@pytest.mark.parametrize("seconds", [0.0001, 0.0201, 0.1, 0.31999, 0.32, 0.32001, 1, 1.23456])
def test_sample_count_is_exact_for_awkward_lengths(pipe, seconds):
    audio = pipe("rain", num_inference_steps=1, audio_length_in_s=seconds).audios
    assert audio.shape == (1, round(seconds * 16000))
    assert audio.dtype == np.float32
    assert np.abs(audio).max() <= 1


def test_default_length_is_the_checkpoints_and_survives_saving(components, tmp_path):
    TangoPipeline(**components, default_audio_length_in_s=0.5).save_pretrained(tmp_path / "model")
    pipe = TangoPipeline.from_pretrained(tmp_path / "model")
    assert pipe.config.default_audio_length_in_s == 0.5
    assert pipe("rain", num_inference_steps=1).audios.shape == (1, 8000)
    assert TangoPipeline(**components).config.default_audio_length_in_s == 10.24


def test_default_steps_and_guidance_are_the_checkpoints_and_survive_saving(components, tmp_path):
    defaults = {"default_num_inference_steps": 2, "default_guidance_scale": 1.5}
    defaults["default_guidance_interval"] = (0.0, 0.5)
    TangoPipeline(**components, **defaults).save_pretrained(tmp_path / "model")
    pipe = TangoPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)

    def make(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe("rain", audio_length_in_s=0.3, generator=generator, output_type="latent", **kwargs).audios

    assert torch.equal(make(), make(num_inference_steps=2, guidance_scale=1.5, guidance_interval=(0, 0.5)))
    assert not torch.equal(make(), make(num_inference_steps=3))
    assert not torch.equal(make(), make(guidance_scale=3.0))
    assert not torch.equal(make(), make(guidance_interval=(0.0, 1.0)))
    original = TangoPipeline(**components).config
    defaults = (original.default_num_inference_steps, original.default_guidance_scale, original.num_noise_channels)
    assert defaults == (100, 3.0, 0) and original.num_mel_corrections == 0
    assert original.default_guidance_interval == (0.0, 1.0)


def test_the_vocoders_levels_are_corrected_if_the_checkpoint_says_so(components):
    plain, corrected = (TangoPipeline(**components, num_mel_corrections=number) for number in (0, 2))
    mel = log_mel_spectrogram(read_wav("b.wav", 8000)[None])[:, None, :48]
    expected = match_mel_spectrogram(plain.mel_spectrogram_to_waveform(mel), mel[:, 0], num_iterations=2)
    torch.testing.assert_close(corrected.mel_spectrogram_to_waveform(mel), expected.clamp(-1, 1))


def test_noise_channels_reach_the_vocoder_and_come_from_the_generators(components):
    config = SpeechT5HifiGanConfig.from_dict(components["vocoder"].config.to_dict() | {"model_in_dim": 64 + 5})
    components["vocoder"] = SpeechT5HifiGan(config).eval()
    pipe = TangoPipeline(**components, num_noise_channels=5, default_num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    heard = []
    pipe.vocoder.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0]))
    shape = (2, *pipe._latent_shape(64))
    latents = torch.randn(shape[1:], generator=torch.Generator().manual_seed(1)).expand(shape)

    def make(*seeds, **kwargs):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompt = ["rain"] * len(seeds)
        return pipe(prompt, latents=latents[: len(seeds)].clone(), generator=generator, eta=0.0, **kwargs).audios

    both = make(3, 4)
    first, second = heard.pop()
    torch.testing.assert_close(first[:, :64], second[:, :64])  # the same latents
    noise = torch.cat([first[:, 64:], second[:, 64:]], dim=1)  # two draws
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    assert torch.corrcoef(noise.T).sub(torch.eye(10)).abs().max() < 0.3
    np.testing.assert_allclose(make(4)[0], both[1], atol=1e-5)
    heard.clear()
    make(3, window_length_in_s=0.64)  # in windows: the noise goes on from one to the next
    windowed = torch.cat([each[0, :, 64:] for each in heard])
    assert len(windowed.unique(dim=0)) == 256


def test_length_follows_given_latents(pipe):
    latents = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    assert pipe("rain", num_inference_steps=1, latents=latents).audios.shape == (1, 12 * 4 * 160)


# Relations


def test_a_clip_is_the_same_whatever_batch_it_rides_in(pipe):
    prompts = ["rain", "a dog barks twice and then a man speaks while birds chirp in the background", "bell"]
    together = pipe(prompts, generator=seeds(1, 2, 3), output_type="latent", **SHORT).audios
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, generator=seeds(i + 1), output_type="latent", **SHORT).audios
        assert largest_difference(alone[0], together[i]) < 1e-4


def test_the_mask_reaches_the_unet(pipe):
    # without it the padding that a longer neighbour brings would change the clip
    with torch.no_grad():
        embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(["rain", "a dog barks and a bell rings"])
    conditions = {
        "prompt_embeds": embeds[:1],
        "negative_prompt_embeds": negative_embeds[:1],
        "negative_attention_mask": negative_mask[:1],
    }
    masked = pipe(**conditions, attention_mask=mask[:1], generator=seeds(0), output_type="latent", **SHORT).audios
    unmasked = pipe(
        **conditions, attention_mask=torch.ones_like(mask[:1]), generator=seeds(0), output_type="latent", **SHORT
    ).audios
    assert largest_difference(masked, unmasked) > 1e-2


def test_prompt_embeds_give_what_the_prompt_gives(pipe):
    prompts = {"prompt": ["rain", "a dog barks"], "negative_prompt": "wind and a bell that rings for ever"}
    expected = pipe(**prompts, generator=seeds(1, 2), output_type="latent", **SHORT).audios
    names = ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask")
    with torch.no_grad():
        conditions = dict(zip(names, pipe.encode_prompt(**prompts)))
    assert len({tensor.shape[1] for tensor in conditions.values()}) == 1  # padded to the longer of the two
    assert torch.equal(pipe(**conditions, generator=seeds(1, 2), output_type="latent", **SHORT).audios, expected)
    del conditions["negative_prompt_embeds"], conditions["negative_attention_mask"]
    mixed = pipe(
        **conditions, negative_prompt=prompts["negative_prompt"], generator=seeds(1, 2), output_type="latent", **SHORT
    ).audios
    assert largest_difference(mixed, expected) < 1e-5


def test_negative_embeds_of_another_length_than_the_prompt_are_padded(pipe):
    with torch.no_grad():
        _, _, embeds, mask = pipe.encode_prompt("x", negative_prompt="wind and a bell that rings for ever")
    expected = pipe(
        "rain",
        negative_prompt="wind and a bell that rings for ever",
        generator=seeds(0),
        output_type="latent",
        **SHORT,
    ).audios
    given_embeds = pipe(
        "rain",
        negative_prompt_embeds=embeds,
        negative_attention_mask=mask,
        generator=seeds(0),
        output_type="latent",
        **SHORT,
    ).audios
    assert largest_difference(given_embeds, expected) < 1e-5


def test_encode_prompt_works_without_the_other_components(components):
    text_only = dict.fromkeys(components) | {name: components[name] for name in ("text_encoder", "tokenizer")}
    no_text = components | {"text_encoder": None, "tokenizer": None}
    names = re.findall(r"return (.+)", inspect.getsource(TangoPipeline.encode_prompt))
    assert len(names) == 1  # one return of plain names: what diffusers' own tests read off the source
    names = names[0].split(", ")
    with torch.no_grad():
        conditions = dict(zip(names, TangoPipeline(**text_only).encode_prompt("rain", torch.device("cpu"))))
    expected = TangoPipeline(**components)("rain", generator=seeds(0), **SHORT).audios
    audio = TangoPipeline(**no_text)(**conditions, generator=seeds(0), **SHORT).audios
    assert largest_difference(audio, expected) == 0


def test_encode_prompt_can_be_trained_through(pipe):
    prompt_embeds, *_ = pipe.encode_prompt("rain", do_classifier_free_guidance=False)
    prompt_embeds.sum().backward()
    assert pipe.text_encoder.shared.weight.grad.abs().max() > 0


def test_the_negative_prompt_matters_and_defaults_to_the_empty_one(pipe):
    plain = pipe("rain", generator=seeds(0), output_type="latent", **SHORT).audios
    empty = pipe("rain", negative_prompt="", generator=seeds(0), output_type="latent", **SHORT).audios
    negative = pipe("rain", negative_prompt="thunder", generator=seeds(0), output_type="latent", **SHORT).audios
    assert torch.equal(plain, empty)
    assert largest_difference(plain, negative) > 1e-3


def test_takes_are_prompt_major(pipe):
    audio = pipe(
        ["rain", "dog"], num_waveforms_per_prompt=2, generator=seeds(1, 2, 1, 2), output_type="latent", **SHORT
    ).audios
    for i, (prompt, seed) in enumerate([("rain", 1), ("rain", 2), ("dog", 1), ("dog", 2)]):
        alone = pipe(prompt, generator=seeds(seed), output_type="latent", **SHORT).audios
        assert largest_difference(audio[i], alone[0]) < 1e-4


def test_same_seed_same_sound(pipe):
    first, again, other = (pipe("rain", generator=seeds(s)[0], **SHORT).audios for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert largest_difference(first, other) > 1e-2


def test_the_schedulers_noise_follows_the_generator_not_the_global_seed(pipe):
    torch.manual_seed(1)
    first = pipe("rain", generator=seeds(0), **SHORT).audios
    torch.manual_seed(2)
    assert np.array_equal(first, pipe("rain", generator=seeds(0), **SHORT).audios)


def test_given_latents_are_used_and_not_changed(pipe):
    latents = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    before = latents.clone()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)  # initial sigma is not 1
    drawn = pipe("rain", generator=seeds(0), output_type="latent", **SHORT).audios
    pipe("rain", latents=latents, **SHORT)
    assert torch.equal(latents, before)
    noise = torch.randn(1, 4, 8, 16, generator=seeds(0)[0])
    assert torch.equal(pipe("rain", latents=noise, output_type="latent", **SHORT).audios, drawn)


def test_guidance_is_the_formula_and_costs_nothing_when_off(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    latents = dict.fromkeys((1.0, 2.0, 3.0))
    for scale in latents:
        latents[scale] = pipe(
            "rain",
            num_inference_steps=1,
            audio_length_in_s=0.3,
            guidance_scale=scale,
            generator=seeds(0),
            output_type="latent",
        ).audios
    assert rows == [1, 2, 2]
    # one step is linear in the prediction, and the prediction in the scale
    assert largest_difference(latents[3.0] - latents[2.0], latents[2.0] - latents[1.0]) < 1e-4


def test_guidance_rescale_keeps_the_spread_of_the_conditional_prediction(pipe):
    def prediction(**kwargs):
        # x_0 prediction at one DDIM step from pure noise reveals the guided model output
        seen = []
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda model_output, *args, **kw: (
            seen.append(model_output),
            step(model_output, *args, **kw),
        )[1]
        pipe("rain", num_inference_steps=1, audio_length_in_s=0.3, generator=seeds(0), **kwargs)
        pipe.scheduler.step = step
        return seen[0]

    text = prediction(guidance_scale=1.0)
    assert prediction(guidance_scale=9.0).std() > 1.1 * text.std()
    assert torch.isclose(prediction(guidance_scale=9.0, guidance_rescale=1.0).std(), text.std(), rtol=1e-4)


def test_vae_slicing_changes_nothing(pipe):
    plain = pipe(["rain", "dog"], generator=seeds(1, 2), **SHORT).audios
    pipe.vae.enable_slicing()
    assert largest_difference(pipe(["rain", "dog"], generator=seeds(1, 2), **SHORT).audios, plain) < 1e-4


def test_output_types_agree(pipe):
    array = pipe("rain", generator=seeds(0), output_type="np", **SHORT).audios
    tensor = pipe("rain", generator=seeds(0), output_type="pt", **SHORT).audios
    (in_tuple,) = pipe("rain", generator=seeds(0), return_dict=False, **SHORT)
    (latents,) = pipe("rain", generator=seeds(0), output_type="latent", return_dict=False, **SHORT)
    assert np.array_equal(array, tensor.numpy()) and np.array_equal(array, in_tuple)
    with torch.no_grad():
        mel = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        assert torch.equal(pipe.mel_spectrogram_to_waveform(mel)[:, : array.shape[1]], tensor)


# Text limits


@pytest.fixture
def warned(caplog):
    logging.getLogger("diffusers").propagate = True
    with caplog.at_level("WARNING"):
        yield caplog
    logging.getLogger("diffusers").propagate = False


def test_a_prompt_past_the_limit_warns_with_what_was_cut(golden_pipe, warned):
    expected = golden("text")["long_input_ids"]
    prompt = "A dog barks twice and then a man speaks while birds chirp in the background" * 60
    with torch.no_grad():
        embeds, mask, *_ = golden_pipe.encode_prompt(prompt)
    assert embeds.shape[1] == mask.shape[1] == 512
    ids = golden_pipe.tokenizer(prompt, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, expected)
    message = next(record.getMessage() for record in warned.records if "cut off" in record.getMessage())
    assert "512" in message and "birds chirp in the background" in message


def test_a_long_prompt_is_counted_and_quoted_in_a_few_words(golden_pipe, warned):
    with torch.no_grad():
        golden_pipe.encode_prompt(["rain " * 2000] * 2, do_classifier_free_guidance=False)
    (record,) = warned.records
    num_tokens = len(golden_pipe.tokenizer("rain " * 2000, verbose=False).input_ids)
    assert f"has {num_tokens} tokens, of which the text encoder reads 512" in record.getMessage()
    assert len(record.getMessage()) < 500


def test_characters_that_the_tokenizer_does_not_know_are_named(golden_pipe, warned):
    with torch.no_grad():
        golden_pipe.encode_prompt(["雨 rain 🐕 雨", "dog"], negative_prompt="雷")
    messages = [record.getMessage() for record in warned.records]
    assert len(messages) == 2
    assert "does not know 2 character(s) of a prompt: 雨 🐕." in messages[0] and ": 雷." in messages[1]


def test_an_ordinary_prompt_does_not_warn(golden_pipe, warned):
    with torch.no_grad():
        golden_pipe.encode_prompt(["rain", "thunder"], negative_prompt="wind")
    assert not warned.records


def test_loading_does_not_warn(components, tmp_path, warned):
    TangoPipeline(**components, default_guidance_interval=(0.0, 0.5)).save_pretrained(tmp_path)
    TangoPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert not warned.records


# Callbacks


def test_callbacks_get_and_replace_the_declared_tensors(pipe):
    shapes = []

    def zero(pipe, step, timestep, callback_kwargs):
        shapes.append({name: tuple(tensor.shape) for name, tensor in callback_kwargs.items()})
        return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    latents = pipe(
        "rain",
        callback_on_step_end=zero,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
        output_type="latent",
        **SHORT,
    ).audios
    assert not latents.any()
    assert [set(each) for each in shapes] == [{"latents", "prompt_embeds", "attention_mask"}] * 2
    assert shapes[0]["prompt_embeds"][0] == shapes[0]["attention_mask"][0] == 2


def test_a_callback_that_cuts_guidance_halves_the_later_calls(pipe):
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    pipe("rain", num_inference_steps=4, audio_length_in_s=0.3, callback_on_step_end=SDCFGCutoffCallback(0.5))
    assert rows == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="1 rows of `prompt_embeds`"):  # the stock callback keeps one row only
        pipe(
            ["rain", "dog"],
            num_inference_steps=4,
            audio_length_in_s=0.3,
            callback_on_step_end=SDCFGCutoffCallback(0.5),
        )


def test_turning_guidance_off_in_a_callback_works_in_batches(pipe):
    def guidance_off(pipe, step, timestep, callback_kwargs):
        pipe._guidance_scale = 1.0
        return callback_kwargs

    options = {"num_inference_steps": 3, "audio_length_in_s": 0.3, "output_type": "latent"}
    together = pipe(["rain", "dog"], generator=seeds(1, 2), callback_on_step_end=guidance_off, **options).audios
    alone = pipe("dog", generator=seeds(2), callback_on_step_end=guidance_off, **options).audios
    assert largest_difference(together[1], alone[0]) < 1e-4


def test_no_tensor_names_are_the_default_ones(pipe):
    seen = []
    pipe(
        "rain",
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(list(tensors)),
        callback_on_step_end_tensor_inputs=None,
        **SHORT,
    )
    assert seen == [["latents"]] * 2


def test_interrupt_stops_the_steps(pipe):
    steps = []

    def stop(pipe, step, timestep, callback_kwargs):
        steps.append(step)
        pipe._interrupt = step == 1
        return callback_kwargs

    audio = pipe("rain", num_inference_steps=5, audio_length_in_s=0.3, callback_on_step_end=stop).audios
    assert steps == [0, 1] and audio.shape == (1, 4800)
    assert len(pipe("rain", **SHORT).audios) == 1 and not pipe.interrupt  # reset at each call


# dtypes, casting, offloading, compiling


def test_component_dtypes_may_differ(pipe):
    expected = pipe("rain", generator=seeds(0), **SHORT).audios
    pipe.unet.to(torch.bfloat16)
    pipe.vae.to(torch.float16)
    audio = pipe("rain", generator=seeds(0), **SHORT).audios
    assert audio.dtype == np.float32
    assert signal_to_difference_db(expected, audio) > 10
    pipe.unet.to(torch.float32)
    pipe.vae.to(torch.float32)
    pipe.text_encoder.to(torch.bfloat16)
    pipe.vocoder.to(torch.bfloat16)
    assert signal_to_difference_db(expected, pipe("rain", generator=seeds(0), **SHORT).audios) > 10


def test_the_noise_is_the_same_in_every_precision(pipe):
    first = []
    for dtype in (torch.float32, torch.bfloat16):
        pipe.unet.to(dtype)
        pipe.unet.register_forward_pre_hook(lambda module, args, kw: first.append(args[0].float()), with_kwargs=True)
        pipe("rain", num_inference_steps=1, audio_length_in_s=0.3, generator=seeds(0))
    assert largest_difference(first[0], first[-1]) < 0.02  # bfloat16 rounding of the same numbers


def test_layerwise_casting_of_every_model(pipe):
    expected = pipe("rain", generator=seeds(0), **SHORT).audios
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for model in (pipe.text_encoder, pipe.vocoder):
        apply_layerwise_casting(
            model,
            torch.float8_e4m3fn,
            torch.float32,
            skip_modules_pattern=("norm", "shared", "relative_attention", "wo"),
        )  # T5 itself casts its states to the dtype of `wo`
    assert pipe.vocoder.conv_pre.weight.dtype == torch.float8_e4m3fn
    audio = pipe("rain", generator=seeds(0), **SHORT).audios
    assert audio.dtype == np.float32 and np.isfinite(audio).all()
    assert np.corrcoef(expected[0], audio[0])[0, 1] > 0.5


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42"), reason="needs an accelerator before diffusers 0.42"
)
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_gives_the_same_sound(pipe, offload_type):
    expected = pipe("rain", generator=seeds(0), **SHORT).audios
    options = {"onload_device": torch.device("cpu"), "offload_type": offload_type, "num_blocks_per_group": 1}
    pipe.unet.enable_group_offload(**options)
    for model in (pipe.text_encoder, pipe.vae, pipe.vocoder):
        apply_group_offloading(model, **(options | {"offload_type": "leaf_level"}))
    assert np.array_equal(pipe("rain", generator=seeds(0), **SHORT).audios, expected)


def test_every_model_is_in_the_offload_sequence(pipe):
    models = {name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)}
    assert models == set(pipe.model_cpu_offload_seq.split("->"))


def test_model_offload_hooks_are_freed_whatever_the_output(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    for output_type in ("np", "pt", "latent"):
        pipe("rain", output_type=output_type, **SHORT)
    assert len(freed) == 3


def test_the_call_changes_no_mode_dtype_or_config(pipe):
    def state():
        modules = [(name, m.training, m.dtype) for name, m in pipe.components.items() if hasattr(m, "dtype")]
        return modules, [dict(m.config) for m in (pipe.unet, pipe.vae)], dict(pipe.scheduler.config), dict(pipe.config)

    before = state()
    pipe("rain", **SHORT)
    assert state() == before


def test_a_compiled_unet_gives_the_same_sound(pipe):
    expected = pipe("rain", generator=seeds(0), output_type="latent", **SHORT).audios
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    compiled = pipe("rain", generator=seeds(0), output_type="latent", **SHORT).audios
    assert largest_difference(compiled, expected) < 1e-5


def test_a_unet_that_reads_the_guidance_weight_gets_no_second_pass(components):
    torch.manual_seed(0)
    components["unet"] = UNet2DConditionModel.from_config(components["unet"].config, time_cond_proj_dim=8).eval()
    pipe = TangoPipeline(**components)
    rows = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    weak, strong = (
        pipe("rain", guidance_scale=w, generator=seeds(0), output_type="latent", **SHORT).audios for w in (2.0, 8.0)
    )
    assert set(rows) == {1}
    assert largest_difference(weak, strong) > 1e-4


# Silence and NaN


def test_nan_out_of_the_models_is_an_error(pipe):
    with torch.no_grad():
        pipe.vocoder.conv_post.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinity in waveform"):
        pipe("rain", **SHORT)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        pipe("rain", output_type="latent", **SHORT)


def test_nan_is_explained_by_the_dtypes_in_use(pipe):
    with torch.no_grad():
        pipe.vocoder.conv_post.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="'vocoder': 'float32'.*Weights") as raised:
        pipe("rain", **SHORT)
    assert "float16" not in str(raised.value)
    pipe.vae.to(torch.float16)
    with pytest.raises(RuntimeError, match=r"float16 overflows.*bfloat16 or float32 for \['vae'\]"):
        pipe("rain", **SHORT)


def test_silence_out_of_the_models_is_a_warning(pipe, caplog):
    with torch.no_grad():
        for parameter in pipe.vocoder.conv_post.parameters():
            parameter.zero_()
    logging.getLogger("pipeline_tango").propagate = True
    with caplog.at_level("WARNING"):
        pipe(["rain", "dog"], **SHORT)
    assert "Waveform(s) [0, 1] are silent" in caplog.text


# Any input


@settings(max_examples=15, deadline=None)
@given(
    seconds=st.floats(1e-4, 0.5),
    num_inference_steps=st.integers(1, 3),
    guidance_scale=st.floats(-2, 12),
    prompt=st.one_of(st.text(max_size=40), st.lists(st.text(max_size=20), min_size=1, max_size=2)),
    num_waveforms_per_prompt=st.integers(1, 2),
)
def test_any_good_input_gives_the_promised_shape(shared_pipe, prompt, seconds, num_waveforms_per_prompt, **options):
    audio = shared_pipe(
        prompt, audio_length_in_s=seconds, num_waveforms_per_prompt=num_waveforms_per_prompt, **options
    ).audios
    num_prompts = 1 if isinstance(prompt, str) else len(prompt)
    assert audio.shape == (num_prompts * num_waveforms_per_prompt, round(seconds * 16000))
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1


# Saving and loading


def test_a_saved_pipeline_loads_to_the_same_sound(pipe, tiny_folder):
    expected = pipe("rain", generator=seeds(0), **SHORT).audios
    loaded = TangoPipeline.from_pretrained(tiny_folder)
    assert np.array_equal(loaded("rain", generator=seeds(0), **SHORT).audios, expected)
    index = (tiny_folder / "model_index.json").read_text()
    assert '"_class_name": "TangoPipeline"' in index
    assert not list(tiny_folder.rglob("*.bin"))


def test_variants_load_by_name(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    loaded = TangoPipeline.from_pretrained(tmp_path / "model", variant="fp16", dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    with pytest.raises(Exception, match="variant|found"):
        TangoPipeline.from_pretrained(tmp_path / "model")


def test_dtypes_can_be_given_per_component(tiny_folder):
    pipe = TangoPipeline.from_pretrained(tiny_folder, dtype={"unet": torch.bfloat16, "default": torch.float32})
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    assert np.isfinite(pipe("rain", **SHORT).audios).all()


def test_from_pipe_shares_the_components(pipe):
    other = TangoPipeline.from_pipe(pipe, default_audio_length_in_s=0.3)
    assert other.unet is pipe.unet and other.vocoder is pipe.vocoder
    assert other.config.default_audio_length_in_s == 0.3


# Guidance on a part of the steps


def test_guidance_on_all_steps_is_the_default(pipe):
    assert torch.equal(latents_of(pipe, guidance_interval=(0.0, 1.0)), latents_of(pipe))


def test_the_unconditional_half_is_computed_inside_the_interval_only(pipe):
    rows = count_rows(pipe.unet.conv_in)
    latents_of(pipe, ["rain", "dog"], num_inference_steps=10, guidance_interval=(0.2, 0.6))
    assert rows == [2, 2, 4, 4, 4, 4, 2, 2, 2, 2]


def test_after_the_interval_the_prediction_is_the_conditional_one(pipe):
    expected = latents_of(pipe, callback_on_step_end=SDCFGCutoffCallback(0.5))  # turns it off after step 2 of 0 to 3
    assert torch.equal(latents_of(pipe, guidance_interval=(0.0, 0.7)), expected)
    assert not torch.equal(latents_of(pipe), expected)


def test_before_the_interval_nothing_is_guided(pipe):
    def first_steps(**options):
        steps = []
        callback = lambda pipe, i, t, tensors: steps.append(tensors["latents"]) or {}  # noqa: E731
        latents_of(pipe, callback_on_step_end=callback, **options)
        return steps

    late, never = first_steps(guidance_interval=(0.5, 1.0)), first_steps(guidance_scale=1.0)
    assert [torch.equal(a, b) for a, b in zip(late, never)] == [True] * 2 + [False] * 2


@pytest.mark.parametrize(
    "name, config, num_inference_steps, expected",
    [
        ("heun", {}, 4, [1, 1, 2, 2, 1, 1, 1]),
        ("pndm", {"skip_prk_steps": True}, 4, [1, 1, 2, 1, 1]),
        ("pndm", {"skip_prk_steps": False}, 8, [1] * 4 * 2 + [2] * 4 + [2] + [1] * 4),
    ],
)
def test_all_evaluations_of_a_step_are_guided_or_none(pipe, name, config, num_inference_steps, expected):
    set_scheduler(pipe, name, **config)
    rows = count_rows(pipe.unet.conv_in)
    latents_of(pipe, num_inference_steps=num_inference_steps, guidance_interval=(0.25, 0.5))
    assert rows == expected


def test_the_interval_is_of_the_steps_that_strength_leaves(pipe):
    set_scheduler(pipe, "ddim")
    rows = count_rows(pipe.unet.conv_in)
    audio = torch.sin(torch.arange(4800) / 5)
    options = {"num_inference_steps": 6, "strength": 0.5, "guidance_interval": (0.0, 0.4)}
    latents_of(pipe, audio=audio, audio_sampling_rate=16000, **options)
    assert rows == [2, 2, 1]


def test_windows_and_moving_prompts_have_an_interval(pipe):
    rows = count_rows(pipe.unet.conv_in)
    latents_of(pipe, MOVING, num_inference_steps=2, guidance_interval=(0.5, 1.0), **LONG)
    assert rows == [2] * 3 + [3] * 3


@pytest.mark.parametrize("option", ["guidance_scale", "guidance_interval"])
def test_unguided_steps_are_not_rescaled(pipe, option):
    options = {"guidance_scale": {"guidance_scale": 1.0}, "guidance_interval": {"guidance_interval": (0.9, 1.0)}}
    latents = latents_of(pipe, guidance_rescale=0.7, **options[option])  # 3 / 4 < 0.9: not one guided step
    assert torch.equal(latents, latents_of(pipe, guidance_scale=1.0))


def test_the_interval_has_no_effect_without_guidance_and_on_distilled_unets(components):
    torch.manual_seed(0)
    plain = TangoPipeline(**components)
    unet = UNet2DConditionModel.from_config(components["unet"].config, time_cond_proj_dim=8).eval()
    for pipe, guidance_scale in ((plain, 1.0), (TangoPipeline(**components | {"unet": unet}), 4.0)):
        latents = latents_of(pipe, guidance_scale=guidance_scale, guidance_interval=(0.0, 0.5))
        assert torch.equal(latents, latents_of(pipe, guidance_scale=guidance_scale))


@pytest.mark.parametrize("in_place", [True, False])
def test_text_that_a_callback_changes_is_read_in_the_next_step(pipe, in_place):
    def forget(pipe, i, t, tensors):
        if in_place:
            tensors["prompt_embeds"].zero_()
            return {}
        return {"prompt_embeds": torch.zeros_like(read[0])}

    read = []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    names = ["prompt_embeds"] if in_place else ["latents"]
    latents_of(pipe, callback_on_step_end=forget, callback_on_step_end_tensor_inputs=names)
    assert [bool(each.any()) for each in read] == [True, False, False, False]


# No work twice, no waiting


def test_each_text_is_encoded_once(pipe):
    rows = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True
    )
    prompts = ["rain", "dog", "rain", "a dog and rain"]
    with torch.no_grad():
        outputs = pipe.encode_prompt(prompts, num_waveforms_per_prompt=2)
    assert rows == [3, 1]
    for prompt_row, prompt in enumerate(prompts):
        with torch.no_grad():
            alone = pipe.encode_prompt(prompt)
        for take in range(2):
            for together, each in zip(outputs, alone):
                num_tokens = each.shape[1]
                assert torch.allclose(together[2 * prompt_row + take, :num_tokens], each[0], atol=1e-5)
    rows.clear()
    latents_of(pipe, MOVING, num_inference_steps=1, num_waveforms_per_prompt=3, **LONG)
    assert rows == [2, 1]


@pytest.mark.parametrize("scheduler, cached", [("ddpm", False), ("dpm++", True), ("heun", True)])
def test_no_step_waits_for_the_device(scheduler, cached):
    # a tensor on the meta device has no values: reading one raises, where a GPU would be waited for
    components = build_components()
    names = ("prompt_embeds", "attention_mask", "negative_prompt_embeds", "negative_attention_mask")
    with torch.no_grad():
        texts = dict(zip(names, TangoPipeline(**components).encode_prompt(["rain", "dog"])))
    for name in ("unet", "vae", "vocoder"):
        components[name].to("meta")
    pipe = TangoPipeline(**components | {"text_encoder": None})
    set_scheduler(pipe, scheduler)
    if cached:
        pipe.enable_deep_cache(2)
    steps = []
    options = {"callback_on_step_end": lambda pipe, i, t, tensors: steps.append(i) or {}, **texts}
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pipe(num_inference_steps=3, guidance_interval=(0.0, 0.5), output_type="latent", **options)
    assert steps == list(range(pipe.num_timesteps))  # all of them are done before the result is looked at
