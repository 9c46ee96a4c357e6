import os
import signal

import pytest
import torch
from accelerate import Accelerator

from training.run import (
    Log,
    averaged,
    catch_sigterm,
    find_checkpoints,
    load_checkpoint,
    make_ema,
    mean_figures,
    progress_bar,
    read_log,
    replacing,
    run,
    save_checkpoint,
    stop_requested,
    tail_mean,
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
