"""The wheel in an environment of its own, without this checkout: every command, and what each needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkpoints import fingerprint
from filelock import FileLock
from hub import Hub
from scipy.io import wavfile


ROOT = Path(__file__).parents[1]
COMMANDS = {
    "tango": "pipeline_tango.__main__",
    "tango-cache": "pipeline_tango.converted",
    "tango-convert": "pipeline_tango.convert.convert_tango",
    "tango-copy-synthesis": "pipeline_tango.training.copy_synthesis",
    "tango-demo": "pipeline_tango.demo",
    "tango-distill": "pipeline_tango.training.distill",
    "tango-dpo": "pipeline_tango.training.train_dpo",
    "tango-evaluate": "pipeline_tango.training.evaluate",
    "tango-listening-test": "pipeline_tango.training.listening_test",
    "tango-preferences": "pipeline_tango.training.preferences",
    "tango-publish": "pipeline_tango.convert.publish",
    "tango-train": "pipeline_tango.training.train",
    "tango-train-autoencoder": "pipeline_tango.training.train_autoencoder",
    "tango-train-tokenizer": "pipeline_tango.training.train_tokenizer",
    "tango-train-vocoder": "pipeline_tango.training.train_vocoder",
}
BEHIND_EXTRAS = ["datasets", "google.protobuf", "gradio", "matplotlib", "peft", "sentencepiece", "soundfile"]
BEHIND_EXTRAS += ["tensorboard"]


def run(command, cwd, **environment):
    """Finished process of a command, without the settings of the process that runs the tests."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment = inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=180
    )


