import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from conftest import build_components
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from convert.to_original import vae_original_config
from pipeline_tango import log_mel_spectrogram
from training.data import ClipDataset, read_manifest
from training.latents import vae_factor
from training.train_autoencoder import (
    Autoencoder,
    MelDataset,
    PatchDiscriminator,
    count_frames,
    lay_out,
    load_vae,
    main,
    parse_args,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]
CONFIG = {
    "block_out_channels": [8, 8, 16],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Manifest of five real clips, from 0.25 s to 1.25 s, and a config beside it."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for i, name in enumerate(("rain", "thunder", "birds", "cow", "wind")):
        waveform, sampling_rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=4000 * (i + 1))
        soundfile.write(folder / f"{name}.wav", waveform, sampling_rate)
        lines.append(json.dumps({"location": f"{name}.wav", "captions": name}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "vae.json").write_text(json.dumps(CONFIG))
    return folder / "data.jsonl"


@pytest.fixture
def arguments(sounds):
    def build(output_dir, *more, config=sounds.parent / "vae.json"):
        flags = ["--train_manifest", sounds, "--output_dir", output_dir, "--train_batch_size=2", "--num_workers=0"]
        flags += ["--audio_length_in_s=0.64", "--num_crop_frames=32", "--checkpointing_steps=2"]
        flags += ["--config", config] if config else []
        return [str(each) for each in (*flags, *more)]

    return build


def start(flags):
    """The VAE that flags ask for, and the numbers of frames that it is trained on."""
    args = parse_args(flags)
    vae = load_vae(args.pretrained_model_name_or_path, args.config, args.freeze_encoder, args.seed)
    lengths = (args.audio_length_in_s, args.num_crop_frames, args.length_factors, args.train_batch_size)
    return vae, count_frames(vae, *lengths)


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


# What a run leaves


def test_two_steps_leave_a_vae_whose_scaled_latents_have_deviation_one(arguments, sounds, tmp_path):
    assert main(arguments(tmp_path, "--max_train_steps=2", "--validation_manifest", sounds)) == 0
    assert not list(tmp_path.glob(".*"))
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [1, 2, 2]
    for name in ("model", "best"):
        vae = AutoencoderKL.from_pretrained(tmp_path / name)
        assert vae.config.sample_size == 256 and vae.config.mid_block_add_attention is False
        dataset = ClipDataset(read_manifest(sounds), sampling_rate=16000, num_samples=10240)
        mel = log_mel_spectrogram(torch.stack([dataset[(0, i)]["waveform"] for i in range(5)])).unsqueeze(1)
        torch.manual_seed(0)
        with torch.no_grad():
            posterior = vae.encode(mel).latent_dist
            latents = torch.cat([posterior.sample() for _ in range(100)]) * vae.config.scaling_factor
        assert latents.shape == (500, 4, 16, 16)
        assert latents.std().item() == pytest.approx(1, abs=4e-3)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"`scaling_factor`: {vae.config.scaling_factor:.6f}" in card and "--kl_weight 0.0001" in card


def test_the_validation_table_holds_each_clips_error_without_its_padding(arguments, sounds, tmp_path):
    assert main(arguments(tmp_path, "--max_train_steps=1", "--validation_manifest", sounds)) == 0
    vae = AutoencoderKL.from_pretrained(tmp_path / "best")
    clips = read_manifest(sounds)
    dataset = ClipDataset(clips, sampling_rate=16000, num_samples=10240, crop="head")
    expected = {}
    for i, clip in enumerate(clips):
        mel = log_mel_spectrogram(dataset[(0, i)]["waveform"][None]).unsqueeze(1)
        with torch.no_grad():
            reconstruction = vae.decode(vae.encode(mel).latent_dist.mean).sample
        num_sounding_frames = 25 * (i + 1)
        expected[clip.path] = (reconstruction - mel)[0, 0, :num_sounding_frames].abs().mean().item()
    with open(tmp_path / "validation" / "step-1.csv") as file:
        table = {row["file_name"]: float(row["mean_absolute_error"]) for row in csv.DictReader(file)}
    assert table == pytest.approx(expected, abs=1e-4)
    assert list(table.values()) == sorted(table.values(), reverse=True)
    validation_error = next(entry["validation_error"] for entry in read_log(tmp_path) if "validation_error" in entry)
    assert validation_error == pytest.approx(sum(expected.values()) / 5, abs=1e-5)


def test_training_lowers_the_error(arguments, sounds, tmp_path):
    flags = ("--max_train_steps=100", "--learning_rate=5e-3", "--validation_manifest", sounds)
    assert main(arguments(tmp_path, *flags, "--validation_steps=20", "--checkpointing_steps=1000")) == 0
    log = read_log(tmp_path)
    errors = [entry["error"] for entry in log if "error" in entry]
    validation = [entry["validation_error"] for entry in log if "validation_error" in entry]
    assert sum(errors[-10:]) < 0.4 * sum(errors[:10])
    assert validation[-1] < 0.8 * validation[0]


def test_a_decoder_without_attention_stays_so(arguments, tiny_folder, tmp_path):
    flags = ("--max_train_steps=2", "--learning_rate=1e-3", "--adam_weight_decay=0.1", "--no_decoder_attention")
    assert main(arguments(tmp_path, *flags, "--pretrained_model_name_or_path", tiny_folder, config=None)) == 0
    before, after = weights(tiny_folder / "vae"), weights(tmp_path / "model")
    assert not torch.equal(after["decoder.conv_in.weight"], before["decoder.conv_in.weight"])
    for name in ("to_v.weight", "to_v.bias", "to_out.0.weight"):
        name = f"decoder.mid_block.attentions.0.{name}"
        assert before[name].any() and not after[name].any(), name


@torch.no_grad()
@pytest.mark.parametrize("freeze_encoder", [False, True])
def test_a_batch_is_worked_on_in_rows_of_another_length(arguments, tmp_path, freeze_encoder):
    vae = start(arguments(tmp_path))[0].eval()
    mel = torch.randn(4, 1, 32, 64)
    noise = torch.zeros(4, 4, 8, 16)
    whole = Autoencoder(vae, freeze_encoder)(mel, noise, 32)[0]
    halves = Autoencoder(vae, freeze_encoder)(mel, noise, 16)[0]
    pairs = Autoencoder(vae, freeze_encoder)(mel, noise, 64)[0]

    def encode(mel):
        return vae.encode(mel).latent_dist.mean

    first_half = encode(mel)[:, :, :4] if freeze_encoder else encode(mel[:, :, :16])
    pair = torch.cat([*encode(mel[:2])], 1)[None] if freeze_encoder else encode(torch.cat([*mel[:2]], 1)[None])
    assert torch.allclose(whole, vae.decode(encode(mel)).sample, atol=1e-5)
    assert torch.allclose(halves[:, :, :16], vae.decode(first_half).sample, atol=1e-5)
    assert torch.allclose(torch.cat([*pairs[:2]], 1)[None], vae.decode(pair).sample, atol=1e-5)
    assert not torch.allclose(halves, whole, atol=1e-2) and not torch.allclose(pairs, whole, atol=1e-2)


def test_laying_out_keeps_the_order():
    rows = torch.arange(24).view(4, 1, 6, 1)
    assert lay_out(rows, 12)[:, 0, :, 0].tolist() == [list(range(12)), list(range(12, 24))]
    assert torch.equal(lay_out(lay_out(rows, 3), 6), rows)


def test_means_over_no_frames_are_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments(tmp_path, "--pool_frames", "1", "0"))
    assert "--pool_frames has to be at least 1, not 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "factor, rows", [("4", "rows of 128"), ("0.1", "rows of 3.2"), ("0", "rows of 0"), ("-0.5", "rows of -16")]
)
def test_a_batch_that_cannot_be_laid_out_is_refused(arguments, tmp_path, factor, rows):
    with pytest.raises(ValueError, match=f"--length_factors.*as {rows}"):
        start(arguments(tmp_path, "--length_factors", "1", factor))


