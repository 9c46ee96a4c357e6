import json

import pytest
import torch

from pipeline_tango import SCHEDULERS, presets
from pipeline_tango.presets import (
    FAST,
    KERNELS,
    SCHEDULER_NAMES,
    choose_dtypes,
    choose_kernels,
    fast_settings,
    processor,
)


def test_scheduler_names_are_those_of_the_pipeline():
    assert SCHEDULER_NAMES == tuple(SCHEDULERS)


def test_only_the_unet_is_in_float16_and_auto_follows_the_device(monkeypatch):
    for fast in (False, True):
        assert choose_dtypes("float16", "cpu", fast) == {"default": torch.float32, "unet": torch.float16}
    bfloat16 = {"default": torch.float32, "unet": torch.bfloat16, "text_encoder": torch.bfloat16}
    float32 = {"default": torch.float32, "unet": torch.float32}
    assert choose_dtypes("bfloat16", "cpu") == bfloat16
    for has_instructions, dtypes in ((False, float32), (True, bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_dtypes("auto", "cpu") == dtypes
        assert choose_dtypes("float32", "cpu") == choose_dtypes("float32", "cpu", fast=True) == float32
    assert choose_dtypes("auto", "cpu", fast=True) == {"default": torch.bfloat16}


@pytest.mark.parametrize("width, has_cache", [(640, False), (1280, True)])
def test_fast_has_a_cache_for_wide_models(tmp_path, width, has_cache):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"block_out_channels": [320, width]}))
    assert ("deep_cache" in fast_settings(tmp_path)) == has_cache
    assert fast_settings(tmp_path).items() <= FAST.items()


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one of another kind."""

    def pretend(kind, has_compiler=True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: kind == "amx")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: kind in ("amx", "avx512_bf16"))
        monkeypatch.setattr(presets, "find_compiler", lambda: has_compiler)

    return pretend


BFLOAT16, FLOAT32 = {"default": torch.bfloat16}, {"default": torch.float32, "unet": torch.float32}


def test_kernels_follow_from_the_processor(machine):
    chosen = {}
    for kind in ("amx", "avx512_bf16", "cpu"):
        machine(kind)
        assert processor("cpu") == kind and processor("cuda:1") == "cuda"
        chosen[kind], reason = choose_kernels(BFLOAT16, "cpu")
        assert reason == f"{kind} in bfloat16" and set(chosen[kind]) <= set(KERNELS)
        assert choose_kernels(FLOAT32, "cpu") == ((), f"{kind} in float32")
        assert choose_kernels(BFLOAT16, "cuda") == ((), "cuda in bfloat16")
        large, reason = choose_kernels(BFLOAT16, "cpu", is_large=True)
        assert large[: len(chosen[kind])] == chosen[kind] and set(large) <= set(KERNELS)
        assert reason == f"{kind} in bfloat16" + " for a wide UNet" * (large != chosen[kind])
        assert ("blocked-attention" in chosen[kind]) == (kind != "amx")
        assert ("transposed-convs" in large) == (kind == "avx512_bf16") and "transposed-convs" not in chosen[kind]
        assert choose_kernels(FLOAT32, "cpu", is_large=True) == ((), f"{kind} in float32")
        assert choose_kernels(BFLOAT16, "cuda", is_large=True) == ((), "cuda in bfloat16")
    assert chosen["amx"] == ("channels-last-vae", "conv2d-vocoder", "keep-memory")
    assert chosen["cpu"] == ("blocked-attention",)
    assert {*chosen["amx"], *chosen["cpu"], "blocked-attention-vae"} == set(chosen["avx512_bf16"])


@pytest.mark.parametrize(
    "kind, num_sounds, is_large, has_compiler, compiles, told",
    [
        ("amx", 1, True, True, False, ""),
        ("amx", 39, True, True, False, ", not compiled for fewer than 40 sounds"),
        ("amx", 40, True, True, True, ", compiled for 40 sounds"),
        ("amx", 40, True, False, False, ", not compiled without a C++ compiler"),
        ("amx", 40, False, True, False, ""),
        ("avx512_bf16", 1000, True, True, False, ""),
    ],
)
def test_a_long_list_is_compiled_where_that_pays(machine, kind, num_sounds, is_large, has_compiler, compiles, told):
    machine(kind, has_compiler)
    names, reason = choose_kernels(BFLOAT16, "cpu", num_sounds, is_large)
    assert ("compile-unet" in names) == ("channels-last-unet" in names) == compiles
    assert reason.replace(" for a wide UNet", "") == f"{kind} in bfloat16{told}"
