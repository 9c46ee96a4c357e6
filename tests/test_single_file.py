import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import check_imports
from hub import File, Hub, Repo, start

import pipeline_tango
from pipeline_tango import TangoPipeline
from pipeline_tango.single_file import single_file


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pipeline_tango"
MODULES = {
    "__init__": '__version__ = "1.2.3"\n',
    "main": '''\
# Copyright nobody.
"""Sounds.

And more.
"""

from __future__ import annotations

import os  # of the system
from collections import OrderedDict, defaultdict

import numpy as np

from .leaf import SIZE, area
from .middle import double


if os.name:
    import json


def main():  # the command
    return json.dumps(double(np.float64(area(SIZE))))
''',
    "middle": '''\
# Copyright nobody.
"""Doubles
things.

Twice.
"""

import os.path
from collections import abc

from .leaf import area


def double(x):
    # twice
    return area(x) * 2
''',
    "leaf": '''\
"""Areas."""

import math
import os

import numpy as np


SIZE = math.pi  # of a side


def area(x):
    return np.square(x)
''',
}
EXPECTED = '''\
# Generated from sample 1.2.3 by sample/single_file.py: edit that package, not this file.
#
# Copyright nobody.
"""Sounds.

And more.
"""

from __future__ import annotations

import math
import os  # of the system
import os.path
from collections import OrderedDict, abc, defaultdict

import numpy as np


# leaf.py: Areas.


SIZE = math.pi  # of a side


def area(x):
    return np.square(x)


# middle.py: Doubles things.
#
# Twice.


def double(x):
    # twice
    return area(x) * 2


# main.py


if os.name:
    import json


def main():  # the command
    return json.dumps(double(np.float64(area(SIZE))))
'''


def write_package(folder, modules):
    for name, source in modules.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(source)
    return folder / "main.py"


def sources():
    """Paths of the modules that make up the generated file."""
    names = ["pipeline_tango"]
    for name in names:
        found = re.findall(r"^from \.(\w+) import", (PACKAGE / f"{name}.py").read_text(), re.MULTILINE)
        names += sorted(set(found) - set(names))
    return [PACKAGE / f"{name}.py" for name in names]


def comments(source):
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.string for token in tokens if token.type == tokenize.COMMENT}


@pytest.fixture(scope="module")
def generated():
    return single_file(PACKAGE / "pipeline_tango.py")


# Samples


def test_modules_stand_after_what_they_import_under_merged_imports(tmp_path):
    assert single_file(write_package(tmp_path / "sample", MODULES)) == EXPECTED


def test_a_module_without_relative_imports_is_returned_as_it_is(tmp_path):
    for source in EXPECTED, MODULES["leaf"], "", "import b\nimport a\n":
        (tmp_path / "main.py").write_text(source)
        assert single_file(tmp_path / "main.py") == source


@pytest.mark.parametrize(
    "leaf, message",
    [
        ("def double(x): ...", "`double` is both that of leaf.py and that of middle.py"),
        ("if True:\n    from numpy import double", "`double` is both that of leaf.py and"),
        ("import numpy as os", "`os` is both os and numpy: rename"),
        ("from math import floor as area", "`area` is both math.floor and that of leaf.py"),
        ("from collections.abc import OrderedDict", "`OrderedDict` is both collections.OrderedDict and coll"),
    ],
)
def test_a_name_with_two_meanings_is_refused(tmp_path, leaf, message):
    path = write_package(tmp_path / "sample", MODULES | {"leaf": f"{leaf}\n\n\nSIZE = 1\n\n\ndef area(x): ...\n"})
    with pytest.raises(ValueError, match=message):
        single_file(path)


@pytest.mark.parametrize(
    "statement",
    [
        "from . import __version__",
        "from .leaf import area as surface",
        "from .deep.leaf import area",
        "from ..sample import leaf",
        "def f():\n    from .leaf import area",
    ],
)
def test_relative_imports_that_cannot_be_inlined_are_refused(tmp_path, statement):
    path = write_package(tmp_path / "sample", MODULES | {"middle": f"{statement}\n\n\ndef double(x): ...\n"})
    with pytest.raises(ValueError, match=r"middle.py:\d: only `from .module import name` can be inlined"):
        single_file(path)


# The real one


def test_generating_from_a_generated_file_gives_the_same_bytes(generated, tmp_path):
    (tmp_path / "pipeline.py").write_text(generated)
    assert single_file(tmp_path / "pipeline.py") == generated


