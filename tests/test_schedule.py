import inspect

import numpy as np
import pytest
import torch
from conftest import SHORT, build_components, largest_difference, noise, seeds
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers import schedulers as diffusers_schedulers
from diffusers.schedulers import KarrasDiffusionSchedulers

from pipeline_tango import SCHEDULERS
from pipeline_tango.schedule import Schedule


# Schedulers


def all_schedulers():
    return [scheduler.name for scheduler in KarrasDiffusionSchedulers] + ["LCMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("name", all_schedulers())
def test_every_scheduler_runs_by_from_config(pipe, name):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    pipe.scheduler = getattr(diffusers_schedulers, name).from_config(pipe.scheduler.config)
    calls, steps = [], []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: calls.append(args[1]), with_kwargs=True)

    def count(pipe, step, timestep, callback_kwargs):
        steps.append(step)
        return callback_kwargs

    audio = pipe(
        ["rain", "dog"],
        num_inference_steps=4,
        audio_length_in_s=0.3,
        generator=seeds(1, 2),
        callback_on_step_end=count,
    ).audios
    assert np.isfinite(audio).all() and np.abs(audio).max() > 0.01
    assert largest_difference(audio[0], audio[1]) > 1e-3
    assert steps == list(range(len(pipe.scheduler.timesteps))) and len(calls) == pipe.num_timesteps
    if pipe.scheduler.config.prediction_type != "v_prediction":
        pytest.fail("the prediction type was lost on the way")


@pytest.mark.parametrize("name", ["ddim", "dpm++", "unipc", "heun", "pndm"])
def test_many_steps_of_deterministic_schedulers_converge_to_one_sound(pipe, name):
    # the probability-flow ODE has one solution: schedulers that solve it agree when steps are small
    def run(scheduler, num_inference_steps):
        pipe.scheduler = scheduler.from_config(config, timestep_spacing="trailing")
        return pipe(
            "rain",
            num_inference_steps=num_inference_steps,
            audio_length_in_s=0.3,
            generator=seeds(0),
            output_type="latent",
        ).audios

    config = pipe.scheduler.config
    reference = run(DPMSolverMultistepScheduler, 200)
    coarse = run(SCHEDULERS["ddim"], 2)
    fine = run(SCHEDULERS[name], 100)
    assert (fine - reference).std() < 0.3 * (coarse - reference).std()


def test_flow_matching_schedulers_get_a_clear_error(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="`scheduler`.*flow-matching"):
        pipe("rain", **SHORT)
    pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match="`scheduler`.*flow_prediction"):
        pipe("rain", **SHORT)


def test_custom_timesteps_and_sigmas(pipe):
    config = pipe.scheduler.config
    seen = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(int(args[1])), with_kwargs=True)
    pipe("rain", timesteps=[900, 500, 100], audio_length_in_s=0.3)
    assert seen == [900, 500, 100]
    pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    assert np.isfinite(pipe("rain", sigmas=[14.0, 3.0, 0.5, 0.0], audio_length_in_s=0.3).audios).all()
    pipe.scheduler = SCHEDULERS["ddim"].from_config(config)
    with pytest.raises(ValueError, match="`timesteps` cannot be set"):
        pipe("rain", timesteps=[900, 500, 100], audio_length_in_s=0.3)


def test_1000_steps_that_would_start_beyond_training_are_refused(pipe):
    with pytest.raises(ValueError, match="`num_inference_steps` of 1000"):
        pipe("rain", num_inference_steps=1000, audio_length_in_s=0.3)


def test_too_few_steps_for_pndms_warm_up_are_refused(pipe):
    pipe.scheduler = SCHEDULERS["pndm"].from_config(pipe.scheduler.config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="`num_inference_steps`.*at least 4"):
        pipe("rain", num_inference_steps=3, audio_length_in_s=0.3)
    pipe.scheduler = SCHEDULERS["pndm"].from_config(pipe.scheduler.config, skip_prk_steps=True)
    assert np.isfinite(pipe("rain", num_inference_steps=1, audio_length_in_s=0.3).audios).all()


def test_eta_reaches_ddim_and_leaves_tcd_its_own_default(pipe):
    config = pipe.scheduler.config
    for name, explicit in (("DDIMScheduler", 0.0), ("TCDScheduler", 0.3)):
        pipe.scheduler = getattr(diffusers_schedulers, name).from_config(config)
        runs = {
            eta: pipe("rain", eta=eta, generator=seeds(0), output_type="latent", **SHORT).audios
            for eta in (None, explicit, 0.9)
        }
        assert torch.equal(runs[None], runs[explicit])
        assert largest_difference(runs[None], runs[0.9]) > 1e-3


