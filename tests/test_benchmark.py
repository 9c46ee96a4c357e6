import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.io import wavfile

from examples import benchmark
from examples.benchmark import (
    UNET_BLOCKS,
    compile_models,
    flop_counter,
    join_records,
    main,
    measure,
    read_variant,
    signal_to_difference_db,
    summarize,
    table,
)
from pipeline_tango.presets import FAST, fast_settings


SETTINGS = {"device": "cpu", "seconds": 0.1, "steps": 4, "steps_timed": 3}


@pytest.fixture
def measured(tiny_folder, tmp_path, monkeypatch):
    """Measures variants of the tiny checkpoint in this process."""
    monkeypatch.setattr(benchmark, "matrix_rate", lambda dtype, device: 1e9)

    def run(name, batch_size=1, prompts=(), **settings):
        reference = tmp_path / "plain.safetensors"
        return measure(
            str(tiny_folder), name, batch_size, SETTINGS | settings, reference, prompts, tmp_path / "sounds" / name
        )

    return run


def in_this_process(num_workers, mp_context):
    """An executor that spares the seconds that a new process needs to import torch."""
    return ThreadPoolExecutor(num_workers)


def record(variant, round=0, batch_size=1, step_in_s=10.0, steps=100, **changes):
    """What `measure` would return for UNet steps of `step_in_s` and a second for each other stage."""
    made = {
        "variant": variant,
        "round": round,
        "batch_size": batch_size,
        "seconds": 10.0,
        "steps": steps,
        "steps_timed": 5,
        "time_in_s": {"text": 1.0, "unet": 5 * step_in_s, "vae": 1.0, "vocoder": 1.0},
        "flop": {"text": 1e9, "unet": 5e9, "vae": 1e9, "vocoder": 1e9},
        "flop_per_s": {"text": 1e10, "unet": 1e10, "vae": 1e10, "vocoder": 1e10},
        "load_in_s": 2.0,
        "cold_in_s": None,
        "memory_in_bytes": 2**30,
        "latents_db": 30.0,
        "decoder_db": 31.0,
        "sound_db": 29.0,
    }
    return made | changes


def test_signal_to_difference_is_in_db():
    signal = np.array([3.0, -4.0])
    assert signal_to_difference_db(signal, signal) == 200
    assert signal_to_difference_db(signal, 0.9 * signal) == pytest.approx(20)
    assert signal_to_difference_db(signal, 0 * signal) == pytest.approx(0)
    assert signal_to_difference_db(0 * signal, signal) == -200


def test_options_are_joined_by_plus():
    variant = read_variant("bf16+channels-last+deep-cache-12+guidance-half", "cpu")
    assert variant["dtypes"] == {"default": torch.bfloat16}
    assert variant["channels_last"] and variant["deep_cache"] == 12 and variant["guidance_interval"] == (0.25, 0.75)
    assert variant["scheduler"] is None and variant["steps"] is None
    assert read_variant("plain", "cpu")["dtypes"] == {"default": torch.float32}
    assert read_variant("bf16-saved", "cpu") == read_variant("bf16", "cpu")
    assert not read_variant("bf16", "cpu")["blocked_attention"]
    assert read_variant("bf16+blocked-attention", "cpu")["blocked_attention"]
    assert read_variant("bf16+compile-dynamic", "cpu")["compile"] == "compile-dynamic"


def test_the_preset_is_that_of_the_command(tiny_folder):
    assert read_variant("preset", "cpu").items() >= FAST.items()
    assert read_variant("preset", "cpu", fast_settings(tiny_folder))["deep_cache"] is None
    assert read_variant("preset", "cuda")["kernels"] == () == read_variant("bf16", "cpu")["kernels"]


@pytest.mark.parametrize("name", ["reduce-overhead", "bf16+max-autotune"])
def test_cuda_graphs_are_for_cuda_only(name):
    with pytest.raises(ValueError, match="needs CUDA"):
        read_variant(name, "cpu")


def test_a_clip_is_reckoned_from_the_steps_timed():
    (row,) = summarize([record("plain")])
    assert row["step_in_s"] == 10.0 and row["clip_in_s"] == 1003.0 and row["is_extrapolated"]
    assert row["real_time_factor"] == pytest.approx(100.3)
    assert row["clips_per_minute"] == pytest.approx(60 / 1003)
    assert row["floor_in_s"] == pytest.approx(10.3)  # 103 GFLOP at 10 GFLOP/s
    assert row["share_of_floor"] == pytest.approx(10.3 / 1003)
    assert row["unet_share_of_floor"] == pytest.approx(0.01)


def test_ratios_are_medians_of_those_within_a_round():
    slow_machine = [record("plain", 0, step_in_s=30.0), record("bf16", 0, step_in_s=15.0)]
    others = [record("plain", n, step_in_s=10.0) for n in (1, 2)] + [record("bf16", n, step_in_s=2.5) for n in (1, 2)]
    plain, bf16 = summarize(slow_machine + others)
    assert plain["step_ratio"] == plain["clip_ratio"] == 1.0
    assert bf16["step_ratio"] == 4.0 and bf16["step_in_s"] == 2.5 and bf16["num_rounds"] == 3


