import numpy as np
import pytest
from evaluation_runs import copy_recordings, read_results, value_of
from scipy.io import wavfile

from training.evaluation import measuring
from training.evaluation.items import System
from training.evaluation.measuring import Figure, candidate_counts
from training.evaluation.report import Tables, as_markdown


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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


def test_groups_have_tables_of_their_own(measure, recordings, tmp_path, monkeypatch, capsys):
    kinds = {"class 0, kind": "animals", "class 3, kind": "things", "class 500, kind": "speech"}
    monkeypatch.setattr(measuring, "FIRST_OF_KIND", kinds)
    folder = copy_recordings(recordings, tmp_path / "copies")
    out = measure("--generated", folder, "--prompts", recordings, "--group_by=events,labels,kind,place")
    rows = [row for row in read_results(out, "groups") if row["system"] == "copies"]
    counts = {row["group"]: int(row["num_clips"]) for row in rows if row["metric"] == "inception"}
    assert counts == {
        "events: one event": 3,
        "events: several events": 3,
        "labels: 1 label": 3,
        "labels: 2 labels": 3,
        "kind: animals": 2,
        "kind: speech": 3,  # by their second label
        "kind: things": 1,
        "place: field": 1,
        "place: town": 5,
    }
    monkeypatch.undo()  # classes without kinds
    flags = ("--generated", folder, "--prompts", recordings, "--group_by=kind")
    measure(*flags, output="unknown", status=1)
    assert "--group_by: 'kind' needs labels that are classes of yamnet" in capsys.readouterr().err
    # against the group's own references
    assert value_of(rows, "frechet", group="events: several events") == pytest.approx(0, abs=1e-9)


def test_the_best_takes_are_measured_for_each_number_of_candidates(measure, short_folder, recordings):
    flags = ("--model", short_folder, "--prompts", recordings, "--num_inference_steps=1", "--num_prompts=3")
    out = measure(*flags, "--num_candidates=3", "--rank_by=yamnet", "--label_column=labels")
    rows = read_results(out, "candidates")
    assert candidate_counts(3) == [1, 2, 3] and candidate_counts(8) == [1, 2, 4, 8] and candidate_counts(1) == [1]
    assert {row["num_candidates"] for row in rows} == {"1", "2", "3"} and {row["num_clips"] for row in rows} == {"3"}
    text = (out / "results.md").read_text()
    assert "Best of N by yamnet" in text and "its figures are biased in their favour" in text
    assert (out / "kl_softmax_yamnet.png").exists()


def test_a_table_has_intervals_and_its_file_goes_with_its_rows(tmp_path):
    tables, resampled = Tables(confidence=0.5), np.arange(101.0)
    system = System("a-own-10-g3", "a", "own", 10, 3.0)
    tables.add("results", system, "", "yamnet", {"kernel": Figure(50.0, resampled, 7, "only 7 prompts")})
    tables.add("groups", system, "place: town", "yamnet", {"kernel": Figure(1.0, np.ones(9), 2)})
    (row,) = tables.rows["results"]
    assert (row["low"], row["high"], row["num_clips"]) == (25.0, 75.0, 7)
    (tmp_path / "comparison.csv").write_text("of an earlier run")
    tables.write_csv(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "groups.csv"}
    assert read_results(tmp_path)[0]["low"] == 25.0 and read_results(tmp_path, "groups")[0]["group"] == "place: town"
    text = as_markdown(tables, ["- x"], ["yamnet"], None, {}, "tango-evaluate --generated a")
    assert "| a-own-10-g3 | 7 | 50.000 [25.000, 75.000] (1) |" in text and "(1) only 7 prompts." in text
    assert "| place: town | a-own-10-g3 | 2 | 1.000 |" in text  # without an interval, where resamples do not differ
    assert text.endswith("    tango-evaluate --generated a\n")
