import pytest
import torch

from pipeline_tango import SCHEDULERS
from training.denoiser import prepare_denoiser, set_schedule, trained_parameters


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


def test_a_schedule_keeps_its_scheduler_unless_that_cannot_be_rescaled(pipe):
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config, rescale_betas_zero_snr=False)
    set_schedule(pipe, "epsilon", rescale_betas_zero_snr=False)
    assert type(pipe.scheduler) is SCHEDULERS["dpm++"] and pipe.scheduler.config.prediction_type == "epsilon"
    set_schedule(pipe, None, rescale_betas_zero_snr=True)
    assert type(pipe.scheduler) is SCHEDULERS["ddpm"] and pipe.scheduler.config.prediction_type == "epsilon"
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.config.timestep_spacing == "trailing"
