"""Consistency distillation: a student goes in one evaluation where its teacher goes along an ODE. Pure functions.

The probability-flow ODE of a diffusion model has one trajectory through each noisy sample x_t. A consistency function
f(x_t, t, s) gives the point of that trajectory at an earlier timestep s, so f(x_t, t, s) = f(x_r, r, s) for any r
between. The student learns this for neighbours t > r on a grid of timesteps: x_r is a step of the teacher's ODE from
x_t, with classifier-free guidance, and the student's own value at r, without gradients, is the target at t.

    latent consistency   s is clean      Luo et al. 2023, arXiv 2310.04378; for audio Bai et al. 2023, arXiv 2309.10740
    trajectories         s is random     Zheng et al. 2024, arXiv 2402.19159
    phases               s is the end of the phase of t      Wang et al. 2024, arXiv 2405.18407

Where the budget is small, whole parts of the teacher's trajectories are a stronger signal: the teacher samples from
prompts once, its points at the ends of the student's steps are kept, and the student is trained to go from one to the
next (Luhman and Luhman 2021, arXiv 2101.02388, for one step; Salimans and Ho 2022, arXiv 2202.00512, for several).

A sample at noise level (alpha, sigma) is alpha latents + sigma noise, with alpha^2 + sigma^2 = 1. Random draws take a
list of `torch.Generator`, one for each sample, as in `objective`.
"""

import torch


ENDPOINTS = ("clean", "random", "phases")
SIGMA_DATA = 0.5  # of the boundary condition, and timestep_scaling: those of diffusers' LCMScheduler
TIMESTEP_SCALING = 10.0


def grid_timesteps(num_train_timesteps, num_grid_steps):
    """Timesteps `(num_grid_steps + 1,)` of the grid, ascending: 0, then those of diffusers' `LCMScheduler` with
    `original_inference_steps=num_grid_steps`.

    Raises:
        ValueError: if there are not so many timesteps.
    """
    if not 1 <= num_grid_steps <= num_train_timesteps:
        raise ValueError(f"`num_grid_steps` has to be between 1 and {num_train_timesteps}, not {num_grid_steps}.")
    interval = num_train_timesteps // num_grid_steps
    return torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, num_grid_steps + 1) * interval - 1])


def sample_grid_steps(num_grid_steps, generators, device=None):
    """Indices n `(batch,)` into the grid, uniform in 1 ... `num_grid_steps`: t is at n, r at n - 1."""
    draws = [torch.randint(1, num_grid_steps + 1, (), generator=g, device=g.device) for g in generators]
    return torch.stack(draws).to(device)


def sample_endpoints(grid_steps, endpoint, generators, num_grid_steps, num_phases=1):
    """Indices `(batch,)` into the grid of the timesteps s, at most `grid_steps` - 1.

    Args:
        grid_steps (`torch.Tensor` of shape `(batch,)`): see `sample_grid_steps`.
        endpoint (`str`): `"clean"`: 0. `"random"`: uniform. `"phases"`: the lower end of the phase, of `num_phases`
            equal parts of the grid, that holds t.

    Raises:
        ValueError: for another `endpoint`, or if the phases do not divide the grid.
    """
    if endpoint == "clean":
        return torch.zeros_like(grid_steps)
    if endpoint == "random":
        draws = [torch.rand((), generator=g, device=g.device) for g in generators]
        return (torch.stack(draws).to(grid_steps.device) * grid_steps).long()
    if endpoint == "phases":
        if num_phases < 1 or num_grid_steps % num_phases:
            raise ValueError(f"`num_phases` has to divide the grid of {num_grid_steps} steps, not {num_phases}.")
        length = num_grid_steps // num_phases
        return (grid_steps - 1) // length * length
    raise ValueError(f"`endpoint` has to be one of {ENDPOINTS}, not {endpoint!r}.")


def sample_guidance(low, high, generators, device=None):
    """Guidance scales `(batch,)`, uniform between `low` and `high`."""
    draws = [torch.rand((), generator=g, device=g.device) for g in generators]
    return low + (high - low) * torch.stack(draws).to(device)


