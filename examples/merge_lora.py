"""Write a pipeline whose UNet has a LoRA merged into its weights, for commands that take a model only.

    python -m examples.merge_lora MODEL LORA OUT

MODEL and LORA are folders or Hub repos. The sounds are those of MODEL with LORA loaded, up to rounding. With
`--lora_scale` above 1 they go further from MODEL in the direction in which LORA was trained.
"""

import argparse
from pathlib import Path

import torch

from pipeline_tango import TangoPipeline
from pipeline_tango.flags import Number, check_numbers


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="diffusers folder or Hub repo")
    parser.add_argument("lora", help="folder or Hub repo with LoRA weights")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--lora_scale", type=Number(float), default=1.0, help="strength of the LoRA (default: 1)")
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    if args.output.exists():
        parser.error(f"{args.output} is there already: give another folder")
    try:
        pipe = TangoPipeline.from_pretrained(args.model, dtype=torch.float32)
        pipe.load_lora_weights(args.lora)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    pipe.fuse_lora(lora_scale=args.lora_scale)
    pipe.unload_lora_weights()
    partial = args.output.with_name(f".{args.output.name}.partial")
    pipe.save_pretrained(partial)
    partial.rename(args.output)


if __name__ == "__main__":
    main()
