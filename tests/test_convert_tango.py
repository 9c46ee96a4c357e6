import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import edit, equal, fails, fingerprint, load, weights
from diffusers import AutoencoderKL, DDPMScheduler
from hub import File, Hub, Repo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import SpeechT5HifiGan

from convert.convert_tango import main
from pipeline_tango import TangoPipeline
from pipeline_tango.json_files import read_json, write_json
from pipeline_tango.original import SCALING_FACTOR, open_original
from pipeline_tango.single_file import single_file


ROOT = Path(__file__).parents[1]
PICKLES = ("main", "vae", "stft")


# What is written


def test_folder_loads_as_a_pipeline(converted):
    pipe = TangoPipeline.from_pretrained(converted)
    assert type(pipe.scheduler) is DDPMScheduler
    config = pipe.scheduler.config
    assert (config.prediction_type, config.timestep_spacing, config.steps_offset) == ("v_prediction", "leading", 1)
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert config.clip_sample is False and config.thresholding is False
    assert pipe.vae.config.scaling_factor == SCALING_FACTOR and pipe.vae.config.sample_size == 256
    assert pipe.vocoder.config.normalize_before is False
    assert read_json(converted / "model_index.json")["_class_name"] == "TangoPipeline"
    assert read_json(converted / "model_index.json")["default_audio_length_in_s"] == 10.24


def test_pickled_text_encoder_wins_over_the_named_one(converted, original_checkpoint):
    named = load(original_checkpoint / "tiny-t5" / "pytorch_model.bin")["shared.weight"]
    ours = load_file(converted / "text_encoder" / "model.safetensors")["shared.weight"]
    assert torch.equal(ours, load(original_checkpoint / "pytorch_model_main.bin")["text_encoder.shared.weight"])
    assert not torch.equal(ours, named)


def test_card_and_code_are_written_and_no_file_lacks_a_dot(converted):
    card = (converted / "README.md").read_text()
    assert "`text_encoder.encoder.embed_tokens.weight`" in card
    assert (converted / "pipeline.py").read_text() == single_file(ROOT / "pipeline_tango" / "pipeline_tango.py")
    files = [path for path in converted.rglob("*") if path.is_file()]
    assert all("." in path.name for path in files)
    assert all(path.suffix in (".json", ".safetensors", ".model", ".md", ".py") for path in files)


