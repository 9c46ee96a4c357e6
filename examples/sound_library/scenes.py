"""Scenes: one to three sounds of the library, mixed or in sequence, as a list of events with captions of them.

A scene is drawn without any sound being read, so that thousands a second can be planned on a CPU and mixed on a GPU;
[`render`] mixes one with NumPy. Each depends on its generator alone.

    scene = draw_scene(np.random.default_rng([0, 7]), recordings, num_samples=81920)
    waveform = render(scene.events, waveforms, 81920)
"""

import string
from typing import NamedTuple

import numpy as np

from examples.sound_library.captions import sentence_case, variants
from examples.sound_library.recordings import BLOCK, FADE, SAMPLING_RATE


MAX_EVENTS = 24  # of one scene: those after are left out
CROSSFADE = 1600  # samples, where a texture is looped or one sound follows another
# Continuous sounds: any part is representative, and a short recording is looped.
TEXTURES = set(
    "airplane applause bee birds_ambience boat bubbles car chainsaw crowd electricity farm fire helicopter insects "
    "leaves machine mosquito motorcycle music noise rain sawing singing siren steam train water waves wind".split()
)
# Sounds that repeat at a regular pace: seconds from one onset to the next.
PACES_IN_S = {
    "drip": (0.3, 0.9),
    "drum": (0.25, 0.8),
    "footsteps": (0.42, 0.68),
    "hammering": (0.5, 0.9),
    "metal": (0.35, 0.9),
    "wood": (0.25, 0.8),
    "wood_chopping": (0.6, 1.0),
}
OFTEN_ONCE = {"burp", "crash", "door", "explosion", "glass", "gunshot", "pop", "sneeze", "splash", "thunder"}
# Shares of the ways of joining, by length in seconds
RELATIONS = ("single", "mixed", "background", "sequence", "sequence of three", "sequence over background")
RELATION_SHARES = {2.56: (0.62, 0.14, 0.06, 0.18, 0, 0), 5.12: (0.40, 0.14, 0.08, 0.30, 0.05, 0.03)}
LONG_RELATION_SHARES = (0.28, 0.12, 0.08, 0.31, 0.13, 0.08)
TIMES = {2: ("twice", "two times"), 3: ("three times",), 4: ("four times",), 5: ("five times",)}

TEMPLATES = {  # with phrases a, b, c and clauses A, B, C
    "mixed": (
        "{a} and {b}; {b} and {a}; {a} with {b}; {A} while {B}; {A} and {B}; {B} as {A}; {A} as {B}; {a} while {B}; "
        "the sound of {a} and {b}; {b} and {a} together; {A} with {b}"
    ),
    "background": (
        "{a} with {b} in the background; {A} with {b} in the background; {a} and {b}; {a} over {b}; {A} over {b}; "
        "{a} with {b} in the distance; {A} while {B} in the background; {A} as {B} in the background"
    ),
    "sequence": (
        "{a} followed by {b}; {a}, then {b}; {a} and then {b}; {A}, then {B}; {A} followed by {b}; {A} and then {B}; "
        "first {a}, then {b}; {b} after {a}; {B} after {A}; {A} before {B}; {a} before {b}; {A} then {B}; "
        "{A}, followed by {b}; {a} and {b} afterwards; {a} followed by {b}; {A}, and after that {B}; after {a}, {b}; "
        "{A} before {b}"
    ),
    "sequence of three": (
        "{a} followed by {b} and then {c}; {A}, then {B}, then {C}; {A} followed by {b} and then {c}; "
        "{a}, {b} and then {c}; first {a}, then {b}, then {c}; {a}, then {b}, followed by {c}; "
        "{A}, {B}, and then {C}; {a} followed by {b} followed by {c}; {A} before {B} and then {C}"
    ),
    "sequence over background": (
        "{a} followed by {b} with {c} in the background; {A}, then {B} while {C}; {C} while {A} and then {B}; "
        "{c} with {a} followed by {b}; {A} followed by {b} as {C}; {C} as {A} followed by {b}; "
        "{A} and then {B} with {c} in the background"
    ),
}


