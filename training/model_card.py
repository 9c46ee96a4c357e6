"""Model cards of what a training run makes."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .run import numbered


def base_model(name_or_path):
    """What the card's metadata say of the model that training started from: nothing if it is a local folder, whose
    path means nothing elsewhere."""
    return {"base_model": name_or_path} if name_or_path and not Path(name_or_path).exists() else {}


def write_card(folder, args, metadata, about, code, figures, more=""):
    """`README.md` of a result: what it is, how it is loaded, figures, and the flags it was trained with.

    Args:
        args (`argparse.Namespace`): all flags of the run; its output folder gives the title.
        metadata (`dict`): arguments of `ModelCardData`.
        about (`str`): one paragraph.
        code (`str`): Python that loads the result.
        figures (`dict`): numbers by what they are.
        more (`str`, *optional*): sections between figures and flags.
    """
    lines = "\n".join(f"- {name}: {value}" for name, value in figures.items())
    flags = "\n".join(f"    --{name} {value}" for name, value in sorted(vars(args).items()) if value not in (None, []))
    text = (
        f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n# {Path(args.output_dir).resolve().name}\n\n{about}\n\n"
        f"```python\n{code}\n```\n\n## Figures\n\n{lines}\n\n{more}## Flags\n\n{flags}\n"
    )
    ModelCard(text).save(folder / "README.md")


def copy_sounds(samples, folder, prompts):
    """Copy the last of the sounds under `samples`, one folder for each step, into a result. Returns their section of
    the card, empty if there are none."""
    steps = [path for _, path in numbered(samples, "step") if path.is_dir()]
    if not steps:
        return ""
    shutil.copytree(steps[-1], folder / "samples")
    section = ""
    for i, prompt in enumerate(prompts, 1):
        section += f"\n[{prompt}](samples/{i}.wav)\n"
        if (folder / "samples" / f"{i}.png").exists():
            section += f"\n![spectrogram](samples/{i}.png)\n"
    return f"## Sounds\n{section}\n"
