"""What listeners heard in sounds and recordings, and the figures that come of it."""

import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from accelerate.logging import get_logger
from tqdm import tqdm

from training.data import Clip, inspect_clips, is_silent, read_waveform
from training.latents import LatentCache, cache_key
from training.listeners import load_listener
from training.metrics import (
    clap_score,
    class_recall,
    frechet_distance,
    frechet_warning,
    gaussian_bandwidth,
    inception_score,
    kernel_distance,
    kernel_matrices,
    kl_sigmoid,
    kl_sigmoid_original,
    kl_softmax,
    resample,
    weighted_mean,
)


logger = get_logger(__name__)

SEVERAL_EVENTS = re.compile(r"\b(while|before|after|then|followed by)\b", re.IGNORECASE)  # the paper's words
FEW_PROMPTS = 30


class Hearing:
    """Listeners, and what they heard in each file, kept in a folder."""

    def __init__(self, args, names, device):
        self.args = args
        self.listeners = {}
        for name in names:
            listener = load_listener(name, getattr(args, f"{name}_weights"), device)
            logger.info(f"{name} hears with {listener.weights}, sha256 {listener.checksum}")
            self.listeners[name] = listener
        self.cache = LatentCache(Path(args.output_dir) / "heard")
        self.max_length_in_s = args.max_length_in_s

    def hear(self, name, items):
        """What the listener heard in each item's sound: a list of dicts of arrays."""
        listener, heard = self.listeners[name], []
        settings = {"listener": name, "checksum": listener.checksum, "level": self.args.level}
        settings |= {"max_length_in_s": self.max_length_in_s, "sampling_rate": listener.sampling_rate}
        for item in tqdm(items, desc=f"{name} listens", unit="sound", leave=False, disable=None):
            clip = Clip(item.path, ())
            key = cache_key(clip, settings)
            tensors = self.cache.get(key)
            if tensors is None:
                num_samples = math.ceil(self.max_length_in_s * listener.sampling_rate)
                waveform = read_waveform(clip, listener.sampling_rate, 0, num_samples)
                tensors = listener(set_level(waveform, self.args.level))
                self.cache.put(key, tensors)
            heard.append({what: tensor.numpy() for what, tensor in tensors.items()})
        return heard


def set_level(waveform, level):
    """The mean removed, as audioldm_eval does, and for "peak" the highest value made 0.5, unless it is silence."""
    waveform = waveform - waveform.mean()
    if level == "own" or is_silent(waveform):
        return waveform
    return 0.5 * waveform / waveform.abs().max()


def sort_out(items, what, problems, keep_silent=False):
    """Items whose sound can be heard. The others are named in `problems`; generated silence counts, and is named."""
    clips = [Clip(item.path, ("any",)) for item in items]
    _, faults = inspect_clips(clips, num_workers=os.cpu_count())
    reasons = {fault.path: fault for fault in faults}
    good = []
    for item in items:
        fault = reasons.get(item.path)
        if fault is not None:
            reason = f"{fault.reason} ({fault.detail})" if fault.detail else fault.reason
            problems.append({"what": what, "path": item.path, "reason": reason})
        if fault is None or (keep_silent and fault.reason == "silent"):
            good.append(item)
    return good


def length_in_s(item):
    with Clip(item.path, ()).decode() as file:
        return file.frames / file.samplerate


# Classes and groups


def labels_of(item, column):
    labels = item.columns.get(column)
    if isinstance(labels, str):
        labels = labels.split(",")
    return [str(label).strip() for label in labels or [] if str(label).strip()]


