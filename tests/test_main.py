import csv
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STUDENT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.io import wavfile

from pipeline_tango import SCHEDULERS, BlockedAttnProcessor, __version__, kernels
from pipeline_tango.__main__ import choose_student, main, parse_arguments, read_prompts
from pipeline_tango.presets import SCHEDULER_NAMES
from pipeline_tango.sound_files import encode_wav, read_audio
from pipeline_tango.sound_folder import encode_manifest, locked


ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--seconds", "0.1", "--device", "cpu", "--dtype", "float32"]


def records_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text("utf-8").splitlines()]


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tango(tiny_folder, tmp_path, monkeypatch):
    """Runs the command on the tiny checkpoint in a folder of its own; the last `--steps` and `--seconds` count."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(["--model", str(tiny_folder), *QUICK, *map(str, arguments)])


@pytest.fixture
def error_of(capsys):
    """Runs the command, which has to fail in one line, and returns the exit status and that line."""

    def run(*arguments):
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return status, lines[0]

    return run


def test_wav_holds_what_the_pipeline_makes(tango, pipe, tmp_path):
    assert tango("rain", "--seed", 3, "-o", "new/folder/rain.wav", "--negative_prompt", "hiss") == 0
    generator = torch.Generator().manual_seed(3)
    audio = pipe(
        "rain", audio_length_in_s=0.1, num_inference_steps=2, negative_prompt="hiss", generator=generator
    ).audios[0]
    sampling_rate, samples = wavfile.read(tmp_path / "new" / "folder" / "rain.wav")
    assert sampling_rate == 16000
    assert np.abs(samples - audio * 32768).max() <= 1
    assert np.abs(samples).max() > 100
    assert os.listdir(tmp_path / "new" / "folder") == ["rain.wav"]


def test_a_list_has_a_bar_of_all_sounds_beside_that_of_each(tango, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("rain\nwind\ncow\n")
    assert tango("--prompts", "list.txt", "-o", "out") == 0
    err = capsys.readouterr().err
    shown = re.findall(r"sounds: +\d+%\|[^|]*\| (\d)/3 \[\d\d:\d\d<([\d:?]+)", err)  # done, and the time left
    assert list(dict.fromkeys(done for done, _ in shown)) == ["0", "1", "2", "3"] and ("3", "00:00") in shown
    assert "00002.wav:" in err and err.index("2/3") < err.index("00003.wav")
    assert tango("--prompts", "list.txt", "-o", "other", "--quiet") == 0
    assert tango("rain", "-o", "one.wav") == 0
    assert "sounds: " not in capsys.readouterr().err


def test_takes_are_reproducible_however_many_are_asked_for(tango, tmp_path, capsys):
    assert tango("rain", "-o", "a.wav", "--seed", 5) == 0
    assert tango("rain", "-o", "b.wav", "--seed", 5, "--takes", 3) == 0
    assert tango("rain", "-o", "c.wav", "--seed", 7) == 0
    made = bytes_of(tmp_path)
    assert sorted(made) == ["a.wav", "b-1.wav", "b-2.wav", "b-3.wav", "c.wav"]
    assert made["a.wav"] == made["b-1.wav"] != made["b-2.wav"]
    assert made["b-3.wav"] == made["c.wav"]

    assert tango("rain", "-o", "d.wav", "--seed", 5, "--takes", 3, "--batch_size", 2) == 0
    for take in (1, 2, 3):
        one, batched = (wavfile.read(f"{name}-{take}.wav")[1].astype(int) for name in "bd")
        assert np.abs(one - batched).max() <= 1

    capsys.readouterr()
    assert tango("rain", "-o", "e.wav") == 0
    told = capsys.readouterr().err
    assert "float32" in told.splitlines()[0] and "real-time factor" in told.splitlines()[-1]
    seed = told.split("seed ")[1].split(" (chosen at random)")[0]
    assert tango("rain", "-o", "f.wav", "--seed", seed) == 0
    assert Path("e.wav").read_bytes() == Path("f.wav").read_bytes()


def test_length_is_exact_and_defaults_to_that_of_the_checkpoint(tango, tiny_folder):
    for seconds, num_samples in ((0.0201, 322), (0.1234567, 1975), (1 / 3, 5333)):
        assert tango("rain", "--seconds", seconds, "--quiet") == 0
        assert len(wavfile.read("tango.wav")[1]) == num_samples
    assert main(["rain", "--model", str(tiny_folder), "--steps", "1", "--quiet"]) == 0
    assert len(wavfile.read("tango.wav")[1]) == 163840


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_makes_nearly_the_same_sound(tango, dtype, capsys):
    assert tango("rain", "--seed", 0, "-o", "full.wav") == 0
    assert tango("rain", "--seed", 0, "-o", "half.wav", "--dtype", dtype) == 0
    assert f"on cpu in {dtype}" in capsys.readouterr().err
    full, half = (wavfile.read(name)[1].astype(float) for name in ("full.wav", "half.wav"))
    assert 0 < np.abs(full - half).std() < 0.1 * full.std()


def test_fast_is_what_its_flags_are(tango, pipe, tmp_path):
    Path("list.txt").write_text("rain\n")
    asked = ("--prompts", "list.txt", "--steps", 4)
    assert tango(*asked, "-o", "fast", "--fast") == 0
    assert tango(*asked, "-o", "flags", "--scheduler", "dpm++", "--guidance", 4, "--guidance_interval", "0-0.5") == 0
    assert (
        tango(*asked, "-o", "other", "--fast", "--guidance", 2, "--guidance_interval", "0-1", "--scheduler", "ddim")
        == 0
    )
    fast, flags, other = (records_of(tmp_path / name)[0] for name in ("fast", "flags", "other"))
    assert fast == flags and bytes_of(tmp_path / "fast") == bytes_of(tmp_path / "flags")
    assert fast["scheduler"] == "DPMSolverMultistepScheduler" and fast["guidance_interval"] == [0.0, 0.5]
    assert fast["steps"] == 4 and fast["guidance"] == 4.0 and other["guidance"] == 2.0
    assert "deep_cache" not in fast  # a flag counts more, and a narrow UNet has no cache
    assert other["scheduler"] == "DDIMScheduler" and other["guidance_interval"] == [0.0, 1.0]

    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "guidance_interval": (0.0, 0.5)}
    options["audio_length_in_s"] = 0.1
    audio = pipe("rain", generator=torch.Generator().manual_seed(0), **options).audios[0]
    assert np.abs(wavfile.read("fast/00001.wav")[1] - audio * 32768).max() <= 1


@pytest.fixture
def as_tango_tiny(tiny_folder, student_folder, monkeypatch):
    """The tiny checkpoint in place of tango-tiny, and a student for it."""
    monkeypatch.setattr("pipeline_tango.__main__.TANGO_TINY", str(tiny_folder))
    monkeypatch.setattr("pipeline_tango.__main__.TANGO_TINY_STUDENT", str(student_folder))


def run_fast(tiny_folder, capsys, *arguments):
    """What `tango` prints first, and the record of the sound that it makes of "rain"."""
    Path("rain.txt").write_text("rain\n")
    folder = f"out-{len(os.listdir())}"
    arguments = ["--prompts", "rain.txt", "-o", folder, "--seconds", "0.1", "--device", "cpu", *arguments]
    assert main(["--model", str(tiny_folder), "--dtype", "float32", *map(str, arguments)]) == 0
    (record,) = records_of(Path(folder))
    return capsys.readouterr().err.splitlines()[0], record, wavfile.read(f"{folder}/00001.wav")[1]


def test_fast_takes_the_student_of_tango_tiny(
    as_tango_tiny, tiny_folder, student_folder, pipe, tango, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("pipeline_tango.TangoPipeline.load_lora_weights", None)  # which needs peft, an extra
        line, record, samples = run_fast(tiny_folder, capsys, "--fast")
    assert line.startswith("tango-tiny with its student on cpu in float32, LCMScheduler")
    assert (record["student"], record["steps"], record["guidance"]) == (True, 4, 1.0)
    assert (record["model"], record["scheduler"]) == ("tango-tiny", "LCMScheduler")
    assert "guidance_interval" not in record
    pipe.load_lora_weights(student_folder)
    audio = pipe("rain", audio_length_in_s=0.1, generator=torch.Generator().manual_seed(0)).audios[0]
    assert np.abs(samples - audio * 32768).max() <= 2


def test_flags_that_ask_for_more_turn_the_student_off(as_tango_tiny, tiny_folder, student_folder, tango, capsys):
    def steps_of(*flags):
        line, record, _ = run_fast(tiny_folder, capsys, *flags)
        return line.split(" on cpu")[0], record["steps"], record["scheduler"][:3]

    off = "tango-tiny without its student, because of "
    assert steps_of("--student") == ("tango-tiny with its student", 4, "LCM")
    assert steps_of("--fast", "--steps", 2) == ("tango-tiny with its student", 2, "LCM")
    assert steps_of("--fast", "--no_student") == ("tango-tiny", 12, "DPM")
    assert steps_of("--fast", "--steps", 9) == (off + "--steps", 9, "DPM")
    assert steps_of("--fast", "--negative_prompt", "dog") == (off + "--negative_prompt", 12, "DPM")
    assert steps_of("--fast", "--scheduler", "ddim") == (off + "--scheduler", 12, "DDI")
    assert steps_of("--fast", "--guidance", 2, "--steps", 2)[0] == off + "--guidance"
    assert steps_of("--steps", 2) == ("tango-tiny", 2, "DDP")


def test_a_lora_that_makes_a_student_sets_what_a_call_takes(tiny_folder, student_folder, tango, pipe, capsys):
    for flags in ((), ("--fast",)):
        line, record, samples = run_fast(tiny_folder, capsys, "--lora", student_folder, *flags)
        assert f"{tiny_folder}, a student on cpu in float32, LCMScheduler" in line
        assert (record["steps"], record["guidance"], record["lora"]) == (4, 1.0, str(student_folder))
        assert "student" not in record and "guidance_interval" not in record


def test_a_student_takes_the_numbers_of_steps_that_it_was_distilled_for(
    as_tango_tiny, tiny_folder, student_folder, error_of, tmp_path, monkeypatch
):
    (path,) = student_folder.iterdir()
    student = STUDENT | {"timesteps": {"4": [999, 770, 480, 180], "1": [999]}}
    save_file(load_file(path), tmp_path / path.name, {"student": json.dumps(student)})
    monkeypatch.setattr("pipeline_tango.__main__.TANGO_TINY_STUDENT", str(tmp_path))
    rain = ["rain", "--model", str(tiny_folder), "--device", "cpu"]
    status, line = error_of(*rain, "--student", "--steps", 3)
    assert status == 2 and "steps must be one of 4, 1, which the student was distilled for, got 3" in line
    for steps, note in (("3", " without its student, because of --steps"), ("1", " with its student")):
        args = parse_arguments([*rain, "--fast", "--steps", steps])
        found = choose_student(args)
        assert found == (student if steps == "1" else None, note) and bool(args.student) == (steps == "1")


def test_what_a_student_cannot_do_is_one_line(as_tango_tiny, tiny_folder, student_folder, error_of, tmp_path):
    rain = ["rain", "--model", tiny_folder, "--device", "cpu", "-o", tmp_path / "rain.wav"]
    for flags, message in (
        (["--negative_prompt", "dog"], "negative_prompt has no effect on a student"),
        (["--guidance_interval", "0-0.5"], "guidance_interval has no effect on a student"),
        (["--deep_cache", 2], "deep_cache is not for students"),
        (["--steps", 51], "steps must be at most 50 with the LCMScheduler, got 51"),
        (["--lora", student_folder], "--student adds a student to tango-tiny, but the model is one already"),
        (["--no_student"], "--no_student: not allowed with argument --student"),
        (["--model", "tango2-of-nobody"], "no model in tango2-of-nobody"),
    ):
        status, line = error_of(*rain, "--student", *flags)
        assert (status, message in line) == (1 if "--model" in flags else 2, True), line
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    status, line = error_of(*rain, "--model", other, "--student")
    assert status == 2 and "--student belongs to tango-tiny" in line


@pytest.mark.parametrize(
    "flags, has_amx, expected",
    [
        ("--fast --dtype bfloat16", False, "kernels: blocked-attention (cpu in bfloat16)"),
        ("--fast --dtype bfloat16", True, "kernels: channels-last-vae, conv2d-vocoder, keep-memory (amx in bfloat16)"),
        ("--fast", False, "kernels: plain (cpu in float32)"),
        ("", True, None),
    ],
)
def test_fast_uses_the_kernels_of_the_processor(tango, monkeypatch, capsys, flags, has_amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    used = []
    monkeypatch.setattr(kernels, "use_kernels", lambda pipe, names: used.extend(names))
    assert tango("rain", "-o", "rain.wav", "--steps", 2, *flags.split()) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kernels: ")]
    assert told == ([expected] if expected else [])
    assert all(name in (expected or "") for name in used) and bool(used) == ("-" in (expected or ""))


def test_kernels_are_chosen_by_a_flag(tango, monkeypatch, capsys):
    attended = []
    attend = BlockedAttnProcessor.__call__
    monkeypatch.setattr(
        BlockedAttnProcessor, "__call__", lambda *args, **kwargs: attended.append(1) or attend(*args, **kwargs)
    )
    asked = ["rain", "-o", "rain.wav", "--steps", 2, "--seed", 0, "--kernels"]
    assert tango(*asked, "plain", "--fast", "--dtype", "bfloat16") == 0 and not attended
    assert tango(*asked, "blocked-attention,conv2d-vocoder") == 0 and attended
    assert "kernels:" not in capsys.readouterr().err
    assert tango(*asked, "plain,fast") == 2
    assert "kernels must be plain, or of blocked-attention, " in capsys.readouterr().err


def test_a_deep_cache_is_recorded_and_changes_the_sound(tango, tmp_path, capsys):
    Path("list.txt").write_text("rain\n")
    assert tango("--prompts", "list.txt", "-o", "out", "--steps", 4) == 0
    assert tango("--prompts", "list.txt", "-o", "out", "--steps", 4, "--deep_cache", 2) == 2
    assert "was made with deep_cache None, not 2" in capsys.readouterr().err
    plain = bytes_of(tmp_path / "out")
    assert tango("--prompts", "list.txt", "-o", "out", "--steps", 4, "--deep_cache", 2, "--overwrite") == 0
    assert records_of(tmp_path / "out")[0]["deep_cache"] == 2
    assert bytes_of(tmp_path / "out")["00001.wav"] != plain["00001.wav"]


@pytest.mark.parametrize("name", SCHEDULER_NAMES)
def test_every_scheduler_runs(tango, name, capfd):
    assert tango("rain", "--scheduler", name, "--steps", 4, "--quiet", "--seed", 0) == 0
    assert np.abs(wavfile.read("tango.wav")[1].astype(int)).max() > 0
    assert capfd.readouterr() == ("", "")


def test_a_scheduler_takes_its_own_number_of_steps_by_default(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("rain\n")
    asked = ["--model", str(tiny_folder), "--seconds", "0.05", "--device", "cpu", "--dtype", "float32"]
    asked += ["--prompts", "list.txt", "-o", "out", "--scheduler", "lcm"]
    assert main(asked) == 0
    assert records_of(tmp_path / "out")[0]["steps"] == 50  # of its `original_inference_steps`, not the model's 100
    capsys.readouterr()
    assert main([*asked, "--steps", "51"]) == 2
    assert "steps must be at most 50 with the LCMScheduler, got 51" in capsys.readouterr().err


def test_lists_as_text_and_as_json_lines(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# sounds\r\nrain\r\n\r\n  a dog, barking \n{not json\n".encode())
    assert read_prompts(str(path)) == [
        {"prompt": "rain", "name": "00001"},
        {"prompt": "a dog, barking", "name": "00002"},
        {"prompt": "{not json", "name": "00003"},
    ]
    path.write_text('{"prompt": "rain", "seed": 4, "seconds": null}\n\n{"prompt": "wind", "name": "w", "guidance": 1}')
    assert read_prompts(str(path)) == [
        {"prompt": "rain", "seed": 4, "name": "00001"},
        {"prompt": "wind", "name": "w", "guidance": 1},
    ]
    path.write_text('{"dataset": "x", "location": "y.wav", "captions": "rain"}')
    assert read_prompts(str(path)) == [{"prompt": "rain", "name": "00001"}]


def test_a_csv_list_has_a_column_of_prompts(tmp_path, capsys):
    path = tmp_path / "list.csv"
    path.write_bytes(
        '\ufeffprompt,seconds,steps,seed,name\r\n"rain, ""heavy""",2.5,,7,\r\n\r\nwind,,5,,w\r\n'.encode()
    )
    assert read_prompts(str(path)) == [
        {"prompt": 'rain, "heavy"', "seconds": 2.5, "seed": 7, "name": "00001"},
        {"prompt": "wind", "steps": 5, "name": "w"},
    ]
    path.write_text("location,captions\na.wav,a dog\n")  # as training reads
    assert read_prompts(str(path)) == [{"prompt": "a dog", "name": "00001"}]
    assert "list.csv: not used are the columns 'location'" in capsys.readouterr().err
    path = tmp_path / "list.TSV"
    path.write_text("caption\tnegative_prompt\nrain, wind\thiss\n")
    assert read_prompts(str(path)) == [{"prompt": "rain, wind", "negative_prompt": "hiss", "name": "00001"}]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no prompt in the list"),
        (b"prompt\n", "no prompt in the list"),
        (b"file,label\na,b\n", "none of the columns prompt, captions, caption, text, only file, label"),
        (b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
        (b"prompt,seed\nrain,1\nwind\n", "line 3: expected 2 fields"),
        (b"prompt,seed\nrain,1,2\n", "line 2: expected 2 fields"),
        (b"prompt,seed\nrain,1.5\n", "line 2: seed must be a whole number"),
        (b"prompt,seconds\nrain,nan\n", "line 2: seconds must be"),
        (b"prompt,steps\nrain,\n ,\n", "line 3: prompt must be"),
        (b'prompt\n"rain\n', "not CSV"),
        (b"prompt\n\xff\n", "cannot read the list"),
    ],
)
def test_a_wrong_csv_is_told_with_its_line(error_of, tiny_folder, tmp_path, content, message):
    path = tmp_path / "list.csv"
    path.write_bytes(content)
    status, line = error_of("--prompts", path, "--model", tiny_folder, "-o", tmp_path / "out")
    assert status == 2 and message in line and "list.csv" in line
    assert os.listdir(tmp_path) == ["list.csv"]


