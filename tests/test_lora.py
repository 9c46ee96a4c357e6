import pytest
import torch
from conftest import SHORT, largest_difference, seeds
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pipeline_tango import TangoPipeline


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
