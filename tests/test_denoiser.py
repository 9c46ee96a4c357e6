import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import safe_open

from pipeline_tango import SCHEDULERS
from training.denoiser import (
    SCHEDULER_CONFIG,
    Reference,
    prepare_denoiser,
    save_lora,
    set_schedule,
    trained_parameters,
)


def test_only_what_trains_has_gradients_and_frozen_models_are_in_eval_mode(pipe):
    model = prepare_denoiser(pipe, "cpu", torch.float32)
    assert {id(p) for p in trained_parameters(model)} == {id(p) for p in pipe.unet.parameters()}
    assert model.training and pipe.unet.training
    assert not any(frozen.training for frozen in (pipe.vae, pipe.text_encoder, pipe.vocoder))
    model = prepare_denoiser(pipe, "cpu", torch.float32, train_text_encoder=True)
    expected = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    assert {id(p) for p in trained_parameters(model)} == {id(p) for p in expected}
    assert pipe.text_encoder.training


def test_lora_layers_train_in_float32_beside_frozen_weights_of_another_dtype(pipe):
    peft = pytest.importorskip("peft")
    model = prepare_denoiser(pipe, "cpu", torch.bfloat16, lora=peft.LoraConfig(r=2, target_modules=["to_q"]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert pipe.unet.conv_in.weight.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


@pytest.mark.parametrize("has_lora", [True, False])
def test_a_reference_stays_what_the_training_starts_from(pipe, has_lora):
    """Without a second copy for LoRA, whose layers are on again afterwards; and without dropout of its own."""
    peft = pytest.importorskip("peft")
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5
    inputs = (torch.randn(1, 4, 8, 16), torch.tensor([500]), torch.randn(1, 3, 16), torch.ones(1, 3))
    with torch.no_grad():
        before = pipe.unet(*inputs[:3], encoder_attention_mask=inputs[3]).sample
    lora = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False) if has_lora else None
    model = prepare_denoiser(pipe, "cpu", torch.float32, lora=lora)
    reference = Reference(pipe.unet, has_lora)
    assert (reference.unet is pipe.unet) == has_lora
    with torch.no_grad():
        for parameter in trained_parameters(model):
            parameter.add_(0.1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model_pred = reference(*inputs)
    torch.testing.assert_close(model_pred, before)
    assert not model_pred.requires_grad and model.training and pipe.unet.training
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert (model(*inputs) - before).abs().max() > 1e-3
    if not has_lora:
        assert Reference(pipe.unet, False, torch.bfloat16)(*inputs).dtype == torch.bfloat16


def test_a_schedule_keeps_its_scheduler_unless_that_cannot_be_rescaled(pipe):
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    set_schedule(pipe, "epsilon", rescale_betas_zero_snr=False)
    assert type(pipe.scheduler) is SCHEDULERS["dpm++"] and pipe.scheduler.config.prediction_type == "epsilon"
    set_schedule(pipe, None, rescale_betas_zero_snr=True)
    assert type(pipe.scheduler) is SCHEDULERS["ddpm"] and pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("prediction_type", [None, "epsilon"])
def test_a_schedule_changes_where_a_config_lists_its_values_as_defaults(pipe, prediction_type):
    """As the scheduler of a training from parts is built: `from_config` drops what `_use_default_values` names."""
    pipe.scheduler = SCHEDULERS["ddpm"](**SCHEDULER_CONFIG)
    assert "rescale_betas_zero_snr" in pipe.scheduler.config._use_default_values
    set_schedule(pipe, prediction_type, rescale_betas_zero_snr=True)
    config = pipe.scheduler.config
    assert (config.rescale_betas_zero_snr, config.timestep_spacing) == (True, "trailing")
    assert config.prediction_type == (prediction_type or "v_prediction")
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    pipe.scheduler = SCHEDULERS["ddpm"](beta_schedule="scaled_linear")
    assert "prediction_type" in pipe.scheduler.config._use_default_values
    set_schedule(pipe, "v_prediction", rescale_betas_zero_snr=False)
    assert pipe.scheduler.config.prediction_type == "v_prediction"


def test_a_change_that_a_scheduler_does_not_take_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler does not take 'epsilon'"):
        set_schedule(pipe, "epsilon", rescale_betas_zero_snr=False)


def test_a_lora_file_is_the_same_bytes_every_time(pipe, tmp_path):
    """Neither metadata in the order of a set nor of the library's hash map, which both differ between processes."""
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    prepare_denoiser(pipe, "cpu", torch.float32, lora=peft.LoraConfig(r=2, target_modules=targets))
    files = []
    for i in range(8):
        save_lora(pipe, tmp_path / str(i))
        files.append((tmp_path / str(i) / "pytorch_lora_weights.safetensors").read_bytes())
    assert files == files[:1] * 8
    with safe_open(tmp_path / "0" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lora_adapter_metadata"])["unet.target_modules"] == sorted(targets)
    pipe.unet.delete_adapters(["default"])
    pipe.load_lora_weights(tmp_path / "0")
