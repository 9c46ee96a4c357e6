import json
import subprocess
import sys

import pytest
import torch

from examples import gpu_check
from examples.gpu_check import (
    BEST,
    COMPILED,
    OPTIONS,
    ROOT,
    groups,
    main,
    read_tests,
    replay_as_graphs,
    table,
    variant,
)


SMALL = [
    "--device",
    "cpu",
    "--size",
    "tiny",
    "--audio_seconds",
    "0.16",
    "--steps",
    "3",
    "2",
    "--batch_sizes",
    "1",
    "2",
]
TESTS = """
import os, pytest
pytestmark = pytest.mark.cuda

def test_a(): assert os.environ["TANGO_TEST_DEVICE"] == "cpu"
def test_b(): assert "what" == "that"
@pytest.mark.skip(reason="needs something")
def test_c(): pass
"""


@pytest.fixture
def few_groups(monkeypatch):
    """A short way through all that a run has."""
    monkeypatch.setattr(gpu_check, "matrix_rate", lambda dtype, device: 1e9)
    monkeypatch.setitem(gpu_check.FAST, "steps", 4)
    rows = [
        ("float32", [(2, 1, False)]),
        (None, []),
        (BEST, [("preset", 1, True), (2, 2, False)]),
        ("bf16", [(3, 1, False)]),
    ]
    monkeypatch.setattr(gpu_check, "groups", lambda *args: iter(rows))
    return rows


def test_the_script_measures_tests_and_reports(few_groups, tmp_path):
    tests = tmp_path / "test_few.py"
    tests.write_text(TESTS)
    arguments = ["--output_dir", str(tmp_path), "--tests", str(tests), "--test_processes", "0", "--rounds", "1"]
    assert main(SMALL + arguments) == 1  # one test failed
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not report["problems"]
    assert [(row["workload"], row["batch_size"]) for row in report["rows"]] == [(2, 1), ("preset", 1), (2, 2), (3, 1)]
    assert all(row["flop"] > 0 and row["share_of_rate"] > 0 for row in report["rows"])
    assert report["rows"][0]["latents_db"] == 200 and report["rows"][0]["flop"] < report["rows"][3]["flop"]
    assert report["rows"][2]["flop"] == 2 * report["rows"][0]["flop"]
    (profile,) = report["profiles"].values()
    assert 1 <= len(profile["operators"]) <= 15
    assert [len(report["tests"][name]) for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert "what" in report["tests"]["errors"][0]
    assert (tmp_path / "gpu_check.md").read_text() == table(report)


def test_a_variant_that_fails_stops_nothing(few_groups, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu_check, "replay_as_graphs", fail)
    assert main([*SMALL, "--output_dir", str(tmp_path), "--no_tests", "--rounds", "1"]) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["problems"] == {BEST: "RuntimeError: no kernel"}
    assert len(report["rows"]) == 2


def test_what_the_time_does_not_allow_is_named(few_groups, tmp_path):
    assert main([*SMALL, "--output_dir", str(tmp_path), "--no_tests", "--seconds", "9.9"]) == 1
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert not report["rows"] and "no time was left" in report["problems"][BEST]


def test_the_shell_script_passes_its_arguments_on():
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    script = ROOT / "examples" / "gpu_check.sh"
    shown = subprocess.run(["sh", script, "--help"], env=environment, cwd="/", capture_output=True, text=True)
    assert shown.returncode == 0 and all(option in shown.stdout for option in OPTIONS)


def test_the_rows_are_variants_of_known_options():
    rows = list(groups([200, 100, 25], [1, 32], "cuda"))
    names = [name for name, _ in rows if name is not None]
    assert {option for name in names for option in name.split("+")} == OPTIONS.keys()
    jobs = {job[:2] for _, each in rows for job in each}
    assert jobs == {(25, 1), (100, 1), (200, 1), ("preset", 1), (25, 32), ("preset", 32)}
    assert COMPILED not in dict(groups([200, 25], [1], "cpu"))
    assert names.index("float32") == 0  # before the weights are cast


@pytest.mark.parametrize("name", ["bf16", "bf16+channels-last+cudnn-benchmark+conv2d-vocoder+graphs", "tf32"])
def test_a_variant_leaves_no_trace(pipe, name):
    def state():
        backends = torch.backends
        flags = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark
        models = (pipe.unet, pipe.vae, pipe.vocoder)
        return flags, [sorted(vars(module)) for model in models for module in model.modules()]

    before = state()
    with variant(pipe, name):
        pass
    assert state() == before


def test_a_replay_writes_to_memory_of_its_own(pipe):
    with replay_as_graphs(pipe):
        first, second = (torch.full((1, 4, 64), value) for value in (0.0, 1.0))
        made = [pipe.vocoder(each) for each in (first, second, first)]
        graphs = pipe.vocoder.forward.captured
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    assert len(graphs) == 1 and "forward" not in vars(pipe.vocoder)


def test_tests_are_read_with_and_without_processes():
    lines = [
        "[gw1] [  3%] PASSED tests/test_cuda.py::test_x[a b] ",
        "tests/test_cuda.py::test_y[soft inpainting] FAILED      [ 50%]",
        "tests/test_cuda.py::test_z SKIPPED (needs torchao)      [100%]",
        "SKIPPED [1] tests/test_cuda.py:306: needs torchao",
        "E   ValueError: no",
    ]
    assert read_tests("\n".join(lines)) == {
        "passed": ["test_x[a b]"],
        "failed": ["test_y[soft inpainting]"],
        "skipped": ["test_z"],
        "reasons": ["needs torchao"],
        "errors": ["ValueError: no"],
    }
