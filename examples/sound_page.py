"""Generate sounds for twenty prompts and a page with players and spectrograms: `python -m examples.sound_page OUT`.

Open `OUT/index.html` afterwards. Sounds that exist in OUT are not generated again. Needs the extra `demo`, for the
spectrograms.
"""

import argparse
import html
import json
from pathlib import Path

from pipeline_tango.__main__ import main as tango
from pipeline_tango.sound_files import write_atomically


PROMPTS = (
    "rain and thunder",
    "heavy rain",
    "wind blowing",
    "a stream of water",
    "a fire crackling",
    "birds singing in a forest",
    "crickets at night",
    "a sheep bleating",
    "a cow mooing",
    "a horse galloping",
    "footsteps on gravel",
    "a door closing",
    "a church bell ringing",
    "a gunshot followed by an explosion",
    "glass breaking",
    "a splash in water",
    "a drum beat",
    "a car engine running",
    "a steam train passing while birds sing",
    "applause and laughter",
)
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
{generator}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }} img, audio {{ width: 100%; }} figcaption {{ font-weight: 600; }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""
GENERATOR = '<meta name="generator" content="examples.sound_page of pipeline-tango">'
FIGURE = """<figure><figcaption>{prompt}</figcaption>{image}
<audio controls preload="none" src="{name}.wav"></audio></figure>"""


def write_page(folder, title):
    """Write `index.html` for the sounds that `manifest.jsonl` of the command lists."""
    figures = []
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        name, prompt = Path(entry["file"]).stem, html.escape(entry["prompt"])
        image = f'<img src="{name}.png" alt="spectrogram of {prompt}">' if (folder / f"{name}.png").exists() else ""
        figures.append(FIGURE.format(prompt=prompt, image=image, name=name))
    page = PAGE.format(title=html.escape(title), generator=GENERATOR, figures="\n".join(figures))
    write_atomically(folder / "index.html", page.encode())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the sounds, the spectrograms and index.html")
    parser.add_argument("--prompts", type=Path, help="text file with one prompt per line, in place of the twenty")
    args, flags = parser.parse_known_args(argv)  # --model, --steps, --seed ... are passed to the command

    page, prompts = args.output / "index.html", args.prompts or args.output / "prompts.txt"
    content = "".join(f"{prompt}\n" for prompt in PROMPTS).encode()
    if page.exists() and GENERATOR not in page.read_text("utf-8", "replace"):
        parser.error(f"{page} is there already and is not one of these pages: give another folder")
    if not args.prompts and prompts.exists() and prompts.read_bytes() != content:
        parser.error(f"{prompts} holds other prompts: give another folder, or use them with --prompts")
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.prompts:
        write_atomically(prompts, content)
    status = tango(["--prompts", str(prompts), "--output", str(args.output), "--spectrogram", *flags])
    if status == 0:
        write_page(args.output, "Sounds of Tango")
        print(f"open {args.output / 'index.html'}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
