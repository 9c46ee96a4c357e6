"""Train a T5 encoder on captions to tell what each sound is and when it is heard: "A then B" is not "B then A".

    python -m examples.sound_library.train_text TEXT --output_dir OUT --seconds 600

TEXT is a folder of `training.train_tokenizer`, or OUT of another run. Captions need no sounds: a core draws ten
thousand a second. They are made from templates, so that it is known which words are for which sound. Linear layers on
the states say of every token at which place its sound is heard (`PLACES`), and which category and caption it has;
another on the mean of the states, which categories are heard at each place. Beside each caption of a sequence is the
same one with the sounds in another order. OUT gets `text_encoder` in float16, `tokenizer`, `args.json` and
`log.jsonl`, which has what `probe.py` tells of captions in sequence.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from examples.sound_library.build import read_manifest
from examples.sound_library.probe import draw_captions, pooled_states, probe, read_text_encoder
from examples.sound_library.scenes import draw_names, draw_template, fill_template, sounds_of_tokens
from pipeline_tango.sound_files import write_atomically


MAX_TOKENS = 40
PLACES = ("first", "between", "last", "throughout")  # of a sound in a scene
PLACES_OF = {  # of the sounds of a scene, by relation; of all others: throughout
    "sequence": (0, 2),
    "sequence of three": (0, 1, 2),
    "sequence over background": (0, 2, 3),
}
RELATION_SHARES = {
    "single": 0.35,
    "mixed": 0.08,
    "background": 0.07,
    "sequence": 0.32,
    "sequence of three": 0.09,
    "sequence over background": 0.09,
}
TURNED = {"sequence of three": (2, 1, 0), "sequence over background": (1, 0, 2)}  # other orders than "B then A"
NUM_DRAWN = 16  # batches of captions that are drawn together, and sorted by length
PLACE_SIZE = 0.5  # root mean square of what is added to states for a place
IGNORED = -100  # label without a loss, which is what torch takes for one


class Sound(NamedTuple):
    """The words for a sound in a caption, and the indices of what it is and when."""

    start: int
    end: int
    place: int
    category: int
    caption: int


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text_encoder", type=Path, help="folder of training.train_tokenizer, or OUT of another run or of train_scenes"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, default=600, help="time limit")
    parser.add_argument("--max_steps", type=int, help="number of steps, by which the learning rate falls, not by time")
    parser.add_argument("--batch_size", type=int, default=32, help="captions of a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the text encoder")
    parser.add_argument(
        "--keep_weight",
        type=float,
        default=0.0,
        help="weight of the squared distance to the states that the words for each sound had alone at the start, "
        "which a trained UNet knows, plus a direction for the place; of joining words, to the empty prompt's end",
    )
    parser.add_argument("--save_every", type=float, default=60, help="seconds between two times of probing and saving")
    parser.add_argument("--num_probed", type=int, default=3000, help="captions of the probe")
    parser.add_argument("--seed", type=int, default=25, help="of the captions and of the layers that are thrown away")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_probed < 1 or (args.max_steps is not None and args.max_steps < 1):
        parser.error("--batch_size, --num_probed and --max_steps have to be at least 1")
    if args.seconds <= 0 or args.keep_weight < 0:
        parser.error("--seconds has to be more than 0, and --keep_weight at least 0")
    if not args.text_encoder.is_dir():
        parser.error(f"`text_encoder` has to be a folder, not {args.text_encoder}")
    return args


class Log:
    """Prints figures and appends them to `log.jsonl`, each with its step and the time since the start."""

    def __init__(self, folder, step=0, seconds=0.0, mode="w"):
        self.started, self.step = time.monotonic() - seconds, step
        self.file = open(folder / "log.jsonl", mode)

    def seconds(self):
        return time.monotonic() - self.started

    def __call__(self, **figures):
        line = json.dumps({"step": self.step, "seconds": round(self.seconds(), 1), **figures})
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def open_log(args, **progress):
    """Write the flags of a command to `args.json` in its `output_dir`. Returns the `Log` there."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    write_atomically(args.output_dir / "args.json", json.dumps(flags, indent=2).encode())
    return Log(args.output_dir, **progress)


