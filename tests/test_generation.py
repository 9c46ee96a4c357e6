import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import read_results, sounds_of
from scipy.io import wavfile


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]


def test_a_killed_run_goes_on_to_the_same_bits(measure, short_folder, recordings, tmp_path):
    flags = ("--model", short_folder, "--prompts", recordings, "--num_inference_steps=2", "--batch_size=4")
    flags += ("--num_takes=2", "--listener=yamnet")
    whole = sounds_of(measure(*flags, output="whole"))
    assert len(whole) == 12 and len(set(whole.values())) == 12
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    [folder] = (tmp_path / "killed" / "sounds").iterdir()
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    # killed in the middle of a batch: a line cut short, a sound whose line is missing, and some of neither
    (folder / "manifest.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    for line in lines[7:]:
        (folder / json.loads(line)["file"]).unlink()
    (folder / json.loads(lines[2])["file"]).unlink()
    assert sounds_of(measure(*flags, output="killed")) == whole
    records = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert {record["file"] for record in records} == {path.name for path in whole}
    # more takes are added to those that are there, and what is there stays untouched
    modified = {path: (tmp_path / "killed" / path).stat().st_mtime_ns for path in whole}
    more = sounds_of(measure(*flags, "--num_takes=3", output="killed"))
    assert len(more) == 18 and {path: more[path] for path in whole} == whole
    assert {path: (tmp_path / "killed" / path).stat().st_mtime_ns for path in whole} == modified


def test_the_batch_size_changes_no_more_than_rounding(measure, short_folder, recordings):
    flags = ("--model", short_folder, "--prompts", recordings, "--num_inference_steps=3")
    folders = [measure(*flags, f"--batch_size={size}", output=f"batch-{size}") for size in (1, 5)]
    for path in sounds_of(folders[0]):
        first, second = (wavfile.read(folder / path)[1].astype(int) for folder in folders)
        assert np.abs(first - second).max() <= 2, path  # of 32768
    assert len(sounds_of(folders[0])) == 6


def test_two_processes_make_the_same_bits(measure, short_folder, recordings, yamnet_folder, tmp_path):
    flags = ["--model", short_folder, "--prompts", recordings, "--num_inference_steps=2", "--batch_size=2"]
    one = sounds_of(measure(*flags, output="one"))
    flags += [f"--yamnet_weights={yamnet_folder}", f"--output_dir={tmp_path / 'two'}", "--num_resamples=20"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
            "-m",
            "training.evaluate",
        ]
        + [str(flag) for flag in [*flags, f"--references={recordings}"]],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert sounds_of(tmp_path / "two") == one
    figures = [read_results(tmp_path / run) for run in ("one", "two")]
    assert [row["value"] for row in figures[0]] == [row["value"] for row in figures[1]]


def test_sounds_made_in_another_way_are_never_mixed(measure, short_folder, recordings, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two sounds\nrain\n\nwind\n")
    flags = ("--model", short_folder, "--prompts", prompts, "--num_inference_steps=1")
    before = sounds_of(measure(*flags, references=None))
    assert {path.name for path in before} == {"00002-1.wav", "00004-1.wav"}
    measure(*flags, "--seed=1", "--num_takes=2", references=None, status=1)
    assert "were made with seed 0, not 1: give another folder" in capsys.readouterr().err
    prompts.write_text("# two sounds\nsnow\n\nwind\n")
    measure(*flags, references=None, status=1)
    assert "was made for 'rain', not 'snow'" in capsys.readouterr().err
    assert sounds_of(tmp_path / "out") == before
