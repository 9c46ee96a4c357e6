import copy
import hashlib
import pickle

import pytest
import torch
from transformers import SpeechT5HifiGan

from pipeline_tango import TANGO_TINY
from pipeline_tango.kernels import BlockedAttnProcessor, Conv1dAs2d, use_conv2d, use_kernels
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
    layer = next(layer for layer in vocoder.modules() if type(layer) is Conv1dAs2d)
    hidden_states = torch.randn(layer.in_channels, 9)
    assert torch.allclose(layer(hidden_states), torch.nn.Conv1d.forward(layer, hidden_states[None])[0], atol=1e-5)
    use_conv2d(vocoder, enabled=False)
    assert not any(type(layer) is Conv1dAs2d for layer in vocoder.modules())
    assert torch.equal(vocoder(mel_spectrogram), expected)


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
    )
    kinds = [type(layer) for layer in layers]
    use_conv2d(layers)
    assert [type(layer) for layer in layers] == kinds


@pytest.mark.parametrize("name", [None, *KERNELS])
def test_each_kernel_sets_what_its_name_says(pipe, name, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    use_kernels(pipe, [] if name is None else [name])
    formats = {
        part: getattr(pipe, part).conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        if part == "unet"
        else pipe.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        for part in ("unet", "vae")
    }
    assert {
        "blocked-attention": all(type(p) is BlockedAttnProcessor for p in pipe.unet.attn_processors.values()),
        "channels-last-unet": formats["unet"],
        "channels-last-vae": formats["vae"],
        "conv2d-vocoder": any(type(layer) is Conv1dAs2d for layer in pipe.vocoder.modules()),
        "compile-unet": compiled == [pipe.unet],
    } == {each: each == name for each in KERNELS}
