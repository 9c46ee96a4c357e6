import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDENS, golden
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_tango import TangoPipeline
from training.denoiser import Denoiser
from training.objective import (
    check_scheduler,
    clip_progress,
    diffusion_loss,
    diffusion_target,
    dpo_gap,
    dpo_loss,
    empty_prompt_rows,
    loss_weights,
    min_snr_weight,
    perturb_noise,
    reconstruction_error,
    sample_noise,
    sample_timesteps,
    snr,
)
from training.train_dpo import pair_errors


META = json.loads((GOLDENS / "golden" / "meta.json").read_text())
DPO = json.loads((GOLDENS / "golden" / "dpo.json").read_text())


def make_scheduler(prediction_type="v_prediction", **kwargs):
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        **kwargs,
    )


def make_generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def original(converted):
    """The original's UNet, scheduler and text states of its training prompts, converted."""
    pipe = TangoPipeline.from_pretrained(converted)
    with torch.no_grad():
        prompt_embeds, attention_mask, _, _ = pipe.encode_prompt(
            META["train_prompts"], do_classifier_free_guidance=False
        )
    scheduler = DDPMScheduler.from_pretrained(converted, subfolder="scheduler")
    unet = UNet2DConditionModel.from_pretrained(converted, subfolder="unet").eval()
    return unet, scheduler, prompt_embeds, attention_mask


def original_loss(original, timesteps, gamma):
    unet, scheduler, prompt_embeds, attention_mask = original
    tensors = golden("train")
    latents, noise = tensors["latents"], tensors["noise"]
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, encoder_attention_mask=attention_mask).sample
    weights = None
    if gamma is not None:
        ratios = snr(scheduler.alphas_cumprod, timesteps)
        weights = min_snr_weight(ratios, gamma, scheduler.config.prediction_type, weighting="original")
    return diffusion_loss(model_pred, diffusion_target(scheduler, latents, noise, timesteps), weights).mean()


@pytest.mark.parametrize(
    ("name", "timesteps", "gamma"),
    [
        ("snr_none", META["train_timesteps"], None),
        ("snr_5", META["train_timesteps"], 5.0),
        ("validation_snr_none", [500, 500], None),
        ("validation_snr_5", [500, 500], 5.0),
    ],
)
def test_loss_matches_the_original(original, name, timesteps, gamma):
    with torch.no_grad():
        loss = original_loss(original, torch.tensor(timesteps), gamma)
    assert loss.item() == pytest.approx(META["train_losses"][name], rel=1e-5)


def test_gradients_match_the_original(original):
    unet = original[0]
    original_loss(original, golden("train")["timesteps"], 5.0).backward()
    for name, norm in META["train_grad_norms_snr_5"].items():
        assert unet.get_parameter(name).grad.norm().item() == pytest.approx(norm, rel=1e-4)
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in unet.parameters()])
    assert total.item() == pytest.approx(META["train_grad_norm_total_snr_5"], rel=1e-4)
    unet.zero_grad()


@pytest.fixture(scope="module")
def preferences(converted):
    """A policy and a reference whose `conv_out.weight` is smaller, and what `pair_errors` takes of the original's two
    pairs beside them."""
    pipe = TangoPipeline.from_pretrained(converted)
    with torch.no_grad():
        text, mask, _, _ = pipe.encode_prompt(DPO["prompts"], do_classifier_free_guidance=False)
    tensors = golden("dpo")
    latents = torch.cat([tensors["latents_chosen"], tensors["latents_rejected"]])
    scheduler = DDPMScheduler.from_pretrained(converted, subfolder="scheduler")
    inputs = (scheduler, latents, tensors["noise"][:2], tensors["timesteps"], text.repeat(2, 1, 1), mask.repeat(2, 1))
    policy, reference = (
        Denoiser(UNet2DConditionModel.from_pretrained(converted, subfolder="unet").eval()) for _ in range(2)
    )
    with torch.no_grad():
        reference.unet.conv_out.weight.mul_(0.9)
    return policy, reference, inputs, tensors


