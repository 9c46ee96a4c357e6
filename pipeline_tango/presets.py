"""Settings by name: schedulers, what `--fast` sets, and the dtypes and the kernels that suit a device."""

import math
import os
from shutil import which


SCHEDULER_NAMES = ("ddpm", "ddim", "dpm++", "unipc", "euler", "heun", "pndm", "lcm", "tcd")  # those of `SCHEDULERS`

# What --fast sets. Each is also a flag, and explicit flags override the preset. The guidance scale is higher than
# usual, since guidance is on in half of the steps. DeepCache is for models of the released width only.
FAST = {"scheduler": "dpm++", "steps": 12, "guidance": 4.0, "guidance_interval": [0.0, 0.5], "deep_cache": 3}
LARGE_WIDTH = 1280  # channels of a UNet's widest level

KERNELS = (
    "blocked-attention",
    "blocked-attention-vae",
    "channels-last-unet",
    "channels-last-vae",
    "transposed-convs",
    "conv2d-vocoder",
    "compile-unet",
    "keep-memory",
)
# Those of --fast, by kind of processor, for models in bfloat16; docs/speed.md has the measurements.
# Blocks of attention gain a quarter of a step on an EPYC with AVX512-BF16, and cost a tenth with AMX.
FAST_KERNELS = {
    "amx": ("channels-last-vae", "conv2d-vocoder", "keep-memory"),
    "avx512_bf16": (
        "blocked-attention",
        "blocked-attention-vae",
        "channels-last-vae",
        "conv2d-vocoder",
        "keep-memory",
    ),
    "cpu": ("blocked-attention",),
}
LARGE_KERNELS = {"avx512_bf16": ("transposed-convs",)}  # and those for UNets of the released width
COMPILE_PAYS_FROM = 40  # sounds by --fast on a CPU with AMX: 83 s of compilation, and 2 to 3 s less for a sound


def is_large_model(model):
    """Whether a model's UNet is of the released width."""
    from diffusers import UNet2DConditionModel

    return max(UNet2DConditionModel.load_config(model, subfolder="unet")["block_out_channels"]) >= LARGE_WIDTH


def fast_settings(model):
    """What `--fast` sets for a model, by the width of its UNet."""
    has_deep_cache = is_large_model(model)
    return {name: value for name, value in FAST.items() if name != "deep_cache" or has_deep_cache}


def most_steps(model, scheduler):
    """The largest number of steps of a scheduler, given by its class name: LCM and TCD take a subset of
    their `original_inference_steps`. Of the others the pipeline says what they cannot do."""
    from diffusers import LCMScheduler, TCDScheduler

    for cls in (LCMScheduler, TCDScheduler):
        if scheduler == cls.__name__:
            config = cls.load_config(model, subfolder="scheduler")
            return cls.from_config(config).config.original_inference_steps
    return math.inf


def choose_dtypes(name, device, fast=False):
    """The dtype of each model on a device, as `from_pretrained` takes it, for `--dtype`, and `--fast` if so."""
    import torch

    device = torch.device(device)
    if name == "auto":
        name = "float32"
        if device.type == "cuda":
            name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        elif device.type == "xpu" and torch.xpu.is_bf16_supported():
            name = "bfloat16"
        elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            name = "bfloat16"
    if name == "bfloat16" and fast:
        return {"default": torch.bfloat16}
    dtypes = {"default": torch.float32, "unet": getattr(torch, name)}
    if name == "bfloat16":  # float16 overflows in T5
        dtypes["text_encoder"] = torch.bfloat16
    return dtypes


def processor(device):
    """The kind of a device: of CPUs "amx", "avx512_bf16" or "cpu", else its type, such as "cuda"."""
    import torch

    device = torch.device(device)
    if device.type != "cpu":
        return device.type
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "cpu"


def choose_kernels(dtypes, device, num_sounds=1, is_large=False):
    """The kernels that `--fast` uses.

    Args:
        dtypes (`dict`): of the models, as of [`choose_dtypes`].
        device (`torch.device` or `str`)
        num_sounds (`int`, *optional*, defaults to 1): how many sounds one process makes.
        is_large (`bool`, *optional*, defaults to `False`): whether the UNet is of the released width.

    Returns:
        `tuple[str, ...]` of `KERNELS`, and a `str` that says what they were chosen for.
    """
    import torch

    kind, dtype = processor(device), dtypes.get("unet", dtypes["default"])
    reason = f"{kind} in {str(dtype).removeprefix('torch.')}"
    names = FAST_KERNELS.get(kind, ()) if dtype == torch.bfloat16 else ()
    if is_large and dtype == torch.bfloat16 and kind in LARGE_KERNELS:
        names += LARGE_KERNELS[kind]
        reason += " for a wide UNet"
    if kind == "amx" and names and is_large:
        if num_sounds >= COMPILE_PAYS_FROM and not find_compiler():
            reason += ", not compiled without a C++ compiler"
        elif num_sounds >= COMPILE_PAYS_FROM:
            names = (*names, "channels-last-unet", "compile-unet")
            reason += f", compiled for {num_sounds} sounds"
        elif num_sounds > 1:
            reason += f", not compiled for fewer than {COMPILE_PAYS_FROM} sounds"
    return names, reason


def find_compiler():
    """Whether there is a C++ compiler, without which torch cannot compile for a CPU."""
    return any(which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