def test_a_list_becomes_a_folder_with_a_manifest(tango, tiny_folder, tmp_path):
    Path("list.jsonl").write_text(
        '{"prompt": "rain"}\n'
        '{"prompt": "größe $x$", "negative_prompt": "hiss", "seconds": 0.2, "steps": 1, "guidance": 1, "seed": 9, '
        '"name": "big rain"}\n'
    )
    assert tango("--prompts", "list.jsonl", "-o", "out", "--takes", 2, "--seed", 1, "--spectrogram") == 0
    names = ["00001-1", "00001-2", "big rain-1", "big rain-2"]
    wavs = [f"{name}.wav" for name in names]
    assert sorted(os.listdir("out")) == sorted([*wavs, *(f"{name}.png" for name in names), "manifest.jsonl"])
    records = records_of(tmp_path / "out")
    assert [(record["file"], record["seed"], record["take"]) for record in records] == [
        (wavs[0], 1, 1),
        (wavs[1], 2, 2),
        (wavs[2], 9, 1),
        (wavs[3], 10, 2),
    ]
    assert records[2] == {
        "file": "big rain-1.wav",
        "prompt": "größe $x$",
        "negative_prompt": "hiss",
        "seed": 9,
        "take": 1,
        "seconds": 0.2,
        "steps": 1,
        "guidance": 1,
        "scheduler": "DDPMScheduler",
        "model": str(tiny_folder),
    }
    assert len(wavfile.read("out/big rain-1.wav")[1]) == 3200
    assert tango("rain", "--seed", 2, "-o", "alone.wav") == 0
    assert Path("alone.wav").read_bytes() == Path("out/00001-2.wav").read_bytes()


