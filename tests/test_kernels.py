import copy
import hashlib
import os
import pickle
import platform
import subprocess
import sys

import pytest
import torch
from conftest import latents_of
from peft import LoraConfig
from transformers import SpeechT5HifiGan

from pipeline_tango import TANGO_TINY, kernels
from pipeline_tango.kernels import (
    FASTER_CLASSES,
    BlockedAttnProcessor,
    Conv1dAs2d,
    ConvTranspose1dAs2d,
    TransposedConv2d,
    use_conv2d,
    use_kernels,
    use_transposed_convs,
)
from pipeline_tango.presets import KERNELS


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def vocoder(components):
    return components["vocoder"].eval()


@torch.no_grad()
def test_conv2d_is_the_same_function_and_can_be_undone(vocoder):
    mel_spectrogram = torch.randn(2, 20, 64)
    expected, one = vocoder(mel_spectrogram), vocoder(mel_spectrogram[0])
    use_conv2d(vocoder)
    assert any(type(layer) is Conv1dAs2d for layer in vocoder.modules())
    assert torch.allclose(vocoder(mel_spectrogram), expected, atol=1e-5)
    assert torch.allclose(vocoder(mel_spectrogram[0]), one, atol=1e-5)
    for kind, plain in ((Conv1dAs2d, torch.nn.Conv1d), (ConvTranspose1dAs2d, torch.nn.ConvTranspose1d)):
        layer = next(layer for layer in vocoder.modules() if type(layer) is kind)
        hidden_states = torch.randn(layer.in_channels, 9)
        assert torch.allclose(layer(hidden_states), plain.forward(layer, hidden_states[None])[0], atol=1e-5)
    use_conv2d(vocoder, enabled=False)
    assert not any(type(layer) in FASTER_CLASSES.values() for layer in vocoder.modules())
    assert torch.equal(vocoder(mel_spectrogram), expected)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"output_padding": 1, "bias": False}, {"dilation": 2}, {"padding": 3}])
def test_transposed_convolutions_keep_their_options(options):
    layer = torch.nn.ConvTranspose1d(4, 6, 8, stride=3, **options)
    hidden_states = torch.randn(2, 4, 9)
    expected, longer = layer(hidden_states), layer(hidden_states, output_size=[layer(hidden_states).shape[2] + 1])
    use_conv2d(layer)
    assert type(layer) is ConvTranspose1dAs2d and torch.allclose(layer(hidden_states), expected, atol=1e-5)
    assert torch.allclose(layer(hidden_states, output_size=[longer.shape[2]]), longer, atol=1e-5)


@torch.no_grad()
def test_in_bfloat16_it_is_as_exact_as_before():
    """45 dB between the two, of a trained vocoder, and no further from float32 than before."""
    vocoder = SpeechT5HifiGan.from_pretrained(TANGO_TINY, subfolder="vocoder", dtype=torch.float32).eval()
    mel_spectrogram = 1.5 * torch.randn(1, 32, vocoder.config.model_in_dim, generator=torch.manual_seed(0)) - 4
    exact = vocoder(mel_spectrogram)
    vocoder, mel_spectrogram = vocoder.to(torch.bfloat16), mel_spectrogram.bfloat16()
    before = vocoder(mel_spectrogram).float()
    use_conv2d(vocoder)
    after = vocoder(mel_spectrogram).float()

    def error_db(reference, other):
        return float(10 * torch.log10(reference.square().sum() / (reference - other).square().sum()))

    assert error_db(before, after) > 45 and error_db(exact, after) > error_db(exact, before) - 1


def test_the_vocoder_stays_what_is_saved(vocoder, tmp_path):
    vocoder.save_pretrained(tmp_path / "before")
    names, kind = list(vocoder.state_dict()), type(vocoder)
    use_conv2d(vocoder)
    vocoder.save_pretrained(tmp_path / "after")
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after")
    assert type(vocoder) is kind and list(vocoder.state_dict()) == names


@torch.no_grad()
def test_copies_pickles_casts_and_compiled_vocoders_compute_alike(vocoder):
    mel_spectrogram = torch.randn(1, 20, 64)
    use_conv2d(vocoder)
    expected = vocoder(mel_spectrogram)
    copied, unpickled = copy.deepcopy(vocoder), pickle.loads(pickle.dumps(vocoder))
    for layer in vocoder.modules():
        if hasattr(layer, "weight"):
            layer.weight.zero_()  # the copies have weights of their own
    assert torch.equal(copied(mel_spectrogram), expected) and torch.equal(unpickled(mel_spectrogram), expected)
    torch._dynamo.reset()
    unpickled.compile(backend="eager", fullgraph=True)
    assert torch.allclose(unpickled(mel_spectrogram), expected, atol=1e-6)
    assert copied.double()(mel_spectrogram.double()).dtype == torch.float64