class Classes:
    """From labels, or the words of a prompt, to the classes of a listener."""

    def __init__(self, listener, class_map):
        self.class_map = class_map or {}
        self.indices = {name.casefold(): i for i, name in enumerate(listener.class_names)}
        self.indices |= {id.casefold(): i for i, id in enumerate(listener.class_ids)}
        self.words = [
            [set(map(stem, re.findall(r"\w+", part))) for part in name.split(",")] for name in listener.class_names
        ]

    def of_labels(self, labels):
        names = [name for label in labels for name in self.class_map.get(label, [label])]
        return {self.indices[name.casefold()] for name in names if name.casefold() in self.indices}

    def of_text(self, text):
        """Classes one of whose names ("Vehicle horn, car horn, honking" has three) is among the words of the text."""
        heard = set(map(stem, re.findall(r"\w+", text or "")))
        return {i for i, parts in enumerate(self.words) if any(part and part <= heard for part in parts)}


def stem(word):
    """A word without what its forms differ by, roughly: "dogs barking" has the classes "Dog" and "Bark"."""
    word = word.casefold()
    for ending in ("ing", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            word = word[: -len(ending)]
    return word


def group_of(item, rule, label_column):
    """Which group the item belongs to, or None where it has nothing to tell it by."""
    if rule == "events":
        return item.text and ("several events" if SEVERAL_EVENTS.search(item.text) else "one event")
    if rule == "labels":
        count = len(labels_of(item, label_column))
        return f"{count} label{'s' if count > 1 else ''}" if count else None
    value = item.columns.get(rule)
    return None if value in (None, "") else str(value)


# Figures


@dataclass
class Figure:
    """A metric's value, its figures on the resamples, and how many clips it was computed on."""

    value: float
    resampled: np.ndarray
    num_clips: int
    note: str = ""


class Measure:
    """Metrics of sounds against references, by what one listener heard."""

    def __init__(self, args, listener, references, prompts):
        self.args, self.listener = args, listener
        self.references = {item.id: heard for item, heard in references}
        self.reference_items = {item.id: item for item, _ in references}
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.classes = Classes(listener, args.class_map)
        self.text_embeddings = {}

    def __call__(self, items, heard, reference_ids=None, paired=True):
        """Figures by metric.

        Args:
            items, heard: the sounds, and what was heard in each.
            reference_ids: the references to compare with (default: all).
            paired (`bool`): whether a sound and the reference of its id belong together.
        """
        args, figures = self.args, {}
        if not items:
            return figures
        ids = sorted({item.id for item in items})
        unit = {id: i for i, id in enumerate(ids)}
        units = np.array([unit[item.id] for item in items])
        weights = resample(len(ids), args.num_resamples, args.seed)[:, units]  # takes of a prompt come together

        def add(name, value, resampled, num_clips, *notes):
            if len(ids) < FEW_PROMPTS:
                notes = (f"only {len(ids)} prompt{'s' if len(ids) > 1 else ''}", *notes)
            figures[name] = Figure(value, np.array(resampled), num_clips, "; ".join(note for note in notes if note))

        def add_mean(name, values):
            values = np.asarray(values, np.float64)
            if np.isfinite(values).any():
                resampled = [weighted_mean(values, each) for each in weights]
                add(name, weighted_mean(values), resampled, int(np.isfinite(values).sum()))

        # against all references
        reference_ids = sorted(self.references if reference_ids is None else reference_ids)
        references = [self.references[id] for id in reference_ids]
        if len(references) > 1 and len(items) > 1:
            reference_weights = resample(len(references), args.num_resamples, args.seed + 1)
            (x, x_clips), (y, y_clips) = patches_of(heard), patches_of(references)
            resampled = [
                frechet_distance(x, y, each[x_clips], other[y_clips])
                for each, other in zip(weights, reference_weights, strict=True)
            ]
            warning = frechet_warning(len(x), len(y), x.shape[1])
            add("frechet", frechet_distance(x, y), resampled, len(items), warning)
            x, y = (np.stack([each["embedding"] for each in rows]) for rows in (heard, references))
            # one width for every system and group, or they could not be compared
            matrices = kernel_matrices(x, y, bandwidth=self.bandwidth)
            resampled = [
                kernel_distance(matrices, each, other) for each, other in zip(weights, reference_weights, strict=True)
            ]
            add("kernel", kernel_distance(matrices), resampled, len(items))

        # against each sound's own reference, class by class
        if "logits" in heard[0]:
            logits = np.stack([each["logits"] for each in heard])
            pairs = [i for i, item in enumerate(items) if paired and item.id in self.references]
            if pairs:
                own = np.stack([self.references[items[i].id]["logits"] for i in pairs])
                for name, metric in (
                    ("kl_softmax", kl_softmax),
                    ("kl_sigmoid", kl_sigmoid),
                    ("kl_sigmoid_original", kl_sigmoid_original),
                ):
                    values = np.full(len(items), math.nan)
                    values[pairs] = metric(own, logits[pairs])
                    add_mean(name, values)
            splits = min(args.num_inception_splits, len(items))
            resampled = [inception_score(logits, each, splits) for each in weights]
            add("inception", inception_score(logits, num_splits=splits), resampled, len(items))
            right = [self.classes.of_labels(self.labels_of(item)) for item in items]
            if any(right):
                add_mean("recall", class_recall(logits, right, args.recall_k))

        # against each sound's text
        if hasattr(self.listener, "embed_text"):
            texts = [self.text_of(item) for item in items]
            told = [i for i, text in enumerate(texts) if text]
            if told:
                values = np.full(len(items), math.nan)
                values[told] = clap_score(
                    self.embed_text([texts[i] for i in told]), np.stack([heard[i]["embedding"] for i in told])
                )
                add_mean("clap", values)
        return figures

    @cached_property
    def bandwidth(self):
        return gaussian_bandwidth(np.stack([each["embedding"] for each in self.references.values()]))

    def text_of(self, item):
        """Its own text, else that of the prompt with its id."""
        return item.text or (self.prompts[item.id].text if item.id in self.prompts else None)

    def labels_of(self, item):
        own = labels_of(item, self.args.label_column)
        return own or (labels_of(self.prompts[item.id], self.args.label_column) if item.id in self.prompts else [])

    def embed_text(self, texts):
        if missing := sorted(set(texts) - self.text_embeddings.keys()):
            self.text_embeddings |= dict(zip(missing, self.listener.embed_text(missing).numpy()))
        return np.stack([self.text_embeddings[text] for text in texts])

    def rank(self, items, heard):
        """How well each sound fits its text, by this listener: the cosine of CLAP, or the mean logit of the classes
        that its labels, else its words, name; NaN where they name none."""
        if hasattr(self.listener, "embed_text"):
            texts = [self.text_of(item) or "" for item in items]
            return clap_score(self.embed_text(texts), np.stack([each["embedding"] for each in heard]))
        scores = []
        for item, each in zip(items, heard, strict=True):
            right = self.classes.of_labels(self.labels_of(item)) or self.classes.of_text(self.text_of(item))
            scores.append(float(np.mean([each["logits"][i] for i in right])) if right else math.nan)
        return np.array(scores)


def patches_of(heard):
    """What the Frechet distance is taken over: embeddings `(count, dim)`, and the clip that each comes from."""
    name = "patches" if "patches" in heard[0] else "embedding"
    rows = [np.atleast_2d(each[name]) for each in heard]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(each) for each in rows])


def best_of(items, scores, num_candidates):
    """Indices of the best of the first `num_candidates` takes of each prompt, in the order of the prompts.

    Takes compete only with takes of their own prompt; the first of equals wins, and the first of all where no score is
    a number.
    """
    best = {}
    for index, item in sorted(enumerate(items), key=lambda pair: pair[1].take):
        if item.take > num_candidates:
            continue
        score = -math.inf if math.isnan(scores[index]) else scores[index]
        if item.id not in best or score > best[item.id][0]:
            best[item.id] = (score, index)
    return [index for _, index in sorted(best.values(), key=lambda pair: pair[1])]
