"""Audio-to-audio, inpainting, continuation, super-resolution, long sound and streaming in `TangoPipeline`."""

import inspect
import math
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_components
from diffusers import schedulers as diffusers_schedulers
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from pipeline_tango import SCHEDULERS, TangoPipeline
from pipeline_tango.input_audio import fill_by_mirror, find_regions, read_clips, read_masks
from pipeline_tango.prompts import texts_at
from pipeline_tango.seams import join_at_seams, scale_spectrum, split_band
from pipeline_tango.windows import blend_windows, window_starts


RATE = 16000
SOUNDS = Path(__file__).parent.parent / "examples" / "sounds"
QUICK = {"num_inference_steps": 2, "guidance_scale": 1.0}
WINDOW = 0.32  # 8 latent frames


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def noise(num_samples, seed=0, level=0.1):
    return level * np.random.default_rng(seed).standard_normal(num_samples).clip(-4, 4)


def level_db(signal):
    return 10 * math.log10(np.mean(np.asarray(signal, np.float64) ** 2))


def recording(name):
    samples, rate = soundfile.read(SOUNDS / f"{name}.flac")
    return samples, rate


@pytest.fixture(scope="module")
def shared_pipe():
    pipe = TangoPipeline(**build_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def call(shared_pipe):
    """Calls the pipeline with `audio` at 16 kHz and seed 0, and returns the sounds or latents."""

    def run(prompt="rain", audio=None, pipe=shared_pipe, **options):
        if audio is not None:
            options = {"audio": audio, "audio_sampling_rate": RATE} | options
        return pipe(prompt, **({"generator": seeds(0)[0]} | QUICK | options)).audios

    return run


def know_the_answer(pipe, monkeypatch, answer):
    """Let the UNet predict the velocity towards `answer`: a scheduler that is started rightly ends there."""
    alphas = pipe.scheduler.alphas_cumprod.double()

    def forward(latents, timestep, **kwargs):
        below = int(timestep)
        share = float(timestep) - below
        alpha_squared = torch.lerp(alphas[below], alphas[min(below + 1, 999)], share)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        rows = answer.repeat(len(latents) // len(answer), 1, 1, 1)
        return ((alpha * (latents - alpha * rows) / sigma - sigma * rows).float(),)

    monkeypatch.setattr(pipe.unet, "forward", forward)


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


def starting_midway():
    names = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    # LMS cannot, EDM Euler is not for this UNet at any strength (its timesteps are logarithms of noise levels)
    return sorted({*names, "LCMScheduler", "TCDScheduler"} - {"LMSDiscreteScheduler", "EDMEulerScheduler"})


def start_midway(pipe, call, monkeypatch, strength, num_inference_steps):
    """How far from where it should a variation ends, when as many steps are taken as `strength` says."""
    answer = torch.randn(1, 4, 8, 16, generator=seeds(1)[0])
    know_the_answer(pipe, monkeypatch, answer)
    steps = []
    latents = call(
        pipe=pipe,
        audio=noise(5000),
        strength=strength,
        num_inference_steps=num_inference_steps,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, kwargs: steps.append(step) or {},
    )
    assert pipe.num_timesteps == len(steps) <= num_inference_steps * strength * pipe.scheduler.order + 1
    return (latents - answer).abs().max()


@pytest.mark.parametrize("name", starting_midway())
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_every_scheduler_starts_where_strength_says(pipe, call, monkeypatch, name, strength):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers_schedulers, name).from_config(pipe.scheduler.config, **options)
    # those that end above zero noise, or average velocities of several timesteps, do so without audio too
    tolerance = {"DEISMultistepScheduler": 0.3, "TCDScheduler": 0.3, "PNDMScheduler": 0.3}.get(name, 1e-3)
    assert start_midway(pipe, call, monkeypatch, strength, 20) < tolerance


@pytest.mark.parametrize("name", ["dpm++", "unipc", "euler", "heun"])
@pytest.mark.parametrize("num_inference_steps", [20, 100])  # of 100, many have the timestep of another
def test_karras_sigmas_start_where_strength_says(pipe, call, monkeypatch, name, num_inference_steps):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert start_midway(pipe, call, monkeypatch, 0.3, num_inference_steps) < 0.1


def test_schedulers_that_cannot_start_midway_say_so(pipe, call):
    config = pipe.scheduler.config
    pipe.scheduler = diffusers_schedulers.LMSDiscreteScheduler.from_config(config)
    with pytest.raises(ValueError, match="`strength`.*LMS"):
        call(pipe=pipe, audio=noise(5000), strength=0.5)
    pipe.scheduler = SCHEDULERS["pndm"].from_config(config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="`strength`.*PNDM"):
        call(pipe=pipe, audio=noise(5000), strength=0.5, num_inference_steps=8)
    assert np.isfinite(call(pipe=pipe, audio=noise(5000), strength=1.0, num_inference_steps=8)).all()


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
    # a variation is followed by silence; with a mask, what is missing of the shorter one is made
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
    is_made = np.zeros(5000, dtype=bool)
    is_near = np.zeros(5000, dtype=bool)
    for start, end in regions:
        is_made[round(start * RATE) : round(end * RATE)] = True
        is_near[max(round(start * RATE) - 320, 0) : round(end * RATE) + 320] = True
    assert np.array_equal(sound[~is_near], audio[~is_near].astype(np.float32))  # far more than 60 dB
    assert np.abs(sound - audio)[is_made].max() > 1e-3


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


def test_seams_hold_the_level_whatever_the_vocoder_makes_of_it():
    # the vocoder's version of the kept sound has another phase and is too quiet; so is what it made
    audio, made = noise(32000, seed=1), 0.6 * noise(32000, seed=2)
    is_made = np.zeros(32000, dtype=bool)
    is_made[10000:20000] = True
    joined = join_at_seams(made, audio, is_made, RATE)
    levels = np.array([level_db(joined[start : start + 320]) for start in range(8000, 22000, 160)])
    inside = np.array([level_db(audio[start : start + 320]) for start in range(0, 31680, 160)])
    assert np.abs(levels - inside.mean()).max() < np.abs(inside - inside.mean()).max() + 0.5
    assert level_db(joined[10000:20000]) == pytest.approx(level_db(audio), abs=0.3)
    same = join_at_seams(0.8 * audio, audio, is_made, RATE)  # in phase: the fade must not add 3 dB
    assert level_db((same - audio)[9680:20320]) < level_db(audio) - 20  # what two stretches of noise differ by
    assert np.array_equal(same[:9680], audio[:9680]) and np.array_equal(same[20320:], audio[20320:])


@pytest.mark.parametrize("length", [1000, 1024, 9999, 24000])
def test_a_spectrum_is_scaled_alike_in_stretches_and_at_once(length):
    wave, window_length = noise(length), min(1024, length)

    def decibels(positions):  # a tremolo of its own at each frequency
        return 6 * np.sin(positions / 3000 + np.arange(window_length // 2 + 1)[:, None])

    whole = scale_spectrum(wave, window_length, decibels)
    assert np.abs(scale_spectrum(wave, window_length, decibels, num_samples=4096) - whole).max() < 1e-12
    assert 0.5 < (whole / wave).std()  # it did something
    louder = scale_spectrum(wave, window_length, lambda positions: np.full((window_length // 2 + 1, 1), 6.0))
    np.testing.assert_allclose(louder, 10**0.3 * wave, atol=1e-12)


def test_what_is_made_takes_the_colour_beside_the_seam_and_returns_to_its_own():
    audio, made = noise(48000, seed=1), noise(48000, seed=2)
    is_made = np.zeros(48000, dtype=bool)
    is_made[16000:32000] = True
    dull = split_band(made, (0, 3000), RATE) + 0.25 * split_band(made, (3000, 8000), RATE)  # 12 dB less above 3 kHz
    made[16000:32000] = dull[16000:32000]  # where it is kept the VAE and the vocoder change nothing
    joined = split_band(join_at_seams(made, audio, is_made, RATE), (4000, 7000), RATE)
    expected = level_db(split_band(audio, (4000, 7000), RATE))
    for edge in (slice(16000, 16800), slice(31200, 32000)):
        assert level_db(joined[edge]) == pytest.approx(expected, abs=2.0)
    assert level_db(joined[23000:25000]) == pytest.approx(expected - 12, abs=1.0)
    assert level_db(joined[32000:]) == pytest.approx(expected, abs=0.5)


def test_a_step_at_a_seam_is_evened_within_limits():
    audio, made = noise(48000, seed=1), noise(48000, seed=2)
    is_made = np.arange(48000) >= 24000
    made[24000:] *= 10 ** (-40 / 20)  # nearly silent: lifted by 24 dB at the seam, by nothing half a second later
    joined = join_at_seams(made, audio, is_made, RATE)
    assert level_db(joined[24000:24400]) - level_db(made[24000:24400]) == pytest.approx(23.5, abs=1.5)
    assert level_db(joined[32000:]) == pytest.approx(level_db(made[32000:]), abs=0.5)


def test_the_colour_goes_over_from_one_seam_to_the_other():
    made = noise(48000)
    audio = 0.5 * made
    audio[24000:] = split_band(2 * made, (0, 3000), RATE)[24000:]  # twice as loud, and dull, after the gap
    is_made = np.zeros(48000, dtype=bool)
    is_made[10000:38000] = True
    joined = join_at_seams(made, audio, is_made, RATE)
    for band, changes in (((500, 2500), (-6, 6)), ((4000, 7000), (-6, -21))):  # up to 12 dB, and 24 at a seam
        before, after = (split_band(each, band, RATE) for each in (made, joined))
        at_seams = [
            level_db(after[part]) - level_db(before[part]) for part in (slice(11000, 12000), slice(36000, 37000))
        ]
        assert at_seams == pytest.approx(changes, abs=1.5)


def test_beside_silence_the_level_is_left_alone():
    made, audio = noise(4000), np.zeros(4000)
    is_made = np.arange(4000) >= 2000
    assert np.abs(join_at_seams(made, audio, is_made, RATE) - made)[2000:].max() < 1e-9


def test_gaps_are_filled_by_what_is_beside_them():
    wave = np.arange(1.0, 9.0)
    gap = np.array([0, 0, 0, 1, 1, 0, 0, 0], bool)
    assert fill_by_mirror(wave, gap).tolist() == [1, 2, 3, 3, 6, 6, 7, 8]
    assert fill_by_mirror(wave, np.arange(8) >= 3).tolist() == [1, 2, 3, 3, 2, 1, 1, 2]
    assert fill_by_mirror(wave, np.arange(8) < 6).tolist() == [8, 7, 7, 8, 8, 7, 7, 8]
    assert fill_by_mirror(wave, np.zeros(8, bool)).tolist() == wave.tolist()
    assert find_regions(gap) == [(3, 5)] and find_regions(~gap) == [(0, 3), (5, 8)]


# Super-resolution


def test_only_the_masked_band_is_made(call):
    audio = split_band(noise(9600, level=0.02), (0, 4000), RATE)
    sound = call(audio=audio, frequency_mask_in_hz=(4000, 8000))[0]
    difference = sound - audio
    low, high = (split_band(difference, band, RATE) for band in ((0, 4000), (4000, 8000)))
    inner = slice(1000, -1000)  # filters ring at the ends
    assert level_db(audio[inner]) - level_db(low[inner]) > 60
    assert level_db(high[inner]) > level_db(audio[inner]) - 40
    latents = [
        call(prompt, audio=audio, frequency_mask_in_hz=(4000, 8000), output_type="latent")
        for prompt in ("rain", "dog barks")
    ]
    is_kept = (latents[0] == latents[1]).all(dim=1)[0].all(dim=0)
    assert is_kept.tolist() == [True] * 12 + [False] * 4  # of 4 mel bins each: the twelfth ends at 3.7 kHz


def test_a_band_can_be_made_in_a_part_only(call):
    audio = noise(9600, level=0.02)
    sound = call(audio=audio, frequency_mask_in_hz=(2000, 4000), mask=[(0.2, 0.4)])[0]
    assert np.array_equal(sound[:2800], audio[:2800].astype(np.float32))
    difference = split_band(sound - audio, (5000, 8000), RATE)[3200:6400]
    assert level_db(audio) - level_db(difference[500:-500]) > 40


def test_bands_split_without_delay():
    time = np.arange(8000) / RATE
    for frequency, inside in ((1000, False), (3900, False), (4200, True), (7000, True)):
        tone = np.sin(2 * np.pi * frequency * time)
        kept = split_band(tone, (4000, 8000), RATE)[1000:-1000]
        assert np.abs(kept - inside * tone[1000:-1000]).max() < 1e-3


# Long sound


def test_windows_cover_everything_and_overlap_by_a_quarter():
    for num_frames in (1, 255, 256, 257, 264, 400, 1500, 15000):
        starts = window_starts(num_frames, 256)
        assert starts[0] == 0 and max(starts[-1] + 256, 256) == max(num_frames, 256)
        assert all(0 < later - earlier <= 192 for earlier, later in zip(starts, starts[1:]))


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

    def decoded(window):
        return list(pipe._decode(iter([(latents, 200)]), window, 127000))

    (whole,), stretches = decoded(200), decoded(48)
    assert len(stretches) > 4
    joined = torch.cat(stretches, dim=1)
    assert joined.shape == whole.shape == (2, 127000)
    assert (joined - whole).abs().max() < 1e-4
    monkeypatch.setattr(pipe, "_vocoder_context", lambda: 1)
    assert (torch.cat(decoded(48), dim=1) - whole).abs().max() > 1e-3  # the context is needed


def test_a_window_may_be_longer_than_the_sound_and_sounds_short(call):
    assert np.array_equal(call(audio_length_in_s=0.3), call(audio_length_in_s=0.3, window_length_in_s=20.0))
    assert call(audio_length_in_s=0.1).shape == (1, 1600)
    assert call(audio=noise(1600), strength=0.5).shape == (1, 1600)
    assert call(audio=noise(40), audio_length_in_s=0.1).shape == (1, 1600)


def test_texts_move_with_time():
    keyframes = [[(0.0, "a")], [(1.0, "b"), (3.0, "c"), (4.0, "d")]]
    for seconds, rows, next_rows, share in (
        (0.0, [0, 1], [0, 2], 0.0),
        (1.5, [0, 1], [0, 2], 0.25),
        (3.0, [0, 2], [0, 3], 0.0),
        (9.0, [0, 3], [0, 3], 0.0),
    ):
        assert [each.tolist() for each in texts_at(seconds, keyframes, 1)] == [rows, next_rows, [0.0, share]]
    assert texts_at(3.5, keyframes, 2)[0].tolist() == [0, 1, 4, 5]


def test_a_prompt_that_moves_starts_as_one_and_ends_as_the_other(call):
    options = {"audio_length_in_s": 2.0, "window_length_in_s": WINDOW, "guidance_scale": 3.0, "output_type": "latent"}
    rain, dog = call("rain", **options), call("a dog barks", **options)
    moving = call([(0.8, "rain"), (1.2, "a dog barks")], **options)
    assert (moving - rain)[:, :, :10].abs().max() < 1e-4 < (moving - rain)[:, :, 20:].abs().max()
    assert (moving - dog)[:, :, 44:].abs().max() < 1e-4
    assert (call([(0.0, "rain"), (2.0, "rain")], **options) - rain).abs().max() < 1e-4
    batch = call(
        ["a dog barks", [(0.8, "rain"), (1.2, "a dog barks")]],
        negative_prompt=["", ""],
        num_waveforms_per_prompt=2,
        generator=seeds(1, 2, 1, 0),
        **options,
    )
    assert (batch[3] - moving[0]).abs().max() < 1e-3


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


CLIP = noise(4000)
BAD_INPUTS = [
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
    ({"mask": [[]]}, "`mask`.*nothing to make"),
    ({"mask": np.zeros(4000)}, "`mask`.*nothing to make"),
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
    ({"window_length_in_s": "long"}, "`window_length_in_s`"),
    ({"window_batch_size": 0}, "`window_batch_size`"),
    ({"window_order": "random"}, "`window_order`"),
    ({"prompt": [(0, "rain"), (0, "dog")]}, "`prompt`.*ascending"),
    ({"prompt": [(0, "rain"), (float("nan"), "dog")]}, "`prompt`.*ascending"),
    ({"prompt": [(0, "rain"), (9, "dog")]}, "`prompt` moves until 9"),
    ({"prompt": [(0, "rain"), (0.2, "dog")]}, "`prompt` cannot move within one window"),
    ({"prompt": [[]]}, "`prompt`"),
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
        guarded_pipe(**({"prompt": "rain", "audio": CLIP, "audio_sampling_rate": RATE} | arguments))


def test_a_stream_has_no_latents(guarded_pipe):
    with pytest.raises(ValueError, match="`stream` yields sound"):
        guarded_pipe("rain", stream=True, output_type="latent")


def test_a_checkpoint_with_another_front_end_cannot_read_audio(components):
    components["vocoder"].config.sampling_rate = 22050
    with pytest.raises(ValueError, match="`audio` is read at 16000 Hz"):
        TangoPipeline(**components)("rain", audio=CLIP, audio_sampling_rate=RATE)


JUNK = st.one_of(
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
NEW = ["audio", "audio_sampling_rate", "strength", "mask", "frequency_mask_in_hz", "audio_start_in_s", "stream"]
NEW += ["window_length_in_s", "window_batch_size", "window_order"]


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(NEW), JUNK))
def test_junk_raises_nothing_but_value_errors(guarded_pipe, arguments):
    assert set(NEW) <= set(inspect.signature(TangoPipeline.check_inputs).parameters)
    arguments = {"prompt": "rain", "audio_length_in_s": 0.3, "audio": CLIP, "audio_sampling_rate": RATE} | arguments
    try:
        guarded_pipe.check_inputs(**arguments)
    except ValueError as error:
        assert re.search("`[a-z_]+`", str(error))  # names an argument


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


def test_reading_helpers_take_what_the_pipeline_takes():
    (clip,) = read_clips(torch.tensor(CLIP, dtype=torch.bfloat16), RATE)
    assert clip.dtype == np.float32 and np.abs(clip - CLIP).max() < 2e-3
    (mask,) = read_masks([(0.1, 0.25)], [CLIP], RATE)
    assert find_regions(mask) == [(1600, 4000)]