def test_a_broken_run_is_finished_with_the_same_bytes(tango, tmp_path, capsys):
    Path("list.txt").write_text("rain\nwind\nsea\ndog\n")
    asked = ("--prompts", "list.txt", "-o", "out")
    assert tango(*asked) == 0
    out = tmp_path / "out"
    whole = bytes_of(out)
    modified = (out / "00001.wav").stat().st_mtime_ns

    # killed between a sound and its record, while writing a record, and a file lost
    lines = (out / "manifest.jsonl").read_text().splitlines()
    (out / "manifest.jsonl").write_text(f"{lines[0]}\n{lines[3]}\n{lines[1][:40]}")
    (out / ".00002.wav.part").write_bytes(b"half")
    (out / "00004.wav").unlink()
    assert tango(*asked) == 0
    assert bytes_of(out) == whole
    assert (out / "00001.wav").stat().st_mtime_ns == modified

    Path("list.txt").write_text("rain\nwind\nsea\ndog\ncat\n")
    assert tango(*asked) == 0
    grown = bytes_of(out)
    assert grown.pop("00005.wav")
    assert {**grown, "manifest.jsonl": whole["manifest.jsonl"]} == whole
    assert len(records_of(out)) == 5

    capsys.readouterr()
    assert tango(*asked) == 0
    assert "already" in capsys.readouterr().err
    assert (out / "00001.wav").stat().st_mtime_ns == modified


