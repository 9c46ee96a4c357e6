import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, WINDOW, build_components, count_rows, noise, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from pipeline_tango import SCHEDULERS
from pipeline_tango.input_audio import KnownLatents, fill_by_reflection, find_regions
from pipeline_tango.windows import WindowPlan


SOUNDS = Path(__file__).parent.parent / "examples" / "sounds"


def recording(name):
    samples, rate = soundfile.read(SOUNDS / f"{name}.flac")
    return samples, rate


# Audio to audio


def test_full_strength_ignores_the_audio_but_for_its_length(call):
    assert np.array_equal(call(audio=noise(5000), strength=1.0), call(audio_length_in_s=5000 / RATE))


def test_the_less_strength_the_nearer_the_audio(call):
    # nearly no noise and one step leave the audio's latents, more strength goes further from them
    audio = recording("rain")[0][:8000]
    kept = call(audio=audio, mask=[(0.0, 0.001)], output_type="latent")  # elsewhere those of the audio
    distances = []
    for strength in (0.05, 0.3, 0.6, 0.9):
        latents = call(audio=audio, strength=strength, num_inference_steps=20, output_type="latent")
        distances.append(float((latents - kept)[:, :, 4:].std()))
    assert distances == sorted(distances)
    assert distances[0] < 0.3 * distances[-1]


def test_the_result_has_the_level_of_the_audio(call):
    audio = noise(5000, level=0.02) + 0.01  # with an offset, which the VAE never saw
    quiet, loud = (call(audio=factor * audio, strength=0.5)[0] for factor in (1, 4))
    assert np.abs(loud - 4 * quiet).max() < 1e-6
    assert quiet.mean() == pytest.approx(0.01, abs=0.01)


def test_loud_results_are_turned_down_not_clipped(call, shared_pipe):
    audio = noise(5000) / np.abs(noise(5000)).max()
    sound = call(audio=audio, strength=1.0 - 1e-9, num_inference_steps=10)[0]
    half = call(audio=0.1 * audio, strength=1.0 - 1e-9, num_inference_steps=10)[0]
    assert np.abs(sound).max() <= 1
    assert np.corrcoef(sound, half)[0, 1] > 0.9999  # the same shape: nothing is flat at full scale


