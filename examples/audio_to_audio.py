"""What a Tango model does with a sound that is there already, on the recordings in `examples/sounds`.

    python -m examples.audio_to_audio [fill] [vary] [continue] [long] [--model FOLDER_OR_REPO] [--output_dir out]

fill      takes one second out of the birdsong and fills it
vary      turns rain into fire, at several strengths
continue  goes on with the birdsong after its end, and begins before its start
long      two minutes of rain that becomes thunder, written window by window as they are done

Each writes WAV files and, for before and after, pictures. Needs the extra `demo`.
"""

import argparse
from pathlib import Path

import numpy as np
import soundfile
import torch

from pipeline_tango import SCHEDULERS, TANGO_TINY, TangoPipeline
from pipeline_tango.__main__ import draw_spectrogram, encode_wav


SOUNDS = Path(__file__).parent / "sounds"


def read(name, seconds):
    samples, sampling_rate = soundfile.read(SOUNDS / f"{name}.flac")
    return samples[: round(seconds * sampling_rate)], sampling_rate


def write(folder, name, audio, sampling_rate, title):
    (folder / f"{name}.wav").write_bytes(encode_wav(audio, sampling_rate))
    (folder / f"{name}.png").write_bytes(draw_spectrogram(audio, sampling_rate, title))
    print(f"{folder / name}.wav  {len(audio) / sampling_rate:g} s  {title}", flush=True)


def fill(make, folder):
    birds, rate = read("birds", 5.0)
    birds[2 * rate : 3 * rate] = 0.0
    write(folder, "fill-before", birds, rate, "birds singing, one second lost")
    audio = make("birds singing", audio=birds, audio_sampling_rate=rate, mask=[(2.0, 3.0)])
    write(folder, "fill-after", audio, 16000, "the same, the second made anew")


def vary(make, folder):
    rain, rate = read("rain", 2.56)
    write(folder, "vary-before", rain, rate, "heavy rain falling")
    for strength in (0.3, 0.5, 0.7, 0.9):
        audio = make("a fire crackling", audio=rain, audio_sampling_rate=rate, strength=strength)
        write(folder, f"vary-{strength}", audio, 16000, f"a fire crackling, strength {strength}")


def continue_(make, folder):
    birds, rate = read("birds", 2.5)
    write(folder, "continue-before", birds, rate, "birds singing")
    audio = make("birds singing", audio=birds, audio_sampling_rate=rate, audio_start_in_s=1.0, audio_length_in_s=6.0)
    write(folder, "continue-after", audio, 16000, "begun one second earlier, and gone on with for 2.5 s")


def long(make, folder):
    prompt = [(0, "heavy rain falling"), (40, "heavy rain falling"), (80, "thunder"), (120, "thunder")]
    write(folder, "long", make(prompt, audio_length_in_s=120.0), 16000, "rain that becomes thunder, jointly denoised")
    stretches = []
    for stretch in make(prompt, audio_length_in_s=120.0, window_order="sequential", stream=True):
        stretches.append(stretch[0])
        print(f"{sum(map(len, stretches)) / 16000:6.2f} s are there", flush=True)
    write(folder, "long-streamed", np.concatenate(stretches), 16000, "rain that becomes thunder, window by window")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    examples = {"fill": fill, "vary": vary, "continue": continue_, "long": long}
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE", help="fill, vary, continue, long (default: all)")
    parser.add_argument("--model", default=TANGO_TINY, help="diffusers folder or repo (default: tango-tiny)")
    parser.add_argument("--output_dir", type=Path, default=Path("out"))
    parser.add_argument("--num_inference_steps", type=int, default=25)
    args = parser.parse_args()
    if unknown := set(args.examples) - set(examples):
        parser.error(f"no example {sorted(unknown)}, there are {', '.join(examples)}")

    pipe = TangoPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(leave=False)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    def make(prompt, stream=False, **options):
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": args.num_inference_steps, "generator": generator} | options
        return pipe(prompt, stream=True, **options) if stream else pipe(prompt, **options).audios[0]

    for name in args.examples or examples:
        examples[name](make, args.output_dir)


if __name__ == "__main__":
    main()
