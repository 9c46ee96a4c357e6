import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState
from hub import Hub
from test_train import assert_same_weights, losses, read_log, weights

from pipeline_tango import TangoPipeline
from training.train_dpo import main


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]
LORA = "lora/pytorch_lora_weights.safetensors"
LN2 = pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Manifest of four pairs of short real sounds, two of them of one prompt, and one of pairs that are copies."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("rain", "thunder", "birds", "cow"):
        waveform, sampling_rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=8000)
        soundfile.write(folder / f"{name}.wav", waveform, sampling_rate)
        shutil.copy(folder / f"{name}.wav", folder / f"{name}-copy.wav")
    lines, copies = [], []
    for prompt, chosen, rejected in (
        ("rain", "rain", "birds"),
        ("rain", "thunder", "birds"),
        ("a cow", "cow", "rain"),
        ("birds sing", "birds", "thunder"),
    ):
        lines.append({"prompt": prompt, "chosen": f"{chosen}.wav", "rejected": f"{rejected}.wav", "score": 1.5})
        copies.append({"prompt": prompt, "chosen": f"{chosen}.wav", "rejected": f"{chosen}-copy.wav"})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "copies.jsonl").write_text("\n".join(map(json.dumps, copies)))
    return folder / "pairs.jsonl"


@pytest.fixture
def arguments(short_folder, pairs):
    def build(output_dir, *more):
        return [
            "--pretrained_model_name_or_path",
            str(short_folder),
            "--train_manifest",
            str(pairs),
            "--output_dir",
            str(output_dir),
            "--train_batch_size=2",
            "--num_workers=0",
            "--learning_rate=1e-3",
            "--lr_scheduler=constant",
            "--checkpointing_steps=2",
            *map(str, more),
        ]

    return build


def test_pairs_leave_a_lora_that_ranks_them_a_card_and_sounds(arguments, pairs, short_folder, tmp_path):
    flags = ("--max_train_steps=12", "--lora_rank=4", "--learning_rate=3e-3", "--validation_manifest", pairs)
    flags += ("--validation_steps=6", "--num_validation_timesteps=4", "--validation_prompts", "rain")
    flags += ("--num_validation_inference_steps=1", "--checkpoints_total_limit=1", "--checkpointing_steps=100")
    assert main(arguments(tmp_path, *flags)) == 0
    log = read_log(tmp_path)
    first = log[0]
    assert first["loss"] == LN2 and first["ranked_rightly"] == 0.5  # the model is still the reference
    assert first["chosen_change"] == first["rejected_change"] == 0 and first["grad_norm"] > 1
    before, after = (entry for entry in log if "validation_loss" in entry)
    assert after["validation_loss"] < before["validation_loss"] < math.log(2)
    assert after["validation_ranked_rightly"] == 1
    assert after["validation_chosen_change"] < after["validation_rejected_change"]
    pipe = TangoPipeline.from_pretrained(short_folder)
    plain = pipe("rain", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).audios
    for name in ("lora", "best"):
        pipe.load_lora_weights(tmp_path / name)
        tuned = pipe("rain", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).audios
        assert np.abs(plain - tuned).max() > 1e-4
        pipe.unload_lora_weights()
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "Aligned with preferences" in card and "- dpo" in card and "--beta 2000.0" in card
    assert "held-out pairs ranked rightly: 1.000 of 4" in card and (tmp_path / "lora" / "samples" / "1.wav").exists()


def test_both_sounds_of_a_pair_get_the_same_noise_timestep_and_text(arguments, pairs, short_folder, tmp_path):
    """Of two copies of a sound neither can be preferred: every loss is ln 2 and no weight moves, whatever is drawn."""
    copies = ("--train_manifest", pairs.parent / "copies.jsonl", "--proportion_empty_prompts=0.5")
    flags = ("--max_train_steps=3", "--adam_weight_decay=0", "--adam_epsilon=1", *copies)
    assert main(arguments(tmp_path, *flags)) == 0
    assert losses(tmp_path) == [LN2] * 3
    assert all(entry["grad_norm"] < 1e-2 for entry in read_log(tmp_path) if "loss" in entry)
    before = weights(short_folder, "unet/diffusion_pytorch_model.safetensors")
    assert_same_weights(weights(tmp_path), before, 1e-6)


