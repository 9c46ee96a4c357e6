"""Measurements: embeddings and class posteriors of sounds by the listeners, and metrics of them for each system."""

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from tqdm import tqdm

from ..data import Clip, is_silent, read_waveform
from ..latents import LatentCache, cache_key
from .items import group_of, labels_of
from .metrics import (
    begin_in_sequence,
    clap_score,
    class_recall,
    event_scores,
    frechet_distance,
    frechet_warning,
    gaussian_bandwidth,
    in_sequence,
    inception_score,
    kernel_distance,
    kernel_matrices,
    kl_sigmoid,
    kl_sigmoid_original,
    kl_softmax,
    nearest_similarity,
    resample,
    sequence_recall,
    weighted_mean,
)


FEW_PROMPTS = 30


class FeatureExtractor:
    """Embeddings and class posteriors of sounds by each listener, cached in a folder.

    Args:
        listeners (`dict[str, Listener]`): by name.
        folder (`str` or `Path`): of the cache.
        level (`str`): as in `set_level`.
        max_length_in_s (`float`): the part of each sound, from its start, that is used.
    """

    def __init__(self, listeners, folder, level, max_length_in_s):
        self.listeners, self.level, self.max_length_in_s = listeners, level, max_length_in_s
        self.cache = LatentCache(folder)

    def __call__(self, name, items):
        """Features of each item's sound by the listener `name`: a list of dicts of arrays, as `Listener` returns."""
        listener, features = self.listeners[name], []
        settings = {"listener": name, "checksum": listener.checksum, "level": self.level}
        settings |= {"max_length_in_s": self.max_length_in_s, "sampling_rate": listener.sampling_rate}
        settings |= {"patch_logits": True} if listener.classifies_patches else {}
        for item in tqdm(items, desc=name, unit="sound", leave=False, disable=None):
            clip = Clip(item.path, ())
            key = cache_key(clip, settings)
            tensors = self.cache.get(key)
            if tensors is None:
                num_samples = math.ceil(self.max_length_in_s * listener.sampling_rate)
                waveform = read_waveform(clip, listener.sampling_rate, 0, num_samples)
                tensors = listener(set_level(waveform, self.level))
                self.cache.put(key, tensors)
            features.append({kind: tensor.numpy() for kind, tensor in tensors.items()})
        return features


def set_level(waveform, level):
    """The waveform without its mean, as audioldm_eval does, and for "peak" scaled to a peak of 0.5 unless silent."""
    waveform = waveform - waveform.mean()
    if level == "own" or is_silent(waveform):
        return waveform
    return 0.5 * waveform / waveform.abs().max()


# Classes


FIRST_OF_KIND = {  # in the order of AudioSet's classes, which goes along its ontology (Gemmeke et al. 2017)
    "speech": "speech",
    "laughter": "other sounds of people",
    "animal": "animals",
    "music": "music",
    "wind": "nature",
    "vehicle": "vehicles and engines",
    "door": "things",
}


class Classes:
    """Maps labels, or the words of a prompt, to the classes of a listener."""

    def __init__(self, listener, class_map):
        self.class_map = class_map or {}
        self.kinds, kind = [], None  # of each class
        for name in listener.class_names:
            kind = FIRST_OF_KIND.get(name.casefold(), kind)
            self.kinds.append(kind)
        self.indices = {name.casefold(): i for i, name in enumerate(listener.class_names)}
        self.indices |= {id.casefold(): i for i, id in enumerate(listener.class_ids)}
        self.words = [
            [set(map(stem, re.findall(r"\w+", part))) for part in name.split(",")] for name in listener.class_names
        ]

    def of_labels(self, labels):
        names = [name for label in labels for name in self.class_map.get(label, [label])]
        return {self.indices[name.casefold()] for name in names if name.casefold() in self.indices}

    def kind(self, labels):
        """Speech if one of the labels is of speech, else the kind of the first label that the listener has a class
        for, else None."""
        kinds = [self.kinds[min(classes)] for label in labels if (classes := self.of_labels([label]))]
        return "speech" if "speech" in kinds else next(iter(kinds), None)

    def of_text(self, text):
        """Classes of which one name ("Vehicle horn, car horn, honking" has three) occurs in the text, word by word."""
        words = set(map(stem, re.findall(r"\w+", text or "")))
        return {i for i, parts in enumerate(self.words) if any(part and part <= words for part in parts)}


def stem(word):
    """A word without the endings "ing" and "s", so that "dogs barking" has the classes "Dog" and "Bark"."""
    word = word.casefold()
    for ending in ("ing", "s"):
        if word.endswith(ending) and len(word) > len(ending) + 2:
            word = word[: -len(ending)]
    return word


# Metrics of one set


