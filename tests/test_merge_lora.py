import pytest
import torch

from examples.merge_lora import main
from pipeline_tango import TangoPipeline
from training.denoiser import save_lora


def test_a_merged_model_sounds_as_the_model_with_the_lora_and_has_no_layer_of_it(short_folder, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = TangoPipeline.from_pretrained(short_folder)
    torch.manual_seed(0)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    save_lora(pipe, tmp_path / "lora")
    flags = [str(short_folder), str(tmp_path / "lora"), str(tmp_path / "merged")]
    main(flags)

    def latents_of(pipe):
        generator = torch.Generator().manual_seed(0)
        return pipe("rain", num_inference_steps=2, generator=generator, output_type="latent").audios

    merged, plain = TangoPipeline.from_pretrained(tmp_path / "merged"), TangoPipeline.from_pretrained(short_folder)
    assert merged.unet.state_dict().keys() == plain.unet.state_dict().keys()
    torch.testing.assert_close(latents_of(merged), latents_of(pipe), atol=1e-4, rtol=0)
    assert (latents_of(merged) - latents_of(plain)).abs().max() > 1e-2
    main([*flags[:2], str(tmp_path / "further"), "--lora_scale", "3"])
    further = TangoPipeline.from_pretrained(tmp_path / "further").unet.state_dict()
    before = plain.unet.state_dict()
    for name, weight in merged.unet.state_dict().items():
        torch.testing.assert_close(further[name] - before[name], 3 * (weight - before[name]), atol=1e-5, rtol=1e-4)
    with pytest.raises(SystemExit):
        main(flags)  # never over a folder that is there
    with pytest.raises(SystemExit):
        main([*flags[:2], str(tmp_path / "other"), "--lora_scale", "nan"])
    with pytest.raises(SystemExit, match="error: "):
        main([str(short_folder), str(tmp_path / "nowhere"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
