import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState
from evaluation_runs import read_results, sounds_of
from scipy.io import wavfile

from pipeline_tango.sound_folder import locked
from training.evaluation.generation import GenerationSettings, find_missing, generate, plan_sweep
from training.evaluation.items import Item


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
    measure(*flags, "--seed=1", references=None, status=1)  # with no sound left to make
    assert "were made with seed 0, not 1: give another folder" in capsys.readouterr().err
    prompts.write_text("# two sounds\nsnow\n\nwind\n")
    measure(*flags, references=None, status=1)
    assert "was made for 'rain', not 'snow'" in capsys.readouterr().err
    assert sounds_of(tmp_path / "out") == before


def test_a_model_is_sampled_with_its_own_steps_and_guidance_where_nothing_is_said(
    measure, short_folder, recordings, tmp_path
):
    folder = Path(shutil.copytree(short_folder, tmp_path / "model"))
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"default_num_inference_steps": 2, "default_guidance_scale": 1.5}
    (folder / "model_index.json").write_text(json.dumps(index))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\nwind\n")
    flags = ("--model", folder, "--prompts", prompts)
    own = measure(*flags, references=None)
    [sounds] = (own / "sounds").iterdir()
    assert sounds.name == "model-own-2-g1.5"
    settings = json.loads((sounds / "settings.json").read_text())
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (2, 1.5)
    text = (own / "results.md").read_text()
    assert f"- Not asked for, so the models' own: {folder} num_inference_steps 2, guidance_scale 1.5." in text
    asked = measure(*flags, "--num_inference_steps=2", "--guidance_scale=1.5", references=None, output="asked")
    assert sounds_of(asked) == sounds_of(own) and "Not asked for" not in (asked / "results.md").read_text()


def test_own_values_of_each_model_are_swept_and_older_models_have_tangos(tmp_path):
    for name, values in (("old", {}), ("new", {"default_num_inference_steps": 20, "default_guidance_scale": 4.0})):
        (tmp_path / name / "scheduler").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": "TangoPipeline", **values}))
        (tmp_path / name / "scheduler" / "scheduler_config.json").write_text("{}")
    models = {name: str(tmp_path / name) for name in ("old", "new")}
    names = [system.name for system in plan_sweep(models, ["own"], None, None, tmp_path)]
    assert names == ["old-own-100-g3", "new-own-20-g4"]
    names = [system.name for system in plan_sweep(models, ["lcm"], None, None, tmp_path)]
    assert names == ["old-lcm-50-g3", "new-lcm-20-g4"]  # as many as it can take
    names = [system.name for system in plan_sweep(models, ["own"], [4, 8], None, tmp_path)]
    assert names == ["old-own-4-g3", "old-own-8-g3", "new-own-4-g4", "new-own-8-g4"]


def test_what_users_put_into_a_folder_of_sounds_is_neither_read_nor_removed(
    measure, short_folder, recordings, tmp_path, capsys
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\n")
    flags = ("--model", short_folder, "--prompts", prompts, "--num_inference_steps=1")
    before = sounds_of(measure(*flags, references=None))
    [folder] = (tmp_path / "out" / "sounds").iterdir()
    (folder / "notes.ogg").mkdir()
    (folder / "keep.txt").write_text("mine")
    with open(folder / "manifest.jsonl", "a") as file:
        file.write('[1]\n{"file": ["x"]}\n{"file": "00001-1.wav.bak"}\n{"file": "cut')
    assert sounds_of(measure(*flags, references=None)) == before
    assert (folder / "keep.txt").read_text() == "mine" and (folder / "notes.ogg").is_dir()
    (folder / "settings.json").write_text('{"weights": "ab')
    (folder / "00001-1.wav").unlink()
    measure(*flags, references=None, status=1)
    error = capsys.readouterr().err
    assert f"--output_dir: {folder / 'settings.json'} is not JSON" in error and "give another folder" in error


def test_files_of_others_and_folders_in_use_are_refused(short_folder, tmp_path):
    [system] = plan_sweep({"a": str(short_folder)}, ["own"], [1], [3.0], tmp_path / "sounds")
    prompts, settings = [Item("rain", "rain")], GenerationSettings()
    system.folder.mkdir(parents=True)
    (system.folder / "rain-1.wav").write_bytes(b"mine")
    with pytest.raises(ValueError, match="rain-1.wav is there already and was not made by this command"):
        find_missing(system, prompts, settings)
    (system.folder / "settings.json").write_text("{}")  # left by an interrupted run, with a sound without its record
    assert find_missing(system, prompts, settings) == [[(prompts[0], 1)]]
    with locked(tmp_path / "sounds"), pytest.raises(ValueError, match="another run is making sounds in"):
        generate([system], prompts, settings, PartialState(cpu=True), "cpu")
    assert sorted(os.listdir(tmp_path / "sounds")) == [system.name]
