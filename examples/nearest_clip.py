"""Memorisation: generate each caption of a manifest and find the recording that is nearest to the result.

    python -m examples.nearest_clip MODEL data.jsonl [--takes 2] [--output_dir FOLDER]

The distance is the mean absolute difference of log-mel spectrograms over the recording's own length. It also shows
whether a model that was fine-tuned on a few clips reproduces them. Needs the extra `train`. Recordings have to be
16 kHz mono.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
from scipy.io import wavfile

from pipeline_tango import SCHEDULERS, TangoPipeline, log_mel_spectrogram


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", help="diffusers folder or Hub repo")
parser.add_argument("manifest", help="JSON lines with `location` and `captions` (a string)")
parser.add_argument("--lora", help="folder or repo of a LoRA to load")
parser.add_argument("--takes", type=int, default=2, help="sounds per caption (default: 2)")
parser.add_argument("--steps", type=int, default=25, help="DPM++ steps (default: 25)")
parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: 3)")
parser.add_argument(
    "--output_dir", help="folder for the sounds as WAV files and their log-mel spectrograms as NumPy files"
)
args = parser.parse_args()
if args.output_dir and Path(args.output_dir).exists() and any(Path(args.output_dir).iterdir()):
    parser.error(f"--output_dir has to be a new or empty folder, {args.output_dir} holds something")

pipe = TangoPipeline.from_pretrained(args.model)
if args.lora:
    pipe.load_lora_weights(args.lora)
pipe.scheduler = SCHEDULERS["dpm++"].from_config(pipe.scheduler.config)
sampling_rate = pipe.vocoder.config.sampling_rate
num_samples = round(pipe.config.default_audio_length_in_s * sampling_rate)

rows = [json.loads(line) for line in Path(args.manifest).read_text().splitlines()]
recordings = []
for row in rows:
    waveform, rate = soundfile.read(Path(args.manifest).parent / row["location"], dtype="float32", frames=num_samples)
    if rate != sampling_rate or waveform.ndim != 1:
        raise SystemExit(f"{row['location']} is not {sampling_rate} Hz mono")
    waveform = torch.from_numpy(waveform - waveform.mean())
    recordings.append(
        log_mel_spectrogram(0.5 * waveform[None] / waveform.abs().max())[0]
    )  # (num_frames, num_mel_bins)

num_right = 0
for number, row in enumerate(rows):
    latents = pipe(
        row["captions"],
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        num_waveforms_per_prompt=args.takes,
        generator=[torch.Generator().manual_seed(seed) for seed in range(args.takes)],
        output_type="latent",
    ).audios
    with torch.no_grad():
        mels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample  # (takes, 1, num_frames, num_mel_bins)
        audio = pipe.mel_spectrogram_to_waveform(mels)[:, :num_samples].numpy()
    for take, mel in enumerate(mels[:, 0]):
        distances = [float((mel[: len(each)] - each).abs().mean()) for each in recordings]
        nearest = int(np.argmin(distances))
        num_right += nearest == number
        found = rows[nearest]["captions"]
        print(
            f"{row['captions']!r} take {take + 1}: nearest is {found!r} at {distances[nearest]:.2f} "
            f"(its own recording {distances[number]:.2f}, median of all {np.median(distances):.2f})"
        )
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            wavfile.write(Path(args.output_dir) / f"{number:02d}-{take + 1}.wav", sampling_rate, audio[take])
            np.save(Path(args.output_dir) / f"{number:02d}-{take + 1}.npy", mel.numpy())
print(f"nearest to their own recording: {num_right} of {len(rows) * args.takes}")
