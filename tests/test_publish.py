import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STUDENT
from hub import Hub, start
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from convert.publish import PIPELINE, add_card_and_code, check_folder, main, push
from pipeline_tango import TangoPipeline
from pipeline_tango.single_file import single_file


ROOT = Path(__file__).parents[1]
SCRIPT = """
import re
import sys

sys.modules["pipeline_tango"] = None  # as if the package were not installed
try:
    import pipeline_tango
except ImportError:
    pass
else:
    raise SystemExit("pipeline_tango can be imported")

import numpy as np
import scipy.io.wavfile
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download


def generate(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("Rain", num_inference_steps=2, generator=generator).audios[0]


def run_snippet(number):
    code = re.findall("```python\\n(.*?)```", ModelCard.load("alice/tango").content, re.DOTALL)[number]
    namespace = {}
    exec(code.replace("num_inference_steps=100", "num_inference_steps=2"), namespace)
    assert scipy.io.wavfile.read("rain.wav")[1].shape == (4800,)
    return namespace["pipe"]


waveforms = {}
"""
ONLINE = """
waveforms["custom_pipeline"] = generate(run_snippet(1))
del sys.modules["pipeline_tango"]
pipe = run_snippet(0)

from pipeline_tango import TangoPipeline

waveforms["class"] = generate(pipe)
pipe.push_to_hub("alice/pushed", token="hf_alice")
waveforms["push_to_hub"] = generate(TangoPipeline.from_pretrained("alice/pushed"))
pipe.save_pretrained("saved", push_to_hub=True, repo_id="alice/saved", token="hf_alice")
waveforms["save_pretrained"] = generate(TangoPipeline.from_pretrained("alice/saved"))
pipe = TangoPipeline.from_pretrained("alice/tango", variant="fp16", dtype=torch.float32)
waveforms["fp16"] = generate(pipe)
try:
    TangoPipeline.from_pretrained("alice/secret")
except OSError:
    print("refused")
waveforms["private"] = generate(TangoPipeline.from_pretrained("alice/secret", token="hf_alice"))
snapshot_download("alice/tango")
np.savez("online.npz", **waveforms)
"""
OFFLINE = """
folder = snapshot_download("alice/tango")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
waveforms["custom_pipeline"] = generate(pipe)
del sys.modules["pipeline_tango"]

from pipeline_tango import TangoPipeline

waveforms["class"] = generate(TangoPipeline.from_pretrained("alice/pushed"))
np.savez("offline.npz", **waveforms)
"""


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A folder with plain and fp16 weights, card and code. Shared by the module: never write into it."""
    folder = tmp_path_factory.mktemp("publish") / "tango"
    shutil.copytree(tiny_folder, folder)
    set_json(folder / "model_index.json", default_audio_length_in_s=0.3)
    pipe = TangoPipeline.from_pretrained(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    for component in ("text_encoder", "vocoder"):
        set_json(folder / component / "config.json", dtype=None)
    add_card_and_code(folder, source="someone/tango", notes=["`position_ids` dropped"])
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "tango"))


def publish(hub, home, *arguments, **environment):
    return start(["-m", "convert.publish", *arguments], hub, home, ROOT, **environment)


def error_line(process):
    assert process.returncode == 1 and process.stdout == "" and "Traceback" not in process.stderr
    [line] = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_published_folder_loads_back_every_way(folder, tmp_path):
    with Hub() as hub:
        for repo_id, *options in ["alice/tango"], ["alice/secret", "--private"]:
            process = publish(hub, tmp_path / "home", folder, repo_id, *options, HF_TOKEN="hf_alice")
            assert process.returncode == 0, process.stderr
            assert process.stdout == f"{hub.endpoint}/{repo_id}\n"
        assert len(hub.repos["alice/tango"].commits) == 2  # the Hub's own and ours
        process = start(["-c", SCRIPT + ONLINE], hub, tmp_path / "home", tmp_path, PYTHONPATH=str(ROOT))
        assert process.returncode == 0, process.stderr
        assert process.stdout == "refused\n"
        for repo_id in ("alice/pushed", "alice/saved"):
            assert hub.repos[repo_id].files["pipeline.py"].content == single_file(PIPELINE).encode()
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = start(["-c", SCRIPT + OFFLINE], hub, tmp_path / "home", tmp_path, **environment)
    assert process.returncode == 0, process.stderr

    def local(**kwargs):
        pipe = TangoPipeline.from_pretrained(folder, **kwargs)
        generator = torch.Generator().manual_seed(0)
        return pipe("Rain", num_inference_steps=2, generator=generator).audios[0]

    expected, expected_fp16 = local(), local(variant="fp16", dtype=torch.float32)
    assert expected.shape == (4800,) and np.abs(expected - expected_fp16).max() > 1e-4
    waveforms = {**np.load(tmp_path / "online.npz")}
    np.testing.assert_allclose(waveforms.pop("fp16"), expected_fp16, atol=1e-5)
    assert len(waveforms) == 5
    for name, waveform in [*waveforms.items(), *np.load(tmp_path / "offline.npz").items()]:
        np.testing.assert_allclose(waveform, expected, atol=1e-5, err_msg=name)


def test_repo_holds_the_folder_with_this_code_and_a_card_that_names_the_repo(hub, copy, tmp_path):
    (copy / "pipeline.py").write_text("stale")
    for junk in (".DS_Store", "unet/.cache/x.lock", "unet/__pycache__/x.pyc", "unet/config.json.tmp", "notes.txt~"):
        (copy / junk).parent.mkdir(exist_ok=True)
        (copy / junk).write_text("junk")
    process = publish(hub, tmp_path, copy, "contents", "--token", "hf_alice", "--commit_message", "First")
    assert process.stdout == f"{hub.endpoint}/alice/contents\n", process.stderr

    repo = hub.repos["alice/contents"]
    expected = {str(path.relative_to(copy)) for path in check_folder(copy)}
    assert set(repo.files) - {".gitattributes"} == expected
    assert not any("junk" in str(file.content) for file in repo.files.values())
    assert repo.commits[-1][1] == "First" and not repo.private
    assert repo.files["pipeline.py"].content == single_file(PIPELINE).encode()
    assert (copy / "pipeline.py").read_text() == "stale"  # the folder is only read
    for name in expected - {"pipeline.py", "README.md"}:
        assert repo.files[name].content == (copy / name).read_bytes()
    card = repo.files["README.md"].content.decode()
    assert card == (copy / "README.md").read_text().replace("path/to/this/folder", "alice/contents")
    assert card.count('"alice/contents"') == 4


def test_card_reads_well_and_counts_parameters_as_the_models_do(folder, pipe):
    card = ModelCard((folder / "README.md").read_text())
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-audio"
    assert card.data.base_model == "someone/tango" and card.data.license_link.endswith("someone/tango")
    snippets = re.findall("```python\n(.*?)```", card.content, re.DOTALL)
    assert [bool(compile(code, "card", "exec")) for code in snippets] == [True, True]
    assert "- `position_ids` dropped\n" in card.content and "CC BY-NC-ND" in card.content
    assert "16000 Hz" in card.content and "0.3 s" in card.content and "v_prediction" in card.content
    for name, component in pipe.components.items():
        count = f"{sum(p.numel() for p in component.parameters()):,}" if hasattr(component, "parameters") else ""
        row = re.search(rf"\| {name} \| {type(component).__name__} \| ([\d,]*) \|", card.content)
        assert row[1] == count
    assert (folder / "pipeline.py").read_bytes() == single_file(PIPELINE).encode()


def test_card_says_which_variant_to_load_when_there_is_only_one(copy):
    for weights in copy.glob("*/*model.safetensors"):
        weights.unlink()
    add_card_and_code(copy, license="cc0-1.0")
    card = ModelCard((copy / "README.md").read_text())
    assert card.content.count('variant="fp16"') == 2 and "float16" in card.content
    assert card.data.license == "cc0-1.0" and card.data.base_model is None


def test_a_student_is_published_with_its_number_of_steps(copy):
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"student": STUDENT}))
    (copy / "README.md").unlink()
    check_folder(copy)
    add_card_and_code(copy)
    card = (copy / "README.md").read_text()
    assert "- Student: distilled to few steps, by default 4; guidance 4 inside\n" in card
    assert 'audio = pipe("Rain falling on a metal roof").audios[0]' in card and "=100" not in card
    (copy / "model_index.json").write_text(json.dumps(index | {"student": STUDENT | {"scheduler": "x"}}))
    with pytest.raises(ValueError, match="model_index.json: `scheduler` of a student has to be"):
        check_folder(copy)


def test_card_keeps_the_name_of_a_local_source_but_not_its_path(copy, tmp_path):
    add_card_and_code(copy, source=tmp_path / "my-checkpoint")
    text = (copy / "README.md").read_text()
    assert "`my-checkpoint`" in text and str(tmp_path) not in text


def test_hand_written_card_is_left_alone_and_can_be_given_a_licence(hub, copy, tmp_path):
    text = "---\nlicense: mit\n---\nMine: path/to/this/folder\n"
    (copy / "README.md").write_text(text)
    add_card_and_code(copy, source="someone/tango")
    assert (copy / "README.md").read_text() == text
    for options, license in ([], "mit"), (["--license", "cc0-1.0", "--source", "someone/tango"], "cc0-1.0"):
        process = publish(hub, tmp_path, copy, "alice/mine", *options, HF_TOKEN="hf_alice")
        assert process.returncode == 0, process.stderr
        pushed = ModelCard(hub.repos["alice/mine"].files["README.md"].content.decode())
        assert pushed.data.license == license and pushed.text.strip() == "Mine: path/to/this/folder"
    assert pushed.data.base_model == "someone/tango"


def test_folder_without_a_card_gets_one(hub, copy, tmp_path):
    (copy / "README.md").unlink()
    process = publish(hub, tmp_path, copy, "alice/bare", "--license", "cc0-1.0", HF_TOKEN="hf_alice")
    assert process.returncode == 0, process.stderr
    card = ModelCard(hub.repos["alice/bare"].files["README.md"].content.decode())
    assert card.data.license == "cc0-1.0" and '"alice/bare"' in card.content
    assert not (copy / "README.md").exists()


@pytest.mark.parametrize("fault", ["one upload refused", "connection lost at the commit"])
def test_push_that_fails_half_way_leaves_no_files(hub, copy, tmp_path, fault):
    repo_id = f"alice/{fault.replace(' ', '-')}"
    weights = copy / "vocoder" / "model.safetensors"
    hub.objects.pop(hashlib.sha256(weights.read_bytes()).hexdigest(), None)
    if fault == "one upload refused":
        hub.faults = {f"PUT /storage/{hashlib.sha256(weights.read_bytes()).hexdigest()}": 400}
    else:
        hub.faults = {f"POST /api/models/{repo_id}/commit/main": None}
    try:
        process = publish(hub, tmp_path, copy, repo_id, HF_TOKEN="hf_alice")
    finally:
        hub.faults = {}
    assert hub.endpoint in error_line(process)
    assert set(hub.repos[repo_id].files) == {".gitattributes"}
    assert publish(hub, tmp_path, copy, repo_id, HF_TOKEN="hf_alice").returncode == 0
    assert "vocoder/model.safetensors" in hub.repos[repo_id].files


def test_second_push_of_the_same_folder_commits_nothing(hub, folder, tmp_path):
    for _ in range(2):
        assert publish(hub, tmp_path, folder, "alice/again", HF_TOKEN="hf_alice").returncode == 0
    assert len(hub.repos["alice/again"].commits) == 2


def test_missing_and_wrong_rights_are_said_in_one_line(hub, folder, tmp_path):
    assert "hf auth login" in error_line(publish(hub, tmp_path, folder, "alice/denied"))
    assert "hf auth login" in error_line(publish(hub, tmp_path, folder, "alice/denied", "--token", "hf_wrong"))
    assert "may not write to 'alice/denied'" in error_line(
        publish(hub, tmp_path, folder, "alice/denied", "--token", "hf_bob")
    )
    assert "alice/denied" not in hub.repos
    with Hub() as gone:
        pass
    assert "cannot reach" in error_line(publish(gone, tmp_path, folder, "alice/denied", "--token", "hf_alice"))


def test_private_push_into_a_public_repo_is_refused(hub, folder, tmp_path):
    assert publish(hub, tmp_path, folder, "alice/public", HF_TOKEN="hf_alice").returncode == 0
    process = publish(hub, tmp_path, folder, "alice/public", "--private", HF_TOKEN="hf_alice")
    assert "exists already and is public" in error_line(process)


DEFECTS = {
    "must be a folder": shutil.rmtree,
    "model_index.json is missing": lambda f: (f / "model_index.json").unlink(),
    "`_class_name` must be 'TangoPipeline', got 'AudioLDMPipeline'": lambda f: set_json(
        f / "model_index.json", _class_name="AudioLDMPipeline"
    ),
    "`_class_name` must be 'TangoPipeline', got \\[": lambda f: set_json(
        f / "model_index.json", _class_name=["pipeline", "TangoPipeline"]
    ),
    "`unet` must be a diffusers or transformers class": lambda f: set_json(
        f / "model_index.json", unet=["my_module", "MyUNet"]
    ),
    "`vocoder` must be .* got \\[None, None\\]": lambda f: set_json(f / "model_index.json", vocoder=[None, None]),
    "unet.config.json is missing": lambda f: shutil.rmtree(f / "unet"),
    "scheduler_config.json is not JSON": lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"),
    "neither tokenizer.json nor": lambda f: (f / "tokenizer" / "tokenizer.json").unlink(),
    "vae.diffusion_pytorch_model.safetensors is missing": lambda f: [
        path.unlink() for path in (f / "vae").glob("*.safetensors")
    ],
    "no variant has weights for every component": lambda f: [
        (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(),
        (f / "unet" / "diffusion_pytorch_model.safetensors").unlink(),
        (f / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
            f / "unet" / "diffusion_pytorch_model.bf16.safetensors"
        ),
    ],
    "index.json is missing": lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").rename(
        f / "vae" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    ),
    "says `dtype` 'float16', but the weights are float32": lambda f: set_json(
        f / "vocoder" / "config.json", dtype="float16"
    ),
    "may be a pickle": lambda f: (f / "unet" / "diffusion_pytorch_model.bin").write_bytes(b""),
    "LICENSE has no dot in its name": lambda f: (f / "vae" / "LICENSE").write_text("MIT"),
}


@pytest.mark.parametrize("message", DEFECTS)
def test_defective_folder_is_refused(copy, message):
    DEFECTS[message](copy)
    with pytest.raises(ValueError, match=message):
        push(copy, "alice/tango")


def test_sharded_weights_need_every_shard_of_their_index(copy):
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shards = [weights.with_name(f"diffusion_pytorch_model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    for shard in shards:
        shutil.copy(weights, shard)
    weights.unlink()
    index = {"weight_map": {"a": shards[0].name, "b": shards[1].name}}
    weights.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert set(shards) <= set(check_folder(copy))
    shards[1].unlink()
    with pytest.raises(ValueError, match="00002-of-00002"):
        check_folder(copy)


def test_weight_file_of_any_other_length_is_refused(tiny_folder, tmp_path):
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "tango"))
    weights = copy / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()

    @given(st.integers(0, len(content) + 100).filter(lambda length: length != len(content)))
    def refuses(length):
        weights.write_bytes(content[:length].ljust(length, b"\0"))
        with pytest.raises(ValueError, match="damaged or cut short"):
            check_folder(copy)

    refuses()


def test_damaged_folder_is_refused_before_the_hub_is_asked(copy, tmp_path):
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with Hub() as hub:
        line = error_line(publish(hub, tmp_path, copy, "alice/damaged", HF_TOKEN="hf_alice"))
        assert str(weights) in line and "cut short" in line
        assert hub.requests == []


def test_source_of_a_push_must_be_a_hub_id(folder, capsys):
    assert main([str(folder), "alice/tango", "--source", "/my/checkpoint"]) == 1
    assert capsys.readouterr().err.startswith("error: `source` must be a Hub id")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(
        option in text for option in ("usage: tango-publish", "FOLDER REPO", "--private", "--token", "--license")
    )
