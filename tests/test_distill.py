import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline_tango import SCHEDULERS, TangoPipeline
from training.consistency import noise_levels, student_timesteps
from training.denoiser import prepare_denoiser, trained_parameters
from training.distill import (
    Distillation,
    Teacher,
    Trajectories,
    latent_shape,
    main,
    parse_args,
    read_prompts,
    sample_trajectories,
    teacher_timesteps,
    with_guidance_input,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")
pytest.importorskip("peft")

ROOT = Path(__file__).parents[1]
PROMPTS = ["rain", "thunder", "a dog barks", "birds"]


@pytest.fixture
def arguments(short_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def build(output_dir, *more, prompts=prompts):
        return [
            f"--pretrained_model_name_or_path={short_folder}",
            *([f"--prompts={prompts}"] if prompts else []),
            f"--output_dir={tmp_path / output_dir}",
            f"--cache_dir={tmp_path / 'cache'}",
            "--num_teacher_steps=4",
            "--teacher_scheduler=dpm++",
            "--train_batch_size=2",
            "--num_workers=0",
            "--learning_rate=1e-3",
            "--checkpointing_steps=2",
            *map(str, more),
        ]

    return build


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Manifest of two short recordings."""
    import soundfile

    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for name in ("rain", "cow"):
        waveform, sampling_rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=12000)
        soundfile.write(folder / f"{name}.wav", waveform, sampling_rate)
        lines.append(json.dumps({"location": f"{name}.wav", "captions": name}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def losses(folder):
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


# A run


def test_a_lora_student_of_trajectories_is_one_that_the_pipeline_knows(arguments, short_folder, tmp_path):
    flags = ("--lora_rank=2", "--max_train_steps=2", "--student_steps", 2, 1, "--validation_prompts", "rain")
    assert main(arguments("run", *flags, "--guidance_scale=3", "--lora_dtype=float16")) == 0
    with safe_open(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        student = json.loads(file.metadata()["student"])
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    assert student["num_inference_steps"] == 2 and student["guidance_scale"] == 3
    pipe = TangoPipeline.from_pretrained(short_folder)
    pipe.load_lora_weights(tmp_path / "run" / "lora")
    pipe("rain")
    assert pipe.scheduler.timesteps.tolist() == student["timesteps"]["2"]
    pipe("rain", num_inference_steps=1)
    assert pipe.scheduler.timesteps.tolist() == student["timesteps"]["1"]
    with pytest.raises(ValueError, match="`num_inference_steps` has to be one of 1, 2, which the student was"):
        pipe("rain", num_inference_steps=3)
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "A student of few steps" in card and "few-step" in card
    assert (tmp_path / "run" / "samples" / "step-2" / "1.wav").exists()


def test_a_unet_with_position_channels_has_students(components, arguments, sounds, tmp_path):
    config = components["unet"].config
    unet = UNet2DConditionModel.from_config(config, in_channels=config.in_channels + 2)
    folder = tmp_path / "positioned"
    pipe = TangoPipeline(**components | {"unet": unet}, num_position_channels=2, default_audio_length_in_s=0.32)
    pipe.save_pretrained(folder)
    for name, prompts, more in (
        ("trajectories", tmp_path / "prompts.txt", ("--lora_rank=2", "--student_steps", 1)),
        ("whole", None, ("--train_manifest", sounds, "--objective=consistency", "--num_grid_steps=8")),
    ):
        flags = arguments(name, "--max_train_steps=1", *more, prompts=prompts)
        assert main([f"--pretrained_model_name_or_path={folder}", *flags[1:]]) == 0
    student = TangoPipeline.from_pretrained(tmp_path / "whole" / "model")
    assert student.config.num_position_channels == 2 and student.unet.config.in_channels == config.in_channels + 2


@pytest.mark.parametrize("endpoint", ["clean", "random", "phases"])
def test_a_whole_student_of_sounds_by_consistency(arguments, sounds, tmp_path, endpoint):
    flags = ["--train_manifest", sounds, "--objective=consistency", f"--endpoint={endpoint}", "--max_train_steps=2"]
    flags += ["--num_grid_steps=8", "--validation_manifest", sounds, "--solver=ddim", "--num_phases=2"]
    assert main(arguments("run", *flags, prompts=None)) == 0
    assert len(losses(tmp_path / "run")) == 2
    assert '"validation_loss"' in (tmp_path / "run" / "log.jsonl").read_text()
    pipe = TangoPipeline.from_pretrained(tmp_path / "run" / "model")
    assert type(pipe.scheduler) is SCHEDULERS["lcm" if endpoint == "clean" else "tcd"]
    assert pipe.scheduler.config.original_inference_steps == 8 and pipe.student["num_inference_steps"] == 4
    assert np.isfinite(pipe("rain", num_inference_steps=2).audios).all()


def test_a_range_of_guidance_is_an_input_of_the_student(arguments, sounds, tmp_path):
    flags = ["--train_manifest", sounds, "--objective=consistency", "--guidance_scale", 2, 6, "--max_train_steps=1"]
    assert main(arguments("run", *flags, prompts=None)) == 0
    pipe = TangoPipeline.from_pretrained(tmp_path / "run" / "model")
    assert pipe.student["guidance_scale"] == [2.0, 6.0] and pipe.unet.config.time_cond_proj_dim == 256
    weak, strong = (
        pipe("rain", guidance_scale=scale, generator=torch.Generator().manual_seed(0), output_type="latent").audios
        for scale in (2.0, 6.0)
    )
    assert not torch.equal(weak, strong)
    with pytest.raises(ValueError, match="range of the student"):
        pipe("rain", guidance_scale=7.0)


@pytest.mark.parametrize("objective", ["trajectory", "consistency"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(arguments, tmp_path, objective):
    flags = ["--lora_rank=2", "--use_ema", "--gradient_accumulation_steps=2", "--max_train_steps=3"]
    flags += [f"--objective={objective}", "--lora_dropout=0.3", "--student_steps", 2, 1, "--num_grid_steps=5"]
    for name in ("unbroken", "broken"):
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(arguments(name, *flags)) == 0
    subprocess.run(["rm", "-r", tmp_path / "broken" / "checkpoint-3"], check=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments("broken", *flags, "--resume_from_checkpoint=latest")) == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    weights = [
        load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("broken", "unbroken")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert any(weight.any() for name, weight in weights[1].items() if "lora_B" in name)


def test_two_processes_train_what_one_does(arguments, tmp_path):
    flags = ["--lora_rank=2", "--max_train_steps=2", "--student_steps", 2, 1, "--mixed_precision=no"]
    assert main(arguments("one", *flags)) == 0
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "training.distill"]
        + arguments("two", *flags, "--train_batch_size=1"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


# The teacher


def test_the_teacher_is_guided_as_the_pipeline_and_only_where_asked(pipe):
    text, mask = pipe.encode_prompt("rain", "cpu", do_classifier_free_guidance=False)[:2]
    empty, empty_mask = pipe.encode_prompt("", "cpu", do_classifier_free_guidance=False)[:2]
    sample = torch.randn(2, pipe.unet.config.in_channels, 8, 4, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([700, 300])
    teacher = Teacher(pipe.unet, empty, empty_mask, has_adapters=False)
    text, mask = text.expand(2, -1, -1), mask.expand(2, -1)
    with torch.no_grad():
        pred = teacher.predictor(text, mask, torch.tensor([3.0, 1.0]))(sample, timesteps)
        with_text = pipe.unet(sample, timesteps, text, encoder_attention_mask=mask).sample
        without = pipe.unet(
            sample, timesteps, empty.expand(2, -1, -1), encoder_attention_mask=empty_mask.expand(2, -1)
        ).sample
    torch.testing.assert_close(pred[0], without[0] + 3 * (with_text[0] - without[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pred[1], with_text[1], rtol=1e-4, atol=1e-5)


def test_trajectories_are_those_of_the_pipeline(pipe, arguments):
    args = parse_args(arguments("run", "--guidance_scale=3", "--guidance_interval", 0, 0.5))
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
    pipe.register_to_config(default_audio_length_in_s=0.32)
    noise = torch.randn(
        1, *latent_shape(pipe, pipe._num_latent_frames(0.32)), generator=torch.Generator().manual_seed(0)
    )
    points = sample_trajectories(args, pipe, ["rain"], noise)
    assert points.shape == (1, 5, *noise.shape[1:]) and points.dtype == torch.float16
    expected = pipe(
        "rain",
        audio_length_in_s=0.32,
        num_inference_steps=4,
        guidance_scale=3,
        guidance_interval=(0, 0.5),
        latents=noise,
        output_type="latent",
    ).audios
    torch.testing.assert_close(points[:, 0].float(), noise, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(points[:, -1].float(), expected.float(), rtol=2e-3, atol=2e-3)
    assert teacher_timesteps(args, pipe.scheduler) == pipe.scheduler.timesteps.tolist()


def test_latents_are_made_once(arguments, monkeypatch):
    assert main(arguments("run", "--lora_rank=2", "--max_train_steps=1")) == 0
    monkeypatch.setattr("training.distill.sample_trajectories", lambda *args: pytest.fail("sampled again"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments("again", "--lora_rank=2", "--max_train_steps=1", "--student_steps", 2)) == 0


# Gradients and targets


@pytest.mark.parametrize("is_lora", [True, False])
def test_gradients_reach_the_student_only(pipe, arguments, is_lora):
    import copy

    from peft import LoraConfig

    args = parse_args(arguments("run", "--objective=consistency", "--num_grid_steps=5"))
    args.guidance_scale, args.guidance_interval = [3.0], [0.0, 1.0]
    text, mask = pipe.encode_prompt(["rain", "dog"], "cpu", do_classifier_free_guidance=False)[:2]
    teacher_unet = pipe.unet if is_lora else copy.deepcopy(pipe.unet)
    lora = LoraConfig(r=2, target_modules=["to_q"]) if is_lora else None
    model = prepare_denoiser(pipe, "cpu", torch.float32, lora=lora)
    teacher = Teacher(teacher_unet, text[:1], mask[:1], has_adapters=is_lora)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    distillation = Distillation(args, scheduler, teacher, pipe.unet)
    latents = torch.randn(2, *latent_shape(pipe, 8), generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    calls = []

    import contextlib

    @contextlib.contextmanager
    def averages():
        calls.append(torch.is_grad_enabled())
        yield

    draws = distillation.draw(generators, "cpu")
    distillation.losses(model, averages, latents, text, mask, torch.randn_like(latents), *draws).mean().backward()
    assert calls == [False]
    trained = {id(p) for p in trained_parameters(model)}
    with_gradients = {id(p) for p in pipe.unet.parameters() if p.grad is not None and p.grad.any()}
    assert with_gradients and with_gradients <= trained
    if not is_lora:
        assert all(p.grad is None for p in teacher_unet.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_perfect_student_of_trajectories_has_no_loss_and_samples_like_the_teacher(pipe, arguments, prediction_type):
    """A model that predicts the target takes each sample where the kept point is, by the scheduler of the student."""
    args = parse_args(arguments("run", "--student_steps", 2, 1))
    config = pipe.scheduler.config | {"prediction_type": prediction_type}
    scheduler = DDPMScheduler.from_config(config)
    trajectories = Trajectories(args, scheduler, [999, 600, 300, 50])
    assert trajectories.timesteps == student_timesteps([999, 600, 300, 50], [2, 1]) == {2: [999, 300], 1: [979]}
    points = torch.randn(1, 5, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = SCHEDULERS["dpm++"].from_config(config, solver_order=1, use_karras_sigmas=False)
    predictions = []

    def model(samples, timesteps, text, mask):
        """Solves for the prediction by sampling twice with the student's scheduler: its steps are linear in it."""
        results = []
        number, i = next(
            (n, t.index(int(timesteps))) for n, t in trajectories.timesteps.items() if int(timesteps) in t
        )
        for prediction in (torch.zeros_like(samples), torch.ones_like(samples)):
            sampler.set_timesteps(timesteps=trajectories.timesteps[number])
            sampler.set_begin_index(i)
            results.append(sampler.step(prediction, timesteps[0], samples).prev_sample)
        end = points[:, (4 if number == 1 else 2) if i == 0 else 4]
        predictions.append((end - results[0]) / (results[1] - results[0]))
        return predictions[-1]

    for seed in range(6):
        loss = trajectories.losses(model, points, None, None, [torch.Generator().manual_seed(seed)])
        assert float(loss) < 1e-3 * float(predictions[-1].abs().mean())


def test_a_new_input_for_guidance_changes_nothing_before_training(pipe):
    student = with_guidance_input(pipe.unet)
    sample, text = (
        torch.randn(1, pipe.unet.config.in_channels, 8, 4),
        torch.randn(1, 3, pipe.unet.config.cross_attention_dim),
    )
    with torch.no_grad():
        expected = pipe.unet(sample, 5, text).sample
        assert torch.equal(student(sample, 5, text, timestep_cond=torch.ones(1, 256)).sample, expected)


def test_noise_levels_are_those_of_the_scheduler(pipe):
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 8, 4, 4)
    alpha, sigma = noise_levels(scheduler.alphas_cumprod, torch.tensor([3, 900]))
    expected = scheduler.add_noise(torch.ones(2, 8, 4, 4), noise, torch.tensor([3, 900]))
    torch.testing.assert_close(alpha + sigma * noise, expected)


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_manifest=x.jsonl"], "give one of --train_manifest, --dataset_name and --prompts"),
        (["--guidance_scale", 2, 6, "--objective=consistency", "--lora_rank=4"], "fed to the whole UNet"),
        (["--guidance_scale", 2, 6], "--objective trajectory takes one --guidance_scale"),
        (["--guidance_scale", 6, 2, "--objective=consistency"], "a range has to ascend"),
        (["--guidance_scale", 1, 2, 3], "one scale, or the two ends of a range"),
        (["--guidance_scale=0.5"], "--guidance_scale has to be at least 1"),
        (["--guidance_interval", 0.5, 0.5], "--guidance_interval has to ascend"),
        (["--student_steps", 1, 2], "--student_steps have to descend"),
        (["--endpoint=phases", "--num_grid_steps=50"], "--num_phases has to divide --num_grid_steps"),
        (["--use_dora"], "--use_dora needs --lora_rank"),
        (["--validation_manifest=x.jsonl"], "--validation_manifest goes with sounds to train on"),
        (["--prompts=nowhere.txt"], "--prompts: there is no file nowhere.txt"),
    ],
)
def test_flags_that_make_no_sense_are_refused(arguments, capsys, flags, message):
    with pytest.raises(SystemExit):
        parse_args(arguments("run", *flags))
    assert message in capsys.readouterr().err