def save(model, folder):
    """Write a copy of the model in float16, in place of the folder."""
    partial = folder.with_name(f".{folder.name}.part")
    copy.deepcopy(model).cpu().half().save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def decay(progress):
    """Factor of the learning rate: a half cosine from 1 to 0.02."""
    return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1)))


# Captions


class Library:
    """The names of all sounds: categories, and the captions of the recordings of each."""

    def __init__(self, rows):
        captions = {}
        for row in rows:
            captions.setdefault(row["category"], set()).add(row["caption"])
        self.categories = sorted(captions)
        self.captions = sorted(set().union(*captions.values()))
        self.captions_of = [sorted(captions[category]) for category in self.categories]

    def draw_caption(self, rng):
        """The same caption in all the orders of its sounds that are taught: `list[tuple[str, list[Sound]]]`."""
        relations = list(RELATION_SHARES)
        relation = relations[int(rng.choice(len(relations), p=list(RELATION_SHARES.values())))]
        places = PLACES_OF.get(relation, (3,) if relation == "single" else (3, 3))
        categories = rng.choice(len(self.categories), len(places), replace=False)
        captions = [self.captions_of[i][int(rng.integers(len(self.captions_of[i])))] for i in categories]
        sounds = [
            (caption, self.categories[i], int(rng.integers(6)))
            for i, caption in zip(categories, captions, strict=True)
        ]
        names = [draw_names(rng, sound) for sound in sounds]
        template, capital = draw_template(rng, relation, names)
        orders = [tuple(range(len(places)))]
        if relation.startswith("sequence"):
            orders.append(TURNED.get(relation, (1, 0)))
        drawn = []
        for order in orders:
            text, spans = fill_template(template, [names[i] for i in order], capital)
            known = [(int(categories[i]), self.captions.index(captions[i])) for i in order]
            drawn.append((text, [Sound(*s, p, *k) for s, p, k in zip(spans, places, known, strict=True)]))
        return drawn


def as_arrays(tokenizer, drawn, alone=False):
    """A batch of captions.

    Returns:
        `dict`: `ids` and `mask` `(batch, num_tokens)`; `tokens` `(batch, num_tokens, 3)`, of each token 1 + place, or
        0 for words that join, category and caption; `heard` `(batch, 4, 2)`, of each place 1 + category of the first
        and of the last sound, or 0 where nothing is heard; with `alone` what `words_alone` gives.
    """
    texts = [text for text, _ in drawn]
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_offsets_mapping=True)
    ids, mask = (np.array(inputs[name], np.int64) for name in ("input_ids", "attention_mask"))
    tokens = np.full((*ids.shape, 3), IGNORED)
    tokens[..., 0][mask > 0] = 0
    heard = np.zeros((len(drawn), len(PLACES), 2), np.int64)
    of_tokens = [sounds_of_tokens(*each) for each in zip(inputs["offset_mapping"], [sounds for _, sounds in drawn])]
    for row, (_, sounds) in enumerate(drawn):
        for token, sound in enumerate(of_tokens[row]):
            if sound >= 0:
                _, _, place, *known = sounds[sound]
                tokens[row, token] = (1 + place, *known)
        for sound in sounds:
            heard[row, sound.place, 1] = 1 + sound.category
            if not heard[row, sound.place, 0]:
                heard[row, sound.place, 0] = 1 + sound.category
    arrays = {"ids": ids, "mask": mask, "tokens": tokens, "heard": heard}
    return arrays | (words_alone(tokenizer, drawn, ids, mask, of_tokens) if alone else {})


