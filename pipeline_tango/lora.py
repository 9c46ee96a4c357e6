"""Loading and saving of LoRA adapters of the UNet."""

import contextlib
import json
import os
import re
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin, _fetch_state_dict
from diffusers.utils import convert_unet_state_dict_to_peft, logging
from huggingface_hub import constants, model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import save_file

from .json_files import check_file
from .model_files import listed
from .student import (
    STUDENT_KEY,
    check_guidance_input,
    check_student,
    read_student,
    student_adapters,
    student_scheduler,
)


lora_logger = logging.get_logger(__name__)

NOT_LORA = ("scheduler", "optimizer", "checkpoint")  # in the names of other files that trainers write


class TangoLoraLoaderMixin(LoraBaseMixin):
    """Loads and saves LoRA adapters of the UNet. The rest (`set_adapters`, `unload_lora_weights`,
    `enable_lora_hotswap`, ...) is [`~loaders.lora_base.LoraBaseMixin`]'s.

    While an adapter that makes the UNet a student is active, the pipeline has the student's scheduler. The one before
    returns when the adapter is unloaded, deleted, disabled or set aside by `set_adapters`, unless another one was
    assigned to `pipe.scheduler`. Of a student that is fused when it is unloaded, the UNet stays that student."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, *, return_lora_metadata=False, **kwargs):
        """State dict of a LoRA file, and its metadata if `return_lora_metadata`.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Hub repo, folder, or state dict.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): also return the adapter's configuration.
            kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `force_download`, `local_files_only`, `token`.

        Raises:
            ValueError: if there is no file with weights, if one of several has to be named, or if it is damaged.
        """
        state_dict, metadata, _ = cls._fetch_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        return (state_dict, metadata) if return_lora_metadata else state_dict

    @classmethod
    def lora_student(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """The student that a LoRA file says it is, `None` if it is none (see [`check_student`]). Arguments as for
        `lora_state_dict`."""
        return cls._fetch_lora(pretrained_model_name_or_path_or_dict, **kwargs)[2]

    @classmethod
    def _fetch_lora(cls, pretrained_model_name_or_path_or_dict, **kwargs):
        """State dict of a LoRA file, configuration of its adapter, and its student."""
        options = ("weight_name", "subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token")
        fetch_options = {name: kwargs.pop(name, None) for name in options}
        if kwargs:
            raise ValueError(f"Unknown arguments {sorted(kwargs)}; known ones are {list(options)}.")
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            if os.path.isfile(source):
                source, fetch_options["weight_name"] = os.path.split(os.path.abspath(source))
                fetch_options["subfolder"] = None
            elif fetch_options["weight_name"] is None:
                fetch_options["weight_name"] = choose_lora_file(source, fetch_options)
            path = Path(source, fetch_options["subfolder"] or "", fetch_options["weight_name"])
            if os.path.isdir(source):
                check_file(path)
        try:
            state_dict, metadata, file_metadata = _fetch_state_dict(
                source,
                use_safetensors=True,
                proxies=None,
                user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
                allow_pickle=False,
                return_file_metadata=True,
                **fetch_options,
            )
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from error
        return state_dict, metadata, read_student(file_metadata)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name=None,
        hotswap=False,
        low_cpu_mem_usage=True,
        **kwargs,
    ):
        """Load a LoRA adapter into the UNet. One that makes the UNet a student, as its file says, also sets the
        student's scheduler, and the steps and the guidance that a call takes by default.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): see `lora_state_dict`, which also
                gets `kwargs`. A passed dict is not changed.
            adapter_name (`str`, *optional*): name to call the adapter by, `default_{i}` if not given.
            hotswap (`bool`, *optional*, defaults to `False`): replace the weights of the loaded adapter
                `adapter_name` in place, without recompiling a compiled UNet.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `True`): do not initialise weights that get loaded.

        Raises:
            ValueError: if the file is not a LoRA of this UNet, or not a whole one, or a student for a UNet that is
                one itself. The UNet is as it was.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            pretrained_model_name_or_path_or_dict = dict(pretrained_model_name_or_path_or_dict)
        state_dict, metadata, student = self._fetch_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        self._check_lora(state_dict, metadata, student)
        with self._following_student():
            names = set(getattr(self.unet, "peft_config", None) or {})
            if not names:  # peft freezes them
                self.unet._with_gradients = [each for each in self.unet.parameters() if each.requires_grad]
            self.load_lora_into_unet(
                state_dict,
                self.unet,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )
            (name,) = [adapter_name] if adapter_name else self.unet.peft_config.keys() - names
            setattr(self.unet.peft_config[name], STUDENT_KEY, student)  # there as long as the adapter is

    def merge_lora_weights(self, pretrained_model_name_or_path_or_dict, lora_scale=1.0, **kwargs):
        """Add a LoRA's weights, times `lora_scale`, to those of the UNet for good, as `load_lora_weights`, `fuse_lora`
        and `unload_lora_weights` do one after the other, but without peft. A UNet that becomes a student by it is
        registered as one.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): see `lora_state_dict`, which also
                gets `kwargs`.
            lora_scale (`float`, *optional*, defaults to 1.0)

        Raises:
            ValueError: as `load_lora_weights`, or if the file or the UNet is of a kind that only peft can merge. The
                UNet is as it was.
        """
        state_dict, metadata, student = self._fetch_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        self._check_lora(state_dict, metadata, student)
        merge_lora(state_dict, metadata, self.unet, self.unet_name, lora_scale)
        if student is not None:
            self.register_student(student)

    def _check_lora(self, state_dict, metadata, student):
        """Check that a LoRA file is one for the UNet."""
        strangers = [key for key in state_dict if "lora" not in key or not key.startswith(f"{self.unet_name}.")]
        if strangers or not state_dict:
            raise ValueError(
                f"Not a LoRA file for the UNet: every key has to start with '{self.unet_name}.' and contain 'lora', "
                f"but {f'{len(strangers)} do not, such as {strangers[0]!r}' if strangers else 'there is none'}."
            )
        check_lora(state_dict, metadata, self.unet, self.unet_name)
        if student is not None:
            check_guidance_input(student, self.unet, self.config.default_guidance_scale)
            if self.config.get(STUDENT_KEY) is not None:
                raise ValueError("The UNet is a student already: load a LoRA that makes one into its teacher.")

    @contextlib.contextmanager
    def _following_student(self):
        """Context that changes adapters, after which the scheduler is one for the UNet."""
        before, fused = self.student, student_adapters(self.unet, fused_only=True)
        yield
        for name, student in fused.items():
            if name not in (getattr(self.unet, "peft_config", None) or {}):  # its weights are the UNet's now
                self.register_to_config(**{STUDENT_KEY: student})
        after = self.student
        if (after is None or after != before) and hasattr(self.scheduler, "_before_student"):
            self.scheduler = self.scheduler._before_student
        if after not in (None, before):
            self._take_student_scheduler(after)

    def _take_student_scheduler(self, student):
        scheduler = student_scheduler(student, self.scheduler)
        scheduler._before_student = self.scheduler
        self.scheduler = scheduler

    def unload_lora_weights(self):
        """Remove all adapters (see `LoraBaseMixin.unload_lora_weights`). A UNet that was never fused computes to the
        bit what it did before."""
        with self._following_student():
            super().unload_lora_weights()
        if hasattr(self.unet, "_with_gradients"):
            for parameter in self.unet._with_gradients:
                parameter.requires_grad_()  # which decides how torch multiplies, without gradients too
            self.unet._with_gradients = []

    def delete_adapters(self, adapter_names):
        """Remove some adapters (see `LoraBaseMixin.delete_adapters`)."""
        with self._following_student():
            super().delete_adapters(adapter_names)

    def set_adapters(self, adapter_names, adapter_weights=None):
        """Say which adapters are active, and their weights (see `LoraBaseMixin.set_adapters`)."""
        with self._following_student():
            super().set_adapters(adapter_names, adapter_weights)

    def disable_lora(self):
        """Compute without the adapters until `enable_lora` (see `LoraBaseMixin.disable_lora`)."""
        with self._following_student():
            super().disable_lora()

    def enable_lora(self):
        """Undo `disable_lora`."""
        with self._following_student():
            super().enable_lora()

    @classmethod
    def load_lora_into_unet(
        cls,
        state_dict,
        unet,
        adapter_name=None,
        metadata=None,
        _pipeline=None,
        low_cpu_mem_usage=True,
        hotswap=False,
    ):
        """Load the keys of `state_dict` that start with `unet.` into `unet` (`UNet2DConditionModel`)."""
        unet.load_lora_adapter(
            state_dict,
            prefix=cls.unet_name,
            network_alphas=None,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=_pipeline,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

    @classmethod
    def save_lora_weights(
        cls,
        save_directory,
        unet_lora_layers=None,
        is_main_process=True,
        weight_name=None,
        save_function=None,
        safe_serialization=True,
        unet_lora_adapter_metadata=None,
        student=None,
    ):
        """Save the LoRA layers of the UNet in the format that `load_lora_weights` reads.

        Args:
            save_directory (`str` or `os.PathLike`): folder, created if missing.
            unet_lora_layers (`dict[str, torch.Tensor]` or `torch.nn.Module`): for example
                `peft.utils.get_peft_model_state_dict(unet)`.
            is_main_process (`bool`, *optional*, defaults to `True`): `False` on the other processes of a
                distributed run; they write nothing.
            weight_name (`str`, *optional*): file name, `pytorch_lora_weights.safetensors` if not given.
            save_function (`Callable`, *optional*): replaces the safetensors writer.
            safe_serialization (`bool`, *optional*, defaults to `True`): `False` writes a pickle.
            unet_lora_adapter_metadata (`dict`, *optional*): configuration of the adapter (rank, alpha, targets),
                for example `unet.peft_config["default"].to_dict()`.
            student (`dict`, *optional*): what [`check_student`] describes, if the layers make the UNet a student.

        Raises:
            ValueError: if `unet_lora_layers` is empty, or if `student` is none or cannot be saved.
        """
        if not unet_lora_layers:
            raise ValueError("`unet_lora_layers` is empty: there is nothing to save.")
        if student is not None:
            if save_function is not None or not safe_serialization:
                raise ValueError(
                    "`student` is saved in the metadata of a safetensors file: leave out `save_function` and "
                    "`safe_serialization`."
                )
            metadata = {"format": "pt", STUDENT_KEY: json.dumps(check_student(student), sort_keys=True)}
            if unet_lora_adapter_metadata:
                options = {
                    f"{cls.unet_name}.{name}": sorted(value) if isinstance(value, set) else value
                    for name, value in unet_lora_adapter_metadata.items()
                }
                metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(options, indent=2, sort_keys=True)

            def save_function(weights, path):
                save_file(weights, path, metadata=metadata)

        if not is_main_process:
            return
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.unet_name: unet_lora_layers},
            lora_metadata={cls.unet_name: None if student is not None else unet_lora_adapter_metadata},
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(self, components=("unet",), lora_scale=1.0, safe_fusing=False, adapter_names=None):
        """Add the adapters' weights, times `lora_scale`, to the UNet's own (see `LoraBaseMixin.fuse_lora`)."""
        super().fuse_lora(list(components), lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)

    def unfuse_lora(self, components=("unet",)):
        """Undo `fuse_lora`."""
        super().unfuse_lora(list(components))