@pytest.mark.parametrize(
    "kind",
    [
        ("--lora_rank=2", "--lora_dropout=0.5", "--num_supervised_steps=2"),
        ("--use_ema", "--gradient_accumulation_steps=2", "--num_supervised_steps=3", "--chosen_weight=0.1"),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(arguments, tmp_path, kind):
    flags = ("--max_train_steps=5", "--proportion_empty_prompts=0.3", "--cache_dir", tmp_path / "cache", *kind)
    assert main(arguments(tmp_path / "unbroken", *flags)) == 0
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for name in ("checkpoint-4", "checkpoint-5"):  # as if it had been killed in step 4
        shutil.rmtree(tmp_path / "broken" / name)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path / "broken", *flags, "--resume_from_checkpoint=latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    name = LORA if "--lora_rank=2" in kind else "model/unet/diffusion_pytorch_model.safetensors"
    assert_same_weights(weights(tmp_path / "broken", name), weights(tmp_path / "unbroken", name))
    steps = [entry for entry in read_log(tmp_path / "broken") if "loss" in entry]
    num_supervised = sum("ranked_rightly" not in entry for entry in steps)
    assert f"--num_supervised_steps={num_supervised}" in kind


def test_the_cache_gives_the_same_training(arguments, pairs, tmp_path):
    flags = ("--max_train_steps=3", "--proportion_empty_prompts=0.3", "--lora_rank=2", "--adam_epsilon=1e-4")
    flags += ("--validation_manifest", pairs, "--num_validation_timesteps=2", "--beta=20")
    assert main(arguments(tmp_path / "plain", *flags)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(tmp_path / "cached", *flags, "--cache_dir", tmp_path / "cache")) == 0
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "cached"), rtol=1e-4)
    ends = [read_log(tmp_path / run)[-1]["validation_loss"] for run in ("plain", "cached")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 7  # a sound that two pairs of a prompt share is one file


def test_two_processes_train_as_one_does_and_the_result_is_pushed(arguments, pairs, tmp_path):
    common = ("--max_train_steps=3", "--adam_epsilon=1e-4", "--lora_rank=2", "--num_supervised_steps=1", "--beta=20")
    common += ("--validation_manifest", pairs, "--num_validation_timesteps=2")
    assert main(arguments(tmp_path / "one", *common)) == 0
    flags = arguments(tmp_path / "two", *common, "--train_batch_size=1", "--push_to_hub", "--hub_model_id=alice/rain")
    with Hub() as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
            + ["-m", "training.train_dpo", *flags],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert "2 process(es)" in result.stderr
        assert {"README.md", "pytorch_lora_weights.safetensors"} <= set(hub.repos["alice/rain"].files)
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-4)
    assert_same_weights(weights(tmp_path / "one", LORA), weights(tmp_path / "two", LORA), 1e-4)
    ends = [read_log(tmp_path / run)[-1]["validation_loss"] for run in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ("--reference_dtype=bfloat16", "--timestep_range", "100", "900", "--clip_progress=0.1"),
        ("--lora_rank=2", "--use_dora", "--gradient_checkpointing", "--mixed_precision=bf16", "--chosen_weight=0.5")
        + ("--snr_gamma=5",),
    ],
)
def test_variants_run_and_give_finite_losses(arguments, tmp_path, flags):
    assert main(arguments(tmp_path, "--max_train_steps=2", *flags)) == 0
    first, second = losses(tmp_path)
    assert np.isfinite(second)
    if "--chosen_weight=0.5" in flags:  # beside ln 2, the error of the chosen sounds
        assert first > math.log(2) + 0.01
    else:  # the copy in bfloat16 is not quite the model
        assert abs(first - math.log(2)) < 1 and first != LN2


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--train_manifest", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--chosen_column=winner",), "no column 'winner'"),
        (("--timestep_range", "900", "100"), "`--timestep_range` has to be FIRST < END <= 1000, not 900 100"),
        (("--pretrained_model_name_or_path", "nowhere/at/all"), "nowhere"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, tmp_path, capsys, flags, message):
    assert main(arguments(tmp_path, "--max_train_steps=1", *flags)) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "model").exists()


def test_a_student_of_few_steps_is_refused(arguments, short_folder, tmp_path, capsys):
    folder = shutil.copytree(short_folder, tmp_path / "student")
    index = json.loads((folder / "model_index.json").read_text())
    student = {"scheduler": "lcm", "scheduler_options": {}, "num_inference_steps": 4, "guidance_scale": 3.0}
    (folder / "model_index.json").write_text(json.dumps(index | {"student": student}))
    assert main(arguments(tmp_path / "out", "--pretrained_model_name_or_path", folder)) == 1
    assert "is a student of few steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--beta=0",), "--beta has to be positive"),
        (("--clip_progress=1",), "--clip_progress has to be between 0 and 1"),
        (("--lora_rank=2", "--reference_dtype=bfloat16"), "--reference_dtype"),
        (("--lora_rank=2", "--use_ema"), "--use_ema"),
        (("--use_dora",), "--lora_rank"),
    ],
)
def test_wrong_flags_are_named(arguments, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path / "out", *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
