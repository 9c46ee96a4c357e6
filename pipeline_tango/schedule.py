"""Schedulers by short name, and the steps of a run."""

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


def step_of_evaluation(i, scheduler):
    """Which step, counted from 0, the UNet's `i`-th evaluation of a run belongs to."""
    if not isinstance(scheduler, PNDMScheduler):
        return i // scheduler.order
    if scheduler.config.skip_prk_steps:
        return max(i - 1, 0)  # the first step is taken twice
    return i // 4 if i < 12 else i - 9  # three Runge-Kutta steps of four evaluations
