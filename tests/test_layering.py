"""The house's arrows: examples, training and convert -> pipeline_tango -> libraries, and nothing else."""

import ast
import configparser
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
OURS = {"convert", "examples", "pipeline_tango", "tests", "training"}
MAY_IMPORT = {
    "pipeline_tango": {"pipeline_tango"},
    "convert": {"convert", "pipeline_tango"},
    "training": {"training", "pipeline_tango"},
    "examples": {"examples", "pipeline_tango"},
}
INFERENCE = {  # files of pipeline_tango -> files beside them that they may import. The command and the like import all
    "attention": set(),
    "deep_cache": set(),
    "mel": set(),
    "positions": set(),
    "prompts": set(),
    "schedule": set(),
    "single_file": set(),
    "torch_settings": set(),
    "windows": set(),
    "json_files": set(),
    "input_audio": {"mel"},
    "model_files": {"json_files"},
    "student": {"schedule"},
    "lora": {"json_files", "model_files", "student"},
    "seams": {"input_audio", "mel"},
    "checks": {"input_audio", "mel", "positions", "prompts", "schedule", "student", "windows"},
}
INFERENCE["pipeline_tango"] = set(INFERENCE)  # and, by name, "converted", which the code file of a Hub repo has not
INFERENCE |= {
    "deferred_imports": set(),
    "kernels": {"attention"},
    "weight_maps": set(),
    "original": {"json_files", "model_files", "weight_maps"},
    "original_hub": {"original"},
    "converted": {"json_files", "original", "original_hub"},
}
RUNTIME = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "safetensors",
    "scipy",
    "torch",
    "tqdm",
    "transformers",
}
BEHIND_EXTRAS = {"gradio", "matplotlib", "torch_xla", "soundfile"}


def imports(path):
    """Absolute names of the modules that the file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            names.add(".".join([*package, node.module or ""]).strip("."))
    return names


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name):
    file = ROOT.joinpath(*name.split("."))
    return file.with_suffix(".py").exists() or (file / "__init__.py").exists()


def project_imports(path):
    """Names of the project's modules that the file imports, anywhere in it, by whatever form of the statement."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join(filter(None, [*package, node.module]))
            members = [f"{module}.{alias.name}" for alias in node.names]
            names |= {member if is_module(member) else module for member in members}
    folder = ".".join(path.relative_to(ROOT).parent.parts)  # scripts and tests import what lies beside them
    names |= {f"{folder}.{name}" for name in names}
    return {name for name in names if is_module(name)}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_arrow_points_down(folder):
    for path in (ROOT / folder).rglob("*.py"):
        upwards = {name for name in imports(path) if name.split(".")[0] in OURS - MAY_IMPORT[folder]}
        assert not upwards, f"{path} imports {upwards}"


def test_the_package_needs_only_its_runtime_libraries():
    for path in (ROOT / "pipeline_tango").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        strangers = tops - sys.stdlib_module_names - RUNTIME - BEHIND_EXTRAS - {"pipeline_tango"}
        assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("name", INFERENCE)
def test_the_files_of_inference_import_only_those_below_them(name):
    path = ROOT / "pipeline_tango" / f"{name}.py"
    if path.exists():
        assert project_imports(path) <= {f"pipeline_tango.{other}" for other in INFERENCE[name]}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_name(path): project_imports(path) for folder in OURS for path in (ROOT / folder).rglob("*.py")}
    assert "pipeline_tango.mel" in graph["pipeline_tango.pipeline_tango"]  # relative imports are seen
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")


def test_leaves_import_nothing_of_ours():
    for name in ("data", "evaluation/listeners", "evaluation/metrics", "mixing", "objective"):
        path = ROOT / "training" / f"{name}.py"
        if path.exists():
            allowed = {"pipeline_tango.sound_files"} if name == "data" else set()  # sounds are read as by the command
            assert {each for each in imports(path) if each.split(".")[0] in OURS} <= allowed


def test_evaluation_imports_nothing_of_the_trainers():
    paths = [*(ROOT / "training" / "evaluation").glob("*.py")]
    paths += [ROOT / "training" / f"{name}.py" for name in ("evaluate", "listening_test", "copy_synthesis")]
    for path in paths:
        assert not {name for name in imports(path) if name.startswith("training.train")}, path


def test_there_are_no_catch_all_modules():
    names = {path.name for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils.py", "helpers.py", "common.py", "misc.py"}


def test_runtime_requirements_have_no_upper_pins_and_match_the_imports():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    requirements = config["options"]["install_requires"].split()
    assert not [line for line in requirements if "<" in line or "==" in line or "~" in line]
    assert {line.split(">=")[0] for line in requirements} == RUNTIME - {
        "numpy",
        "tqdm",
    }  # which scipy and diffusers bring


def test_importing_prints_nothing_and_needs_no_optional_library():
    script = (
        "import sys\n"
        "for name in ('gradio', 'matplotlib', 'peft', 'soundfile', 'datasets', 'librosa'): sys.modules[name] = None\n"
        "import pipeline_tango\n"
        "pipeline_tango.TangoPipeline, pipeline_tango.log_mel_spectrogram, pipeline_tango.SCHEDULERS\n"
    )
    result = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], cwd=ROOT, capture_output=True)
    assert result.returncode == 0 and result.stdout == b"", result.stderr