class Event(NamedTuple):
    """A part of a recording, where it begins in the scene, how much louder it is and how it is faded; in samples.

    Fades are a quarter of a sine, so that two that cross keep the power."""

    recording: int
    start: int
    length: int
    place: int
    gain: float
    fade_in: int
    fade_out: int


class Scene(NamedTuple):
    events: list  # of `Event`
    captions: list  # of `str`
    categories: list  # in the order in which they are heard; of what goes on behind them all, the last
    relation: str
    spans: list  # of each caption, by category, where its words begin and end


def draw_part(rng, recordings, index, num_samples, from_start):
    """Start of a part of a longer recording that is not silent; its beginning more often than not if `from_start`."""
    if from_start and rng.random() < 0.6:
        return 0
    powers, room = recordings.powers[index], recordings.lengths[index] - num_samples
    mean = powers[-1] / (len(powers) - 1)
    best, best_power = 0, -1.0
    for start in rng.integers(room + 1, size=6):
        first = start // BLOCK
        last = min(max((start + num_samples) // BLOCK, first + 1), len(powers) - 1)
        power = (powers[last] - powers[first]) / (last - first)
        if power > 0.1 * mean:
            return int(start)
        if power > best_power:
            best, best_power = int(start), power
    return best


def draw_sound(rng, recordings, category, place, num_samples, whole=True):
    """Events of one kind of sound over a stretch of a scene.

    Args:
        place, num_samples (`int`): where the stretch begins and how long it is.
        whole (`bool`): whether the stretch is to be filled; else a single event may stand alone in it.

    Returns:
        `(list[Event], str, int)`: all with a gain that makes recordings equally loud, the caption, and how often an
        event is heard (0 where that cannot be said).
    """
    index = recordings.draw_recording(rng, category)
    row = recordings.rows[index]
    length = int(recordings.lengths[index])

    def gain(i):
        return float(10 ** (-recordings.levels[i] / 20))

    if category == "speech" or (category in TEXTURES and length < num_samples):
        alike = recordings.alike[category, row["caption"]] if category == "speech" else [index]
        events, position, end = [], place, place + num_samples
        start = int(rng.integers(length // 2)) if category != "speech" and length > 4 * CROSSFADE else 0
        overlap = 0 if category == "speech" else min(CROSSFADE, length // 4)
        while position < end and len(events) < MAX_EVENTS:
            size = int(min(recordings.lengths[index] - start, end - position))
            if category == "speech" and events and size < 0.3 * SAMPLING_RATE:
                break
            fade = overlap or FADE
            first, last = not events, position + size >= end
            events.append(
                Event(index, start, size, position, gain(index), FADE if first else fade, 5 * FADE if last else fade)
            )
            if category == "speech":
                position += size + int(rng.uniform(0.1, 0.5) * SAMPLING_RATE)
                index = alike[int(rng.integers(len(alike)))]
            else:
                position += size - overlap
            start = 0
        return events, row["caption"], 0
    if length >= num_samples:
        start = draw_part(rng, recordings, index, num_samples, category not in TEXTURES)
        return [Event(index, start, num_samples, place, gain(index), FADE, 5 * FADE)], row["caption"], 0

    # short ones: once, or in turn, at the pace of the category
    choices = [index]
    if rng.random() < 0.5:
        others = [
            i for i in recordings.alike[category, row["caption"]] if i != index and recordings.lengths[i] < num_samples
        ]
        if others:
            choices += [others[i] for i in rng.permutation(len(others))[: int(rng.integers(1, 4))]]
    steady = category in PACES_IN_S and max(recordings.lengths[i] for i in choices) < 1.2 * SAMPLING_RATE
    pace = rng.uniform(*PACES_IN_S[category]) if steady else 0.0
    chance = 0.6 if category in OFTEN_ONCE else 0.0 if steady else 0.3
    limit = 1 if rng.random() < (chance if whole else chance + 0.2) else int(rng.integers(2, 6))
    if whole and rng.random() < 0.5:
        limit = max(limit, 24) if limit > 1 else 1
    position, events = place + int(rng.uniform(0.0, min(0.3, num_samples / SAMPLING_RATE / 8)) * SAMPLING_RATE), []
    position = min(position, place + max(num_samples - length, 0))
    while len(events) < min(limit, MAX_EVENTS):
        index = choices[len(events) % len(choices)]
        length, room = int(recordings.lengths[index]), place + num_samples - position
        if events and room < 0.6 * length:
            break
        loud = gain(index) * 10 ** (rng.uniform(-3, 0) / 20)
        fade_out = FADE if room >= length else min(8 * FADE, room // 4)
        events.append(Event(index, 0, min(length, room), position, float(loud), FADE, fade_out))
        if steady:
            position += int(pace * rng.uniform(0.92, 1.08) * SAMPLING_RATE)
        else:
            position += length + int(rng.uniform(0.05, 0.6) * SAMPLING_RATE)
        if position >= place + num_samples:
            break
    return events, row["caption"], len(events)


def draw_names(rng, sound):
    """A phrase and a clause for a sound in a sentence: caption and plain name more often than the others. Of a sound
    that is heard two to five times, one of four names says how often."""
    caption, category, times = sound
    phrases, clauses = variants(caption, category, times > 1)
    draw = rng.random()
    rank = 0 if draw < 0.3 else 1 if draw < 0.5 else int(rng.integers(2, len(phrases)))
    phrase, clause = phrases[rank], clauses[int(rng.integers(len(clauses)))]
    if times in TIMES and rng.random() < 0.25:
        word = TIMES[times][int(rng.integers(len(TIMES[times])))]
        return f"{caption} {word}", f"{clause} {word}"
    return phrase, clause


def draw_template(rng, relation, names):
    """A template of the relation for sounds of the given names, and whether it is written with a capital letter."""
    if relation == "single":
        draw = rng.random()
        template = "{a}" if draw < 0.55 else "{A}" if draw < 0.9 else "the sound of {a}"
        if names[0][0].startswith("a sound"):
            template = template.removeprefix("the sound of ")
    else:
        templates = TEMPLATES[relation].split("; ")
        template = templates[int(rng.integers(len(templates)))]
    draw = rng.random()
    return template + ("." if 0.5 <= draw < 0.75 else ""), draw >= 0.5


def fill_template(template, names, capital=False):
    """A caption, and where in it the words for each sound begin and end.

    Args:
        names (`list[tuple[str, str]]`): phrase and clause of each sound, in the order in which they are heard.

    >>> fill_template("{b} after {A}", [("rain", "rain falls"), ("a cow", "a cow moos")])
    ('a cow after rain falls', [(12, 22), (0, 5)])
    """
    text, spans = "", [(0, 0)] * len(names)
    for words, letter, _, _ in string.Formatter().parse(template):
        text += words
        if letter:
            sound = "abc".index(letter.lower())
            name = names[sound][letter.isupper()]
            spans[sound] = (len(text), len(text) + len(name))
            text += name
    return sentence_case(text) if capital else text, spans


def write_caption_with_spans(rng, sounds, relation):
    """One caption as `fill_template` gives it. `sounds` are `(caption, category, times)` in the order in which they
    are heard."""
    names = [draw_names(rng, sound) for sound in sounds]
    template, capital = draw_template(rng, relation, names)
    return fill_template(template, names, capital)


def write_caption(rng, sounds, relation):
    """The caption of `write_caption_with_spans` alone."""
    return write_caption_with_spans(rng, sounds, relation)[0]


def sounds_of_tokens(offsets, spans):
    """For each token the index of the sound that it is a word for, or -1.

    Args:
        offsets (`list[tuple[int, int]]`): where in the text each token begins and ends, as tokenizers tell.
    """
    sounds = []
    for begin, end in offsets:
        inside = [i for i, span in enumerate(spans) if end > begin and span[0] <= (begin + end) / 2 < span[1]]
        sounds.append(inside[0] if inside else -1)
    return sounds


def draw_scene(rng, recordings, num_samples, num_captions=1, sequence_share=None, cut=None):
    """A scene of the given length, of a relation and categories that are drawn. `sequence_share` is that of all
    sequences together, where not the usual one of the length. `cut` is the sample at which the second of two sounds in
    sequence begins, where it is not drawn."""
    seconds = num_samples / SAMPLING_RATE
    shares = RELATION_SHARES[min(RELATION_SHARES, key=lambda each: abs(each - seconds))]
    shares = LONG_RELATION_SHARES if seconds > 7.5 else shares
    if sequence_share is not None:
        wanted = {True: sequence_share, False: 1 - sequence_share}
        kinds = [relation.startswith("sequence") for relation in RELATIONS]
        totals = {kind: sum(share for share, k in zip(shares, kinds, strict=True) if k == kind) for kind in wanted}
        shares = [share * wanted[kind] / totals[kind] for share, kind in zip(shares, kinds, strict=True)]
    relation = RELATIONS[int(np.searchsorted(np.cumsum(shares), rng.random() * sum(shares)))]
    number = {"single": 1, "sequence of three": 3, "sequence over background": 3}.get(relation, 2)
    categories = recordings.draw_categories(rng, number)
    if len(categories) < number:
        relation, categories = "single", categories[:1]
    return make_scene(rng, recordings, num_samples, relation, categories, num_captions, cut)


def make_scene(rng, recordings, num_samples, relation, categories, num_captions=1, cut=None):
    """A scene of sounds of the given categories, in the order in which they are heard. See `draw_scene` for `cut`."""
    stretches = [(0, num_samples)] * len(categories)
    if relation.startswith("sequence"):
        number = len(categories) - (relation == "sequence over background")
        cuts = (np.arange(1, number) + rng.uniform(-0.25, 0.25, number - 1)) / number * num_samples
        cuts = [cut] if cut is not None and relation == "sequence" else cuts.astype(int).tolist()
        edges = [0, *cuts, num_samples]
        overlap = int(rng.uniform(0.0, 1.0) * CROSSFADE)
        starts = [max(edge - overlap // 2, 0) for edge in edges[:-1]]
        ends = [min(edge + overlap // 2, num_samples) for edge in edges[1:]]
        stretches = [(start, end - start) for start, end in zip(starts, ends, strict=True)]
        stretches += [(0, num_samples)] * (len(categories) - number)

    events, sounds = [], []
    for i, (category, (place, length)) in enumerate(zip(categories, stretches, strict=True)):
        behind = (relation == "background" and i == 1) or (relation == "sequence over background" and i == 2)
        quieter_db = rng.uniform(6, 10) if behind else rng.uniform(0, 3)
        whole = relation in ("single", "mixed", "background") or behind
        drawn, caption, times = draw_sound(rng, recordings, category, place, length, whole)
        events += [event._replace(gain=event.gain * 10 ** (-quieter_db / 20)) for event in drawn]
        sounds.append((caption, category, times))
    captions, spans = zip(*(write_caption_with_spans(rng, sounds, relation) for _ in range(num_captions)), strict=True)
    return Scene(events, list(captions), [category for _, category, _ in sounds], relation, list(spans))


def render(events, waveforms, num_samples, peak=0.7):
    """The waveform of a scene: float32 of shape `(num_samples,)`."""
    result = np.zeros(num_samples, np.float32)
    for event in events:
        ramp = np.arange(event.length, dtype=np.float32) + 0.5
        envelope = np.sin(np.pi / 2 * np.minimum(ramp / event.fade_in, 1))
        envelope *= np.sin(np.pi / 2 * np.minimum(ramp[::-1] / max(event.fade_out, 1), 1))
        part = waveforms[event.recording][event.start : event.start + event.length] * envelope * event.gain
        result[event.place : event.place + event.length] += part
    return result * np.float32(peak / max(np.abs(result).max(), 1e-12))
