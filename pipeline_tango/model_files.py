"""Which files and tensors a diffusers folder of the pipeline has, against what the classes in its index need.

Only configs and the headers of weight files are read.
"""

import importlib
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .json_files import check_file, read_json


# Importing torch, diffusers and transformers takes seconds: done inside functions, since publishing answers without.


CONFIGS = {
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
    "vocoder": "config.json",
}
WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vocoder": "model",
}
TOKENIZERS = ("tokenizer.json", "spiece.model")  # each version of transformers reads one of them
WEIGHT_SUFFIXES = ("safetensors", "bin")  # in the order in which they are looked for
# Of a whole T5, a buffer that some versions saved, and the copies that `fuse_qkv_projections` makes
NOT_NEEDED = (r"^lm_head\.", r"(^|\.)position_ids$", r"\.to_q?kv\.(weight|bias)$")
MEND = "copy or download that folder again, or save the model again from where it is complete"


def read_index(folder, class_names=("TangoPipeline",)):
    """Content of `model_index.json`; a ValueError if it belongs to another pipeline than `class_names`."""
    folder = Path(folder)
    if not (folder / "model_index.json").is_file() and (folder / "config.json").is_file():
        name = read_json(folder / "config.json").get("_class_name", "a single model")
        raise ValueError(f"{folder} holds {name}, not {class_names[0]}: a whole pipeline has a model_index.json")
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name  # `custom_pipeline` gives a module as well
    if name not in class_names:
        raise ValueError(f"{folder} holds {name}, not {class_names[0]}: load it with the class that it names")
    return index


def check_folders(folder, index, names=tuple(CONFIGS)):
    """Check that components have their folders, configs and the tokenizer its vocabulary."""
    for component in names:
        value = index.get(component)
        if not isinstance(value, list) or len(value) != 2 or None in value:
            path = folder / "model_index.json"
            raise ValueError(f"{path}: `{component}` must be a diffusers or transformers class, got {value!r}")
        try:
            read_json(folder / component / CONFIGS[component])
            if component == "tokenizer":
                check_vocabulary(folder / component)
        except ValueError as error:
            raise ValueError(f"`{component}`: {error}: {MEND}") from error


def check_vocabulary(folder):
    """Check that a tokenizer has its vocabulary, without which every word is unknown."""
    paths = [folder / name for name in TOKENIZERS if (folder / name).exists()]
    if not paths:
        raise ValueError(f"{folder} has neither {' nor '.join(TOKENIZERS)}")
    for path in paths:
        if path.suffix == ".json":
            read_json(path)
        else:
            check_file(path)


def weight_files(folder, component, suffix="safetensors"):
    """Weight files of a component by variant, with `None` for the plain ones."""
    stem = "pytorch_model" if (WEIGHTS[component], suffix) == ("model", "bin") else WEIGHTS[component]
    pattern = re.compile(rf"{stem}(?:\.([^.]+?))?(?:-\d{{5}}-of-\d{{5}}(?:\.([^.]+))?)?\.{suffix}")
    indices = re.compile(rf"{stem}\.{suffix}(?:\.([^.]+))?\.index(?:\.([^.]+))?\.json")
    files, shards_of = {}, {}
    for path in sorted((folder / component).glob("*")):
        if match := pattern.fullmatch(path.name):
            files.setdefault(match[1] or match[2], []).append(path)
        elif match := indices.fullmatch(path.name):
            shards_of[match[1] or match[2]] = path
    for variant, path in shards_of.items():
        files.setdefault(variant, [])
    for variant, paths in files.items():
        if variant not in shards_of and len(paths) == 1 and "-of-" not in paths[0].name:
            continue
        name = f"{stem}.{suffix}.index{f'.{variant}' if variant else ''}.json"
        index = shards_of.get(variant, folder / component / name)
        shards = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(shards - {path.name for path in paths}):
            raise ValueError(
                f"`{component}`: {folder / component / missing[0]} is missing, which {index} names: {MEND}"
            )
        if surplus := [path for path in paths if path.name not in shards]:
            raise ValueError(f"`{component}`: {surplus[0]} is not in {index}: remove the one that is out of date")
    return files


def find_variants(folder, names=tuple(WEIGHTS), suffixes=("safetensors",)):
    """The values of `variant` that give weights to every component, `None` first."""
    variants = {
        component: {variant for suffix in suffixes for variant in weight_files(folder, component, suffix)}
        for component in names
    }
    for component, found in variants.items():
        if not found:
            path = folder / component / f"{WEIGHTS[component]}.safetensors"
            raise ValueError(
                f"`{component}`: {path} is missing: pass `variant`, such as 'fp16', if there are no others, or {MEND}"
            )
    candidates = [None, *sorted(set().union(*variants.values()) - {None})]
    fitting = [each for each in candidates if all(each in found or None in found for found in variants.values())]
    if not fitting:
        raise ValueError(f"{folder}: no variant has weights for every component, got {variants}")
    return fitting