def test_a_sound_shorter_than_a_crop_is_what_is_laid_out(arguments, tmp_path):
    flags = ("--audio_length_in_s=0.68", "--num_crop_frames=128")
    with pytest.raises(ValueError, match="--length_factors: 2 rows of 68 frames.*as rows of 34"):
        start(arguments(tmp_path, *flags))


def test_a_vae_or_the_vae_of_a_pipeline_can_be_fine_tuned(arguments, tiny_folder, tmp_path):
    flags = ("--max_train_steps=1", "--learning_rate=0", "--pretrained_model_name_or_path")
    assert main(arguments(tmp_path / "first", *flags, tiny_folder, config=None)) == 0
    assert main(arguments(tmp_path / "second", *flags, tmp_path / "first" / "model", config=None)) == 0
    assert_same_weights(weights(tmp_path / "second" / "model"), weights(tiny_folder / "vae"))


def test_a_frozen_encoder_makes_the_same_latents(arguments, tiny_folder, tmp_path):
    flags = ("--max_train_steps=2", "--freeze_encoder", "--use_ema", "--adversarial_weight=0.05")
    flags += ("--pretrained_model_name_or_path", tiny_folder)
    assert main(arguments(tmp_path, *flags, config=None)) == 0
    before, after = weights(tiny_folder / "vae"), weights(tmp_path / "model")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    scales = [
        AutoencoderKL.from_pretrained(each).config.scaling_factor for each in (tiny_folder / "vae", tmp_path / "model")
    ]
    assert scales[0] == scales[1]


