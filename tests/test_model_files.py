"""Incomplete and damaged models: refused by name wherever they are loaded, and never written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHORT, build_components, seeds
from diffusers import DiffusionPipeline
from hub import File, Hub, Repo, start
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from convert.publish import check_folder
from pipeline_tango import TangoPipeline
from pipeline_tango.model_files import WEIGHTS, check_weights, find_model


ROOT = Path(__file__).parents[1]
MODELS = sorted(WEIGHTS)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder, tmp_path / "tango"))


def weights_of(folder, component):
    return folder / component / f"{WEIGHTS[component]}.safetensors"


def change(path, function):
    """Write what `function` makes of the tensors in a file over it, and return the name of the third tensor."""
    tensors = load_file(path)
    name = sorted(tensors)[2]
    tensors = function(tensors, name)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return name


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


TENSOR_FAULTS = {
    "missing: `{name}`": without,
    "unexpected: `stranger`": lambda tensors, name: {**tensors, "stranger": torch.zeros(1)},
    "of a wrong shape: `{name} (": lambda tensors, name: {**tensors, name: torch.cat([tensors[name]] * 2)},
    "missing: `{name}`; unexpected: `{name}_new`": lambda tensors, name: {
        **without(tensors, name),
        f"{name}_new": tensors[name],
    },
}


@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("message", TENSOR_FAULTS)
def test_other_tensors_than_the_class_has_are_refused_on_load_and_in_publishing(folder, component, message):
    name = change(weights_of(folder, component), TENSOR_FAULTS[message])
    message = re.escape(message.format(name=name))
    for read in (TangoPipeline.from_pretrained, check_folder):
        with pytest.raises(ValueError, match=f"`{component}`.*{message}"):
            read(folder)


def test_the_names_of_weight_normalisation_are_refused_with_what_to_do(folder):
    change(
        weights_of(folder, "vocoder"),
        lambda tensors, name: {name.replace(".weight", ".weight_v"): tensor for name, tensor in tensors.items()},
    )
    with pytest.raises(ValueError, match="`vocoder`.*`conv_post.weight`.*remove_weight_norm"):
        TangoPipeline.from_pretrained(folder)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
CONTENTS = {
    "is a git-LFS pointer": lambda content: LFS,
    "is damaged or cut short: it is empty": lambda content: b"",
    "is damaged or cut short": lambda content: content[:-1],
    "damaged or cut short": lambda content: content[:100],
}


@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("message", CONTENTS)
def test_damaged_weight_files_are_named_before_any_model_is_built(folder, component, message):
    path = weights_of(folder, component)
    path.write_bytes(CONTENTS[message](path.read_bytes()))
    for read in (TangoPipeline.from_pretrained, check_folder):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} (is )?{message}"):
            read(folder)


@pytest.mark.parametrize(
    "name",
    ("tokenizer", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "scheduler", "model_index.json")
    + tuple(MODELS)
    + tuple(f"{component}/config.json" for component in MODELS)
    + tuple(f"{component}/{WEIGHTS[component]}.safetensors" for component in MODELS),
)
def test_missing_folders_and_files_are_named(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for read in (TangoPipeline.from_pretrained, check_folder):
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.* (is missing|has neither tokenizer.json)"):
            read(folder)


@pytest.mark.parametrize("content", (b"", LFS, b'{"version": "1.0", "model": {'))
def test_a_damaged_vocabulary_is_named(folder, content):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="`tokenizer`: .*tokenizer.json is"):
        TangoPipeline.from_pretrained(folder)


def test_a_model_of_another_class_is_called_by_its_name(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "AudioLDMPipeline"}))
    with pytest.raises(ValueError, match="holds AudioLDMPipeline, not TangoPipeline"):
        TangoPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="unet holds UNet2DConditionModel, not TangoPipeline"):
        TangoPipeline.from_pretrained(folder / "unet")


def test_a_subclass_loads_its_own_folders_and_those_of_the_class(folder, tmp_path):
    class LouderPipeline(TangoPipeline):
        pass

    pipe = LouderPipeline.from_pretrained(folder)
    pipe.save_config(folder)
    assert type(LouderPipeline.from_pretrained(folder)) is LouderPipeline


def test_passed_components_need_no_files(folder, components):
    for component in ("vocoder", "tokenizer"):
        shutil.rmtree(folder / component)
    pipe = TangoPipeline.from_pretrained(folder, vocoder=components["vocoder"], tokenizer=components["tokenizer"])
    assert pipe.vocoder is components["vocoder"]
    assert TangoPipeline.from_pretrained(folder, vocoder=None, tokenizer=None).vocoder is None
    with pytest.raises(ValueError, match="vocoder"):
        TangoPipeline.from_pretrained(folder, tokenizer=components["tokenizer"])


def test_a_passed_model_with_an_adapter_is_not_compared_with_the_folder(folder, components):
    components["unet"].add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert TangoPipeline.from_pretrained(folder, unet=components["unet"]).unet is components["unet"]


def test_shards_load_and_a_missing_one_is_named(pipe, tmp_path):
    expected = pipe("rain", generator=seeds(0), **SHORT).audios
    folder = tmp_path / "tango"
    pipe.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert (TangoPipeline.from_pretrained(folder)("rain", generator=seeds(0), **SHORT).audios == expected).all()
    shards[0].unlink()
    for read in (TangoPipeline.from_pretrained, check_folder):
        with pytest.raises(ValueError, match=f"`unet`: {re.escape(str(shards[0]))} is missing, which .*index.json"):
            read(folder)


def test_pickles_load_and_are_checked(pipe, tmp_path):
    folder = tmp_path / "tango"
    pipe.save_pretrained(folder)
    for path in folder.glob("*/*.safetensors"):
        stem = "pytorch_model" if path.stem == "model" else path.stem
        torch.save(load_file(path), path.with_name(f"{stem}.bin"))
        path.unlink()
    find_model(folder)
    path = folder / "vae" / "diffusion_pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    torch.save(without(tensors, "decoder.conv_in.bias"), path)
    with pytest.raises(ValueError, match="`vae`.*missing: `decoder.conv_in.bias`"):
        TangoPipeline.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        TangoPipeline.from_pretrained(folder)


def test_what_is_not_needed_may_lie_in_the_files(folder, pipe):
    config = T5Config.from_dict({**pipe.text_encoder.config.to_dict(), "is_encoder_decoder": True})
    whole = T5ForConditionalGeneration(config).state_dict()
    whole |= pipe.text_encoder.state_dict()
    del whole["encoder.embed_tokens.weight"], whole["decoder.embed_tokens.weight"]  # tied to `shared.weight`
    save_file({name: tensor.clone() for name, tensor in whole.items()}, weights_of(folder, "text_encoder"))
    change(weights_of(folder, "text_encoder"), lambda tensors, name: tensors)
    loaded = TangoPipeline.from_pretrained(folder).text_encoder
    assert torch.equal(loaded.encoder.embed_tokens.weight, pipe.text_encoder.shared.weight)


def test_attention_names_of_old_diffusers_load(folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors, name):
        def old_name(name):
            for new, before in old.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
            return name

        return {old_name(name): tensor for name, tensor in tensors.items()}

    change(weights_of(folder, "vae"), rename)
    assert "encoder.mid_block.attentions.0.query.weight" in load_file(weights_of(folder, "vae"))
    TangoPipeline.from_pretrained(folder)
    check_folder(folder)


def test_only_the_weights_that_are_read_are_checked_on_load_and_all_in_publishing(folder):
    path = weights_of(folder, "unet")
    other = path.with_name(path.name.replace(".safetensors", ".fp16.safetensors"))
    shutil.copy(path, other)
    name = change(other, without)
    TangoPipeline.from_pretrained(folder)
    for read in (lambda folder: TangoPipeline.from_pretrained(folder, variant="fp16"), check_folder):
        with pytest.raises(ValueError, match=f"fp16.*missing: `{name}`"):
            read(folder)


def test_the_one_variant_of_a_folder_is_named_where_none_is_given(pipe, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="weights of the variant fp16 only: pass it as `variant`"):
        TangoPipeline.from_pretrained(tmp_path)
    TangoPipeline.from_pretrained(tmp_path, variant="fp16")


def test_models_that_were_loaded_save_building_them_again(folder, pipe, monkeypatch):
    files = find_model(folder)
    check_weights(*files)
    monkeypatch.setattr("pipeline_tango.model_files.build_model", lambda *args: pytest.fail("built"))
    check_weights(*files, models=pipe.components)
    TangoPipeline.from_pretrained(folder)


def load_as_custom_pipeline(folder, **options):
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True, **options)


@pytest.mark.parametrize("component", MODELS)
def test_the_code_file_of_a_repo_checks_what_it_has_loaded(folder, component):
    name = change(weights_of(folder, component), without)
    with pytest.raises(ValueError, match=f"`{component}`.*missing: `{name}`"):
        load_as_custom_pipeline(folder)


def test_the_code_file_of_a_repo_misses_the_tokenizer_and_not_what_is_passed(folder, components):
    load_as_custom_pipeline(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="`tokenizer`: .* is missing"):
        load_as_custom_pipeline(folder)
    load_as_custom_pipeline(folder, tokenizer=components["tokenizer"])


SCRIPT = """
from diffusers import DiffusionPipeline
from pipeline_tango import TangoPipeline

