"""Write a TangoPipeline of the released size with random weights, to measure memory and speed without a download.

python -m examples.random_pipeline OUTPUT [--dtype bfloat16]
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel, T5Tokenizer

from pipeline_tango import TangoPipeline


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("output", help="folder to write: 5.3 GB in float32")
parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
args = parser.parse_args()

here = Path(__file__).parent
torch.manual_seed(0)
torch.set_default_dtype(getattr(torch, args.dtype))
pipe = TangoPipeline(
    vae=AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
        latent_channels=8,
        sample_size=1024,
        scaling_factor=0.9227914214134216,
    ),
    text_encoder=T5EncoderModel(  # FLAN-T5-large
        T5Config(
            vocab_size=32128,
            d_model=1024,
            d_kv=64,
            d_ff=2816,
            num_layers=24,
            num_heads=16,
            feed_forward_proj="gated-gelu",
        )
    ),
    tokenizer=T5Tokenizer.from_pretrained(here.parent / "tests" / "goldens" / "tiny-a" / "original" / "tiny-t5"),
    unet=UNet2DConditionModel.from_config(json.loads((here / "tango_unet.json").read_text())),
    scheduler=DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
    ),
    vocoder=SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=64,
            sampling_rate=16000,
            upsample_initial_channel=1024,
            upsample_rates=[5, 4, 2, 2, 2],
            upsample_kernel_sizes=[16, 16, 8, 4, 4],
            resblock_kernel_sizes=[3, 7, 11],
            resblock_dilation_sizes=[[1, 3, 5]] * 3,
            normalize_before=False,
        )
    ),
)
for name, component in pipe.components.items():
    if isinstance(component, torch.nn.Module):
        print(f"{name}: {sum(p.numel() for p in component.parameters()):,} parameters")
pipe.save_pretrained(args.output)
