import json

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from training.mixing import (
    MIN_LEVEL_DB,
    a_weighting_db,
    augment,
    mix,
    mix_captions,
    mix_pairs,
    pressure_level_db,
    pressure_weight,
    superpose,
)


META = json.loads((GOLDENS / "golden" / "meta.json").read_text())
NOISE = 0.3 * torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))


def sine(frequency_in_hz, sampling_rate, length_in_s=0.5, amplitude=0.5):
    return amplitude * torch.sin(
        2 * torch.pi * frequency_in_hz * torch.arange(int(length_in_s * sampling_rate)) / sampling_rate
    )


def test_a_weighting_matches_the_original():
    frequencies = torch.fft.rfftfreq(2048, 1 / 16000)
    torch.testing.assert_close(a_weighting_db(frequencies), golden("mix")["a_weight_16000_2048"], atol=1e-4, rtol=0)


def test_a_weighting_matches_the_standard():
    # IEC 61672-1, table of A-weightings, given to 0.1 dB at the exact frequencies 10^(n / 10) Hz
    known = {15: -39.4, 20: -19.1, 24: -8.6, 30: 0.0, 33: 1.2, 36: 1.0, 39: -1.1, 42: -6.6}
    weighting_db = a_weighting_db(10 ** (torch.tensor(list(known)) / 10))
    torch.testing.assert_close(weighting_db, torch.tensor(list(known.values())), atol=0.06, rtol=0)
    assert a_weighting_db(torch.tensor(1000.0)).abs() < 0.01
    assert a_weighting_db(torch.tensor(0.0)) == MIN_LEVEL_DB


