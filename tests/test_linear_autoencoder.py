from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers import AutoencoderKL

from pipeline_tango import log_mel_spectrogram
from training.linear_autoencoder import can_initialise, carrier_channels, initialise
from training.train_autoencoder import VAE_CONFIG


SOUNDS = sorted((Path(__file__).parents[1] / "examples" / "sounds").glob("*.flac"))


def build_vae(**config):
    config = VAE_CONFIG | config
    num_levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * num_levels,
        up_block_types=["UpDecoderBlock2D"] * num_levels,
        **config,
    ).eval()


@pytest.fixture(scope="module")
def mels():
    """128 frames of each of ten recordings: (batch, 1, num_frames, num_mel_bins)."""
    waveforms = [soundfile.read(path, frames=20480, dtype="float32")[0] for path in SOUNDS]
    waveforms = torch.stack([torch.from_numpy(0.5 * waveform / np.abs(waveform).max()) for waveform in waveforms])
    return log_mel_spectrogram(waveforms)[:, None]


@pytest.fixture(scope="module")
def vae(mels):
    vae = build_vae()
    assert can_initialise(vae)
    initialise(vae, mels)
    return vae


@torch.no_grad()
def encode(vae, mel):
    return vae.encode(mel).latent_dist.mode()


def cells(mels):
    """(number of cells, 16)"""
    return mels[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 16)


def test_latents_are_the_principal_components_of_cells(vae, mels):
    latents = encode(vae, mels)  # (batch, 8, num_frames / 4, num_mel_bins / 4)
    assert latents.shape == (len(SOUNDS), 8, 32, 16)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert latents.square().mean().item() == pytest.approx(1, abs=0.03)
    values = cells(mels).double().numpy()
    values -= values.mean(0)
    directions = np.linalg.svd(values, full_matrices=False)[2][:8]
    components = values @ directions.T
    assert np.abs(components @ directions - values).mean() < 0.1  # what eight of sixteen leave out
    for channel in range(8):
        found = latents[:, channel].flatten().double().numpy()
        assert abs(np.corrcoef(found, components[:, channel])[0, 1]) > 0.99, channel


def test_the_encoder_is_linear_and_sees_one_cell_at_a_time(vae, mels):
    first, second = mels[:5], mels[5:10]
    between = encode(vae, (first + second) / 2)
    assert (between - (encode(vae, first) + encode(vae, second)) / 2).abs().max() < 0.06
    assert (encode(vae, mels[:, :, 32:64]) - encode(vae, mels)[:, :, 8:16]).abs().max() < 0.06


@torch.no_grad()
def test_an_untrained_vae_reconstructs_and_is_sure_of_its_latents(vae, mels):
    error = (vae.decode(encode(vae, mels)).sample - mels).abs().mean()
    assert error < 0.4 and error < 0.2 * (mels - mels.mean()).abs().mean()
    assert vae.encode(mels).latent_dist.std.max() < 0.03


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [32, 128, 512])
def test_louder_sound_comes_back_as_much_louder_at_any_length(vae, mels, num_frames):
    mel = mels.repeat(1, 1, 4, 1)[:, :, :num_frames]
    quiet, loud = (vae.decode(encode(vae, mel + level)).sample for level in (-1, 1))
    assert (loud - quiet)[:, :, 8:-8].mean().item() == pytest.approx(2, abs=0.03)
    assert (quiet - mel + 1)[:, :, 8:-8].mean().abs() < 0.1


@torch.no_grad()
def test_bfloat16_reconstructs_as_well(vae, mels):
    plain = vae.decode(encode(vae, mels)).sample
    with torch.autocast("cpu", torch.bfloat16):
        halved = vae.decode(encode(vae, mels)).sample.float()
    assert (halved - plain).abs().mean() < 0.1


def test_carriers_are_pairs_with_constants_in_each_group():
    norm = torch.nn.GroupNorm(2, 16)
    assert carrier_channels(norm, 4) == ([2, 4, 6, 10], [3, 5, 7, 11], [0, 1, 8, 9])
    assert carrier_channels(norm, 7) is None
    assert carrier_channels(torch.nn.GroupNorm(16, 16), 1) is None


@pytest.mark.parametrize(
    "config, fits",
    [
        ({"block_out_channels": [128, 256, 512], "norm_num_groups": 32, "mid_block_add_attention": True}, True),
        ({"norm_num_groups": 32}, False),
        ({"block_out_channels": [32, 64, 64]}, False),
        ({"block_out_channels": [8, 8, 16], "latent_channels": 4, "norm_num_groups": 4}, False),
        ({"latent_channels": 17}, False),
        ({"use_quant_conv": False}, False),
    ],
)
def test_only_vaes_with_room_for_it_get_the_transform(config, fits):
    with torch.device("meta"):
        vae = build_vae(**config)
    assert can_initialise(vae) is fits


def test_attention_and_more_layers_do_not_matter(mels):
    vae = build_vae(layers_per_block=2, mid_block_add_attention=True)
    initialise(vae, mels)
    plain = build_vae()
    initialise(plain, mels)
    assert (encode(vae, mels) - encode(plain, mels)).abs().max() < 0.06
