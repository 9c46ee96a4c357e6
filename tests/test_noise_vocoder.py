import pytest
import torch
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

from pipeline_tango import log_mel_spectrogram
from training.noise_vocoder import LOUDEST, SOFTEST, exponential_units, initialise
from training.train_vocoder import VOCODER_CONFIG


NUM_NOISE_CHANNELS = 96


def build_vocoder(num_noise_channels=NUM_NOISE_CHANNELS, **config):
    config = VOCODER_CONFIG | {"model_in_dim": 64 + num_noise_channels} | config
    torch.manual_seed(0)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**config)).eval()
    initialise(vocoder, num_noise_channels)
    return vocoder


@pytest.fixture(scope="module")
def vocoder():
    return build_vocoder()


def vocode(vocoder, mel):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*mel.shape[:2], NUM_NOISE_CHANNELS, generator=generator)
    with torch.no_grad():
        return vocoder(torch.cat([mel, noise], dim=2))


def test_the_units_run_along_the_exponential_function():
    knots, signs, weights, least = exponential_units(4, slope=0.1)
    x = torch.linspace(SOFTEST, LOUDEST, 100)
    values = weights @ torch.nn.functional.leaky_relu(signs[:, None] * (x - knots[:, None]), 0.1) - least
    assert (values.diff() > 0).all()
    assert (values - 0.75 * x.exp()).abs()[[0, -1]].max() < 1e-3 * LOUDEST + 0.75 * torch.tensor(SOFTEST).exp()
    middle = (x > -3) & (x < LOUDEST)
    assert (values[middle].log() - x[middle]).abs().max() < 0.8  # 7 dB
    below = torch.tensor([SOFTEST - 5.0])
    assert weights @ torch.nn.functional.leaky_relu(signs * (below - knots), 0.1) == pytest.approx(least, abs=1e-4)


def test_an_untrained_vocoder_sounds_like_its_spectrogram(vocoder):
    bands = torch.where(torch.arange(64) < 32, -1.0, -4.0).expand(2, 200, 64)  # 26 dB quieter above 1.6 kHz
    made = log_mel_spectrogram(vocode(vocoder, bands)[:, :32000])[:, 10:190].mean((0, 1))
    assert (made - bands[0, 0])[:30].abs().mean() < 0.8
    assert (made[:30].mean() - made[34:].mean()) == pytest.approx(3, abs=1)
    silence = log_mel_spectrogram(vocode(vocoder, torch.full((1, 100, 64), -11.5))[:, :16000])
    assert silence[:, 10:90].mean() < -7


@pytest.mark.parametrize("band", [10, 25, 40, 55])
def test_a_loud_band_stays_a_band(vocoder, band):
    bands = torch.full((1, 200, 64), -5.0)
    bands[..., band] = -1
    made = log_mel_spectrogram(vocode(vocoder, bands)[:, :32000])[0, 10:190].mean(0)
    assert made.argmax() == band and made[band] == pytest.approx(-1, abs=1)
    assert made[band - 8 : band - 5].max() < -3 and made[band + 6 : band + 9].max() < -3


def test_a_steady_band_is_steady(vocoder):
    # white noise would vary by 0.5 in narrow bands, and be heard as rough
    made = log_mel_spectrogram(vocode(vocoder, torch.full((2, 200, 64), -2.0))[:, :32000])[:, 10:190]
    assert made[..., :32].std(1).mean() < 0.4 and made[..., 48:].std(1).mean() < 0.25


def test_its_sound_is_new_with_other_noise_and_at_every_frame(vocoder):
    sounds = vocode(vocoder, torch.full((2, 200, 64), -2.0))[:, 1600:-1600]
    assert abs(torch.corrcoef(sounds)[0, 1]) < 0.1
    # what repeats itself at the hop, 160 samples, is heard as a buzz
    first, second = sounds[0, :-160], sounds[0, 160:]
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.1


@pytest.mark.parametrize("options", [{"num_noise_channels": 0}, {"upsample_initial_channel": 64}])
def test_a_vocoder_without_room_or_noise_gets_plain_finite_weights(options):
    vocoder = build_vocoder(**options)
    assert all(
        parameter.isfinite().all() and parameter.std() > 0 for parameter in vocoder.parameters() if parameter.ndim > 1
    )