def know_the_answer(pipe, monkeypatch, answer):
    """Let the UNet predict the velocity towards `answer`: a scheduler that is started rightly ends there."""
    alphas = pipe.scheduler.alphas_cumprod.double()

    def forward(latents, timestep, **kwargs):
        below = int(timestep)
        share = float(timestep) - below
        alpha_squared = torch.lerp(alphas[below], alphas[min(below + 1, 999)], share)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        rows = answer.repeat(len(latents) // len(answer), 1, 1, 1)
        return ((alpha * (latents - alpha * rows) / sigma - sigma * rows).float(),)

    monkeypatch.setattr(pipe.unet, "forward", forward)


# Audio to audio


def starting_midway():
    names = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    # LMS cannot, EDM Euler is not for this UNet at any strength (its timesteps are logarithms of noise levels)
    return sorted({*names, "LCMScheduler", "TCDScheduler"} - {"LMSDiscreteScheduler", "EDMEulerScheduler"})


def start_midway(pipe, call, monkeypatch, strength, num_inference_steps):
    """How far from where it should a variation ends, when as many steps are taken as `strength` says."""
    answer = torch.randn(1, 4, 8, 16, generator=seeds(1)[0])
    know_the_answer(pipe, monkeypatch, answer)
    steps = []
    latents = call(
        pipe=pipe,
        audio=noise(5000),
        strength=strength,
        num_inference_steps=num_inference_steps,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, kwargs: steps.append(step) or {},
    )
    assert pipe.num_timesteps == len(steps) <= num_inference_steps * strength * pipe.scheduler.order + 1
    return (latents - answer).abs().max()


@pytest.mark.parametrize("name", starting_midway())
@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_every_scheduler_starts_where_strength_says(pipe, call, monkeypatch, name, strength):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers_schedulers, name).from_config(pipe.scheduler.config, **options)
    # those that end above zero noise, or average velocities of several timesteps, do so without audio too
    tolerance = {"DEISMultistepScheduler": 0.3, "TCDScheduler": 0.3, "PNDMScheduler": 0.3}.get(name, 1e-3)
    assert start_midway(pipe, call, monkeypatch, strength, 20) < tolerance


@pytest.mark.parametrize("name", ["dpm++", "unipc", "euler", "heun"])
@pytest.mark.parametrize("num_inference_steps", [20, 100])  # of 100, many have the timestep of another
def test_karras_sigmas_start_where_strength_says(pipe, call, monkeypatch, name, num_inference_steps):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert start_midway(pipe, call, monkeypatch, 0.3, num_inference_steps) < 0.1


def test_schedulers_that_cannot_start_midway_say_so(pipe, call):
    config = pipe.scheduler.config
    pipe.scheduler = diffusers_schedulers.LMSDiscreteScheduler.from_config(config)
    with pytest.raises(ValueError, match="`strength`.*LMS"):
        call(pipe=pipe, audio=noise(5000), strength=0.5)
    pipe.scheduler = SCHEDULERS["pndm"].from_config(config, skip_prk_steps=False)
    with pytest.raises(ValueError, match="`strength`.*PNDM"):
        call(pipe=pipe, audio=noise(5000), strength=0.5, num_inference_steps=8)
    assert np.isfinite(call(pipe=pipe, audio=noise(5000), strength=1.0, num_inference_steps=8)).all()


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_schedule_takes_its_fraction_of_the_steps_as_often_as_it_is_started(name, strength):
    options = {"skip_prk_steps": True} if name == "pndm" else {}
    scheduler = SCHEDULERS[name].from_config(build_components()["scheduler"].config, **options)
    schedule = Schedule(scheduler, 10, strength=strength)
    timesteps = schedule.timesteps
    assert (schedule.num_all_steps, schedule.num_steps) == (10, round(10 * strength))
    assert sum(schedule.ends_step(i) for i in range(len(timesteps))) >= schedule.num_steps
    progress = [schedule.progress(i) for i in range(len(timesteps))]
    assert progress == sorted(progress) and progress[0] == 0 and 1 - 1 / schedule.num_steps == progress[-1]
    schedule.restart()
    assert torch.equal(schedule.timesteps, timesteps)


