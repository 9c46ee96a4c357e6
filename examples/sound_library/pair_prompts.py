"""Prompts that name two sounds, for preferences: to align a model on, to choose settings by, and to measure it on.

    python -m examples.sound_library.pair_prompts examples/sound_library/prompts

Writes `preferences_train.jsonl`, `preferences_develop.jsonl` and `preferences_held.jsonl`. No pair of categories is in
two lists, in either order. Two thirds of each are sequences, whose prompt tells the order (column `sequence`); the
others are heard at the same time (column `together`). Only categories that share no class of the listener make a pair.
In the two small lists all categories occur about equally often; the list to train on has all other pairs.
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from examples.sound_library.build import read_manifest
from examples.sound_library.scenes import write_caption
from pipeline_tango.sound_files import write_atomically


HERE = Path(__file__).parent
NUM_PAIRS = 72  # of the two lists that are not trained on
CATEGORIES = (  # of both editions of tango-tiny; without those whose recordings the listener mostly misses
    "airplane applause bell birds_ambience car car_horn cow dog drum explosion fire footsteps glass gunshot "
    "helicopter horse insects laugh machine metal rain rooster sheep siren splash thunder train water"
).split()


def choose_pairs(classes, num_pairs, rng):
    """Pairs of categories without a class in common, such that all categories occur about equally often; all such
    pairs where `num_pairs` is `None`."""
    pairs = [
        pair for pair in itertools.combinations(CATEGORIES, 2) if not set(classes[pair[0]]) & set(classes[pair[1]])
    ]
    left = [pairs[i] for i in rng.permutation(len(pairs))]
    counts, chosen = Counter(), []
    for _ in range(len(left) if num_pairs is None else num_pairs):
        pair = min(left, key=lambda each: (max(counts[c] for c in each), sum(counts[c] for c in each)))
        left.remove(pair)
        counts.update(pair)
        chosen.append([pair[i] for i in rng.permutation(2)])
    return chosen


def write_prompts(num_pairs=NUM_PAIRS, seed=0):
    """Lines of the three lists, by name."""
    rng = np.random.default_rng(seed)
    classes = json.loads((HERE / "classes.json").read_text())
    rows = read_manifest()
    captions = {}
    for category in CATEGORIES:
        [(captions[category], _)] = Counter(row["caption"] for row in rows if row["category"] == category).most_common(
            1
        )
    measured = choose_pairs(classes, num_pairs, rng)
    lists = {"preferences_develop": [], "preferences_held": [], "preferences_train": []}
    for number, pair in enumerate(measured):
        name = ("preferences_develop", "preferences_held")[number // 3 % 2]
        lists[name].append(write_prompt(rng, pair, captions, together=number % 3 == 2))
    rng = np.random.default_rng([seed, 1])
    others = [pair for pair in choose_pairs(classes, None, rng) if set(pair) not in map(set, measured)]
    for number, pair in enumerate(others):
        lists["preferences_train"].append(write_prompt(rng, pair, captions, together=number % 3 == 2))
    return lists


def write_prompt(rng, pair, captions, together):
    """A line for two categories, at the same time or in the order given."""
    sounds = [(captions[category], category, 0) for category in pair]
    text = write_caption(rng, sounds, "mixed" if together else "sequence")
    id = f"{pair[0]}_with_{pair[1]}" if together else f"{pair[0]}+{pair[1]}"
    return {"id": id, "caption": text, "together" if together else "sequence": pair}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write the lists into")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, lines in write_prompts().items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(args.folder / f"{name}.jsonl", content.encode())


if __name__ == "__main__":
    main()