@dataclass(frozen=True)
class MetricSettings:
    """Settings of the metrics.

    Args:
        seed (`int`): of the bootstrap resamples.
        label_column (`str`): column of the items with class ids or names.
        sequence_column (`str`): column of the items with labels of the events, in the order of the prompt.
        together_column (`str`): column of the items with labels of the events of a prompt without an order.
        class_map (`dict[str, list[str]]`, *optional*): class names or ids for a label.
    """

    num_resamples: int = 200
    seed: int = 0
    num_inception_splits: int = 1
    recall_k: int = 5
    label_column: str = "labels"
    sequence_column: str = "sequence"
    together_column: str = "together"
    class_map: dict | None = None


@dataclass
class Figure:
    """A metric's value, its values on the bootstrap resamples, and the number of clips it was computed on."""

    value: float
    resampled: np.ndarray
    num_clips: int
    note: str = ""


class Measure:
    """Metrics of sounds against references by the features of one listener.

    Args:
        references (`list[Item]`), reference_features (`list[dict]`): the recordings and their features.
        prompts (`list[Item]`): the source of texts and labels that a sound lacks.
        training_features (`list[dict]`): of the recordings that the models were trained on.
    """

    def __init__(self, listener, references, reference_features, prompts, settings, training_features=()):
        self.listener, self.settings = listener, settings
        self.references = {item.id: item for item in references}
        self.reference_features = {item.id: row for item, row in zip(references, reference_features, strict=True)}
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.classes = Classes(listener, settings.class_map)
        self.text_embeddings = {}
        self.trained_on = np.stack([row["embedding"] for row in training_features]) if training_features else None

    def __call__(self, items, features, reference_ids=None, paired=True):
        """Figures by metric.

        Args:
            items, features: the sounds, and the listener's features of each.
            reference_ids: the references to compare with (default: all).
            paired (`bool`): whether a sound and the reference of the same id belong together.
        """
        settings, figures = self.settings, {}
        if not items:
            return figures
        ids = sorted({item.id for item in items})
        unit = {id: i for i, id in enumerate(ids)}
        units = np.array([unit[item.id] for item in items])
        # all takes of a prompt are drawn together
        weights = resample(len(ids), settings.num_resamples, settings.seed)[:, units]

        def add(name, value, resampled, num_clips, *notes):
            if len(ids) < FEW_PROMPTS:
                notes = (f"only {len(ids)} prompt{'s' if len(ids) > 1 else ''}", *notes)
            figures[name] = Figure(value, np.array(resampled), num_clips, "; ".join(note for note in notes if note))

        def add_mean(name, values, *notes):
            values = np.asarray(values, np.float64)
            if np.isfinite(values).any():
                resampled = [weighted_mean(values, each) for each in weights]
                add(name, weighted_mean(values), resampled, int(np.isfinite(values).sum()), *notes)

        # against all references
        reference_ids = sorted(self.references if reference_ids is None else reference_ids)
        references = [self.reference_features[id] for id in reference_ids]
        if len(references) > 1 and len(items) > 1:
            reference_weights = resample(len(references), settings.num_resamples, settings.seed + 1)
            (x, x_clips), (y, y_clips) = patches_of(features), patches_of(references)
            resampled = [
                frechet_distance(x, y, each[x_clips], other[y_clips])
                for each, other in zip(weights, reference_weights, strict=True)
            ]
            warning = frechet_warning(len(x), len(y), x.shape[1])
            add("frechet", frechet_distance(x, y), resampled, len(items), warning)
            x, y = (np.stack([each["embedding"] for each in rows]) for rows in (features, references))
            # one width for every system and group, or they could not be compared
            matrices = kernel_matrices(x, y, bandwidth=self.bandwidth)
            resampled = [
                kernel_distance(matrices, each, other) for each, other in zip(weights, reference_weights, strict=True)
            ]
            add("kernel", kernel_distance(matrices), resampled, len(items))

        # against each sound's own reference, class by class
        if "logits" in features[0]:
            logits = np.stack([each["logits"] for each in features])
            pairs = [i for i, item in enumerate(items) if paired and item.id in self.references]
            if pairs:
                own = np.stack([self.reference_features[items[i].id]["logits"] for i in pairs])
                for name, metric in (
                    ("kl_softmax", kl_softmax),
                    ("kl_sigmoid", kl_sigmoid),
                    ("kl_sigmoid_original", kl_sigmoid_original),
                ):
                    values = np.full(len(items), math.nan)
                    values[pairs] = metric(own, logits[pairs])
                    add_mean(name, values)
            splits = min(settings.num_inception_splits, len(items))
            resampled = [inception_score(logits, each, splits) for each in weights]
            add("inception", inception_score(logits, num_splits=splits), resampled, len(items))
            right = [self.classes.of_labels(self.labels_of(item)) for item in items]
            if any(right):
                add_mean("recall", class_recall(logits, right, settings.recall_k))
            sequences = [self.sequence_of(item) for item in items]
            events = [sequence or self.together_of(item) for item, sequence in zip(items, sequences, strict=True)]
            heard = sequence_recall(logits, events, settings.recall_k)
            if any(events):
                add_mean("sequence_recall", heard)
            if any(sequences) and "patch_logits" in features[0]:
                for name, metric in (("order", in_sequence), ("begin_order", begin_in_sequence)):
                    order = np.array(
                        [
                            metric(row["patch_logits"], sequence) if sequence else math.nan
                            for row, sequence in zip(features, sequences, strict=True)
                        ]
                    )
                    order_heard = np.where(heard == 1, order, math.nan)
                    for name, values in ((name, order), (f"{name}_heard", order_heard)):
                        chances = [1 / math.factorial(len(sequences[i])) for i in np.flatnonzero(np.isfinite(values))]
                        if chances:
                            add_mean(name, values, f"by chance {np.mean(chances):.2f}")

        # against what the models were trained on
        if self.trained_on is not None:
            nearest = nearest_similarity(np.stack([each["embedding"] for each in features]), self.trained_on)
            add_mean("nearest", nearest, f"the largest is {nearest.max():.3f}")

        # against each sound's text
        if hasattr(self.listener, "embed_text"):
            texts = [self.text_of(item) for item in items]
            told = [i for i, text in enumerate(texts) if text]
            if told:
                values = np.full(len(items), math.nan)
                values[told] = clap_score(
                    self.embed_text([texts[i] for i in told]), np.stack([features[i]["embedding"] for i in told])
                )
                add_mean("clap", values)
        return figures

    @cached_property
    def bandwidth(self):
        return gaussian_bandwidth(np.stack([each["embedding"] for each in self.reference_features.values()]))

    def text_of(self, item):
        """The item's text, else that of the prompt with its id."""
        return item.text or (self.prompts[item.id].text if item.id in self.prompts else None)

    def labels_of(self, item):
        own = labels_of(item, self.settings.label_column)
        return own or (labels_of(self.prompts[item.id], self.settings.label_column) if item.id in self.prompts else [])

    def sequence_of(self, item):
        """The classes of each event of the item, or of the prompt with its id, in the order of the prompt; empty
        unless two or more are known."""
        return self.events_of(item, self.settings.sequence_column)

    def together_of(self, item):
        """The same for the events of a prompt that names no order."""
        return self.events_of(item, self.settings.together_column)

    def events_of(self, item, column):
        prompt = self.prompts.get(item.id)
        labels = labels_of(item, column) or (labels_of(prompt, column) if prompt else [])
        sequence = [self.classes.of_labels([label]) for label in labels]
        return sequence if len(sequence) > 1 and all(sequence) else []

    def split(self, items, rule):
        """Indices of the items by group. The group of an item that lacks what the rule reads is that of its prompt,
        else that of its reference."""
        groups = {}
        for index, item in enumerate(items):
            candidates = (item, self.prompts.get(item.id), self.references.get(item.id))
            for candidate in candidates:
                group = candidate and group_of(candidate, rule, self.settings.label_column, self.classes)
                if group:
                    groups.setdefault(group, []).append(index)
                    break
        return dict(sorted(groups.items()))

    def embed_text(self, texts):
        if missing := sorted(set(texts) - self.text_embeddings.keys()):
            self.text_embeddings |= dict(zip(missing, self.listener.embed_text(missing).numpy()))
        return np.stack([self.text_embeddings[text] for text in texts])

    def asked_for(self, item):
        """The classes of each event that the item's prompt asks for, and whether it asks for their order: by its
        events, else by its labels, else by the words of its text. Empty if it names no class."""
        if sequence := self.sequence_of(item):
            return sequence, True
        classes = self.classes.of_labels(self.labels_of(item)) or self.classes.of_text(self.text_of(item))
        return self.together_of(item) or ([classes] if classes else []), False

    def preferences(self, items, features, order_weight=1.0):
        """How well each sound does what its prompt asks for, to compare the takes of a prompt by.

        A listener of texts scores by the cosine with the prompt. One of classes scores by the sum of the
        log-probabilities of the events in `asked_for`, and where these have an order and the listener classifies
        patches, by `order_weight` times the logarithm of `order` beside it.

        Returns:
            `list[dict]`: `score`, NaN where the prompt names no class; from a listener of classes `heard`, the
            log-probability of each event, and `order` (see `event_scores`).
        """
        if hasattr(self.listener, "embed_text"):
            return [{"score": float(score)} for score in self.rank(items, features)]
        rows = []
        for item, each in zip(items, features, strict=True):
            events, has_order = self.asked_for(item)
            if not events:
                rows.append({"score": math.nan})
                continue
            heard, order = event_scores(each["logits"], each.get("patch_logits") if has_order else None, events)
            row = {"score": float(heard.sum()), "heard": heard.tolist()}
            if order is not None:
                row |= {"score": row["score"] + order_weight * math.log(max(order, 1e-9)), "order": order}
            rows.append(row)
        return rows

    def rank(self, items, features):
        """Scores of how well each sound matches its text: CLAP's cosine, or the mean logit of the classes that the
        labels, else the words of the text, name; NaN where they name none."""
        if hasattr(self.listener, "embed_text"):
            texts = [self.text_of(item) or "" for item in items]
            return clap_score(self.embed_text(texts), np.stack([each["embedding"] for each in features]))
        scores = []
        for item, each in zip(items, features, strict=True):
            right = self.classes.of_labels(self.labels_of(item)) or self.classes.of_text(self.text_of(item))
            scores.append(float(np.mean([each["logits"][i] for i in right])) if right else math.nan)
        return np.array(scores)


