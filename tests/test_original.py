import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from checkpoints import edit, equal, fails, fingerprint, load
from conftest import golden
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer

from pipeline_tango import TangoPipeline
from pipeline_tango.json_files import read_json, write_json
from pipeline_tango.original import STFT_CONFIG, load_component, open_original, save_component, stft_tensors


ROOT = Path(__file__).parents[1]
PICKLES = ("main", "vae", "stft")


@torch.no_grad()
def test_text_states_are_those_of_the_original(converted):
    text = golden("text")
    encoder = T5EncoderModel.from_pretrained(converted / "text_encoder")
    ids = torch.cat([text["uncond_input_ids"], text["input_ids"]])
    mask = torch.cat([text["uncond_attention_mask"], text["attention_mask"]])
    states = encoder(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, text["prompt_embeds"], atol=1e-5, rtol=0)


def test_tokenizer_is_that_of_the_original(converted, original_checkpoint):
    meta = json.loads((original_checkpoint.parent / "golden" / "meta.json").read_text())
    tokenizer = T5Tokenizer.from_pretrained(converted / "tokenizer")
    tokens = tokenizer(meta["prompts"], padding=True, return_tensors="pt")
    assert torch.equal(tokens.input_ids, golden("text")["input_ids"])
    assert tokenizer.model_max_length == 512
    assert {path.name for path in (converted / "tokenizer").iterdir()} >= {"tokenizer.json", "spiece.model"}


