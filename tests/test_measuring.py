import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from evaluation_runs import NAMES, copy_recordings, read_results, value_of

from training.data import Clip, read_waveform
from training.evaluation.items import Item
from training.evaluation.listeners import load_listener
from training.evaluation.measuring import Classes, best_of, set_level
from training.evaluation.metrics import begin_in_sequence, in_sequence


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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


def test_copies_of_training_recordings_are_found(measure, recordings, tmp_path, capsys):
    copies = copy_recordings(recordings, tmp_path / "copies")
    others = copy_recordings(recordings, tmp_path / "others", NAMES[1:2] * len(NAMES))
    flags = ("--training_recordings", copies, "--real_recordings", others)
    out = measure("--generated", copies, *flags, references=None)
    rows = [row for row in read_results(out) if row["metric"] == "nearest"]
    assert {row["system"]: row["num_clips"] for row in rows} == {"copies": "6", "real recordings (others)": "6"}
    assert value_of(rows, "nearest", system="copies") == pytest.approx(1)
    (copies / f"{NAMES[1]}.wav").unlink()  # the recording that all of the others are
    out = measure("--generated", others, "--training_recordings", copies, references=None, output="second")
    row = next(row for row in read_results(out) if row["metric"] == "nearest")
    assert 0 < row["value"] < 0.9999 and f"the largest is {row['value']:.3f}" in row["note"]
    assert "Similarity to the nearest training recording" in (out / "results.md").read_text()
    for name in NAMES:
        (copies / f"{name}.wav").write_bytes(b"")
    measure("--generated", others, "--training_recordings", copies, references=None, output="third", status=1)
    assert "--training_recordings: none in" in capsys.readouterr().err


def test_the_level_counts_only_if_asked_for():
    waveform = torch.sin(torch.arange(1000) / 9) + 0.3
    for level, peak in (("peak", 0.5), ("own", float((waveform - waveform.mean()).abs().max()))):
        heard = set_level(waveform, level)
        assert heard.mean() == pytest.approx(0, abs=1e-6) and heard.abs().max() == pytest.approx(peak, abs=1e-6)
    assert set_level(torch.zeros(9), "peak").abs().max() == 0


def test_sounds_are_paired_by_their_names_and_never_by_order(measure, recordings, tmp_path):
    turned = copy_recordings(recordings, tmp_path / "turned", NAMES[1:] + NAMES[:1])
    rows = read_results(measure("--generated", turned, "--prompts", recordings))
    assert value_of(rows, "frechet", system="turned") == pytest.approx(0, abs=1e-9)  # the same set
    assert value_of(rows, "kl_sigmoid", system="turned") > 0.1  # but none is its own reference


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


def test_labels_and_words_find_the_classes_of_a_listener(yamnet_folder):
    listener = load_listener("yamnet", str(yamnet_folder))
    listener.class_names = ["Dog", "Rain", "Vehicle horn, car horn, honking", "Bird", "Walk, footsteps"]
    listener.class_ids = ["/m/1", "/m/2", "/m/3", "/m/4", "/m/5"]
    classes = Classes(listener, {"pets": ["Dog", "/m/4"]})
    assert classes.of_labels(["rain", "/m/3", "pets", "unknown"]) == {0, 1, 2, 3}
    assert classes.of_text("Dogs bark as a car honks") == {0, 2}
    assert classes.of_text("A birdhouse and a train") == set()


def test_the_kind_is_speech_or_that_of_the_first_label():
    names = ["Speech", "Whispering", "Laughter", "Animal", "Dog", "Vehicle", "Engine", "Door", "Wood"]
    classes = Classes(SimpleNamespace(class_names=names, class_ids=[]), {"pets": ["Dog"]})
    kinds = (
        ["speech"] * 2 + ["other sounds of people"] + ["animals"] * 2 + ["vehicles and engines"] * 2 + ["things"] * 2
    )
    assert [classes.kind([name]) for name in names] == kinds
    assert classes.kind(["unknown", "pets", "wood"]) == "animals" and classes.kind(["wood", "whispering"]) == "speech"
    assert classes.kind([]) is classes.kind(["unknown"]) is None
    unnamed = Classes(SimpleNamespace(class_names=["Dog"], class_ids=[]), None)
    assert unnamed.kind(["dog"]) is None  # before any class that begins a kind


def test_the_order_of_events_is_measured_where_the_prompt_names_them(measure, recordings, tmp_path, yamnet_folder):
    """Of recordings in their order too, given as real recordings under the ids of the prompts. Where a prompt names
    events without an order, it is measured only whether all are heard."""
    listener = load_listener("yamnet", str(yamnet_folder))
    sounds, lines, expected = tmp_path / "sounds", [], {"order": [], "begin_order": []}
    sounds.mkdir()
    for i, name in enumerate(NAMES):
        waveform, rate = soundfile.read(recordings.parent / f"{name}.wav")
        soundfile.write(sounds / f"{name}.wav", np.concatenate([waveform, waveform[::-1]] * 2), rate)
        lines.append({"id": name, "caption": name})
        if i == 4:
            lines[-1]["together"] = listener.class_ids[:2]
        if i < 4:
            sequence = [listener.class_ids[7 * i], "several"]
            lines[-1]["sequence"] = sequence if i % 2 else ",".join(sequence)
            heard = listener(set_level(read_waveform(Clip(str(sounds / f"{name}.wav"), ()), 16000), "peak"))
            for name, metric in (("order", in_sequence), ("begin_order", begin_in_sequence)):
                expected[name].append(metric(heard["patch_logits"].numpy(), [{7 * i}, {300, 301}]))
    prompts, class_map = tmp_path / "prompts.jsonl", tmp_path / "classes.json"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    class_map.write_text(json.dumps({"several": listener.class_ids[300:302]}))
    flags = ("--generated", sounds, "--prompts", prompts, "--class_map", class_map)
    output = measure(*flags, "--real_recordings", sounds, references=None)
    rows = read_results(output)
    for name, values in expected.items():
        for system in ("sounds", "real recordings (sounds)"):
            [row] = [row for row in rows if row["metric"] == name and row["system"] == system]
            assert row["value"] == np.mean(values) and row["num_clips"] == "4" and "by chance 0.50" in row["note"]
    [row] = [row for row in rows if row["metric"] == "sequence_recall" and row["system"] == "sounds"]
    assert row["num_clips"] == "5" and row["value"] in (0, 0.2, 0.4, 0.6, 0.8, 1)
    assert "Begin in order" in (output / "results.md").read_text()
    for figure in read_results(measure("--generated", sounds, "--prompts", recordings, output="without")):
        assert figure["metric"] not in ("order", "order_heard", "begin_order", "begin_order_heard", "sequence_recall")