def choose_lora_file(folder_or_repo, options):
    """Name of the file with LoRA weights, relative to `subfolder`. A repo is looked up in the cache where there is no
    network.

    Args:
        folder_or_repo (`str` or `os.PathLike`): folder or Hub repo.
        options (`dict`): `subfolder`, `revision`, `cache_dir`, `local_files_only` and `token`.

    Raises:
        ValueError: if there is none, or if there are several that trainers do not write at the end.
    """
    subfolder = (options["subfolder"] or "").strip("/")
    if os.path.isdir(folder_or_repo):
        names = os.listdir(os.path.join(folder_or_repo, subfolder))
    else:
        names = repo_files(folder_or_repo, options)
        names = [name.removeprefix(f"{subfolder}/") for name in names if name.startswith(subfolder)]
    for suffix in (".safetensors", ".bin"):
        found = sorted(name for name in names if name.endswith(suffix))
        final = [name for name in found if not any(part in name for part in NOT_LORA)]
        final = [name for name in final if name.endswith(f"pytorch_lora_weights{suffix}")] or final
        if len(final) > 1:
            lora_logger.warning(
                f"{folder_or_repo} has several LoRA files: {final[0]} is loaded, `weight_name` says which."
            )
        if final or len(found) == 1:
            return (final or found)[0]
        if found:
            raise ValueError(f"{folder_or_repo} has several LoRA files: `weight_name` must be one of {found}.")
    raise ValueError(f"{folder_or_repo} has no LoRA weights: no .safetensors or .bin file among {sorted(names)[:10]}.")