def guidance_of_steps(guidance_scale, grid_steps, num_grid_steps, guidance_interval=None):
    """The scales `(batch,)` that the teacher is guided with: 1, no guidance, outside of `guidance_interval`, fractions
    of the grid counted from the noise, as in the pipeline (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
    if guidance_interval is None:
        return guidance_scale
    progress = 1 - grid_steps / num_grid_steps
    is_guided = (progress >= guidance_interval[0]) & (progress < guidance_interval[1])
    return torch.where(is_guided, guidance_scale, 1.0)


def noise_levels(alphas_cumprod, timesteps, num_dims=4):
    """(alpha, sigma) at `timesteps` `(batch,)`, float32, of shape `(batch, 1, ...)` with `num_dims` dimensions."""
    alpha_squared = alphas_cumprod.to(timesteps.device)[timesteps].float().view(-1, *[1] * (num_dims - 1))
    return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def clean_and_noise(model_pred, sample, alpha, sigma, prediction_type):
    """Predicted latents and noise from what the UNet predicts, float32, of the shape of `sample`.

        epsilon:       noise = model_pred                           latents = (sample - sigma noise) / alpha
        v_prediction:  noise = alpha model_pred + sigma sample      latents = alpha sample - sigma model_pred

    Raises:
        ValueError: for another `prediction_type`.
    """
    model_pred, sample = model_pred.float(), sample.float()
    if prediction_type == "epsilon":
        return (sample - sigma * model_pred) / alpha, model_pred
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_pred, alpha * model_pred + sigma * sample
    raise ValueError(f"`prediction_type` has to be 'epsilon' or 'v_prediction', not {prediction_type!r}.")


def guided(pred_text, pred_empty, guidance_scale):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), with one scale for each sample."""
    scale = guidance_scale.view(-1, *[1] * (pred_text.ndim - 1))
    return pred_empty + scale * (pred_text - pred_empty)


def solver_step(predict, sample, timesteps, next_timesteps, alphas_cumprod, prediction_type, solver="ddim"):
    """The teacher's step along its ODE from `timesteps` to the smaller `next_timesteps`.

    With y = sample / alpha and u = sigma / alpha the ODE is dy / du = noise(sample, t) (Song et al. 2021, arXiv
    2010.02502, equation 14). Euler's rule is DDIM. Heun's takes the mean of the noise at both ends, for a second
    evaluation; where alpha is 0, y has no value and the step is DDIM's.

    Args:
        predict (`Callable`): model prediction from `(sample, timesteps)`.
        sample (`torch.Tensor` of shape `(batch, channels, frames, bins)`).
        timesteps, next_timesteps (`torch.Tensor` of shape `(batch,)`).
        alphas_cumprod (`torch.Tensor` of shape `(num_train_timesteps,)`): the scheduler's.
        solver (`str`, *optional*, defaults to `"ddim"`): or `"heun"`.

    Returns:
        `torch.Tensor` of the shape of `sample`, float32.

    Raises:
        ValueError: for another solver.
    """
    if solver not in ("ddim", "heun"):
        raise ValueError(f"`solver` has to be 'ddim' or 'heun', not {solver!r}.")
    alpha, sigma = noise_levels(alphas_cumprod, timesteps, sample.ndim)
    next_alpha, next_sigma = noise_levels(alphas_cumprod, next_timesteps, sample.ndim)
    clean, noise = clean_and_noise(predict(sample, timesteps), sample, alpha, sigma, prediction_type)
    euler = next_alpha * clean + next_sigma * noise
    if solver == "ddim":
        return euler
    next_pred = predict(euler, next_timesteps)
    next_noise = clean_and_noise(next_pred, euler, next_alpha, next_sigma, prediction_type)[1]
    slope = (noise + next_noise) / 2
    heun = next_alpha * (sample / alpha + (next_sigma / next_alpha - sigma / alpha) * slope)
    return torch.where(alpha > 0, heun, euler)


def boundary_scalings(timesteps, num_dims=4):
    """(c_skip, c_out) of shape `(batch, 1, ...)`: exactly 1 and 0 at timestep 0, so that the consistency function is
    the identity there, and soon 0 and 1 (Luo et al. 2023, appendix; those of diffusers' `LCMScheduler`)."""
    scaled = timesteps.float().view(-1, *[1] * (num_dims - 1)) * TIMESTEP_SCALING
    return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5


