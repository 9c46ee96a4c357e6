import inspect
import logging
import math
import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import GOLDENS, build_components, golden
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers import schedulers as diffusers_schedulers
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from scipy.io import wavfile
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from pipeline_tango import SCHEDULERS, TangoPipeline, log_mel_spectrogram
from pipeline_tango.mel import match_mel_spectrogram


SHORT = {"num_inference_steps": 2, "audio_length_in_s": 0.3}


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def largest_difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


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


# Mel front end


def read_wav(name, num_samples=None):
    _, samples = wavfile.read(GOLDENS / "golden" / "wav" / name)
    return torch.from_numpy(samples[:num_samples].astype(np.float32) / 32768)


def normalise_as_the_original(waveform, num_samples):
    waveform = waveform - waveform.mean()
    waveform = 0.5 * waveform / (waveform.abs().max() + 1e-8)
    waveform = torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))  # negative padding cuts
    return 0.5 * waveform / waveform.abs().max()


def assert_same_mel(mel, expected):
    """Within 1e-4 wherever a band is above the rounding noise of the original's own float32 sums, and within 3e-6 of
    linear magnitude everywhere: a logarithm near the floor of 1e-5 magnifies 1e-8 of a loud neighbour to 1e-3."""
    assert mel.shape == expected.shape
    audible = expected.exp() > 3e-3
    if audible.any():
        assert largest_difference(mel[audible], expected[audible]) < 1e-4
    assert largest_difference(mel.exp(), expected.exp()) < 3e-6


def test_log_mel_spectrogram_is_the_originals():
    expected = golden("mel")
    mel = log_mel_spectrogram(read_wav("b.wav", 8000)[None])
    assert_same_mel(mel, expected["raw_mel"].transpose(1, 2)[:, :50])


def test_log_mel_spectrogram_of_normalised_files_is_the_originals():
    expected = golden("mel")
    waveform = torch.stack([normalise_as_the_original(read_wav(name), 40960) for name in ("a.wav", "b.wav")])
    assert torch.equal(waveform[:, :1000], expected["waveform_256_first_1000"])
    assert_same_mel(log_mel_spectrogram(waveform), expected["fbank_256"])
    assert_same_mel(log_mel_spectrogram(expected["waveform_c_64"]), expected["fbank_c_64"])
    padded = normalise_as_the_original(read_wav("a.wav"), 163840)
    mel = log_mel_spectrogram(padded[None])
    assert mel.shape == (1, 1024, 64)
    assert_same_mel(mel[:, 280:330], expected["fbank_1024_frames_280_to_330"])
    assert_same_mel(mel[:, -4:], expected["fbank_1024_last_4"])


def test_log_mel_spectrogram_is_as_near_to_exact_arithmetic_as_the_original():
    expected = golden("mel")
    waveform = read_wav("b.wav", 8000)[None]
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(waveform.double(), 1024, 160, window=window, pad_mode="reflect", return_complex=True)
    mel_basis = expected["mel_basis"].double()
    exact = (mel_basis @ spectrum.abs()).clamp(min=1e-5).log().transpose(1, 2)[:, :50]
    original = expected["raw_mel"].transpose(1, 2)[:, :50]
    assert largest_difference(log_mel_spectrogram(waveform), exact) < 2 * largest_difference(original, exact)


def test_a_sine_peaks_in_the_mel_band_of_its_frequency():
    librosa = pytest.importorskip("librosa")
    centres = librosa.mel_frequencies(66, fmin=0, fmax=8000)[1:-1]
    time = torch.arange(16000) / 16000
    for frequency in (200.0, 1000.0, 5000.0):
        mel = log_mel_spectrogram(0.5 * torch.sin(2 * math.pi * frequency * time)[None])[0, 50]
        assert int(mel.argmax()) == int(np.abs(centres - frequency).argmin())


def test_silence_is_the_floor():
    assert torch.allclose(log_mel_spectrogram(torch.zeros(2, 1600)), torch.tensor(math.log(1e-5)))


@pytest.mark.parametrize("num_samples", [513, 1599, 1600, 1601])
def test_there_is_one_frame_for_each_started_hop(num_samples):
    assert log_mel_spectrogram(torch.zeros(1, num_samples)).shape == (1, math.ceil(num_samples / 160), 64)


@pytest.mark.parametrize("waveform", [torch.zeros(1600), torch.zeros(1, 512), torch.zeros(1, 1600).int(), [0.0]])
def test_log_mel_spectrogram_refuses_what_is_no_waveform(waveform):
    with pytest.raises(ValueError, match="`waveform`"):
        log_mel_spectrogram(waveform)


