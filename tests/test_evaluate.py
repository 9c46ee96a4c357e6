import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import PartialState
from conftest import build_components
from savedmodel import random_weights, write_yamnet
from scipy.io import wavfile

from pipeline_tango import TangoPipeline
from training.evaluate import main
from training.evaluation.items import Item, group_of, read_generated, read_items, short_names
from training.evaluation.listeners import load_listener
from training.evaluation.measuring import Classes, best_of, candidate_counts, set_level


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]
NAMES = ("rain", "thunder", "birds", "cow", "saw", "wind")
CAPTIONS = {
    "rain": "rain falls while a dog barks",
    "thunder": "thunder",
    "birds": "birds sing, then a door closes",
    "cow": "a cow",
    "saw": "a saw",
    "wind": "wind before rain",
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tango"
    TangoPipeline(**build_components(), default_audio_length_in_s=0.32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def yamnet_folder(tmp_path_factory):
    return write_yamnet(tmp_path_factory.mktemp("yamnet") / "yamnet_base", random_weights())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Manifest of six short recordings with captions, a class of the listener as label, and a place."""
    folder = tmp_path_factory.mktemp("recordings")
    lines = []
    for i, name in enumerate(NAMES):
        waveform, rate = soundfile.read(ROOT / "examples" / "sounds" / f"{name}.flac", frames=12000)
        soundfile.write(folder / f"{name}.wav", waveform, rate)
        line = {
            "location": f"{name}.wav",
            "captions": CAPTIONS[name],
            "place": "field" if name in ("cow",) else "town",
        }
        lines.append(json.dumps(line | {"labels": f"/m/{i:05d}" + (",/m/00500" if i % 2 else "")}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


@pytest.fixture
def measure(yamnet_folder, recordings, tmp_path):
    """Run the command with what all runs have in common."""

    def run(*flags, output="out", status=0, references=recordings):
        PartialState._reset_state()
        flags = [*flags, f"--output_dir={tmp_path / output}", f"--yamnet_weights={yamnet_folder}"]
        flags += [f"--references={references}"] if references else []
        assert main([str(flag) for flag in [*flags, "--num_resamples=20", "--device=cpu"]]) == status
        return tmp_path / output

    return run


def read_results(folder, table="results"):
    """Rows by system and metric."""
    with open(folder / f"{table}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("value", "low", "high", "difference", "probability_that_system_is_better"):
            if name in row:
                row[name] = float(row[name]) if row[name] else math.nan
    return rows


def value_of(rows, metric, **columns):
    [row] = [row for row in rows if row["metric"] == metric and all(row[k] == v for k, v in columns.items())]
    return row["value"]


def copy_recordings(recordings, folder, sources=NAMES):
    """The recordings as if they had been generated, the sound of `sources[i]` under the i-th name."""
    folder.mkdir()
    for name, source in zip(NAMES, sources, strict=True):
        shutil.copy(recordings.parent / f"{source}.wav", folder / f"{name}.wav")
    return folder


def sounds_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "sounds").rglob("*.wav"))}


# Measuring folders


def test_recordings_taken_for_generated_are_perfect(measure, recordings, tmp_path):
    folder = copy_recordings(recordings, tmp_path / "copies")
    rows = read_results(measure("--generated", folder, "--prompts", recordings, "--recall_k=521"))
    system = {"system": "copies"}
    assert value_of(rows, "frechet", **system) == pytest.approx(0, abs=1e-9)
    assert value_of(rows, "kl_softmax", **system) == pytest.approx(0, abs=1e-3)
    assert value_of(rows, "kl_sigmoid", **system) == pytest.approx(0, abs=1e-6)
    assert value_of(rows, "recall", **system) == 1  # all classes are among the 521 best
    assert value_of(rows, "frechet", system="real recordings (one half of the references against the other)") > 0
    assert not (tmp_path / "out" / "problems.json").exists()
    text = (tmp_path / "out" / "results.md").read_text()
    assert "only 6 prompts" in text and "singular" in text and "sha256" in text


def test_sounds_are_paired_by_their_names_and_never_by_order(measure, recordings, tmp_path):
    turned = copy_recordings(recordings, tmp_path / "turned", NAMES[1:] + NAMES[:1])
    rows = read_results(measure("--generated", turned, "--prompts", recordings))
    assert value_of(rows, "frechet", system="turned") == pytest.approx(0, abs=1e-9)  # the same set
    assert value_of(rows, "kl_sigmoid", system="turned") > 0.1  # but none is its own reference


def test_what_is_unpaired_or_broken_is_named(measure, recordings, tmp_path, caplog):
    folder = copy_recordings(recordings, tmp_path / "some")
    (folder / "cow.wav").rename(folder / "extra.wav")
    (folder / "saw.wav").write_bytes(b"RIFF")
    wavfile.write(folder / "wind.wav", 16000, np.zeros(4000, np.int16))
    rows = read_results(measure("--generated", folder, "--prompts", recordings))
    problems = json.loads((tmp_path / "out" / "problems.json").read_text())
    named = {(each.get("id") or Path(each["path"]).stem, each["reason"].split(" (")[0]) for each in problems}
    assert named == {
        ("saw", "unreadable"),
        ("wind", "silent"),
        ("extra", "no prompt of this id"),
        ("extra", "no reference of this id"),
        ("cow", "no sound of some"),
        ("saw", "no sound of some"),
    }
    counts = {row["metric"]: row["num_clips"] for row in rows if row["system"] == "some"}
    assert counts["frechet"] == "5" and counts["kl_softmax"] == "4"  # silence counts, what cannot be read does not
    assert "all are named in" in caplog.text


def test_only_so_much_of_a_recording_is_heard_as_was_generated(measure, recordings, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for name in NAMES:
        waveform, rate = soundfile.read(recordings.parent / f"{name}.wav", frames=8000)
        soundfile.write(short / f"{name}.wav", waveform, rate)
    rows = read_results(measure("--generated", short))
    assert value_of(rows, "frechet", system="short") == pytest.approx(0, abs=1e-9)
    rows = read_results(measure("--generated", short, "--max_length_in_s=0.75", output="longer"))
    assert value_of(rows, "frechet", system="short") > 1e-3


def test_the_level_counts_only_if_asked_for():
    waveform = torch.sin(torch.arange(1000) / 9) + 0.3
    for level, peak in (("peak", 0.5), ("own", float((waveform - waveform.mean()).abs().max()))):
        heard = set_level(waveform, level)
        assert heard.mean() == pytest.approx(0, abs=1e-6) and heard.abs().max() == pytest.approx(peak, abs=1e-6)
    assert set_level(torch.zeros(9), "peak").abs().max() == 0


def test_a_model_is_compared_with_the_first_on_the_same_resamples(measure, recordings, tmp_path):
    good = copy_recordings(recordings, tmp_path / "good")
    same = copy_recordings(recordings, tmp_path / "same")
    bad = copy_recordings(recordings, tmp_path / "bad")
    rng = np.random.default_rng(0)
    for path in bad.iterdir():
        wavfile.write(path, 16000, rng.normal(0, 3000, 12000).astype(np.int16))
    (bad / "cow.wav").unlink()  # what the other has of it does not count either
    rows = read_results(measure("--generated", good, same, bad, "--prompts", recordings), "comparison")
    for row in rows:
        if row["system"] == "same":
            assert row["difference"] == 0 and row["probability_that_system_is_better"] == 0.5
        elif row["metric"] in ("frechet", "kernel", "kl_softmax", "kl_sigmoid"):
            assert row["difference"] > 0 and row["probability_that_system_is_better"] <= 0.1
            assert row["num_clips"] == "5"
    assert {row["system"] for row in rows} == {"same", "bad"} and {row["baseline"] for row in rows} == {"good"}


def test_groups_have_tables_of_their_own(measure, recordings, tmp_path):
    folder = copy_recordings(recordings, tmp_path / "copies")
    out = measure("--generated", folder, "--prompts", recordings, "--group_by=events,labels,place")
    rows = [row for row in read_results(out, "groups") if row["system"] == "copies"]
    counts = {row["group"]: int(row["num_clips"]) for row in rows if row["metric"] == "inception"}
    assert counts == {
        "events: one event": 3,
        "events: several events": 3,
        "labels: 1 label": 3,
        "labels: 2 labels": 3,
        "place: field": 1,
        "place: town": 5,
    }
    # against the group's own references
    assert value_of(rows, "frechet", group="events: several events") == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "text, group",
    [
        ("A dog barks, followed by a meow", "several events"),
        ("A man talks While typing", "several events"),
        ("a frothy beforehand thenar", "one event"),
        ("a dog barks and a cat meows", "one event"),
    ],
)
def test_several_events_are_told_by_the_papers_words(text, group):
    assert group_of(Item("x", text), "events", "labels") == group


# Generation


def test_a_sweep_makes_every_combination_and_plots_it(measure, model_folder, recordings):
    flags = ("--model", model_folder, "--prompts", recordings, "--num_prompts=2", "--num_inference_steps=1,2")
    out = measure(*flags, "--guidance_scale=1,3", "--scheduler=own,dpm++")
    rows = [row for row in read_results(out) if row["metric"] == "frechet" and row["scheduler"]]
    combinations = {(row["scheduler"], row["num_inference_steps"], row["guidance_scale"]) for row in rows}
    assert len(rows) == len(combinations) == 8 and ("dpm++", "2", "1.0") in combinations
    assert all(float(row["seconds_per_clip"]) > 0 for row in rows)
    assert len({row["value"] for row in rows}) == 8
    assert len(sounds_of(out)) == 16
    picture = (out / "frechet_yamnet.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and "(frechet_yamnet.png)" in (out / "results.md").read_text()


def test_a_killed_run_goes_on_to_the_same_bits(measure, model_folder, recordings, tmp_path):
    flags = ("--model", model_folder, "--prompts", recordings, "--num_inference_steps=2", "--batch_size=4")
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


def test_the_batch_size_changes_no_more_than_rounding(measure, model_folder, recordings):
    flags = ("--model", model_folder, "--prompts", recordings, "--num_inference_steps=3")
    folders = [measure(*flags, f"--batch_size={size}", output=f"batch-{size}") for size in (1, 5)]
    for path in sounds_of(folders[0]):
        first, second = (wavfile.read(folder / path)[1].astype(int) for folder in folders)
        assert np.abs(first - second).max() <= 2, path  # of 32768
    assert len(sounds_of(folders[0])) == 6


def test_two_processes_make_the_same_bits(measure, model_folder, recordings, yamnet_folder, tmp_path):
    flags = ["--model", model_folder, "--prompts", recordings, "--num_inference_steps=2", "--batch_size=2"]
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


def test_sounds_made_in_another_way_are_never_mixed(measure, model_folder, recordings, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two sounds\nrain\n\nwind\n")
    flags = ("--model", model_folder, "--prompts", prompts, "--num_inference_steps=1")
    before = sounds_of(measure(*flags, references=None))
    assert {path.name for path in before} == {"00002-1.wav", "00004-1.wav"}
    measure(*flags, "--seed=1", "--num_takes=2", references=None, status=1)
    assert "were made with seed 0, not 1: give another folder" in capsys.readouterr().err
    prompts.write_text("# two sounds\nsnow\n\nwind\n")
    measure(*flags, references=None, status=1)
    assert "was made for 'rain', not 'snow'" in capsys.readouterr().err
    assert sounds_of(tmp_path / "out") == before


# Best of N


def test_takes_compete_only_with_takes_of_their_own_prompt():
    """In diffusers' issue 13602 the scores of a batch are sorted over all its prompts."""
    items = [Item(id, take=take) for take in (1, 2, 3) for id in ("quiet", "loud")]
    scores = np.array([0.1, 5.0, 0.3, 7.0, 0.2, 6.0])  # every take of "loud" beats every one of "quiet"
    assert [(items[i].id, items[i].take) for i in best_of(items, scores, 3)] == [("quiet", 2), ("loud", 2)]
    assert [(items[i].id, items[i].take) for i in best_of(items, scores, 1)] == [("quiet", 1), ("loud", 1)]
    nothing = np.full(6, math.nan)
    assert [items[i].take for i in best_of(items, nothing, 3)] == [1, 1]
    assert [items[i].take for i in best_of(items, np.zeros(6), 3)] == [1, 1]
    shuffled = [4, 1, 5, 0, 3, 2]
    chosen = best_of([items[i] for i in shuffled], scores[shuffled], 3)
    assert {(items[shuffled[i]].id, items[shuffled[i]].take) for i in chosen} == {("quiet", 2), ("loud", 2)}


def test_the_best_takes_are_measured_for_each_number_of_candidates(measure, model_folder, recordings):
    flags = ("--model", model_folder, "--prompts", recordings, "--num_inference_steps=1", "--num_prompts=3")
    out = measure(*flags, "--num_candidates=3", "--rank_by=yamnet", "--label_column=labels")
    rows = read_results(out, "candidates")
    assert candidate_counts(3) == [1, 2, 3] and candidate_counts(8) == [1, 2, 4, 8] and candidate_counts(1) == [1]
    assert {row["num_candidates"] for row in rows} == {"1", "2", "3"} and {row["num_clips"] for row in rows} == {"3"}
    text = (out / "results.md").read_text()
    assert "Best of N by yamnet" in text and "it is bound to like them" in text
    assert (out / "kl_softmax_yamnet.png").exists()


def test_labels_and_words_find_the_classes_of_a_listener(yamnet_folder):
    listener = load_listener("yamnet", str(yamnet_folder))
    listener.class_names = ["Dog", "Rain", "Vehicle horn, car horn, honking", "Bird", "Walk, footsteps"]
    listener.class_ids = ["/m/1", "/m/2", "/m/3", "/m/4", "/m/5"]
    classes = Classes(listener, {"pets": ["Dog", "/m/4"]})
    assert classes.of_labels(["rain", "/m/3", "pets", "unknown"]) == {0, 1, 2, 3}
    assert classes.of_text("Dogs bark as a car honks") == {0, 2}
    assert classes.of_text("A birdhouse and a train") == set()


# Lists


def test_prompts_are_read_from_every_kind_of_list(tmp_path):
    original = '{"location": "7fmOl_20.wav", "captions": "a machine clicks", "labels": "/m/1,/m/2"}\n'
    for name, text, expected in (
        ("a.jsonl", original, [("7fmOl_20", "a machine clicks")]),
        ("b.jsonl", '{"name": "x", "captions": ["one", "two"]}', [("x", "one")]),
        ("c.csv", "id,caption\n7,a cow\n8,rain", [("7", "a cow"), ("8", "rain")]),
        ("d.txt", "rain\n\n# no\nwind\n", [("00001", "rain"), ("00004", "wind")]),
    ):
        (tmp_path / name).write_text(text)
        assert [(item.id, item.text) for item in read_items(tmp_path / name, "prompts", with_text=True)] == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"captions": " "}', "line 1: the caption is empty"),
        ('{"captions": []}', "line 1"),
        ('{"x": 1}', "line 1: none of the columns"),
        ('{"id": "a", "captions": "b"}\n{"id": "A", "captions": "c"}', "the id 'a' more than once"),
        ('{"id": "a/b", "captions": "c"}', "good as a file name"),
        ("", "nothing in"),
    ],
)
def test_faults_of_a_list_are_named(tmp_path, text, message):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(ValueError, match=f"--prompts: .*{message}"):
        read_items(tmp_path / "list.jsonl", "prompts", with_text=True)


