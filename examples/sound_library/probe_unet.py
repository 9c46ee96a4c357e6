"""Does a UNet know where in the clip it is? Linear probes of what its cross-attention reads.

    python -m examples.sound_library.probe_unet MODEL

MODEL has the folders `unet`, `tokenizer` and `text_encoder`: a checkpoint, or a run of `train_scenes`. The UNet is
given noise, at the first step of sampling, and captions of two sounds in sequence. For each layer, ridge regression on
the input of the queries says of each place whether it is in the first half of the clip. It is tested on noise and
captions that it was not fitted on. Chance is 0.5.
"""

import argparse
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from examples.sound_library.attention_loss import layer_shape
from examples.sound_library.composition import predict
from examples.sound_library.probe import draw_captions, read_text_encoder


NUM_CLIPS, NUM_FITTED = 32, 24
NUM_FRAMES, NUM_BANDS = 128, 16  # of the latents of 5.12 s
TIMESTEP = 999  # of 1000: nothing but noise
RIDGE = 1e-3  # per place that is fitted on


@torch.no_grad()
def query_inputs(unet, text_encoder, tokenizer, captions):
    """What the queries of each layer of cross-attention are computed from, by layer: `(batch, places, channels)`."""
    found, handles = {}, []
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_q"):
            layer = name.split(".transformer_blocks")[0]

            def keep(module, inputs, layer=layer):
                found[layer] = inputs[0]

            handles.append(module.register_forward_pre_hook(keep))
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    shape = len(captions), unet.config.out_channels, NUM_FRAMES, NUM_BANDS
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((len(captions),), TIMESTEP)
    try:
        predict(unet, text_encoder, noise, timesteps, inputs.input_ids, inputs.attention_mask)
    finally:
        for handle in handles:
            handle.remove()
    return found


def share_told(states, num_fitted=NUM_FITTED):
    """Share of the places of the clips after the first `num_fitted` whose half of the clip is told from `states`."""
    frames, bands = layer_shape(states.shape[1], (NUM_FRAMES, NUM_BANDS))
    halves = torch.ones(frames, dtype=torch.float64)
    halves[frames // 2 :] = -1
    halves = halves.repeat_interleave(bands).expand(len(states), -1)  # (batch, places)
    states = torch.cat([states.double(), torch.ones(*states.shape[:2], 1, dtype=torch.float64)], 2)
    fitted = states[:num_fitted].flatten(0, 1)
    ridge = RIDGE * len(fitted) * torch.eye(fitted.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(fitted.T @ fitted + ridge, fitted.T @ halves[:num_fitted].flatten())
    return float(((states[num_fitted:] @ weights > 0) == (halves[num_fitted:] > 0)).double().mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with unet, tokenizer and text_encoder")
    args = parser.parse_args(argv)
    try:
        tokenizer, text_encoder = read_text_encoder(args.model)
        unet = UNet2DConditionModel.from_pretrained(args.model / "unet", torch_dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    captions, _, _ = draw_captions(NUM_CLIPS)
    for layer, states in query_inputs(unet, text_encoder, tokenizer, captions).items():
        print(f"{layer}: first or second half told {share_told(states):.3f}")


if __name__ == "__main__":
    main()
