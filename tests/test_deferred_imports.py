import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


def run_python(script, *folders):
    """What a script prints as JSON, in a process that has imported nothing yet."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders or (ROOT,))), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def library(tmp_path):
    """A library that tells in `events` when it is imported, and another that uses it."""
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text(
        "import events; events.seen.append('heavy')\nvalue, __version__ = 3, '1'\n"
    )
    (tmp_path / "heavy" / "parts.py").write_text(
        "import events; events.seen.append('heavy.parts')\n"
        "class Part: pass\n"
        "def double(x): return 2 * x\n"
        "def mark(f): events.seen.append('marked'); return f\n"
        "def disable(f=None): return (lambda *a: ['disabled', f(*a)]) if f else disable\n"
    )
    (tmp_path / "events.py").write_text("seen = []\n")
    (tmp_path / "user.py").write_text(
        "import heavy.parts\nfrom heavy.parts import Part, double, mark, disable\n"
        "@mark\ndef marked(): return 1\n"
        "@disable\ndef plain(x): return x\n"
        "@disable()\ndef called(x): return x\n"
        "def is_part(x): return isinstance(x, Part)\n"
    )
    return tmp_path


PRELUDE = """
import json, sys, pipeline_tango.deferred_imports as subject
subject.MARKS, subject.DISABLE, subject.ASKED_FOR = ("heavy.parts.mark",), "heavy.parts.disable", ()
with subject.deferred_imports(["heavy"]):
    import events, user
seen = list(events.seen)
"""


@pytest.mark.parametrize(
    "use, expected",
    [
        ("user.heavy.value", 3),
        ("user.double(4)", 8),
        ("user.heavy.parts.double(4)", 8),
        ("__import__('types').new_class('Mine', (user.Part,)).__name__", "Mine"),
        ("__import__('heavy').value", 3),
        ("user.heavy.__version__", "1"),
    ],
)
def test_a_library_is_imported_when_something_of_it_is_used(library, use, expected):
    script = f"{PRELUDE}\nresult = {use}\nprint(json.dumps([seen, result, events.seen[:3]]))"
    seen, result, after = run_python(script, ROOT, library)
    assert seen == [] and result == expected and after == ["heavy", "heavy.parts", "marked"]


def test_nothing_is_imported_by_what_goes_without(library):
    script = (
        f"{PRELUDE}\nprint(json.dumps([user.is_part(1), user.marked(), user.plain(5), user.called(6), events.seen]))"
    )
    assert run_python(script, ROOT, library) == [False, 1, 5, 6, []]


def test_afterwards_all_is_as_if_imported_at_once(library):
    script = f"""{PRELUDE}
user.double(1)
import heavy, heavy.parts
print(json.dumps([
    user.double is heavy.parts.double, user.Part is heavy.parts.Part, user.is_part(heavy.parts.Part()),
    user.plain(5), user.called(6), sys.modules["heavy"] is heavy, type(heavy).__name__, events.seen,
    user.heavy.parts.double(2), sum(type(each).__name__ == "DeferringFinder" for each in sys.meta_path),
]))"""
    *same, plain, called, is_real, kind, seen, four, num_finders = run_python(script, ROOT, library)
    assert all(same) and is_real and kind == "module" and four == 4 and num_finders == 0
    assert plain == ["disabled", 5] and called == ["disabled", 6]
    assert seen == ["heavy", "heavy.parts", "marked"]  # each once


def test_what_is_there_already_stays_and_errors_remain(library):
    script = """
    import json, pipeline_tango.deferred_imports as subject
    import heavy.parts
    with subject.deferred_imports(["heavy", "absent"]):
        from heavy.parts import double
        try:
            import absent
        except ImportError as error:
            message = str(error)
    print(json.dumps([double is heavy.parts.double, message]))
    """
    assert run_python(script, ROOT, library) == [True, "No module named 'absent'"]


def test_the_command_imports_none_of_them_and_the_libraries_work_when_it_does(tmp_path):
    """What diffusers and transformers take from these libraries is still there when it is used."""
    script = f"""
    import json, sys, pipeline_tango.__main__ as command
    from pipeline_tango.deferred_imports import DEFERRED, DeferredModule, DeferredName
    argv = ["rain", "--steps", "1", "--seconds", "0.2", "--seed", "0", "--quiet", "-o", {str(tmp_path / "a.wav")!r}]
    status = command.main(argv)
    early = [name for name in DEFERRED if name in sys.modules and type(sys.modules[name]) is not DeferredModule]
    import torch
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from peft import LoraConfig
    EulerDiscreteScheduler(use_beta_sigmas=True).set_timesteps(3)  # by scipy.stats
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4, sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    unet.compile(backend="eager", fullgraph=False)
    shape = tuple(unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, 8)).sample.shape)
    left = [
        f"{{name}}.{{key}}" for name, module in list(sys.modules.items()) for key, value in list(vars(module).items())
        if type(value) is DeferredName and value.path.split(".")[0] in ("torch", "peft")
    ]
    print(json.dumps([status, early, shape, left]))
    """
    assert run_python(script) == [0, [], [1, 4, 8, 8], []]