def test_sounds_made_with_other_settings_are_kept_unless_told(tango, tmp_path, capsys):
    Path("list.txt").write_text("rain\nwind\n")
    assert tango("--prompts", "list.txt", "-o", "out") == 0
    before = bytes_of(tmp_path / "out")
    assert tango("--prompts", "list.txt", "-o", "out", "--steps", 3) == 2
    assert "was made with steps 2, not 3: give another folder, or --overwrite" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == before
    Path("list.txt").write_text("rain\nstorm\n")
    assert tango("--prompts", "list.txt", "-o", "out", "--overwrite") == 0
    after = bytes_of(tmp_path / "out")
    assert after["00001.wav"] == before["00001.wav"] and after["00002.wav"] != before["00002.wav"]
    assert [record["prompt"] for record in records_of(tmp_path / "out")] == ["rain", "storm"]


def test_a_file_without_a_record_is_not_replaced(tango, tmp_path, capsys):
    Path("list.jsonl").write_text('{"prompt": "wind", "name": "wind"}\n{"prompt": "rain", "name": "rain"}\n')
    out, asked = tmp_path / "out", ("--prompts", "list.jsonl", "-o", "out", "--spectrogram")
    out.mkdir()
    for name in ("rain.wav", "rain.png", "manifest.jsonl"):
        (out / name).write_bytes(b"mine")
        assert tango(*asked) == 2
        assert str(Path("out") / name) in (line := capsys.readouterr().err) and "--overwrite" in line
        assert bytes_of(out) == {name: b"mine"}
        (out / name).unlink()

    # a sound of the same form, beside a manifest
    Path("one.jsonl").write_text('{"prompt": "wind", "name": "wind"}\n')
    assert tango("--prompts", "one.jsonl", "-o", "out") == 0
    assert tango("another", "-o", "out/rain.wav") == 0
    before = bytes_of(out)
    assert tango("--prompts", "list.jsonl", "-o", "out") == 2
    assert "out/rain.wav is there already and this command has no record" in capsys.readouterr().err
    assert bytes_of(out)["rain.wav"] == before["rain.wav"]
    wavfile.write(out / "rain.wav", 16000, np.zeros(1601 + 16, np.int16))
    assert tango("--prompts", "list.jsonl", "-o", "out", "--model", "no/model") != 0
    assert tango("--prompts", "list.jsonl", "-o", "out") == 2  # of another length: before anything is loaded
    assert "sounds to make" not in capsys.readouterr().err
    assert tango("--prompts", "list.jsonl", "-o", "out", "--overwrite") == 0
    assert bytes_of(out)["rain.wav"] not in (before["rain.wav"], b"mine")
    assert [record["file"] for record in records_of(out)] == ["wind.wav", "rain.wav"]


def test_a_manifest_of_others_is_kept(tango, tmp_path, capsys):
    Path("list.txt").write_text("rain\n")
    (tmp_path / "out").mkdir()
    content = '{"location": "a.wav", "captions": "a dog"}\n'.encode()
    (tmp_path / "out" / "manifest.jsonl").write_bytes(content)
    assert tango("--prompts", "list.txt", "-o", "out") == 2
    assert "manifest.jsonl, line 1, is no record of a sound" in capsys.readouterr().err
    assert bytes_of(tmp_path / "out") == {"manifest.jsonl": content}


