import re

import pytest
import torch
from conftest import SHORT, largest_difference, seeds
from diffusers import UNet2DConditionModel
from hub import File, Hub, Repo, start
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pipeline_tango import TangoPipeline


def lora_of(pipe, seed, rank=4):
    """An adapter's layers (state dict) and metadata, made on a copy of the pipeline's UNet."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(config)
    torch.manual_seed(seed)
    layers = {name: 0.3 * torch.randn_like(tensor) for name, tensor in get_peft_model_state_dict(unet).items()}
    return layers, unet.peft_config["default"].to_dict()


def latents_of(pipe, **options):
    return pipe("rain", generator=seeds(0), output_type="latent", **SHORT, **options).audios


@pytest.fixture
def lora_folder(pipe, tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        layers, metadata = lora_of(pipe, seed)
        TangoPipeline.save_lora_weights(tmp_path / name, layers, unet_lora_adapter_metadata=metadata)
    return tmp_path


def test_lora_loads_scales_and_unloads(pipe, lora_folder):
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    assert pipe.get_list_adapters() == {"unet": ["first"]}
    assert pipe.unet.peft_config["first"].lora_alpha == 8  # from the file's metadata
    full = latents_of(pipe)
    assert largest_difference(full, plain) > 1e-2
    assert largest_difference(latents_of(pipe, cross_attention_kwargs={"scale": 0.0}), plain) < 1e-5
    half = latents_of(pipe, cross_attention_kwargs={"scale": 0.5})
    pipe.set_adapters("first", 0.5)
    assert largest_difference(latents_of(pipe), half) < 1e-5
    pipe.disable_lora()
    assert largest_difference(latents_of(pipe), plain) < 1e-5
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert largest_difference(latents_of(pipe), plain) < 1e-5


def test_several_adapters_mix_and_can_be_deleted(pipe, lora_folder):
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    first = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "second", adapter_name="second")
    pipe.set_adapters(["first", "second"], [0.7, 0.3])
    assert largest_difference(latents_of(pipe), first) > 1e-2
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert largest_difference(latents_of(pipe), first) < 1e-4
    pipe.delete_adapters("second")
    assert pipe.get_list_adapters() == {"unet": ["first"]}


def test_fused_lora_gives_the_same_and_unfuses(pipe, lora_folder):
    plain = latents_of(pipe)
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    pipe.set_adapters("first", 0.5)
    loose = latents_of(pipe)
    pipe.set_adapters("first", 1.0)
    pipe.fuse_lora(lora_scale=0.5)
    assert pipe.num_fused_loras == 1
    assert largest_difference(latents_of(pipe), loose) < 1e-3
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert largest_difference(latents_of(pipe), plain) < 1e-3


def test_hotswap_replaces_an_adapter_in_place(pipe, lora_folder):
    pipe.load_lora_weights(lora_folder / "second", adapter_name="x")
    second = latents_of(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(lora_folder / "first", adapter_name="x")
    assert largest_difference(latents_of(pipe), second) > 1e-2
    pipe.load_lora_weights(lora_folder / "second", adapter_name="x", hotswap=True)
    assert pipe.get_list_adapters() == {"unet": ["x"]}
    assert largest_difference(latents_of(pipe), second) < 1e-5


def test_a_lora_state_dict_loads_and_is_not_changed(pipe, lora_folder):
    state_dict = TangoPipeline.lora_state_dict(lora_folder / "first")
    keys = list(state_dict)
    assert all(key.startswith("unet.") for key in keys)
    pipe.load_lora_weights(state_dict)
    assert list(state_dict) == keys
    from_dict = latents_of(pipe)
    pipe.unload_lora_weights()
    layers, metadata = lora_of(pipe, 1)
    TangoPipeline.save_lora_weights(lora_folder / "again", layers)  # without metadata: alpha falls back to the rank
    pipe.load_lora_weights(lora_folder / "again")
    assert largest_difference(latents_of(pipe), from_dict) < 1e-5


def test_lora_survives_saving_bit_for_bit(pipe, lora_folder):
    layers, _ = lora_of(pipe, 1)
    saved = TangoPipeline.lora_state_dict(lora_folder / "first", weight_name="pytorch_lora_weights.safetensors")
    assert {f"unet.{name}" for name in layers} == set(saved)
    assert all(torch.equal(saved[f"unet.{name}"], tensor) for name, tensor in layers.items())


def test_what_is_no_lora_of_the_unet_is_refused(pipe, lora_folder, tmp_path):
    with pytest.raises(ValueError, match="Not a LoRA file"):
        pipe.load_lora_weights({"text_encoder.lora_A.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="Not a LoRA file"):
        pipe.load_lora_weights({})
    with pytest.raises(ValueError, match="`unet_lora_layers`"):
        TangoPipeline.save_lora_weights(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="Unknown arguments"):
        pipe.load_lora_weights(lora_folder / "first", adaptor_name="typo")
    assert not (tmp_path / "empty").exists()


def damaged(layers, kind):
    """A state dict of the UNet's LoRA with one fault, and what the message has to say about it."""
    layers = {f"unet.{name}": tensor for name, tensor in layers.items()}
    down = sorted(name for name in layers if "lora_A" in name)
    name = down[1].removeprefix("unet.").removesuffix(".lora_A.weight")
    if kind == "one half of a pair":
        del layers[down[1].replace("lora_A", "lora_B")]
        return layers, f"missing: `{name}.lora_B.weight`"
    if kind == "the other half":
        del layers[down[1]]
        return layers, f"missing: `{name}.lora_A.weight`"
    if kind == "no lora_B at all":
        return {name: layers[name] for name in down}, f"lora_B.weight` and {len(down) - 5} more"
    if kind == "unknown suffix":
        layers[down[1].replace("lora_A", "lora_C")] = layers[down[1]]
        return layers, f"names of an unknown kind: `{name}.lora_C.weight`"
    if kind == "layers of another UNet":
        moved = {key.replace("down_blocks.0", "down_blocks.7"): tensor for key, tensor in layers.items()}
        return moved, "layers that the UNet does not have: `down_blocks.7."
    if kind == "widths of another UNet":
        layers[down[1]] = torch.zeros(4, layers[down[1]].shape[1] + 1)
        return layers, f"of a wrong shape: `{name} (4, "
    layers[down[1]] = torch.zeros(2, layers[down[1]].shape[1])
    return layers, f"of a wrong shape: `{name} (2, "