# Positions in the schedule


SIGMAS = ["use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas"]


@pytest.mark.parametrize("name", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
def test_steps_are_counted_where_timesteps_repeat(name, strength, rescale_betas_zero_snr):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    cls, config = getattr(diffusers_schedulers, name), build_components()["scheduler"].config
    accepted = inspect.signature(cls).parameters
    for sigmas in [each for each in SIGMAS if each in accepted]:
        options = {sigmas: True, "rescale_betas_zero_snr": rescale_betas_zero_snr}
        for num_inference_steps in (1, 2, 21, 50):
            if int(strength * num_inference_steps) == 0:
                continue
            scheduler = cls.from_config(config, **{key: options[key] for key in options if key in accepted})
            schedule = Schedule(scheduler, num_inference_steps, strength=strength)
            schedule.rehearse(4)
            latents = torch.ones(1, 4, 2, 2)
            scheduler.scale_model_input(latents, schedule.timesteps[0])
            num_skipped = len(scheduler.timesteps) - len(schedule.timesteps)
            assert scheduler.begin_index == num_skipped
            assert scheduler.step_index in (None, num_skipped)  # not every one looks it up to scale


@pytest.mark.parametrize("name", ["dpm++", "unipc"])
def test_beta_sigmas_of_50_steps_end_at_the_answer(pipe, call, monkeypatch, name):
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config, use_karras_sigmas=False, use_beta_sigmas=True)
    assert start_midway(pipe, call, monkeypatch, 1.0, 50) < 0.1


def test_what_a_scheduler_cannot_do_is_refused_before_a_model_runs(guarded_pipe, monkeypatch):
    def refuse(scheduler, message, **options):
        monkeypatch.setattr(guarded_pipe, "scheduler", scheduler)
        with pytest.raises(ValueError, match=message):
            guarded_pipe("rain", **({"audio_length_in_s": 0.3} | options))

    config = guarded_pipe.scheduler.config
    refuse(SCHEDULERS["dpm++"].from_config(config, use_flow_sigmas=True), "`scheduler` has use_flow_sigmas")
    refuse(
        SCHEDULERS["lcm"].from_config(config),
        "`num_inference_steps` of 100 cannot.*LCMScheduler",
        num_inference_steps=100,
    )
    broken = SCHEDULERS["dpm++"].from_config(config, solver_order=2)
    monkeypatch.setattr(type(broken), "step", lambda *args, **kwargs: [][1])
    refuse(broken, "`num_inference_steps` of 7 cannot.*IndexError", num_inference_steps=7)
    refuse(EulerDiscreteScheduler.from_config(config), "`sigmas` cannot be below 0", sigmas=[3.0, -1.0])


def test_the_default_strength_is_checked_as_a_given_one_is(guarded_pipe, monkeypatch):
    config = guarded_pipe.scheduler.config
    audio = {"audio": noise(5000), "audio_sampling_rate": 16000}
    monkeypatch.setattr(guarded_pipe, "scheduler", diffusers_schedulers.LMSDiscreteScheduler.from_config(config))
    with pytest.raises(ValueError, match="`strength` has to be 1, not 0.5, with LMS"):
        guarded_pipe("rain", **audio)
    monkeypatch.setattr(guarded_pipe, "scheduler", SCHEDULERS["pndm"].from_config(config, skip_prk_steps=False))
    with pytest.raises(ValueError, match="`strength` has to be 1, not 0.5, for PNDM"):
        guarded_pipe("rain", **audio)


def test_strength_is_a_fraction_of_the_steps_that_are_given(call, guarded_pipe):
    options = {"audio": noise(5000), "strength": 0.5, "num_inference_steps": 1}
    assert np.isfinite(call(timesteps=[900, 600, 300, 100], **options)).all()
    with pytest.raises(ValueError, match="`strength` 0.5 leaves none of the 1 steps"):
        call(pipe=guarded_pipe, timesteps=[500], **options | {"num_inference_steps": 50})


def test_sigmas_that_leave_no_step_are_refused(guarded_pipe):
    guarded_pipe.scheduler = SCHEDULERS["euler"].from_config(guarded_pipe.scheduler.config)
    with pytest.raises(ValueError, match=r"`sigmas` of \[0.0\] leaves EulerDiscreteScheduler no step to take"):
        guarded_pipe("rain", sigmas=[0.0], audio_length_in_s=0.3)
