"""Does a text encoder tell "A then B" from "B then A"? A linear probe of its states.

    python -m examples.sound_library.probe MODEL

MODEL has the folders `tokenizer` and `text_encoder`. Ridge regression on mean, maximum and minimum of the states says
which of two sounds comes first and which two they are. It is tested on pairs of sounds that it was not fitted on, in
either order. Chance is 0.5 for the order.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import T5EncoderModel, T5Tokenizer

from examples.sound_library.build import read_manifest
from examples.sound_library.scenes import write_caption


NUM_CAPTIONS = 5000
RIDGE = 30
CATEGORIES = (  # that both editions of tango-tiny were trained on
    "airplane applause bee bell birds_ambience car car_horn cow dog drum explosion fire footsteps glass gunshot "
    "helicopter horse insects laugh machine metal rain rooster sheep siren splash thunder train water wind"
).split()


def draw_captions(num_captions, seed=0):
    """Captions of two sounds in sequence, and the indices of their categories, `(num_captions, 2)`."""
    rng = np.random.default_rng(seed)
    sounds = {category: set() for category in CATEGORIES}
    for row in read_manifest():
        if row["category"] in sounds:
            sounds[row["category"]].add(row["caption"])
    sounds = [sorted(sounds[category]) for category in CATEGORIES]
    captions, pairs = [], []
    for _ in range(num_captions):
        pair = rng.choice(len(CATEGORIES), 2, replace=False)
        named = [(str(rng.choice(sounds[each])), CATEGORIES[each], 0) for each in pair]
        captions.append(write_caption(rng, named, "sequence"))
        pairs.append(pair)
    return captions, np.array(pairs)


@torch.no_grad()
def pooled_states(tokenizer, text_encoder, captions):
    rows = []
    for start in range(0, len(captions), 250):
        inputs = tokenizer(captions[start : start + 250], padding=True, return_tensors="pt")
        states, mask = text_encoder(**inputs)[0], inputs.attention_mask[..., None]  # (batch, num_tokens, width)
        mean = (states * mask).sum(1) / mask.sum(1)
        largest, smallest = states.masked_fill(mask == 0, -1e4).amax(1), states.masked_fill(mask == 0, 1e4).amin(1)
        rows.append(torch.cat([mean, largest, smallest], 1))
    states = torch.cat(rows).double().numpy()
    return (states - states.mean(0)) / (states.std(0) + 1e-6)


def probe(states, pairs):
    """Shares of the captions of other pairs for which the order and both sounds are told, and their number."""
    chosen = np.random.default_rng(1).random((len(CATEGORIES), len(CATEGORIES))) < 0.2
    tested = chosen[pairs.min(1), pairs.max(1)]
    rows = np.arange(len(pairs))
    order = np.zeros((len(pairs), len(CATEGORIES)))
    order[rows, pairs[:, 0]], order[rows, pairs[:, 1]] = 1, -1
    inputs = np.c_[states, np.ones(len(states))]
    fitted = inputs[~tested]
    targets = np.c_[order, np.abs(order)][~tested]
    weights = np.linalg.solve(fitted.T @ fitted + RIDGE * np.eye(inputs.shape[1]), fitted.T @ targets)
    outputs, pairs = inputs[tested] @ weights, pairs[tested]
    order, named = np.split(outputs, 2, axis=1)
    rows = np.arange(len(pairs))
    told = order[rows, pairs[:, 0]] > order[rows, pairs[:, 1]]
    both = np.sort(np.argsort(-named, 1)[:, :2], 1) == np.sort(pairs, 1)
    return float(told.mean()), float(both.all(1).mean()), len(pairs)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with tokenizer and text_encoder")
    parser.add_argument("--num_captions", type=int, default=NUM_CAPTIONS, help="fitted on and tested on, together")
    args = parser.parse_args(argv)
    try:
        tokenizer = T5Tokenizer.from_pretrained(args.model / "tokenizer")
        text_encoder = T5EncoderModel.from_pretrained(args.model / "text_encoder", dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    captions, pairs = draw_captions(args.num_captions)
    order, both, number = probe(pooled_states(tokenizer, text_encoder, captions), pairs)
    print(f"of {number} captions of other pairs: order told {order:.3f}, both sounds named {both:.3f}")


if __name__ == "__main__":
    main()
