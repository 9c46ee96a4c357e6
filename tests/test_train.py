import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from hub import Hub
from safetensors.torch import load_file

from pipeline_tango import SCHEDULERS, TangoPipeline
from training.train import main


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Manifest of five short real clips, all longer than the model's 0.32 s, one with two captions."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for name in ("rain", "thunder", "birds", "cow", "bell"):
        source = ROOT / "examples" / "sounds" / f"{'crossing_bell' if name == 'bell' else name}.flac"
        waveform, sampling_rate = soundfile.read(source, frames=12000)
        soundfile.write(folder / f"{name}.wav", waveform, sampling_rate)
        captions = [name, f"the sound of a {name}"] if name == "cow" else name
        lines.append(json.dumps({"location": f"{name}.wav", "captions": captions}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


@pytest.fixture
def arguments(short_folder, sounds):
    def build(output_dir, *more):
        return [
            "--pretrained_model_name_or_path",
            str(short_folder),
            "--train_manifest",
            str(sounds),
            "--output_dir",
            str(output_dir),
            "--train_batch_size=2",
            "--num_workers=0",
            "--learning_rate=1e-3",
            "--checkpointing_steps=2",
            *map(str, more),
        ]

    return build


def losses(folder):
    return [entry["loss"] for entry in read_log(folder) if "loss" in entry]


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights(folder, name="model/unet/diffusion_pytorch_model.safetensors"):
    return load_file(Path(folder) / name)


def assert_same_weights(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).abs().max() <= tolerance, name


def run(arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "training.train", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


# What a run leaves


def test_two_steps_leave_a_pipeline_a_log_and_checkpoints(arguments, sounds, short_folder, tmp_path):
    flags = ("--max_train_steps=3", "--validation_manifest", sounds, "--validation_prompts", "rain", "thunder")
    flags += ("--num_validation_timesteps=2", "--num_validation_inference_steps=2", "--validation_steps=2")
    assert main(arguments(tmp_path, *flags, "--checkpoints_total_limit=1")) == 0
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert [entry["step"] for entry in log if "validation_loss" in entry] == [2, 3]
    assert log[0]["lr"] == 1e-3 and log[0]["grad_norm"] > 0
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not list(tmp_path.glob(".*"))
    assert sorted(path.name for path in (tmp_path / "samples" / "step-2").iterdir()) == [
        "1.png",
        "1.wav",
        "2.png",
        "2.wav",
    ]
    pipe = TangoPipeline.from_pretrained(tmp_path / "model")
    assert pipe("rain", num_inference_steps=1).audios.shape == (1, 5120)
    assert TangoPipeline.from_pretrained(tmp_path / "best").config.default_audio_length_in_s == 0.32
    card = (tmp_path / "model" / "README.md").read_text()
    assert "best validation loss" in card and "--learning_rate 0.001" in card and "[thunder](samples/2.wav)" in card
    assert (tmp_path / "model" / "samples" / "2.wav").exists()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(log)
    before = weights(short_folder, "unet/diffusion_pytorch_model.safetensors")
    after = weights(tmp_path)
    assert all((after[name] - before[name]).abs().max() > 0 for name in ("conv_in.weight", "conv_out.weight"))
    for frozen in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert_same_weights(weights(tmp_path / "model", frozen), weights(short_folder, frozen))


def test_a_pipeline_keeps_its_own_scheduler(arguments, short_folder, tmp_path):
    pipe = TangoPipeline.from_pretrained(short_folder)
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config, use_karras_sigmas=True)
    pipe.save_pretrained(tmp_path / "base")
    flags = ["--max_train_steps=1", f"--pretrained_model_name_or_path={tmp_path / 'base'}"]
    assert main(arguments(tmp_path / "kept", *flags)) == 0
    scheduler = TangoPipeline.from_pretrained(tmp_path / "kept" / "model").scheduler
    assert type(scheduler) is SCHEDULERS["dpm++"] and scheduler.config.use_karras_sigmas
    assert main(arguments(tmp_path / "rescaled", *flags, "--rescale_betas_zero_snr")) == 0
    assert type(TangoPipeline.from_pretrained(tmp_path / "rescaled" / "model").scheduler) is SCHEDULERS["ddpm"]


def test_training_lowers_the_validation_loss(arguments, sounds, tmp_path):
    flags = ("--max_train_steps=50", "--lr_scheduler=constant", "--learning_rate=5e-3", "--checkpointing_steps=1000")
    assert main(arguments(tmp_path, *flags, "--validation_manifest", sounds, "--validation_steps=10")) == 0
    validation = [entry["validation_loss"] for entry in read_log(tmp_path) if "validation_loss" in entry]
    assert min(validation[-3:]) < 0.97 * validation[0]


# Exactness


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(arguments, tmp_path):
    flags = (
        "--augment=pressure",
        "--num_mixes=1",
        "--use_ema",
        "--train_text_encoder",
        "--proportion_empty_prompts=0.3",
    )
    flags += ("--snr_gamma=5", "--gradient_accumulation_steps=2", "--max_train_steps=5")
    assert main(arguments(tmp_path / "unbroken", *flags)) == 0
    assert main(arguments(tmp_path / "broken", *flags)) == 0
    for name in ("checkpoint-4", "checkpoint-5"):  # as if it had been killed in step 4
        subprocess.run(["rm", "-r", tmp_path / "broken" / name], check=True)
    with open(tmp_path / "broken" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path / "broken", *flags, "--resume_from_checkpoint=latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert_same_weights(weights(tmp_path / "broken"), weights(tmp_path / "unbroken"))
    text_encoder = "model/text_encoder/model.safetensors"
    assert_same_weights(weights(tmp_path / "broken", text_encoder), weights(tmp_path / "unbroken", text_encoder))
    states = [
        torch.load(tmp_path / run / "checkpoint-5" / "optimizer.bin", weights_only=True)["state"]
        for run in ("broken", "unbroken")
    ]
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in state.items())


def test_a_run_killed_at_any_moment_resumes_to_the_same_end(arguments, tmp_path):
    flags = ("--max_train_steps=12", "--lora_rank=2", "--lora_dropout=0.5", "--checkpointing_steps=1")
    assert main(arguments(tmp_path / "unbroken", *flags)) == 0
    resume = arguments(tmp_path / "killed", *flags, "--resume_from_checkpoint=latest")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train", *resume],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-3").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "lora").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(resume) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    name = "lora/pytorch_lora_weights.safetensors"
    assert_same_weights(weights(tmp_path / "killed", name), weights(tmp_path / "unbroken", name))


