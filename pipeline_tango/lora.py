"""Loading and saving of LoRA adapters of the UNet."""

from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict


class TangoLoraLoaderMixin(LoraBaseMixin):
    """Loads and saves LoRA adapters of the UNet. The rest (`set_adapters`, `unload_lora_weights`,
    `enable_lora_hotswap`, ...) is [`~loaders.lora_base.LoraBaseMixin`]'s."""

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, *, return_lora_metadata=False, **kwargs):
        """State dict of a LoRA file, and its metadata if `return_lora_metadata`.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Hub repo, folder, or state dict.
            return_lora_metadata (`bool`, *optional*, defaults to `False`): also return the adapter's configuration.
            kwargs: `weight_name`, `subfolder`, `revision`, `cache_dir`, `force_download`, `local_files_only`, `token`.
        """
        options = ("weight_name", "subfolder", "revision", "cache_dir", "force_download", "local_files_only", "token")
        fetch_options = {name: kwargs.pop(name, None) for name in options}
        if kwargs:
            raise ValueError(f"Unknown arguments {sorted(kwargs)}; known ones are {list(options)}.")
        state_dict, metadata = _fetch_state_dict(
            pretrained_model_name_or_path_or_dict,
            use_safetensors=True,
            proxies=None,
            user_agent={"file_type": "attn_procs_weights", "framework": "pytorch"},
            allow_pickle=False,
            **fetch_options,
        )
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name=None,
        hotswap=False,
        low_cpu_mem_usage=True,
        **kwargs,
    ):
        """Load a LoRA adapter into the UNet.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): see `lora_state_dict`, which also
                gets `kwargs`. Only safetensors files are read. A passed dict is not changed.
            adapter_name (`str`, *optional*): name to call the adapter by, `default_{i}` if not given.
            hotswap (`bool`, *optional*, defaults to `False`): replace the weights of the loaded adapter
                `adapter_name` in place, without recompiling a compiled UNet.
            low_cpu_mem_usage (`bool`, *optional*, defaults to `True`): do not initialise weights that get loaded.

        Raises:
            ValueError: if the file is not a LoRA of this UNet.
        """
        if isinstance(pretrained_model_name_or_path_or_dict, dict):
            pretrained_model_name_or_path_or_dict = dict(pretrained_model_name_or_path_or_dict)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        strangers = [key for key in state_dict if "lora" not in key or not key.startswith(f"{self.unet_name}.")]
        if strangers or not state_dict:
            raise ValueError(
                f"Not a LoRA file for the UNet: every key has to start with '{self.unet_name}.' and contain 'lora', "
                f"but {f'{len(strangers)} do not, such as {strangers[0]!r}' if strangers else 'there is none'}."
            )
        self.load_lora_into_unet(
            state_dict,
            self.unet,
            adapter_name=adapter_name,
            metadata=metadata,
            _pipeline=self,
            low_cpu_mem_usage=low_cpu_mem_usage,
            hotswap=hotswap,
        )

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

        Raises:
            ValueError: if `unet_lora_layers` is empty.
        """
        if not unet_lora_layers:
            raise ValueError("`unet_lora_layers` is empty: there is nothing to save.")
        if not is_main_process:
            return
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={cls.unet_name: unet_lora_layers},
            lora_metadata={cls.unet_name: unet_lora_adapter_metadata},
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
