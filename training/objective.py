"""What the UNet learns to predict, and how its errors and those of the VAE are weighted. Pure functions.

Random draws take a list of `torch.Generator`, one for each sample, so that what a sample gets depends neither on its
place in a batch nor on the number of processes. Numbers are float32, so they do not depend on the precision either.
"""

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor


PREDICTION_TYPES = ("epsilon", "v_prediction")
WEIGHTINGS = ("min_snr", "original")


def check_scheduler(scheduler):
    """Refuse a scheduler that cannot be trained with. For the start of a run.

    Raises:
        ValueError: if its `prediction_type` is neither `"epsilon"` nor `"v_prediction"`, or is `"epsilon"` although
            the last timestep is pure noise (`rescale_betas_zero_snr`): the noise is then the input, and nothing is
            learned there (Lin et al. 2024, arXiv 2305.08891).
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` has to be one of {PREDICTION_TYPES}, not {prediction_type!r}.")
    if prediction_type == "epsilon" and (scheduler.alphas_cumprod == 0).any():
        raise ValueError("`rescale_betas_zero_snr` needs `prediction_type` 'v_prediction', not 'epsilon'.")


def sample_timesteps(num_train_timesteps, generators, device=None):
    """Timesteps `(batch,)`, uniform in 0 ... `num_train_timesteps` - 1, one from each generator."""
    _check_generators(generators)
    draws = [torch.randint(num_train_timesteps, (), generator=g, device=g.device) for g in generators]
    return torch.stack(draws).to(device)


def sample_noise(shape, generators, device=None, noise_offset=0.0):
    """Normal noise of `shape` `(batch, channels, ...)`, row i from generator i.

    `noise_offset` (about 0.1) adds so much normal noise that is constant over each channel, which teaches the model to
    move the mean of its output.
    """
    _check_generators(generators)
    if len(generators) != shape[0]:
        raise ValueError(f"`generators` has to hold one for each of {shape[0]} samples, not {len(generators)}.")
    noise = randn_tensor(tuple(shape), generators, device, torch.float32)
    if noise_offset:
        offset_shape = (*shape[:2], *[1] * (len(shape) - 2))
        noise = noise + noise_offset * randn_tensor(offset_shape, generators, device, torch.float32)
    return noise


def perturb_noise(noise, generators, input_perturbation):
    """Noise to add to the latents in place of `noise`, which remains what the target is made of.

    Source: input perturbation, Ning et al. 2023, arXiv 2301.11706; they use 0.1.
    """
    return noise + input_perturbation * sample_noise(noise.shape, generators, noise.device)


def empty_prompt_rows(proportion, generators, device=None):
    """Rows whose text is to be replaced by the encoded "" (and its mask), for classifier-free guidance.

    The encoded "" is the unconditional text of generation; the original trains on zeros instead, with the full mask.

    Returns:
        `torch.Tensor` of shape `(batch,)`: boolean, each `True` with probability `proportion`.
    """
    _check_generators(generators)
    if not 0 <= proportion <= 1:
        raise ValueError(f"`proportion` has to be in [0, 1], not {proportion}.")
    return (torch.stack([torch.rand((), generator=g, device=g.device) for g in generators]) < proportion).to(device)


def diffusion_target(scheduler, latents, noise, timesteps):
    """What the UNet should predict from `scheduler.add_noise(latents, noise, timesteps)`.

    Args:
        scheduler ([`SchedulerMixin`]): `prediction_type` is in its config. `"epsilon"`: the noise. `"v_prediction"`:
            alpha noise - sigma latents (Salimans and Ho 2022, arXiv 2202.00512).
        latents, noise (`torch.Tensor` of shape `(batch, ...)`): clean scaled latents, and the noise.
        timesteps (`torch.Tensor` of shape `(batch,)`): integers.

    Raises:
        ValueError: if shapes do not fit or the prediction type is another one.
    """
    if noise.shape != latents.shape:
        raise ValueError(f"`noise` has to be of the shape {tuple(latents.shape)}, not {tuple(noise.shape)}.")
    if timesteps.shape != latents.shape[:1]:
        raise ValueError(f"`timesteps` has to be of the shape {(len(latents),)}, not {tuple(timesteps.shape)}.")
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"`prediction_type` has to be one of {PREDICTION_TYPES}, not {prediction_type!r}.")


def snr(alphas_cumprod, timesteps):
    """Signal-to-noise ratio alpha^2 / sigma^2 at `timesteps`, float32, 0 where there is only noise."""
    alpha_squared = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_squared / (1 - alpha_squared)


def min_snr_weight(snr, gamma, prediction_type, weighting="min_snr"):
    """Weight of each sample's loss that makes the loss on the clean latents count min(SNR, gamma).

        epsilon: min(SNR, gamma) / SNR        v_prediction: min(SNR, gamma) / (SNR + 1)

    Args:
        snr (`torch.Tensor` of shape `(batch,)`): see `snr`. At 0 the weights take their limits, 1 and 0.
        gamma (`float`): 5 in the paper and in the original.
        prediction_type (`str`): `"epsilon"` or `"v_prediction"`.
        weighting (`str`, *optional*, defaults to `"min_snr"`): `"original"` is the epsilon weight for both, which the
            released checkpoints were trained with.

    Source: Hang et al. 2023, arXiv 2303.09556.
    """
    if not gamma > 0:
        raise ValueError(f"`gamma` has to be positive, not {gamma}.")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` has to be one of {PREDICTION_TYPES}, not {prediction_type!r}.")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` has to be one of {WEIGHTINGS}, not {weighting!r}.")
    if prediction_type == "v_prediction" and weighting == "min_snr":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR without 0 / 0


def loss_weights(scheduler, timesteps, snr_gamma, snr_weighting="min_snr"):
    """min-SNR weights of the samples' losses; None without `snr_gamma`."""
    if snr_gamma is None:
        return None
    ratios = snr(scheduler.alphas_cumprod, timesteps)
    return min_snr_weight(ratios, snr_gamma, scheduler.config.prediction_type, snr_weighting)


