"""Does a text encoder tell "A then B" from "B then A"? Linear probes of its states.

    python -m examples.sound_library.probe MODEL [--wording VALID]

MODEL has the folders `tokenizer` and `text_encoder`, or the files of both. Ridge regression on mean, maximum and
minimum of the states says which of two sounds comes first and which two they are. It is tested on pairs of sounds that
it was not fitted on, in either order. Another one says of each token whether it is a word for the first sound. It is
fitted on the same captions, which are made from templates, and tested on captions that people wrote, with a word like
"then" between two parts: whether the part before has more of the first sound than the part after. Chance is 0.5 for
the order.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import T5EncoderModel, T5Tokenizer

from examples.sound_library.build import read_manifest
from examples.sound_library.scenes import sounds_of_tokens, write_caption_with_spans


NUM_CAPTIONS = 5000
RIDGE = 30
# Between two sounds in captions of people; with one of OTHER, the caption says something else
JOINING = re.compile(r",? (?:and )?(?:is |are )?(?:followed by|then|before)\b", re.IGNORECASE)
OTHER = re.compile(r"\b(?:after\w*|while|as|first|finally|again)\b", re.IGNORECASE)
CATEGORIES = (  # that both editions of tango-tiny were trained on
    "airplane applause bee bell birds_ambience car car_horn cow dog drum explosion fire footsteps glass gunshot "
    "helicopter horse insects laugh machine metal rain rooster sheep siren splash thunder train water wind"
).split()


def draw_captions(num_captions, seed=0):
    """Captions of two sounds in sequence, with the spans of their words, and the indices of their categories,
    `(num_captions, 2)`."""
    rng = np.random.default_rng(seed)
    sounds = {category: set() for category in CATEGORIES}
    for row in read_manifest():
        if row["category"] in sounds:
            sounds[row["category"]].add(row["caption"])
    sounds = [sorted(sounds[category]) for category in CATEGORIES]
    captions, spans, pairs = [], [], []
    for _ in range(num_captions):
        pair = rng.choice(len(CATEGORIES), 2, replace=False)
        named = [(str(rng.choice(sounds[each])), CATEGORIES[each], 0) for each in pair]
        caption, each = write_caption_with_spans(rng, named, "sequence")
        captions.append(caption)
        spans.append(each)
        pairs.append(pair)
    return captions, spans, np.array(pairs)


def read_wording(path):
    """Captions of people that name one thing and then another, and the spans of the two parts.

    Raises:
        ValueError: if there are none.
    """
    captions, spans = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        texts = json.loads(line).get("captions", [])
        for text in [texts] if isinstance(texts, str) else texts:
            found = list(JOINING.finditer(text))
            if len(found) == 1 and found[0].start() and not OTHER.search(text):
                captions.append(text)
                spans.append([(0, found[0].start()), (found[0].end(), len(text))])
    if not captions:
        raise ValueError(f"`wording` has to have captions that name one thing and then another; {path} has none.")
    return captions, spans


def read_text_encoder(folder):
    """Tokenizer and T5 encoder of a folder with both, or with a folder for each."""
    folders = [folder / name for name in ("tokenizer", "text_encoder")]
    folders = [each if each.is_dir() else folder for each in folders]
    tokenizer = T5Tokenizer.from_pretrained(folders[0])
    return tokenizer, T5EncoderModel.from_pretrained(folders[1], dtype=torch.float32).eval()


@torch.no_grad()
def pooled_states(tokenizer, text_encoder, captions):
    rows = []
    for start in range(0, len(captions), 250):
        inputs = tokenizer(captions[start : start + 250], padding=True, return_tensors="pt").to(text_encoder.device)
        states, mask = text_encoder(**inputs)[0], inputs.attention_mask[..., None]  # (batch, num_tokens, width)
        mean = (states * mask).sum(1) / mask.sum(1)
        largest, smallest = states.masked_fill(mask == 0, -1e4).amax(1), states.masked_fill(mask == 0, 1e4).amin(1)
        rows.append(torch.cat([mean, largest, smallest], 1))
    states = torch.cat(rows).double().cpu().numpy()
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


@torch.no_grad()
def states_of_words(tokenizer, text_encoder, captions, spans):
    """States of the tokens that are words for a sound, the sound of each, 0 or 1, and the caption of each."""
    states, sounds, numbers = [], [], []
    for start in range(0, len(captions), 250):
        chosen = slice(start, start + 250)
        inputs = tokenizer(captions[chosen], padding=True, return_tensors="pt", return_offsets_mapping=True)
        offsets = inputs.pop("offset_mapping").tolist()
        found = np.array([sounds_of_tokens(*each) for each in zip(offsets, spans[chosen], strict=True)])
        states.append(text_encoder(**inputs)[0].numpy()[found >= 0])
        sounds.append(found[found >= 0])
        numbers.append(start + np.nonzero(found >= 0)[0])
    return map(np.concatenate, (states, sounds, numbers))


def probe_words(fitted, tested):
    """Share of the captions of `tested` whose first part is told from their second, of what `states_of_words` gives of
    captions from templates and of captions of people."""
    states, sounds, _ = fitted
    inputs = np.c_[states, np.ones(len(states))].astype(np.float64)
    weights = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1]), inputs.T @ (1.0 - 2 * sounds))
    states, sounds, numbers = tested
    outputs = np.c_[states, np.ones(len(states))] @ weights
    means = [
        np.bincount(numbers[sounds == i], outputs[sounds == i]) / np.bincount(numbers[sounds == i]) for i in (0, 1)
    ]
    return float((means[0] > means[1]).mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with tokenizer and text_encoder")
    parser.add_argument("--num_captions", type=int, default=NUM_CAPTIONS, help="fitted on and tested on, together")
    parser.add_argument("--wording", type=Path, help="JSON lines with `captions` of people, such as AudioCaps'")
    args = parser.parse_args(argv)
    try:
        tokenizer, text_encoder = read_text_encoder(args.model)
        wording = read_wording(args.wording) if args.wording else None
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    captions, spans, pairs = draw_captions(args.num_captions)
    order, both, number = probe(pooled_states(tokenizer, text_encoder, captions), pairs)
    print(f"of {number} captions of other pairs: order told {order:.3f}, both sounds named {both:.3f}")
    if wording:
        fitted, tested = (states_of_words(tokenizer, text_encoder, *each) for each in ((captions, spans), wording))
        print(f"of {len(wording[0])} captions of people: order told {probe_words(fitted, tested):.3f}")


if __name__ == "__main__":
    main()
