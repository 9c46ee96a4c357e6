"""Checkpoints in the original's layout: their files, their configs, and their tensors as diffusers components.

original = open_original(folder)  # finds and checks everything, and keeps no weights
unet = load_component(original, "unet", torch.bfloat16)
"""

import json
import logging
import math
import pickle
import posixpath
import re
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.signal
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from safetensors.torch import save_file
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer
from transformers.audio_utils import mel_filter_bank

from .json_files import check_file, read_json, write_json
from .model_files import TOKENIZERS, build_model, check_vocabulary, describe_misfits, listed
from .weight_maps import TIED, VOCODER_CONSTANTS, original_names, original_shape, plain_names, read, to_diffusers


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
CKPT_PREFIX = "first_stage_model."  # of the tensors of VAE and vocoder in an AudioLDM .ckpt file

CLASSES = {
    "unet": UNet2DConditionModel,
    "text_encoder": T5EncoderModel,
    "vae": AutoencoderKL,
    "vocoder": SpeechT5HifiGan,
}
TOKENIZER_FILES = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CONFIG_FILES = ("main_config.json", "vae_config.json", "stft_config.json", "summary.jsonl", "README.md")
RELEASED_WEIGHTS = ("pytorch_model_main.bin", "pytorch_model_vae.bin", "pytorch_model_stft.bin")
TRAINING_WEIGHTS = ("pytorch_model_2.bin", "pytorch_model.bin", "pytorch_model_1.bin")  # main, VAE, mel front end
NAMES_PER_MAPPING = 32  # tensors read through one memory mapping, whose pages count as resident until it is dropped
STFT_TOLERANCE = 1e-6

GROUPS_REASON = (
    "a model trained with `unet_model_name` (`group_in`, `group_out`) can not be converted: the original samples it "
    "in another space than it was trained in, and no stock UNet has these layers"
)


def check_pickle(path):
    """Read a PyTorch file through once: `ValueError` if it is missing, cut short or damaged."""
    check_file(path)
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


def load_first_stage(path):
    """Tensors of VAE and vocoder in an AudioLDM .ckpt file, by the names that the original gives them."""
    content = load_pickle(path)
    content = content.get("state_dict", content)
    return {
        name.removeprefix(CKPT_PREFIX): value
        for name, value in content.items()
        if name.startswith(CKPT_PREFIX) and isinstance(value, torch.Tensor)
    }


@dataclass
class Original:
    """A checkpoint of the original, its files and tensors checked, its configs in the terms of diffusers.

    Attributes:
        configs (`dict`): component -> config of its diffusers or transformers class. An AudioLDM .ckpt file has `vae`
            and `vocoder` only.
        files (`dict`): component -> PyTorch file with its tensors.
        read_file (callable): reads one of `files` into original name -> tensor.
        dropped (`list` of `str`): names of the tensors that no component takes.
        text_encoder (`Path`, *optional*): folder with config and tokenizer of the text encoder.
        scheduler_config (`dict`, *optional*): config of the noise schedule.
        main_config, stft_config (`dict`, *optional*): the checkpoint's own configs of its parts and its mel front end.
        stft (`dict`, *optional*): tensors of the mel front end, which no component takes.
    """

    configs: dict
    files: dict
    read_file: Callable = load_tensors
    dropped: list = field(default_factory=list)
    text_encoder: Path | None = None
    scheduler_config: dict | None = None
    main_config: dict | None = None
    stft_config: dict | None = None
    stft: dict | None = None


@dataclass
class Layout:
    """Where a checkpoint has its weights, and what its own configs say."""

    main: Path
    vae: Path
    stft: Path
    roots: tuple  # folders in which the names of `main_config` are looked up
    main_config: dict
    vae_config: dict
    stft_config: dict


