"""`from_pretrained` and `tango` of checkpoints in the original's layout, from a Hub on the loopback interface."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import weights
from hub import File, Hub, Repo, start

from pipeline_tango.single_file import single_file


ROOT = Path(__file__).parents[1]
CARD = b"---\nlicense: cc-by-nc-sa-4.0\n---\n# Tango\n"
WEIGHTS = ["pytorch_model_main.bin", "pytorch_model_stft.bin", "pytorch_model_vae.bin"]
NEEDED = [
    "README.md",
    "configs/diffusion_model_config.json",
    "main_config.json",
    *WEIGHTS,
    "stft_config.json",
    "vae_config.json",
]
WORKER = """
import contextlib, io, json, logging, os, resource, sys, time, torch
from pathlib import Path
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from huggingface_hub import constants
from pipeline_tango import TangoPipeline, converted, original, original_hub
from pipeline_tango.__main__ import main as tango

def load(source="alice/original", **options):
    pipe = TangoPipeline.from_pretrained(source, **{"cache_dir": CACHE, **options})
    print(pipe.unet.dtype, pipe.vae.dtype, pipe.config._name_or_path)
    return pipe

for line in sys.stdin:
    request = json.loads(line)
    CACHE = request["cache_dir"]
    output, log, error = io.StringIO(), io.StringIO(), None
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()) as printed:
        start = time.perf_counter()
        try:
            exec(request["code"], globals())
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
    logging.getLogger().removeHandler(handler)
    said = log.getvalue() + printed.getvalue()
    answer = {"output": output.getvalue(), "log": said, "error": error, "seconds": time.perf_counter() - start}
    sys.__stdout__.write(json.dumps(answer) + "\\n")
    sys.__stdout__.flush()
"""
LOAD = (
    "import sys; from pipeline_tango import TangoPipeline\n"
    "pipe = TangoPipeline.from_pretrained('alice/original', cache_dir=sys.argv[1]); print(pipe.unet.dtype)\n"
)


def environment_of(hub, home):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHON"))}
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    return inherited | settings | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def add_repo(hub, name, files, **options):
    hub.repos[name] = Repo(private=False, **options)
    return add_commit(hub, name, files)


def add_commit(hub, name, files):
    files = {path: File(content, is_lfs=path.endswith((".bin", ".safetensors"))) for path, content in files.items()}
    hub.objects |= {file.etag: file.content for file in files.values() if file.is_lfs}
    return hub.repos[name].commit("add", files)


def files_under(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def released(original_checkpoint):
    """Files of a repo like the released ones: text encoder and scheduler by name, and more than is needed."""
    files = files_under(original_checkpoint)
    files = {name: content for name, content in files.items() if not name.startswith(("tiny-t5/", "scheduler/"))}
    config = json.loads(files["main_config.json"])
    config |= {"text_encoder_name": "google/tiny-t5", "scheduler_name": "stabilityai/stable-diffusion-2-1"}
    extra = dict.fromkeys(["data/train.json", "figure.png", "model.safetensors", "other/README.md"], b"{}" * 1000)
    return files | extra | {"main_config.json": json.dumps(config).encode(), "README.md": CARD}


@pytest.fixture(scope="module")
def hub(released, original_checkpoint, tiny_folder):
    with Hub() as hub:
        add_repo(hub, "alice/original", released)
        add_repo(hub, "google/tiny-t5", files_under(original_checkpoint / "tiny-t5"))
        add_repo(hub, "alice/diffusers", files_under(tiny_folder))
        yield hub


@pytest.fixture(scope="module")
def worker(hub, tmp_path_factory):
    """A process whose Hub is `hub`: its libraries read the address when they are imported."""
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=home,
        env=environment_of(hub, home),
    )
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture
def run(worker, hub, tmp_path):
    """Runs code in the worker, with a cache of the test's own, and returns what came of it."""

    def run(code="load()", error=None):
        hub.requests.clear()
        worker.stdin.write(json.dumps({"code": code, "cache_dir": str(tmp_path / "cache")}) + "\n")
        worker.stdin.flush()
        answer = json.loads(worker.stdout.readline())
        if error is None:
            assert answer["error"] is None, answer
        else:
            assert answer["error"] is not None and re.search(error, answer["error"]), answer
            assert "\n" not in answer["error"].strip() and "Traceback" not in answer["log"]
        return answer

    return run


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "cache" / "tango-converted" / "alice--original"


def entries(kept):
    return sorted(path.name.split("--", 1)[1] for path in kept.iterdir() if path.name != "refs")


