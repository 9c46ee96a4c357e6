"""Write a TangoPipeline with random weights, for measurements of memory and speed without a download.

python -m examples.random_pipeline OUTPUT [--size full] [--dtype bfloat16]
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel, T5Tokenizer

from pipeline_tango import TangoPipeline


SIZES = {  # channels and layers of a Tango: `full` is the released size
    "full": {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512), "vocoder": 1024, "text": 1024, "layers": 24},
    "small": {"unet": (64, 128, 256, 256), "vae": (32, 64, 128), "vocoder": 256, "text": 256, "layers": 6},
    "tiny": {"unet": (32, 32, 64, 64), "vae": (32, 32, 32), "vocoder": 32, "text": 64, "layers": 1},
}


def random_pipeline(size):
    """A TangoPipeline of one of SIZES with random weights."""
    width = SIZES[size]
    here = Path(__file__).parent
    torch.manual_seed(0)
    unet_config = json.loads((here / "tango_unet.json").read_text())
    unet_config["block_out_channels"] = width["unet"]
    unet_config["attention_head_dim"] = [max(channels // 64, 1) for channels in width["unet"]]
    unet_config["cross_attention_dim"] = width["text"]
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16000,
            upsample_initial_channel=width["vocoder"],
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
            resblock_kernel_sizes=[3, 7, 11],
            resblock_dilation_sizes=[[1, 3, 5]] * 3,
            normalize_before=False,
        )
    )
    for module in vocoder.modules():  # with its own initialisation it is silent
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            torch.nn.init.kaiming_normal_(module.weight, a=0.1)
    return TangoPipeline(
        vae=AutoencoderKL(
            in_channels=1,
            out_channels=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=width["vae"],
            layers_per_block=2,
            latent_channels=8,
            sample_size=1024,
            scaling_factor=0.9227914214134216,
        ),
        text_encoder=T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=width["text"],
                d_kv=64,
                d_ff=width["text"] * 11 // 4,
                num_layers=width["layers"],
                num_heads=width["text"] // 64,
                feed_forward_proj="gated-gelu",
            )
        ),
        tokenizer=T5Tokenizer.from_pretrained(here.parent / "tests" / "goldens" / "tiny-a" / "original" / "tiny-t5"),
        unet=UNet2DConditionModel.from_config(unet_config),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            clip_sample=False,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        vocoder=vocoder,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="folder to write: 5.3 GB at full size in float32")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()

    torch.set_default_dtype(getattr(torch, args.dtype))
    pipe = random_pipeline(args.size)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            print(f"{name}: {sum(p.numel() for p in component.parameters()):,} parameters")
    pipe.save_pretrained(args.output)


if __name__ == "__main__":
    main()