def test_takes_are_told_from_ids_that_end_in_a_number(tmp_path):
    for name in ("rain-1", "rain-2", "fire-5", "other-3"):
        (tmp_path / f"{name}.wav").write_bytes(b"")
    items = {(item.id, item.take) for item in read_generated(tmp_path, {"rain", "fire-5"})}
    assert items == {("rain", 1), ("rain", 2), ("fire-5", 1), ("other-3", 1)}


def test_models_of_one_name_are_told_apart():
    assert short_names(["a/model", "b/model", "owner/tango"]) == ["model-1", "model-2", "tango"]


# Usage


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "give --model, --generated, or both"),
        ("--model M", "--model needs --prompts"),
        ("--generated G --num_inference_steps 4,x", "--num_inference_steps has to be numbers"),
        ("--generated G --num_inference_steps 0", "--num_inference_steps has to be at least 1"),
        ("--generated G --guidance_scale nan", "--guidance_scale has to be at least 0"),
        ("--generated G --scheduler ddpm,fast", "--scheduler has to be of own, ddpm.*not 'fast'"),
        ("--generated G --listener nobody", "--listener has to be of clap"),
        ("--generated G --num_takes 0", "--num_takes has to be at least 1"),
        ("--generated G --num_candidates 4", "--num_candidates and --rank_by go together"),
        ("--generated G --confidence 95", "--confidence has to be between 0 and 1"),
        ("--generated G --class_map none.json", "--class_map"),
        ("--generated G --audio_length_in_s -1", "--audio_length_in_s has to be positive"),
    ],
)
def test_a_wrong_argument_is_named(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags.split(), f"--output_dir={tmp_path / 'out'}"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--num_inference_steps=1000",), "--num_inference_steps: 1000 does not go with own"),
        (("--group_by=colour",), "--group_by: nothing to tell groups of 'colour' by"),
        (("--generated=nowhere",), "--generated: no folder nowhere"),
        (("--yamnet_weights=nowhere",), "no variables/variables.index of YAMNet in nowhere"),
        (("--listener=clap", "--clap_weights=nowhere"), "no weights for clap in nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_made(
    flags, message, yamnet_folder, model_folder, recordings, tmp_path, capsys
):
    start = ["--model", str(model_folder), "--prompts", str(recordings), f"--output_dir={tmp_path / 'out'}"]
    assert main([*start, f"--yamnet_weights={yamnet_folder}", "--device=cpu", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "sounds").exists()