def fetched(hub, repo="alice/original"):
    """Files that were asked for."""
    asked = [re.fullmatch(rf"\w+ /{repo}/resolve/\w+/(.+)", request) for request in hub.requests]
    return sorted({match[1] for match in asked if match} - {"model_index.json"})


# Once only


def test_the_first_call_fetches_what_is_needed_and_says_what_happens(run, hub, kept, converted):
    answer = run()
    assert fetched(hub) == NEEDED
    assert not {"pytorch_model.bin"} & set(fetched(hub, "google/tiny-t5"))
    assert answer["output"].split() == ["torch.float32", "torch.float32", "alice/original"]
    [line] = [line for line in answer["log"].splitlines() if "original's layout" in line]
    for part in ("3.8 MB to download", "3.7 MB to write", "float32", str(kept), "cc-by-nc-sa-4.0", "half a minute"):
        assert part in line
    assert entries(kept) == ["float32--v1"]
    [entry] = kept.glob("*--v1")
    assert weights(entry) == weights(converted)


def test_later_calls_ask_for_the_commit_only_and_none_offline(run, hub, kept):
    run()
    run()
    assert hub.requests == ["GET /api/models/alice/original"]
    run("load(local_files_only=True)")
    assert hub.requests == []
    run("constants.HF_HUB_OFFLINE = True\ntry: load()\nfinally: constants.HF_HUB_OFFLINE = False")
    assert hub.requests == []
    run("load(revision=%r)" % hub.repos["alice/original"].commits[-1][0])
    assert hub.requests == []


def test_later_calls_find_it_when_the_hub_is_gone(run, hub, tmp_path):
    run()
    with Hub() as gone:
        pass
    arguments = ["-c", LOAD, tmp_path / "cache"]
    process = start(arguments, gone, tmp_path / "home", tmp_path, PYTHONPATH=str(ROOT))
    assert process.stdout == "torch.float32\n", process.stderr
    assert "cannot be reached" in process.stderr


def test_another_dtype_is_converted_from_what_was_downloaded(run, hub, kept):
    run()
    output = run("load(dtype=torch.bfloat16)")["output"]
    assert not set(WEIGHTS) & set(fetched(hub)) and output.startswith("torch.bfloat16 torch.bfloat16")
    output = run("load(dtype={'default': torch.float32, 'unet': torch.bfloat16}, local_files_only=True)")["output"]
    assert hub.requests == [] and output.startswith("torch.bfloat16 torch.float32")
    run("load(torch_dtype=torch.bfloat16)")
    mixed = "text_encoder.float32+unet.bfloat16+vae.float32+vocoder.float32--v1"
    assert entries(kept) == ["bfloat16--v1", "float32--v1", mixed]
    run("load(dtype=torch.int8)", error="ValueError: `dtype` must be a floating-point dtype.*torch.int8")


def test_another_revision_is_another_conversion(run, hub, released):
    first = add_repo(hub, "alice/moving", released)
    run("print(load('alice/moving').vae.config.scaling_factor)")
    config = json.loads(released["vae_config.json"]) | {"scale_factor": 0.5}
    add_commit(hub, "alice/moving", released | {"vae_config.json": json.dumps(config).encode()})
    assert run("print(load('alice/moving').vae.config.scaling_factor)")["output"].split()[-1] == "0.5"
    assert not [request for request in hub.requests if request.startswith("GET /storage")]  # the weights are the same
    answer = run(f"print(load('alice/moving', revision='{first}').vae.config.scaling_factor)")
    assert answer["output"].split()[-1] == "0.9227914214134216" and hub.requests == []
    run("load('alice/moving', revision='nowhere')", error="OSError: .*no such `revision`")
    add_commit(hub, "alice/moving", {path: file.content for path, file in hub.repos["alice/diffusers"].files.items()})
    run("assert load('alice/moving').unet.config.in_channels == 4")  # it is a diffusers repo now


def test_given_components_are_used_and_variants_refused(run):
    run(
        "pipe = load(scheduler=EulerDiscreteScheduler(), vocoder=None)\nassert pipe.vocoder is None\n"
        "assert isinstance(pipe.scheduler, EulerDiscreteScheduler)"
    )
    run("load(variant='fp16')", error="ValueError: `variant` must be None .* got 'fp16'")


def test_originals_can_be_removed_after_conversion(run, hub, tmp_path):
    run("load(remove_originals=True)")
    assert not list((tmp_path / "cache").rglob("pytorch_model_*.bin"))
    run("load(local_files_only=True)")
    run("load(local_files_only=True, dtype=torch.bfloat16)", error="OSError: .*not wholly cached.*main")
    run("load(dtype=torch.bfloat16)")
    assert fetched(hub) == NEEDED