def test_preference_losses_and_their_gradient_match_the_original(preferences):
    policy, reference, inputs, tensors = preferences
    errors = pair_errors(policy, *inputs)
    with torch.no_grad():
        reference_errors = pair_errors(reference, *inputs)
    torch.testing.assert_close(errors.flatten(), tensors["policy_mse"], rtol=0, atol=1e-5)
    torch.testing.assert_close(reference_errors.flatten(), tensors["reference_mse"], rtol=0, atol=1e-5)
    losses = DPO["losses"]
    for beta, tolerance in ((1, 1e-5), (20, 1e-5), (2000, 3e-4)):
        loss = dpo_loss(*errors, *reference_errors, beta).mean()
        assert loss.item() == pytest.approx(losses[f"dpo_beta_{beta}"], abs=tolerance)
        same = dpo_loss(*errors, *errors.detach(), beta).mean()
        assert same.item() == pytest.approx(losses["dpo_reference_equals_policy"], abs=1e-6)
    dpo_loss(*errors, *reference_errors, 20).mean().backward()
    norm = policy.unet.conv_out.weight.grad.norm().item()
    assert norm == pytest.approx(losses["grad_norm_conv_out_weight_beta_20"], rel=1e-4)
    assert all(parameter.grad is None for parameter in reference.parameters())
    policy.zero_grad()


@pytest.mark.parametrize(("name", "gamma"), [("sft_snr_none", None), ("sft_snr_5", 5.0)])
def test_warm_up_losses_match_the_original(preferences, name, gamma):
    policy, _, inputs, _ = preferences
    with torch.no_grad():
        chosen_errors = pair_errors(policy, *inputs)[0]
    weights = loss_weights(inputs[0], inputs[3], gamma, "original")
    loss = (chosen_errors * (1 if weights is None else weights)).mean()
    assert loss.item() == pytest.approx(DPO["losses"][name], abs=1e-5)


def test_the_preference_loss_has_its_closed_form():
    for error in ([1.0, 1.0, 1.0, 1.0], [3.0, 5.0, 0.5, 2.5]):  # no further apart than for the reference
        assert dpo_loss(*torch.tensor(error), beta=2000).item() == pytest.approx(math.log(2))
    errors = torch.tensor([[1.0, 2.0], [1.5, 1.0], [1.2, 2.0], [1.3, 1.0]])
    gap = torch.tensor([-0.4, 0.0])  # (1.0 - 1.5) - (1.2 - 1.3)
    torch.testing.assert_close(dpo_gap(*errors), gap, rtol=0, atol=1e-6)
    for beta in (1.0, 20.0):
        torch.testing.assert_close(dpo_loss(*errors, beta), -F.logsigmoid(-beta / 2 * gap), rtol=0, atol=1e-5)
    # far on the wrong side it is the straight line beta / 2 gap, far on the right one 0, and finite throughout
    wrong, right = torch.tensor([[9.0, 1.0], [1.0, 9.0], [1.0, 1.0], [1.0, 1.0]]).unbind(1)
    assert dpo_loss(*wrong, beta=2000).item() == 8000 and dpo_loss(*right, beta=2000).item() == 0


def test_the_preference_loss_pulls_the_chosen_and_pushes_the_rejected_error():
    errors = torch.tensor([1.0, 1.5, 1.2, 1.3], requires_grad=True)
    dpo_loss(*errors, beta=20.0).backward()
    slope = 10 / (1 + math.exp(4))  # beta / 2 sigmoid(beta / 2 gap)
    torch.testing.assert_close(errors.grad, torch.tensor([slope, -slope, -slope, slope]))


def test_clipped_progress_has_no_gradient_where_the_error_is_far_better():
    reference = torch.tensor([[2.0, 2.0, 2.0], [0.2, 0.2, 0.2]])
    errors = torch.tensor([[1.9, 1.7, 2.5], [0.21, 0.3, 0.1]], requires_grad=True)
    clipped = clip_progress(*errors, *reference, 0.1)
    torch.testing.assert_close(torch.stack(clipped), torch.tensor([[1.9, 1.8, 2.5], [0.21, 0.22, 0.1]]))
    (clipped[0].sum() + clipped[1].sum()).backward()
    assert errors.grad.tolist() == [[1, 0, 1], [1, 0, 1]]


def test_snr_matches_the_original_and_diffusers():
    scheduler, tensors = make_scheduler(), golden("train")
    torch.testing.assert_close(snr(scheduler.alphas_cumprod, tensors["timesteps"]), tensors["snr"], rtol=1e-4, atol=0)
    timesteps = torch.arange(1000)
    expected = compute_snr(scheduler, timesteps)
    torch.testing.assert_close(snr(scheduler.alphas_cumprod, timesteps), expected, rtol=1e-4, atol=0)


