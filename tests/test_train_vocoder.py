import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from conftest import build_components
from safetensors.torch import load_file
from transformers import SpeechT5HifiGan

from pipeline_tango import log_mel_spectrogram
from training.data import Clip
from training.train_vocoder import NUM_CONTEXT_FRAMES, Generator, Segments, inputs_of, main, reconstruct


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Manifest of three real clips of 0.5 s."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for name in ("rain", "birds", "cow"):
        waveform, sampling_rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=8000)
        soundfile.write(folder / f"{name}.wav", waveform, sampling_rate)
        lines.append(json.dumps({"location": f"{name}.wav", "captions": name}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "one.jsonl").write_text(lines[0])
    (folder / "config.json").write_text('{"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}')
    return folder


@pytest.fixture
def arguments(sounds):
    def build(output_dir, *more, manifest="data.jsonl"):
        return [
            f"--train_manifest={sounds / manifest}",
            f"--output_dir={output_dir}",
            f"--config={sounds / 'config.json'}",
            "--upsample_initial_channel=32",
            "--num_noise_channels=8",
            "--adversarial_weight=1",
            "--discriminator_channels=2",
            "--stft_windows",
            "512",
            "128",
            "--num_segment_frames=16",
            "--train_batch_size=2",
            "--num_workers=0",
            *map(str, more),
        ]

    return build


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(Path(folder) / "model" / "model.safetensors")


def test_two_steps_leave_a_vocoder_with_a_card_sounds_and_a_checkpoint(arguments, sounds, tmp_path):
    flags = ("--max_train_steps=2", "--validation_manifest", sounds / "one.jsonl", "--periods", 2, 3)
    assert main(arguments(tmp_path, *flags)) == 0
    vocoder, report = SpeechT5HifiGan.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert vocoder(torch.zeros(2, 13, 64 + 8)).shape == (2, 13 * 160 + 32)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "held-out mel error" in card and "--max_train_steps 2" in card
    assert [entry["step"] for entry in read_log(tmp_path) if "discriminator_loss" in entry] == [1, 2]
    names = sorted(path.name for path in (tmp_path / "samples" / "step-2").iterdir())
    assert names == ["0-recording.png", "0-recording.wav", "0.png", "0.wav"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".*"))


def test_training_on_one_clip_lowers_its_error(arguments, sounds, tmp_path):
    flags = ("--max_train_steps=60", "--learning_rate=2e-3", "--ema_decay=0.9", "--validation_steps=5")
    flags += ("--mel_weight=7.5", "--feature_weight=1", "--spectrogram_weight=0", "--num_noise_channels=0")
    flags += ("--max_grad_norm=100",)
    flags += ("--validation_manifest", sounds / "one.jsonl", "--num_validation_sounds=0")
    assert main(arguments(tmp_path, *flags, manifest="one.jsonl")) == 0
    errors = [entry["validation_mel_error"] for entry in read_log(tmp_path) if "validation_mel_error" in entry]
    assert errors[-1] < 0.5 * errors[0]


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(arguments, tmp_path):
    flags = ("--max_train_steps=4", "--checkpointing_steps=2")
    assert main(arguments(tmp_path / "unbroken", *flags)) == 0
    assert main(arguments(tmp_path / "broken", *flags)) == 0
    for name in ("checkpoint-4", "model"):  # as if it had been killed in step 4
        subprocess.run(["rm", "-r", tmp_path / "broken" / name], check=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path / "broken", *flags, "--resume_from_checkpoint=latest")) == 0
    assert read_log(tmp_path / "broken") == read_log(tmp_path / "unbroken")
    first, second = weights(tmp_path / "broken"), weights(tmp_path / "unbroken")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_sigterm_writes_a_checkpoint_and_leaves_cleanly(arguments, tmp_path, caplog):
    def stop_when_training():
        while not ((tmp_path / "log.jsonl").exists() and (tmp_path / "log.jsonl").stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    caplog.set_level("INFO")
    thread = threading.Thread(target=stop_when_training, daemon=True)
    thread.start()
    assert main(arguments(tmp_path, "--max_train_steps=1000")) == 0
    assert "resume with --resume_from_checkpoint latest" in caplog.text
    [checkpoint] = tmp_path.glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["step"]
    assert step == read_log(tmp_path)[-1]["step"] < 1000


def test_the_fast_generator_is_the_vocoder_with_its_extra_samples_cut():
    vocoder = build_components()["vocoder"]
    mel = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0)) - 4
    made, _ = Generator(vocoder)(mel[..., :40], mel[..., 40:])
    assert made.shape == (2, 3200)
    torch.testing.assert_close(made, vocoder(mel)[:, :3200], atol=1e-4, rtol=1e-4)


def test_a_run_that_could_learn_nothing_is_refused(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, "--adversarial_weight=0", "--spectrogram_weight=0"))
    assert "--mel_weight" in capsys.readouterr().err


