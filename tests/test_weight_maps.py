import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from pipeline_tango.weight_maps import (
    TIED,
    VOCODER_CONSTANTS,
    original_names,
    original_shape,
    plain_names,
    read,
    to_diffusers,
    to_original,
)


@st.composite
def components(draw):
    """A component of random shape, without weights."""
    name = draw(st.sampled_from(["unet", "text_encoder", "vae", "vocoder"]))
    num_layers = draw(st.integers(1, 3))
    with torch.device("meta"):
        if name == "text_encoder":
            model = T5EncoderModel(
                T5Config(vocab_size=8, d_model=4, d_kv=2, num_heads=2, d_ff=4, num_layers=num_layers)
            )
        elif name == "vocoder":
            rates = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
            kernels = draw(st.lists(st.sampled_from([3, 7, 11]), min_size=1, max_size=3))
            model = SpeechT5HifiGan(
                SpeechT5HifiGanConfig(
                    model_in_dim=4,
                    upsample_initial_channel=2 ** len(rates),
                    upsample_rates=rates,
                    upsample_kernel_sizes=[2 * rate for rate in rates],
                    resblock_kernel_sizes=kernels,
                    resblock_dilation_sizes=[list(range(1, num_layers + 1))] * len(kernels),
                )
            )
        elif name == "vae":
            attention = draw(st.lists(st.booleans(), min_size=1, max_size=12))  # more than 9: two-digit level numbers
            model = AutoencoderKL(
                down_block_types=[f"{'Attn' * has}DownEncoderBlock2D" for has in attention],
                up_block_types=[f"{'Attn' * has}UpDecoderBlock2D" for has in attention[::-1]],
                block_out_channels=[draw(st.sampled_from([4, 8])) for _ in attention],
                layers_per_block=num_layers,
                norm_num_groups=2,
            )
        else:
            model = UNet2DConditionModel(
                block_out_channels=(4, 4),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=num_layers,
                attention_head_dim=2,
                cross_attention_dim=4,
                norm_num_groups=2,
            )
    return name, model


@settings(max_examples=40, deadline=None)
@given(components())
def test_the_map_and_its_inverse_compose_to_identity(component):
    name, model = component
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    names = original_names(name, shapes)
    assert len(set(names.values())) == len(names)
    left_out = set(shapes) - set(names)
    assert left_out <= {*VOCODER_CONSTANTS, *(alias.removeprefix("text_encoder.") for alias in TIED)}

    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shapes[key], generator=generator) for key in names}
    originals = dict(to_original(name, tensors, names))
    assert {key: tensor.shape for key, tensor in originals.items()} == {
        old: original_shape(name, old, shapes[new]) for new, old in names.items()
    }
    back = dict(to_diffusers(originals, names, shapes))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_names_are_those_of_the_original_checkpoint(original_checkpoint, converted):
    for component, cls, file in (
        ("unet", UNet2DConditionModel, "main"),
        ("text_encoder", T5EncoderModel, "main"),
        ("vae", AutoencoderKL, "vae"),
        ("vocoder", SpeechT5HifiGan, "vae"),
    ):
        found = torch.load(original_checkpoint / f"pytorch_model_{file}.bin", weights_only=True)
        prefix = {"unet": "unet.", "text_encoder": "text_encoder.", "vocoder": "vocoder."}.get(component, "")
        found = {name for name in found if name.startswith(prefix)} - set(TIED)
        if component == "vae":
            found = {name for name in found if not name.startswith("vocoder.")}
        model = cls.from_pretrained(converted / component)
        assert set(original_names(component, model.state_dict()).values()) == found


@pytest.mark.parametrize("form", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("cls", [torch.nn.Conv1d, torch.nn.ConvTranspose1d])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_is_folded_as_torch_does_it(cls, form):
    model = torch.nn.ModuleDict({"conv": cls(4, 6, 3)})
    plain = model["conv"].weight.detach().clone()
    form(model["conv"])
    with torch.no_grad():
        dict(model.named_parameters())[
            "conv.weight_g" if form is torch.nn.utils.weight_norm else "conv.parametrizations.weight.original0"
        ].mul_(3)
    pairs = model.state_dict()
    assert plain_names(pairs) == {"conv.weight", "conv.bias"}
    torch.testing.assert_close(read(pairs, "conv.weight"), 3 * plain)
    inputs = torch.randn(1, 4, 10)
    expected = model["conv"](inputs)
    unnormed = cls(4, 6, 3)
    unnormed.load_state_dict({"weight": read(pairs, "conv.weight"), "bias": pairs["conv.bias"]})
    torch.testing.assert_close(unnormed(inputs), expected)


def test_half_a_weight_norm_pair_is_not_a_weight():
    assert plain_names({"conv.weight_g": None, "conv.bias": None}) == {"conv.weight_g", "conv.bias"}


def test_values_too_large_for_the_type_are_refused():
    tensors, names, shapes = {"unet.a": torch.tensor([1e6])}, {"a": "unet.a"}, {"a": (1,)}
    with pytest.raises(ValueError, match="`unet.a` has values too large for torch.float16"):
        dict(to_diffusers(tensors, names, shapes, torch.float16))
    assert dict(to_diffusers(tensors, names, shapes, torch.bfloat16))["a"].dtype == torch.bfloat16
