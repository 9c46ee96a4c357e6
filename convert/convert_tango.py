"""Convert an original Tango checkpoint to a diffusers folder, or back.

SOURCE is one of
  - a folder or Hub id in the layout of the released checkpoints (pytorch_model_main.bin, _vae.bin, _stft.bin),
  - a folder saved by the original's training (pytorch_model.bin, _1.bin, _2.bin; summary.jsonl there or one level up),
  - an AudioLDM .ckpt file: OUTPUT/vae and OUTPUT/vocoder are written, and nothing else,
  - with --to_original, a diffusers folder or Hub id.
Names in main_config.json are looked up in SOURCE, then among the built-in configs that the released checkpoints leave
out, then on the Hub.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from pipeline_tango.flags import POSITIVE, check_numbers
from pipeline_tango.original_hub import cached_commit, fetch_original, find_repo, license_of
from pipeline_tango.presets import SCHEDULER_NAMES

from .publish import add_card_and_code, push


# Importing torch and diffusers takes seconds: done inside functions, once the command line is known to be good.

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")


def convert_original(source, folder, args):
    """Write the diffusers folder of an original checkpoint."""
    from pipeline_tango import SCHEDULERS, TangoPipeline
    from pipeline_tango.original import STFT_CONFIG, open_original, save_pipeline

    original = open_original(source, scaling_factor=args.scaling_factor)
    scheduler_class = SCHEDULERS[args.scheduler] if args.scheduler else None
    save_pipeline(original, folder, TangoPipeline, torch_dtype(args.dtype), args.variant, scheduler_class)
    notes = [
        f"UNet and text encoder come from `{original.files['unet'].name}`, VAE and vocoder from "
        f"`{original.files['vae'].name}`.",
        "The tensors of the mel front end have been checked against their formulas. They and the tokenizer's files "
        "are kept in `original/`, for converting back only.",
    ]
    if args.dtype:
        notes.append(f"Weights were cast to {args.dtype}.")
    if original.dropped:
        names = ", ".join(f"`{name}`" for name in original.dropped)
        notes.append(f"Dropped on purpose: {names} (other names or stale buffers).")
    if original.stft_config != STFT_CONFIG:
        notes.append("The checkpoint's own mel front end differs from the released one, which the pipeline has.")
    for note in notes:
        logger.info("%s", note)
    add_card_and_code(folder, source=args.source, license=args.license or license_of(source), notes=notes)


def convert_ckpt(source, folder, args):
    """Write the VAE and the vocoder of an AudioLDM .ckpt."""
    from pipeline_tango.original import listed, open_original, save_component

    original = open_original(source, scaling_factor=args.scaling_factor)
    if dropped := original.dropped:
        logger.info("dropped on purpose, %d tensors beside VAE and vocoder: %s", len(dropped), listed(dropped))
    for component in original.configs:
        save_component(original, component, folder, torch_dtype(args.dtype), args.variant)


def torch_dtype(name):
    import torch

    return getattr(torch, name) if name else None


def convert(args):
    """Do what the command line says. OUTPUT appears, complete, as the last step, or not at all."""
    from pipeline_tango.original import is_hub_id

    source, output = Path(args.source), Path(args.output).absolute()
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"OUTPUT must not lie in SOURCE, got {output}")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"OUTPUT must be a new or empty folder, {output} holds something")
    if not source.exists():
        if not is_hub_id(args.source):
            raise ValueError(f"SOURCE must be a folder, a .ckpt file or a Hub id, {args.source} does not exist")
        logger.info("downloading %s", args.source)
        if args.to_original:
            weights = f"*.{args.variant}*.safetensors" if args.variant else "*.safetensors"
            patterns = ("*.json", "*spiece.model", "original/*", weights)
            source = Path(snapshot_download(args.source, allow_patterns=patterns))
        else:
            commit = cached_commit(args.source, None, None)
            source = fetch_original(find_repo(args.source, None, commit, local_files_only=constants.HF_HUB_OFFLINE))
    is_ckpt = source.is_file()
    if is_ckpt and (args.to_original or args.scheduler or args.push_to_hub):
        raise ValueError("a .ckpt gives no whole pipeline: no --to_original, --scheduler or --push_to_hub with it")

    parent = next(folder for folder in output.parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as temporary:
        folder = Path(temporary) / "folder"  # made with ordinary permissions, unlike the temporary one
        folder.mkdir()
        if args.to_original:
            from .to_original import convert_to_original

            convert_to_original(source, folder, torch_dtype(args.dtype), args.variant)
        elif is_ckpt:
            convert_ckpt(source, folder, args)
        else:
            convert_original(source, folder, args)
        output.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, output)
    logger.info("wrote %s", output)
    if args.push_to_hub:
        sys.stdout.write(f"{push(output, args.push_to_hub, private=args.private)}\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="tango-convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, .ckpt file or Hub id; never changed")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--to_original", action="store_true", help="write the original's layout of a diffusers folder")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep the source's type)")
    parser.add_argument(
        "--variant",
        help="weights are called diffusion_pytorch_model.VARIANT.safetensors; with --to_original: the weights to read",
    )
    group = parser.add_argument_group("to diffusers only")
    group.add_argument(
        "--scheduler",
        choices=SCHEDULER_NAMES,
        help="scheduler to save, with the checkpoint's noise schedule (default: ddpm, as the original samples)",
    )
    group.add_argument(
        "--scaling_factor",
        type=POSITIVE,
        help="of the VAE's latents (default: that of the source, else that of the AudioLDM family, 0.9228)",
    )
    group.add_argument("--license", help="licence of the weights, for the model card (default: the source card's)")
    group.add_argument("--push_to_hub", metavar="REPO", help="put the result on the Hub as well, as OWNER/NAME")
    group.add_argument("--private", action="store_true", help="make REPO a private one if it is created")
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    if args.to_original and (args.scheduler or args.scaling_factor or args.license or args.push_to_hub):
        parser.error("--to_original takes no --scheduler, --scaling_factor, --license or --push_to_hub")
    return args


def main(argv=None):
    args = parse_args(argv)
    logging.basicConfig(format="%(message)s")
    for name in (__name__, f"{__package__}.to_original", "pipeline_tango.original"):
        logging.getLogger(name).setLevel(logging.INFO)
    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        convert(args)
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    except Exception as error:  # whatever a library raises over a broken file is one line to the user
        logger.debug("where the error came from", exc_info=True)
        sys.stderr.write(f"error: {' '.join(str(error).split()) or type(error).__name__}\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, terminate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
