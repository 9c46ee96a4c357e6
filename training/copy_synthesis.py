"""What a model's VAE and vocoder alone leave of recordings: no UNet, no prompt, so the most that it can sound like.

    python -m training.copy_synthesis MANIFEST OUT [--model FOLDER_OR_REPO] [--takes 4] [--seconds 5]

writes `OUT/recordings/ID.wav`, the same through the vocoder as `OUT/vocoder/ID-TAKE.wav`, and through VAE and vocoder
as `OUT/vae/ID-TAKE.wav`, ID being the name of the recording's file; and prints the VAE's error. `training.evaluate
--generated OUT/recordings OUT/vocoder OUT/vae` then says what each stage costs. A take is another draw of the noise
that the vocoder takes its phases from. What is in OUT already is not made again. Needs the extra `train`.
"""

import argparse
import math
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pipeline_tango import TANGO_TINY, TangoPipeline, log_mel_spectrogram
from pipeline_tango.pipeline_tango import MEL_FFT_LENGTH
from pipeline_tango.sound_files import encode_wav, write_atomically

from .data import normalise, read_manifest, read_waveform


@torch.no_grad()
def copy(pipe, waveform, seeds):
    """What the vocoder makes of a recording, and what it makes of it after the VAE.

    Args:
        waveform (`torch.Tensor` of shape `(num_samples,)`): at the vocoder's rate, levelled as for training.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="recordings, listed as for training")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--model", default=TANGO_TINY, help="diffusers folder or Hub repo (default: tango-tiny)")
    parser.add_argument("--takes", type=int, default=4, help="draws of the vocoder's noise (default: 4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="at most, from the start (default: 5)")
    args = parser.parse_args(argv)
    if args.takes < 1 or not args.seconds > 0:
        parser.error("--takes has to be at least 1 and --seconds above 0")
    try:
        clips = read_manifest(args.manifest)
        pipe = TangoPipeline.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None

    sampling_rate, errors = pipe.vocoder.config.sampling_rate, []
    for name in ("recordings", "vocoder", "vae"):
        (args.output / name).mkdir(parents=True, exist_ok=True)
    for clip in tqdm(clips, desc="Copying", unit="clip"):
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
        print(f"{len(errors)} recordings; the VAE's mean absolute error of log-mel values is {error:.3f} nepers")


if __name__ == "__main__":
    main()