def test_other_convolutions_are_left_alone():
    layers = torch.nn.Sequential(
        torch.nn.Conv1d(4, 4, 3, stride=2),
        torch.nn.Conv1d(4, 4, 3, groups=2),
        torch.nn.Conv1d(4, 4, 3, padding="same"),
        torch.nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(4, 4, 3)),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.ConvTranspose1d(4, 4, 3, groups=2),
        torch.nn.utils.parametrizations.weight_norm(torch.nn.ConvTranspose1d(4, 4, 3)),
    )
    kinds = [type(layer) for layer in layers]
    use_conv2d(layers)
    assert [type(layer) for layer in layers] == kinds


def transposed(pipe):
    """How many convolutions of the UNet are computed transposed."""
    return sum(type(layer) is TransposedConv2d for layer in pipe.unet.modules())


def test_transposed_convolutions_are_the_same_function(pipe, monkeypatch):
    texts = ["rain", "a dog barks"]
    expected = latents_of(pipe, texts, audio_length_in_s=1)
    shapes = []
    convolve = torch.nn.functional.conv2d

    def record(image, weight, *args):
        if weight.shape[2] > 1:
            shapes.append(tuple(image.shape[2:]))
        return convolve(image, weight, *args)

    use_transposed_convs(pipe.unet, 16)
    monkeypatch.setattr(torch.nn.functional, "conv2d", record)
    assert torch.allclose(latents_of(pipe, texts, audio_length_in_s=1), expected, atol=1e-4)
    assert set(shapes) == {(28, 16), (14, 8), (4, 7)}  # 7 frames of 4 bins, transposed


@torch.no_grad()
@pytest.mark.parametrize("shape", [(9, 4), (9, 2), (2, 4), (9, 8), (1, 2)])
@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 0)}, {"dilation": (1, 2), "padding": 2}])
def test_images_of_any_shape_are_convolved_alike(shape, options):
    layer = torch.nn.Conv2d(3, 5, (3, 2), **{"padding": (1, 1), **options})
    image = torch.randn(2, 3, *shape)
    expected = layer(image)
    layer.__class__ = TransposedConv2d
    assert torch.allclose(layer(image), expected, atol=1e-5)


def test_adapters_may_come_before_and_after_transposed_convolutions(pipe):
    def latents():
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["conv1", "to_q"]))
        alone = latents_of(pipe, audio_length_in_s=1)
        pipe.unet.fuse_lora()
        return alone, latents_of(pipe, audio_length_in_s=1)

    base, before = latents_of(pipe, audio_length_in_s=1), latents()
    assert not torch.allclose(base, before[0], atol=1e-2)
    pipe.unet.unfuse_lora()
    use_transposed_convs(pipe.unet, 16)
    assert torch.allclose(latents_of(pipe, audio_length_in_s=1), before[0], atol=1e-4)
    pipe.unet.delete_adapters("default")
    assert torch.allclose(latents_of(pipe, audio_length_in_s=1), base, atol=1e-3)
    for after, expected in zip(latents(), before):
        assert torch.allclose(after, expected, atol=1e-4)
    assert transposed(pipe)


def test_a_transposed_unet_is_saved_as_before(pipe, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "before")
    use_transposed_convs(pipe.unet, 16)
    pipe.unet.save_pretrained(tmp_path / "after")
    assert hashes(tmp_path / "before") == hashes(tmp_path / "after") and transposed(copy.deepcopy(pipe))
    expected = latents_of(pipe)
    pipe.unet = pickle.loads(pickle.dumps(pipe.unet))
    assert torch.equal(latents_of(pipe), expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has it")
def test_kept_memory_is_used_again():
    script = """
import resource, torch
from pipeline_tango.kernels import keep_memory

def num_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensors = [torch.ones(2**22) for _ in range(4)]  # 16 MiB each
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
num_page_faults()
print(num_page_faults())
keep_memory()
num_page_faults()
print(num_page_faults())
"""
    # else glibc may come to keep these tensors by itself, which depends on what lies beside them
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **fixed}
    )
    without, kept = map(int, result.stdout.split())
    assert without > 10 * kept + 40  # at least 96, with pages of 2 MiB


@pytest.mark.parametrize("name", [None, *KERNELS])
def test_each_kernel_sets_what_its_name_says(pipe, name, monkeypatch):
    compiled, kept = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(kernels, "keep_memory", lambda: kept.append(True))
    use_kernels(pipe, [] if name is None else [name])
    formats = {
        part: getattr(pipe, part).conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        if part == "unet"
        else pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        for part in ("unet", "vae")
    }
    assert {
        "blocked-attention": all(type(p) is BlockedAttnProcessor for p in pipe.unet.attn_processors.values()),
        "blocked-attention-vae": all(type(p) is BlockedAttnProcessor for p in pipe.vae.attn_processors.values()),
        "transposed-convs": transposed(pipe) > 0,
        "channels-last-unet": formats["unet"] and not transposed(pipe),
        "channels-last-vae": formats["vae"],
        "conv2d-vocoder": any(type(layer) is Conv1dAs2d for layer in pipe.vocoder.modules()),
        "compile-unet": compiled == [pipe.unet],
        "keep-memory": kept == [True],
    } == {each: each == name for each in KERNELS}
