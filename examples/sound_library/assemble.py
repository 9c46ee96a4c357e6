"""Assemble the trained components into the checkpoint of the package, in float16, with its card.

    python -m examples.sound_library.assemble --pipeline RUN/model --vae RUN/vae --vocoder RUN/model \\
        --runs RUN RUN ... --output pipeline_tango/tango_tiny

`--components RUN` takes those of `unet`, `text_encoder`, `tokenizer` and `vae` that there are in the output folder of
`train_scenes.py`. `--runs` are output folders of training scripts, in the order in which they were run: the card lists
their flags and shows their curves. `--figures` is a Markdown file with the measured figures.
"""

import argparse
import inspect
import io
import json
import shutil
from pathlib import Path

import torch

from examples.sound_library.build import read_manifest
from pipeline_tango import SCHEDULERS, TangoPipeline
from pipeline_tango.mel import NUM_MEL_BINS
from pipeline_tango.positions import count_positions
from pipeline_tango.sound_files import beside, remove_leftovers, write_atomically


HERE = Path(__file__).parent
SMOOTHING = 50  # steps per point of a curve
NOT_DRAWN = {"step", "seconds", "lr", "grad_norm", "num_clips"}  # of the values in a log
NOT_DRAWN |= {"num_recordings", "minutes", "num_categories", "num_captions"}


def credits():
    """Markdown list of the authors of the recordings, by licence."""
    rows = read_manifest()
    lines = []
    for licence in sorted({row["licence"] for row in rows}):
        of_licence = [row for row in rows if row["licence"] == licence]
        lines.append(f"\n**{licence}** ({len(of_licence)} recordings)\n")
        for package in sorted({row["source_package"] for row in of_licence}):
            authors = sorted({row["author"] for row in of_licence if row["source_package"] == package})
            kind, name = ("PyPI", package[5:]) if package.startswith("pypi:") else ("Debian", package)
            lines.append(f"- {kind} package `{name}`: {'; '.join(author or 'unnamed' for author in authors)}")
    return "\n".join(lines)


def vocabulary():
    categories = {row["category"] for row in read_manifest() if row["split"] == "train"}
    return ", ".join(sorted(category.replace("_", " ") for category in categories))


def read_run(folder):
    """Name, flags and log entries of a run of a training script."""
    flags = json.loads((folder / "args.json").read_text())
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder.name, flags, entries


def flags_of(runs):
    """Markdown of the flags of each run, with the last part of each path only."""
    blocks = []
    for name, flags, entries in runs:
        lines = []
        for flag, value in sorted(flags.items()):
            if value in (None, [], False, ""):
                continue
            value = Path(value).name if isinstance(value, str) else value
            value = " ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"    --{flag}" + ("" if value is True else f" {value}"))
        steps = max(entry["step"] for entry in entries)
        blocks.append(f"`{name}`, {steps} steps:\n\n" + "\n".join(lines))
    return "\n\n".join(blocks)