@torch.no_grad()
def test_unet_step_is_that_of_the_original(converted):
    text, latents = golden("text"), golden("sampling")["init_latents"]
    unet = UNet2DConditionModel.from_pretrained(converted / "unet")
    out = unet(
        latents[[1, 1]],
        torch.tensor(501),
        encoder_hidden_states=text["prompt_embeds"][[1, 3]],
        encoder_attention_mask=text["prompt_mask"][[1, 3]],
    ).sample
    torch.testing.assert_close(out, golden("unet_step")["out"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_vae_posterior_is_that_of_the_original(converted):
    expected = golden("vae_encode")
    vae = AutoencoderKL.from_pretrained(converted / "vae")
    posterior = vae.encode(golden("mel")["fbank_256"][:, None]).latent_dist
    torch.testing.assert_close(posterior.mean, expected["mean"], atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.logvar, expected["logvar"], atol=1e-4, rtol=0)
    scaled = (posterior.mean + posterior.std * expected["noise"]) * vae.config.scaling_factor
    torch.testing.assert_close(scaled, expected["scaled_latent"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_decoded_mel_and_waveform_are_those_of_the_original(converted):
    expected = golden("decode")
    vae = AutoencoderKL.from_pretrained(converted / "vae")
    vocoder = SpeechT5HifiGan.from_pretrained(converted / "vocoder")
    mel = vae.decode(golden("sampling")["ddim5_latents"][:1] / vae.config.scaling_factor).sample
    torch.testing.assert_close(mel, expected["mel"], atol=1e-3, rtol=0)
    torch.testing.assert_close(vocoder(mel.squeeze(1)), expected["waveform"], atol=1e-3, rtol=0)


def test_mel_front_end_is_computed_as_the_original_does(original_checkpoint):
    tensors = load(original_checkpoint / "pytorch_model_stft.bin")
    ours = stft_tensors(read_json(original_checkpoint / "stft_config.json"))
    assert tensors.keys() == ours.keys()
    for name in tensors:
        torch.testing.assert_close(ours[name], tensors[name], atol=1e-6, rtol=0)
    torch.testing.assert_close(stft_tensors(STFT_CONFIG)["mel_basis"], golden("mel")["mel_basis"], atol=1e-6, rtol=0)


def test_inverse_basis_is_the_pseudo_inverse():
    config = {**STFT_CONFIG, "filter_length": 64, "win_length": 40, "n_mel_channels": 8}
    tensors = stft_tensors(config)
    forward, inverse = (tensors[f"stft_fn.{name}_basis"].squeeze(1).double() for name in ("forward", "inverse"))
    window = torch.nn.functional.pad(torch.hann_window(40, dtype=torch.float64), (12, 12))
    inside = window > 0
    basis = torch.zeros_like(forward)
    spectrum = torch.fft.rfft(torch.eye(64, dtype=torch.float64)).T
    basis = torch.cat([spectrum.real, spectrum.imag])
    torch.testing.assert_close(forward, basis * window, atol=1e-6, rtol=0)
    expected = torch.linalg.pinv(basis * 64 / config["hop_length"], rtol=1e-10).T * window
    torch.testing.assert_close(inverse[:, inside], expected[:, inside], atol=1e-6, rtol=0)


BAD_TENSORS = {
    "missing": (
        "main",
        lambda tensors: tensors.pop("unet.conv_in.bias"),
        "missing: `unet.conv_in.bias`",
    ),
    "renamed": (
        "vae",
        lambda tensors: tensors.update(stray=tensors.pop("encoder.norm_out.bias")),
        "missing: `encoder.norm_out.bias`; unexpected: `stray`",
    ),
    "renamed first": (
        "vae",
        lambda tensors: tensors.update(stray=tensors.pop("vocoder.conv_pre.weight")),
        "`vocoder.conv_pre.weight` is missing",
    ),
    "wrong shape": (
        "main",
        lambda tensors: tensors.update({"text_encoder.encoder.final_layer_norm.weight": torch.zeros(31)}),
        "of a wrong shape: `text_encoder.encoder.final_layer_norm.weight (31,) instead of (32,)`",
    ),
    "untied": (
        "main",
        lambda tensors: tensors.update({"text_encoder.shared.weight": torch.zeros(624, 32)}),
        "`text_encoder.encoder.embed_tokens.weight` and `text_encoder.shared.weight` must be equal",
    ),
    "no tensor": ("vae", lambda tensors: tensors.update(step=3), "nothing but tensors, got `step`"),
    "other levels": (
        "vae",
        lambda tensors: tensors.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}),
        "the weights have `ch` 32 and `ch_mult` [1, 1, 1], got 32 and [1, 2, 1]",
    ),
    "no upsampler": (
        "vae",
        lambda tensors: [tensors.pop(f"vocoder.ups.4.{name}") for name in ("weight", "bias")],
        "got 4 upsamplers",
    ),
    "other front end": (
        "stft",
        lambda tensors: tensors.update(mel_basis=2 * tensors["mel_basis"]),
        "`mel_basis` differs by",
    ),
    "group_in": (
        "main",
        lambda tensors: tensors.update({"group_in.0.weight": torch.zeros(512, 8)}),
        "a model trained with `unet_model_name` (`group_in`, `group_out`) can not be converted",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensors_are_named(source, tmp_path, capsys, case):
    name, change, message = BAD_TENSORS[case]
    edit(source / f"pytorch_model_{name}.bin", change)
    before = fingerprint(source)
    assert message in fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert fingerprint(source) == before


@pytest.mark.parametrize(
    "file",
    ["main_config.json", "vae_config.json", "stft_config.json", "tiny-t5/config.json"]
    + [f"pytorch_model_{name}.bin" for name in PICKLES],
)
@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_damaged_files_are_named(source, tmp_path, capsys, file, damage):
    path = source / file
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    line = fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    if (file, damage) == ("tiny-t5/config.json", "missing"):
        assert "`text_encoder_name` must be a folder in SOURCE or a Hub id, got './tiny-t5'" in line
    else:
        assert str(path) in line


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_code_in_a_pickle_is_refused_and_not_run(source, tmp_path, capsys):
    proof = tmp_path / "proof"
    torch.save({"unet.conv_in.weight": Evil(proof)}, source / "pytorch_model_main.bin")
    line = fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert "pytorch_model_main.bin is refused: it holds `posix.mkdir` beside tensors, which could run code" in line
    (source / "pytorch_model_main.bin").write_bytes(pickle.dumps({"weight": Evil(proof)}))
    assert "no PyTorch file" in fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert not proof.exists()


def test_unet_model_name_is_refused(source, tmp_path, capsys):
    config = read_json(source / "main_config.json")
    write_json(source / "main_config.json", {**config, "unet_model_name": "stabilityai/stable-diffusion-2-1"})
    line = fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert "`unet_model_name`" in line and "in another space than it was trained in" in line


# Components, one at a time


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_components_load_without_a_converted_folder(original_checkpoint, converted, dtype):
    original = open_original(original_checkpoint)
    assert original.dropped == ["text_encoder.encoder.embed_tokens.weight"]
    expected = TangoPipeline.from_pretrained(converted, dtype=dtype or torch.float32)
    for name, component in expected.components.items():
        loaded = load_component(original, name, dtype)
        assert type(loaded) is type(component)
        if name == "tokenizer":
            assert loaded.get_vocab() == component.get_vocab()
        elif name == "scheduler":
            values = {key: value for key, value in loaded.config.items() if not key.startswith("_")}
            assert values.items() <= component.config.items()
        else:
            component.to(dtype or torch.float32)  # transformers 5.0 keeps some of T5 in float32
            assert equal(dict(loaded.state_dict()), dict(component.state_dict())), name
            assert loaded.training is False


def test_a_saved_component_has_no_weights_in_memory(original_checkpoint, converted, tmp_path):
    model = save_component(open_original(original_checkpoint), "vae", tmp_path)
    assert model.device.type == "meta"
    assert fingerprint(tmp_path / "vae") == fingerprint(converted / "vae")


def test_configs_that_a_checkpoint_only_names_come_from_the_given_download(source, tmp_path):
    (source / "tiny-t5").rename(tmp_path / "tiny-t5")
    (source / "scheduler").rename(tmp_path / "scheduler")
    names = {"text_encoder_name": "someone/tiny-t5", "scheduler_name": "someone/scheduler"}
    write_json(source / "main_config.json", {**read_json(source / "main_config.json"), **names})
    asked = {}

    def download(repo_id, allow_patterns):
        asked[repo_id] = allow_patterns
        return tmp_path / repo_id.removeprefix("someone/")

    original = open_original(source, download=download)
    assert original.text_encoder == tmp_path / "tiny-t5"
    assert asked.keys() == {"someone/tiny-t5", "someone/scheduler"}
    assert not [pattern for patterns in asked.values() for pattern in patterns if "bin" in pattern]


def test_a_scaling_factor_that_is_given_overrides_the_checkpoint(original_checkpoint):
    assert open_original(original_checkpoint, scaling_factor=0.5).configs["vae"]["scaling_factor"] == 0.5


def test_what_does_not_fit_is_a_value_error(source):
    edit(source / "pytorch_model_main.bin", lambda tensors: tensors.pop("unet.conv_in.bias"))
    with pytest.raises(ValueError, match="missing: `unet.conv_in.bias`"):
        open_original(source)
