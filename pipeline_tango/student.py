"""Students: UNets that were distilled to a few steps, and what their checkpoints say of them."""

import inspect
import json
from numbers import Integral, Real

from .schedule import SCHEDULERS


STUDENT_KEY = "student"  # in the config of a pipeline, and in the metadata of a LoRA file
STUDENT_ENTRIES = ("scheduler", "scheduler_options", "num_inference_steps", "guidance_scale")
OPTIONAL_ENTRIES = ("eta", "timesteps")
MAX_OUTER_GUIDANCE = 2.0  # classifier-free guidance of a student beyond the one inside


def check_student(student):
    """Check what the checkpoint of a student says of it: the entry "student" of `model_index.json` where the UNet of a
    pipeline is the student, and the same as JSON in the metadata of a LoRA file.

    Args:
        student (`dict`), with these entries and no others:
            scheduler (`str`): short name in [`SCHEDULERS`] of the scheduler that it was distilled for, such as "lcm".
            scheduler_options (`dict`): those options of that scheduler which belong to the student, such as
                `{"original_inference_steps": 50}`, as values of JSON. Others, such as betas and prediction type, are
                those of the scheduler that the pipeline has. May be empty.
            num_inference_steps (`int`): how many steps a call takes by default.
            guidance_scale (`float` or `list[float]`): the weight of classifier-free guidance that is distilled into
                the UNet, so that a call needs no unconditional rows. `[low, high]` if the weight is an input of the
                UNet (`time_cond_proj_dim`): a call then takes any `guidance_scale` from `low` to `high`, by default
                `default_guidance_scale` of the pipeline's config.
            timesteps (`dict[str, list[int]]`, *optional*): the timesteps of a call of so many steps, where the student
                was distilled for these alone.
            eta (`float`, *optional*): what `eta` is in a call where it is not given, if not the scheduler's default.

    Returns:
        `dict`: a copy, of plain Python types.

    Raises:
        ValueError: naming the entry, what is accepted and what came.
    """
    if not isinstance(student, dict) or student.keys() - set(OPTIONAL_ENTRIES) != set(STUDENT_ENTRIES):
        what = list(student) if isinstance(student, dict) else student
        raise ValueError(
            f"`student` has to be a dict of {list(STUDENT_ENTRIES)}, and perhaps {list(OPTIONAL_ENTRIES)}, not "
            f"{what!r:.300}."
        )

    def refuse(entry, accepted):
        raise ValueError(f"`{entry}` of a student has to be {accepted}, not {student[entry]!r:.200}.")

    def is_weight(value):
        return isinstance(value, Real) and not isinstance(value, bool) and 1 <= value < float("inf")

    name, options, num_steps, weight = (student[entry] for entry in STUDENT_ENTRIES)
    if not isinstance(name, str) or name not in SCHEDULERS:
        refuse("scheduler", f"one of {list(SCHEDULERS)}")
    known = inspect.signature(SCHEDULERS[name]).parameters
    try:
        options = json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError):
        options = None
    if not isinstance(options, dict) or not set(options) <= set(known):
        refuse("scheduler_options", f"a dict, in values of JSON, of options of {SCHEDULERS[name].__name__}")
    most_steps = (known | options).get("original_inference_steps", 1000)
    most_steps = getattr(most_steps, "default", most_steps)
    if not isinstance(num_steps, Integral) or isinstance(num_steps, bool) or not 1 <= num_steps <= most_steps:
        refuse("num_inference_steps", f"an integer from 1 to {most_steps}")
    if isinstance(weight, (list, tuple)):
        if len(weight) != 2 or not all(map(is_weight, weight)) or weight[0] >= weight[1]:
            refuse("guidance_scale", "a number of at least 1, or two of them that ascend")
    elif not is_weight(weight):
        refuse("guidance_scale", "a number of at least 1, or two of them that ascend")
    optional = {}
    if "eta" in student:
        if not (isinstance(student["eta"], Real) and 0 <= student["eta"] <= 1):
            refuse("eta", "a number from 0 to 1")
        optional["eta"] = float(student["eta"])
    if "timesteps" in student:
        optional["timesteps"] = check_timestep_table(student, refuse)
    return {
        "scheduler": name,
        "scheduler_options": options,
        "num_inference_steps": int(num_steps),
        "guidance_scale": [float(each) for each in weight] if isinstance(weight, (list, tuple)) else float(weight),
        **optional,
    }


def check_timestep_table(student, refuse):
    """The entry `timesteps` of a student, or a call of `refuse`."""
    table = student["timesteps"]

    def is_schedule(number, timesteps):
        return (
            isinstance(timesteps, (list, tuple))
            and str(len(timesteps)) == number
            and all(isinstance(t, Integral) and not isinstance(t, bool) and 0 <= t < 1000 for t in timesteps)
            and list(timesteps) == sorted(set(timesteps), reverse=True)
        )

    if not isinstance(table, dict) or not table or not all(is_schedule(*item) for item in table.items()):
        refuse("timesteps", 'a dict such as `{"2": [999, 380]}`, of as many descending timesteps as the key says')
    if str(student["num_inference_steps"]) not in table:
        refuse("timesteps", f'a dict with the key "{student["num_inference_steps"]}", the default number of steps')
    return {number: list(map(int, timesteps)) for number, timesteps in table.items()}


