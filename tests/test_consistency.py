"""The pure functions of distillation, against diffusers' schedulers and an ODE that is known in closed form."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, TCDScheduler

from training.consistency import (
    boundary_scalings,
    clean_and_noise,
    consistency_function,
    grid_timesteps,
    guidance_of_steps,
    guided,
    noise_levels,
    pseudo_huber_loss,
    sample_endpoints,
    sample_grid_steps,
    sample_guidance,
    solver_step,
)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = DDPMScheduler(**BETAS).alphas_cumprod
MEAN, DEVIATION = 0.7, 0.4  # of the Gaussian that the data come from


def generators(number, seed=0):
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(number)]


def timesteps(*values):
    return torch.tensor(values)


def noise_of_gaussian(sample, t):
    """The expectation of the noise in `sample` where the data are Gaussian: what a perfect teacher predicts."""
    alpha, sigma = noise_levels(ALPHAS, t, sample.ndim)
    return sigma * (sample - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2)


def prediction_of_gaussian(sample, t, prediction_type):
    noise = noise_of_gaussian(sample, t)
    if prediction_type == "epsilon":
        return noise
    alpha, sigma = noise_levels(ALPHAS, t, sample.ndim)
    return alpha * noise - sigma * (sample - sigma * noise) / alpha


def trajectory_of_gaussian(sample, t, s):
    """Where the ODE takes `sample` from `t` to `s`: as many standard deviations from the mean as before."""
    alpha, sigma = noise_levels(ALPHAS, t, sample.ndim)
    end_alpha, end_sigma = noise_levels(ALPHAS, s, sample.ndim)
    ratio = ((end_alpha**2 * DEVIATION**2 + end_sigma**2) / (alpha**2 * DEVIATION**2 + sigma**2)).sqrt()
    return end_alpha * MEAN + ratio * (sample - alpha * MEAN)


# Grid and draws


@pytest.mark.parametrize("num_grid_steps", [50, 40, 7, 1])
def test_grid_is_that_of_the_lcm_scheduler(num_grid_steps):
    scheduler = LCMScheduler(**BETAS, original_inference_steps=num_grid_steps)
    scheduler.set_timesteps(num_grid_steps)
    grid = grid_timesteps(1000, num_grid_steps)
    assert grid[0] == 0
    assert grid[1:].flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("number", [0, 1001])
def test_grid_has_no_more_steps_than_timesteps(number):
    with pytest.raises(ValueError, match="`num_grid_steps` has to be between 1 and 1000"):
        grid_timesteps(1000, number)


def test_all_grid_steps_are_drawn_and_endpoints_lie_before_them():
    steps = sample_grid_steps(5, generators(400))
    assert sorted(set(steps.tolist())) == [1, 2, 3, 4, 5]
    assert sample_endpoints(steps, "clean", None, 5).tolist() == [0] * 400
    random = sample_endpoints(steps, "random", generators(400, seed=1), 5)
    assert (random < steps).all() and set(random[steps == 5].tolist()) == {0, 1, 2, 3, 4}


def test_phases_end_where_their_part_of_the_grid_ends():
    steps = torch.arange(1, 9)
    assert sample_endpoints(steps, "phases", None, 8, num_phases=2).tolist() == [0, 0, 0, 0, 4, 4, 4, 4]
    with pytest.raises(ValueError, match="`num_phases` has to divide the grid of 8 steps, not 3"):
        sample_endpoints(steps, "phases", None, 8, num_phases=3)
    with pytest.raises(ValueError, match="`endpoint` has to be one of"):
        sample_endpoints(steps, "noise", None, 8)


def test_guidance_is_drawn_from_its_range_and_one_outside_of_the_interval():
    scales = sample_guidance(2.0, 6.0, generators(200))
    assert 2 <= scales.min() < 2.3 and 5.7 < scales.max() <= 6
    steps = torch.tensor([10, 6, 5, 1])  # 0, 0.4, 0.5 and 0.9 of the way from the noise
    scales = guidance_of_steps(torch.full((4,), 3.0), steps, 10, (0.0, 0.5))
    assert scales.tolist() == [3, 3, 1, 1]
    assert guidance_of_steps(scales, steps, 10) is scales


def test_guidance_has_a_scale_for_each_sample():
    text, empty = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert guided(text, empty, torch.tensor([1.0, 3.0])).flatten(1).unique(dim=1).tolist() == [[1], [3]]


# The teacher's step


@pytest.mark.parametrize(
    ("prediction_type", "rescale_betas_zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],  # epsilon predicts nothing of noise alone
)
def test_ddim_step_is_that_of_the_ddim_scheduler(prediction_type, rescale_betas_zero_snr):
    options = {"prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
    scheduler = DDIMScheduler(**BETAS, **options, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    sample, model_pred = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in (999, 519, 39):
        expected = scheduler.step(model_pred, t, sample).prev_sample
        step = solver_step(
            lambda *_: model_pred,
            sample,
            timesteps(t).expand(3),
            timesteps(t - 20).expand(3),
            scheduler.alphas_cumprod,
            prediction_type,
        )
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_heun_is_of_second_order(prediction_type):
    """With half the step the error of the way from 999 to 0 falls to about a half by DDIM, to a quarter by Heun."""
    errors = {}
    for solver in ("ddim", "heun"):
        for num_steps in (25, 50):
            grid = grid_timesteps(1000, num_steps).flip(0)
            x = start = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
            for t, r in zip(grid[:-1], grid[1:]):
                predict = lambda x, t: prediction_of_gaussian(x, t, prediction_type)  # noqa: E731
                x = solver_step(predict, x, t[None], r[None], ALPHAS, prediction_type, solver)
            exact = trajectory_of_gaussian(start, grid[:1], grid[-1:])
            errors[solver, num_steps] = float((x - exact).abs().max())
    assert errors["heun", 50] < 0.35 * errors["heun", 25]
    assert 0.4 < errors["ddim", 50] / errors["ddim", 25] < 0.7
    assert errors["heun", 25] < errors["ddim", 50]


def test_heun_falls_back_to_ddim_where_there_is_only_noise():
    alphas = DDPMScheduler(**BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing").alphas_cumprod
    sample, model_pred = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = (lambda *_: model_pred, sample, timesteps(999), timesteps(979), alphas, "v_prediction")
    heun = solver_step(*arguments, solver="heun")
    assert torch.isfinite(heun).all() and torch.equal(heun, solver_step(*arguments))


def test_what_is_unknown_is_refused():
    sample = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="`solver` has to be 'ddim' or 'heun', not 'euler'"):
        solver_step(None, sample, timesteps(9), timesteps(0), ALPHAS, "epsilon", "euler")
    with pytest.raises(ValueError, match="`prediction_type` has to be"):
        clean_and_noise(sample, sample, 1.0, 0.0, "sample")
    with pytest.raises(ValueError, match="`pred` has to be of the shape"):
        pseudo_huber_loss(sample, sample[0])


# The consistency function


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_boundary_condition_is_exact(prediction_type):
    """Whatever the student predicts, its function is the identity at the last timestep, and where s = t."""
    sample, model_pred = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    last = torch.zeros(3, dtype=torch.long)
    assert torch.equal(
        consistency_function(model_pred, sample, last, last, ALPHAS, prediction_type, to_clean=True), sample
    )
    t = timesteps(0, 499, 999)
    assert torch.equal(consistency_function(model_pred, sample, t, t, ALPHAS, prediction_type), sample)


def test_boundary_scalings_are_those_of_the_lcm_scheduler():
    c_skip, c_out = boundary_scalings(timesteps(0, 1, 19, 999))
    expected = [LCMScheduler().get_scalings_for_boundary_condition_discrete(t) for t in (0, 1, 19, 999)]
    torch.testing.assert_close(torch.stack([c_skip, c_out], -1).view(4, 2), torch.tensor(expected).float())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samplers_use_the_same_function(prediction_type):
    """One step of LCM gives the function to clean latents; without noise, one of TCD that to the next timestep."""
    sample, model_pred = torch.randn(2, 1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    lcm = LCMScheduler(**BETAS, prediction_type=prediction_type)
    lcm.set_timesteps(1)
    output = consistency_function(model_pred, sample, timesteps(999), timesteps(0), ALPHAS, prediction_type, True)
    torch.testing.assert_close(lcm.step(model_pred, 999, sample).prev_sample, output, rtol=1e-4, atol=1e-4)
    tcd = TCDScheduler(**BETAS, prediction_type=prediction_type)
    tcd.set_timesteps(2)
    t, s = tcd.timesteps
    output = consistency_function(model_pred, sample, t[None], s[None], ALPHAS, prediction_type)
    step = tcd.step(model_pred, t, sample, eta=0.0).prev_sample
    torch.testing.assert_close(step, output, rtol=1e-4, atol=1e-4)


def test_pseudo_huber_loss():
    pred, target = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert float(pseudo_huber_loss(pred, target, 4.0)) == pytest.approx((5 - 4) / 2)
    assert float(pseudo_huber_loss(pred, pred)) == 0


class Linear(torch.nn.Module):
    """A student with a slope and an offset for each timestep of a grid, which can be perfect for Gaussian data."""

    def __init__(self, num_steps):
        super().__init__()
        self.slopes = torch.nn.Parameter(torch.zeros(num_steps + 1))
        self.offsets = torch.nn.Parameter(torch.zeros(num_steps + 1))

    def forward(self, sample, index):
        return self.slopes[index].view(-1, 1, 1, 1) * sample + self.offsets[index].view(-1, 1, 1, 1)


@pytest.mark.parametrize("endpoint", ["clean", "phases"])
def test_student_of_a_gaussian_is_the_known_consistency_function(endpoint):
    """With targets from the step before, the student has to find where the ODE ends, which is known. (With random ends
    one slope would have to serve all of them.)"""
    num_steps, kind = 6, "epsilon"
    grid = grid_timesteps(1000, num_steps)
    student, drawn = Linear(num_steps), generators(1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for step in range(2500):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 2500)
        rng = torch.Generator().manual_seed(step)
        steps = torch.randint(1, num_steps + 1, (48,), generator=rng)
        ends = sample_endpoints(steps, endpoint, drawn * 48, num_steps, num_phases=2)
        t, r, s = grid[steps], grid[steps - 1], grid[ends]
        alpha, sigma = noise_levels(ALPHAS, t)
        data = MEAN + DEVIATION * torch.randn(48, 1, 1, 4, generator=rng)
        sample = alpha * data + sigma * torch.randn(48, 1, 1, 4, generator=rng)
        with torch.no_grad():
            neighbour = trajectory_of_gaussian(sample, t, r)
            pred = student(neighbour, steps - 1)
            target = consistency_function(pred, neighbour, r, s, ALPHAS, kind, endpoint == "clean")
        output = consistency_function(student(sample, steps), sample, t, s, ALPHAS, kind, endpoint == "clean")
        optimizer.zero_grad()
        pseudo_huber_loss(output, target, 0.01).mean().backward()
        optimizer.step()
    sample = torch.linspace(-1.5, 1.5, 4).view(1, 1, 1, 4)
    ends = {"clean": [0] * 6, "phases": [0, 0, 0, 3, 3, 3]}[endpoint]
    for n, m in zip(range(1, num_steps + 1), ends):
        t, s = grid[n][None], grid[m][None]
        pred = student(sample, timesteps(n))
        output = consistency_function(pred, sample, t, s, ALPHAS, kind, endpoint == "clean")
        exact = trajectory_of_gaussian(sample, t, s)
        torch.testing.assert_close(output, exact, rtol=0, atol=0.05)
