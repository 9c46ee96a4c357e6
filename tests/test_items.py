import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_runs import copy_recordings, read_results
from scipy.io import wavfile

from training.evaluation.items import Item, group_of, read_generated, read_items, short_names


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
        ('{"id": "a/b", "captions": "c"}', "valid in a file name"),
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