def test_force_download_fetches_and_converts_again(run, hub, kept):
    run()
    [entry] = kept.glob("*--v1")
    before = entry.stat().st_ino
    run("load(force_download=True)")
    assert set(WEIGHTS) <= set(fetched(hub))
    assert entry.stat().st_ino != before and entries(kept) == ["float32--v1"]


# Interrupted, together


@pytest.mark.parametrize(
    "moment",
    [
        "converted.announce = kill",
        "original.save_component = lambda *args: kill() if args[1] == 'vae' else save(*args)",
        "converted.write_json = kill",
    ],
    ids=["download", "component", "end"],
)
def test_a_call_after_one_that_was_killed_goes_on(run, hub, kept, tmp_path, moment):
    script = (
        "import os, signal; from pipeline_tango import converted, original, original_hub\n"
        "def kill(*args, **options): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"save = original.save_component\n{moment}\n"
    )
    command = [sys.executable, "-c", script + LOAD, str(tmp_path / "cache")]
    process = subprocess.run(command, cwd=ROOT, env=environment_of(hub, tmp_path), capture_output=True, timeout=120)
    assert process.returncode == -signal.SIGKILL, process.stderr
    leftovers = list(kept.glob(".partial-*"))
    assert not list(kept.glob("*--v1")) and bool(leftovers) == ("save" in moment or "write" in moment)
    if leftovers:
        listing = run("converted.main(['--cache_dir', CACHE])")["output"]
        assert "left by a killed process" in listing
    run()
    assert bool(set(WEIGHTS) & set(fetched(hub))) != bool(leftovers)
    assert entries(kept) == ["float32--v1"] and not list(kept.glob(".partial-*"))