def repo_files(repo, options):
    """Names of the files of a Hub repo, or of those in the cache where there is no network."""
    if not (options["local_files_only"] or constants.HF_HUB_OFFLINE):
        try:
            info = model_info(str(repo), revision=options["revision"], token=options["token"])
            return [sibling.rfilename for sibling in info.siblings]
        except (HfHubHTTPError, ValueError):  # an answer of the Hub, or no name of a repo
            raise
        except Exception as error:  # whatever the HTTP library raises without a network
            lora_logger.warning(f"The Hub cannot be reached, looking for {repo} in the cache: {error}")
    folder = Path(
        snapshot_download(
            str(repo), revision=options["revision"], cache_dir=options["cache_dir"], local_files_only=True
        )
    )
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def tensors_of_lora(state_dict, prefix):
    """The tensors of a LoRA by peft's names, from any format that diffusers reads."""
    tensors = {name.removeprefix(f"{prefix}."): tensor for name, tensor in state_dict.items()}
    return tensors if "lora_A" in next(iter(tensors)) else convert_unet_state_dict_to_peft(tensors)


def merge_lora(state_dict, metadata, unet, prefix, lora_scale=1.0):
    """Add the products of a LoRA's matrices, in float32, to the weights of a UNet. Arguments as of [`check_lora`],
    which they have passed.

    Raises:
        ValueError: if the adapter has more than these products, or the UNet has adapters or quantised weights.
    """
    unet = getattr(unet, "_orig_mod", unet)  # inside `torch.compile`
    tensors = tensors_of_lora(state_dict, prefix)
    options = {name.removeprefix(f"{prefix}."): value for name, value in (metadata or {}).items()}
    others = sorted({name.split(".lora_")[1] for name in tensors} - {"A.weight", "B.weight"})
    others += [name for name in ("use_rslora", "use_dora") if options.get(name)]
    if others:
        raise ValueError(f"A LoRA with {others} cannot be merged without peft: load it, then call `fuse_lora()`.")
    if getattr(unet, "peft_config", None):
        raise ValueError(
            "The UNet has adapters, into which no LoRA can be merged: call `unload_lora_weights()` before."
        )
    if getattr(unet, "hf_quantizer", None) is not None:
        raise ValueError("The UNet is quantised, and no LoRA can be merged into it: load the LoRA instead.")
    patterns = options.get("alpha_pattern") or {}
    with torch.no_grad():
        for name in sorted({name.split(".lora_")[0] for name in tensors}):
            down, up = (tensors[f"{name}.lora_{each}.weight"].float() for each in "AB")
            alpha = next((patterns[key] for key in patterns if re.fullmatch(rf"(.*\.)?({key})", name)), None)
            alpha = options.get("lora_alpha", len(down)) if alpha is None else alpha
            weight = unet.get_submodule(name).weight
            product = (up.flatten(1) @ down.flatten(1)).view(weight.shape)  # (out, in) or (out, in, kernel, kernel)
            weight.copy_(weight.float() + lora_scale * alpha / len(down) * product.to(weight.device))


