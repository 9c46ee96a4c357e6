"""The models that trainings of the UNet start from, what of them gets gradients, and how it is saved."""

import copy
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from safetensors.torch import load_file, save_file
from transformers import SpeechT5HifiGan, T5EncoderModel, T5Tokenizer

from pipeline_tango import TangoPipeline
from pipeline_tango.mel import NUM_MEL_BINS
from pipeline_tango.positions import count_positions, with_positions
from pipeline_tango.sound_files import write_atomically

from .run import shards_weights


logger = get_logger(__name__)


# SD 2.1's schedule, which the released checkpoints were trained with
SCHEDULER_CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


class Denoiser(torch.nn.Module):
    """What gets gradients: the UNet, and the text encoder if that trains, as one module for DDP, FSDP and DeepSpeed to
    wrap."""

    def __init__(self, unet, text_encoder=None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy_latents, timesteps, text, attention_mask, timestep_cond=None):
        """`text`: hidden states (batch, tokens, hidden), or token ids (batch, tokens) if the text encoder trains.
        `timestep_cond`: embedding of a guidance scale, for UNets that read one."""
        if self.text_encoder is not None:
            text = self.text_encoder(text, attention_mask=attention_mask)[0]
        return self.unet(
            with_positions(noisy_latents, self.unet),
            timesteps,
            text,
            timestep_cond=timestep_cond,
            encoder_attention_mask=attention_mask,
            return_dict=False,
        )[0]


class Reference:
    """The weights that a training of the UNet starts from, to be called as a `Denoiser`, without gradients.

    With LoRA they are the UNet's own, with the layers that train off. Otherwise they are a frozen copy.

    Args:
        unet ([`UNet2DConditionModel`]): the one that trains, before its first step.
        has_lora (`bool`): whether only LoRA layers of it train.
        dtype (`torch.dtype`): of the copy.
    """

    def __init__(self, unet, has_lora, dtype=torch.float32):
        self.has_lora, self.dtype = has_lora, dtype
        self.unet = unet if has_lora else copy.deepcopy(unet).requires_grad_(False).eval()
        if not has_lora and dtype != unet.dtype:
            self.unet.to(dtype)

    @torch.no_grad()
    def __call__(self, noisy_latents, timesteps, text, attention_mask):
        if not self.has_lora:
            noisy_latents, text = noisy_latents.to(self.dtype), text.to(self.dtype)
        was_training = self.unet.training
        self.unet.eval()
        with adapters_off(self.unet) if self.has_lora else nullcontext():
            model_pred = Denoiser(self.unet)(noisy_latents, timesteps, text, attention_mask)
        self.unet.train(was_training)
        return model_pred


@contextmanager
def adapters_off(unet):
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def build_pipeline(unet_config, vae, vocoder, text_encoder, seed):
    """A pipeline of pretrained parts, each from its own folder or that of a pipeline, and a UNet of random weights."""

    def load(cls, path, subfolder):
        inside = (Path(path) / subfolder).is_dir()
        return cls.from_pretrained(path, subfolder=subfolder if inside else "")

    vae, vocoder = load(AutoencoderKL, vae, "vae"), load(SpeechT5HifiGan, vocoder, "vocoder")
    torch.manual_seed(seed)  # of the random weights
    unet = UNet2DConditionModel.from_config(json.loads(Path(unet_config).read_text()))
    return TangoPipeline(
        vae=vae,
        text_encoder=load(T5EncoderModel, text_encoder, "text_encoder"),
        tokenizer=load(T5Tokenizer, text_encoder, "tokenizer"),
        unet=unet,
        scheduler=DDPMScheduler(**SCHEDULER_CONFIG),
        vocoder=vocoder,
        num_noise_channels=vocoder.config.model_in_dim - NUM_MEL_BINS,
        num_position_channels=count_positions(unet.config, vae.config),
    )


def load_pretrained(args, weight_dtype, train_text_encoder=False):
    """The pipeline that the flags name: `weight_dtype` where weights are large and stay frozen, else float32, which
    costs the VAE little and the latents nothing."""
    return TangoPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        dtype={
            "unet": weight_dtype if args.lora_rank else torch.float32,
            "text_encoder": torch.float32 if train_text_encoder else weight_dtype,
            "default": torch.float32,
        },
    )


def set_schedule(pipe, prediction_type, rescale_betas_zero_snr):
    """Change what a pipeline's scheduler says of the training: its prediction type if one is given, and whether the
    last timestep is pure noise."""
    sampler, changes = type(pipe.scheduler), {}
    if prediction_type:
        changes["prediction_type"] = prediction_type
    if rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        sampler = DDPMScheduler  # few others can
    # as arguments: `from_config` drops entries of a config that are listed there as defaults
    pipe.scheduler = sampler.from_config(pipe.scheduler.config, **changes)
    for name, value in changes.items():
        if pipe.scheduler.config.get(name) != value:
            raise ValueError(f"`--{name}`: {sampler.__name__} does not take {value!r}")