def test_licence_is_taken_from_the_source_card_or_the_flag(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: cc-by-nc-sa-4.0\n---\n# A model\n")
    assert main([str(source), str(tmp_path / "a")]) == 0
    assert "license: cc-by-nc-sa-4.0" in (tmp_path / "a" / "README.md").read_text()
    assert main([str(source), str(tmp_path / "b"), "--license", "mit"]) == 0
    assert "license: mit" in (tmp_path / "b" / "README.md").read_text()


def test_dtype_and_variant(original_checkpoint, converted, tmp_path):
    half = tmp_path / "half"
    assert main([str(original_checkpoint), str(half), "--dtype", "float16", "--variant", "fp16"]) == 0
    for component, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model"), ("vocoder", "model")):
        ours = load_file(half / component / f"{stem}.fp16.safetensors")
        full = load_file(converted / component / f"{stem}.safetensors")
        assert equal(ours, {name: tensor.half() for name, tensor in full.items()})
    pipe = TangoPipeline.from_pretrained(half, variant="fp16", torch_dtype=torch.float16)
    assert pipe.unet.dtype == torch.float16
    assert main(["--to_original", str(half), str(tmp_path / "back"), "--variant", "fp16"]) == 0
    assert load(tmp_path / "back" / "pytorch_model_main.bin")["unet.conv_in.weight"].dtype == torch.float16


def test_scheduler_by_short_name_keeps_the_noise_schedule(original_checkpoint, tmp_path):
    assert main([str(original_checkpoint), str(tmp_path / "out"), "--scheduler", "euler"]) == 0
    config = read_json(tmp_path / "out" / "scheduler" / "scheduler_config.json")
    assert config["_class_name"] == "EulerDiscreteScheduler"
    assert (config["beta_end"], config["prediction_type"]) == (0.012, "v_prediction")
    assert read_json(tmp_path / "out" / "model_index.json")["scheduler"] == ["diffusers", "EulerDiscreteScheduler"]


def test_scaling_factor_can_be_given(original_checkpoint, tmp_path):
    assert main([str(original_checkpoint), str(tmp_path / "out"), "--scaling_factor", "0.5"]) == 0
    assert read_json(tmp_path / "out" / "vae" / "config.json")["scaling_factor"] == 0.5


def test_configs_that_releases_leave_out_are_built_in(source, tmp_path, capsys):
    """As released, names are all there is: the UNet's config then is the large one, which small weights do not fit."""
    shutil.rmtree(source / "configs")
    names = {"scheduler_name": "stabilityai/stable-diffusion-2-1", "text_encoder_name": "google/flan-t5-large"}
    write_json(source / "main_config.json", {**read_json(source / "main_config.json"), **names})
    (source / "google").mkdir()
    (source / "tiny-t5").rename(source / "google" / "flan-t5-large")
    line = fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert "`unet.conv_in.weight (16, 8, 3, 3) instead of (320, 8, 3, 3)`" in line

    shutil.copytree(ROOT / "tests" / "goldens" / "tiny-a" / "original" / "configs", source / "configs")
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert main([str(ROOT / "tests" / "goldens" / "tiny-a" / "original"), str(tmp_path / "other")]) == 0
    for name in ("scheduler/scheduler_config.json", "unet/config.json", "text_encoder/config.json"):
        assert read_json(tmp_path / "out" / name) == read_json(tmp_path / "other" / name)


# Other sources


def test_hub_id_is_downloaded_converted_and_pushed(original_checkpoint, converted, tmp_path):
    """As with a released checkpoint: the text encoder has a repo of its own and the scheduler is built in."""

    def repo(folder, **changes):
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        files = {name: content for name, content in files.items() if not name.startswith(("tiny-t5/", "scheduler/"))}
        repo = Repo(private=False)
        repo.commit("add", {name: File(data, name.endswith(".bin")) for name, data in (files | changes).items()})
        return repo

    config = json.loads((original_checkpoint / "main_config.json").read_text())
    config |= {"text_encoder_name": "google/tiny-t5", "scheduler_name": "stabilityai/stable-diffusion-2-1"}
    with Hub() as hub:
        hub.repos["alice/original"] = repo(original_checkpoint, **{"main_config.json": json.dumps(config).encode()})
        hub.repos["google/tiny-t5"] = repo(original_checkpoint / "tiny-t5")
        stored = [file for repo in hub.repos.values() for file in repo.files.values() if file.is_lfs]
        hub.objects |= {file.etag: file.content for file in stored}
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_alice", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "convert.convert_tango", "alice/original", str(tmp_path / "out")]
        command += ["--push_to_hub", "alice/converted", "--private"]
        process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert not [request for request in hub.requests if "tiny-t5" in request and "pytorch_model.bin" in request]
        pushed = hub.repos["alice/converted"]
    assert pushed.private and len(pushed.commits) == 2
    for path in (path for path in converted.rglob("*") if path.is_file()):
        name = path.relative_to(converted).as_posix()
        if name not in ("README.md", "original/main_config.json", "tokenizer/tokenizer_config.json"):
            assert pushed.files[name].content == path.read_bytes(), name
    card = pushed.files["README.md"].content.decode()
    assert "base_model: alice/original" in card and 'from_pretrained("alice/converted")' in card


@pytest.mark.parametrize("summary_in", ["best", "."])
def test_folder_of_the_originals_training(source, converted, tmp_path, summary_in):
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    for number, name in (("", "vae"), ("_1", "stft"), ("_2", "main")):
        (source / f"pytorch_model_{name}.bin").rename(best / f"pytorch_model{number}.bin")
    for name in ("tiny-t5", "scheduler", "configs"):
        (source / name).rename(best / name)
    config = read_json(source / "main_config.json")
    config["unet_model_config"] = config.pop("unet_model_config_path")
    lines = [json.dumps({**config, "learning_rate": 3e-5}), "", json.dumps({"epoch": 1}), ""]
    (tmp_path / "run" / summary_in / "summary.jsonl").write_text("\n".join(lines))
    assert main([str(best), str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(converted)
    assert read_json(tmp_path / "out" / "vae" / "config.json")["scaling_factor"] == SCALING_FACTOR


def ckpt_tensors(original_checkpoint):
    """Tensors of an AudioLDM checkpoint around the VAE and vocoder of the small one."""
    tensors = load(original_checkpoint / "pytorch_model_vae.bin")
    tensors = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    others = {"model.diffusion_model.out.2.bias": torch.zeros(8), "first_stage_model.loss.logvar": torch.zeros(())}
    return {**tensors, **others, "scale_factor": torch.tensor(0.75)}


@pytest.mark.parametrize("key", ["state_dict", None])
def test_vae_and_vocoder_of_an_audioldm_ckpt(original_checkpoint, converted, tmp_path, key):
    tensors = ckpt_tensors(original_checkpoint)
    torch.save({key: tensors, "epoch": 3} if key else tensors, tmp_path / "audioldm.ckpt")
    assert main([str(tmp_path / "audioldm.ckpt"), str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"vae", "vocoder"}
    ours = weights(tmp_path / "out")
    assert ours.items() <= weights(converted).items() and len(ours) == 2
    assert AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").config.scaling_factor == 0.75
    SpeechT5HifiGan.from_pretrained(tmp_path / "out" / "vocoder")


def test_weight_norm_of_a_ckpt_is_folded(original_checkpoint, converted, tmp_path):
    tensors, form = ckpt_tensors(original_checkpoint), torch.nn.utils.parametrizations.weight_norm
    for name in [name for name in tensors if "vocoder" in name and name.endswith(".weight")]:
        stem, weight = name.removesuffix(".weight"), tensors.pop(name)
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(weight)
        pair = form(layer).state_dict()
        g, v = (pair[f"parametrizations.weight.original{i}"] for i in (0, 1))
        tensors |= {f"{stem}.weight_g": g, f"{stem}.weight_v": 2 * v}  # the direction's length does not count
    torch.save(tensors, tmp_path / "audioldm.ckpt")
    assert main([str(tmp_path / "audioldm.ckpt"), str(tmp_path / "out")]) == 0
    ours = load_file(tmp_path / "out" / "vocoder" / "model.safetensors")
    expected = load_file(converted / "vocoder" / "model.safetensors")
    torch.testing.assert_close(ours, expected)


# Bad input: one line, nothing written, the source as it was


def test_stale_buffers_are_dropped_and_listed(source, converted, tmp_path):
    edit(
        source / "pytorch_model_main.bin",
        lambda tensors: tensors.update({"text_encoder.embeddings.position_ids": torch.arange(4)}),
    )
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert "`text_encoder.embeddings.position_ids`" in (tmp_path / "out" / "README.md").read_text()
    assert weights(tmp_path / "out") == weights(converted)


def test_output_must_be_new_and_outside_the_source(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    assert "holds something" in fails([source, out], out, capsys)
    assert [path.name for path in out.iterdir()] == ["keep.txt"]
    inside = source / "deeper" / "out"
    assert "must not lie in SOURCE" in fails([source, inside], source / "out", capsys)
    (tmp_path / "link").symlink_to(source)
    assert "must not lie in SOURCE" in fails([source, tmp_path / "link" / "out"], source / "out", capsys)
    (out / "keep.txt").unlink()
    assert main([str(source), str(out)]) == 0  # an empty folder is as good as none


def test_folders_above_the_output_are_made(original_checkpoint, tmp_path):
    assert main([str(original_checkpoint), str(tmp_path / "a" / "b")]) == 0
    assert (tmp_path / "a" / "b" / "model_index.json").is_file()


def test_source_must_exist(tmp_path, capsys):
    line = fails([tmp_path / "nowhere", tmp_path / "out"], tmp_path / "out", capsys)
    assert "SOURCE must be a folder, a .ckpt file or a Hub id" in line
    fails(["declare-lab/no-such-checkpoint", tmp_path / "out"], tmp_path / "out", capsys)  # offline, so it can not be


def test_full_disk(original_checkpoint, converted, tmp_path, capsys):
    """Files stop growing half way through one of the larger ones, as they do on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for arguments in ([original_checkpoint], ["--to_original", converted]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        try:
            line = fails([*arguments, tmp_path / "out"], tmp_path / "out", capsys)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in line or "the disk may be full" in line


def interrupt_when_half_made(folder, number, process_id):
    deadline = time.monotonic() + 60
    while not list(folder.glob(".out.*/folder/*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process_id, number)


def test_interruption_leaves_nothing(original_checkpoint, tmp_path, capsys):
    before = fingerprint(original_checkpoint)
    thread = threading.Thread(target=interrupt_when_half_made, args=(tmp_path, signal.SIGINT, os.getpid()))
    thread.start()
    assert main([str(original_checkpoint), str(tmp_path / "out")]) == 130
    thread.join()
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []
    assert fingerprint(original_checkpoint) == before


def test_termination_leaves_nothing(original_checkpoint, tmp_path):
    command = [sys.executable, "-m", "convert.convert_tango", original_checkpoint, tmp_path / "out"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    interrupt_when_half_made(tmp_path, signal.SIGTERM, process.pid)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_usage_errors(capsys):
    for arguments in (["--to_original", "a", "b", "--scheduler", "ddim"], ["a", "b", "--dtype", "int8"], ["a"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert "error: " in capsys.readouterr().err


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_sources_give_the_right_weights_or_nothing(original_checkpoint, converted, tmp_path_factory, data):
    """Whatever happens to one file: either an error and no output, or an output with every tensor right."""
    root = tmp_path_factory.mktemp("fuzz")
    source = Path(shutil.copytree(original_checkpoint, root / "source"))
    file = data.draw(st.sampled_from(sorted(str(path.relative_to(source)) for path in source.rglob("*.bin"))))
    content = bytearray((source / file).read_bytes())
    if data.draw(st.booleans(), label="truncate"):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        # half of the time at the start or the end, where the archive's own tables are
        low, high = data.draw(
            st.sampled_from([(0, len(content) - 1), (0, 2000), (len(content) - 2000, len(content) - 1)])
        )
        for position in data.draw(st.lists(st.integers(low, high), min_size=1, max_size=4)):
            content[position] = data.draw(st.integers(0, 255))
    (source / file).write_bytes(content)
    before = fingerprint(source)
    status = main([str(source), str(root / "out")])
    assert fingerprint(source) == before
    if status == 0:
        assert weights(root / "out") == weights(converted)
    else:
        assert {path.name for path in root.iterdir()} == {"source"}
    shutil.rmtree(root)


JSON = st.none() | st.booleans() | st.integers(-2, 4096) | st.floats(allow_nan=False) | st.text(max_size=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wrong_configs_never_leave_half_an_output(original_checkpoint, tmp_path_factory, data):
    root = tmp_path_factory.mktemp("fuzz")
    source = Path(shutil.copytree(original_checkpoint, root / "source"))
    file = data.draw(st.sampled_from(["main_config", "vae_config", "stft_config", "configs/diffusion_model_config"]))
    config = read_json(source / f"{file}.json")
    part = (
        config[data.draw(st.sampled_from(["ddconfig"]))]
        if file == "vae_config" and data.draw(st.booleans())
        else config
    )
    part[data.draw(st.sampled_from(sorted(part)))] = data.draw(JSON | st.lists(JSON, max_size=4))
    write_json(source / f"{file}.json", config)
    if main([str(source), str(root / "out")]) == 0:
        TangoPipeline.from_pretrained(root / "out")
    else:
        assert {path.name for path in root.iterdir()} == {"source"}
    shutil.rmtree(root)


# A checkpoint of the released size: TANGO_FULL_SIZE=1 and 15 GB of disk


@pytest.mark.skipif("TANGO_FULL_SIZE" not in os.environ, reason="minutes and 15 GB of disk: set TANGO_FULL_SIZE=1")
@pytest.mark.parametrize("dtype, limit_in_gib", [("float32", 6.5), ("bfloat16", 4)])
def test_peak_memory_at_full_size(full_size_checkpoint, tmp_path, dtype, limit_in_gib):
    code = (  # not ru_maxrss: a child starts with its parent's
        "import sys; from convert.convert_tango import main; status = main(sys.argv[1:]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, full_size_checkpoint, tmp_path / "out", "--dtype", dtype]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert int(result.stdout) / 2**20 < limit_in_gib
    shutil.rmtree(tmp_path / "out")


def test_tensors_that_share_memory_in_the_source_do_not_in_the_result(source, converted, tmp_path):
    """Views of one storage, as `torch.save` keeps them: safetensors would refuse them."""

    def share(tensors):
        names = (
            "encoder.norm_out.weight",
            "encoder.norm_out.bias",
            "decoder.norm_out.weight",
            "decoder.norm_out.bias",
        )
        whole = torch.cat([tensors[name] for name in names])
        tensors |= dict(zip(names, whole.split([tensors[name].numel() for name in names])))

    edit(source / "pytorch_model_vae.bin", share)
    edit(source / "pytorch_model_stft.bin", lambda tensors: tensors.update(mel_basis=tensors["mel_basis"].T.clone().T))
    assert main([str(source), str(tmp_path / "out")]) == 0
    assert weights(tmp_path / "out") == weights(converted)


def test_a_tensor_under_two_names_is_saved_twice(source, tmp_path):
    edit(
        source / "pytorch_model_vae.bin",
        lambda tensors: tensors.update({"encoder.norm_out.bias": tensors["encoder.norm_out.weight"]}),
    )
    assert main([str(source), str(tmp_path / "out")]) == 0
    state = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").state_dict()
    assert torch.equal(state["encoder.conv_norm_out.bias"], state["encoder.conv_norm_out.weight"])


def test_a_vae_whose_first_level_is_wider_than_its_first_convolution_is_refused_with_the_reason(
    source, tmp_path, capsys
):
    edit(
        source / "pytorch_model_vae.bin",
        lambda tensors: tensors.update({"encoder.conv_in.weight": tensors["encoder.conv_in.weight"][:16].clone()}),
    )
    line = fails([source, tmp_path / "out"], tmp_path / "out", capsys)
    assert "the VAE's first level has 32 channels and its first convolution 16" in line
    assert "`ch_mult` has to begin with 1" in line


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
def test_a_scaling_factor_has_to_be_positive(value, original_checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(original_checkpoint), str(tmp_path / "out"), f"--scaling_factor={value}"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert f"--scaling_factor has to be positive, not {float(value)}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="`scaling_factor` must be a positive number"):
        open_original(original_checkpoint, scaling_factor=float(value))


@pytest.mark.parametrize(
    "name, content, message",
    (
        ("pytorch_model_main.bin", b"version https://git-lfs.github.com/spec/v1\n", "main.bin is a git-LFS pointer"),
        ("pytorch_model_vae.bin", b"", "vae.bin is damaged or cut short: it is empty"),
        ("tiny-t5/tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "json is a git-LFS pointer"),
        ("tiny-t5/spiece.model", b"", "spiece.model is damaged or cut short: it is empty"),
    ),
)
def test_pointers_and_empty_files_of_a_source_are_named(source, tmp_path, capsys, name, content, message):
    (source / name).write_bytes(content)
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_vocabulary_is_refused_both_ways(source, converted, tmp_path, capsys):
    folder = shutil.copytree(converted, tmp_path / "diffusers")
    for path in (*(source / "tiny-t5").glob("*"), *(folder / "tokenizer").glob("*")):
        if path.name in ("spiece.model", "tokenizer.json"):
            path.unlink()
    for arguments in ([source], [folder, "--to_original"]):
        assert main([*map(str, arguments), str(tmp_path / "out")]) == 1
        assert "has neither tokenizer.json nor spiece.model" in capsys.readouterr().err.splitlines()[-1]