def test_two_at_once_convert_once(hub, kept, tmp_path):
    hub.requests.clear()
    command = [sys.executable, "-c", LOAD, str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    options = {"cwd": ROOT, "env": environment_of(hub, tmp_path), "stdout": pipe, "stderr": pipe, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [stdout for stdout, _ in outputs] == ["torch.float32\n"] * 2, outputs
    assert sum("is converted once" in stderr for _, stderr in outputs) == 1
    main = hub.repos["alice/original"].files[WEIGHTS[0]].etag
    assert hub.requests.count(f"GET /storage/{main}") == 1
    assert entries(kept) == ["float32--v1"]


# The disk


def test_a_disk_without_room_is_told_before_the_download(run, hub, kept):
    code = (
        "import shutil, collections\nusage = shutil.disk_usage\n"
        "shutil.disk_usage = lambda path: collections.namedtuple('Usage', 'free')(1_000_000)\n"
        "try: load()\nfinally: shutil.disk_usage = usage"
    )
    run(code, error=r"OSError: alice/original needs 7.5 MB of disk \(3.8 MB to download.*1.0 MB free.*`cache_dir`")
    assert not set(WEIGHTS) & set(fetched(hub)) and not kept.exists()


def test_a_disk_that_fills_up_leaves_nothing(run, kept):
    """Files stop growing half way through one of the larger ones, as they do on a full disk."""
    run()
    code = (
        "limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))\n"
        "try: load(dtype=torch.bfloat16)\nfinally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)"
    )
    run(code, error="OSError: alice/original was not converted, and nothing was left in .*disk may be full")
    assert entries(kept) == ["float32--v1"] and not list(kept.glob(".partial-*"))
    run("load(dtype=torch.bfloat16)")


def test_a_damaged_download_is_named_and_fetched_again_on_demand(run, tmp_path):
    run()
    [path] = (tmp_path / "cache").rglob("pytorch_model_vae.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.resolve().write_bytes(content)
    error = "ValueError: .*pytorch_model_vae.bin is cut short, damaged.*`force_download=True`"
    run("load(dtype=torch.bfloat16)", error=error)
    run("load(dtype=torch.bfloat16, force_download=True)")


def test_a_cache_that_cannot_be_written_to_is_named(run, hub, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tango-converted").write_text("")  # unlike permissions, it stops root too
    run(error=r"OSError: alice/original is in the original's layout.*cannot be kept in .*`cache_dir`")
    assert not set(WEIGHTS) & set(fetched(hub))


def test_what_is_kept_loads_from_a_cache_that_cannot_be_written_to(run, kept):
    run()
    (kept / "refs" / "main").unlink()
    (kept / "refs").rmdir()
    (kept / "refs").write_text("")
    run()


# What cannot be had


def test_names_that_lead_nowhere_are_told_in_a_line_at_once(run, hub, released, tmp_path):
    hub.repos["alice/gated"] = Repo(private=False, is_gated=True)
    add_commit(hub, "alice/gated", released)
    add_repo(hub, "alice/other", {"model.safetensors": b"1", "config.json": b"{}"})
    errors = {
        "declare-lab/tagno2": "OSError: .*no folder.*no repo.*did you mean 'declare-lab/tango2'",
        "alice/gated": "OSError: alice/gated is gated: accept its conditions at http.*alice/gated",
        "alice/other": "OSError: alice/other at .* has neither model_index.json nor all files.*pytorch_model",
        "./orignal": "ValueError: `pretrained_model_name_or_path` must be a folder or a Hub id.*no such folder",
        "a/b/c": "ValueError: `pretrained_model_name_or_path` must be a folder or a Hub id",
        "orignal": "OSError: there is no folder 'orignal' here",
    }
    for name, error in errors.items():
        answer = run(f"load({name!r})", error=error)
        assert answer["seconds"] < 10, (name, answer)
        answer = run(
            f"sys.exit(tango(['rain', '--model', {name!r}, '-o', '{tmp_path}/rain.wav']))", error="SystemExit: 1"
        )
        assert answer["seconds"] < 10 and answer["log"].strip().count("\n") == 0, (name, answer)
        assert re.search(error.removeprefix("OSError: ").removeprefix("ValueError: ")[:60], answer["log"])
    assert not (tmp_path / "cache" / "tango-converted" / "alice--other").exists()


def test_no_network_is_told_in_a_line_within_ten_seconds(tmp_path):
    with Hub() as gone:
        pass
    began = time.monotonic()
    arguments = ["-m", "pipeline_tango", "rain", "--model", "declare-lab/tango2", "-o", tmp_path / "rain.wav"]
    process = start(arguments, gone, tmp_path / "home", ROOT)
    assert process.returncode == 1 and process.stdout == ""
    assert re.fullmatch(r"error: no model in declare-lab/tango2.* cannot be reached: .*\n", process.stderr)
    assert time.monotonic() - began < 30  # importing takes most of it; retries would take 23 s more


def test_a_text_encoder_that_is_missing_is_told_before_the_weights_are_fetched(run, hub, released):
    config = json.loads(released["main_config.json"]) | {"text_encoder_name": "google/nowhere"}
    add_repo(hub, "alice/lost", released | {"main_config.json": json.dumps(config).encode()})
    run("load('alice/lost')", error="OSError: .*no repo 'google/nowhere'")
    assert not set(WEIGHTS) & set(fetched(hub, "alice/lost"))


# Diffusers repos and folders


def test_a_diffusers_repo_costs_no_request_more(run, hub, tmp_path):
    plain = "DiffusionPipeline.from_pretrained.__func__(TangoPipeline, 'alice/diffusers', cache_dir=CACHE + '2')"
    ours = "TangoPipeline.from_pretrained('alice/diffusers', cache_dir=CACHE)"
    for _ in range(2):  # the first time, and from the cache
        run(plain)
        requests = sorted(hub.requests)
        run(ours)
        assert sorted(hub.requests) == requests
    run("TangoPipeline.from_pretrained('alice/diffusers', cache_dir=CACHE, local_files_only=True)")
    assert hub.requests == [] and not (tmp_path / "cache" / "tango-converted").exists()


# Local folders


def test_a_local_folder_is_converted_once_for_each_of_its_states(run, source, tmp_path):
    assert "is converted once" in run(f"load({str(source)!r})")["log"]
    assert "is converted once" not in run(f"load({str(source)!r})")["log"]
    config = json.loads((source / "vae_config.json").read_text()) | {"scale_factor": 0.5}
    (source / "vae_config.json").write_text(json.dumps(config))
    answer = run(f"print(load({str(source)!r}).vae.config.scaling_factor)")
    assert "is converted once" in answer["log"] and answer["output"].split()[-1] == "0.5"
    assert len(list((tmp_path / "cache" / "tango-converted").glob("local--source--*/*--v1"))) == 1
    run(f"load({str(source / 'main_config.json')!r})", error="ValueError: .*is a file")


def test_a_folder_of_the_originals_training_and_a_lora_on_it(run, source, tmp_path):
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    for number, name in (("", "vae"), ("_1", "stft"), ("_2", "main")):
        (source / f"pytorch_model_{name}.bin").rename(best / f"pytorch_model{number}.bin")
    for name in ("tiny-t5", "scheduler", "configs"):
        (source / name).rename(best / name)
    config = json.loads((source / "main_config.json").read_text())
    config["unet_model_config"] = config.pop("unet_model_config_path")
    (tmp_path / "run" / "summary.jsonl").write_text(json.dumps(config))
    code = (
        f"pipe = load({str(best)!r})\n"
        "from peft import LoraConfig; from peft.utils import get_peft_model_state_dict\n"
        "pipe.unet.add_adapter(LoraConfig(r=2, target_modules=['to_q']))\n"
        f"TangoPipeline.save_lora_weights('{tmp_path}/lora', get_peft_model_state_dict(pipe.unet))\n"
        f"pipe = load({str(best)!r})\npipe.load_lora_weights('{tmp_path}/lora')\nprint(pipe.get_list_adapters())"
    )
    assert "unet" in run(code)["output"].splitlines()[-1]


# Commands


def test_the_command_loads_it(run, hub, tmp_path):
    code = (
        f"constants.HF_HUB_CACHE = CACHE\nassert tango(['rain', '--model', 'alice/original', '--dtype', 'float32', "
        f"'--device', 'cpu', '--steps', '1', '--seconds', '0.1', '-o', '{tmp_path}/%s.wav']) == 0"
    )
    answer = run(code % "first")
    assert "is converted once" in answer["log"] and "alice/original on cpu in float32" in answer["log"]
    answer = run(code % "second")
    assert hub.requests == ["GET /api/models/alice/original"] and "is converted once" not in answer["log"]
    assert (tmp_path / "second.wav").is_file()


def test_tango_cache_lists_and_removes(run, kept):
    run("load(dtype=torch.bfloat16)")
    listing = run("converted.main(['--cache_dir', CACHE])")["output"]
    assert re.search(r"alice/original  \w{7}  bfloat16  2.0 MB  /", listing) and "1 in " in listing
    answer = run("assert converted.main(['--cache_dir', CACHE, '--remove', 'alice/other']) == 1")
    assert "error: nothing is kept of alice/other" in answer["log"]
    assert "removed 2.0 MB" in run("converted.main(['--cache_dir', CACHE, '--remove', 'alice/original'])")["output"]
    assert not kept.exists()


def test_without_the_package_two_ways_are_told(hub, original_checkpoint, tmp_path):
    (tmp_path / "tango_file.py").write_text(single_file(ROOT / "pipeline_tango" / "pipeline_tango.py"))
    script = (
        "import sys\nsys.modules['pipeline_tango'] = None\nfrom tango_file import TangoPipeline\n"
        "for source in sys.argv[1:]:\n"
        "    try: TangoPipeline.from_pretrained(source)\n"
        "    except OSError as error: print(error)\n"
    )
    arguments = ["-c", script, original_checkpoint, "alice/original"]
    process = start(arguments, hub, tmp_path / "home", tmp_path, PYTHONPATH=str(tmp_path))
    lines = process.stdout.splitlines()
    assert len(lines) == 2, process.stderr
    for line in lines:
        assert "install the package pipeline-tango" in line and "convert it by tango-convert" in line


# A checkpoint of the released size: TANGO_FULL_SIZE=1 and 15 GB of disk


@pytest.mark.skipif("TANGO_FULL_SIZE" not in os.environ, reason="minutes and 15 GB of disk: set TANGO_FULL_SIZE=1")
@pytest.mark.parametrize("dtype, limit_in_gib", [("bfloat16", 4), ("float32", 6.5)])
def test_time_and_peak_memory_at_full_size(full_size_checkpoint, tmp_path, dtype, limit_in_gib):
    code = (  # not ru_maxrss: a child starts with its parent's
        "import sys, time, torch; from pipeline_tango import TangoPipeline\n"
        "start, cpu = time.perf_counter(), time.process_time()\n"
        "pipe = TangoPipeline.from_pretrained(sys.argv[1], cache_dir=sys.argv[2], dtype=getattr(torch, sys.argv[3]))\n"
        "print(f'{time.perf_counter() - start:.1f} {time.process_time() - cpu:.1f}')\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for call in ("first", "second"):
        command = [sys.executable, "-c", code, full_size_checkpoint, tmp_path / "cache", dtype]
        result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        *seconds, peak = result.stdout.split()
        peaks.append(int(peak) / 2**20)
        print(f"{dtype}, {call} call: {seconds[0]} s, CPU {seconds[1]} s, peak {peaks[-1]:.2f} GiB")
    shutil.rmtree(tmp_path / "cache")
    assert max(peaks) < limit_in_gib
