import json

import pytest
import torch

from pipeline_tango import SCHEDULERS
from pipeline_tango.presets import FAST, SCHEDULER_NAMES, choose_dtypes, fast_settings


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
