import re
import sys

import pytest
from evaluation_runs import copy_recordings, read_results, value_of

from training.evaluate import main


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
        (("--num_inference_steps=1000",), "--num_inference_steps: 1000 is not supported by the scheduler own"),
        (("--group_by=colour",), "--group_by: 'colour' applies to no entry of --prompts or --references"),
        (("--generated=nowhere",), "--generated: no folder nowhere"),
        (("--yamnet_weights=nowhere",), "no variables/variables.index of YAMNet in nowhere"),
        (("--listener=clap", "--clap_weights=nowhere"), "no weights for clap in nowhere"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_made(
    flags, message, yamnet_folder, short_folder, recordings, tmp_path, capsys
):
    start = ["--model", str(short_folder), "--prompts", str(recordings), f"--output_dir={tmp_path / 'out'}"]
    assert main([*start, f"--yamnet_weights={yamnet_folder}", "--device=cpu", *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "sounds").exists()


def test_help_and_results_name_the_command_as_it_was_started(monkeypatch, capsys):
    for started, name in (
        ("/bin/tango-evaluate", "tango-evaluate"),
        ("training/evaluate.py", "python -m training.evaluate"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        with pytest.raises(SystemExit):
            main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


def test_a_missing_extra_is_named_in_one_line(recordings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert main(["--generated", str(recordings.parent), f"--output_dir={tmp_path / 'out'}", "--device=cpu"]) == 1
    assert capsys.readouterr().err.endswith(
        'error: reading sounds needs soundfile: pip install "pipeline-tango[evaluate]"\n'
    )
    assert not (tmp_path / "out").exists()