def diffusion_loss(model_pred, target, weights=None):
    """Mean squared error of each sample, times its weight. The caller averages.

    Args:
        model_pred, target (`torch.Tensor` of shape `(batch, ...)`): any precision.
        weights (`torch.Tensor` of shape `(batch,)`, *optional*): see `min_snr_weight`.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.

    Raises:
        ValueError: if shapes do not fit.
    """
    if model_pred.shape != target.shape:
        raise ValueError(f"`model_pred` has to be of the shape {tuple(target.shape)}, not {tuple(model_pred.shape)}.")
    if weights is not None and weights.shape != target.shape[:1]:
        raise ValueError(f"`weights` has to be of the shape {(len(target),)}, not {tuple(weights.shape)}.")
    loss = F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(1)
    return loss if weights is None else loss * weights


def dpo_gap(chosen_error, rejected_error, reference_chosen_error, reference_rejected_error):
    """By how much more than the reference the model errs on the chosen sound of each pair than on the rejected one:
    negative where it has moved towards the chosen sound, 0 for the reference itself.

    Args:
        chosen_error, rejected_error, reference_chosen_error, reference_rejected_error (`torch.Tensor` of shape
            `(batch,)`): mean squared errors with the same noise at the same timestep for both sounds of a pair: see
            `diffusion_loss`.

    Raises:
        ValueError: if the shapes differ.
    """
    errors = {
        "rejected_error": rejected_error,
        "reference_chosen_error": reference_chosen_error,
        "reference_rejected_error": reference_rejected_error,
    }
    for name, error in errors.items():
        if error.shape != chosen_error.shape:
            raise ValueError(f"`{name}` has to be of the shape {tuple(chosen_error.shape)}, not {tuple(error.shape)}.")
    return (chosen_error - rejected_error) - (reference_chosen_error - reference_rejected_error)


def dpo_loss(chosen_error, rejected_error, reference_chosen_error, reference_rejected_error, beta):
    """Preference loss of each pair, log(1 + exp(beta / 2 * gap)) with the gap of `dpo_gap`. The caller averages.

    Args:
        chosen_error, rejected_error, reference_chosen_error, reference_rejected_error (`torch.Tensor` of shape
            `(batch,)`): see `dpo_gap`; those of the reference without gradient.
        beta (`float`): how soon a pair that is ranked rightly stops to count. Tango 2 was trained with 2000.

    Raises:
        ValueError: if shapes differ or `beta` is not positive.

    Source: Wallace et al. 2024, arXiv 2311.12908, eq. (14), as trained by Tango 2 (Majumder et al. 2024, arXiv
    2404.09956): beta stands for their beta T omega, and the squared errors are means over the elements of a latent.
    """
    if not beta > 0:
        raise ValueError(f"`beta` has to be positive, not {beta}.")
    gap = dpo_gap(chosen_error, rejected_error, reference_chosen_error, reference_rejected_error)
    return F.softplus(beta / 2 * gap)


def clip_progress(chosen_error, rejected_error, reference_chosen_error, reference_rejected_error, limit):
    """Errors of a pair, without gradient where the model has moved far enough from the reference already.

    Errors differ by orders of magnitude between timesteps, so the bound is a share of the reference's error at the
    same timestep: the chosen sound's error counts as no less than (1 - `limit`) of it, the rejected one's as no more
    than (1 + `limit`). An error that has moved the wrong way keeps its gradient.

    Returns:
        `(chosen_error, rejected_error)` for `dpo_loss`.

    Source: the clipping of policy optimisation (Schulman et al. 2017, arXiv 1707.06347), here of errors.
    """
    if not limit > 0:
        raise ValueError(f"`limit` has to be positive, not {limit}.")
    return (
        torch.maximum(chosen_error, (1 - limit) * reference_chosen_error),
        torch.minimum(rejected_error, (1 + limit) * reference_rejected_error),
    )


def reconstruction_error(difference, pool_frames):
    """Mean absolute value of the means of `(batch, 1, frames, bins)` over windows of frames, and the mean of that over
    all lengths of window in `pool_frames`. Windows do not overlap; the last may be shorter."""
    windows = [(min(num_frames, difference.shape[2]), 1) for num_frames in pool_frames]
    pooled = [F.avg_pool2d(difference, window, ceil_mode=True, count_include_pad=False) for window in windows]
    return torch.stack([means.abs().mean() for means in pooled]).mean()


def _check_generators(generators):
    if not isinstance(generators, list) or not generators:
        raise ValueError(f"`generators` has to be a list, one `torch.Generator` for each sample, not {generators!r}.")
