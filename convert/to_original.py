"""Diffusers folders back into the original's layout."""

import logging
import shutil
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import T5Tokenizer

from pipeline_tango.json_files import check_file, read_json, write_json
from pipeline_tango.model_files import check_folders
from pipeline_tango.original import (
    CLASSES,
    NAMES_PER_MAPPING,
    RESBLOCK_DILATIONS,
    STFT_CONFIG,
    TOKENIZER_FILES,
    UPSAMPLE_RATES,
    VAE_NORM_NUM_GROUPS,
    build,
    check_stft,
    check_tensors,
    shapes_of,
    stft_tensors,
)
from pipeline_tango.positions import count_positions
from pipeline_tango.weight_maps import TIED, VOCODER_CONSTANTS, original_names, to_original


logger = logging.getLogger(__name__)


def convert_to_original(source, folder, dtype=None, variant=None):
    """Write the original's layout of a diffusers folder.

    Args:
        source (`Path`): complete diffusers folder of a `TangoPipeline`.
        folder (`Path`): folder to write into.
        dtype (`torch.dtype`, *optional*): of the weights written. Defaults to that of the weights read.
        variant (`str`, *optional*): which weights of `source` to read.

    Raises:
        ValueError: naming a file that is missing or damaged, or a setting that the original does not have.
    """
    index = read_json(source / "model_index.json")
    if index.get("_class_name") != "TangoPipeline":
        raise ValueError(f"{source} must be the folder of a TangoPipeline, got {index.get('_class_name')!r}")
    check_folders(source, index)
    configs = {component: read_json(source / component / "config.json") for component in CLASSES}
    models = {component: build(component, config) for component, config in configs.items()}
    files = {component: safetensors_files(source, component, variant) for component in CLASSES}
    configs = {component: model.config for component, model in models.items()}
    configs["vocoder"] = configs["vocoder"].to_dict()

    def load(component):
        tensors = {}
        for path in files[component]:
            try:
                check_file(path)
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
    num_positions = count_positions(configs["unet"], configs["vae"])
    if num_positions:
        raise ValueError(f"unet: the original has no position channels; this UNet takes {num_positions} of them")

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
    write_tokenizer(source / "tokenizer", kept / "tokenizer", text_encoder)

    save_pickle(folder / "pytorch_model_stft.bin", stft)
    save_pickle(folder / "pytorch_model_vae.bin", gather_original(("vae", "vocoder"), models, load, dtype))
    main = gather_original(("unet", "text_encoder"), models, load, dtype)
    save_pickle(folder / "pytorch_model_main.bin", main)
    if main_config["text_encoder_name"].startswith("./"):  # else the original takes the weights, in vain, from the Hub
        prefix = "text_encoder."
        weights = {name.removeprefix(prefix): tensor for name, tensor in main.items() if name.startswith(prefix)}
        save_pickle(text_encoder / "pytorch_model.bin", weights)


def write_tokenizer(tokenizer, kept, folder):
    """Write a tokenizer's files such that the original's libraries (transformers 4.27, tokenizers 0.13) can read them.

    Args:
        tokenizer (`Path`): the tokenizer of the diffusers folder.
        kept (`Path`): files of the tokenizer that it was converted from. They are copied byte for byte if they are
            there and still have the same vocabulary.
        folder (`Path`): to write into.
    """
    if kept.is_dir() and vocabulary(kept) == vocabulary(tokenizer):
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        return
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    if (folder / "tokenizer.json").is_file():
        write_json(folder / "tokenizer.json", in_older_format(read_json(folder / "tokenizer.json")))


def vocabulary(folder):
    return T5Tokenizer.from_pretrained(folder).get_vocab()


def in_older_format(content):
    """Part of a tokenizer.json as tokenizers 0.13 writes it, which knows no `prepend_scheme`."""
    if isinstance(content, list):
        return [in_older_format(each) for each in content]
    if not isinstance(content, dict):
        return content
    content = {key: in_older_format(value) for key, value in content.items()}
    if content.get("type") == "Metaspace" and "prepend_scheme" in content:
        scheme = content.pop("prepend_scheme")
        content.pop("split", None)
        content["add_prefix_space"] = scheme != "never"
    return content


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