def test_an_encoder_without_a_last_convolution_can_be_frozen(arguments, tmp_path):
    vae = build_components()["vae"]
    vae = AutoencoderKL.from_config(vae.config, use_quant_conv=False, use_post_quant_conv=False)
    vae.save_pretrained(tmp_path / "vae")
    flags = ("--max_train_steps=1", "--freeze_encoder", "--pretrained_model_name_or_path", tmp_path / "vae")
    assert main(arguments(tmp_path / "out", *flags, config=None)) == 0
    before, after = weights(tmp_path / "vae"), weights(tmp_path / "out" / "model")
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"decoder"}
    assert "base_model:" not in (tmp_path / "out" / "model" / "README.md").read_text()


def test_a_new_vae_begins_as_a_linear_transform(arguments, sounds, tmp_path):
    flags = ("--max_train_steps=1", "--learning_rate=0", "--validation_manifest", sounds)
    assert main(arguments(tmp_path, *flags, config=None)) == 0
    vae = AutoencoderKL.from_pretrained(tmp_path / "model")
    assert vae_factor(vae) == 4 and sum(p.numel() for p in vae.parameters()) == 2_582_409
    assert vae.config.scaling_factor == pytest.approx(1, abs=0.2)
    # random weights are off by 3
    assert next(entry["validation_error"] for entry in read_log(tmp_path) if "validation_error" in entry) < 0.7


def test_a_new_encoder_may_stay_a_linear_transform(arguments, tmp_path):
    for name, rate in (("first", 0), ("second", 1e-3)):
        flags = ("--max_train_steps=2", "--freeze_encoder", f"--learning_rate={rate}")
        assert main(arguments(tmp_path / name, *flags, config=None)) == 0
    first, second = (weights(tmp_path / name / "model") for name in ("first", "second"))
    changed = {name.split(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert changed == {"decoder", "post_quant_conv"}
    scales = [AutoencoderKL.from_pretrained(tmp_path / n / "model").config.scaling_factor for n in ("first", "second")]
    assert scales[0] == scales[1] == pytest.approx(1, abs=0.2)


def test_a_vae_can_be_one_that_the_converter_writes(arguments, tmp_path):
    (tmp_path / "vae.json").write_text('{"norm_num_groups": 32, "mid_block_add_attention": true}')
    vae, _ = start(arguments(tmp_path, config=tmp_path / "vae.json"))
    assert vae_original_config(vae.config)["ddconfig"]["ch_mult"] == [1, 2, 4]


# Crops


def test_crops_are_parts_of_the_spectrogram_that_hold_sound(sounds):
    clips = ClipDataset(read_manifest(sounds), sampling_rate=16000, num_samples=16000)
    crops = MelDataset(clips, 32)
    starts = set()
    for epoch in range(30):
        mel = log_mel_spectrogram(clips[(epoch, 1)]["waveform"][None])[0]  # 0.5 s of sound, then zeros
        item = crops[(epoch, 1)]
        start = next(i for i in range(len(mel) - 31) if torch.equal(mel[i : i + 32], item["mel"]))
        assert start <= 50 - 16 and item["num_frames"] == min(50 - start, 32)
        assert torch.equal(item["mel"], crops[(epoch, 1)]["mel"])
        starts.add(start)
    assert len(starts) > 10 and min(starts) < 5 and max(starts) > 29


# Exactness


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(arguments, tmp_path):
    flags = ("--max_train_steps=5", "--adversarial_weight=0.1", "--adversarial_start_step=1", "--use_ema")
    flags += ("--gradient_accumulation_steps=2", "--mixed_precision=bf16")
    assert main(arguments(tmp_path / "unbroken", *flags)) == 0
    assert main(arguments(tmp_path / "broken", *flags)) == 0
    for name in ("checkpoint-4", "checkpoint-5", "model"):  # as if it had been killed in step 4
        shutil.rmtree(tmp_path / "broken" / name)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path / "broken", *flags, "--resume_from_checkpoint=latest")) == 0
    assert read_log(tmp_path / "broken") == read_log(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "broken" / "model"), weights(tmp_path / "unbroken" / "model"))
    for name in ("model.safetensors", "model_1.safetensors"):  # the VAE without EMA, the discriminator
        first, second = (load_file(tmp_path / run / "checkpoint-5" / name) for run in ("broken", "unbroken"))
        assert_same_weights(first, second)