@settings(max_examples=50, deadline=None)
@given(timestep=st.integers(0, 999), gamma=st.floats(0.1, 100.0), seed=st.integers(0, 1000))
def test_epsilon_and_v_weights_give_the_same_loss_for_the_same_guess_of_the_latents(timestep, gamma, seed):
    # Hang et al. 2023: whatever is predicted, the squared error of the latents it implies counts min(SNR, gamma)
    timesteps = torch.tensor([timestep])
    noise, latents, error = sample_noise((3, 1, 4, 4), make_generators(seed, seed + 1, seed + 2)).split(1)
    scheduler = make_scheduler()
    alpha_squared = scheduler.alphas_cumprod[timestep].double()
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    noisy_latents, guess = alpha * latents + sigma * noise, latents + error
    guessed_noise = (noisy_latents - alpha * guess) / sigma
    ratios = snr(scheduler.alphas_cumprod, timesteps)
    expected = ratios.clamp(max=gamma) * error.square().mean()
    for prediction_type, model_pred in (
        ("epsilon", guessed_noise),
        ("v_prediction", alpha * guessed_noise - sigma * guess),
    ):
        target = diffusion_target(make_scheduler(prediction_type), latents, noise, timesteps)
        weights = min_snr_weight(ratios, gamma, prediction_type)
        torch.testing.assert_close(diffusion_loss(model_pred, target, weights), expected, rtol=2e-3, atol=1e-6)


def test_weights_at_their_limits():
    ratios = torch.tensor([0.0, 1.0, 5.0, 20.0, torch.inf])
    expected = {
        ("epsilon", "min_snr"): [1, 1, 1, 0.25, 0],
        ("v_prediction", "min_snr"): [0, 1 / 2, 5 / 6, 5 / 21, 0],
        ("epsilon", "original"): [1, 1, 1, 0.25, 0],
        ("v_prediction", "original"): [1, 1, 1, 0.25, 0],
    }
    for (prediction_type, weighting), weights in expected.items():
        came = min_snr_weight(ratios, 5.0, prediction_type, weighting)
        torch.testing.assert_close(came, torch.tensor(weights, dtype=torch.float32))


def test_a_very_large_gamma_is_no_weight_for_epsilon_and_the_latents_loss_for_v():
    ratios = snr(make_scheduler().alphas_cumprod, torch.arange(1000))
    assert (min_snr_weight(ratios, 1e9, "epsilon") == 1).all()
    torch.testing.assert_close(min_snr_weight(ratios, 1e9, "v_prediction"), ratios / (ratios + 1))


@pytest.mark.parametrize("weighting", ["min_snr", "original"])
def test_zero_terminal_snr_is_finite_for_v(weighting):
    scheduler = make_scheduler(rescale_betas_zero_snr=True)
    check_scheduler(scheduler)
    timesteps = torch.arange(1000)
    ratios = snr(scheduler.alphas_cumprod, timesteps)
    weights = min_snr_weight(ratios, 5.0, "v_prediction", weighting)
    assert ratios[-1] == 0 and weights.isfinite().all()
    latents, noise = sample_noise((2, 1, 2, 2), make_generators(0, 1)).split(1)
    torch.testing.assert_close(diffusion_target(scheduler, latents, noise, timesteps[-1:]), -latents)
    torch.testing.assert_close(scheduler.add_noise(latents, noise, timesteps[-1:]), noise)


def test_epsilon_target_is_the_noise():
    latents, noise = torch.randn(2, 3, 1, 4, 4)
    assert diffusion_target(make_scheduler("epsilon"), latents, noise, torch.tensor([0, 500, 999])) is noise


def test_loss_is_per_sample_weighted_and_in_float32():
    model_pred, target, weights = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 1.0, 2.0])
    loss = diffusion_loss(model_pred, target, weights)
    for row in range(3):
        torch.testing.assert_close(loss[row], weights[row] * F.mse_loss(model_pred[row], target[row]))
    torch.testing.assert_close(diffusion_loss(model_pred, target).mean(), F.mse_loss(model_pred, target))
    half = diffusion_loss(torch.full((1, 2), 300.0, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.float16))
    assert half.dtype == torch.float32 and half.item() == 90000.0  # over the range of float16


