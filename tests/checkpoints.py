"""Checkpoints in both layouts, as tests compare and damage them."""

import hashlib
import shutil

import torch

from convert.convert_tango import main
from convert.to_original import vae_original_config
from pipeline_tango.json_files import read_json, write_json
from pipeline_tango.original import SCALING_FACTOR, STFT_CONFIG, UNET_CONFIG, build, stft_tensors, wanted_of


def load(path):
    return torch.load(path, weights_only=True)


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(
        tensors[name].dtype == others[name].dtype and torch.equal(tensors[name], others[name]) for name in tensors
    )


def fingerprint(folder):
    """Hash of every file under a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(folder):
    """Hash of every weight file of a diffusers folder."""
    return {name: value for name, value in fingerprint(folder).items() if name.endswith(".safetensors")}


def fails(arguments, output, capsys):
    """The error line of a run that must leave nothing behind."""
    before = set(output.parent.iterdir())
    assert main([str(argument) for argument in arguments]) == 1
    assert set(output.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def edit(path, change):
    tensors = load(path)
    change(tensors)
    torch.save(tensors, path)


def write_full_size(original_checkpoint, folder):
    """Random weights in the shapes and the layout of the released checkpoints, with the text encoder's folder."""
    shutil.copytree(original_checkpoint / "tiny-t5", folder / "google" / "flan-t5-large")
    text_config = read_json(folder / "google" / "flan-t5-large" / "config.json")
    text_config |= {"d_model": 1024, "d_ff": 2816, "d_kv": 64, "num_heads": 16, "num_layers": 24, "vocab_size": 32128}
    write_json(folder / "google" / "flan-t5-large" / "config.json", text_config)
    vae_config = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "block_out_channels": [128, 256, 512],
        "layers_per_block": 2,
        "latent_channels": 8,
        "sample_size": 256,
        "scaling_factor": SCALING_FACTOR,
    }
    vocoder_config = {
        "model_in_dim": 64,
        "upsample_initial_channel": 1024,
        "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernel_sizes": [16, 16, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    }
    configs = {"unet": UNET_CONFIG, "text_encoder": text_config, "vae": vae_config, "vocoder": vocoder_config}
    models = {component: build(component, config) for component, config in configs.items()}
    for file, components in (("main", ("unet", "text_encoder")), ("vae", ("vae", "vocoder"))):
        tensors = {}
        for component in components:
            wanted = wanted_of(component, models[component])
            tensors |= {name: torch.empty(shape).normal_(std=0.02) for name, shape in wanted.items()}
        torch.save(tensors, folder / f"pytorch_model_{file}.bin")
    torch.save(stft_tensors(STFT_CONFIG), folder / "pytorch_model_stft.bin")
    names = {"text_encoder_name": "google/flan-t5-large", "scheduler_name": "stabilityai/stable-diffusion-2-1"}
    write_json(folder / "main_config.json", {**names, "unet_model_config_path": "configs/diffusion_model_config.json"})
    write_json(folder / "vae_config.json", vae_original_config(models["vae"].config))
    write_json(folder / "stft_config.json", STFT_CONFIG)