def test_levels_match_the_original_frame_by_frame():
    tensors = golden("mix")
    for name in ("a", "b"):
        frames = tensors[f"sound_{name}"].unfold(0, 2048, 1024)  # one frame each: the highest level of one is its own
        levels = pressure_level_db(frames, 16000)
        torch.testing.assert_close(levels, tensors[f"gain_{name}"], atol=1e-3, rtol=0)
        level = pressure_level_db(tensors[f"sound_{name}"], 16000)
        torch.testing.assert_close(level, tensors[f"gain_{name}"].max(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("ratio", "name"), [(0.5, "mix_r05"), (0.3, "mix_r03_first_2000")])
def test_mix_matches_the_original_before_and_after_normalising(ratio, name):
    tensors = golden("mix")
    first, second = tensors["sound_a"], tensors["sound_b"]
    superposed = superpose(first, second, pressure_weight(first, second, 16000, ratio))
    torch.testing.assert_close(superposed[: len(tensors[name])], tensors[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mix(first, second, 16000, ratio), 0.5 * superposed / superposed.abs().max())


def test_augment_matches_the_original_but_for_the_common_maximum():
    num_samples = 40960
    waveforms = torch.zeros(3, num_samples)
    for row, name in enumerate("ab"):
        samples = torch.from_numpy(wavfile.read(GOLDENS / "golden" / "wav" / f"{name}.wav")[1].copy()) / 32768
        samples = (samples - samples.mean())[:num_samples]
        waveforms[row, : len(samples)] = 0.5 * samples / samples.abs().max()
    third = golden("mel")["waveform_c_64"][0]
    waveforms[2, : len(third)] = third
    first, second = waveforms[[1, 0]], waveforms[[2, 2]]
    superposed = superpose(first, second, pressure_weight(first, second, 16000))
    expected = golden("mix")["augment_waveform_first_2000"]
    torch.testing.assert_close(0.5 * (superposed / superposed.abs().max())[:, :2000], expected, atol=1e-5, rtol=1e-4)

    augmented, captions = augment(waveforms, META["captions"], 16000)
    assert sorted(captions[3:]) == sorted(META["augment_wav_to_fbank_captions_same_call"])
    for caption, raw in zip(META["augment_captions_with_shuffle_replaced_by_reverse"], superposed, strict=True):
        torch.testing.assert_close(augmented[captions.index(caption)], 0.5 * raw / raw.abs().max())


def test_ten_times_the_amplitude_is_20_db_more():
    difference_db = pressure_level_db(10 * NOISE, 16000) - pressure_level_db(NOISE, 16000)
    torch.testing.assert_close(difference_db, torch.full((3,), 20.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampling_rate", [8000, 16000, 22050, 44100, 48000])
def test_the_ear_hears_100_hz_19_db_below_1_khz_at_any_rate(sampling_rate):
    levels = [pressure_level_db(sine(frequency, sampling_rate), sampling_rate) for frequency in (1000, 100)]
    assert (levels[0] - levels[1]).item() == pytest.approx(19.1, abs=0.7)  # a window is wider than the curve is flat


@pytest.mark.parametrize(("sampling_rate", "frame_length"), [(8000, 1024), (16000, 2048), (44100, 4096), (1, 2)])
def test_frames_last_as_long_at_any_rate(sampling_rate, frame_length):
    click = torch.zeros(4 * frame_length)
    click[frame_length + frame_length // 2] = 1.0  # the middle of a frame, where the window is 1
    weighting_db = a_weighting_db(torch.fft.rfftfreq(frame_length, 1 / sampling_rate))
    expected = 10 * (10 ** (weighting_db / 10)).sum().log10()  # the spectrum of a click is 1 in every bin
    torch.testing.assert_close(pressure_level_db(click, sampling_rate), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_samples", [1, 100, 2047, 2048, 2049, 5000])
def test_level_of_any_length_is_that_of_the_sound_filled_up_to_half_a_frame(num_samples):
    waveform = NOISE.flatten()[:num_samples]
    level = pressure_level_db(F.pad(waveform, (0, -num_samples % 1024)), 16000)
    torch.testing.assert_close(pressure_level_db(waveform, 16000), level)
    assert pressure_level_db(torch.zeros(num_samples), 16000) == MIN_LEVEL_DB


def test_level_hears_the_end_that_fills_no_frame():
    waveform = torch.zeros(2048 + 300)
    waveform[2048:] = NOISE[0, :300]
    assert pressure_level_db(waveform[:2048], 16000) == MIN_LEVEL_DB
    assert pressure_level_db(waveform, 16000) > 0


def test_equal_levels_weigh_as_the_ratio():
    assert pressure_weight(NOISE[0], NOISE[0], 16000, 0.3).item() == pytest.approx(0.3, abs=1e-6)
    assert pressure_weight(NOISE[0], -NOISE[0], 16000).item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(mix(NOISE[0], NOISE[0], 16000), 0.5 * NOISE[0] / NOISE[0].abs().max())


@settings(max_examples=30, deadline=None)
@given(
    ratio=st.floats(0.0, 1.0),
    gain=st.floats(1e-2, 1e2),
    rule=st.sampled_from(["pressure", "random"]),
    num_samples=st.integers(1, 4096),
)
def test_a_mix_swaps_peaks_at_half_and_ignores_how_loud_a_sound_was_recorded(ratio, gain, rule, num_samples):
    first, second, _ = NOISE[:, :num_samples]
    mixed = mix(first, second, 16000, ratio, rule)
    torch.testing.assert_close(mixed, mix(second, first, 16000, 1 - ratio, rule), atol=1e-4, rtol=0)
    torch.testing.assert_close(mixed.abs().max(), torch.tensor(0.5))
    if rule == "pressure" and num_samples > 500:
        torch.testing.assert_close(mixed, mix(gain * first, second, 16000, ratio), atol=1e-4, rtol=0)


def test_random_rule_takes_the_ratio_as_the_weight():
    expected = 0.3 * NOISE[0] + 0.7 * 10 * NOISE[1]
    mixed = mix(NOISE[0], 10 * NOISE[1], 16000, 0.3, rule="random")
    torch.testing.assert_close(mixed, 0.5 * expected / expected.abs().max())


def test_a_batch_is_mixed_as_its_pairs_are():
    ratios = torch.tensor([0.2, 0.5, 0.9])
    mixed = mix(NOISE, NOISE.roll(1, 0), 16000, ratios)
    for row in range(3):
        torch.testing.assert_close(mixed[row], mix(NOISE[row], NOISE.roll(1, 0)[row], 16000, ratios[row].item()))


@pytest.mark.parametrize("rule", ["pressure", "random"])
def test_mixing_with_silence_leaves_the_other_sound(rule):
    silence = torch.zeros(4096)
    expected = 0.5 * NOISE[0] / NOISE[0].abs().max()
    torch.testing.assert_close(mix(silence, NOISE[0], 16000, 0.99, rule), expected)
    torch.testing.assert_close(mix(1e4 * NOISE[0], silence, 16000, 0.01, rule), expected)
    batch = mix(torch.zeros(3, 4096), 1e4 * NOISE, 16000, 0.99, rule)
    torch.testing.assert_close(batch, 0.5 * NOISE / NOISE.abs().amax(1, keepdim=True))
    assert mix(silence, silence, 16000, rule=rule).count_nonzero() == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("A dog barks.", "A man speaks.", "A dog barks and a man speaks."),
        ("Rain falls", "Éclat of a tone", "Rain falls and éclat of a tone"),
        ("A dog barks... ", " TV noise", "A dog barks and TV noise"),
        ("A bell rings!", "I laugh", "A bell rings! and I laugh"),
        ("Wind", "I'm singing", "Wind and I'm singing"),
        ("Wind", "In a hall, Anna speaks", "Wind and in a hall, Anna speaks"),
        ("Wind", "It rains", "Wind and it rains"),
        ("", "Wind", "Wind"),
        ("Wind.", " ", "Wind."),
        ("...", "Wind", "Wind"),
    ],
)
def test_captions_are_joined_with_and(first, second, expected):
    assert mix_captions(first, second) == expected


def test_captions_match_the_original():
    assert mix_captions(*META["captions"][:2]) == META["mixed_caption_a_b"]


@pytest.mark.parametrize(
    ("num_items", "num_mixes", "num_pairs"), [(0, 4, 0), (1, 4, 0), (2, 4, 1), (3, 4, 3), (9, 4, 4)]
)
def test_pairs_are_distinct_and_as_many_as_asked(num_items, num_mixes, num_pairs):
    pairs = mix_pairs(num_items, num_mixes, torch.Generator().manual_seed(0))
    assert pairs.shape == (num_pairs, 2)
    assert len(pairs.unique(dim=0)) == num_pairs
    assert (pairs[:, 0] < pairs[:, 1]).all() and (pairs < num_items).all()


def test_each_pair_is_drawn_as_often_and_a_seed_repeats_them():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.cat([mix_pairs(4, 2, generator) for _ in range(3000)])
    assert (pairs.unique(dim=0, return_counts=True)[1] - 1000).abs().max() < 120  # 4 standard deviations
    first, again = (mix_pairs(9, 4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("rule", ["pressure", "random"])
def test_augment_appends_mixes_of_what_can_be_heard(rule):
    waveforms = torch.cat([NOISE[:2], torch.zeros(1, 4096), NOISE[2:]])
    captions = ["One.", "Two", "Nothing", "Three"]
    augmented, augmented_captions = augment(
        waveforms, captions, 16000, rule, num_mixes=6, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(augmented[:4], waveforms) and augmented_captions[:4] == captions
    assert sorted(augmented_captions[4:]) == ["One and three", "One and two", "Two and three"]
    torch.testing.assert_close(augmented[4:].abs().amax(1), torch.full((3,), 0.5))
    if rule == "pressure":
        row = augmented_captions.index("One and two")
        torch.testing.assert_close(augmented[row], mix(NOISE[0], NOISE[1], 16000))


def test_random_ratios_differ_and_follow_the_generator():
    def draw(seed):
        return augment(NOISE, ["a", "b", "c"], 16000, "random", generator=torch.Generator().manual_seed(seed))

    (waveforms, captions), (again, _), (other, other_captions) = draw(0), draw(0), draw(1)
    assert torch.equal(waveforms, again)
    row, other_row = captions.index("a and b"), other_captions.index("a and b")
    assert not torch.allclose(waveforms[row], other[other_row], atol=1e-3)


def test_augment_leaves_a_batch_alone_where_there_is_nothing_to_mix():
    waveforms, captions = augment(NOISE, ["a", "b", "c"], 16000, "none")
    assert waveforms is NOISE and captions == ["a", "b", "c"]
    silent = torch.zeros(3, 4096)
    for unmixable, num_mixes in ((NOISE[:1], 4), (silent, 4), (NOISE, 0)):
        waveforms, captions = augment(unmixable, ["a", "b", "c"][: len(unmixable)], 16000, num_mixes=num_mixes)
        assert torch.equal(waveforms, unmixable) and len(captions) == len(unmixable)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: pressure_level_db(torch.zeros(0), 16000), "waveform"),
        (lambda: pressure_level_db(torch.zeros(1, 1, 9), 16000), "waveform"),
        (lambda: pressure_level_db(torch.zeros(9, dtype=torch.int16), 16000), "waveform"),
        (lambda: pressure_level_db(torch.tensor([0.0, torch.nan]), 16000), "waveform"),
        (lambda: pressure_level_db(torch.zeros(9), 0), "sampling_rate"),
        (lambda: mix(torch.tensor([torch.inf]), torch.zeros(1), 16000), "first"),
        (lambda: mix(torch.zeros(9), torch.zeros(2, 0), 16000), "second"),
        (lambda: mix(torch.zeros(9), torch.zeros(8), 16000), "`second` have to be of one shape"),
        (lambda: mix(torch.zeros(9), torch.zeros(9), 16000, ratio=1.1), "ratio"),
        (lambda: mix(torch.zeros(9), torch.zeros(9), 16000, ratio=torch.nan), "ratio"),
        (lambda: mix(NOISE, NOISE, 16000, ratio=torch.tensor([0.1, 0.2])), "ratio"),
        (lambda: mix(torch.zeros(9), torch.zeros(9), 16000, rule="loud"), "rule"),
        (lambda: mix_captions(None, "Wind"), "first"),
        (lambda: mix_captions("Wind", ["Rain"]), "second"),
        (lambda: mix_pairs(-1, 4), "num_items"),
        (lambda: mix_pairs(4, -1), "num_mixes"),
        (lambda: augment(NOISE, ["a", "b"], 16000), "captions"),
        (lambda: augment(NOISE[0], ["a"], 16000), "captions"),
        (lambda: augment(NOISE, ["a", "b", "c"], 16000, rule="loud"), "rule"),
        (lambda: augment(NOISE / 0, ["a", "b", "c"], 16000), "waveform"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