for load in (
    TangoPipeline.from_pretrained,
    lambda repo: DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True),
):
    try:
        assert load("alice/whole").name_or_path == "alice/whole"
        load("alice/broken")
    except ValueError as error:
        print(str(error))
"""


def test_a_repo_is_checked_as_a_folder_is(folder, tmp_path):
    with Hub() as hub:
        for repo_id in ("alice/whole", "alice/broken"):
            hub.repos[repo_id] = Repo(private=False)
            if repo_id == "alice/broken":
                name = change(weights_of(folder, "vocoder"), without)
            files = {
                path.relative_to(folder).as_posix(): File(path.read_bytes(), is_lfs=path.suffix == ".safetensors")
                for path in folder.rglob("*")
                if path.is_file()
            }
            hub.repos[repo_id].commit("model", files)
            hub.objects |= {file.etag: file.content for file in files.values() if file.is_lfs}
        process = start(["-c", SCRIPT], hub, tmp_path / "home", tmp_path, PYTHONPATH=str(ROOT))
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert len(lines) == 2 and all("`vocoder`" in line and f"missing: `{name}`" in line for line in lines), lines


# Saving


def test_a_pipeline_with_an_adapter_is_not_saved(pipe, tmp_path):
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="x")
    plain = build_components()["unet"].state_dict()
    for fuse in (False, True):
        if fuse:
            pipe.fuse_lora()
        for save in (pipe.save_pretrained, lambda folder: pipe.push_to_hub("alice/tango")):
            with pytest.raises(ValueError, match="`unet` would not load again; .*base_layer.*unload_lora_weights"):
                save(tmp_path / "saved")
        assert not (tmp_path / "saved").exists()
    merged = pipe("rain", generator=seeds(0), **SHORT).audios
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    saved = load_file(weights_of(tmp_path / "saved", "unet"))
    assert saved.keys() == plain.keys() and any(not torch.equal(saved[name], plain[name]) for name in plain)
    loaded = TangoPipeline.from_pretrained(tmp_path / "saved")
    assert abs(loaded("rain", generator=seeds(0), **SHORT).audios - merged).max() < 1e-4
    check_folder(tmp_path / "saved")


def test_offloaded_weights_and_other_tensors_are_not_saved(pipe, tmp_path):
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block)
    with pytest.raises(ValueError, match="`unet` would not load again.*_orig_mod"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.unet.mid_block = pipe.unet.mid_block._orig_mod
    pipe.vocoder.apply_weight_norm()
    with pytest.raises(ValueError, match="`vocoder` would not load again.*remove_weight_norm"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe.vae.to("meta")
    with pytest.raises(ValueError, match="`vae` has weights that are offloaded"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_hooks_a_deep_cache_fused_projections_and_a_compiled_unet_do_not_matter_to_saving(pipe, tmp_path):
    pipe.unet.fuse_qkv_projections()
    pipe.enable_deep_cache(2)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_pretrained(tmp_path)
    check_folder(tmp_path)
    TangoPipeline.from_pretrained(tmp_path)