def test_sigterm_writes_a_checkpoint_and_leaves_cleanly(arguments, tmp_path):
    flags = arguments(tmp_path, "--max_train_steps=100000", "--checkpointing_steps=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "training.train", *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (tmp_path / "log.jsonl").exists() and len((tmp_path / "log.jsonl").read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "resume with --resume_from_checkpoint latest" in stderr
    [checkpoint] = tmp_path.glob("checkpoint-*")
    assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] == len(losses(tmp_path))


def test_a_checkpoint_that_is_not_complete_is_never_picked_up(arguments, tmp_path):
    assert main(arguments(tmp_path, "--max_train_steps=2")) == 0
    broken = tmp_path / "checkpoint-9"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    leftover = tmp_path / ".checkpoint-7.partial"
    leftover.mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path, "--max_train_steps=4", "--resume_from_checkpoint=latest")) == 0
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]
    assert not leftover.exists()


def test_a_run_goes_on_among_folders_of_the_user_and_past_a_damaged_checkpoint(arguments, tmp_path):
    """To the same end as the unbroken run, and with all that the user had put there."""
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    assert main(arguments(whole, "--max_train_steps=4")) == 0
    shutil.copytree(whole, folder)
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")
    (folder / "checkpoint-3" / "trainer_state.json").write_text('{"step": 3, "sett')
    mine = [folder / name / "notes.txt" for name in ("checkpoint-2.bak", "checkpoint-2-keep-me", "model", "samples")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
    mine += [folder / "checkpoint-007", folder / "checkpoint-4"]
    for path in mine:
        path.write_text("mine")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    AcceleratorState._reset_state(reset_partial_state=True)
    flags = ("--max_train_steps=4", "--resume_from_checkpoint=latest", "--checkpoints_total_limit=1")
    assert main(arguments(folder, *flags)) == 0
    assert_same_weights(weights(folder), weights(whole))
    for name in ("log.jsonl", "log.txt"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    mine[-1] = folder / "checkpoint-4.bak"
    assert all(path.read_text() == "mine" for path in mine)
    assert (folder / "checkpoint-4" / "trainer_state.json").is_file()


def test_an_earlier_runs_checkpoints_are_never_written_over(arguments, tmp_path, capsys):
    assert main(arguments(tmp_path, "--max_train_steps=2")) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(arguments(tmp_path, "--max_train_steps=1")) == 1
    assert "holds the checkpoints of another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_accumulation_changes_nothing_but_rounding(arguments, tmp_path):
    flags = ("--max_train_steps=3", "--adam_epsilon=1e-4")
    assert main(arguments(tmp_path / "plain", *flags)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    flags += ("--train_batch_size=1", "--gradient_accumulation_steps=2")
    assert main(arguments(tmp_path / "accumulated", *flags)) == 0
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "accumulated"), rtol=1e-4)
    assert_same_weights(weights(tmp_path / "plain"), weights(tmp_path / "accumulated"), 1e-4)
    rates = [[entry["lr"] for entry in read_log(tmp_path / run)] for run in ("plain", "accumulated")]
    assert rates[0] == rates[1]  # the schedule counts optimizer steps


def test_two_processes_train_as_one_does_and_resume_exactly(arguments, sounds, tmp_path):
    common = ("--max_train_steps=3", "--adam_epsilon=1e-4", "--validation_manifest", sounds)
    common += ("--num_validation_timesteps=2",)

    def launch(output_dir, *more):
        flags = arguments(output_dir, *common, "--train_batch_size=1", *more)
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
            + ["-m", "training.train", *flags],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "2 process(es)" in result.stderr

    assert main(arguments(tmp_path / "one", *common)) == 0
    launch(tmp_path / "two")
    validation = [read_log(tmp_path / run)[-1]["validation_loss"] for run in ("one", "two")]
    np.testing.assert_allclose(*validation, rtol=1e-4)  # five clips: one process has two, the other three
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-4)

    expected, expected_weights = losses(tmp_path / "two"), weights(tmp_path / "two")
    subprocess.run(["rm", "-r", tmp_path / "two" / "checkpoint-3", tmp_path / "two" / "model"], check=True)
    launch(tmp_path / "two", "--resume_from_checkpoint=latest")
    assert losses(tmp_path / "two") == expected
    assert_same_weights(weights(tmp_path / "two"), expected_weights)


