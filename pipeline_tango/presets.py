"""Settings by name: schedulers, what `--fast` sets, and the dtypes and the attention that suit a device."""

import math


SCHEDULER_NAMES = ("ddpm", "ddim", "dpm++", "unipc", "euler", "heun", "pndm", "lcm", "tcd")  # those of `SCHEDULERS`

# What --fast sets. Each is also a flag, and explicit flags override the preset. The guidance scale is higher than
# usual, since guidance is on in half of the steps. DeepCache is for models of the released width only.
FAST = {"scheduler": "dpm++", "steps": 12, "guidance": 4.0, "guidance_interval": [0.0, 0.5], "deep_cache": 3}
LARGE_WIDTH = 1280  # channels of a UNet's widest level


def fast_settings(model):
    """What `--fast` sets for a model, by the width of its UNet."""
    from diffusers import UNet2DConditionModel

    width = max(UNet2DConditionModel.load_config(model, subfolder="unet")["block_out_channels"])
    return {name: value for name, value in FAST.items() if name != "deep_cache" or width >= LARGE_WIDTH}


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


def attends_in_blocks(dtypes, device):
    """Whether `--fast` sets [`BlockedAttnProcessor`], which pays for bfloat16 on a CPU."""
    import torch

    return torch.device(device).type == "cpu" and dtypes.get("unet", dtypes["default"]) == torch.bfloat16