def patches_of(features):
    """Embeddings `(count, dim)` for the Frechet distance, and the index of the clip that each belongs to."""
    name = "patches" if "patches" in features[0] else "embedding"
    rows = [np.atleast_2d(each[name]) for each in features]
    return np.concatenate(rows), np.repeat(np.arange(len(rows)), [len(each) for each in rows])


# Systems


def candidate_counts(num_candidates):
    """1, 2, 4, ... and `num_candidates`."""
    return sorted({2**i for i in range(num_candidates.bit_length())} | {num_candidates})


def best_of(items, scores, num_candidates):
    """Indices of the best of the first `num_candidates` takes of each prompt, in the order of the prompts.

    Only takes of the same prompt are compared. Of equal scores the first take is chosen, and the first of all takes if
    every score is NaN.
    """
    best = {}
    for index, item in sorted(enumerate(items), key=lambda pair: pair[1].take):
        if item.take > num_candidates:
            continue
        score = -math.inf if math.isnan(scores[index]) else scores[index]
        if item.id not in best or score > best[item.id][0]:
            best[item.id] = (score, index)
    return [index for _, index in sorted(best.values(), key=lambda pair: pair[1])]


def measure_system(measure, system, features, tables, group_by=(), best_takes=None):
    """Add a system's figures to the tables, for all of its sounds, by group and for the best of N takes.

    Args:
        features (`list[dict]`): of the system's sounds.
        tables (`Tables`): with a method `add`.
        best_takes (`dict[int, list[int]]`, *optional*): for each number of candidates, the indices of the best takes.

    Returns:
        The figures of all sounds, by metric.
    """
    name = measure.listener.name

    def measured(indices, reference_ids):
        sounds, rows = ([each[i] for i in indices] for each in (system.sounds, features))
        return measure(sounds, rows, reference_ids, system.paired)

    figures = measured(range(len(system.sounds)), system.reference_ids)
    tables.add("results", system, "", name, figures)
    for rule in group_by:
        references = measure.split(measure.references.values(), rule)
        ids = list(measure.references)
        for group, indices in measure.split(system.sounds, rule).items():
            reference_ids = [ids[i] for i in references.get(group, [])]
            if system.reference_ids is not None:
                reference_ids = [id for id in reference_ids if id in system.reference_ids]
            tables.add("groups", system, f"{rule}: {group}", name, measured(indices, reference_ids))
    for count, indices in (best_takes or {}).items():
        tables.add("candidates", system, str(count), name, measured(indices, system.reference_ids))
    return figures


def compare_systems(measure, systems, features, figures, tables):
    """Compare each model with the first model at the same settings, and each folder with the first system of all, on
    the prompts that both have.

    Args:
        features, figures (`dict`): the features of the sounds and the figures of `measure_system`, by system name.
        tables (`Tables`): with a method `compare`.
    """
    for other in systems:
        same = [system for system in systems if system.settings == other.settings]
        baseline = same[0] if other.scheduler else systems[0]
        common = {sound.id for sound in baseline.sounds} & {sound.id for sound in other.sounds}
        if other is baseline or not common:
            continue
        pair = []
        for system in (baseline, other):
            indices = [i for i, sound in enumerate(system.sounds) if sound.id in common]
            if len(indices) == len(system.sounds):
                pair.append(figures[system.name])
            else:
                sounds = [system.sounds[i] for i in indices]
                pair.append(measure(sounds, [features[system.name][i] for i in indices]))
        tables.compare(baseline, other, measure.listener.name, *pair)
