"""Schedulers by short name, and the steps of a call."""

import contextlib
import inspect
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
    TCDScheduler,
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
    "tcd": TCDScheduler,
}


class Schedule:
    """The steps of a call.

    Args:
        scheduler ([`SchedulerMixin`])
        num_inference_steps (`int`)
        timesteps (`list[int]`, *optional*), sigmas (`list[float]`, *optional*): either of them is used instead.
        strength (`float`, *optional*, defaults to 1.0): fraction of the steps that is taken, as in image-to-image.
        step_kwargs (`dict`, *optional*): further arguments of the scheduler's `step`.
        keeps_num_steps (`bool`, *optional*, defaults to `False`): take all of `num_inference_steps` in the fraction of
            the schedule that `strength` leaves, where the scheduler can, as LCM and TCD.

    Raises:
        ValueError: if the scheduler cannot set up such steps.
    """

    def __init__(
        self,
        scheduler,
        num_inference_steps,
        timesteps=None,
        sigmas=None,
        strength=1.0,
        step_kwargs=None,
        keeps_num_steps=False,
    ):
        self.scheduler = scheduler
        self.strength = strength
        self.step_kwargs = step_kwargs or {}
        if timesteps is not None:
            self.given = {"timesteps": timesteps}
        elif sigmas is not None:
            self.given = {"sigmas": sigmas}
        else:
            self.given = {"num_inference_steps": num_inference_steps}
        self.keeps_num_steps = (
            keeps_num_steps and "num_inference_steps" in self.given and can_keep_num_steps(scheduler)
        )
        with self._refusals():
            self.restart()

    def restart(self):
        """Reset the scheduler to the start of a run, and set `timesteps`, those that are taken.

        They are on the CPU, where the tables of the scheduler are: to look up a timestep that is on a GPU
        in them would synchronise with the GPU at every step."""
        scheduler = self.scheduler
        self._set_timesteps(scheduler)
        timesteps, order = scheduler.timesteps, scheduler.order
        self.num_all_steps = self.given.get("num_inference_steps", math.ceil(len(timesteps) / order))
        strength = 1.0 if self.keeps_num_steps else self.strength
        self.num_steps = min(int(self.num_all_steps * strength), self.num_all_steps)
        num_skipped = self.num_all_steps - self.num_steps
        if num_skipped > 0 and isinstance(scheduler, PNDMScheduler):
            # it takes its second step twice, wherever it starts
            timesteps = timesteps.unique().flip(0)[num_skipped:]
            timesteps = torch.cat([timesteps[:2], timesteps[1:]])
        else:
            timesteps = timesteps[num_skipped * order :]
        if hasattr(scheduler, "set_begin_index"):
            # else it would look for the value of the first timestep, which several steps may have, and `add_noise`
            # for those of the others
            scheduler.set_begin_index(num_skipped * order)
        self.timesteps = timesteps

    def _set_timesteps(self, scheduler):
        strength = {"strength": self.strength} if self.keeps_num_steps and self.strength < 1 else {}
        scheduler.set_timesteps(**self.given, **strength, device="cpu")

    def rehearse(self, num_channels):
        """Take all steps in a copy of the scheduler, with small tensors in place of the models, since schedulers that
        count their steps can fail midway: they index beyond the last one, do not implement a combination of their
        options, or divide by zero.

        Raises:
            ValueError: if the scheduler fails, or ends in NaN or infinity.
        """
        if not hasattr(self.scheduler, "set_begin_index"):
            return
        generator = torch.Generator().manual_seed(0)
        latents, prediction = torch.randn(2, 1, num_channels, 2, 2, generator=generator, dtype=torch.float32)
        step_kwargs = self.step_kwargs | ({"generator": generator} if "generator" in self.step_kwargs else {})
        with self._refusals(), torch.random.fork_rng(devices=[]):  # for schedulers without a generator
            scheduler = type(self.scheduler).from_config(self.scheduler.config)
            self._set_timesteps(scheduler)
            scheduler.set_begin_index(len(scheduler.timesteps) - len(self.timesteps))
            latents = latents * scheduler.init_noise_sigma
            for t in self.timesteps:
                scheduler.scale_model_input(latents, t)
                latents = scheduler.step(prediction, t, latents, **step_kwargs, return_dict=False)[0].float()
        if not torch.isfinite(latents).all():
            raise ValueError(f"{self._refusal} the latents become NaN or infinity.")

    @contextlib.contextmanager
    def _refusals(self):
        """Context in which whatever a scheduler raises becomes a `ValueError`."""
        try:
            yield
        except Exception as error:
            raise ValueError(f"{self._refusal} {type(error).__name__}: {error}") from error

    @property
    def _refusal(self):
        ((name, value),) = self.given.items()
        options = ", ".join(f"{key}={value!r}" for key, value in self._options().items())
        return (
            f"`{name}` of {value!r:.200} cannot be taken by the `scheduler`, {type(self.scheduler).__name__}"
            f"({options}). Use another number of steps, other options or another scheduler:"
        )

    def _options(self):
        """The options of the scheduler that are not its defaults, without those of the training."""
        parameters = inspect.signature(type(self.scheduler).__init__).parameters
        return {
            name: value
            for name, value in self.scheduler.config.items()
            if name in parameters
            and not name.startswith("beta_")
            and not isinstance(value, (list, tuple))
            and value != parameters[name].default
        }

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


def can_keep_num_steps(scheduler):
    """Whether a scheduler can take a number of steps in a fraction of its schedule."""
    return "strength" in inspect.signature(scheduler.set_timesteps).parameters


def check_not_in_use(*owners):
    """No call that has not ended yet uses any of `owners`, a pipeline and its scheduler."""
    if any(getattr(owner, "_is_in_use", False) for owner in owners):
        raise RuntimeError(
            "A call of this pipeline, or of one with the same scheduler, is not over: exhaust or `close()` its stream."
            " For calls at the same time, in threads or in a callback, make a pipeline that shares the models but not "
            "the scheduler: `TangoPipeline.from_pipe(pipe, scheduler=type(pipe.scheduler).from_config("
            "pipe.scheduler.config))`."
        )


def in_use(iterator, *owners):
    """Pass on what `iterator` yields, while `owners` are marked for [`check_not_in_use`]."""
    check_not_in_use(*owners)
    for owner in owners:
        owner._is_in_use = True
    try:
        yield from iterator
    finally:
        for owner in owners:
            owner._is_in_use = False


def step_of_evaluation(i, scheduler):
    """Step, counted from 0, that evaluation `i` of the UNet belongs to."""
    if not isinstance(scheduler, PNDMScheduler):
        return i // scheduler.order
    if scheduler.config.skip_prk_steps:
        return max(i - 1, 0)  # the first step is taken twice
    return i // 4 if i < 12 else i - 9  # three Runge-Kutta steps of four evaluations
