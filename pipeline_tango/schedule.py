"""Schedulers by short name, and the steps of a call."""

import math

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
    "lcm": LCMScheduler,
}


class Schedule:
    """The steps of a call.

    Args:
        scheduler ([`SchedulerMixin`])
        num_inference_steps (`int`)
        timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*): either of them is used instead.
        strength (`float`, *optional*, defaults to 1.0): fraction of the steps that is taken, as in image-to-image.
        adds_noise (`bool`, *optional*, defaults to `False`): whether the scheduler's `add_noise` is used.
        step_kwargs (`dict`, *optional*): further arguments of the scheduler's `step`.
    """

    def __init__(
        self,
        scheduler,
        num_inference_steps,
        timesteps=None,
        sigmas=None,
        strength=1.0,
        adds_noise=False,
        step_kwargs=None,
    ):
        self.scheduler = scheduler
        self.strength = strength
        self.adds_noise = adds_noise
        self.step_kwargs = step_kwargs or {}
        if timesteps is not None:
            self.given = {"timesteps": timesteps}
        elif sigmas is not None:
            self.given = {"sigmas": sigmas}
        else:
            self.given = {"num_inference_steps": num_inference_steps}
        self.restart()

    def restart(self):
        """Reset the scheduler to the start of a run, and set `timesteps`, those that are taken.

        They are on the CPU, where the tables of the scheduler are: to look up a timestep that is on a GPU
        in them would synchronise with the GPU at every step."""
        scheduler = self.scheduler
        scheduler.set_timesteps(**self.given, device="cpu")
        timesteps, order = scheduler.timesteps, scheduler.order
        self.num_all_steps = self.given.get("num_inference_steps", math.ceil(len(timesteps) / order))
        self.num_steps = min(int(self.num_all_steps * self.strength), self.num_all_steps)
        num_skipped = self.num_all_steps - self.num_steps
        if num_skipped > 0 and isinstance(scheduler, PNDMScheduler):
            # it takes its second step twice, wherever it starts
            timesteps = timesteps.unique().flip(0)[num_skipped:]
            timesteps = torch.cat([timesteps[:2], timesteps[1:]])
        else:
            timesteps = timesteps[num_skipped * order :]
        if self.adds_noise and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(num_skipped * order)  # `add_noise` follows the steps from here on
        self.timesteps = timesteps

    def progress(self, i):
        """Fraction of the steps that lie before evaluation `i` of the UNet."""
        return step_of_evaluation(i, self.scheduler) / self.num_steps

    def ends_step(self, i):
        """Whether a step is complete after evaluation `i`: schedulers of second order take two for each."""
        order, num_evaluations = self.scheduler.order, len(self.timesteps)
        num_warmup = num_evaluations - self.num_steps * order
        return i == num_evaluations - 1 or (i + 1 > num_warmup and (i + 1) % order == 0)

    def step(self, model_pred, t, latents):
        """Latents of the next timestep, always float32: some schedulers return float64."""
        return self.scheduler.step(model_pred, t, latents, **self.step_kwargs, return_dict=False)[0].float()


def step_of_evaluation(i, scheduler):
    """Step, counted from 0, that evaluation `i` of the UNet belongs to."""
    if not isinstance(scheduler, PNDMScheduler):
        return i // scheduler.order
    if scheduler.config.skip_prk_steps:
        return max(i - 1, 0)  # the first step is taken twice
    return i // 4 if i < 12 else i - 9  # three Runge-Kutta steps of four evaluations