def check_lora(state_dict, metadata, unet, prefix):
    """Check that a LoRA belongs to a UNet and is whole.

    Args:
        state_dict (`dict`): the tensors, in any format that [`UNet2DConditionModel.load_lora_adapter`] reads.
        metadata (`dict`, *optional*): the adapter's configuration.
        unet ([`UNet2DConditionModel`]): is not changed.
        prefix (`str`): that all names have.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    unet = getattr(unet, "_orig_mod", unet)  # inside `torch.compile`
    tensors = tensors_of_lora(state_dict, prefix)
    pattern = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?)")
    unknown = [name for name in tensors if not pattern.fullmatch(name)]
    modules = {match[1]: None for match in map(pattern.fullmatch, tensors) if match}
    layers = dict(unet.named_modules())
    strangers = [name for name in modules if name not in layers]
    missing, wrong, ranks = [], [], set()
    for name in modules.keys() - set(strangers):
        down, up = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if down is None or up is None:
            missing.append(f"{name}.{'lora_A' if down is None else 'lora_B'}.weight")
            continue
        layer = getattr(layers[name], "base_layer", layers[name])
        sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        if hasattr(layer, "kernel_size"):
            sizes = layer.in_channels // layer.groups, layer.out_channels
        if (down.shape[1:2], up.shape[:1]) != ((sizes[0],), (sizes[1],)) or up.shape[1:2] != down.shape[:1]:
            wrong.append(f"{name} {tuple(down.shape)} and {tuple(up.shape)} for a layer of {sizes[0]} to {sizes[1]}")
        elif hasattr(layer, "kernel_size") and tuple(down.shape[2:]) != tuple(layer.kernel_size):
            wrong.append(f"{name} {tuple(down.shape)} for a kernel of {tuple(layer.kernel_size)}")
        else:
            ranks.add(down.shape[0])
    problems = {
        "names of an unknown kind": unknown,
        "layers that the UNet does not have": strangers,
        "missing": missing,
        "of a wrong shape": wrong,
    }
    problems = [f"{problem}: {listed(sorted(names))}" for problem, names in problems.items() if names]
    if problems:
        raise ValueError(f"Not a LoRA file for this UNet, or not a whole one; {'; '.join(problems)}.")
    metadata = {name.removeprefix(f"{prefix}."): value for name, value in (metadata or {}).items()}
    known = {metadata.get("r"), *(metadata.get("rank_pattern") or {}).values()}
    if "r" in metadata and not ranks <= known:
        raise ValueError(f"The LoRA file is of rank {sorted(ranks)}, but its metadata says {sorted(known)}.")
