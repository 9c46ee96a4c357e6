import pytest
import torch

from training.vocoder_losses import (
    Discriminators,
    adversarial_loss,
    compressed_spectrum,
    discriminator_loss,
    energy_distance,
    feature_distance,
    spectra,
    spectral_distance,
)


def test_gradients_of_silence_are_finite():
    discriminators = Discriminators(stft_windows=[2048, 512, 128], periods=[2], channels=2)
    made = torch.zeros(1, 4800, requires_grad=True)
    real = discriminators(torch.zeros(1, 4800))
    fake = discriminators(made)
    loss = discriminator_loss(real, fake) + adversarial_loss(fake) + feature_distance(fake, real)
    (loss + spectral_distance(spectra(made), spectra(torch.zeros(1, 4800)))).backward()
    assert made.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in discriminators.parameters())


def test_the_compressed_spectrum_keeps_phases_and_takes_amplitudes_to_the_power_of_0_3():
    waveform = torch.sin(torch.arange(2048) * 0.3)[None]
    window = torch.hann_window(512)
    expected = torch.stft(waveform, 512, 128, window=window, center=False, normalized=True, return_complex=True)
    real, imaginary = compressed_spectrum(waveform, 512)[0]
    spectrum = torch.complex(real, imaginary).T  # (num_bins, num_frames)
    loud = expected[0].abs() > 1e-2
    torch.testing.assert_close(spectrum.abs()[loud], expected[0].abs()[loud] ** 0.3, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectrum.angle()[loud], expected[0].angle()[loud], rtol=0, atol=1e-3)
    quieter = compressed_spectrum(waveform * 0.1, 512)[0]
    torch.testing.assert_close(quieter.abs().max() / real.abs().max(), torch.tensor(0.1**0.3), rtol=2e-2, atol=0)


def test_the_energy_distance_prefers_the_distribution_to_its_middle():
    generator = torch.Generator().manual_seed(0)
    real, first, second = torch.randn(3, 100000, generator=generator)

    def distance(scale):
        return float(energy_distance(torch.nn.functional.l1_loss, real, scale * first, scale * second))

    # closed form for normal variables: E|X - Y| = sqrt(2 / pi) * sqrt(var(X) + var(Y))
    for scale in (0.0, 0.5, 1.0, 2.0):
        expected = (2 / torch.pi) ** 0.5 * (2 * (1 + scale**2) ** 0.5 - 2**0.5 * scale)
        assert distance(scale) == pytest.approx(expected, abs=0.02)
    assert distance(1.0) < min(distance(0.0), distance(0.5), distance(2.0)) - 0.02


def test_the_middle_of_all_noises_is_no_better_than_noise():
    # the median magnitude everywhere is nearer to each noise than another noise is, and would win by plain distances
    noises = [spectra(waveform) for waveform in torch.randn(3, 1, 16000, generator=torch.Generator().manual_seed(0))]
    middle = [tuple(part.median().expand_as(part) for part in window) for window in noises[0]]
    assert spectral_distance(middle, noises[0]) < spectral_distance(noises[1], noises[0])
    assert energy_distance(spectral_distance, *noises) < energy_distance(spectral_distance, noises[0], middle, middle)


def test_noise_whose_bands_rise_and_fall_together_is_told_from_noise():
    generator = torch.Generator().manual_seed(0)
    real, *noises = torch.randn(5, 1, 32000, generator=generator) / 10
    gains = torch.nn.functional.interpolate(torch.randn(2, 1, 400, generator=generator), size=32000, mode="linear")
    grains = [noise * (0.3 * gain).exp() for noise, gain in zip(noises[2:], gains)]

    def distance(picture, *made):
        parts = [[(window[picture],) for window in spectra(waveform)] for waveform in (real, *made)]
        return float(energy_distance(spectral_distance, *parts))

    bands, bins, whole, eights = (distance(i, *grains) - distance(i, *noises[:2]) for i in range(4))
    assert whole > 5 * max(bands, bins, 0)
    assert eights > 5 * max(bands, bins, 0)
