import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import PartialState

from training.data import Clip, read_waveform
from training.evaluation.listeners import load_listener
from training.evaluation.measuring import set_level
from training.evaluation.metrics import event_scores
from training.preferences import choose_pairs, main


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[1]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def arguments(short_folder, yamnet_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    prompts = [
        {"id": "rain", "caption": "rain falls", "labels": "/m/00003"},
        {"id": "a+b", "caption": "a dog, then rain", "sequence": ["/m/00007", "several"]},
        {"id": "a_with_b", "caption": "a dog while it rains", "together": ["/m/00007", "several"]},
        {"id": "nothing", "caption": "xyzzy"},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (folder / "classes.json").write_text(json.dumps({"several": ["/m/00300", "/m/00301"]}))

    def build(output_dir, *more):
        flags = [f"--model={short_folder}", f"--prompts={folder / 'prompts.jsonl'}", f"--output_dir={output_dir}"]
        flags += ["--num_takes=3", "--num_inference_steps=1", "--guidance_scale=2", "--audio_length_in_s=1.5"]
        flags += [f"--yamnet_weights={yamnet_folder}", f"--class_map={folder / 'classes.json'}", "--device=cpu"]
        return [*flags, "--seed=5", *map(str, more)]

    return build


def run(flags):
    PartialState._reset_state()
    return main(flags)


@pytest.fixture(scope="module")
def made(arguments, tmp_path_factory):
    """The folder of a finished run. Shared by the tests: never write into it."""
    folder = tmp_path_factory.mktemp("preferences") / "out"
    assert run(arguments(folder)) == 0
    PartialState._reset_state()
    return folder


def test_pairs_are_the_best_and_the_worst_take_by_what_the_listener_hears(made, yamnet_folder):
    scores = {(row["id"], row["take"]): row for row in read_lines(made / "scores.jsonl")}
    assert len(scores) == 9 and len(list(made.rglob("*.wav"))) == 9
    listener = load_listener("yamnet", str(yamnet_folder))
    for (id, _), row in scores.items():
        heard = listener(set_level(read_waveform(Clip(str(made / row["file"]), ()), 16000), "peak"))
        logits, patches = heard["logits"].numpy(), heard["patch_logits"].numpy()
        events = {"rain": [{3}]}.get(id, [{7}, {300, 301}])
        expected, order = event_scores(logits, patches if id == "a+b" else None, events)
        assert row["heard"] == pytest.approx(expected.tolist())
        assert row["score"] == pytest.approx(expected.sum() + (math.log(order) if id == "a+b" else 0))
        assert row.get("order") == (pytest.approx(order) if id == "a+b" else None)
    pairs = read_lines(made / "pairs.jsonl")
    assert [pair["id"] for pair in pairs] == ["rain", "a+b", "a_with_b"]
    for pair in pairs:
        takes = {take: row["score"] for (id, take), row in scores.items() if id == pair["id"]}
        assert pair["chosen_score"] == takes[pair["chosen_take"]] == max(takes.values())
        assert pair["rejected_score"] == takes[pair["rejected_take"]] == min(takes.values())
        assert pair["margin"] == pair["chosen_score"] - pair["rejected_score"] > 0
        assert (made / pair["chosen"]).is_file() and (made / pair["rejected"]).is_file()
        assert (pair["seed"], pair["num_inference_steps"], pair["guidance_scale"]) == (5, 1, 2)
        assert pair["listener_sha256"] == listener.checksum and pair["model"] and pair["weights"]


def test_an_interrupted_run_goes_on_in_two_processes_to_the_same_bytes(arguments, made, tmp_path):
    broken = Path(shutil.copytree(made, tmp_path / "broken"))
    for name in ("a+b-2.wav", "rain-1.wav"):  # as if it had been killed before these, and while it wrote a line
        next(broken.rglob(name)).unlink()
    (broken / "pairs.jsonl").unlink()
    (broken / "scores.jsonl").unlink()
    shutil.rmtree(broken / "heard")
    with open(next(broken.rglob("manifest.jsonl")), "a") as file:
        file.write('{"file": "a+b')
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        + ["-m", "training.preferences", *arguments(broken)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    names = [path.relative_to(made) for path in made.rglob("*.wav")] + ["pairs.jsonl", "scores.jsonl"]
    for name in names:
        assert (broken / name).read_bytes() == (made / name).read_bytes()


def test_sounds_that_are_there_make_other_pairs_but_none_of_another_seed(arguments, made, tmp_path, capsys, caplog):
    out = Path(shutil.copytree(made, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    assert run(arguments(out, "--pair_by=margin", "--num_pairs=3", "--order_weight=0")) == 0
    assert "1 of 4 prompts name no class of yamnet and are left out" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")} == before
    pairs = read_lines(out / "pairs.jsonl")
    margins = [pair["margin"] for pair in pairs[:3]]
    assert len(pairs) == 9 and margins == sorted(margins, reverse=True)
    for row in read_lines(out / "scores.jsonl"):
        assert row["score"] == pytest.approx(sum(row["heard"]))
    assert run(arguments(out, "--min_margin=1e6")) == 1
    assert "no two takes of a prompt differ in their scores by --min_margin 1e+06" in capsys.readouterr().err
    assert (out / "scores.jsonl").exists() and not (out / "pairs.jsonl").exists()
    assert run(arguments(out, "--seed=6")) == 1
    assert "were made with seed 5, not 6: give another folder" in capsys.readouterr().err


def test_pairs_by_rank_take_each_sound_once_and_by_margin_the_largest_differences():
    scores = [0.3, 0.9, math.nan, 0.1, 0.5, 0.6]
    assert choose_pairs(scores) == [(1, 3)]
    assert choose_pairs(scores, num_pairs=9) == [(1, 3), (5, 0)]
    assert choose_pairs(scores, "margin", 3) == [(1, 3), (1, 0), (5, 3)]
    assert choose_pairs(scores, "rank", 9, min_margin=0.4) == [(1, 3)]
    assert choose_pairs(scores, "margin", 9, min_margin=0.5) == [(1, 3), (1, 0), (5, 3)]


def test_ties_and_single_takes_make_no_pair():
    assert choose_pairs([0.5, 0.5, 0.5], "margin", 9) == choose_pairs([0.5, 0.5], "rank", 9) == []
    assert choose_pairs([0.5, 0.7, 0.5, 0.7], "rank", 9) == [(1, 2), (3, 0)]
    assert choose_pairs([], "rank") == choose_pairs([1.0], "margin") == choose_pairs([math.nan] * 3) == []
    with pytest.raises(ValueError, match="`pair_by` must be 'rank' or 'margin', got 'best'"):
        choose_pairs([1.0, 2.0], "best")


@pytest.mark.parametrize("pair_by", ["rank", "margin"])
def test_a_chosen_take_is_never_worse_than_the_rejected_one(pair_by):
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.integers(0, 5, rng.integers(2, 9)).astype(float)
        pairs = choose_pairs(scores, pair_by, 4, min_margin=2)
        assert all(scores[chosen] - scores[rejected] >= 2 for chosen, rejected in pairs) and len(pairs) <= 4
        assert (np.ptp(scores) >= 2) == bool(pairs)


@pytest.mark.parametrize(
    "flags, message, status",
    [
        (["--num_takes=1"], "--num_takes has to be at least 2", 2),
        (["--listener=vggish"], "invalid choice: 'vggish'", 2),
        (["--class_map=none.json"], "--class_map", 2),
        (["--num_inference_steps=1000"], "--num_inference_steps: 1000 is not supported by the scheduler own", 1),
        (["--prompts=nowhere.jsonl"], "--prompts: ", 1),
        (["--label_column=x", "--sequence_column=x", "--together_column=x"], "no prompt names a class of yamnet", 1),
        (["--yamnet_weights=nowhere"], "of YAMNet in nowhere", 1),
    ],
)
def test_wrong_input_is_named_before_anything_is_made(arguments, tmp_path, capsys, flags, message, status):
    try:
        assert run(arguments(tmp_path / "out", *flags)) == status
    except SystemExit as stop:
        assert stop.code == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