def prepare_denoiser(
    pipe, device, weight_dtype, *, lora=None, train_text_encoder=False, gradient_checkpointing=False, seed=0
):
    """The `Denoiser` of a pipeline in train mode, with gradients for what trains only. The models that a step needs
    are moved to the device.

    Args:
        weight_dtype (`torch.dtype`): of large models that stay frozen; what trains is float32.
        lora (`peft.LoraConfig`, *optional*): train these layers instead of the whole UNet, from weights by `seed`.
    """
    for frozen in (pipe.vae, pipe.vocoder, pipe.text_encoder, pipe.unet):
        frozen.requires_grad_(False)
        frozen.eval()
    pipe.vae.to(device)
    pipe.text_encoder.to(device, torch.float32 if train_text_encoder else weight_dtype)
    if lora is not None:
        pipe.unet.to(device, weight_dtype)
        torch.manual_seed(seed)
        pipe.unet.add_adapter(lora)
        cast_training_params(pipe.unet, torch.float32)
    else:
        pipe.unet.to(device).requires_grad_(True)
    if train_text_encoder:
        pipe.text_encoder.requires_grad_(True)
    if gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        if train_text_encoder:
            pipe.text_encoder.gradient_checkpointing_enable()
    return Denoiser(pipe.unet, pipe.text_encoder if train_text_encoder else None).train()


def lora_config(args):
    """The `peft.LoraConfig` that the flags ask for, or None."""
    if not args.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_targets,
        use_dora=args.use_dora,
    )


def trained_parameters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimizer(args, parameters):
    options = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    if not args.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=args.fused_adam or None, **options)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def build_lr_scheduler(args, optimizer, num_steps):
    """The schedule of the learning rate over so many optimizer steps."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def log_memory(args, accelerator, pipe, parameters):
    """Log what trains and about how much memory it takes."""
    trains_text = getattr(args, "train_text_encoder", False)
    what = "LoRA layers" if args.lora_rank else "UNet and text encoder" if trains_text else "UNet"
    num_trained = sum(parameter.numel() for parameter in parameters)
    models = (pipe.unet, pipe.text_encoder, pipe.vae)
    num_bytes = sum(each.numel() * each.element_size() for model in models for each in model.parameters())
    num_bytes += num_trained * 4 * (1.5 if args.use_8bit_adam else 3)
    logger.info(
        f"training the {what}: {num_trained:,} parameters on {accelerator.device}, {accelerator.num_processes} "
        f"process(es); weights, gradients and optimizer take about {num_bytes / 2**30:.1f} GiB, activations on top"
    )


def checkpoint_trained_weights_only(accelerator):
    """Keep frozen weights out of the checkpoints: with LoRA they would be nearly all of them."""

    def save(models, weights, folder):
        if accelerator.is_main_process:
            trained = {
                n: p.detach() for n, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad
            }
            save_file(trained, Path(folder) / "trained.safetensors")
        weights.clear()

    def load(models, folder):
        trained = load_file(Path(folder) / "trained.safetensors")
        _, unexpected = accelerator.unwrap_model(models.pop()).load_state_dict(trained, strict=False)
        if unexpected:
            raise ValueError(f"the checkpoint has other LoRA layers than the flags ask for, such as {unexpected[0]}")

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def gather_weights(accelerator, pipe, model):
    """Let every component of the pipeline have its whole weights, where FSDP or DeepSpeed split them. Collective:
    every process takes part."""
    if not shards_weights(accelerator):
        return
    gathered = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return
    for component in ("unet", "text_encoder"):
        prefix = f"{component}."
        state = {key.removeprefix(prefix): each for key, each in gathered.items() if key.startswith(prefix)}
        if state:
            getattr(pipe, component).load_state_dict(state)


def save_lora(pipe, folder, student=None):
    """The LoRA layers as a file that `load_lora_weights` reads, of a `student` if that is given."""
    from peft.utils import get_peft_model_state_dict

    config = pipe.unet.peft_config["default"].to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    TangoPipeline.save_lora_weights(
        folder, get_peft_model_state_dict(pipe.unet), unet_lora_adapter_metadata=config, student=student
    )
    sort_metadata(Path(folder) / "pytorch_lora_weights.safetensors")


def sort_metadata(path):
    """Write a safetensors file anew with its metadata in order, which the library has in another one each time."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    write_atomically(path, len(text).to_bytes(8, "little") + text + data[end:])