def test_the_result_does_not_depend_on_the_place_or_on_the_process(generated, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pipeline_tango", ignore=shutil.ignore_patterns("tango_tiny", "__pycache__"))
    script = (
        "from pipeline_tango.single_file import single_file\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "sys.stdout.write(single_file('pipeline_tango/pipeline_tango.py'))"
    )
    command = [sys.executable, "-X", "utf8", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env={"PYTHONHASHSEED": "7"}, capture_output=True)
    assert result.stdout.decode() == generated, result.stderr
    assert str(ROOT) not in generated and str(tmp_path) not in generated


def test_the_first_line_says_what_it_was_generated_from_and_the_licence_follows(generated):
    first, _, licence = generated.partition("\n#\n")
    version = pipeline_tango.__version__
    assert first.startswith(f"# Generated from pipeline_tango {version} by pipeline_tango/single_file.py: ")
    assert licence.startswith("# Copyright ") and "Apache License, Version 2.0" in licence[:300]


def test_the_result_is_clean(generated):
    for command in (["check", "-"], ["format", "--check", "-"]):
        options = ["--config", str(ROOT / "pyproject.toml"), "--stdin-filename", "pipeline.py"]
        ruff = [sys.executable, "-m", "ruff", command[0], *options, *command[1:]]
        result = subprocess.run(ruff, input=generated, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_no_comment_and_no_code_is_lost(generated):
    paths = sources()
    assert len(paths) > 1 and not {path.stem for path in paths} & {"__main__", "presets", "original", "sound_files"}
    for path in paths:
        source = re.sub(r"^(from \..*?)  # noqa: F401$", r"\1", path.read_text(), flags=re.MULTILINE)
        assert comments(source) <= comments(generated), path
        for node in ast.parse(source).body:
            if not isinstance(node, (ast.Import, ast.ImportFrom)) and node.col_offset == 0:
                segment = ast.get_source_segment(source, node)
                is_docstring = isinstance(node, ast.Expr) and path.stem != "pipeline_tango"
                assert generated.count(segment) >= 1 or is_docstring, f"{path}: {segment:.100}"


def test_every_top_level_name_is_defined_once(generated):
    names = Counter()
    for node in ast.parse(generated).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names.update(getattr(each, "id", getattr(each, "name", "")) for each in targets)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
    del names[""]
    assert names["TangoPipeline"] == 1 and names["torch"] == 1 and set(names.values()) == {1}


def test_it_imports_nothing_of_its_package(generated, tmp_path):
    (tmp_path / "pipeline.py").write_text(generated)
    assert check_imports(tmp_path / "pipeline.py") == []  # what the loader of diffusers would look for beside it
    for node in ast.walk(ast.parse(generated)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and not node.module.startswith("pipeline_tango")


def test_a_saved_pipeline_carries_it(generated, tiny_folder):
    assert (tiny_folder / "pipeline.py").read_bytes() == generated.encode()


# In fresh processes, where the package cannot be imported

SCRIPT = """
import sys
from pathlib import Path

sys.modules["pipeline_tango"] = None  # as if the package were not installed

import numpy as np
import torch
from diffusers import DiffusionPipeline


def load(model, code=None, **options):
    code = code or model
    return DiffusionPipeline.from_pretrained(model, custom_pipeline=code, trust_remote_code=True, **options)


def check(pipe, code_version):
    assert type(pipe).__name__ == "TangoPipeline" and pipe.save_pretrained.__globals__["CODE_VERSION"] == code_version
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    waveform = pipe("rain", num_inference_steps=2, audio_length_in_s=0.1, generator=generator).audios
    assert np.abs(waveform - np.load("expected.npy")).max() < 1e-5
    pipe.save_pretrained("saved")
    assert Path("saved/pipeline.py").read_bytes() == Path(f"{code_version}/pipeline.py").read_bytes()


"""
ONLINE = """
for revision, code_version in zip(sys.argv[1:], ("v1", "v2.0")):
    pipe = load("alice/tango-v1.5", revision=revision, custom_revision=revision)
    check(pipe, code_version)
pipe.push_to_hub("alice/pushed", token="hf_alice")
check(load("alice/tango-v1.5"), "v2.0")
folder = type(pipe).download("alice/pushed", cache_dir="cache")
assert not Path(folder, "README.md").exists()  # only what it needs
check(load(folder), "v2.0")
Path("folder.txt").write_text(str(folder))
"""
OFFLINE = """
folder = Path("folder.txt").read_text()
check(load(folder), "v2.0")
check(load("alice/tango-v1.5", code=folder), "v2.0")
for code_version in "v1", "v2.0", "v1":  # which the loader puts into one module
    check(load(code_version), code_version)
check(load("saved"), "v1")
"""


@pytest.fixture(scope="module")
def versions(tiny_folder, tmp_path_factory):
    """A folder with two copies of `tiny_folder`, v1 and v2.0, whose code differs, and the waveform of both."""
    place = tmp_path_factory.mktemp("versions")
    for code_version in "v1", "v2.0":
        package = place / f"sources-{code_version}" / "pipeline_tango"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("tango_tiny", "__pycache__"))
        with (package / "single_file.py").open("a") as file:
            # of another length: Python takes a file of the same length and second for the one that it has compiled
            file.write(f'\n\nCODE_VERSION = "{code_version}"\n')
        shutil.copytree(tiny_folder, place / code_version)
        (place / code_version / "pipeline.py").write_text(single_file(package / "pipeline_tango.py"))
    pipe = TangoPipeline.from_pretrained(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    waveform = pipe("rain", num_inference_steps=2, audio_length_in_s=0.1, generator=generator).audios
    np.save(place / "expected.npy", waveform)
    return place


def run(script, place, hub, *arguments, **environment):
    process = start(["-c", SCRIPT + script, *arguments], hub, place / "home", place, **environment)
    assert process.returncode == 0, process.stderr


def test_repos_revisions_snapshots_and_folders_each_run_and_save_their_own_code(versions):
    repo = Repo(private=False)
    with Hub() as hub:
        hub.repos["alice/tango-v1.5"] = repo
        for code_version in "v1", "v2.0":
            paths = [path for path in (versions / code_version).rglob("*") if path.is_file()]
            files = {
                path.relative_to(versions / code_version).as_posix(): File(
                    path.read_bytes(), is_lfs=path.suffix == ".safetensors"
                )
                for path in paths
            }
            repo.commit(code_version, {"README.md": File(b"# Tango", is_lfs=False)} | files)
            hub.objects |= {file.etag: file.content for file in files.values() if file.is_lfs}
        run(ONLINE, versions, hub, *(oid for oid, *_ in repo.commits[1:]))
        assert hub.repos["alice/pushed"].files["pipeline.py"].content == repo.files["pipeline.py"].content
    run(OFFLINE, versions, hub, HF_HUB_OFFLINE="1")
