"""Names of tensors in the original's checkpoints and in diffusers: a table per component and the loops that use it."""

import torch


# component -> prefix of its tensors in the original's files, and what its diffusers names are called there. A table is
# applied from top to bottom, as plain replacement. UNet and text encoder have kept their names.
TABLES = {
    "unet": ("unet.", ()),
    "text_encoder": ("text_encoder.", ()),
    "vocoder": ("vocoder.", (("upsampler.", "ups."),)),
    "vae": (
        "",
        (
            ("conv_norm_out.", "norm_out."),
            ("conv_shortcut.", "nin_shortcut."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            (".attentions.", ".attn."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            ("group_norm.", "norm."),
            ("to_q.", "q."),
            ("to_k.", "k."),
            ("to_v.", "v."),
            ("to_out.0.", "proj_out."),
            ("down_blocks.", "down."),
        ),
    ),
}

# Tensors of diffusers and transformers that the original does not have: the vocoder's unused normalisation, and a
# second name of the text encoder's `shared.weight`.
VOCODER_CONSTANTS = {"mean": 0.0, "scale": 1.0}
TIED = {"text_encoder.encoder.embed_tokens.weight": "text_encoder.shared.weight"}

# How the two forms of weight norm call the magnitude and the direction of `NAME.weight`.
WEIGHT_NORMS = (
    (".weight_g", ".weight_v"),
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
)


def original_names(component, names):
    """Names that the tensors of a diffusers component have in the original's files.

    Args:
        component (`str`): "unet", "text_encoder", "vae" or "vocoder".
        names (iterable of `str`): all keys of the component's state dict.

    Returns:
        `dict`, diffusers name -> original name, one to one, without the tensors that the original does not have.
    """
    prefix, table = TABLES[component]
    names = [name for name in names if not (component == "vocoder" and name in VOCODER_CONSTANTS)]
    names = [name for name in names if prefix + name not in TIED]
    if (
        component == "vae"
    ):  # the original counts the decoder's levels from the highest resolution, diffusers down to it
        num_levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})
        table = [(f"up_blocks.{i}.", f"up.{num_levels - 1 - i}.") for i in range(num_levels)] + list(table)
    originals = {}
    for name in names:
        original = name
        for new, old in table:
            original = original.replace(new, old)
        originals[name] = prefix + original
    return originals


def original_shape(component, name, shape):
    """Shape in the original of the tensor with this original `name` and this `shape` in diffusers."""
    is_attention = component == "vae" and ".attn" in name and name.endswith(".weight") and len(shape) == 2
    return (*shape, 1, 1) if is_attention else tuple(shape)  # the VAE's attention projects by 1x1 convolutions


def plain_names(names):
    """`names` with each pair of weight-norm tensors counted as the one weight it stands for."""
    plain = set(names)
    for magnitude, direction in WEIGHT_NORMS:
        for name in names:
            stem = name.removesuffix(magnitude)
            if stem != name and stem + direction in plain:
                plain -= {name, stem + direction}
                plain.add(f"{stem}.weight")
    return plain


def read(tensors, name):
    """`tensors[name]`, folded from its weight-norm pair where it is stored as one."""
    if name in tensors:
        return tensors[name]
    stem = name.removesuffix(".weight")
    for magnitude, direction in WEIGHT_NORMS:
        if stem + magnitude in tensors:
            g, v = tensors[stem + magnitude], tensors[stem + direction]
            return v * (g / torch.linalg.vector_norm(v, dim=tuple(range(1, v.ndim)), keepdim=True))
    raise KeyError(name)


def to_diffusers(tensors, names, shapes, dtype=None):
    """Yield (diffusers name, tensor) for the pairs of `names`, in the given shapes and, if given, in `dtype`.

    No two share memory, whatever they do in `tensors`: safetensors refuses to save those.
    """
    taken = set()
    for new, old in names.items():
        value = read(tensors, old)
        if dtype is not None and value.isfinite().all() and not value.to(dtype).isfinite().all():
            raise ValueError(f"`{old}` has values too large for {dtype}")
        value = value.to(dtype).reshape(shapes[new]).contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != value.numel() * value.itemsize:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        yield new, value


def to_original(component, tensors, names, dtype=None):
    """Yield (original name, tensor) for the pairs of `names`: the inverse of `to_diffusers`."""
    for new, old in names.items():
        yield old, tensors[new].to(dtype).reshape(original_shape(component, old, tensors[new].shape))