def words_alone(tokenizer, drawn, ids, mask, of_tokens):
    """The words for each sound of a batch of captions by themselves.

    Args:
        of_tokens (`list[list[int]]`): for each token of each caption the sound that it is a word for, or -1.

    Returns:
        `dict`: `alone_ids` and `alone_mask` `(num_sounds, num_tokens)`; `same` `(4, num_same)`, row and column of the
        tokens for sounds, and row and column in `alone_ids` of the same ones; `joining` `(2, num_joining)`, row and
        column of the tokens for none, where a caption has several sounds.
    """
    texts = [text[sound.start : sound.end] for text, sounds in drawn for sound in sounds]
    alone = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    same, owners = [], [(row, sound) for row, (_, sounds) in enumerate(drawn) for sound in range(len(sounds))]
    for number, (row, sound) in enumerate(owners):
        columns = np.flatnonzero(np.array(of_tokens[row]) == sound)
        if len(drawn[row][1]) == 1 and mask[row].sum() == len(columns) + 1:
            columns = np.append(columns, columns[-1] + 1)  # the end of the text, too
        if np.array_equal(ids[row, columns], alone["input_ids"][number, : len(columns)]):
            same += [(row, column, number, i) for i, column in enumerate(columns)]
    same = np.array(same, np.int64).reshape(-1, 4).T
    several = np.array([len(sounds) > 1 for _, sounds in drawn])
    joining = np.stack(np.nonzero((np.array(of_tokens) < 0) & (mask > 0) & several[:, None]))
    return {"alone_ids": alone["input_ids"], "alone_mask": alone["attention_mask"], "same": same, "joining": joining}


def draw_batches(library, tokenizer, batch_size, seed, alone=False):
    """Batches without end, each of captions of similar length."""
    rng = np.random.default_rng(seed)
    while True:
        groups, number = [], 0
        while number < NUM_DRAWN * batch_size:
            groups.append(library.draw_caption(rng))
            number += len(groups[-1])
        # orders of the same caption have the same length, and stay together
        keys = [len(group[0][0]) + rng.random() for group in groups]
        drawn = [each for i in np.argsort(keys) for each in groups[i]]
        parts = [drawn[i : i + batch_size] for i in range(0, len(drawn), batch_size)]
        for i in rng.permutation(len(parts)):
            yield as_arrays(tokenizer, parts[i], alone)


# Losses


class Heads(torch.nn.Module):
    """Logits from the states of the text encoder, by linear layers: of each token, and of the mean of all."""

    def __init__(self, width, num_categories, num_captions):
        super().__init__()
        self.sizes = [1 + len(PLACES), num_categories, num_captions]
        self.of_token = torch.nn.Linear(width, sum(self.sizes))
        self.of_mean = torch.nn.Linear(width, len(PLACES) * (1 + num_categories))

    def forward(self, states, mask):
        """`(place, category, caption)` of the tokens that are not padding, each `(num_tokens, number)`, and the
        categories at each place, `(batch, 1 + num_categories, 4)`; of places and of these the first class is none."""
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        of_token = self.of_token(states[mask > 0]).split(self.sizes, 1)
        return of_token, self.of_mean(mean).unflatten(1, (len(PLACES), -1)).transpose(1, 2)


def text_losses(heads, states, batch):
    """Cross entropies in nats: `place`, `category` and `caption`, means over the tokens that have one, and `heard`,
    summed over places."""
    of_token, of_mean = heads(states, batch["mask"])
    labels = batch["tokens"][batch["mask"] > 0]
    losses = {}
    for i, (name, logits) in enumerate(zip(("place", "category", "caption"), of_token, strict=True)):
        losses[name] = F.cross_entropy(logits, labels[:, i], ignore_index=IGNORED)
    heard = [F.cross_entropy(of_mean, batch["heard"][..., i], reduction="none") for i in (0, 1)]
    return losses | {"heard": sum(heard).sum(1).mean() / 2}


def directions_of_places(width):
    """What the states of words have more for each place, `(4, width)`: nothing where a sound goes on throughout."""
    directions = torch.randn(width, len(PLACES) - 1, generator=torch.Generator().manual_seed(0))
    directions = torch.linalg.qr(directions)[0].T * PLACE_SIZE * width**0.5
    return torch.cat([directions, torch.zeros(1, width)])


def distance_to_kept(states, kept, nothing, directions, batch):
    """Mean squared difference of the states of words for sounds to those they have alone, plus the place's direction,
    and of the words that join them, and of the end of the text, to one that tells of no sound: a UNet that looks at
    these is to hear of none, or it could not tell one moment from another.

    Args:
        kept (`torch.Tensor` of shape `(num_sounds, num_tokens, width)`): the states of the words for each sound alone.
        nothing (`torch.Tensor` of shape `(width,)`): the state of the end of the empty prompt.
    """
    row, column, sound, position = batch["same"]
    places = batch["tokens"][row, column, 0] - 1  # of the end of a text, which has no place: that of throughout, -1
    of_sounds = states[row, column] - kept[sound, position] - directions[places]
    return torch.cat([of_sounds, states[tuple(batch["joining"])] - nothing]).square().mean()