def open_original(source, *, scaling_factor=None, download=snapshot_download):
    """Find, read and check all parts of a checkpoint of the original. No weights stay in memory.

    Args:
        source (`Path`): folder in the layout of the released checkpoints or of the original's training, or an AudioLDM
            .ckpt file. Only local files are opened, apart from small configs that `source` names and does not hold.
        scaling_factor (`float`, *optional*): of the VAE's latents. Defaults to the checkpoint's own, else to that of
            the AudioLDM family.
        download (callable): `huggingface_hub.snapshot_download`, or a partial of it with a token or a cache folder.
            It fetches config and tokenizer of a text encoder, or a scheduler's config, from the Hub.

    Returns:
        `Original`, for `load_component` and `save_component`.

    Raises:
        ValueError: naming the file and what is wrong with it: missing, cut short, a pickle that may run code, or
            tensors that do not fit the configs.
    """
    if source.is_file():
        return open_ckpt(source, scaling_factor)
    layout = find_training(source) if (source / "pytorch_model_2.bin").exists() else find_released(source)
    config = layout.main_config
    if config.get("unet_model_name"):
        raise ValueError(f"`unet_model_name` is {config['unet_model_name']!r}: {GROUPS_REASON}")
    for key in ("text_encoder_name", "scheduler_name", "unet_model_config_path"):
        if not isinstance(config.get(key), str) or not config[key]:
            raise ValueError(f"`{key}` of the checkpoint's configuration must be a string, got {config.get(key)!r}")

    for path in (layout.stft, layout.vae, layout.main):
        check_pickle(path)
    vae_tensors = load_tensors(layout.vae)
    text_encoder = find_text_encoder(config["text_encoder_name"], layout.roots, download)
    text_config = read_json(text_encoder / "config.json")
    if text_config.get("model_type") != "t5":
        raise ValueError(f"{text_encoder}: the text encoder must be a T5, got {text_config.get('model_type')!r}")
    check_vocabulary(text_encoder)
    scaling_factor = read_scaling_factor(layout.vae_config.get("scale_factor"), scaling_factor)
    configs = {
        "unet": find_unet_config(config["unet_model_config_path"], layout.roots),
        "text_encoder": text_config,
        "vae": vae_config(vae_tensors, layout.vae_config, scaling_factor),
        "vocoder": vocoder_config(vae_tensors, layout.stft_config),
    }
    models = {component: build(component, config) for component, config in configs.items()}
    dropped, files = [], {}
    for path, components in ((layout.main, ("unet", "text_encoder")), (layout.vae, ("vae", "vocoder"))):
        wanted = {}
        for component in components:
            wanted |= wanted_of(component, models[component])
            files[component] = path
        dropped += check_tensors(path, load_tensors(path), wanted)
    stft = load_tensors(layout.stft)
    check_stft(layout.stft, stft, layout.stft_config)
    return Original(
        configs=configs,
        files=files,
        dropped=dropped,
        text_encoder=text_encoder,
        scheduler_config=find_scheduler_config(config["scheduler_name"], layout.roots, download),
        main_config=config,
        stft_config=layout.stft_config,
        stft=stft,
    )


def needed_files(main_config, weights=(*RELEASED_WEIGHTS, *TRAINING_WEIGHTS)):
    """Paths in a checkpoint of all files that `open_original` may read, whichever of them the checkpoint has.

    Args:
        main_config (`dict`): as `read_main_config` has it.
        weights (sequence of `str`): files with weights.
    """
    keys = ("text_encoder_name", "scheduler_name", "unet_model_config_path")
    text_encoder, scheduler, unet = (posixpath.normpath(str(main_config.get(key))) for key in keys)
    files = {*CONFIG_FILES, *weights, unet, f"{unet}/config.json"}
    files |= {f"{scheduler}/{name}" for name in ("scheduler/scheduler_config.json", "scheduler_config.json")}
    return files | {f"{text_encoder}/{name}" for name in ("config.json", *TOKENIZER_FILES)}


def read_main_config(folder):
    """What a checkpoint says of its parts: main_config.json, or the arguments of the original's training."""
    if (folder / "main_config.json").exists() or find_summary(folder) is None:
        return read_json(folder / "main_config.json")
    return read_training_config(folder)


def find_released(folder):
    """Files and configs of a checkpoint in the layout of the released ones."""
    return Layout(
        main=folder / "pytorch_model_main.bin",
        vae=folder / "pytorch_model_vae.bin",
        stft=folder / "pytorch_model_stft.bin",
        roots=(folder,),
        main_config=read_json(folder / "main_config.json"),
        vae_config=read_json(folder / "vae_config.json"),
        stft_config={**STFT_CONFIG, **read_json(folder / "stft_config.json")},
    )


def find_training(folder):
    """Files and configs that the original's training saved: its arguments are the first line of summary.jsonl."""
    stft_path = folder / "pytorch_model_1.bin"
    check_pickle(stft_path)
    stft = load_tensors(stft_path)
    return Layout(
        main=folder / "pytorch_model_2.bin",
        vae=folder / "pytorch_model.bin",
        stft=stft_path,
        roots=(folder, folder.parent),
        main_config=read_training_config(folder),
        vae_config={},
        stft_config={
            **STFT_CONFIG,
            "n_mel_channels": shape_of(stft, "mel_basis", 2)[0],
            "filter_length": shape_of(stft, "stft_fn.forward_basis", 3)[2],
            "win_length": shape_of(stft, "stft_fn.forward_basis", 3)[2],
        },
    )