def read_student(metadata):
    """The student that a LoRA file says it is, as [`check_student`] returns it. `None` if it is none.

    Args:
        metadata (`dict[str, str]`, *optional*): the file's.

    Raises:
        ValueError: if what it says is not JSON, or not a student.
    """
    text = (metadata or {}).get(STUDENT_KEY)
    if text is None:
        return None
    try:
        student = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`{STUDENT_KEY}` in the metadata of the LoRA file is not JSON: {error}") from error
    return check_student(student)


def check_guidance_input(student, unet, default_guidance_scale):
    """A student with a range of guidance weights needs a UNet that takes the weight, and a default in that range; no
    other student has such a UNet."""
    has_input, weights = unet.config.time_cond_proj_dim is not None, student["guidance_scale"]
    if has_input != isinstance(weights, list):
        raise ValueError(
            f"`guidance_scale` of a student has to be {'[low, high]' if has_input else 'one number'} for a `unet` "
            f"{'with' if has_input else 'without'} `time_cond_proj_dim`, not {weights!r}."
        )
    if has_input and not weights[0] <= default_guidance_scale <= weights[1]:
        raise ValueError(
            f"`default_guidance_scale` of the pipeline's config has to be in {weights}, the range of the student, not "
            f"{default_guidance_scale}."
        )


def student_adapters(unet, fused_only=False):
    """Students among the LoRA adapters of `unet` that are active or fused: a `dict` of name -> student."""
    configs = getattr(unet, "peft_config", None)
    if not configs:
        return {}
    names = set()
    for module in unet.modules():
        if hasattr(module, "merged_adapters"):  # a LoRA layer
            names |= set(module.merged_adapters)
            if not fused_only and not module.disable_adapters:
                names |= set(module.active_adapters)
    students = {name: getattr(config, STUDENT_KEY, None) for name, config in configs.items() if name in names}
    return {name: student for name, student in students.items() if student is not None}


def student_scheduler(student, scheduler):
    """The scheduler that a student was distilled for, with the betas and the prediction type of `scheduler`."""
    scheduler_class = SCHEDULERS[student["scheduler"]]
    known = inspect.signature(scheduler_class).parameters
    config = {name: value for name, value in scheduler.config.items() if name in known or name.startswith("_")}
    return scheduler_class.from_config(config, **student["scheduler_options"])


def is_scheduler_of(student, scheduler):
    """Whether `scheduler` is what a student was distilled for."""
    options = student["scheduler_options"].items()
    return type(scheduler) is SCHEDULERS[student["scheduler"]] and all(
        scheduler.config.get(name) == value for name, value in options
    )


def describe_misuse(student, scheduler, guidance_scale):
    """Sentences that say what makes a call worse than the student is."""
    if not is_scheduler_of(student, scheduler):
        name, options = student["scheduler"], student["scheduler_options"]
        arguments = "".join(f", {key}={value!r}" for key, value in options.items())
        yield (
            f"The student was distilled for {SCHEDULERS[name].__name__} with {options}, not for this "
            f"{type(scheduler).__name__}, with which it is worse. To set it: `pipe.scheduler = "
            f"SCHEDULERS[{name!r}].from_config(pipe.scheduler.config{arguments})`."
        )
    weight = student["guidance_scale"]
    if not isinstance(weight, list) and guidance_scale > MAX_OUTER_GUIDANCE:
        yield (
            f"The student has guidance of {weight:g} inside, to which a `guidance_scale` of {guidance_scale:g} adds "
            f"more, at twice the work: leave it out, or give at most {MAX_OUTER_GUIDANCE:g}."
        )


def timesteps_of_call(student, scheduler, num_inference_steps):
    """The timesteps that a student was distilled for, as a list, for a call of so many steps. `None` if it was for
    any, or if `scheduler` is another one than its own.

    Raises:
        ValueError: if it was distilled for other numbers of steps.
    """
    if "timesteps" not in student or not is_scheduler_of(student, scheduler):
        return None
    if str(num_inference_steps) not in student["timesteps"]:
        numbers = ", ".join(student["timesteps"])
        raise ValueError(
            f"`num_inference_steps` has to be one of {numbers}, which the student was distilled for, not "
            f"{num_inference_steps}. For others give `timesteps`, or set the student aside."
        )
    return list(student["timesteps"][str(num_inference_steps)])


def call_defaults(config, student):
    """What `num_inference_steps` and `guidance_scale` are in a call where they are not given.

    Args:
        config (`dict`): the pipeline's. A repo may be older than its entries.
        student (`dict`, *optional*): what the UNet is. One with guidance of a fixed scale is called without guidance.
    """
    num_steps, weight = config.get("default_num_inference_steps", 100), config.get("default_guidance_scale", 3.0)
    if student is None:
        return num_steps, weight
    return student["num_inference_steps"], weight if isinstance(student["guidance_scale"], list) else 1.0