@torch.no_grad()
def look_to_both_sides(text_encoder, strength=3.0):
    """Let the first half of the attention heads look at earlier tokens and the others at later ones, where they do not
    tell sides yet.

    What is before a token and what is after it are the same to a new T5 encoder, whose bias by relative position is
    near zero.
    """
    (bias,) = (p for name, p in text_encoder.named_parameters() if "relative_attention_bias" in name)
    later, heads = len(bias) // 2, bias.shape[1] // 2  # (num_buckets, num_heads); tokens after have the second half
    if (bias[1:later].mean(0) - bias[later + 1 :].mean(0)).abs().max() < strength / 2:
        bias[later:, :heads] -= strength
        bias[1:later, heads:] -= strength


def train(text_encoder, tokenizer, library, args, log):
    """Train the text encoder, and save it every now and then.

    There is no dropout: captions are drawn anew without end, and the few steps there are teach more without it.
    """
    device = torch.device(args.device)
    before = copy.deepcopy(text_encoder).requires_grad_(False)
    look_to_both_sides(text_encoder)
    heads = Heads(text_encoder.config.d_model, len(library.categories), len(library.captions)).to(device)
    biases = [p for name, p in text_encoder.named_parameters() if "relative_attention_bias" in name]
    others = [p for p in text_encoder.parameters() if all(p is not bias for bias in biases)]
    groups = [
        {"params": others, "lr_factor": 1},
        {"params": biases, "lr_factor": 10, "weight_decay": 0.0},  # they become a few units
        {"params": heads.parameters(), "lr_factor": 5},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    captions, _, pairs = draw_captions(args.num_probed)
    directions = directions_of_places(text_encoder.config.d_model).to(device)
    nothing = before(**tokenizer([""], return_tensors="pt").to(device))[0][0, -1]

    def report():
        order, both, _ = probe(pooled_states(tokenizer, text_encoder, captions), pairs)
        means = {name: round(float(torch.stack(each[-200:]).mean()), 4) for name, each in recent.items()}
        log(**means, order_told=round(order, 3), both_named=round(both, 3))
        save(text_encoder, args.output_dir / "text_encoder")

    recent, training, reported = {}, 0.0, 0.0
    for batch in draw_batches(library, tokenizer, args.batch_size, args.seed, alone=args.keep_weight > 0):
        began = time.monotonic()
        batch = {name: torch.from_numpy(each).to(device) for name, each in batch.items()}
        states = text_encoder(batch["ids"], attention_mask=batch["mask"])[0]
        losses = text_losses(heads, states, batch)
        if args.keep_weight:
            kept = before(batch["alone_ids"], attention_mask=batch["alone_mask"])[0]
            losses["kept"] = distance_to_kept(states, kept, nothing, directions, batch)
        weights = {"caption": 0.3, "kept": args.keep_weight}
        sum(weights.get(name, 1.0) * loss for name, loss in losses.items()).backward()
        torch.nn.utils.clip_grad_norm_([*text_encoder.parameters(), *heads.parameters()], 1.0)
        progress = log.step / args.max_steps if args.max_steps else training / args.seconds
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * decay(progress) * min(1, (log.step + 1) / 50) * group["lr_factor"]
        optimizer.step()
        optimizer.zero_grad()
        log.step += 1
        for name, loss in losses.items():
            recent.setdefault(name, []).append(loss.detach())
        training += time.monotonic() - began
        if training > args.seconds or log.step == args.max_steps:
            break
        if training - reported > args.save_every:
            report()
            reported = training
    report()


def main(argv=None):
    args = parse_args(argv)
    try:
        tokenizer, text_encoder = read_text_encoder(args.text_encoder)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    log, library = open_log(args), Library(read_manifest())
    torch.manual_seed(args.seed)
    log(num_categories=len(library.categories), num_captions=len(library.captions))
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    train(text_encoder.to(args.device), tokenizer, library, args, log)
    log.file.close()


if __name__ == "__main__":
    sys.exit(main())