def consistency_function(model_pred, sample, timesteps, endpoints, alphas_cumprod, prediction_type, to_clean=False):
    """f(x_t, t, s) from what the student predicts for `sample` at `timesteps`.

    Args:
        endpoints (`torch.Tensor` of shape `(batch,)`): timesteps s. f is the DDIM step to there, which is the identity
            where s = t.
        to_clean (`bool`, *optional*, defaults to `False`): f is c_skip sample + c_out latents instead, that of latent
            consistency, which `endpoints` play no part in.

    Returns:
        `torch.Tensor` of the shape of `sample`, float32.
    """
    alpha, sigma = noise_levels(alphas_cumprod, timesteps, sample.ndim)
    clean, noise = clean_and_noise(model_pred, sample, alpha, sigma, prediction_type)
    if to_clean:
        c_skip, c_out = boundary_scalings(timesteps, sample.ndim)
        return c_skip * sample.float() + c_out * clean
    end_alpha, end_sigma = noise_levels(alphas_cumprod, endpoints, sample.ndim)
    end = end_alpha * clean + end_sigma * noise
    is_there = (endpoints == timesteps).view(-1, *[1] * (sample.ndim - 1))
    return torch.where(is_there, sample.float(), end)


def pseudo_huber_loss(pred, target, delta=0.001):
    """sqrt(difference^2 + delta^2) - delta, mean of each sample `(batch,)`, float32 (Song and Dhariwal 2023, arXiv
    2310.14189; delta as in latent consistency).

    Raises:
        ValueError: if shapes do not fit.
    """
    if pred.shape != target.shape:
        raise ValueError(f"`pred` has to be of the shape {tuple(target.shape)}, not {tuple(pred.shape)}.")
    difference = pred.float() - target.float()
    return ((difference**2 + delta**2).sqrt() - delta).flatten(1).mean(1)


# Steps along kept trajectories


def step_ends(num_teacher_steps, num_student_steps):
    """Indices into the points of a teacher's trajectory, 0 ... `num_teacher_steps`, between which the student's steps
    lie: `num_student_steps` + 1 of them.

    Raises:
        ValueError: if the student has more steps than the teacher.
    """
    if not 1 <= num_student_steps <= num_teacher_steps:
        raise ValueError(
            f"`num_student_steps` has to be between 1 and {num_teacher_steps}, the teacher's, not {num_student_steps}."
        )
    return [round(i * num_teacher_steps / num_student_steps) for i in range(num_student_steps + 1)]


def student_timesteps(teacher_timesteps, step_counts):
    """The timesteps of students of so many steps, by which the UNet tells them apart: at the same point of a
    trajectory a student of fewer steps is told a timestep that is 2% smaller for each place in the list.

    Args:
        teacher_timesteps (`Sequence[int]`): of the teacher's sampling, descending.
        step_counts (`Sequence[int]`): numbers of steps, descending.

    Returns:
        `dict[int, list[int]]`.
    """
    timesteps = {}
    for place, number in enumerate(step_counts):
        ends = step_ends(len(teacher_timesteps), number)[:-1]
        timesteps[number] = [round(teacher_timesteps[end] * (1 - 0.02 * place)) for end in ends]
    return timesteps


def step_target(sample, end, alpha, sigma, end_alpha, end_sigma, prediction_type):
    """What the student has to predict for `sample` so that a DDIM step takes it to `end`, the solution of

        end = end_alpha latents + end_sigma noise

    with latents and noise as in [`clean_and_noise`]. Float32, of the shape of `sample`."""
    sample, end = sample.float(), end.float()
    if prediction_type == "epsilon":
        return (end - end_alpha / alpha * sample) / (end_sigma - end_alpha * sigma / alpha)
    if prediction_type == "v_prediction":
        return (end - (end_alpha * alpha + end_sigma * sigma) * sample) / (end_sigma * alpha - end_alpha * sigma)
    raise ValueError(f"`prediction_type` has to be 'epsilon' or 'v_prediction', not {prediction_type!r}.")
