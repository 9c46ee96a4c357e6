"""Copy synthesis: recordings through a model's VAE and vocoder, or its vocoder alone, without UNet and prompt.

    python -m training.copy_synthesis MANIFEST OUT [--model FOLDER_OR_REPO] [--takes 4] [--seconds 5]

It bounds the quality that the model can reach. `training.evaluate --generated OUT/recordings OUT/vocoder OUT/vae`
then measures the loss of each stage.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pipeline_tango import TANGO_TINY, TangoPipeline, log_mel_spectrogram
from pipeline_tango.flags import COUNT, POSITIVE, check_numbers
from pipeline_tango.mel import MEL_FFT_LENGTH
from pipeline_tango.sound_files import encode_wav, write_atomically

from .arguments import program_name
from .data import normalise, read_manifest, read_waveform
from .evaluation.items import check_sound_reader


@torch.no_grad()
def copy(pipe, waveform, seeds):
    """Copy synthesis of a recording by the vocoder alone, and by VAE and vocoder.

    Args:
        waveform (`torch.Tensor` of shape `(num_samples,)`): at the vocoder's rate, normalised as for training.
        seeds (`list[int]`): of the vocoder's noise.

    Returns:
        Two `torch.Tensor` of shape `(len(seeds), num_samples)`, and the VAE's mean absolute error of log-mel values.
    """
    size = pipe.hop_length * pipe.vae_scale_factor
    num_samples = max(math.ceil(len(waveform) / size), math.ceil(MEL_FFT_LENGTH / size)) * size
    mel = log_mel_spectrogram(torch.nn.functional.pad(waveform, (0, num_samples - len(waveform)))[None])[:, None]
    decoded = pipe.vae.decode(pipe.vae.encode(mel).latent_dist.mode()).sample
    shape = (*mel.shape[:3], pipe.config.num_noise_channels)
    noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    made = [
        pipe.mel_spectrogram_to_waveform(each.expand(len(seeds), -1, -1, -1), noise)[:, : len(waveform)]
        for each in (mel, decoded)
    ]
    return *made, float((decoded - mel).abs().mean())


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog=program_name(__spec__.name),
        description="Copy synthesis: write recordings as OUT/recordings/ID.wav, through the vocoder as "
        "OUT/vocoder/ID-TAKE.wav, and through VAE and vocoder as OUT/vae/ID-TAKE.wav, ID being the name of the "
        "recording's file; and print the VAE's mean absolute error. Takes differ in the noise input of the vocoder. "
        "Recordings that are in OUT already are skipped.",
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="recordings, listed as for training")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--model",
        default=TANGO_TINY,
        metavar="FOLDER_OR_REPO",
        help="diffusers folder or Hub repo (default: tango-tiny)",
    )
    parser.add_argument(
        "--takes", type=COUNT, default=4, metavar="N", help="takes per recording, each with other noise (default: 4)"
    )
    parser.add_argument(
        "--seconds", type=POSITIVE, default=5.0, metavar="S", help="maximum length, from the start (default: 5)"
    )
    args = parser.parse_args(argv)
    check_numbers(parser, args)
    try:
        check_sound_reader()
        clips = read_manifest(args.manifest)
        pipe = TangoPipeline.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None

    sampling_rate, errors = pipe.vocoder.config.sampling_rate, []
    for name in ("recordings", "vocoder", "vae"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
    for clip in tqdm(clips, desc="Copy synthesis", unit="clip"):
        name = Path(clip.path).stem
        last = args.output / "recordings" / f"{name}.wav"  # written after its copies
        if last.exists():
            continue
        waveform = read_waveform(clip, sampling_rate, num_samples=round(args.seconds * sampling_rate))
        waveform = normalise(waveform, len(waveform))
        *copies, error = copy(pipe, waveform, range(args.takes))
        for stage, sounds in zip(("vocoder", "vae"), copies):
            for take, sound in enumerate(sounds):
                path = args.output / stage / f"{name}-{take}.wav"
                write_atomically(path, encode_wav(sound.numpy(), sampling_rate))
        write_atomically(last, encode_wav(waveform.numpy(), sampling_rate))
        errors.append(error)
    if errors:
        error = sum(errors) / len(errors)
        sys.stdout.write(
            f"{len(errors)} recordings; the VAE's mean absolute error of log-mel values is {error:.3f} nepers\n"
        )


if __name__ == "__main__":
    main()