def find_summary(folder):
    """The log of the original's training, in the folder of a checkpoint or one level up."""
    return find("summary.jsonl", (folder, folder.parent), "")


def read_training_config(folder):
    """The arguments of the original's training by their names in main_config.json."""
    summary = find_summary(folder)
    if summary is None:
        raise ValueError(f"{folder / 'summary.jsonl'} is missing, and so is {folder.parent / 'summary.jsonl'}")
    try:
        arguments = json.loads(next(line for line in summary.read_text(encoding="utf-8").splitlines() if line.strip()))
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{summary} does not begin with a line of JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"{summary} does not begin with a JSON object")
    return {
        "text_encoder_name": arguments.get("text_encoder_name"),
        "scheduler_name": arguments.get("scheduler_name"),
        "unet_model_name": arguments.get("unet_model_name"),
        "unet_model_config_path": arguments.get("unet_model_config"),
        "snr_gamma": arguments.get("snr_gamma"),
    }


def open_ckpt(path, scaling_factor):
    """The VAE and the vocoder in an AudioLDM .ckpt file."""
    check_pickle(path)
    content = load_pickle(path)
    content = content.get("state_dict", content)
    everything = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    tensors = load_first_stage(path)
    if not tensors:
        raise ValueError(f"{path} must hold tensors named `{CKPT_PREFIX}*`, got {listed(everything)}")
    scaling_factor = read_scaling_factor(everything.get("scale_factor"), scaling_factor)
    configs = {"vae": vae_config(tensors, {}, scaling_factor), "vocoder": vocoder_config(tensors, STFT_CONFIG)}
    losses = {name for name in tensors if name.startswith("loss.")}
    wanted = {}
    for component, config in configs.items():
        wanted |= wanted_of(component, build(component, config))
    check_tensors(path, {name: value for name, value in tensors.items() if name not in losses}, wanted)
    others = {name for name in everything if not name.startswith(CKPT_PREFIX) and name != "scale_factor"}
    return Original(
        configs=configs,
        files=dict.fromkeys(configs, path),
        read_file=load_first_stage,
        dropped=sorted(losses | others),
    )


def load_component(original, component, dtype=None):
    """A component of the pipeline with its weights, on the CPU.

    Args:
        original (`Original`): the checkpoint.
        component (`str`): "unet", "text_encoder", "vae", "vocoder", "tokenizer" or "scheduler".
        dtype (`torch.dtype`, *optional*): of the weights. Defaults to that of the checkpoint.
    """
    if component == "tokenizer":
        return T5Tokenizer.from_pretrained(original.text_encoder)
    if component == "scheduler":  # the config may name DDIM, the original reads it into DDPM
        return DDPMScheduler.from_config(original.scheduler_config)
    model = build(component, original.configs[component])
    shapes = shapes_of(model)
    names = list(original_names(component, shapes).items())
    num_bytes = sum(shape.numel() for shape in shapes.values()) * (dtype or torch.float32).itemsize
    logger.info("%s: %d tensors, about %.1f MB", component, len(names), num_bytes / 1e6)
    state, path = {}, original.files[component]
    for start in tqdm(range(0, len(names), NAMES_PER_MAPPING), desc=component, delay=2, leave=False):
        # The file is mapped again for every few tensors: pages read through a mapping stay resident as long as it.
        chunk = dict(names[start : start + NAMES_PER_MAPPING])
        state.update(to_diffusers(original.read_file(path), chunk, shapes, dtype))
    if component == "vocoder":
        like = state["conv_post.bias"]
        state.update({name: like.new_full(shapes[name], value) for name, value in VOCODER_CONSTANTS.items()})
    if component == "text_encoder":
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    if component == "text_encoder":
        model.tie_weights()
    return model.eval()  # as `from_pretrained` has it


def save_component(original, component, folder, dtype=None, variant=None):
    """Save a component of the pipeline into its part of a diffusers folder, and free its weights.

    Args:
        original, component, dtype: as for `load_component`.
        folder (`Path`): the diffusers folder.
        variant (`str`, *optional*): weights are named diffusion_pytorch_model.VARIANT.safetensors.

    Returns:
        the component; the weights of a model are on the meta device.
    """
    loaded = load_component(original, component, dtype)
    if component in CLASSES:
        loaded.save_pretrained(folder / component, variant=variant)
        return loaded.to("meta")
    loaded.save_pretrained(folder / component)
    if component == "tokenizer":
        for name in TOKENIZERS:
            if (original.text_encoder / name).is_file() and not (folder / component / name).exists():
                shutil.copyfile(original.text_encoder / name, folder / component / name)
    return loaded