# Cache


@pytest.mark.parametrize("trained", [(), ("--train_text_encoder",)])
def test_the_cache_gives_the_same_training_and_is_filled_once(arguments, tmp_path, trained):
    flags = ("--max_train_steps=4", "--crop=head", "--proportion_empty_prompts=0.3", "--adam_epsilon=1e-4", *trained)
    assert main(arguments(tmp_path / "plain", *flags)) == 0
    flags += ("--cache_dir", tmp_path / "cache")
    assert main(arguments(tmp_path / "cached", *flags)) == 0
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "cached"), rtol=1e-4)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(files) == 5
    damaged = next(iter(files))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert main(arguments(tmp_path / "again", *flags)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")
    written = [path for path in files if path.stat().st_mtime_ns != files[path]]
    assert written == [damaged]


# What trains


def test_lora_trains_a_file_that_the_pipeline_loads(arguments, short_folder, tmp_path):
    for name, flags in (("lora", ()), ("dora", ("--use_dora",))):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(arguments(tmp_path / name, "--max_train_steps=3", "--lora_rank=2", "--lora_alpha=4", *flags)) == 0
        pipe = TangoPipeline.from_pretrained(short_folder)
        plain = pipe("rain", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).audios
        pipe.load_lora_weights(tmp_path / name / "lora")
        [config] = pipe.unet.peft_config.values()
        assert (config.r, config.lora_alpha, config.use_dora) == (2, 4, name == "dora")
        tuned = pipe("rain", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).audios
        assert np.abs(plain - tuned).max() > 1e-4
        trained = weights(tmp_path / name / "checkpoint-3", "trained.safetensors")
        assert all("lora" in key for key in trained)


def test_the_moving_average_is_what_is_saved(arguments, tmp_path):
    assert main(arguments(tmp_path, "--max_train_steps=2", "--use_ema", "--ema_decay=0.5")) == 0
    current = weights(tmp_path / "checkpoint-2", "model.safetensors")
    saved = weights(tmp_path)
    assert (current["unet.conv_in.weight"] - saved["conv_in.weight"]).abs().max() > 1e-5


def test_a_training_can_start_from_parts(short_folder, sounds, tmp_path):
    config = tmp_path / "unet.json"
    unet = json.loads((short_folder / "unet" / "config.json").read_text())
    config.write_text(json.dumps(unet | {"in_channels": unet["in_channels"] + 2}))  # two of positions
    parts = [f"--{name}={short_folder}" for name in ("vae", "vocoder", "text_encoder")]
    flags = ["--train_manifest", str(sounds), "--output_dir", str(tmp_path / "out"), "--max_train_steps=1"]
    flags += ["--audio_length_in_s=0.32", "--train_batch_size=2", "--num_workers=0", "--rescale_betas_zero_snr"]
    assert main([f"--unet_config={config}", *parts, *flags]) == 0
    pipe = TangoPipeline.from_pretrained(tmp_path / "out" / "model")
    assert pipe.scheduler.config.rescale_betas_zero_snr and pipe.scheduler.alphas_cumprod[-1] == 0
    assert pipe.config.default_audio_length_in_s == 0.32 and pipe.config.num_position_channels == 2
    assert pipe.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "flags",
    [
        ("--gradient_checkpointing", "--mixed_precision=bf16"),
        ("--prediction_type=epsilon", "--snr_gamma=5", "--noise_offset=0.1", "--input_perturbation=0.1"),
        ("--rescale_betas_zero_snr", "--snr_gamma=5", "--snr_weighting=original"),
        ("--lr_scheduler=cosine_with_restarts", "--lr_num_cycles=2", "--lr_warmup_steps=1"),
        ("--lr_scheduler=polynomial", "--lr_power=2", "--max_grad_norm=0"),
        ("--augment=random", "--prefix=Hear: ", "--report_to=tensorboard", "--fused_adam"),
    ],
)
def test_flags_run_and_give_finite_losses(arguments, tmp_path, flags):
    assert main(arguments(tmp_path, "--max_train_steps=2", *flags)) == 0
    assert np.isfinite(losses(tmp_path)).all()
    scheduler = TangoPipeline.from_pretrained(tmp_path / "model").scheduler.config
    if "--prediction_type=epsilon" in flags:
        assert scheduler.prediction_type == "epsilon"
    if "--rescale_betas_zero_snr" in flags:
        assert scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing == "trailing"
    if "--report_to=tensorboard" in flags:
        assert list((tmp_path / "logs").rglob("events.out*"))


