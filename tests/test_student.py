import pytest
import torch
from conftest import build_components
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pipeline_tango import TangoPipeline
from pipeline_tango.student import check_student


STUDENT = {
    "scheduler": "lcm",
    "scheduler_options": {"original_inference_steps": 50},
    "num_inference_steps": 4,
    "guidance_scale": 4.0,
}


@pytest.mark.parametrize(
    "entry, value",
    [
        ("scheduler", "lcms"),
        ("scheduler", ["lcm"]),
        ("scheduler_options", {"original_steps": 50}),
        ("scheduler_options", {"original_inference_steps": float("nan")}),
        ("scheduler_options", None),
        ("num_inference_steps", 0),
        ("num_inference_steps", 51),
        ("num_inference_steps", 4.0),
        ("num_inference_steps", True),
        ("guidance_scale", 0.5),
        ("guidance_scale", None),
        ("guidance_scale", [8.0, 1.0]),
        ("guidance_scale", [1.0]),
        ("guidance_scale", float("inf")),
    ],
)
def test_what_is_no_student_is_refused_by_the_name_of_the_entry(entry, value):
    with pytest.raises(ValueError, match=f"`{entry}` of a student has to be "):
        check_student(STUDENT | {entry: value})


def test_a_student_has_all_entries_and_no_others():
    assert check_student(STUDENT | {"guidance_scale": (1, 8)}) == STUDENT | {"guidance_scale": [1.0, 8.0]}
    for wrong in (None, "lcm", {"scheduler": "lcm"}, STUDENT | {"steps": 4}):
        with pytest.raises(ValueError, match="`student` has to be a dict of"):
            check_student(wrong)


def student_layers(pipe, seed=1, rank=4):
    """LoRA layers (state dict) of the kinds of layers that an LCM-LoRA has, and their metadata."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1"]
    targets += ["conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    layers = get_peft_model_state_dict(unet)
    layers = {name: 0.1 * torch.randn(each.shape, generator=generator) for name, each in layers.items()}
    return layers, unet.peft_config["default"].to_dict()


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory):
    """A LoRA of random weights that says that it makes a student. Shared by the session: never write into it."""
    folder = tmp_path_factory.mktemp("student") / "lora"
    layers, metadata = student_layers(TangoPipeline(**build_components()))
    TangoPipeline.save_lora_weights(folder, layers, unet_lora_adapter_metadata=metadata, student=STUDENT)
    return folder