@pytest.mark.parametrize("low_cpu_mem_usage", (True, False))
@pytest.mark.parametrize(
    "kind",
    (
        "one half of a pair",
        "the other half",
        "no lora_B at all",
        "unknown suffix",
        "layers of another UNet",
        "widths of another UNet",
        "halves of different ranks",
    ),
)
def test_a_file_that_is_no_whole_lora_of_the_unet_leaves_it_as_it_was(pipe, kind, low_cpu_mem_usage):
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    layers, message = damaged(lora_of(pipe, 1)[0], kind)
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_lora_weights(layers, low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(pipe.unet.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())
    assert not getattr(pipe.unet, "peft_config", None) and not pipe.get_list_adapters()


def test_metadata_of_another_rank_is_refused(pipe, tmp_path):
    layers, _ = lora_of(pipe, 1, rank=4)
    _, metadata = lora_of(pipe, 1, rank=8)
    TangoPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    with pytest.raises(ValueError, match=r"rank \[4\], but its metadata says \[8\]"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize("up, down", ((".lora.up", ".lora.down"), ("_lora.up", "_lora.down")))
def test_the_formats_of_diffusers_before_peft_load(pipe, up, down):
    layers, _ = lora_of(pipe, 1)
    pipe.load_lora_weights({f"unet.{name}": tensor for name, tensor in layers.items()})
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    old = {}
    for name, tensor in layers.items():
        name = name.replace(".lora_A", down).replace(".lora_B", up)
        if up == "_lora.up":  # attention processors
            name = re.sub(r"\.(to_[qkv]|to_out)(?:\.0)?_lora", r".processor.\1_lora", name)
        old[f"unet.{name}"] = tensor
    pipe.load_lora_weights(old)
    assert largest_difference(latents_of(pipe), expected) < 1e-5


def test_a_second_lora_is_checked_against_the_layers_below_the_first(pipe, lora_folder):
    pipe.load_lora_weights(lora_folder / "first", adapter_name="first")
    layers, message = damaged(lora_of(build_like(pipe), 2)[0], "widths of another UNet")
    with pytest.raises(ValueError, match=re.escape(message)):
        pipe.load_lora_weights(layers, adapter_name="second")
    pipe.load_lora_weights(lora_folder / "second", adapter_name="second")
    assert pipe.get_list_adapters() == {"unet": ["first", "second"]}


def build_like(pipe):
    """A pipeline with the components of `pipe`, whose UNet is a new one without adapters."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    return TangoPipeline(**{**pipe.components, "unet": unet})


@pytest.mark.parametrize("name", ("epoch.safetensors", "my-checkpoint-500.safetensors"))
def test_the_only_file_is_found_whatever_its_name(pipe, lora_folder, name):
    file = lora_folder / "first" / "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(file.rename(file.with_name(name)).parent)
    by_folder = latents_of(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(file.with_name(name))
    assert largest_difference(latents_of(pipe), by_folder) < 1e-6


def test_of_several_checkpoints_one_has_to_be_named(pipe, lora_folder):
    file = lora_folder / "first" / "pytorch_lora_weights.safetensors"
    for number in (1, 2):
        file.with_name(f"checkpoint-{number}.safetensors").write_bytes(file.read_bytes())
    pipe.load_lora_weights(file.parent, adapter_name="final")  # beside which the others do not matter
    file.unlink()
    with pytest.raises(ValueError, match="`weight_name` must be one of .*checkpoint-1.*checkpoint-2"):
        pipe.load_lora_weights(file.parent)
    pipe.load_lora_weights(file.parent, weight_name="checkpoint-2.safetensors", adapter_name="named")
    (file.parent / "empty").mkdir()
    with pytest.raises(ValueError, match="no .safetensors or .bin file"):
        pipe.load_lora_weights(file.parent / "empty")


def test_a_pickle_is_read_by_its_weights_only(pipe, tmp_path):
    layers, _ = lora_of(pipe, 1)
    pipe.load_lora_weights({f"unet.{name}": tensor for name, tensor in layers.items()})
    expected = latents_of(pipe)
    pipe.unload_lora_weights()
    TangoPipeline.save_lora_weights(tmp_path / "old", layers, safe_serialization=False)
    for source in (tmp_path / "old", tmp_path / "old" / "pytorch_lora_weights.bin"):
        pipe.load_lora_weights(source)
        assert largest_difference(latents_of(pipe), expected) < 1e-5
        pipe.unload_lora_weights()
    torch.save({"unet.lora": re.compile}, tmp_path / "old" / "pytorch_lora_weights.bin")
    with pytest.raises(Exception, match="pytorch_lora_weights.bin"):
        pipe.load_lora_weights(tmp_path / "old")


@pytest.mark.parametrize(
    "content, message",
    (
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-LFS pointer"),
        (b"12345678 no safetensors", "is damaged or cut short"),
    ),
)
def test_a_damaged_file_is_named(pipe, tmp_path, content, message):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    file.write_bytes(content)
    for source in (file, tmp_path):
        with pytest.raises(ValueError, match=f"pytorch_lora_weights.safetensors {message}|{message}"):
            pipe.load_lora_weights(source)


SCRIPT = """
from pipeline_tango import TangoPipeline

state_dict = TangoPipeline.lora_state_dict("alice/lora")
print(len(state_dict))
"""


def test_the_only_file_of_a_repo_is_found_on_the_hub_and_in_the_cache(lora_folder, tmp_path):
    content = (lora_folder / "first" / "pytorch_lora_weights.safetensors").read_bytes()
    file, repo = File(content, is_lfs=True), Repo(private=False)
    root = str(TangoPipeline.__init__.__globals__["__file__"]).rsplit("/", 2)[0]
    with Hub() as hub:
        hub.repos["alice/lora"] = repo
        repo.commit("LoRA", {"lora-checkpoint.safetensors": file})
        hub.objects[file.etag] = content
        online = start(["-c", SCRIPT], hub, tmp_path / "home", tmp_path, PYTHONPATH=root)
        assert online.returncode == 0, online.stderr
    for environment in ({"HF_HUB_OFFLINE": "1"}, {}):  # told so, and with a Hub that does not answer
        offline = start(["-c", SCRIPT], hub, tmp_path / "home", tmp_path, PYTHONPATH=root, **environment)
        assert offline.returncode == 0, offline.stderr
        assert offline.stdout == online.stdout
