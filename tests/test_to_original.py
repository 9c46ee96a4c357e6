import json
import shutil
from pathlib import Path

import pytest
from checkpoints import equal, fails, load, weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import T5EncoderModel, T5Tokenizer

from convert.convert_tango import main
from convert.to_original import vocabulary, write_tokenizer
from pipeline_tango.json_files import read_json, write_json
from pipeline_tango.original import SCALING_FACTOR, STFT_CONFIG, stft_tensors


ROOT = Path(__file__).parents[1]
PICKLES = ("main", "vae", "stft")


@pytest.fixture(scope="module")
def back(converted, tmp_path_factory):
    """`converted` in the original's layout again."""
    folder = tmp_path_factory.mktemp("back") / "tango"
    assert main(["--to_original", str(converted), str(folder)]) == 0
    return folder


def test_original_to_diffusers_and_back_is_bit_for_bit(original_checkpoint, back):
    for name in PICKLES:
        file = f"pytorch_model_{name}.bin"
        assert equal(load(original_checkpoint / file), load(back / file))
    for name in ("main_config.json", "config.json", "vae_config.json", "stft_config.json"):
        assert (back / name).read_text() == (original_checkpoint / name).read_text()
    main_tensors = load(back / "pytorch_model_main.bin")
    shared, alias = (main_tensors[f"text_encoder.{name}.weight"] for name in ("shared", "encoder.embed_tokens"))
    assert shared.data_ptr() == alias.data_ptr()


def test_diffusers_to_original_and_back_is_bit_for_bit(converted, back, tmp_path):
    again = tmp_path / "again"
    assert main([str(back), str(again)]) == 0
    assert weights(again) == weights(converted)
    for path in converted.rglob("*.json"):
        assert read_json(again / path.relative_to(converted)) == read_json(path)