def test_trajectories_need_prompts(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments("run", "--train_manifest=x.jsonl", prompts=None))
    assert "give --prompts" in capsys.readouterr().err


def test_prompts_are_lines_or_captions(tmp_path):
    (tmp_path / "a.txt").write_text("rain\n\n  thunder \n# a comment\n")
    assert read_prompts(tmp_path / "a.txt") == ["rain", "thunder"]
    (tmp_path / "a.csv").write_text('id,caption\n1,rain\n2,"thunder, far away"\n')
    assert read_prompts(tmp_path / "a.csv") == ["rain", "thunder, far away"]
    (tmp_path / "a.jsonl").write_text('{"captions": ["rain", "it rains"]}\n{"captions": "dog"}\n')
    assert read_prompts(tmp_path / "a.jsonl") == ["rain", "it rains", "dog"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no prompts"):
        read_prompts(tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1"):
        read_prompts(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("scheduler", ["ddpm", "euler", "lcm"])
def test_trajectories_need_an_ode(arguments, capsys, tmp_path, scheduler):
    """With noise in the steps the ends of a trajectory say nothing of its beginning."""
    assert main(arguments("run", f"--teacher_scheduler={scheduler}", "--max_train_steps=1")) == 1
    assert "give --teacher_scheduler, one of ddim, dpm++, unipc" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_more_steps_than_the_teacher_has_are_refused_before_it_samples(arguments, capsys, tmp_path):
    assert main(arguments("run", "--student_steps", 8, "--max_train_steps=1")) == 1
    assert "`num_student_steps` has to be between 1 and 4" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_validation_sounds_are_sampled_in_the_steps_that_the_student_learns(arguments, monkeypatch):
    calls = []
    monkeypatch.setattr("training.distill.make_sounds", lambda *args, **options: calls.append(options))
    flags = ("--lora_rank=2", "--max_train_steps=1", "--student_steps", 2, 1, "--validation_prompts", "rain")
    assert main(arguments("run", *flags)) == 0
    (options,) = calls
    assert options["num_inference_steps"] == 2 and len(options["timesteps"]) == 2


def test_points_are_kept_for_trajectories_only(arguments, tmp_path):
    assert main(arguments("run", "--lora_rank=2", "--max_train_steps=1", "--objective=consistency")) == 0
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == len(PROMPTS) and all("points" not in load_file(file) for file in files)


def test_a_student_is_no_teacher(short_folder, arguments, tmp_path, capsys):
    pipe = TangoPipeline.from_pretrained(short_folder)
    pipe.register_modules(unet=with_guidance_input(pipe.unet))
    pipe.save_pretrained(tmp_path / "student")
    flags = [f"--pretrained_model_name_or_path={tmp_path / 'student'}", "--max_train_steps=1"]
    assert main(arguments("run", *flags)) == 1
    assert "has to be a teacher" in capsys.readouterr().err
