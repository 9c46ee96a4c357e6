import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from training.run import (
    Log,
    averaged,
    catch_sigterm,
    clear_the_way,
    find_checkpoints,
    load_checkpoint,
    make_ema,
    make_folder,
    mean_figures,
    progress_bar,
    read_log,
    replacing,
    run,
    save_checkpoint,
    start,
    stop_requested,
    tail_mean,
    write_sound,
)


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def test_an_error_that_can_be_mended_is_one_line_and_any_other_is_raised(capsys):
    def fail(error):
        raise error

    assert run(lambda args: args, 3) == 3
    assert run(fail, ValueError("`--x` is wrong")) == 1
    assert capsys.readouterr().err == "error: `--x` is wrong\n"
    with pytest.raises(KeyError):
        run(fail, KeyError("x"))


def test_a_result_replaces_an_older_one_only_when_it_is_complete(accelerator, tmp_path):
    final = tmp_path / "model"
    with replacing(final) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError), replacing(final) as folder:
        (folder / "weights").write_text("half")
        raise OSError("disk full")
    assert (final / "weights").read_text() == "old"
    with replacing(final) as folder:
        (folder / "weights").write_text("new")
    assert (final / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_oldest_checkpoints_are_removed_and_incomplete_ones_ignored(accelerator, tmp_path):
    for step in (2, 10, 9):
        save_checkpoint(accelerator, tmp_path, step, {"seed": 0}, total_limit=2)
    (tmp_path / "checkpoint-11").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_what_users_put_beside_checkpoints_is_neither_read_nor_removed(accelerator, tmp_path):
    for name in ("checkpoint-2.bak", "checkpoint-2-keep-me", "checkpoint-007", "checkpoint-", "checkpoint-²", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text('{"step": 99, "settings": {}}')
    (tmp_path / "checkpoint-1").write_text("mine")
    (tmp_path / ".checkpoint-keep.partial").mkdir()
    foreign = {path.name for path in tmp_path.iterdir()}
    assert (
        load_checkpoint(accelerator, tmp_path, None, {}) == load_checkpoint(accelerator, tmp_path, "latest", {}) == 0
    )
    for step in (2, 3, 4):
        save_checkpoint(accelerator, tmp_path, step, {"seed": 0}, total_limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-4"]
    assert load_checkpoint(accelerator, tmp_path, "latest", {}) == 4
    assert {path.name for path in tmp_path.iterdir()} == foreign | {"checkpoint-4"}


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_in_the_way_of_a_checkpoint_is_renamed(accelerator, tmp_path, kind, caplog):
    elsewhere, way = tmp_path / "elsewhere", tmp_path / "out" / "checkpoint-2"
    elsewhere.mkdir()
    way.parent.mkdir()
    for content in ("first", "second"):
        if kind == "file":
            way.write_text(content)
        elif kind == "folder":
            way.mkdir()
            (way / "notes.txt").write_text(content)
        else:
            way.symlink_to(elsewhere)
        save_checkpoint(accelerator, way.parent, 2, {"seed": 0})
        assert find_checkpoints(way.parent) == [way] and not way.is_symlink()
        way.rename(tmp_path / f"{content}-checkpoint")
    assert f"renamed to {way}.bak2" in caplog.text
    moved = {path.name: path for path in way.parent.iterdir()}
    assert moved.keys() == {"checkpoint-2.bak", "checkpoint-2.bak2"}
    read = {"file": Path.read_text, "folder": lambda path: (path / "notes.txt").read_text(), "link": os.readlink}[kind]
    assert read(moved["checkpoint-2.bak2"]) == (str(elsewhere) if kind == "link" else "second")


def test_later_checkpoints_outlive_a_run_that_resumed_before_them(accelerator, tmp_path):
    for step in (2, 4, 6):
        save_checkpoint(accelerator, tmp_path, step, {"seed": 0})
    save_checkpoint(accelerator, tmp_path, 3, {"seed": 0}, total_limit=1)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4", "checkpoint-6"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (cut, "trainer_state.json", "is not JSON"),
        (lambda path: path.write_text("[]"), "trainer_state.json", "must hold a JSON object"),
        (lambda path: path.write_text("{}"), "trainer_state.json", "has to hold `step`"),
        (Path.unlink, "model.safetensors", "is missing"),
        (cut, "model.safetensors", "has [0-9]+ bytes instead of"),
        (Path.unlink, "optimizer.bin", "is missing"),
        (cut, "optimizer.bin", "has [0-9]+ bytes instead of"),
        (flip, "optimizer.bin", "is cut short or damaged"),
        (cut, "random_states_0.pkl", "has [0-9]+ bytes instead of"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage, file, message, caplog):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(40, 40)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    for step in (1, 2, 3):
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(accelerator, tmp_path, step, {"seed": 0})
    damage(tmp_path / "checkpoint-3" / file)
    (tmp_path / "checkpoint-2" / "notes.pt").write_text("a user's")
    assert load_checkpoint(accelerator, tmp_path, "latest", {}) == 2
    assert bool((model.weight == 2).all())
    folder = re.escape(str(tmp_path / "checkpoint-3"))
    assert re.search(f"{folder} is damaged: {folder}/{file} {message}", caplog.text)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    with pytest.raises(ValueError, match=rf"`--resume_from_checkpoint`: .*checkpoint-3 is damaged: .*{file}"):
        load_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-3"), {})
    for step in (1, 2):
        cut(tmp_path / f"checkpoint-{step}" / "trainer_state.json")
    with pytest.raises(ValueError, match="checkpoint-1 is damaged: .* and so are the 2 others"):
        load_checkpoint(accelerator, tmp_path, "latest", {})


def test_a_checkpoint_of_other_models_is_one_clear_error(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(4, 4))
    save_checkpoint(accelerator, tmp_path, 1, {})
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(4, 5))
    with pytest.raises(ValueError, match="checkpoint-1 does not fit this run"):
        load_checkpoint(accelerator, tmp_path, "latest", {})


def test_a_run_resumes_from_its_latest_checkpoint_and_says_what_changed(accelerator, tmp_path, caplog):
    caplog.set_level("WARNING")
    assert load_checkpoint(accelerator, tmp_path, None, {}) == 0
    assert load_checkpoint(accelerator, tmp_path, "latest", {}) == 0
    save_checkpoint(accelerator, tmp_path, 3, {"seed": 0})
    assert load_checkpoint(accelerator, tmp_path, "latest", {"seed": 1}) == 3
    assert "--seed was 0" in caplog.text and "now 1" in caplog.text
    assert load_checkpoint(accelerator, tmp_path, str(tmp_path / "checkpoint-3"), {}) == 3
    with pytest.raises(ValueError, match="nowhere is no complete checkpoint"):
        load_checkpoint(accelerator, tmp_path, "nowhere", {})
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        load_checkpoint(accelerator, tmp_path, None, {})


def test_a_resumed_log_drops_what_came_after_the_checkpoint(accelerator, tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, 0, accelerator)
    for step in (1, 2, 3):
        log.write(step, loss=0.5 * step)
    log.write(3, validation_loss=0.25)
    assert log.values("loss") == [0.5, 1.0, 1.5] and log.values("validation_loss") == [0.25]
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    assert Log(path, 2, accelerator).values("loss") == [0.5, 1.0]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
    assert Log(path, 0, accelerator).values("loss") == [] and read_log(tmp_path / "none.jsonl") == []


def test_lines_of_others_in_a_log_are_named_and_left_out(accelerator, tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 0.5}\n# mine\n[1]\n{"loss": 1}\n\xff\n{"step": 2, "loss": 0.25}\n{"step": 3'
    )
    assert [entry["step"] for entry in read_log(path)] == [1, 2]
    assert f"{path}, line 2 is no entry of the log" in caplog.text and "line 7" in caplog.text
    assert Log(path, 2, accelerator).values("loss") == [0.5, 0.25]
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'


def test_a_resumed_log_is_the_same_text(accelerator, tmp_path):
    log = Log(tmp_path / "log.jsonl", 0, accelerator)
    log.write(1, loss=0.5)
    log.write(2, validation_loss=0.25, validation_loss_by_timestep={125: 0.5, 875: 0.125})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b"validation_loss_by_timestep {125: 0.5, 875: 0.125}\n" in before["log.txt"]
    Log(tmp_path / "log.jsonl", 2, accelerator)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_users_put_into_a_result_moves_on_with_it(accelerator, tmp_path):
    final = tmp_path / "best"
    with replacing(final) as folder:
        for name in ("README.md", "model-00001-of-00002.safetensors", "samples/1.wav", "samples/2.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("old")
    for name in ("notes.txt", "samples/loud.wav", "mine/list.csv"):
        (final / name).parent.mkdir(exist_ok=True)
        (final / name).write_text("the user's")
    with replacing(final) as folder:
        (folder / "README.md").write_text("new")
    files = {path.relative_to(final).as_posix(): path.read_text() for path in final.rglob("*") if path.is_file()}
    mine = dict.fromkeys(("notes.txt", "samples/loud.wav", "mine/list.csv"), "the user's")
    assert files == {"README.md": "new", **mine}


def test_a_result_that_was_set_aside_by_a_killed_run_is_not_lost(accelerator, tmp_path):
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "notes.txt").write_text("the user's")
    with replacing(tmp_path / "best"):
        pass
    assert (tmp_path / "best" / "notes.txt").read_text() == "the user's"


def test_folders_and_files_of_others_are_moved_out_of_the_way_of_results(accelerator, tmp_path):
    for name in ("best", "model", "vae", "samples"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "best" / "README.md").write_text("Trained with `training.train` of pipeline-tango.")
    (tmp_path / "lora").write_text("a file")
    clear_the_way(tmp_path, ("best", "model", "lora"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"best", "model.bak", "vae", "samples", "lora.bak"}
    (tmp_path / "samples" / "step-1").write_text("a file")
    write_sound(tmp_path / "samples" / "step-1", "1", np.zeros(16000, np.float32), 16000, "x")
    assert (tmp_path / "samples" / "step-1" / "1.wav").exists()
    assert (tmp_path / "samples" / "step-1.bak").read_text() == "a file"


def test_a_file_in_the_way_of_a_folder_is_renamed(tmp_path):
    (tmp_path / "samples").write_text("mine")
    make_folder(tmp_path / "samples" / "step-1")
    assert (tmp_path / "samples" / "step-1").is_dir() and (tmp_path / "samples.bak").read_text() == "mine"
    make_folder(tmp_path / "samples" / "step-1")


def test_figures_are_means_over_accumulation_steps_and_have_to_be_finite(accelerator):
    bar = progress_bar(accelerator, 0, 1)
    figures = [
        {"loss": torch.tensor(1.0), "kl": torch.tensor(2.0)},
        {"loss": torch.tensor(3.0), "kl": torch.zeros(())},
    ]
    assert mean_figures(accelerator, figures, 1, bar) == {"loss": 2.0, "kl": 1.0}
    assert figures == []
    with pytest.raises(FloatingPointError, match="the loss is nan at step 7: lower --learning_rate"):
        mean_figures(accelerator, [{"loss": torch.tensor(float("nan"))}], 7, bar)


def test_the_tail_is_the_last_twentieth():
    assert tail_mean(list(range(40))) == 38.5
    assert tail_mean([3.0]) == 3.0 and tail_mean([]) == 0


def test_the_moving_average_stands_in_for_the_parameters(accelerator):
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = make_ema(accelerator, [parameter], decay=0.5)
    parameter.data.fill_(8.0)
    ema.step([parameter])
    with averaged(ema, [parameter]):
        assert 0 < parameter.item() <= 8
        average = parameter.item()
    assert parameter.item() == 8 and average == ema.shadow_params[0].item()
    with averaged(None, [parameter]):
        assert parameter.item() == 8


def test_sigterm_is_a_request_to_stop(accelerator):
    signals = catch_sigterm()
    assert not stop_requested(accelerator, signals)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requested(accelerator, signals)


def test_a_result_that_fails_leaves_nothing_and_writers_do_not_meet(accelerator, tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "first") as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with replacing(tmp_path / "model") as one, replacing(tmp_path / "model") as other:
        (one / "weights").write_text("one")
        (other / "weights").write_text("other")
    assert (tmp_path / "model" / "weights").read_text() == "one"  # the last to be complete
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model", "lora", "vae", "log.txt", "log.jsonl", "args.json"])
def test_what_no_run_has_left_is_not_replaced(tmp_path, name):
    (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text('{"theirs": 1}')
    with pytest.raises(ValueError, match=f"`--output_dir`: .*{name} is there already"):
        start(tmp_path, "no", "none")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    if name != "args.json":
        (tmp_path / "args.json").write_text(json.dumps({"output_dir": "a"}))
        start(tmp_path, "no", "none")