def test_the_result_is_pushed_with_its_card(arguments, short_folder, tmp_path):
    with Hub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        flags = ("--max_train_steps=1", "--lora_rank=2", "--push_to_hub", "--hub_model_id=alice/rain")
        result = run(arguments(tmp_path / "out", *flags), **environment)
        assert result.returncode == 0, result.stderr[-2000:]
        files = hub.repos["alice/rain"].files
        assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(files)
        result = run(arguments(tmp_path / "bad", *flags), **environment | {"HF_TOKEN": "hf_nobody"})
        assert result.returncode == 1 and "error: " in result.stderr
        assert (tmp_path / "bad" / "lora").exists()  # what was trained is not lost


def test_a_frozen_text_encoder_stays_in_eval_mode(arguments, tmp_path, monkeypatch):
    seen = []
    encode_prompt = TangoPipeline.encode_prompt

    def spy(self, *args, **kwargs):
        seen.append(self.text_encoder.training)
        return encode_prompt(self, *args, **kwargs)

    monkeypatch.setattr(TangoPipeline, "encode_prompt", spy)
    assert main(arguments(tmp_path, "--max_train_steps=2")) == 0
    assert seen and not any(seen)


# Wrong on purpose


def test_bad_data_is_named_and_skipped_or_refused(arguments, sounds, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = sounds.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["location"] = str(sounds.parent / row["location"])
    soundfile.write(folder / "silent.wav", np.zeros(8000), 16000)
    (folder / "corrupt.wav").write_bytes(b"RIFF nothing")
    rows += [
        {"location": str(folder / name), "captions": "x"} for name in ("silent.wav", "corrupt.wav", "missing.wav")
    ]
    soundfile.write(folder / "untold.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 16000)
    rows.insert(1, {"location": str(folder / "untold.wav"), "captions": ""})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--train_manifest", folder / "data.jsonl", "--max_train_steps=1")
    assert main(arguments(tmp_path / "skip", *flags)) == 0
    report = json.loads((tmp_path / "skip" / "bad_train_data.json").read_text())
    assert {Path(fault["path"]).name: fault["reason"] for fault in report["faults"]} == {
        "silent.wav": "silent",
        "corrupt.wav": "unreadable",
        "missing.wav": "missing",
        "untold.wav": "no caption",
    }
    assert main(arguments(tmp_path / "refuse", *flags, "--on_bad_data=refuse")) == 1
    error = capsys.readouterr().err
    assert "error: train data: 4 of 9 sounds cannot be used" in error and "missing.wav" in error
    assert not list((tmp_path / "refuse").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--train_manifest", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--pretrained_model_name_or_path", "nowhere/at/all"), "nowhere"),
        (("--resume_from_checkpoint", "nowhere"), "no complete checkpoint"),
        (("--prediction_type=epsilon", "--rescale_betas_zero_snr"), "v_prediction"),
        (("--learning_rate=1e9", "--max_train_steps=30"), "the loss is"),
        (("--use_8bit_adam",), "bitsandbytes"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    assert main(arguments(tmp_path, "--max_train_steps=1", *flags)) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--unet_config=x",), "--pretrained_model_name_or_path"),
        (("--dataset_name=x",), "--train_manifest and --dataset_name"),
        (("--cache_dir=x", "--augment=pressure"), "--cache_dir"),
        (("--use_dora",), "--lora_rank"),
        (("--max_train_steps=0",), "--max_train_steps"),
        (("--proportion_empty_prompts=2",), "--proportion_empty_prompts"),
        (("--snr_gamma=x",), "--snr_gamma"),
    ],
)
def test_wrong_flags_are_named(arguments, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path / "out", *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