def test_batches_are_compared_with_plain_batches():
    rows = summarize([record("plain"), record("plain", batch_size=4, step_in_s=20.0)])
    assert [row["batch_size"] for row in rows] == [1, 4]
    assert rows[1]["clip_in_s"] == pytest.approx(2003 / 4) and rows[1]["clip_ratio"] == 1.0
    assert rows[1]["clips_per_minute"] == pytest.approx(4 * 60 / 2003)


def test_processes_work_side_by_side():
    rows = summarize([record("plain"), record("plain", num_processes=2, step_in_s=20.0)])
    assert [row["num_processes"] for row in rows] == [1, 2]
    assert rows[1]["clips_per_minute"] == pytest.approx(2 * 60 / 2003) and rows[1]["clip_ratio"] == 1.0
    assert "| 1 in 2 processes each |" in table(rows)


def test_the_slowest_process_counts_and_the_memory_of_all():
    quick, slow = record("bf16"), record("bf16", step_in_s=20.0, load_in_s=3.0, memory_in_bytes=2**31)
    slow["time_in_s"]["vae"] = 0.5
    joined = join_records([quick, slow])
    assert joined["time_in_s"] == {"text": 1.0, "unet": 100.0, "vae": 1.0, "vocoder": 1.0}
    assert joined["load_in_s"] == 3.0 and joined["memory_in_bytes"] == 3 * 2**30 and joined["cold_in_s"] is None
    assert joined["num_processes"] == 2 and quick["time_in_s"]["unet"] == 50.0


def test_compilation_pays_after_some_clips():
    rows = summarize([record("plain"), record("bf16"), record("bf16+compile", step_in_s=9.0, cold_in_s=250.0)])
    assert [row["break_even_in_clips"] for row in rows] == [None, None, 3]  # 100 s a clip
    (row,) = summarize([record("compile", step_in_s=9.0, cold_in_s=250.0)])
    assert row["break_even_in_clips"] is None


def test_the_table_has_a_cell_for_each_title():
    graphs = {"cold_in_s": 9.0, "num_graphs": 3, "num_more_graphs": 2, "num_graph_breaks": 0}
    nothing = {"latents_db": None, "sound_db": None, "memory_in_bytes": None}
    rows = summarize([record("plain"), record("preset", **nothing), record("compile", **graphs)])
    lines = table(rows).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "~1e+03" in lines[2] and "100%" not in lines[2]
    assert lines[4].endswith("| 9 | 3 + 2 / 0 |")


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_is_counted(is_masked):
    query, key = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 5, 8)
    mask = torch.ones(2, 1, 16, 5, dtype=torch.bool) if is_masked else None
    with flop_counter() as counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    assert (
        counter.get_total_flops() == 2 * (2 * 3) * (16 * 5 * 8) * 2
    )  # two products, an addition for each multiplication


def test_products_of_int8_are_counted():
    with flop_counter() as counter:
        torch._int_mm(torch.ones(32, 16, dtype=torch.int8), torch.ones(16, 8, dtype=torch.int8))
    assert counter.get_total_flops() == 2 * 32 * 16 * 8


def test_flop_are_those_of_both_halves_of_guidance(measured, pipe):
    plain, half = measured("plain"), measured("guidance-half", steps_timed=4)
    plain_step, half_step = plain["flop"]["unet"] / 3, half["flop"]["unet"] / 4
    assert half_step == pytest.approx(0.75 * plain_step, rel=0.01)
    assert half["flop"]["vae"] == plain["flop"]["vae"]


def test_what_a_variant_does_to_the_sound_is_told(measured):
    figures = ("latents_db", "decoder_db", "sound_db")
    assert [measured("plain")[name] for name in figures] == [200, 200, 200]
    assert all(100 < measured("channels-last")[name] for name in figures)
    assert all(5 < measured("bf16")[name] < 100 for name in figures)
    assert all(100 < measured("blocked-attention")[name] for name in figures)
    fused = measured("fused-qkv+fp16")
    assert fused["decoder_db"] == 200 and 5 < fused["latents_db"] < 100
    preset = measured("preset")
    assert preset["steps"] == FAST["steps"] and preset["latents_db"] is None and preset["sound_db"] is None


def test_a_student_takes_its_steps_without_guidance(measured):
    settings = read_variant("student-2", "cpu")
    assert (settings["scheduler"], settings["steps"], settings["guidance"]) == ("lcm", 2, 1.0)
    assert settings["dtypes"] == read_variant("preset", "cpu")["dtypes"] and settings["deep_cache"] is None
    student, plain = measured("student-2"), measured("plain")
    assert student["steps"] == student["steps_timed"] == 2 and student["sound_db"] is None
    halves = plain["flop"]["unet"] / plain["steps_timed"], student["flop"]["unet"] / 2
    assert halves[1] < 0.6 * halves[0] and student["flop"]["text"] < plain["flop"]["text"]