def draw_curves(runs):
    """PNG with a panel for each run: the values of its log, averaged over `SMOOTHING` steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.6 * len(runs)), layout="constrained")
    for axes, (name, _, entries) in zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs):
        for key in sorted({key for entry in entries for key in entry} - NOT_DRAWN):
            points = [(e["step"], e[key]) for e in entries if isinstance(e.get(key), (int, float))]
            if not points:
                continue
            size = 1 if len(points) < 5 * SMOOTHING else SMOOTHING  # of a validation there are few
            chunks = [points[i : i + size] for i in range(0, len(points), size)]
            axes.plot(
                [chunk[-1][0] for chunk in chunks],
                [sum(value for _, value in chunk) / len(chunk) for chunk in chunks],
                marker="o" if size == 1 else None,
                markersize=3,
                label=key.replace("_", " "),
            )
        axes.set(title=name, xlabel="step", yscale="symlog")
        axes.legend(fontsize=7, ncols=2)
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=70)
    return content.getvalue()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, required=True, help="pipeline with the trained UNet and text encoder")
    parser.add_argument("--components", type=Path, help="output folder of train_scenes.py, whose components are taken")
    parser.add_argument("--vae", type=Path, help="folder of another VAE, such as one trained with the vocoder")
    parser.add_argument("--vocoder", type=Path, help="folder of another vocoder")
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="default: that of the pipeline")
    parser.add_argument("--use_karras_sigmas", action="store_true", help="take more steps at low noise levels")
    parser.add_argument("--num_inference_steps", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--guidance_interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("START", "STOP"))
    parser.add_argument("--audio_length_in_s", type=float, default=10.24)
    parser.add_argument("--num_mel_corrections", type=int, default=0, help="corrections of the vocoder's output")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="output folders of training scripts")
    parser.add_argument("--figures", type=Path, help="Markdown file with the measured figures")
    parser.add_argument("--pictures", type=Path, nargs="*", default=[], help="PNG files that the card shows")
    parser.add_argument("--output", type=Path, required=True, help="folder, replaced if it exists")
    args = parser.parse_args(argv)

    try:
        runs = [read_run(folder) for folder in args.runs]
        figures = args.figures.read_text().strip() if args.figures else "None yet."
    except (OSError, ValueError) as error:
        parser.error(f"--runs and --figures have to exist and be complete: {error}")

    pipe = TangoPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
    changes = {}
    for name in ("unet", "text_encoder", "tokenizer", "vae") if args.components else ():
        if (args.components / name).is_dir():
            changes[name] = type(getattr(pipe, name)).from_pretrained(args.components / name)
    if args.components and not changes:
        parser.error(f"--components {args.components} has no folder unet, text_encoder, tokenizer or vae")
    if args.vae:
        changes["vae"] = type(pipe.vae).from_pretrained(args.vae)
    if "vae" in changes and changes["vae"].config.scaling_factor != pipe.vae.config.scaling_factor:
        source = f"--vae {args.vae}" if args.vae else f"--components {args.components}: vae"
        parser.error(f"{source} has another scaling factor than the VAE that the UNet was trained with")
    if args.vocoder:
        changes["vocoder"] = type(pipe.vocoder).from_pretrained(args.vocoder)
    scheduler = SCHEDULERS[args.scheduler] if args.scheduler else type(pipe.scheduler)
    options = {"use_karras_sigmas": True} if args.use_karras_sigmas else {}
    if not options.keys() <= inspect.signature(scheduler).parameters.keys():
        parser.error(f"--use_karras_sigmas: {scheduler.__name__} has no such setting; choose another --scheduler")
    changes["scheduler"] = scheduler.from_config(pipe.scheduler.config, **options)
    pipe.register_modules(**changes)
    pipe.register_to_config(
        default_audio_length_in_s=args.audio_length_in_s,
        default_num_inference_steps=args.num_inference_steps,
        default_guidance_scale=args.guidance_scale,
        default_guidance_interval=tuple(args.guidance_interval),
        num_noise_channels=pipe.vocoder.config.model_in_dim - NUM_MEL_BINS,
        num_position_channels=count_positions(pipe.unet.config, pipe.vae.config),
        num_mel_corrections=args.num_mel_corrections,
    )
    card = (HERE / "card.md").read_text()
    for name, text in {
        "vocabulary": vocabulary(),
        "num_recordings": str(sum(row["split"] == "train" for row in read_manifest())),
        "credits": credits(),
        "flags": flags_of(runs),
        "figures": figures,
        "parameters": "\n".join(
            f"| {name} | {type(module).__name__} | {sum(map(torch.Tensor.numel, module.parameters())) / 1e6:.1f} M |"
            for name, module in pipe.components.items()
            if isinstance(module, torch.nn.Module)
        ),
    }.items():
        card = card.replace("{" + name + "}", text)

    for suffix in ("partial", "earlier"):
        remove_leftovers([args.output], suffix)
    partial = beside(args.output, "partial")
    pipe.to(torch.float16).save_pretrained(partial)
    (partial / "pipeline.py").unlink()  # the package contains the code
    for path in (partial / "model_index.json", *partial.glob("*/config.json")):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # a path on the machine of the author
        path.write_text(json.dumps(config, indent=2) + "\n")
    if runs:
        write_atomically(partial / "training.png", draw_curves(runs))
    for picture in args.pictures:
        shutil.copy(picture, partial)
    write_atomically(partial / "README.md", card.encode())
    earlier = beside(args.output, "earlier")
    if args.output.exists():
        args.output.rename(earlier)
    partial.rename(args.output)
    shutil.rmtree(earlier, ignore_errors=True)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