def test_sigterm_to_the_whole_group_writes_a_checkpoint_and_leaves_cleanly(arguments, tmp_path):
    flags = arguments(tmp_path, "--max_train_steps=100000", "--checkpointing_steps=100000", "--num_workers=1")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train_autoencoder", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 0, error
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{len(read_log(tmp_path))}"]
    assert "resume with --resume_from_checkpoint latest" in error and not (tmp_path / "model").exists()


# Objective


def test_the_discriminator_begins_at_its_step_and_changes_the_vae(arguments, tmp_path):
    flags = ("--max_train_steps=3", "--checkpointing_steps=1")
    assert main(arguments(tmp_path / "without", *flags)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    adversarial = ("--adversarial_weight=0.5", "--adversarial_start_step=1")
    assert main(arguments(tmp_path / "with", *flags, *adversarial)) == 0
    assert ["adversarial_loss" in entry for entry in read_log(tmp_path / "with")] == [False, True, True]

    def checkpoint(run, step, name="model.safetensors"):
        return load_file(tmp_path / run / f"checkpoint-{step}" / name)

    assert_same_weights(checkpoint("with", 1), checkpoint("without", 1))
    for first, second in (
        (checkpoint("with", 3), checkpoint("without", 3)),
        (checkpoint("with", 3, "model_1.safetensors"), checkpoint("with", 1, "model_1.safetensors")),
    ):
        assert all(not torch.equal(tensor, second[name]) for name, tensor in first.items() if "weight" in name)


def test_a_patch_discriminator_learns_to_tell_noise_from_its_blurred_copy():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.99))
    for _ in range(30):
        real = torch.randn(4, 1, 32, 64)
        fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
        logits = discriminator(torch.cat([real, fake]))
        assert logits.shape == (8, 1, 4, 8)
        loss = torch.relu(1 - logits[:4]).mean() + torch.relu(1 + logits[4:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits[:4].min() > 0 > logits[4:].max()


# Errors


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"in_channels": 2}', "`in_channels` and `out_channels` 1, not 2 and 1"),
        ('{"latent_chanels": 4}', "AutoencoderKL has no argument latent_chanels"),
        ("[8]", "has to hold a JSON object"),
        ("{", "is not JSON"),
        ('{"block_out_channels": [12, 16, 32]}', "num_channels (12) must be divisible by num_groups (8)"),
    ],
)
def test_a_bad_config_is_one_clear_line(config, message, arguments, capsys, tmp_path):
    (tmp_path / "vae.json").write_text(config)
    assert main(arguments(tmp_path / "run", config=tmp_path / "vae.json")) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--num_crop_frames=30",), "--num_crop_frames is 30, which the VAE's 4 does not divide"),
        (("--train_manifest=absent.jsonl",), "absent.jsonl"),
        (("--resume_from_checkpoint=absent",), "absent is no complete checkpoint"),
        (("--freeze_encoder",), "`--freeze_encoder` needs --pretrained_model_name_or_path"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, arguments, capsys, tmp_path):
    assert main(arguments(tmp_path, *flags)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--kl_weight=-1",), "--kl_weight has to be at least 0, not -1.0"),
        (("--num_crop_frames=0",), "--num_crop_frames has to be at least 1, not 0"),
        (("--pretrained_model_name_or_path=vae",), "not both"),
        (("--audio_length_in_s=0.01",), "too short for a spectrogram"),
    ],
)
def test_bad_flags_are_refused_at_once(flags, message, arguments, capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, *flags))
    assert message in capsys.readouterr().err