@pytest.mark.parametrize("option", ["compile", "compile-dynamic", "compile-blocks"])
def test_what_is_compiled(pipe, option, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append((module, options)))
    with torch._dynamo.config.patch(recompile_limit=8):  # to be what it was afterwards
        compile_models(pipe, option)
        assert torch._dynamo.config.recompile_limit == (64 if option == "compile-blocks" else 8)
    assert compiled[-2:] == [(each, compiled[0][1]) for each in (pipe.vae.decoder, pipe.vocoder)]
    assert all(options == ({"dynamic": True} if option == "compile-dynamic" else {}) for _, options in compiled)
    if option == "compile-blocks":
        kinds = [type(module).__name__ for module, _ in compiled[:-2]]
        assert set(kinds) == set(UNET_BLOCKS) and kinds.count("ResnetBlock2D") == 11
    else:
        assert compiled[0][0] is pipe.unet


def test_each_row_of_a_batch_is_the_sound_of_its_own_seed(measured):
    measured("plain")
    assert measured("plain", batch_size=2)["sound_db"] > 80


def test_sounds_are_written_whole(measured, tmp_path):
    prompts = [{"name": "00001", "prompt": "rain"}, {"name": "00002", "prompt": "wind"}]
    measured("bf16", prompts=prompts)
    for name in ("00001", "00002"):
        sampling_rate, samples = wavfile.read(tmp_path / "sounds" / "bf16" / f"{name}.wav")
        assert sampling_rate == 16000 and len(samples) == 1600


def test_a_run_is_resumed_and_never_mixed(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--model", str(tiny_folder), "--device", "cpu", "--seconds", "0.1", "--steps", "2", "--steps_timed", "0"]
    asked += ["--output_dir", str(tmp_path / "out"), "--variants"]
    assert main([*asked, "reduce-overhead"]) == 0
    told = capsys.readouterr()
    assert "skipped: reduce-overhead needs CUDA" in told.err and "| plain | 1 |" in told.out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert not row["is_extrapolated"] and row["clip_ratio"] == 1.0 and row["sound_db"] == 200

    measured = (tmp_path / "out" / "results.jsonl").read_bytes()
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", in_this_process)
    assert main([*asked, "bf16"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == told.out.splitlines()
    lines = (tmp_path / "out" / "results.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[0] == measured and json.loads(lines[1])["variant"] == "bf16" and len(lines) == 2
    with pytest.raises(SystemExit):
        main([*asked, "bf16", "--steps", "3"])
    assert "has measurements with steps 2, not 3" in capsys.readouterr().err


def test_processes_are_measured_together(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--model", str(tiny_folder), "--device", "cpu", "--seconds", "0.1", "--steps", "2", "--steps_timed", "0"]
    assert main([*asked, "--output_dir", str(tmp_path), "--variants", "plain", "--processes", "2"]) == 0
    assert "| plain | 1 in 2 processes each |" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["num_processes"] == 2 and row["sound_db"] == 200


def test_a_copy_saved_in_bfloat16_is_the_same_sound(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", in_this_process)
    asked = ["--model", str(tiny_folder), "--device", "cpu", "--seconds", "0.1", "--steps", "2", "--steps_timed", "0"]
    assert main([*asked, "--output_dir", str(tmp_path), "--variants", "bf16", "bf16-saved"]) == 0
    _, loaded, saved = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [loaded[f"{name}_db"] for name in ("latents", "decoder", "sound")] == [
        saved[f"{name}_db"] for name in ("latents", "decoder", "sound")
    ]
    weights = load_file(tmp_path / "bfloat16" / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["conv_in.weight"].dtype == torch.bfloat16


def test_a_variant_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", in_this_process)
    model = tmp_path / "missing"
    assert main(["--model", str(model), "--variants", "bf16", "--output_dir", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "plain, batch 1: OSError: " in told and "bf16, batch 1: OSError" in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--variants", "bf17"], "'bf17' is none of plain, bf16"),
        (["--variants", "bf16+deep-cache-0"], "'deep-cache-0' is none of"),
        (["--variants", "deep-cache-5"], "--steps_timed must be a multiple of 5 for deep-cache-5, got 6"),
        (["--model", "x", "--size", "tiny"], "either --model or --size"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--batch_sizes", "1", "0"], "--batch_sizes must be at least 1"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--seconds", "nan"], "--seconds must be a positive number"),
        (["--save_sounds", "missing.txt"], "--save_sounds: cannot read the list missing.txt"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_random_pipelines_make_sound(monkeypatch):
    pipe = benchmark.random_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    audio = pipe("rain", num_inference_steps=2, audio_length_in_s=0.1).audios
    assert audio.shape == (1, 1600) and np.abs(audio).max() > 1e-3


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(f"    {name} " in told for name in benchmark.OPTIONS)