def save_pipeline(original, folder, pipeline_class, dtype=None, variant=None, scheduler_class=None):
    """Write the diffusers folder of a checkpoint, one component in memory at a time.

    Args:
        original (`Original`): a whole checkpoint, not that of a .ckpt file.
        folder (`Path`): where to write.
        pipeline_class (`type`): `TangoPipeline`.
        dtype (`torch.dtype` or `dict`, *optional*): of the weights, or component -> dtype. Defaults to that of the
            checkpoint.
        variant (`str`, *optional*): weights are named diffusion_pytorch_model.VARIANT.safetensors.
        scheduler_class (`type`, *optional*): of the scheduler, with the checkpoint's noise schedule.
    """
    components = {}
    for component in ("tokenizer", "scheduler", *original.configs):
        component_dtype = dtype.get(component) if isinstance(dtype, dict) else dtype
        components[component] = save_component(original, component, folder, component_dtype, variant)
    if scheduler_class is not None:
        components["scheduler"] = scheduler_class.from_config(components["scheduler"].config)
        components["scheduler"].save_pretrained(folder / "scheduler")
    pipeline_class(**components).save_config(folder)
    write_json(folder / "original" / "main_config.json", original.main_config)
    write_json(folder / "original" / "stft_config.json", original.stft_config)
    (folder / "original" / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (original.text_encoder / name).is_file():
            shutil.copyfile(original.text_encoder / name, folder / "original" / "tokenizer" / name)
    stft = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in original.stft.items()}
    save_file(stft, folder / "original" / "stft.safetensors")


def read_scaling_factor(value, given=None):
    """The VAE's scaling factor: the one `given`, else that of the checkpoint, else that of the AudioLDM family."""
    if given is not None:
        if not 0 < given < math.inf:
            raise ValueError(f"`scaling_factor` must be a positive number, got {given!r}")
        return given
    if value is None:
        logger.warning(
            "the checkpoint does not have the VAE's scaling factor: using %s, that of the AudioLDM family "
            "(`scaling_factor` overrides it)",
            SCALING_FACTOR,
        )
        return SCALING_FACTOR
    if not isinstance(value, (int, float, torch.Tensor)) or not 0 < float(value) < math.inf:
        raise ValueError(f"the VAE's scale factor must be a positive number, got {value!r}")
    return float(value)


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
    width = shape_of(tensors, "encoder.conv_in.weight", 4)[0]
    if channels[0] != width:
        raise ValueError(
            f"the VAE's first level has {channels[0]} channels and its first convolution {width}: `ch_mult` has to "
            "begin with 1, since AutoencoderKL has one number for both"
        )
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


def build(component, config):
    """A model without weights, on the meta device."""
    return build_model(CLASSES[component], config, f"the config of the {component}")


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def wanted_of(component, model):
    """Original name -> shape there of every tensor of a component."""
    shapes = shapes_of(model)
    return {old: original_shape(component, old, shapes[new]) for new, old in original_names(component, shapes).items()}


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
    problems = describe_misfits(missing=set(wanted) - found, unexpected=found - dropped - set(wanted), wrong=wrong)
    if problems:
        raise ValueError(f"{path} does not fit the configs; {problems}")
    return sorted(dropped)


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


def find_text_encoder(name, roots, download):
    """Folder with config and tokenizer of the text encoder called `name`; its weights are not needed."""
    config = find(name, roots, "config.json")
    if config is not None:
        return config.parent
    if not is_hub_id(name):
        raise ValueError(f"`text_encoder_name` must be a folder in SOURCE or a Hub id, got {name!r}")
    logger.info("text encoder: config and tokenizer of %s from the Hub", name)
    return Path(download(name, allow_patterns=["config.json", *TOKENIZER_FILES]))


def find_unet_config(name, roots):
    path = find(name, roots, "config.json")
    if path is not None:
        return read_json(path)
    if name in UNET_CONFIGS:
        return UNET_CONFIGS[name]
    raise ValueError(f"`unet_model_config_path` must be a file in SOURCE or one of {list(UNET_CONFIGS)}, got {name!r}")


def find_scheduler_config(name, roots, download):
    leaf = "scheduler/scheduler_config.json"
    path = find(name, roots, leaf) or find(name, roots, "scheduler_config.json")
    if path is not None:
        return read_json(path)
    if name in SCHEDULER_CONFIGS:
        return SCHEDULER_CONFIGS[name]
    if not is_hub_id(name):
        raise ValueError(f"`scheduler_name` must be a folder in SOURCE or a Hub id, got {name!r}")
    logger.info("scheduler: config of %s from the Hub", name)
    return read_json(Path(download(name, allow_patterns=[leaf])) / leaf)


def is_hub_id(name):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
