from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from pipeline_tango import TangoPipeline
from pipeline_tango.positions import with_positions


NUM_POSITIONS = 2


@pytest.fixture
def positioned(components):
    """A pipeline whose UNet is told positions."""
    config = components["unet"].config
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config, in_channels=config.in_channels + NUM_POSITIONS).eval()
    pipe = TangoPipeline(**components | {"unet": unet}, num_position_channels=NUM_POSITIONS)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs_of(unet):
    """Samples that the UNet gets from here on, in a list that grows."""
    inputs = []
    unet.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    return inputs


def test_positions_are_half_waves_after_the_latents():
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=7))
    latents = torch.randn(2, 4, 4, 3, generator=torch.Generator().manual_seed(0)).half()
    result = with_positions(latents, unet)
    assert result.dtype == torch.float16 and torch.equal(result[:, :4], latents)
    # cosines of 22.5, 67.5, 112.5 and 157.5 degrees, of twice and of three times as much
    expected = [
        [0.92388, 0.382683, -0.382683, -0.92388],
        [0.707107, -0.707107, -0.707107, 0.707107],
        [0.382683, -0.92388, 0.92388, -0.382683],
    ]
    for row in result:
        for band in range(3):
            torch.testing.assert_close(row[4:, :, band].float(), torch.tensor(expected), atol=5e-4, rtol=0)
    unet.config.in_channels = 4
    assert with_positions(latents, unet) is latents


def test_the_unet_gets_them_in_each_row_and_window_and_the_caller_does_not(positioned):
    inputs, shapes = inputs_of(positioned.unet), set()

    def look(pipe, step, timestep, tensors):
        shapes.add(tuple(tensors["latents"].shape))
        return tensors

    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    options |= {"callback_on_step_end": look, "output_type": "latent"}
    latents = positioned("rain", audio_length_in_s=1.28, window_length_in_s=0.64, **options).audios
    assert latents.shape[1] == 4 and shapes == {tuple(latents.shape)}
    assert sum(map(len, inputs)) > 2  # two rows, more than one window
    for sample in inputs:
        assert sample.shape[1:3] == (4 + NUM_POSITIONS, 16)
        assert torch.equal(sample, with_positions(sample[:, :4], positioned.unet))


def test_their_number_survives_saving_and_has_to_fit(positioned, components, tmp_path):
    def make(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("rain", audio_length_in_s=0.3, num_inference_steps=1, generator=generator).audios

    expected = make(positioned)
    positioned.save_pretrained(tmp_path)
    loaded = TangoPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.num_position_channels == NUM_POSITIONS and (make(loaded) == expected).all()
    assert TangoPipeline(**components).config.num_position_channels == 0
    with pytest.raises(ValueError, match=r"`unet` takes 6: .*\(`num_position_channels` 2\)"):
        make(TangoPipeline(**positioned.components))
    with pytest.raises(ValueError, match="4 latent channels beside `num_position_channels` 3, `unet` takes 6"):
        make(TangoPipeline(**positioned.components, num_position_channels=3))
    narrow = UNet2DConditionModel.from_config(components["unet"].config, in_channels=2)
    with pytest.raises(ValueError, match="`num_position_channels` -2"):
        make(TangoPipeline(**components | {"unet": narrow}, num_position_channels=-2))