def check(command, cwd, **environment):
    process = run(command, cwd, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def build_environment(folder, *pip_arguments):
    """The commands' folder of a new virtual environment: what pip installs there, and the libraries of this one.

    Path configuration files in those libraries' folder are not read: an editable install there stays out of sight.
    """
    check([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    [site_packages] = (folder / "lib").glob("python*/site-packages")
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(libraries)))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    pip += ["--no-deps", "--no-index", "--ignore-installed"]
    check([*pip, *pip_arguments], folder.parent, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return folder / "bin"


def copy_source(folder):
    """What is packaged, copied: building leaves files beside it."""
    folder.mkdir()
    for name in ("README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    for name in ("pipeline_tango", "convert", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory, worker_id):
    """Folder of an environment with the wheel, `bin`, and the lists of files in wheels and sdist, `files.json`.

    All workers of the tests share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "wheel"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_name("wheel.partial")
            partial.mkdir()
            copy_source(partial / "source")
            build = [sys.executable, "-m", "build", "--no-isolation", partial / "source", "--outdir"]
            check([*build, partial / "from_source", "--wheel"], partial)
            check([*build, partial / "from_sdist"], partial)  # the sdist, and a wheel from it
            [wheel], [wheel_of_sdist], [sdist] = (
                list(partial.glob(pattern))
                for pattern in ("from_source/*.whl", "from_sdist/*.whl", "from_sdist/*.tar.gz")
            )
            files = {
                "wheel": zipfile.ZipFile(wheel).namelist(),
                "from_sdist": zipfile.ZipFile(wheel_of_sdist).namelist(),
            }
            with tarfile.open(sdist) as archive:
                files["sdist"] = [name.partition("/")[2] for name in archive.getnames()]
            (partial / "files.json").write_text(json.dumps(files))
            partial.rename(folder)  # before installing: scripts name their interpreter by its full path
            build_environment(folder / "environment", folder / "from_source" / wheel.name)
            for name in ("source", "from_source", "from_sdist"):  # 200 MB that no test reads again
                shutil.rmtree(folder / name)
    return folder


@pytest.fixture
def bin(installed):
    return installed / "environment" / "bin"


@pytest.fixture
def without_extras(tmp_path_factory):
    """Environment variables under which the libraries that only extras bring cannot be imported."""
    folder = tmp_path_factory.mktemp("without_extras")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BEHIND_EXTRAS}))\n")
    return {"PYTHONPATH": str(folder)}


RUN_SCRIPTS = """
import contextlib, io, json, runpy, sys

results = []
for sys.argv in json.loads(sys.argv[1]):
    status, out, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
            if isinstance(status, str):  # as Python itself does at exit
                status = 1
                print(stop.code, file=errors)
    results.append([status, out.getvalue(), errors.getvalue()])
print(json.dumps(results))
"""


def run_scripts(commands, cwd, environment):
    """Exit status, output and errors of console scripts, in one process: most take seconds to import torch."""
    commands = json.dumps([list(map(str, command)) for command in commands])
    python = Path(json.loads(commands)[0][0]).with_name("python")
    return json.loads(check([python, "-c", RUN_SCRIPTS, commands], cwd, **environment))


@pytest.fixture
def manifest(tmp_path):
    """Two short recordings, listed as for training."""
    folder = tmp_path / "sounds"
    shutil.copytree(ROOT / "tests" / "goldens" / "tiny-a" / "golden" / "wav", folder)
    lines = [json.dumps({"location": f"{name}.wav", "captions": f"sound {name}"}) for name in "ab"]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def test_wheels_from_checkout_and_sdist_hold_the_same_files(installed):
    files = json.loads((installed / "files.json").read_text())
    assert sorted(files["wheel"]) == sorted(files["from_sdist"])
    packaged = {name for name in files["wheel"] if ".dist-info/" not in name}
    inside = {
        "pipeline_tango": "pipeline_tango",
        "convert": "pipeline_tango/convert",
        "training": "pipeline_tango/training",
    }
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in inside.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged == expected
    assert not [name for name in files["sdist"] if name.startswith("tests")]


def test_the_package_comes_from_the_wheel(bin, tmp_path):
    script = "import importlib.metadata, json, pipeline_tango; " + (
        "scripts = importlib.metadata.distribution('pipeline-tango').entry_points; "
        "print(json.dumps([pipeline_tango.__file__, {each.name: each.value for each in scripts}]))"
    )
    file, scripts = json.loads(check([bin / "python", "-c", script], tmp_path))
    assert Path(file).is_relative_to(bin.parent)
    assert scripts == {name: f"{module}:main" for name, module in COMMANDS.items()}


def test_help_names_every_command_and_needs_no_extra(bin, tmp_path, without_extras):
    results = run_scripts([[bin / name, "--help"] for name in COMMANDS], tmp_path, without_extras)
    for name, (status, out, errors) in zip(COMMANDS, results):
        assert (status, errors) == (0, "") and out.startswith(f"usage: {name} "), (name, out, errors)
    assert os.listdir(tmp_path) == []


def test_missing_extras_are_named_in_one_line(bin, tmp_path, manifest, without_extras):
    model, out = ROOT / "pipeline_tango" / "tango_tiny", tmp_path / "out"
    data = ["--train_manifest", manifest, "--output_dir", out]
    commands = [
        ["tango", "rain", "--spectrogram"],
        ["tango-copy-synthesis", manifest, out],
        ["tango-demo"],
        ["tango-distill", "--pretrained_model_name_or_path", model, *data, "--objective", "consistency"],
        ["tango-evaluate", "--generated", manifest.parent, "--prompts", manifest, "--output_dir", out],
        ["tango-listening-test", "build", "--system", f"a={manifest}", "--output", tmp_path / "test.html"],
        ["tango-train", "--pretrained_model_name_or_path", model, *data],
        ["tango-train-autoencoder", "--pretrained_model_name_or_path", model, *data],
        ["tango-train-tokenizer", *data],
        ["tango-train-vocoder", "--pretrained_model_name_or_path", model, *data],
    ]
    results = run_scripts([[bin / name, *rest] for name, *rest in commands], tmp_path, without_extras)
    for (name, *_), (status, _, errors) in zip(commands, results):
        assert status in (1, 2) and 'pip install "pipeline-tango[' in errors.splitlines()[-1], (name, errors)
        assert not out.exists() or os.listdir(out) == [], name


@pytest.mark.parametrize(
    "command, status",
    [("tango --help", 0), ("tango", 2), ("tango-convert --help", 0), ("tango-convert a", 2)]
    + [("tango-publish --help", 0), ("tango-publish a", 2)],
)
def test_help_and_wrong_arguments_do_not_import_torch(bin, tmp_path, command, status):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    name, *arguments = command.split()
    process = run([bin / name, *arguments], tmp_path, PYTHONPATH=str(tmp_path))
    assert process.returncode == status and "torch was imported" not in process.stderr


def test_a_sound_is_made_offline(bin, tmp_path, without_extras):
    check([bin / "tango", "rain", "--seconds", "0.1", "--steps", "2", "--seed", "0"], tmp_path, **without_extras)
    sampling_rate, samples = wavfile.read(tmp_path / "tango.wav")
    assert (sampling_rate, len(samples)) == (16000, 1600) and samples.any()


def test_a_checkpoint_is_converted_back_and_forth_and_published(bin, tmp_path, original_checkpoint, converted):
    check([bin / "tango-convert", original_checkpoint, "tango"], tmp_path)
    assert fingerprint(tmp_path / "tango") == fingerprint(converted)
    check([bin / "tango-convert", "--to_original", "tango", "back"], tmp_path)
    assert (tmp_path / "back" / "pytorch_model_main.bin").is_file()
    environment = {"HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    with Hub() as hub:
        environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        url = check([bin / "tango-publish", "tango", "alice/tango"], tmp_path, **environment)
        assert url == f"{hub.endpoint}/alice/tango\n"
        assert {"model_index.json", "pipeline.py", "README.md"} <= hub.repos["alice/tango"].files.keys()


def test_accelerate_launches_two_steps_of_training(bin, tmp_path, tiny_folder, manifest):
    command = [bin / "python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 1]
    command += ["-m", "pipeline_tango.training.train", "--pretrained_model_name_or_path", tiny_folder]
    command += ["--train_manifest", manifest, "--output_dir", "out", "--max_train_steps", 2]
    check([*command, "--num_workers", 0, "--train_batch_size", 1], tmp_path)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert (tmp_path / "out" / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


def test_an_editable_install_has_every_command(tmp_path):
    copy_source(tmp_path / "source")
    bin = build_environment(tmp_path / "environment", "--no-build-isolation", "--editable", tmp_path / "source")
    (tmp_path / "empty").mkdir()
    script = "import importlib.util, sys\nfor name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)"
    origins = check([bin / "python", "-c", script, *COMMANDS.values()], tmp_path / "empty").splitlines()
    modules = [re.sub(r"^pipeline_tango\.(?=convert\.|training\.)", "", module) for module in COMMANDS.values()]
    modules = [module.replace(".", "/") for module in modules]
    assert origins == [str(tmp_path / "source" / f"{module}.py") for module in modules]
    assert {path.name for path in bin.iterdir()} >= COMMANDS.keys()
    assert check([bin / "tango-convert", "--help"], tmp_path / "empty").startswith("usage: tango-convert ")