def test_a_segment_belongs_to_its_mel_frames_as_in_the_whole_sound(sounds):
    dataset = Segments([Clip(str(sounds / "rain.wav"), ("rain",))], 16, seed=0)
    [whole] = dataset.waveforms
    assert len(whole) == 8000 + 2 * NUM_CONTEXT_FRAMES * 160 + 1280
    dataset.waveforms = [whole[: (16 + 2 * NUM_CONTEXT_FRAMES) * 160]]  # the only segment left is the sound's start
    item = dataset[0, 0]
    batch = {name: [value] for name, value in item.items()}
    mel, noise, waveform, _ = inputs_of(batch, None, "cpu", seed=0, num_noise_channels=50)
    assert mel.shape == (2, 16, 64) and waveform.shape == (1, 2560)
    start = whole[NUM_CONTEXT_FRAMES * 160 :][:8000]
    gain = waveform.abs().max() / start[:2560].abs().max()
    assert 1 <= gain <= 10
    torch.testing.assert_close(waveform[0], gain * start[:2560])
    torch.testing.assert_close(mel, log_mel_spectrogram(gain * start[None])[:, :16].expand(2, -1, -1))
    assert noise.shape == (2, 16, 50)
    assert noise.std(dim=(1, 2)).tolist() == pytest.approx([1, 1], rel=0.1)
    assert abs(float((noise[0] * noise[1]).mean())) < 0.15  # two draws, not one


def test_segments_depend_on_epoch_and_index_only(sounds):
    clips = [Clip(str(sounds / f"{name}.wav"), (name,)) for name in ("rain", "cow")]
    first, second = (Segments(clips, 16, seed=0) for _ in range(2))
    drawn = [second[key]["waveform"] for key in ((1, 1), (0, 1), (0, 0))]
    assert torch.equal(first[0, 0]["waveform"], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_reconstructed_mel_spectrograms_are_those_of_the_vae(arguments, sounds, tmp_path):
    vae = build_components()["vae"]
    mel = torch.randn(1, 13, 64)  # not a multiple of the VAE's factor
    assert reconstruct(vae, mel, [torch.Generator().manual_seed(0)]).shape == mel.shape
    vae.save_pretrained(tmp_path / "vae")
    flags = ("--max_train_steps=1", "--vae", tmp_path / "vae", "--validation_manifest", sounds / "one.jsonl")
    assert main(arguments(tmp_path / "run", *flags, "--proportion_reconstructed=1")) == 0
    assert read_log(tmp_path / "run")[-1]["validation_reconstructed_mel_error"] > 0
    assert (tmp_path / "run" / "samples" / "step-1" / "0-reconstructed.wav").exists()


def test_a_decoder_trained_along_keeps_its_encoder_and_learns(arguments, sounds, tmp_path):
    build_components()["vae"].save_pretrained(tmp_path / "vae")
    flags = ("--vae", tmp_path / "vae", "--train_decoder", "--validation_manifest", sounds / "one.jsonl")
    flags += ("--learning_rate=5e-3", "--ema_decay=0.5", "--max_train_steps=30", "--decoder_weight=100")
    assert main(arguments(tmp_path / "run", *flags, "--checkpointing_steps=29", manifest="one.jsonl")) == 0
    before, after = (
        load_file(path / "diffusion_pytorch_model.safetensors")
        for path in (tmp_path / "vae", tmp_path / "run" / "vae")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(("decoder.", "post_quant_conv."))}
    losses = [entry["decoder_loss"] for entry in read_log(tmp_path / "run") if "decoder_loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    resumed = arguments(
        tmp_path / "run", *flags, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-29", manifest="one.jsonl"
    )
    assert main(resumed) == 0
    again = load_file(tmp_path / "run" / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_a_run_may_start_from_both_nets_of_an_earlier_one(arguments, sounds, tmp_path):
    assert main(arguments(tmp_path / "first", "--max_train_steps=1", "--ema_decay=0")) == 0
    opponents = tmp_path / "first" / "checkpoint-1" / "model_1.safetensors"
    flags = [
        flag
        for flag in arguments(tmp_path / "second", "--max_train_steps=1", "--discriminator_learning_rate=0")
        if not flag.startswith(("--config", "--upsample_initial_channel"))
    ]
    flags += ["--pretrained_model_name_or_path", str(tmp_path / "first" / "model")]
    assert main([*flags, "--discriminators", str(opponents)]) == 0
    before, after = load_file(opponents), load_file(tmp_path / "second" / "checkpoint-1" / "model_1.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_manifest=missing.jsonl"], "missing.jsonl"),
        (["--discriminators={config}"], "config.json does not fit"),
        (["--resume_from_checkpoint=nowhere"], "nowhere is no complete checkpoint"),
        (["--config={config}"], "have to be (16000, 72, 160, False), not (16000, 72, 80, False)"),
    ],
)
def test_bad_input_is_one_clear_line(flags, message, arguments, tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"upsample_rates": [5, 4, 2, 2, 1], "upsample_kernel_sizes": [16, 16, 8, 4, 3]}')
    assert main([*arguments(tmp_path / "run"), *(flag.format(config=config) for flag in flags)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize(
    "flag",
    [
        "--stft_windows=4096",
        "--train_batch_size=0",
        "--proportion_reconstructed=2",
        "--train_decoder",
        "--num_noise_channels=-1",
    ],
)
def test_bad_flags_are_refused_by_name(flag, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path, flag))
    assert flag.split("=")[0] in capsys.readouterr().err