def test_log_mel_spectrogram_has_gradients():
    waveform = torch.randn(1, 1600, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_mel_spectrogram(waveform).sum().backward()
    assert torch.isfinite(waveform.grad).all() and waveform.grad.abs().max() > 0


def test_a_waveform_is_matched_to_a_mel_spectrogram():
    recording = read_wav("b.wav", 8000)[None]
    mel = log_mel_spectrogram(recording)
    noise = 0.1 * torch.randn(recording.shape, generator=torch.Generator().manual_seed(0))

    def error(waveform):
        difference = (log_mel_spectrogram(waveform) - mel)[mel > mel.max() - 5]  # 43 dB below the loudest
        return difference.abs().mean(), difference.mean()

    first, once, more = (error(match_mel_spectrogram(noise, mel, num_iterations)) for num_iterations in (0, 1, 8))
    assert torch.equal(match_mel_spectrogram(noise, mel, 0), noise)
    assert first[0] > 0.8 and once[0] < 0.5 * first[0] and more[0] < 0.5 * once[0]
    assert abs(more[1]) < 0.1 < abs(first[1])
    kept = match_mel_spectrogram(recording, mel)  # nothing to do; rounding moves what is far below the rest
    assert (log_mel_spectrogram(kept) - mel)[mel > -7].abs().mean() < 0.01


@pytest.mark.parametrize("frequency", [300, 400, 1000])
def test_a_partial_comes_out_of_noise(frequency):
    tone = 0.3 * torch.sin(2 * math.pi * frequency * torch.arange(16000) / 16000)[None]
    noise = 0.1 * torch.randn(tone.shape, generator=torch.Generator().manual_seed(0))

    def share_near(waveform):
        power = torch.fft.rfft(waveform[0]).abs().square()  # in steps of 1 Hz
        return power[frequency - 20 : frequency + 20].sum() / power.sum()

    once, more = (match_mel_spectrogram(noise, log_mel_spectrogram(tone), number) for number in (1, 8))
    assert share_near(once) < 0.8 and share_near(more) > 0.93


def test_matching_keeps_phases_and_lengths():
    time = torch.arange(16033) / 16000
    tone = torch.sin(2 * math.pi * 1000 * time)[None]
    mel = log_mel_spectrogram(0.1 * tone[:, :16000])
    matched = match_mel_spectrogram(tone, mel)
    assert matched.shape == tone.shape and matched.dtype == torch.float32
    assert (matched - 0.1 * tone)[:, 1000:-1000].abs().max() < 3e-3
    silence = match_mel_spectrogram(torch.zeros(2, 1600), mel[:, :10].expand(2, -1, -1))
    assert torch.equal(silence, torch.zeros(2, 1600))


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


def test_an_ordinary_prompt_does_not_warn(golden_pipe, warned):
    with torch.no_grad():
        golden_pipe.encode_prompt(["rain", "thunder"], negative_prompt="wind")
    assert not warned.records


def test_loading_does_not_warn(components, tmp_path, warned):
    TangoPipeline(**components, default_guidance_interval=(0.0, 0.5)).save_pretrained(tmp_path)
    TangoPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert not warned.records


# Schedulers


def all_schedulers():
    return [scheduler.name for scheduler in KarrasDiffusionSchedulers] + ["LCMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("name", all_schedulers())
def test_every_scheduler_runs_by_from_config(pipe, name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler = getattr(diffusers_schedulers, name).from_config(pipe.scheduler.config)
    calls, steps = [], []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: calls.append(args[1]), with_kwargs=True)

    def count(pipe, step, timestep, callback_kwargs):
        steps.append(step)
        return callback_kwargs

    audio = pipe(
        ["rain", "dog"],
        num_inference_steps=4,
        audio_length_in_s=0.3,
        generator=seeds(1, 2),
        callback_on_step_end=count,
    ).audios
    assert np.isfinite(audio).all() and np.abs(audio).max() > 0.01
    assert largest_difference(audio[0], audio[1]) > 1e-3
    assert steps == list(range(len(pipe.scheduler.timesteps))) and len(calls) == pipe.num_timesteps
    if pipe.scheduler.config.prediction_type != "v_prediction":
        pytest.fail("the prediction type was lost on the way")


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc", "heun", "pndm"])
def test_many_steps_of_deterministic_schedulers_converge_to_one_sound(pipe, name):
    # the probability-flow ODE has one solution: schedulers that solve it agree when steps are small
    def run(scheduler, num_inference_steps):
        pipe.scheduler = scheduler.from_config(config, timestep_spacing="trailing")
        return pipe(
            "rain",
            num_inference_steps=num_inference_steps,
            audio_length_in_s=0.3,
            generator=seeds(0),
            output_type="latent",
        ).audios

    config = pipe.scheduler.config
    reference = run(DPMSolverMultistepScheduler, 200)
    coarse = run(SCHEDULERS["ddim"], 2)
    fine = run(SCHEDULERS[name], 100)
    assert (fine - reference).std() < 0.3 * (coarse - reference).std()


def test_flow_matching_schedulers_get_a_clear_error(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler`.*flow-matching"):
        pipe("rain", **SHORT)
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="`scheduler`.*flow_prediction"):
        pipe("rain", **SHORT)


def test_custom_timesteps_and_sigmas(pipe):
    config = pipe.scheduler.config
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(int(args[1])), with_kwargs=True)
    pipe("rain", timesteps=[900, 500, 100], audio_length_in_s=0.3)
    assert seen == [900, 500, 100]
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    assert np.isfinite(pipe("rain", sigmas=[14.0, 3.0, 0.5, 0.0], audio_length_in_s=0.3).audios).all()
    pipe.scheduler = SCHEDULERS["ddim"].from_config(config)
    with pytest.raises(ValueError, match="`timesteps` cannot be set"):
        pipe("rain", timesteps=[900, 500, 100], audio_length_in_s=0.3)


def test_1000_steps_that_would_start_beyond_training_are_refused(pipe):
    with pytest.raises(ValueError, match="`num_inference_steps` of 1000"):
        pipe("rain", num_inference_steps=1000, audio_length_in_s=0.3)


def test_too_few_steps_for_pndms_warm_up_are_refused(pipe):
    pipe.scheduler = SCHEDULERS["pndm"].from_config(pipe.scheduler.config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="`num_inference_steps`.*at least 4"):
        pipe("rain", num_inference_steps=3, audio_length_in_s=0.3)
    pipe.scheduler = SCHEDULERS["pndm"].from_config(pipe.scheduler.config, skip_prk_steps=True)
    assert np.isfinite(pipe("rain", num_inference_steps=1, audio_length_in_s=0.3).audios).all()


def test_eta_reaches_ddim_and_leaves_tcd_its_own_default(pipe):
    config = pipe.scheduler.config
    for name, explicit in (("DDIMScheduler", 0.0), ("TCDScheduler", 0.3)):
        pipe.scheduler = getattr(diffusers_schedulers, name).from_config(config)
        runs = {
            eta: pipe("rain", eta=eta, generator=seeds(0), output_type="latent", **SHORT).audios
            for eta in (None, explicit, 0.9)
        }
        assert torch.equal(runs[None], runs[explicit])
        assert largest_difference(runs[None], runs[0.9]) > 1e-3


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


def test_silence_out_of_the_models_is_a_warning(pipe, caplog):
    with torch.no_grad():
        for parameter in pipe.vocoder.conv_post.parameters():
            parameter.zero_()
    logging.getLogger("pipeline_tango").propagate = True
    with caplog.at_level("WARNING"):
        pipe(["rain", "dog"], **SHORT)
    assert "Waveform(s) [0, 1] are silent" in caplog.text


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


@pytest.fixture(scope="module")
def guarded_pipe():
    """A pipeline whose models must not run."""
    pipe = TangoPipeline(**build_components())
    for model in (pipe.text_encoder, pipe.unet, pipe.vae, pipe.vocoder):
        model.register_forward_pre_hook(lambda *args: pytest.fail("a model ran before the inputs were checked"))
    return pipe


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


@settings(max_examples=15, deadline=None)
@given(
    seconds=st.floats(1e-4, 0.5),
    num_inference_steps=st.integers(1, 3),
    guidance_scale=st.floats(-2, 12),
    prompt=st.one_of(st.text(max_size=40), st.lists(st.text(max_size=20), min_size=1, max_size=2)),
    num_waveforms_per_prompt=st.integers(1, 2),
)
def test_any_good_input_gives_the_promised_shape(
    pipe_for_fuzzing, prompt, seconds, num_waveforms_per_prompt, **options
):
    audio = pipe_for_fuzzing(
        prompt, audio_length_in_s=seconds, num_waveforms_per_prompt=num_waveforms_per_prompt, **options
    ).audios
    num_prompts = 1 if isinstance(prompt, str) else len(prompt)
    assert audio.shape == (num_prompts * num_waveforms_per_prompt, round(seconds * 16000))
    assert np.isfinite(audio).all() and np.abs(audio).max() <= 1


@pytest.fixture(scope="module")
def pipe_for_fuzzing():
    pipe = TangoPipeline(**build_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


# LoRA


def lora_of(pipe, seed, rank=4):
    """An adapter's layers (state dict) and metadata, made on a copy of the pipeline's UNet."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(config)
    torch.manual_seed(seed)
    layers = {name: 0.3 * torch.randn_like(tensor) for name, tensor in get_peft_model_state_dict(unet).items()}
    return layers, unet.peft_config["default"].to_dict()


def latents_of(pipe, **options):
    return pipe("rain", generator=seeds(0), output_type="latent", **SHORT, **options).audios


@pytest.fixture
def lora_folder(pipe, tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        layers, metadata = lora_of(pipe, seed)
        TangoPipeline.save_lora_weights(tmp_path / name, layers, unet_lora_adapter_metadata=metadata)
    return tmp_path


def test_lora_loads_scales_and_unloads(pipe, lora_folder):
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    assert pipe.get_list_adapters() == {"unet": ["first"]}
    assert pipe.unet.peft_config["first"].lora_alpha == 8  # from the file's metadata
    full = latents_of(pipe)
    assert largest_difference(full, plain) > 1e-2
    assert largest_difference(latents_of(pipe, cross_attention_kwargs={"scale": 0.0}), plain) < 1e-5
    half = latents_of(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("first", 0.5)
    assert largest_difference(latents_of(pipe), half) < 1e-5
    pipe.disable_lora()
    assert largest_difference(latents_of(pipe), plain) < 1e-5
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert largest_difference(latents_of(pipe), plain) < 1e-5


def test_several_adapters_mix_and_can_be_deleted(pipe, lora_folder):
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    first = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "second", adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.7, 0.3])
    assert largest_difference(latents_of(pipe), first) > 1e-2
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert largest_difference(latents_of(pipe), first) < 1e-4
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"unet": ["first"]}


def test_fused_lora_gives_the_same_and_unfuses(pipe, lora_folder):
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    pipe.set_adapters("first", 0.5)
    loose = latents_of(pipe)
    pipe.set_adapters("first", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    assert largest_difference(latents_of(pipe), loose) < 1e-3
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert largest_difference(latents_of(pipe), plain) < 1e-3


def test_hotswap_replaces_an_adapter_in_place(pipe, lora_folder):
    pipe.load_lora_weights(lora_folder / "second", adapter_name="x")
    second = latents_of(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora_folder / "first", adapter_name="x")
    assert largest_difference(latents_of(pipe), second) > 1e-2
    pipe.load_lora_weights(lora_folder / "second", adapter_name="x", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["x"]}
    assert largest_difference(latents_of(pipe), second) < 1e-5


def test_a_lora_state_dict_loads_and_is_not_changed(pipe, lora_folder):
    state_dict = TangoPipeline.lora_state_dict(lora_folder / "first")
    keys = list(state_dict)
    assert all(key.startswith("unet.") for key in keys)
    pipe.load_lora_weights(state_dict)
    assert list(state_dict) == keys
    from_dict = latents_of(pipe)
    pipe.unload_lora_weights()
    layers, metadata = lora_of(pipe, 1)
    TangoPipeline.save_lora_weights(lora_folder / "again", layers)  # without metadata: alpha falls back to the rank
    pipe.load_lora_weights(lora_folder / "again")
    assert largest_difference(latents_of(pipe), from_dict) < 1e-5


def test_lora_survives_saving_bit_for_bit(pipe, lora_folder):
    layers, _ = lora_of(pipe, 1)
    saved = TangoPipeline.lora_state_dict(lora_folder / "first", weight_name="pytorch_lora_weights.safetensors")
    assert {f"unet.{name}" for name in layers} == set(saved)
    assert all(torch.equal(saved[f"unet.{name}"], tensor) for name, tensor in layers.items())


def test_what_is_no_lora_of_the_unet_is_refused(pipe, lora_folder, tmp_path):
    with pytest.raises(ValueError, match="Not a LoRA file"):
        pipe.load_lora_weights({"text_encoder.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="Not a LoRA file"):
        pipe.load_lora_weights({})
    with pytest.raises(ValueError, match="`unet_lora_layers`"):
        TangoPipeline.save_lora_weights(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="Unknown arguments"):
        pipe.load_lora_weights(lora_folder / "first", adaptor_name="typo")
    assert not (tmp_path / "empty").exists()