def choose_files(folder, variant, names=tuple(WEIGHTS), suffixes=WEIGHT_SUFFIXES):
    """The weight files that a load reads: a `dict` component -> files."""
    variants = find_variants(folder, names, suffixes) if names else [None]
    if variant is None and variants[0] is not None:
        raise ValueError(f"{folder} has weights of the variant {' or '.join(variants)} only: pass it as `variant`")
    files = {}
    for component in names:
        groups = [weight_files(folder, component, suffix) for suffix in suffixes]
        found = [group[each] for each in dict.fromkeys((variant, None)) for group in groups if each in group]
        if not found:
            have = ", ".join(sorted({each or "plain ones" for group in groups for each in group}))
            raise ValueError(
                f"`{component}`: {folder / component} has no weights of `variant` {variant!r}, only {have}"
            )
        files[component] = found[0]
    return files


def read_header(path):
    """Name -> (type, shape) of the tensors of a weight file; a ValueError if the file is not complete."""
    import torch

    check_file(path)
    if path.suffix != ".safetensors":
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
            return {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
        except Exception as error:  # pickles of others: anything may be wrong with them
            raise ValueError(f"{path} is damaged, cut short or holds more than tensors: {error}") from error
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def read_shapes(paths):
    """Name -> shape of the tensors of several weight files."""
    return {name: tuple(shape) for path in paths for name, (_, shape) in read_header(path).items()}


def build_model(model_class, config, origin):
    """A model without weights, on the meta device, of a class of diffusers or transformers. `origin` of the config is
    for the message of a ValueError."""
    import diffusers
    import torch

    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype")}
    try:
        with torch.device("meta"):
            if issubclass(model_class, diffusers.ModelMixin):
                return model_class.from_config(config)
            model = model_class(model_class.config_class.from_dict(config))
            model.tie_weights()
            return model
    except Exception as error:  # the libraries check configs each in its own way, or not at all
        raise ValueError(f"{origin} describes no {model_class.__name__}: {error}") from error


def misfits(shapes, model):
    """What is wrong with a `dict` of name -> shape of tensors as the weights of a model: "" if nothing is."""
    import diffusers

    state = model.state_dict(keep_vars=True)
    if not state.keys() >= shapes.keys() and isinstance(model, diffusers.ModelMixin):
        shapes = dict(shapes)  # with the names that attention layers had until diffusers 0.13 replaced
        model._fix_state_dict_keys_on_load(shapes)
    twins = {}  # tied weights are stored once, by any of their names
    for name, tensor in state.items():
        twins.setdefault(id(tensor), []).append(name)
    needless = re.compile("|".join([*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *NOT_NEEDED]))
    return describe_misfits(
        missing=[names[0] for names in twins.values() if not any(name in shapes for name in names)],
        unexpected=[name for name in shapes if name not in state and not needless.search(name)],
        wrong=[
            f"{name} {shapes[name]} instead of {tuple(tensor.shape)}"
            for name, tensor in state.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ],
    )


def describe_misfits(missing, unexpected, wrong):
    problems = {"missing": missing, "unexpected": unexpected, "of a wrong shape": wrong}
    return "; ".join(f"{problem}: {listed(sorted(names))}" for problem, names in problems.items() if names)


def listed(names):
    names = [f"`{name}`" for name in names]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_weights(folder, index, files, models=None):
    """Check that weight files are complete and hold the tensors that their components need.

    Args:
        folder (`Path`): the diffusers folder.
        index (`dict`): content of its `model_index.json`.
        files (`dict`): component -> weight files.
        models (`dict`, *optional*): component -> model that was loaded from them. Saves the time to build one, which
            is done if that does not fit, since quantisation and adapters change a model.

    Raises:
        ValueError: naming the component, and the file or tensors that are missing, unexpected or of a wrong shape.
    """
    for component, paths in files.items():
        shapes = read_shapes(paths)
        config = read_json(folder / component / "config.json")
        library, class_name = index[component]
        if config.get("quantization_config") or library not in ("diffusers", "transformers"):
            continue
        model = (models or {}).get(component)
        if model is not None and not misfits(shapes, model):
            continue
        model_class, origin = getattr(importlib.import_module(library), class_name), folder / component / "config.json"
        model = build_model(model_class, config, f"`{component}`: {origin}")
        if problems := misfits(shapes, model):
            raise ValueError(
                f"`{component}`: the tensors of {', '.join(map(str, paths))} are not those that its config.json "
                f"describes; {problems}. {advice(shapes)}"
            )


def advice(names, loaded=False):
    """How to mend weights with these names, which do not fit those of their model."""
    again = "save it then" if loaded else "save the model again"
    if any(".base_layer." in name or ".lora_" in name for name in names):
        return (
            "There is a LoRA in it: call `unload_lora_weights()`, or to merge the LoRA into it `fuse_lora()` and then "
            f"that, and {again}; `save_lora_weights` saves the LoRA alone"
        )
    if any(name.endswith(("weight_g", "weight_v", "weight.original0", "weight.original1")) for name in names):
        return (
            "There is weight normalisation in it: remove that (`torch.nn.utils.parametrize.remove_parametrizations`, "
            f"`torch.nn.utils.remove_weight_norm` for `weight_g` and `weight_v`), and {again}"
        )
    if any("_orig_mod." in name for name in names):
        return f"Parts of it are compiled: put the modules (`_orig_mod`) back, and {again}"
    return "Its config is not that of these tensors" if loaded else f"Please {MEND}"


def find_model(folder, class_names=("TangoPipeline",), variant=None, passed=(), use_safetensors=None):
    """Check, without building any model, that a folder has the files that a load needs.

    Args:
        folder (`str` or `Path`): the diffusers folder.
        class_names (sequence of `str`): accepted names of the pipeline's class.
        variant (`str`, *optional*): which weights to read.
        passed (collection of `str`): names of components that the folder need not have.
        use_safetensors (`bool`, *optional*): as for `from_pretrained`.

    Returns:
        the arguments of [`check_weights`].

    Raises:
        ValueError: naming the component and the file that is missing or damaged, and how to mend it.
    """
    folder = Path(folder)
    index = read_index(folder, class_names)
    check_folders(folder, index, [name for name in CONFIGS if name not in passed])
    suffixes = WEIGHT_SUFFIXES if use_safetensors is None else ("safetensors",) if use_safetensors else ("bin",)
    files = choose_files(folder, variant, [name for name in WEIGHTS if name not in passed], suffixes)
    for component, paths in files.items():
        try:
            read_shapes(paths)
        except ValueError as error:
            raise ValueError(f"`{component}`: {error}: {MEND}") from error
    return folder, index, files


def check_loaded(name_or_path, components, class_names=("TangoPipeline",)):
    """Check what `DiffusionPipeline.from_pretrained(name_or_path)` has loaded components from, as far as it is known.

    Args:
        name_or_path (`str` or `Path`): folder or repo.
        components (`dict`): name -> model, tokenizer or scheduler. Those of another origin are not checked.
        class_names (sequence of `str`): accepted names of the pipeline's class.

    Raises:
        ValueError: as [`find_model`] and [`check_weights`].
    """

    def origin(component):
        config = getattr(component, "config", None)
        return getattr(component, "name_or_path", None) or getattr(config, "_name_or_path", None)

    origins = {name: Path(origin(component)) for name, component in components.items() if origin(component)}
    folder = Path(name_or_path)
    if not folder.is_dir():
        cache = f"models--{str(name_or_path).replace('/', '--')}"
        parents = [path.parent for name, path in origins.items() if path.name == name and cache in path.parts]
        folder = next((path for path in parents if (path / "model_index.json").is_file()), None)
    if folder is None:
        return
    # A component without a folder of its own is looked for in the folder of all
    loaded = {name: components[name] for name, path in origins.items() if path in (folder, folder / name)}
    models = [name for name in WEIGHTS if name in loaded]
    variant = find_variants(folder, models, WEIGHT_SUFFIXES)[0] if models else None
    check_weights(*find_model(folder, class_names, variant, components.keys() - loaded.keys()), models=loaded)


def check_savable(components):
    """Check that the models among `components` would be saved as what `from_pretrained` reads.

    Args:
        components (`dict`): name -> model, tokenizer or scheduler.

    Raises:
        ValueError: naming the component that has adapters, offloaded weights or other tensors than its class.
    """
    import diffusers
    import transformers

    for component in WEIGHTS:
        model = getattr(components.get(component), "_orig_mod", components.get(component))
        if not isinstance(model, (diffusers.ModelMixin, transformers.PreTrainedModel)):
            continue
        if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
            continue
        state = model.state_dict(keep_vars=True)
        if any(tensor.is_meta for tensor in state.values()):
            raise ValueError(
                f"`{component}` has weights that are offloaded: call `remove_all_hooks()` before saving it"
            )
        config = dict(model.config) if isinstance(model, diffusers.ModelMixin) else model.config.to_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if problems := misfits(shapes, build_model(type(model), config, f"the config of the {component}")):
            raise ValueError(f"`{component}` would not load again; {problems}. {advice(shapes, loaded=True)}")
