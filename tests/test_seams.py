import numpy as np
import pytest
from conftest import RATE, level_db, noise

from pipeline_tango.seams import join_at_seams, scale_spectrum, split_band


# Inpainting and continuation


def test_seams_hold_the_level_whatever_the_vocoder_makes_of_it():
    # the vocoder's version of the kept sound has another phase and is too quiet; so is what it generated
    audio, generated = noise(32000, seed=1), 0.6 * noise(32000, seed=2)
    mask = np.zeros(32000, dtype=bool)
    mask[10000:20000] = True
    joined = join_at_seams(generated, audio, mask, RATE)
    levels = np.array([level_db(joined[start : start + 320]) for start in range(8000, 22000, 160)])
    inside = np.array([level_db(audio[start : start + 320]) for start in range(0, 31680, 160)])
    assert np.abs(levels - inside.mean()).max() < np.abs(inside - inside.mean()).max() + 0.5
    assert level_db(joined[10000:20000]) == pytest.approx(level_db(audio), abs=0.3)
    same = join_at_seams(0.8 * audio, audio, mask, RATE)  # in phase: the fade must not add 3 dB
    assert level_db((same - audio)[9680:20320]) < level_db(audio) - 20  # what two stretches of noise differ by
    assert np.array_equal(same[:9680], audio[:9680]) and np.array_equal(same[20320:], audio[20320:])


@pytest.mark.parametrize("length", [1000, 1024, 9999, 24000])
def test_a_spectrum_is_scaled_alike_in_chunks_and_at_once(length):
    wave, window_length = noise(length), min(1024, length)

    def decibels(positions):  # a tremolo of its own at each frequency
        return 6 * np.sin(positions / 3000 + np.arange(window_length // 2 + 1)[:, None])

    whole = scale_spectrum(wave, window_length, decibels)
    assert np.abs(scale_spectrum(wave, window_length, decibels, num_samples=4096) - whole).max() < 1e-12
    assert 0.5 < (whole / wave).std()  # it did something
    louder = scale_spectrum(wave, window_length, lambda positions: np.full((window_length // 2 + 1, 1), 6.0))
    np.testing.assert_allclose(louder, 10**0.3 * wave, atol=1e-12)


def test_generated_sound_takes_the_spectrum_beside_the_seam_and_returns_to_its_own():
    audio, generated = noise(48000, seed=1), noise(48000, seed=2)
    mask = np.zeros(48000, dtype=bool)
    mask[16000:32000] = True
    dull = split_band(generated, (0, 3000), RATE) + 0.25 * split_band(
        generated, (3000, 8000), RATE
    )  # 12 dB less above 3 kHz
    generated[16000:32000] = dull[16000:32000]  # where it is kept the VAE and the vocoder change nothing
    joined = split_band(join_at_seams(generated, audio, mask, RATE), (4000, 7000), RATE)
    expected = level_db(split_band(audio, (4000, 7000), RATE))
    for edge in (slice(16000, 16800), slice(31200, 32000)):
        assert level_db(joined[edge]) == pytest.approx(expected, abs=2.0)
    assert level_db(joined[23000:25000]) == pytest.approx(expected - 12, abs=1.0)
    assert level_db(joined[32000:]) == pytest.approx(expected, abs=0.5)


def test_a_step_at_a_seam_is_evened_within_limits():
    audio, generated = noise(48000, seed=1), noise(48000, seed=2)
    mask = np.arange(48000) >= 24000
    generated[24000:] *= 10 ** (-40 / 20)  # nearly silent: lifted by 24 dB at the seam, by nothing half a second later
    joined = join_at_seams(generated, audio, mask, RATE)
    assert level_db(joined[24000:24400]) - level_db(generated[24000:24400]) == pytest.approx(23.5, abs=1.5)
    assert level_db(joined[32000:]) == pytest.approx(level_db(generated[32000:]), abs=0.5)


def test_the_correction_is_interpolated_between_seams():
    generated = noise(48000)
    audio = 0.5 * generated
    audio[24000:] = split_band(2 * generated, (0, 3000), RATE)[24000:]  # twice as loud, and dull, after the gap
    mask = np.zeros(48000, dtype=bool)
    mask[10000:38000] = True
    joined = join_at_seams(generated, audio, mask, RATE)
    for band, changes in (((500, 2500), (-6, 6)), ((4000, 7000), (-6, -21))):  # up to 12 dB, and 24 at a seam
        before, after = (split_band(each, band, RATE) for each in (generated, joined))
        at_seams = [
            level_db(after[part]) - level_db(before[part]) for part in (slice(11000, 12000), slice(36000, 37000))
        ]
        assert at_seams == pytest.approx(changes, abs=1.5)


def test_beside_silence_the_level_is_left_alone():
    generated, audio = noise(4000), np.zeros(4000)
    mask = np.arange(4000) >= 2000
    assert np.abs(join_at_seams(generated, audio, mask, RATE) - generated)[2000:].max() < 1e-9


# Super-resolution


def test_only_the_masked_band_is_regenerated(call):
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


def test_a_band_can_be_regenerated_in_a_part_only(call):
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
