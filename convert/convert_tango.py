"""Convert an original Tango checkpoint to a diffusers folder, or back.

SOURCE is one of
  - a folder or Hub id in the layout of the released checkpoints (pytorch_model_main.bin, _vae.bin, _stft.bin),
  - a folder saved by the original's training (pytorch_model.bin, _1.bin, _2.bin; summary.jsonl there or one level up),
  - an AudioLDM .ckpt file: its VAE and vocoder alone become OUTPUT/vae and OUTPUT/vocoder,
  - with --to_original, a diffusers folder or Hub id.
Names in main_config.json are looked up in SOURCE, then among the built-in configs that the released checkpoints leave
out, then on the Hub.
"""

import argparse
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import scipy.signal
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel, T5Tokenizer
from transformers.audio_utils import mel_filter_bank

from convert.publish import add_card_and_code, push, read_json
from convert.weight_maps import (
    TIED,
    VOCODER_CONSTANTS,
    original_names,
    original_shape,
    plain_names,
    read,
    to_diffusers,
    to_original,
)
from pipeline_tango import SCHEDULERS, TangoPipeline


logger = logging.getLogger(__name__)

# What the released checkpoints name in main_config.json but do not contain.
UNET_CONFIG = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],  # numbers of heads, in spite of the name
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "sample_size": [32, 2],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "use_linear_projection": True,
    "upcast_attention": True,
}
UNET_CONFIGS = {
    "configs/diffusion_model_config.json": UNET_CONFIG,
    "configs/diffusion_model_xl_config.json": {**UNET_CONFIG, "cross_attention_dim": 2048},
}
SCHEDULER_CONFIGS = {
    "stabilityai/stable-diffusion-2-1": {
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
}
STFT_CONFIG = {
    "filter_length": 1024,
    "hop_length": 160,
    "win_length": 1024,
    "n_mel_channels": 64,
    "sampling_rate": 16000,
    "mel_fmin": 0,
    "mel_fmax": 8000,
}
SCALING_FACTOR = 0.9227914214134216  # of the AudioLDM family's VAE

# Constants of the original's code, which no file holds.
UPSAMPLE_RATES = [5, 4, 2, 2, 2]
RESBLOCK_DILATIONS = [1, 3, 5]
VAE_NORM_NUM_GROUPS = 32

CLASSES = {
    "unet": UNet2DConditionModel,
    "text_encoder": T5EncoderModel,
    "vae": AutoencoderKL,
    "vocoder": SpeechT5HifiGan,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
HUB_FILES = (
    "*.json",
    "*.md",
    "*spiece.model",
    "pytorch_model_main.bin",
    "pytorch_model_vae.bin",
    "pytorch_model_stft.bin",
)
NAMES_PER_MAPPING = 32  # tensors read through one memory mapping, whose pages count as resident until it is dropped
STFT_TOLERANCE = 1e-6

GROUPS_REASON = (
    "a model trained with `unet_model_name` (`group_in`, `group_out`) can not be converted: the original samples it "
    "in another space than it was trained in, and no stock UNet has these layers"
)


@dataclass
class Original:
    """A checkpoint of the original: its weight files and what its configs say."""

    main: Path
    vae: Path
    stft: Path
    roots: tuple  # folders in which the names of `main_config` are looked up
    main_config: dict
    vae_config: dict
    stft_config: dict


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def check_pickle(path):
    """Read a PyTorch file through once: `ValueError` if it is missing, cut short or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in tqdm(archive.infolist(), desc=f"checking {path.name}", unit="tensor", delay=2, leave=False):
                with archive.open(entry) as content:
                    while content.read(1 << 24):  # raises when the checksum at the end does not fit
                        pass
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is cut short, damaged or no PyTorch file: {error}") from error


def load_pickle(path):
    """Content of a PyTorch file, its tensors mapped from the disk. No code that the file may hold is run."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"`{found[1]}`" if found else "objects"
        raise ValueError(f"{path} is refused: it holds {reason} beside tensors, which could run code") from error
    except (RuntimeError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is damaged or no PyTorch file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a state dict, got {type(content).__name__}")
    return content


def load_tensors(path):
    """State dict in a PyTorch file, as `load_pickle` has it."""
    tensors = load_pickle(path)
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{path} must hold nothing but tensors, got {listed(others)}")
    return tensors


def listed(names):
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_tensors(path, tensors, wanted):
    """Check that a file holds exactly the tensors it should.

    Args:
        path (`Path`): the file, for the message.
        tensors (`dict`): its content, original name -> tensor.
        wanted (`dict`): original name -> shape.

    Returns:
        `list` of `str`: names of the tensors that are dropped on purpose.

    Raises:
        ValueError: naming what is missing, unexpected or of a wrong shape.
    """
    found = plain_names(tensors)
    if any(name.startswith(("group_in.", "group_out.")) for name in found):
        raise ValueError(f"{path}: {GROUPS_REASON}")
    dropped = {name for name in found if name in TIED or name.endswith(".position_ids")}
    for name in dropped & set(TIED):
        if TIED[name] in tensors and not torch.equal(tensors[name], tensors[TIED[name]]):
            raise ValueError(f"{path}: `{name}` and `{TIED[name]}` must be equal")
    wrong = [
        f"{name} {tuple(read(tensors, name).shape)} instead of {tuple(wanted[name])}"
        for name in sorted(found & set(wanted))
        if read(tensors, name).shape != wanted[name]
    ]
    problems = {
        "missing": sorted(set(wanted) - found),
        "unexpected": sorted(found - dropped - set(wanted)),
        "of a wrong shape": wrong,
    }
    problems = [f"{problem}: {listed(names)}" for problem, names in problems.items() if names]
    if problems:
        raise ValueError(f"{path} does not fit the configs; {'; '.join(problems)}")
    return sorted(dropped)


def build(component, config):
    """A model without weights, on the meta device."""
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    try:
        with torch.device("meta"):
            if component == "text_encoder":
                return T5EncoderModel(T5Config.from_dict(config))
            if component == "vocoder":
                return SpeechT5HifiGan(SpeechT5HifiGanConfig.from_dict(config))
            return CLASSES[component].from_config(config)
    except Exception as error:  # the libraries check configs each in its own way, or not at all
        raise ValueError(
            f"the config of the {component} describes no {CLASSES[component].__name__}: {error}"
        ) from error


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def wanted_of(component, model):
    """Original name -> shape there of every tensor of a component."""
    shapes = shapes_of(model)
    return {old: original_shape(component, old, shapes[new]) for new, old in original_names(component, shapes).items()}


def shape_of(tensors, name, num_dimensions):
    try:
        shape = read(tensors, name).shape
    except KeyError as error:
        raise ValueError(f"`{name}` is missing") from error
    if len(shape) != num_dimensions:
        raise ValueError(f"`{name}` must have {num_dimensions} dimensions, got shape {tuple(shape)}")
    return shape


def count(tensors, prefix):
    """Number of different next parts of the names that start with `prefix`."""
    return len({name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)})


def vae_config(tensors, original_config, scaling_factor):
    """Config of the `AutoencoderKL` that these tensors of the original belong to."""
    for key, value in (("subband", 1), ("time_shuffle", 1)):
        if original_config.get(key, value) != value:
            raise ValueError(f"vae_config.json: `{key}` must be {value}, got {original_config[key]!r}")
    ddconfig = original_config.get("ddconfig", {})
    if not isinstance(ddconfig, dict) or ddconfig and not {"ch", "ch_mult", "resolution"} <= set(ddconfig):
        raise ValueError(f"vae_config.json: `ddconfig` must hold `ch`, `ch_mult` and `resolution`, got {ddconfig}")
    if not isinstance(ddconfig.get("resolution", 256), int):
        raise ValueError(f"vae_config.json: `resolution` must be an integer, got {ddconfig['resolution']!r}")
    for key, value in (("downsample_time", False), ("double_z", True)):
        if ddconfig.get(key, value) != value:
            raise ValueError(f"vae_config.json: `{key}` must be {value}, got {ddconfig[key]!r}")
    num_levels = max(count(tensors, "encoder.down."), 1)
    has_attention = [f"encoder.down.{i}.attn.0.norm.weight" in tensors for i in range(num_levels)]
    channels = [shape_of(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(num_levels)]
    factors = [width // channels[0] for width in channels]
    if ddconfig and (ddconfig["ch"], ddconfig["ch_mult"]) != (channels[0], factors):
        raise ValueError(
            f"vae_config.json: the weights have `ch` {channels[0]} and `ch_mult` {factors}, "
            f"got {ddconfig['ch']!r} and {ddconfig['ch_mult']!r}"
        )
    return {
        "in_channels": shape_of(tensors, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(tensors, "decoder.conv_out.weight", 4)[0],
        "down_block_types": [f"{'Attn' if attention else ''}DownEncoderBlock2D" for attention in has_attention],
        "up_block_types": [f"{'Attn' if attention else ''}UpDecoderBlock2D" for attention in has_attention[::-1]],
        "block_out_channels": channels,
        "layers_per_block": count(tensors, "encoder.down.0.block."),
        "latent_channels": shape_of(tensors, "post_quant_conv.weight", 4)[0],
        "norm_num_groups": VAE_NORM_NUM_GROUPS,
        "sample_size": ddconfig.get("resolution", 256),
        "scaling_factor": scaling_factor,
    }


def vocoder_config(tensors, stft_config):
    """Config of the `SpeechT5HifiGan` that these tensors of the original belong to."""
    num_upsamplers = count(tensors, "vocoder.ups.")
    if num_upsamplers != len(UPSAMPLE_RATES) or math.prod(UPSAMPLE_RATES) != stft_config["hop_length"]:
        raise ValueError(
            f"the vocoder must upsample by {UPSAMPLE_RATES}, the original's constants, to a `hop_length` of "
            f"{math.prod(UPSAMPLE_RATES)}; got {num_upsamplers} upsamplers and {stft_config['hop_length']}"
        )
    num_kernels = count(tensors, "vocoder.resblocks.") // num_upsamplers
    num_dilations = count(tensors, "vocoder.resblocks.0.convs1.")
    initial_channel, num_mel_bins, _ = shape_of(tensors, "vocoder.conv_pre.weight", 3)
    return {
        "model_in_dim": num_mel_bins,
        "sampling_rate": stft_config["sampling_rate"],
        "upsample_initial_channel": initial_channel,
        "upsample_rates": UPSAMPLE_RATES,
        "upsample_kernel_sizes": [shape_of(tensors, f"vocoder.ups.{i}.weight", 3)[2] for i in range(num_upsamplers)],
        "resblock_kernel_sizes": [
            shape_of(tensors, f"vocoder.resblocks.{i}.convs1.0.weight", 3)[2] for i in range(num_kernels)
        ],
        "resblock_dilation_sizes": [RESBLOCK_DILATIONS[:num_dilations]] * num_kernels,
        "normalize_before": False,
    }


def stft_tensors(config):
    """Tensors of the original's mel front end: mel filter bank, Fourier basis with Hann window, and its inverse."""
    length, window_length = config["filter_length"], config["win_length"]
    padding = length - window_length
    window = np.pad(scipy.signal.get_window("hann", window_length), (padding // 2, padding - padding // 2))
    angles = 2 * np.pi / length * np.outer(np.arange(length // 2 + 1), np.arange(length))
    basis = np.concatenate([np.cos(angles), -np.sin(angles)])
    basis[np.abs(basis).max(axis=1) < 1e-9] = 0  # the sines of the lowest and the highest bin
    # The rows are orthogonal, so the pseudo-inverse is each row over its squared norm.
    power = (basis**2).sum(axis=1, keepdims=True)
    inverse = basis / np.where(power > 0, power, 1) * config["hop_length"] / length
    mel_basis = mel_filter_bank(
        num_frequency_bins=length // 2 + 1,
        num_mel_filters=config["n_mel_channels"],
        min_frequency=config["mel_fmin"],
        max_frequency=config["mel_fmax"],
        sampling_rate=config["sampling_rate"],
        norm="slaney",
        mel_scale="slaney",
    ).T
    tensors = {
        "mel_basis": mel_basis,
        "stft_fn.forward_basis": (basis * window)[:, None, :],
        "stft_fn.inverse_basis": (inverse * window)[:, None, :],
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for name, value in tensors.items()}


def check_stft(path, tensors, config):
    """Check the mel front end of a checkpoint against our own computation."""
    for key in STFT_CONFIG:
        if type(config[key]) not in (int, float) or config[key] < 0:
            raise ValueError(f"stft_config.json: `{key}` must be a number, got {config[key]!r}")
    length = config["filter_length"]
    if config["win_length"] > length:
        raise ValueError(f"stft_config.json: `win_length` must not exceed `filter_length`, got {config}")
    wanted = {
        "mel_basis": (config["n_mel_channels"], length // 2 + 1),
        "stft_fn.forward_basis": (length + 2, 1, length),
        "stft_fn.inverse_basis": (length + 2, 1, length),
    }
    check_tensors(path, tensors, wanted)
    for name, tensor in stft_tensors(config).items():
        difference = (tensor - tensors[name]).abs().max().item()
        if not difference <= STFT_TOLERANCE:
            raise ValueError(f"{path}: `{name}` differs by {difference:.1e} from what stft_config.json describes")


def find(name, roots, leaf):
    """The folder or file called `name` in a config: `leaf` in it, or itself, in the first of `roots` that has it."""
    for root in roots:
        for path in (root / name / leaf, root / name):
            if path.is_file():
                return path
    return None


def find_text_encoder(name, roots):
    """Folder with config and tokenizer of the text encoder called `name`; its weights are not needed."""
    config = find(name, roots, "config.json")
    if config is not None:
        return config.parent
    if not is_hub_id(name):
        raise ValueError(f"`text_encoder_name` must be a folder in SOURCE or a Hub id, got {name!r}")
    logger.info("text encoder: config and tokenizer of %s from the Hub", name)
    return Path(snapshot_download(name, allow_patterns=["config.json", *TOKENIZER_FILES]))


def find_unet_config(name, roots):
    path = find(name, roots, "config.json")
    if path is not None:
        return read_json(path)
    if name in UNET_CONFIGS:
        return UNET_CONFIGS[name]
    raise ValueError(f"`unet_model_config_path` must be a file in SOURCE or one of {list(UNET_CONFIGS)}, got {name!r}")


def find_scheduler_config(name, roots):
    leaf = "scheduler/scheduler_config.json"
    path = find(name, roots, leaf) or find(name, roots, "scheduler_config.json")
    if path is not None:
        return read_json(path)
    if name in SCHEDULER_CONFIGS:
        return SCHEDULER_CONFIGS[name]
    if not is_hub_id(name):
        raise ValueError(f"`scheduler_name` must be a folder in SOURCE or a Hub id, got {name!r}")
    logger.info("scheduler: config of %s from the Hub", name)
    return read_json(Path(snapshot_download(name, allow_patterns=[leaf])) / leaf)


def is_hub_id(name):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def open_original(folder):
    """Find the files of a checkpoint, released or saved by the original's training."""
    if (folder / "pytorch_model_2.bin").exists():
        return open_training(folder)
    return Original(
        main=folder / "pytorch_model_main.bin",
        vae=folder / "pytorch_model_vae.bin",
        stft=folder / "pytorch_model_stft.bin",
        roots=(folder,),
        main_config=read_json(folder / "main_config.json"),
        vae_config=read_json(folder / "vae_config.json"),
        stft_config={**STFT_CONFIG, **read_json(folder / "stft_config.json")},
    )


def open_training(folder):
    """Find the files that the original's training saved: its arguments are the first line of summary.jsonl."""
    summary = find("summary.jsonl", (folder, folder.parent), "")
    if summary is None:
        raise ValueError(f"{folder / 'summary.jsonl'} is missing, and so is {folder.parent / 'summary.jsonl'}")
    try:
        arguments = json.loads(next(line for line in summary.read_text(encoding="utf-8").splitlines() if line.strip()))
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{summary} does not begin with a line of JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{summary} does not begin with a JSON object")
    stft_path = folder / "pytorch_model_1.bin"
    check_pickle(stft_path)
    stft = load_tensors(stft_path)
    return Original(
        main=folder / "pytorch_model_2.bin",
        vae=folder / "pytorch_model.bin",
        stft=stft_path,
        roots=(folder, folder.parent),
        main_config={
            "text_encoder_name": arguments.get("text_encoder_name"),
            "scheduler_name": arguments.get("scheduler_name"),
            "unet_model_name": arguments.get("unet_model_name"),
            "unet_model_config_path": arguments.get("unet_model_config"),
            "snr_gamma": arguments.get("snr_gamma"),
        },
        vae_config={},
        stft_config={
            **STFT_CONFIG,
            "n_mel_channels": shape_of(stft, "mel_basis", 2)[0],
            "filter_length": shape_of(stft, "stft_fn.forward_basis", 3)[2],
            "win_length": shape_of(stft, "stft_fn.forward_basis", 3)[2],
        },
    )


def save_component(component, model, load, folder, dtype, variant):
    """Fill a model of the meta device with tensors of the original, save it, and empty it again.

    Args:
        load (callable): maps the source file anew and returns its tensors. Each mapping serves a few tensors only: the
            pages read through it stay resident as long as it does.
    """
    shapes = shapes_of(model)
    names = list(original_names(component, shapes).items())
    num_bytes = sum(shape.numel() for shape in shapes.values()) * (dtype or torch.float32).itemsize
    logger.info("%s: %d tensors, about %.1f MB", component, len(names), num_bytes / 1e6)
    state = {}
    for start in tqdm(range(0, len(names), NAMES_PER_MAPPING), desc=component, delay=2, leave=False):
        state.update(to_diffusers(load(), dict(names[start : start + NAMES_PER_MAPPING]), shapes, dtype))
    if component == "vocoder":
        like = state["conv_post.bias"]
        state.update({name: like.new_full(shapes[name], value) for name, value in VOCODER_CONSTANTS.items()})
    if component == "text_encoder":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if component == "text_encoder":
        model.tie_weights()
    model.save_pretrained(folder / component, variant=variant)
    model.to("meta")


def scaling_factor_of(args, value):
    """The VAE's scaling factor: the flag, else the checkpoint's `value`, else the family's."""
    if args.scaling_factor is not None:
        return args.scaling_factor
    if value is None:
        logger.warning(
            "the source does not say the VAE's scaling factor: taking %s, the AudioLDM family's (--scaling_factor "
            "gives another)",
            SCALING_FACTOR,
        )
        return SCALING_FACTOR
    if not isinstance(value, (int, float, torch.Tensor)) or not 0 < float(value) < math.inf:
        raise ValueError(f"the VAE's scale factor must be a positive number, got {value!r}")
    return float(value)


def convert_original(source, folder, args):
    """Write the diffusers folder of an original checkpoint."""
    original = open_original(source)
    config = original.main_config
    if config.get("unet_model_name"):
        raise ValueError(f"`unet_model_name` is {config['unet_model_name']!r}: {GROUPS_REASON}")
    for key in ("text_encoder_name", "scheduler_name", "unet_model_config_path"):
        if not isinstance(config.get(key), str) or not config[key]:
            raise ValueError(f"`{key}` of the checkpoint's configuration must be a string, got {config.get(key)!r}")

    for path in (original.stft, original.vae, original.main):
        check_pickle(path)
    vae_tensors = load_tensors(original.vae)
    text_encoder = find_text_encoder(config["text_encoder_name"], original.roots)
    text_config = read_json(text_encoder / "config.json")
    if text_config.get("model_type") != "t5":
        raise ValueError(f"{text_encoder}: the text encoder must be a T5, got {text_config.get('model_type')!r}")
    scaling_factor = scaling_factor_of(args, original.vae_config.get("scale_factor"))
    models = {
        "unet": build("unet", find_unet_config(config["unet_model_config_path"], original.roots)),
        "text_encoder": build("text_encoder", text_config),
        "vae": build("vae", vae_config(vae_tensors, original.vae_config, scaling_factor)),
        "vocoder": build("vocoder", vocoder_config(vae_tensors, original.stft_config)),
    }
    files = {"unet": original.main, "text_encoder": original.main, "vae": original.vae, "vocoder": original.vae}
    dropped = []
    for path in (original.main, original.vae):
        wanted = {}
        for component in models:
            wanted |= wanted_of(component, models[component]) if files[component] == path else {}
        dropped += check_tensors(path, load_tensors(path), wanted)
    stft = load_tensors(original.stft)
    check_stft(original.stft, stft, original.stft_config)

    tokenizer = T5Tokenizer.from_pretrained(text_encoder)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("spiece.model", "tokenizer.json"):  # the older transformers read one of them, the newer the other
        if (text_encoder / name).is_file() and not (folder / "tokenizer" / name).exists():
            shutil.copyfile(text_encoder / name, folder / "tokenizer" / name)
    # The config may call itself DDIM: the original reads it into DDPM. Saving writes all defaults out.
    scheduler = DDPMScheduler.from_config(find_scheduler_config(config["scheduler_name"], original.roots))
    scheduler = SCHEDULERS[args.scheduler or "ddpm"].from_config(scheduler.config)
    scheduler.save_pretrained(folder / "scheduler")
    for component, model in models.items():
        path = files[component]
        save_component(component, model, partial(load_tensors, path), folder, DTYPES.get(args.dtype), args.variant)
    TangoPipeline(**models, tokenizer=tokenizer, scheduler=scheduler).save_config(folder)

    write_json(folder / "original" / "main_config.json", config)
    write_json(folder / "original" / "stft_config.json", original.stft_config)
    save_file({name: tensor.contiguous() for name, tensor in stft.items()}, folder / "original" / "stft.safetensors")
    notes = [
        f"UNet and text encoder come from `{original.main.name}`, VAE and vocoder from `{original.vae.name}`.",
        "The tensors of the mel front end have been checked against their formulas. They are kept in `original/`, for "
        "converting back only.",
    ]
    if args.dtype:
        notes.append(f"Weights were cast to {args.dtype}.")
    if dropped:
        notes.append(
            f"Dropped on purpose: {', '.join(f'`{name}`' for name in dropped)} (other names or stale buffers)."
        )
    if original.stft_config != STFT_CONFIG:
        notes.append("The checkpoint's own mel front end differs from the released one, which the pipeline has.")
    for note in notes:
        logger.info("%s", note)
    add_card_and_code(folder, source=args.source, license=args.license or license_of(source), notes=notes)


def license_of(source):
    """Licence that the model card of the source names, if any."""
    readme = source / "README.md"
    return ModelCard.load(readme).data.license if readme.is_file() else None


def convert_ckpt(source, folder, args):
    """Write the VAE and the vocoder of an AudioLDM .ckpt."""
    check_pickle(source)
    prefix = "first_stage_model."

    def load():
        content = load_pickle(source)
        content = content.get("state_dict", content)
        return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}

    def load_first_stage():
        return {name.removeprefix(prefix): value for name, value in load().items() if name.startswith(prefix)}

    everything = load()
    tensors = load_first_stage()
    if not tensors:
        raise ValueError(f"{source} must hold tensors named `{prefix}*`, got {listed(everything)}")
    scaling_factor = scaling_factor_of(args, everything.get("scale_factor"))
    models = {
        "vae": build("vae", vae_config(tensors, {}, scaling_factor)),
        "vocoder": build("vocoder", vocoder_config(tensors, STFT_CONFIG)),
    }
    losses = {name for name in tensors if name.startswith("loss.")}
    tensors = {name: value for name, value in tensors.items() if name not in losses}
    check_tensors(source, tensors, wanted_of("vae", models["vae"]) | wanted_of("vocoder", models["vocoder"]))
    dropped = losses | {name for name in everything if not name.startswith(prefix) and name != "scale_factor"}
    if dropped:
        logger.info("dropped on purpose, %d tensors beside VAE and vocoder: %s", len(dropped), listed(sorted(dropped)))
    for component, model in models.items():
        save_component(component, model, load_first_stage, folder, DTYPES.get(args.dtype), args.variant)


def safetensors_files(folder, component, variant):
    """Weight files of a component of a diffusers folder."""
    stem = "model" if component in ("text_encoder", "vocoder") else "diffusion_pytorch_model"
    suffix = f".{variant}" if variant else ""
    path = folder / component / f"{stem}{suffix}.safetensors"
    if path.is_file():
        return [path]
    index = folder / component / f"{stem}.safetensors.index{suffix}.json"
    if index.is_file():
        return sorted({folder / component / name for name in read_json(index)["weight_map"].values()})
    have = sorted(path.name for path in (folder / component).glob("*.safetensors"))
    raise ValueError(f"{path} is missing (--variant says which weights to read), the folder has {have}")


def vae_original_config(config):
    """vae_config.json of the original for the config of an `AutoencoderKL`."""
    channels = list(config["block_out_channels"])
    factors = [width // channels[0] for width in channels]
    resolutions = [config["sample_size"] // 2**i for i in range(len(channels))]
    attention = [kind.startswith("Attn") for kind in config["down_block_types"]]
    original = {
        "image_key": "fbank",
        "subband": 1,
        "embed_dim": config["latent_channels"],
        "time_shuffle": 1,
        "ddconfig": {
            "double_z": True,
            "z_channels": config["latent_channels"],
            "resolution": config["sample_size"],
            "downsample_time": False,
            "in_channels": config["in_channels"],
            "out_ch": config["out_channels"],
            "ch": channels[0],
            "ch_mult": factors,
            "num_res_blocks": config["layers_per_block"],
            "attn_resolutions": [resolution for resolution, has in zip(resolutions, attention) if has],
            "dropout": 0.0,
        },
        "scale_factor": config["scaling_factor"],
    }
    for key, value in (
        ("norm_num_groups", VAE_NORM_NUM_GROUPS),
        ("act_fn", "silu"),
        ("mid_block_add_attention", True),
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
        ("shift_factor", None),
        ("latents_mean", None),
        ("latents_std", None),
        ("block_out_channels", [factor * channels[0] for factor in factors]),
        ("up_block_types", [f"{'Attn' if has else ''}UpDecoderBlock2D" for has in attention[::-1]]),
    ):
        found = list(config[key]) if isinstance(config[key], tuple) else config[key]
        if found != value:
            raise ValueError(f"vae: the original's `{key}` can only be {value} here, got {found}")
    return original


def check_vocoder_config(config, tensors):
    """Check that the original's constants can stand for this vocoder, whose shape its files do not hold."""
    dilations = [RESBLOCK_DILATIONS[: len(row)] for row in config["resblock_dilation_sizes"]]
    for key, value in (
        ("upsample_rates", UPSAMPLE_RATES),
        ("resblock_dilation_sizes", dilations),
        ("leaky_relu_slope", 0.1),
        ("normalize_before", False),
    ):
        if config[key] != value:
            raise ValueError(f"vocoder: the original's `{key}` is always {value}, got {config[key]}")
    for name, value in VOCODER_CONSTANTS.items():
        if not torch.all(tensors[name] == value):
            raise ValueError(f"vocoder: `{name}` must be {value} everywhere: the original does not have it")


def gather_original(components, models, load, dtype):
    """State dict of the original for some components, copied into memory so that no mapping stays."""
    tensors = {}
    for component in components:
        names = list(original_names(component, shapes_of(models[component])).items())
        logger.info("%s: %d tensors", component, len(names))
        for start in tqdm(range(0, len(names), NAMES_PER_MAPPING), desc=component, delay=2, leave=False):
            chunk = dict(names[start : start + NAMES_PER_MAPPING])
            tensors.update(
                (name, value.clone()) for name, value in to_original(component, load(component), chunk, dtype)
            )
    tensors.update({name: tensors[target] for name, target in TIED.items() if target in tensors})
    return tensors


def inner_path(name, default):
    """`name` if it stays inside the folder it is relative to, else `default`."""
    is_inside = isinstance(name, str) and name and not Path(name).is_absolute() and ".." not in Path(name).parts
    return name if is_inside else default


def save_pickle(path, tensors):
    try:
        torch.save(tensors, path)
    except RuntimeError as error:  # torch does not say what its writer ran into
        raise OSError(f"can not write {path.name}, the disk may be full: {error}") from error


def convert_to_original(source, folder, args):
    """Write the original's layout of a diffusers folder."""
    index = read_json(source / "model_index.json")
    if index.get("_class_name") != "TangoPipeline":
        raise ValueError(f"{source} must be the folder of a TangoPipeline, got {index.get('_class_name')!r}")
    configs = {component: read_json(source / component / "config.json") for component in CLASSES}
    models = {component: build(component, config) for component, config in configs.items()}
    files = {component: safetensors_files(source, component, args.variant) for component in CLASSES}
    configs = {component: model.config for component, model in models.items()}
    configs["vocoder"] = configs["vocoder"].to_dict()

    def load(component):
        tensors = {}
        for path in files[component]:
            try:
                with safe_open(path, framework="pt") as file:
                    tensors.update({name: file.get_tensor(name) for name in file.keys()})
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged or cut short: {error}") from error
        return tensors

    for component, model in models.items():
        tensors, shapes = load(component), shapes_of(model)
        if component == "text_encoder":
            tensors.pop("encoder.embed_tokens.weight", None)
            shapes.pop("encoder.embed_tokens.weight")
        check_tensors(files[component][0], tensors, shapes)
    check_vocoder_config(configs["vocoder"], load("vocoder"))

    kept = source / "original"
    vocoder = configs["vocoder"]
    if (kept / "main_config.json").is_file():
        main_config = read_json(kept / "main_config.json")
        stft_config = read_json(kept / "stft_config.json")
        stft = load_file(kept / "stft.safetensors")
        check_stft(kept / "stft.safetensors", stft, stft_config)
    else:  # trained here: there never was an original
        main_config = {"unet_model_name": None, "snr_gamma": None}
        stft_config = {
            **STFT_CONFIG,
            "n_mel_channels": vocoder["model_in_dim"],
            "sampling_rate": vocoder["sampling_rate"],
            "mel_fmax": vocoder["sampling_rate"] // 2,
        }
        stft = stft_tensors(stft_config)
    main_config = {
        **main_config,
        "text_encoder_name": inner_path(main_config.get("text_encoder_name"), "./t5"),
        "scheduler_name": inner_path(main_config.get("scheduler_name"), "./scheduler"),
        "unet_model_config_path": "configs/diffusion_model_config.json",
    }
    for name in ("main_config.json", "config.json"):
        write_json(folder / name, main_config)
    write_json(folder / "vae_config.json", vae_original_config(configs["vae"]))
    write_json(folder / "stft_config.json", stft_config)
    write_json(folder / "configs" / "diffusion_model_config.json", read_json(source / "unet" / "config.json"))
    scheduler = read_json(source / "scheduler" / "scheduler_config.json")
    write_json(folder / main_config["scheduler_name"] / "scheduler" / "scheduler_config.json", scheduler)
    text_encoder = folder / main_config["text_encoder_name"]
    write_json(text_encoder / "config.json", read_json(source / "text_encoder" / "config.json"))
    for name in TOKENIZER_FILES:
        if (source / "tokenizer" / name).is_file():
            shutil.copyfile(source / "tokenizer" / name, text_encoder / name)

    dtype = DTYPES.get(args.dtype)
    save_pickle(folder / "pytorch_model_stft.bin", stft)
    save_pickle(folder / "pytorch_model_vae.bin", gather_original(("vae", "vocoder"), models, load, dtype))
    main = gather_original(("unet", "text_encoder"), models, load, dtype)
    save_pickle(folder / "pytorch_model_main.bin", main)
    if main_config["text_encoder_name"].startswith("./"):  # else the original takes the weights, in vain, from the Hub
        prefix = "text_encoder."
        weights = {name.removeprefix(prefix): tensor for name, tensor in main.items() if name.startswith(prefix)}
        save_pickle(text_encoder / "pytorch_model.bin", weights)


def convert(args):
    """Do what the command line says. OUTPUT appears, complete, as the last step, or not at all."""
    source, output = Path(args.source), Path(args.output).absolute()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"OUTPUT must not lie in SOURCE, got {output}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"OUTPUT must be a new or empty folder, {output} holds something")
    if not source.exists():
        if not is_hub_id(args.source):
            raise ValueError(f"SOURCE must be a folder, a .ckpt file or a Hub id, {args.source} does not exist")
        logger.info("downloading %s", args.source)
        weights = f"*.{args.variant}*.safetensors" if args.variant else "*.safetensors"
        patterns = ("*.json", "*spiece.model", "original/*", weights) if args.to_original else HUB_FILES
        source = Path(snapshot_download(args.source, allow_patterns=patterns))
    is_ckpt = source.is_file()
    if is_ckpt and (args.to_original or args.scheduler or args.push_to_hub):
        raise ValueError("a .ckpt gives no whole pipeline: no --to_original, --scheduler or --push_to_hub with it")

    parent = next(folder for folder in output.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as temporary:
        folder = Path(temporary) / "folder"  # made with ordinary permissions, unlike the temporary one
        folder.mkdir()
        if args.to_original:
            convert_to_original(source, folder, args)
        elif is_ckpt:
            convert_ckpt(source, folder, args)
        else:
            convert_original(source, folder, args)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, output)
    logger.info("wrote %s", output)
    if args.push_to_hub:
        sys.stdout.write(f"{push(output, args.push_to_hub, private=args.private)}\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m convert.convert_tango",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, .ckpt file or Hub id; never changed")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--to_original", action="store_true", help="write the original's layout of a diffusers folder")
    parser.add_argument("--dtype", choices=list(DTYPES), help="cast the weights (default: keep the source's type)")
    parser.add_argument(
        "--variant",
        help="weights are called diffusion_pytorch_model.VARIANT.safetensors; with --to_original: the weights to read",
    )
    group = parser.add_argument_group("to diffusers only")
    group.add_argument(
        "--scheduler",
        choices=list(SCHEDULERS),
        help="scheduler to save, with the checkpoint's noise schedule (default: ddpm, as the original samples)",
    )
    group.add_argument(
        "--scaling_factor",
        type=float,
        help=f"of the VAE's latents (default: what the source says, or {SCALING_FACTOR}, the AudioLDM family's)",
    )
    group.add_argument("--license", help="licence of the weights, for the model card (default: the source card's)")
    group.add_argument("--push_to_hub", metavar="REPO", help="put the result on the Hub as well, as OWNER/NAME")
    group.add_argument("--private", action="store_true", help="make REPO a private one if it is created")
    args = parser.parse_args(argv)
    if args.to_original and (args.scheduler or args.scaling_factor or args.license or args.push_to_hub):
        parser.error("--to_original takes no --scheduler, --scaling_factor, --license or --push_to_hub")
    return args


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        convert(args)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    except Exception as error:  # whatever a library raises over a broken file is one line to the user
        logger.debug("where the error came from", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split()) or type(error).__name__}\n")
        return 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    sys.exit(main())