def test_a_run_killed_between_a_record_and_its_sound_is_finished(tango, tmp_path, monkeypatch):
    Path("list.txt").write_text("rain\nwind\n")
    asked = ("--prompts", "list.txt", "-o", "out", "--spectrogram")
    assert tango(*asked) == 0
    whole = bytes_of(tmp_path / "out")
    for number in range(1, 5):  # killed at each renaming in turn
        Path("out").rename(f"kept{number}")
        count = [0]

        def kill(*names, replace=os.replace, number=number, count=count):
            count[0] += not str(names[1]).endswith("manifest.jsonl")
            if count[0] == number:
                raise SystemExit(9)
            replace(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", kill)
            assert tango(*asked) == 9
        assert all(record["file"] for record in records_of(tmp_path / "out"))
        assert tango(*asked) == 0
        assert bytes_of(tmp_path / "out") == whole


def test_names_that_the_command_makes_up_are_not_replaced(tango, tmp_path, capsys):
    Path("rain-2.wav").write_bytes(b"mine")
    assert tango("rain", "-o", "rain.wav", "--takes", 3) == 2
    assert "rain-2.wav is there already" in capsys.readouterr().err
    assert bytes_of(tmp_path) == {"rain-2.wav": b"mine"}
    assert tango("rain", "-o", "rain.wav", "--takes", 3, "--overwrite") == 0
    Path("a.png").write_bytes(b"mine")
    assert tango("rain", "-o", "a.wav", "--spectrogram") == 2
    assert "a.png is there already" in capsys.readouterr().err and not Path("a.wav").exists()
    assert tango("rain", "-o", "b.wav", "--spectrogram", "a.png") == 0  # whose name was given
    assert Path("a.png").read_bytes() != b"mine"
    assert tango("rain", "-o", "a.wav", "--spectrogram", "--seed", 1) == 0  # an earlier one of the command's


def test_processes_that_know_nothing_of_each_other_lose_nothing(tango, tiny_folder, tmp_path):
    Path("list.txt").write_text("rain\nwind\nsea\n")
    asked = ["--model", str(tiny_folder), *QUICK, "--prompts", str(tmp_path / "list.txt"), "--steps", "30"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline_tango", *asked, "-o", str(tmp_path / "three")],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    told = [run.communicate(timeout=300)[1] for run in runs]
    assert 0 in [run.returncode for run in runs]
    for run, text in zip(runs, told):
        last = text.splitlines()[-1]
        assert run.returncode == 0 or (run.returncode == 2 and "another run is making sounds in" in last), text
    assert main([*asked, "-o", "one"]) == 0
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")


def test_a_folder_is_locked_by_a_run_and_not_by_a_killed_one(tango, tmp_path, capsys):
    Path("list.txt").write_text("rain\n")
    with locked(tmp_path / "out"):
        assert tango("--prompts", "list.txt", "-o", "out") == 2
        assert f"(process {os.getpid()} on " in capsys.readouterr().err
        assert os.listdir("out") == [".tango.lock"]
    assert os.listdir("out") == []
    (tmp_path / "out" / ".tango.lock").write_text("process 1 on nowhere")  # as SIGKILL leaves it
    assert tango("--prompts", "list.txt", "-o", "out") == 0
    assert sorted(os.listdir("out")) == ["00001.wav", "manifest.jsonl"]


def test_an_interrupted_constructor_leaves_no_traceback(tiny_folder, monkeypatch, capsys):
    class Bar:
        def __init__(self):
            raise KeyboardInterrupt(15)

        def __del__(self):
            del self.position

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda each: unraisable.append(each.exc_type))
    monkeypatch.setattr("pipeline_tango.__main__.make_sounds", lambda *_: Bar())
    assert main(["rain", "--model", str(tiny_folder)]) == 143
    assert capsys.readouterr().err == "stopped\n" and not unraisable
    with pytest.raises(KeyboardInterrupt):
        Bar()
    gc.collect()
    assert unraisable == [AttributeError]  # as it is elsewhere


def test_sigterm_leaves_whole_sounds_only(tiny_folder, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "rain"}\n{"prompt": "long", "steps": 900, "seconds": 5}\n')
    asked = ["--model", str(tiny_folder), *QUICK, "--prompts", str(tmp_path / "list.jsonl")]
    run = subprocess.Popen(
        [sys.executable, "-m", "pipeline_tango", *asked, "-o", str(tmp_path / "out")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while run.poll() is None and not (tmp_path / "out" / "00001.wav").exists():
        time.sleep(0.01)
    run.terminate()
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 143 and told.splitlines()[-1] == "stopped" and "Traceback" not in told
    assert sorted(os.listdir(tmp_path / "out")) == ["00001.wav", "manifest.jsonl"]
    assert len(records_of(tmp_path / "out")) == 1


def test_two_processes_share_a_list(tango, tiny_folder, tmp_path):
    Path("list.txt").write_text("rain\nwind\nsea\n")
    asked = ["--model", str(tiny_folder), *QUICK, "--prompts", str(tmp_path / "list.txt"), "--takes", "2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    together = subprocess.run(
        [*launch, "-m", "pipeline_tango", *asked, "-o", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert together.returncode == 0 and "by 2 processes" in together.stderr, together.stderr
    assert main([*asked, "-o", "one"]) == 0
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


def test_ctrl_c_leaves_whole_sounds_only(tango, tmp_path, capsys):
    Path("list.jsonl").write_text('{"prompt": "rain"}\n{"prompt": "a long one", "steps": 900, "seconds": 5}\n')
    manifest = tmp_path / "out" / "manifest.jsonl"
    stopped = threading.Event()

    def interrupt_the_second():
        while not (manifest.exists() and manifest.read_text().endswith("}\n")):
            time.sleep(0.01)
        while not stopped.is_set():  # again, as a user would: an exception in a destructor goes by unseen
            os.kill(os.getpid(), signal.SIGINT)
            stopped.wait(5)

    thread = threading.Thread(target=interrupt_the_second, daemon=True)
    thread.start()
    try:
        code = tango("--prompts", "list.jsonl", "-o", "out")
    finally:
        stopped.set()
        thread.join()
    assert code == 130
    assert sorted(os.listdir("out")) == ["00001.wav", "manifest.jsonl"]
    assert [record["file"] for record in records_of(tmp_path / "out")] == ["00001.wav"]
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"


def test_spectrogram_goes_where_asked(tango, tmp_path):
    assert tango("rain", "--spectrogram", "-o", "a.wav") == 0
    assert tango("rain", "-o", "b.wav", "--spectrogram", "pictures/seen.png") == 0
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "a.wav", "b.wav", "seen.png"]


# Sound in


def tone(num_samples=4000, rate=16000):
    return 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) + 0.01


def test_other_files_are_read_by_soundfile_or_say_what_they_need(tmp_path, error_of, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "tone.flac", tone(), 16000)
    read, sampling_rate = read_audio(tmp_path / "tone.flac")
    assert sampling_rate == 16000 and np.abs(read[0] - tone()).max() < 1e-4
    monkeypatch.setattr("pipeline_tango.sound_files.find_spec", lambda name: None)
    status, line = error_of("rain", "--model", "x", "--audio", tmp_path / "tone.flac")
    assert status == 2 and 'pip install "pipeline-tango[demo]"' in line


def test_a_stretch_of_a_file_is_made_anew(tango, pipe):
    wavfile.write("tone.wav", 16000, tone().astype(np.float32))
    assert tango("rain", "--audio", "tone.wav", "--mask", "0.1-0.15", "--seconds", 0.25, "--seed", 3) == 0
    made = wavfile.read("tango.wav")[1] / 32768
    options = {"generator": torch.Generator().manual_seed(3), "num_inference_steps": 2, "mask": [(0.1, 0.15)]}
    expected = pipe("rain", audio=tone().astype(np.float32), audio_sampling_rate=16000, **options).audios[0]
    assert np.abs(made - expected).max() < 1e-4
    assert np.abs(made - tone())[:1200].max() < 1e-4 < np.abs(made - tone())[1600:2400].max()


def test_length_follows_the_file_unless_told(tango, tiny_folder):
    wavfile.write("tone.wav", 22050, tone(4410, 22050).astype(np.float32))  # 0.2 s
    command = ("rain", "--model", tiny_folder, "--steps", 4, "--device", "cpu", "--audio", "tone.wav", "--quiet")
    for flags, num_samples in (
        ((), 3200),
        (("--strength", 0.5), 3200),
        (("--continue", 0.1), 4800),
        (("--seconds", 0.4), 6400),
        (("--seconds", 0.1, "--strength", 0.5), 1600),
        (("--frequency_mask", "4000-8000"), 3200),
    ):
        assert main([str(each) for each in (*command, *flags)]) == 0
        assert len(wavfile.read("tango.wav")[1]) == num_samples


def test_a_list_made_from_a_sound_says_so_in_its_manifest(tango, tmp_path, capsys):
    wavfile.write("tone.wav", 16000, tone(1600).astype(np.float32))
    Path("list.txt").write_text("rain\nwind\n")
    asked = ("--prompts", "list.txt", "-o", "out", "--audio", "tone.wav", "--steps", 4)
    assert tango(*asked, "--strength", 0.5, "--batch_size", 2) == 0
    records = records_of(tmp_path / "out")
    assert [(r["audio"], r["strength"], r["mask"]) for r in records] == [("tone.wav", 0.5, None)] * 2
    before = bytes_of(tmp_path / "out")
    assert tango(*asked, "--strength", 0.5) == 0 and bytes_of(tmp_path / "out") == before
    assert tango(*asked, "--strength", 0.75) == 2
    assert "was made with strength 0.5, not 0.75" in capsys.readouterr().err
    assert tango(*asked[:4], "--steps", 4) == 2
    assert "was made with audio 'tone.wav', not None" in capsys.readouterr().err


def test_what_the_pipeline_refuses_is_told_in_one_line(tango, capsys):
    wavfile.write("tone.wav", 16000, tone().astype(np.float32))
    wavfile.write("silence.wav", 16000, np.zeros(4000, np.int16))
    for arguments, message in (
        (("--audio", "tone.wav", "--mask", "0.2-0.3", "--seconds", 0.25), "`mask` region (0.2, 0.3)"),
        (("--audio", "tone.wav", "--mask", "0.1-0.2,0.15-0.22", "--seconds", 0.25), "`mask` regions overlap"),
        (("--audio", "silence.wav"), "`audio` is silent"),
        (("--audio", "tone.wav", "--strength", 0.1), "`strength` 0.1 leaves none"),
    ):
        assert tango("rain", *arguments) == 1
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("tango.wav").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strength", "0.5"], "--strength needs a sound to start from"),
        (["--mask", "1-2"], "--mask needs a sound to start from"),
        (["--continue", "1"], "--continue needs a sound to start from"),
        (["--audio", "missing.wav"], "cannot read the sound missing.wav"),
        (["--audio", "folder"], "cannot read the sound folder"),
        (["--audio", "empty.wav"], "cannot read the sound empty.wav"),
        (["--audio", "cut.wav"], "cannot read the sound cut.wav"),
        (["--audio", "none.wav"], "the sound none.wav is empty"),
        (["--audio", "tone.wav", "--strength", "0"], "strength must be a number"),
        (["--audio", "tone.wav", "--strength", "nan"], "strength must be a number"),
        (["--audio", "tone.wav", "--continue", "-1"], "continue must be a number of seconds"),
        (["--audio", "tone.wav", "--continue", "1", "--seconds", "2"], "either --continue"),
        (["--audio", "tone.wav", "--mask", "2"], "mask must be regions in seconds"),
        (["--audio", "tone.wav", "--mask", "1-2;3-4"], "mask must be regions in seconds"),
        (["--audio", "tone.wav", "--mask", "-1-2"], "expected one argument"),
        (["--audio", "tone.wav", "--frequency_mask", "low-high"], "frequency_mask must be regions in Hz"),
        (["--audio", "tone.wav", "--frequency_mask", "0-100,200-300"], "frequency_mask must be one band"),
    ],
)
def test_a_wrong_sound_to_start_from_is_told_in_one_line(error_of, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty.wav").write_bytes(b"")
    wavfile.write("tone.wav", 16000, tone().astype(np.float32))
    wavfile.write("none.wav", 16000, np.zeros(0, np.float32))
    Path("cut.wav").write_bytes(Path("tone.wav").read_bytes()[:20])
    files = sorted(os.listdir())
    status, line = error_of("rain", "--model", "x", *arguments)
    assert status == 2 and message in line
    assert sorted(os.listdir()) == files


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give either a prompt or --prompts"),
        (["rain", "--prompts", "list.txt"], "give either a prompt or --prompts"),
        (["  "], "prompt must be a text that is not empty"),
        (["\udcff"], "prompt must be a text"),
        (["rain", "--seconds", "0"], "seconds must be a number of seconds"),
        (["rain", "--seconds", "nan"], "seconds must be a number of seconds"),
        (["rain", "--seconds", "long"], "invalid float value"),
        (["rain", "--steps", "0"], "steps must be a whole number"),
        (["rain", "--steps", "1.5"], "invalid int value"),
        (["rain", "--guidance", "-1"], "guidance must be a number"),
        (["rain", "--seed", "-1"], "seed must be a whole number"),
        (["rain", "--takes", "0"], "takes must be"),
        (["rain", "--batch_size", "0"], "batch_size must be"),
        (["rain", "--scheduler", "flow"], "invalid choice: 'flow'"),
        (["rain", "--dtype", "int8"], "invalid choice"),
        (["rain", "--guidance_interval", "0.5"], "guidance_interval must be such as 0.25-0.75"),
        (["rain", "--guidance_interval", "0.7-0.2"], "guidance_interval must ascend from 0 to 1"),
        (["rain", "--guidance_interval", "0-2"], "guidance_interval must ascend from 0 to 1"),
        (["rain", "--deep_cache", "0"], "deep_cache must be a whole number from 1"),
        (["rain", "--device", "tpu"], "device must be cpu"),
        (["rain", "--device", "cuda:99"], "device cuda:99 is not there"),
        (["rain", "--device", "cpu", "--cpu_offload"], "needs an accelerator"),
        (["rain", "-o", "rain.mp3"], "must end in .wav"),
        (["rain", "-o", "folder.wav"], "is a folder"),
        (["rain", "-o", "file.txt/rain.wav"], "cannot write"),
        (["rain", "-o", "x" * 300 + ".wav"], "cannot write"),
        (["rain", "--spectrogram", "a.jpg"], "ends in .png"),
        (["rain", "--spectrogram", "a.png", "--takes", "2"], "one PNG cannot hold several"),
        (["rain", "thunder"], "unrecognized arguments: thunder"),
        (["rain", "--step", "3"], "unrecognized arguments"),
        (["--prompts", "list.txt"], "give a folder for them with -o"),
        (["--prompts", "list.txt", "-o", "file.txt"], "cannot write"),
        (["--prompts", "missing.txt", "-o", "out"], "cannot read the list missing.txt"),
        (["--prompts", "folder.wav", "-o", "out"], "cannot read the list"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(error_of, tiny_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("rain\n")
    Path("file.txt").write_text("")
    Path("folder.wav").mkdir()
    status, line = error_of("--model", tiny_folder, *arguments)
    assert status == 2 and message in line
    assert sorted(os.listdir()) == ["file.txt", "folder.wav", "list.txt"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no prompt in the list"),
        (b"# only\n\n", "no prompt in the list"),
        (b"\xff\xfe", "cannot read the list"),
        (b'{"prompt": "rain"}\nwind\n', "line 2: not JSON"),
        (b'{"prompt": "rain"}\n[1]\n', "line 2: not a JSON object"),
        (b'\n{"seed": 1}\n', "line 2: no prompt"),
        (b'{"prompt": ""}', "line 1: prompt must be"),
        (b'{"prompt": ["rain"]}', "line 1: prompt must be"),
        (b'{"prompt": "\\ud800"}', "line 1: prompt must be"),
        (b'{"prompt": "rain", "steps": true}', "line 1: steps must be"),
        (b'{"prompt": "rain", "seconds": Infinity}', "line 1: seconds must be"),
        (b'{"prompt": "rain", "seed": 1.0}', "line 1: seed must be"),
        (b'{"prompt": "rain", "seed": 9223372036854775808}', "line 1: seed must be"),
        (b'{"prompt": "rain", "length": 3}', "line 1: unknown ['length']"),
        (b'{"prompt": "rain", "name": "../rain"}', "line 1: name must be"),
        (b'{"prompt": "rain", "name": "a"}\n{"prompt": "rain", "name": "A"}', "line 2: name 'A' was used before"),
        (b'{"prompt": "rain", "name": "00002"}\n{"prompt": "rain"}', "line 2: name '00002' was used before"),
    ],
)
def test_a_wrong_list_is_told_with_its_line(error_of, tiny_folder, tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    status, line = error_of("--prompts", path, "--model", tiny_folder, "-o", tmp_path / "out")
    assert status == 2 and message in line
    assert os.listdir(tmp_path) == ["list.txt"]


def test_a_model_that_is_not_there_is_told_in_one_line(error_of, tiny_folder, tmp_path):
    assert "--model must be" in error_of("rain", "--model", "")[1]
    status, line = error_of("rain", "--model", tmp_path / "missing")
    assert status == 1 and "no model in" in line and "model_index.json" in line
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_bytes((tiny_folder / "model_index.json").read_bytes())
    status, line = error_of("rain", "--model", broken, "-o", tmp_path / "rain.wav", "--quiet")
    assert status == 1 and "cannot load" in line
    assert sorted(os.listdir(tmp_path)) == ["broken"]


def test_an_empty_lora_or_variant_is_an_error_as_an_empty_model_is(error_of, tiny_folder, tmp_path):
    for flag in ("--lora", "--variant"):
        status, line = error_of("rain", "--model", tiny_folder, flag, "", "-o", tmp_path / "rain.wav")
        assert status == 2 and f"{flag} must be" in line
    assert not os.listdir(tmp_path)


def test_a_model_of_another_pipeline_is_called_by_its_class(error_of, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("TangoPipeline", "AudioLDMPipeline"))
    status, line = error_of("rain", "--model", folder, "-o", tmp_path / "rain.wav")
    assert status == 1 and "is of the class AudioLDMPipeline, not TangoPipeline" in line and "no model" not in line


def test_the_only_variant_of_a_folder_is_loaded_and_others_by_name(error_of, pipe, tmp_path, capsys):
    quick = ["--steps=2", "--seconds=0.1", "--seed=0", "--dtype=float32"]
    folder = tmp_path / "model"
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    assert main(["rain", f"--model={folder}", *quick, f"-o={tmp_path / 'a.wav'}"]) == 0
    assert main(["rain", f"--model={folder}", *quick, f"-o={tmp_path / 'b.wav'}", "--variant=fp16"]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    status, line = error_of("rain", "--model", folder, "--variant=bf16", "-o", tmp_path / "c.wav", "--quiet")
    assert status == 1 and "no weights of `variant` 'bf16', only fp16" in line


def test_a_full_disk_leaves_nothing(tango, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    Path("old.wav").write_bytes(b"kept")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write past 1000 bytes fails
    try:
        status = tango("rain", "-o", "old.wav")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert status == 1 and "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert bytes_of(tmp_path) == {"old.wav": b"kept"}


@pytest.mark.parametrize("fails", ["manifest", "sound"])
def test_a_disk_that_fills_up_in_a_list_leaves_whole_sounds_and_is_resumed(
    tango, tmp_path, capsys, monkeypatch, fails
):
    Path("list.txt").write_text("rain\nwind\n")
    asked = ("--prompts", "list.txt", "-o", "out")

    def full(records, encode=encode_manifest):
        if records and isinstance(records, list) and records[0]["file"] == "00002.wav":
            raise OSError(28, "No space left on device")
        return encode(records)

    def no_room(audio, rate, count=[]):
        count.append(1)
        if len(count) == 2:
            raise OSError(28, "No space left on device")
        return encode_wav(audio, rate)

    with monkeypatch.context() as patch:
        if fails == "manifest":
            patch.setattr("pipeline_tango.sound_folder.encode_manifest", full)
        else:
            patch.setattr("pipeline_tango.__main__.encode_wav", no_room)
        assert tango(*asked) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert sorted(os.listdir("out")) == ["00001.wav", "manifest.jsonl"]
    assert tango(*asked) == 0 and len(records_of(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), ImportError("x"), AssertionError(), ZeroDivisionError()]
)
def test_whatever_a_library_raises_is_one_line(tango, monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("pipeline_tango.__main__.load_pipeline", fail)
    assert tango("rain", "--quiet") == 1
    assert capsys.readouterr().err in (f"error: {error}\n", f"error: {type(error).__name__}\n")


def test_a_closed_standard_error_stops_nothing(tango, monkeypatch):
    closed = open(os.devnull, "w")
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert main(["--steps", "0", "rain"]) == 2


def test_channels_that_cancel_are_not_called_silent(tango, capsys):
    wavfile.write("wide.wav", 16000, np.stack([tone(), -tone()], axis=1).astype(np.float32))
    assert tango("rain", "--audio", "wide.wav") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "2 channels, of peak 0.3, that cancel each other when they are averaged" in line and "silent" not in line


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "length in seconds" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tango {__version__}\n"


def test_a_wrong_command_line_does_not_import_torch():
    script = "import sys; from pipeline_tango.__main__ import main; print(main([]), 'torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert made.stdout == "2 False\n", made


FLAGS = ["--seconds", "--steps", "--takes", "--seed", "--guidance", "--prompts", "-o", "--spectrogram", "--device"]
FLAGS += ["--fast", "--student", "--no_student", "--guidance_interval", "--deep_cache"]
FLAGS += ["--audio", "--strength", "--mask", "--continue", "--frequency_mask"]
FLAGS += ["--negative_prompt", "--scheduler", "--dtype", "--quiet", "--overwrite", "--batch_size", "--help", "--", "-"]
VALUES = ["0", "1", "2", "-1", "0.05", "nan", "1e999", "9" * 30, "rain", "a.wav", "a.png", "list", "out", "cpu", "lcm"]
VALUES += ["tone", "0.01-0.05", "0.5"]
ANY_TEXT = st.text(st.characters(exclude_characters="/"), max_size=8)
FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@settings(max_examples=60, **FUZZ)
@given(st.lists(st.one_of(st.sampled_from(FLAGS), st.sampled_from(VALUES), ANY_TEXT), max_size=6))
def test_no_command_line_raises_or_leaves_partial_files(tango, arguments):
    Path("list").write_text("rain\nwind\n")
    Path("tone").write_bytes(encode_wav(tone(1600), 16000))
    assert tango(*arguments) in (0, 1, 2)
    assert not list(Path().rglob("*.part"))
    for path in Path().rglob("*.wav"):
        assert len(wavfile.read(path)[1]) > 0


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT, st.lists, max_leaves=3)
NAMES = st.sampled_from(["prompt", "captions", "negative_prompt", "seconds", "steps", "guidance", "seed", "name", "x"])
LISTS = st.one_of(
    st.binary(max_size=40),
    st.lists(st.dictionaries(NAMES, JSON, max_size=3).map(json.dumps), max_size=3).map("\n".join).map(str.encode),
)


PROMPTS = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1, max_size=20)
REQUESTS = st.lists(
    st.fixed_dictionaries(
        {"prompt": PROMPTS.map(str.strip).filter(lambda text: text and text[0] not in "#{")},
        optional={
            "seconds": st.floats(0.001, 86400),
            "steps": st.integers(1, 1000),
            "guidance": st.floats(0, 1000),
            "seed": st.integers(0, 2**63 - 1),
        },
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=100, **FUZZ)
@given(REQUESTS)
def test_a_list_is_the_same_in_every_format(tmp_path, requests):
    expected = [{**request, "name": f"{number:05d}"} for number, request in enumerate(requests, 1)]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, requests)), "utf-8")
    assert read_prompts(str(tmp_path / "list.jsonl")) == expected
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"list{suffix}", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["seed", "steps", "prompt", "seconds", "guidance"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(requests)
        assert read_prompts(str(tmp_path / f"list{suffix}")) == expected
    (tmp_path / "list.txt").write_text("\n".join(request["prompt"] for request in requests), "utf-8")
    assert [request["prompt"] for request in read_prompts(str(tmp_path / "list.txt"))] == [
        request["prompt"] for request in requests
    ]


@settings(max_examples=150, **FUZZ)
@given(LISTS)
def test_no_list_raises_or_leaves_files(tmp_path, content):
    path = tmp_path / "list"
    path.write_bytes(content)
    assert main(["--prompts", str(path), "--model", str(tmp_path / "missing"), "-o", str(tmp_path / "out")]) in (1, 2)
    assert os.listdir(tmp_path) == ["list"]