@pytest.mark.parametrize(
    "draw",
    [
        lambda generators: sample_timesteps(1000, generators),
        lambda generators: sample_noise((len(generators), 2, 3, 4), generators),
        lambda generators: sample_noise((len(generators), 2, 3, 4), generators, noise_offset=0.1),
        lambda generators: perturb_noise(torch.zeros(len(generators), 2, 3), generators, 0.1),
        lambda generators: empty_prompt_rows(0.5, generators),
    ],
)
def test_what_a_sample_draws_does_not_depend_on_its_batch(draw):
    seeds = range(8)
    together = draw(make_generators(*seeds))
    halves = [draw(make_generators(*seeds[:5])), draw(make_generators(*seeds[5:]))]
    alone = [draw(make_generators(seed)) for seed in seeds]
    assert torch.equal(together, torch.cat(halves)) and torch.equal(together, torch.cat(alone))
    assert len(together.unique(dim=0)) > 1


def test_timesteps_are_uniform_over_the_schedule():
    timesteps = sample_timesteps(4, make_generators(0) * 4000)
    assert timesteps.dtype == torch.int64
    assert (timesteps.bincount(minlength=4) - 1000).abs().max() < 120  # 4 standard deviations


def test_rows_are_emptied_in_proportion():
    generators = make_generators(0) * 4000
    assert empty_prompt_rows(0.1, generators).sum().item() == pytest.approx(400, abs=80)
    assert not empty_prompt_rows(0.0, generators).any() and empty_prompt_rows(1.0, generators).all()


def test_noise_offset_is_constant_over_a_channel():
    shape = (2, 3, 8, 4)
    offset = sample_noise(shape, make_generators(0, 1), noise_offset=0.1) - sample_noise(shape, make_generators(0, 1))
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand(shape), atol=1e-6, rtol=0)
    assert len(offset[:, :, 0, 0].unique()) == 6


def test_perturbed_noise_is_wider_by_the_perturbation():
    noise = sample_noise((1, 1, 300, 300), make_generators(0))
    perturbed = perturb_noise(noise, make_generators(1), 0.5)
    assert (perturbed - noise).std().item() == pytest.approx(0.5, rel=0.02)
    assert torch.equal(perturb_noise(noise, make_generators(1), 0.0), noise)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: check_scheduler(make_scheduler("sample")), "prediction_type"),
        (lambda: check_scheduler(make_scheduler("epsilon", rescale_betas_zero_snr=True)), "rescale_betas_zero_snr"),
        (lambda: sample_timesteps(1000, torch.Generator()), "generators"),
        (lambda: sample_timesteps(1000, []), "generators"),
        (lambda: sample_noise((2, 1, 2, 2), make_generators(0)), "generators"),
        (lambda: empty_prompt_rows(1.1, make_generators(0)), "proportion"),
        (
            lambda: diffusion_target(
                make_scheduler("sample"), torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0])
            ),
            "prediction_type",
        ),
        (
            lambda: diffusion_target(make_scheduler(), torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor([0])),
            "noise",
        ),
        (
            lambda: diffusion_target(make_scheduler(), torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([0])),
            "timesteps",
        ),
        (lambda: min_snr_weight(torch.ones(1), 0.0, "epsilon"), "gamma"),
        (lambda: min_snr_weight(torch.ones(1), 5.0, "sample"), "prediction_type"),
        (lambda: min_snr_weight(torch.ones(1), 5.0, "epsilon", weighting="both"), "weighting"),
        (lambda: diffusion_loss(torch.zeros(2, 2), torch.zeros(2, 1)), "model_pred"),
        (lambda: dpo_loss(*torch.zeros(4, 2), beta=0.0), "beta"),
        (lambda: dpo_loss(*torch.zeros(3, 2), torch.zeros(4), 1.0), "reference_rejected_error"),
        (lambda: clip_progress(*torch.ones(4, 2), limit=0.0), "limit"),
        (lambda: diffusion_loss(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(1)), "weights"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call()


def test_pooled_errors_are_of_means_over_frames():
    there_and_back = torch.tensor([1.0, -1.0, 1.0, -1.0, 3.0]).view(1, 1, 5, 1)
    assert float(reconstruction_error(there_and_back, [1])) == pytest.approx(7 / 5)
    assert float(reconstruction_error(there_and_back, [2])) == pytest.approx((0 + 0 + 3) / 3)
    assert float(reconstruction_error(there_and_back, [1, 2])) == pytest.approx((7 / 5 + 1) / 2)
    assert float(reconstruction_error(there_and_back, [64])) == pytest.approx(3 / 5)
    colour = torch.tensor([1.0, -1.0]).expand(1, 1, 5, 2)  # bands are never pooled
    assert float(reconstruction_error(colour, [64])) == 1