def test_model_trained_here_gets_an_original_layout(converted, tmp_path):
    """Without `original/` the mel front end is computed, and the names lead into the folder."""
    trained = shutil.copytree(converted, tmp_path / "trained", ignore=shutil.ignore_patterns("original"))
    assert main(["--to_original", str(trained), str(tmp_path / "back")]) == 0
    assert equal(load(tmp_path / "back" / "pytorch_model_stft.bin"), stft_tensors(STFT_CONFIG))
    config = read_json(tmp_path / "back" / "main_config.json")
    assert (config["text_encoder_name"], config["scheduler_name"]) == ("./t5", "./scheduler")
    encoder = T5EncoderModel.from_pretrained(converted / "text_encoder").state_dict()
    assert equal(load(tmp_path / "back" / "t5" / "pytorch_model.bin"), dict(encoder))
    assert main([str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    components = {name: value for name, value in weights(converted).items() if not name.startswith("original")}
    assert components.items() <= weights(tmp_path / "again").items()


def test_names_that_lead_out_of_the_folder_are_not_followed_back(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    config = read_json(folder / "original" / "main_config.json")
    write_json(folder / "original" / "main_config.json", {**config, "text_encoder_name": "../../t5-elsewhere"})
    assert main(["--to_original", str(folder), str(tmp_path / "out")]) == 0
    assert read_json(tmp_path / "out" / "main_config.json")["text_encoder_name"] == "./t5"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_sharded_weights_go_back(converted, back, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="500KB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    assert main(["--to_original", str(folder), str(tmp_path / "out")]) == 0
    main_file = "pytorch_model_main.bin"
    assert equal(load(tmp_path / "out" / main_file), load(back / main_file))


def test_what_the_original_can_not_hold_is_refused(tiny_folder, converted, tmp_path, capsys):
    line = fails(["--to_original", tiny_folder, tmp_path / "out"], tmp_path / "out", capsys)
    assert "`norm_num_groups` can only be 32 here, got 4" in line
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    config = read_json(folder / "vocoder" / "config.json")
    write_json(folder / "vocoder" / "config.json", {**config, "upsample_rates": [4, 5, 2, 2, 2]})
    line = fails(["--to_original", folder, tmp_path / "out"], tmp_path / "out", capsys)
    assert "`upsample_rates` is always [5, 4, 2, 2, 2], got [4, 5, 2, 2, 2]" in line
    write_json(folder / "vocoder" / "config.json", config)
    config = read_json(folder / "unet" / "config.json")
    UNet2DConditionModel.from_config(config, in_channels=config["in_channels"] + 2).save_pretrained(folder / "unet")
    line = fails(["--to_original", folder, tmp_path / "out"], tmp_path / "out", capsys)
    assert "unet: the original has no position channels; this UNet takes 2 of them" in line


def test_damaged_weights_do_not_go_back(converted, tmp_path, capsys):
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    line = fails(["--to_original", folder, tmp_path / "out"], tmp_path / "out", capsys)
    assert str(path) in line and "cut short" in line
    path.rename(path.with_suffix(".fp16.safetensors"))
    line = fails(["--to_original", folder, tmp_path / "out"], tmp_path / "out", capsys)
    assert "--variant says which weights to read" in line and "diffusion_pytorch_model.fp16.safetensors" in line


def test_vae_with_attention_in_its_levels(converted, source, tmp_path):
    """Attention at resolution 128 of 256: the second level, counted from the highest resolution."""
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        block_out_channels=[32, 64, 32],
        layers_per_block=1,
        latent_channels=8,
        sample_size=256,
        scaling_factor=SCALING_FACTOR,
    )
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    vae.save_pretrained(folder / "vae")
    assert main(["--to_original", str(folder), str(tmp_path / "back")]) == 0
    assert read_json(tmp_path / "back" / "vae_config.json")["ddconfig"]["attn_resolutions"] == [128]
    tensors = load(tmp_path / "back" / "pytorch_model_vae.bin")
    assert tensors["decoder.up.1.attn.1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert main([str(tmp_path / "back"), str(tmp_path / "again")]) == 0
    assert weights(tmp_path / "again") == weights(folder)
    assert read_json(tmp_path / "again" / "vae" / "config.json") == read_json(folder / "vae" / "config.json")


def test_every_file_of_a_source_comes_back(original_checkpoint, back):
    """Texts and tokenizer byte for byte. The libraries write other configs, which have every value of the source's."""
    changed = {"_class_name", "_diffusers_version", "transformers_version", "torch_dtype"}
    changed |= {
        "is_encoder_decoder",
        "tie_word_embeddings",
        "use_cache",
    }  # of a whole T5, which a source has no need of
    # of the program that made the checkpoint, and weights that the original reads, in vain, before the pickled ones
    left_out = {"tiny_vocoder_overrides.json", "tiny-t5/pytorch_model.bin"}
    for path in sorted(path for path in original_checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(original_checkpoint).as_posix()
        if name in left_out:
            continue
        if path.suffix == ".bin":
            assert equal(load(path), load(back / name)), name
        elif "/" in name and "token" not in name and path.suffix == ".json":
            written = read_json(back / name)
            assert all(written[key] == value for key, value in read_json(path).items() if key not in changed), name
        else:
            assert (back / name).read_bytes() == path.read_bytes(), name


def test_a_tokenizer_without_kept_files_is_written_in_the_older_format(converted, tmp_path):
    """tokenizers 0.13 refuses `prepend_scheme` ("data did not match any variant") and asks for `add_prefix_space`."""
    folder = shutil.copytree(converted, tmp_path / "in", ignore=shutil.ignore_patterns("original"))
    assert main(["--to_original", str(folder), str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "t5" / "tokenizer.json").read_text()
    assert "prepend_scheme" not in text and json.loads(text)["decoder"]["add_prefix_space"] is True
    assert T5Tokenizer.from_pretrained(tmp_path / "out" / "t5").get_vocab() == vocabulary(converted / "tokenizer")


def test_kept_files_of_another_tokenizer_do_not_go_back(converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "in"))
    tokenizer = read_json(folder / "tokenizer" / "tokenizer.json")
    tokenizer["model"]["vocab"][5][0] = "anew"
    write_json(folder / "tokenizer" / "tokenizer.json", tokenizer)
    (folder / "tokenizer" / "spiece.model").unlink()
    write_tokenizer(folder / "tokenizer", folder / "original" / "tokenizer", tmp_path)
    assert "anew" in vocabulary(tmp_path)