def test_rates_and_channels_become_the_pipelines(call):
    def tone(rate):
        return 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate // 4) / rate)

    options = {"mask": [(0.1, 0.12)]}
    expected = call(audio=tone(RATE), **options)[0]
    for rate in (8000, 22050, 44100, 48000):
        heard = call(audio=tone(rate), audio_sampling_rate=rate, **options)[0]
        inner = np.r_[200:1000, 2500:3800]  # kept, away from the ends that resampling rounds off
        assert heard.shape == expected.shape
        assert np.abs(heard - expected)[inner].max() < 2e-3
    stereo = np.stack([2 * tone(RATE), np.zeros(RATE // 4)])
    assert np.allclose(call(audio=[stereo], **options), expected, atol=1e-6)
    assert np.allclose(call(audio=stereo[None], **options), expected, atol=1e-6)
    assert np.allclose(call(audio=torch.tensor(tone(RATE)), **options), expected, atol=1e-6)


def test_clips_of_different_lengths_share_a_batch(call):
    clips = [noise(5000, seed=1), noise(3000, seed=2)]
    # a variation is followed by silence; with a mask, what is missing of the shorter one is generated
    together = call(["rain", "dog"], audio=clips, generator=seeds(1, 2), strength=0.5)
    padded = np.pad(clips[1], (0, 2000))
    assert np.abs(together[1] - call("dog", audio=padded, generator=seeds(2), strength=0.5)[0]).max() < 1e-4
    regions = [[(0.1, 0.15)], [(0.02, 0.05), (0.1, 0.12)]]
    together = call(["rain", "dog"], audio=clips, generator=seeds(1, 2), mask=regions)
    alone = call("dog", audio=clips[1], generator=seeds(2), mask=regions[1], audio_length_in_s=5000 / RATE)
    assert together.shape == (2, 5000) and np.abs(together[1] - alone[0]).max() < 1e-4


def test_takes_of_one_clip_and_of_several(call):
    clips = [noise(4000, seed=1), noise(4000, seed=2)]
    takes = call(
        ["rain", "dog"],
        audio=clips,
        mask=[(0.1, 0.15)],
        num_waveforms_per_prompt=2,
        generator=seeds(1, 2, 1, 2),
    )
    for i, (prompt, clip, seed) in enumerate([("rain", 0, 1), ("rain", 0, 2), ("dog", 1, 1), ("dog", 1, 2)]):
        alone = call(prompt, audio=clips[clip], mask=[(0.1, 0.15)], generator=seeds(seed))
        assert np.abs(takes[i] - alone[0]).max() < 1e-4
    one = call(["rain", "dog"], audio=clips[0], strength=0.5, generator=seeds(1, 2))
    assert np.abs(one[1] - call("dog", audio=clips[0], strength=0.5, generator=seeds(2))[0]).max() < 1e-4


def test_the_posterior_follows_the_generator(call):
    audio = noise(5000)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(runs))
        latents = torch.randn(1, 4, 8, 16, generator=seeds(3)[0])  # only the posterior is left to draw
        options = {"latents": latents, "mask": [(0.0, 0.001)], "output_type": "latent", "num_inference_steps": 1}
        runs.append(call(audio=audio, generator=seeds(seed), audio_length_in_s=5000 / RATE, **options)[:, :, 4:])
    assert torch.equal(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().max() > 1e-4


# Inpainting and continuation


@pytest.mark.parametrize("regions", [[(0.1, 0.2)], [(0.0, 0.05), (0.2, 0.23)], [(0.25, 0.3125)], [(0.1, 0.1001)]])
def test_what_is_not_masked_comes_back_sample_for_sample(call, regions):
    audio = recording("birds")[0][20000:25000]
    sound = call(audio=audio, mask=regions)[0]
    mask = np.zeros(5000, dtype=bool)
    is_near = np.zeros(5000, dtype=bool)
    for start, end in regions:
        mask[round(start * RATE) : round(end * RATE)] = True
        is_near[max(round(start * RATE) - 320, 0) : round(end * RATE) + 320] = True
    assert np.array_equal(sound[~is_near], audio[~is_near].astype(np.float32))  # far more than 60 dB
    assert np.abs(sound - audio)[mask].max() > 1e-3


def test_continuation_at_either_end_keeps_the_audio(call):
    audio = noise(4000, seed=3)
    sound = call(audio=audio, audio_length_in_s=0.7, audio_start_in_s=0.2)[0]
    assert sound.shape == (11200,)
    assert np.array_equal(sound[3200 + 320 : 7200 - 320], audio[320:-320].astype(np.float32))
    assert np.abs(sound[:3200]).max() > 0.01 < np.abs(sound[7200:]).max()
    cut = call(audio=audio, audio_length_in_s=0.2, strength=0.5)
    assert cut.shape == (1, 3200)


def test_a_mask_of_samples_is_the_mask_of_seconds(call):
    audio = noise(5000)
    samples = np.zeros(5000)
    samples[1600:3200] = 1
    expected = call(audio=audio, mask=[(0.1, 0.2)])
    for mask in (samples, samples.astype(bool), torch.from_numpy(samples)[None], [samples]):
        assert np.array_equal(call(audio=audio, mask=mask), expected)


def test_what_is_masked_is_not_heard(call):
    audio = noise(5000)
    other = audio.copy()
    other[1600:3200] = recording("cow")[0][5000:6600]
    first, second = (call(audio=each, mask=[(0.1, 0.2)]) for each in (audio, other))
    assert np.array_equal(first, second)
    assert not np.array_equal(*(call(audio=each, mask=[(0.1, 0.2)], strength=0.5) for each in (audio, other)))


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_keeps_the_latents_outside_the_mask(pipe, call, name):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    noisiest = []

    def look(pipe, step, timestep, callback_kwargs):
        noisiest.append(callback_kwargs["latents"])
        return {}

    options = {"audio": noise(10240), "mask": [(0.3, 0.4)], "output_type": "latent", "num_inference_steps": 6}
    first, second = (call(p, pipe=pipe, callback_on_step_end=look, **options) for p in ("rain", "dog barks"))
    is_kept = (first == second).all(dim=1)[0].all(dim=1)
    assert is_kept.tolist() == [True] * 6 + [False] * 5 + [True] * 5  # 0.3 to 0.4 s, and half an STFT window around
    assert not torch.equal(noisiest[0][:, :, :5], noisiest[-1][:, :, :5])


def test_gaps_are_filled_by_reflection():
    wave = np.arange(1.0, 9.0)
    gap = np.array([0, 0, 0, 1, 1, 0, 0, 0], bool)
    assert fill_by_reflection(wave, gap).tolist() == [1, 2, 3, 3, 6, 6, 7, 8]
    assert fill_by_reflection(wave, np.arange(8) >= 3).tolist() == [1, 2, 3, 3, 2, 1, 1, 2]
    assert fill_by_reflection(wave, np.arange(8) < 6).tolist() == [8, 7, 7, 8, 8, 7, 7, 8]
    assert fill_by_reflection(wave, np.zeros(8, bool)).tolist() == wave.tolist()
    assert find_regions(gap) == [(3, 5)] and find_regions(~gap) == [(0, 3), (5, 8)]


# All together


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("window_order", ["joint", "sequential"])
def test_long_inpainting_with_every_scheduler(pipe, call, name, window_order):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    audio = noise(16000)
    sound = call(
        ["rain", "dog"],
        audio=audio,
        pipe=pipe,
        mask=[(0.3, 0.7)],
        num_inference_steps=4,
        window_length_in_s=WINDOW,
        window_order=window_order,
        generator=seeds(1, 2),
    )
    assert sound.shape == (2, 16000)
    assert np.array_equal(sound[:, :4400], np.tile(audio[:4400].astype(np.float32), (2, 1)))
    assert np.abs(sound[0] - sound[1]).max() > 1e-3


def test_long_variations_are_encoded_in_windows(call):
    audio = noise(32000)
    options = {"audio": audio, "strength": 0.5, "window_length_in_s": WINDOW}
    assert call(**options).shape == (1, 32000)
    assert not np.array_equal(call(**options), call(window_order="sequential", **options))


def test_audio_works_with_lora_and_callbacks(pipe, call):
    options = {"pipe": pipe, "audio": noise(5000), "mask": [(0.1, 0.2)], "output_type": "latent"}
    plain = call(**options)
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    assert (call(**options) - plain).abs().max() > 1e-4
    assert torch.equal(call(cross_attention_kwargs={"scale": 0.0}, **options), plain)
    zero = call(callback_on_step_end=lambda *args: {"latents": torch.zeros(1, 4, 8, 16)}, **options)
    assert not zero.any()


def test_half_precision_and_slicing_work_with_audio(pipe, call):
    options = {"pipe": pipe, "audio": noise(5000), "strength": 0.5}
    expected = call(**options)
    pipe.unet.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    pipe.vae.enable_slicing()
    assert np.corrcoef(call(**options), expected)[0, 1] > 0.5


# Bad input


@settings(max_examples=15, deadline=None)
@given(
    seconds=st.floats(0.1, 0.8),
    start=st.floats(0, 0.05),
    num_samples=st.integers(200, 9000),
    window_length_in_s=st.floats(0.05, 1.0),
    window_order=st.sampled_from(["joint", "sequential"]),
    num_waveforms_per_prompt=st.integers(1, 2),
)
def test_any_continuation_keeps_what_it_got(shared_pipe, seconds, start, num_samples, **options):
    audio = noise(num_samples, seed=num_samples)
    sound = shared_pipe(
        "rain",
        audio=audio,
        audio_sampling_rate=RATE,
        audio_length_in_s=seconds,
        audio_start_in_s=start,
        num_inference_steps=1,
        strength=1.0,
        **options,
    ).audios
    num_all, first = round(seconds * RATE), round(start * RATE)
    assert sound.shape == (options["num_waveforms_per_prompt"], num_all)
    kept = slice(first + 320, min(first + num_samples, num_all) - 320)
    if first > 0 or first + num_samples < num_all:
        expected = audio[320:][: max(kept.stop - kept.start, 0)].astype(np.float32)
        assert all(np.array_equal(row[kept.start : kept.start + len(expected)], expected) for row in sound)


def test_known_latents_are_restored_where_nothing_is_regenerated():
    scheduler = build_components()["scheduler"]
    scheduler.set_timesteps(10)
    latents, noise, generated = torch.randn(3, 1, 4, 8, 16, generator=seeds(0)[0])
    mask = torch.zeros(1, 1, 8, 16)
    mask[:, :, 4:] = 1
    known, frames, last = KnownLatents(scheduler, latents.clone(), noise, mask), slice(2, 6), torch.tensor([])
    restored = known.restore(generated[:, :, frames], frames, last)
    assert torch.equal(restored, torch.cat([latents[:, :, 2:4], generated[:, :, 4:6]], dim=2))
    noisy = known.restore(generated[:, :, frames], frames, torch.tensor([500]))
    assert torch.equal(noisy[:, :, :2], scheduler.add_noise(latents, noise, torch.tensor([500]))[:, :, 2:4])
    known.keep(generated[:, :, frames], frames)
    assert torch.equal(known.restore(torch.zeros(1, 4, 4, 16), frames, last), generated[:, :, frames])
    assert KnownLatents(scheduler, latents, noise, None).restore(generated, slice(0, 8), last) is generated


# Only what is regenerated is computed


LONG_AUDIO = {"num_inference_steps": 2, "window_length_in_s": 0.64, "audio_length_in_s": 12.0}


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm++"])
@pytest.mark.parametrize(
    "options",
    [
        {"mask": [(6.0, 6.3)]},
        {"mask": [(0.0, 0.2)]},
        {"mask": [(11.9, 12.0)]},
        {"mask": [(2.0, 2.1), (9.0, 9.5)]},
        {"mask": [(6.0, 6.3)], "window_order": "sequential", "scheduler": "dpm++"},
        {"mask": [(0.0, 0.2), (8.0, 8.2)], "window_order": "sequential", "scheduler": "dpm++"},
        {"mask": [(6.0, 6.3)], "output_type": "latent"},
        {"audio": noise(11 * RATE)},
        {"audio": noise(11 * RATE), "audio_start_in_s": 0.5},
    ],
)
def test_windows_without_anything_to_regenerate_change_nothing(pipe, call, monkeypatch, options, scheduler):
    options = {"audio": noise(12 * RATE)} | LONG_AUDIO | options
    name = options.pop("scheduler", scheduler)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    rows = {model: count_rows(module) for model, module in (("unet", pipe.unet.conv_in), ("vae", pipe.vae.decoder))}
    part = call(pipe=pipe, **options)
    counts = {model: len(each) for model, each in rows.items()}
    monkeypatch.setattr(WindowPlan, "is_denoised", lambda *args: True)
    monkeypatch.setattr(WindowPlan, "is_used", lambda *args: True)
    whole = call(pipe=pipe, **options)
    assert np.array_equal(part, whole)
    assert counts["unet"] * 3 < len(rows["unet"]) - counts["unet"]
    if options.get("output_type") != "latent":
        assert counts["vae"] < (len(rows["vae"]) - counts["vae"]) * 0.6


def test_a_band_is_regenerated_in_its_windows_only(pipe, call):
    audio = noise(12 * RATE, level=0.02)
    rows = count_rows(pipe.unet.conv_in)
    options = LONG_AUDIO | {"mask": [(6.0, 6.3)], "frequency_mask_in_hz": (2000, 4000)}
    sound = call(pipe=pipe, audio=audio, **options)[0]
    assert len(rows) <= 4 * 2
    is_near = slice(round(5.98 * RATE), round(6.32 * RATE))
    assert np.array_equal(np.delete(sound, is_near), np.delete(audio.astype(np.float32), is_near))
    assert np.abs(sound - audio)[is_near].max() > 1e-4


# Loud audio


def logged(caplog):
    logging.getLogger("pipeline_tango").propagate = True
    return caplog.at_level("WARNING")


def test_kept_audio_beyond_full_scale_is_turned_down_as_a_whole(call, caplog):
    audio = noise(9600)
    audio[1000], audio[8000] = 1.4, -1.1
    for options in ({"mask": [(0.2, 0.3)]}, {"audio_length_in_s": 0.8}):
        caplog.clear()
        with logged(caplog):
            sound = call(audio=audio, **options)[0]
        assert np.abs(sound).max() == 1.0
        kept = np.r_[0:2800, 5200:9200]
        assert np.abs(sound[kept] * 1.4 - audio[kept]).max() < 1e-6
        assert "`audio` reaches beyond [-1, 1]" in caplog.text and "0.714" in caplog.text


def test_full_scale_of_16_bits_is_not_beyond_full_scale(call, caplog):
    audio = noise(9600)
    audio[1000:1003] = np.array([32767, -32768, 0]) / 32767
    with logged(caplog):
        sound = call(audio=audio, mask=[(0.2, 0.3)])[0]
    assert np.array_equal(sound[:2800], audio[:2800].clip(-1, 1).astype(np.float32))
    assert not caplog.records
    audio[4000] = 1.9  # what is regenerated does not count
    with logged(caplog):
        assert np.array_equal(call(audio=audio, mask=[(0.2, 0.3)])[0], sound)
