"""Metrics of generated sounds, from embeddings and class posteriors of a listener. Pure functions, float64.

Weights are the multiplicities of the clips, 1 by default. A bootstrap resample is a vector of weights, so no array is
copied, and a metric of distinct clips (`kernel_distance`) can leave out pairs of a clip with its repetition.
"""

import math

import numpy as np
from scipy.spatial.distance import cdist, pdist
from scipy.special import expit, log_expit, log_softmax, softmax, xlogy


# added before the logarithm by audioldm_eval, which published figures were computed with
KL_EPSILON = 1e-6


def check_rows(**arrays):
    """float64 copies. Raises ValueError, naming the argument, if one is not a finite matrix with at least one row."""
    result = []
    for name, array in arrays.items():
        array = np.asarray(array, np.float64)
        if array.ndim != 2 or not array.size:
            raise ValueError(f"`{name}` must be of shape (num_clips, num_values), got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite.")
        result.append(array)
    if len({array.shape[1] for array in result}) > 1:
        widths = ", ".join(f"`{name}` has {array.shape[1]}" for name, array in zip(arrays, result, strict=True))
        raise ValueError(f"rows must be of one length: {widths}.")
    return result


def as_weights(weights, num_clips):
    return np.ones(num_clips) if weights is None else np.asarray(weights, np.float64)


# Two sets


def frechet_distance(x, y, x_weights=None, y_weights=None):
    r"""Squared Frechet distance between the Gaussians fitted to two sets of embeddings.

    |m_x - m_y|^2 + Tr(C_x) + Tr(C_y) - 2 Tr((C_x C_y)^(1/2)), the covariances unbiased.

    With C_x = A^T A and C_y = B^T B, A and B the centred embeddings over sqrt(count - 1), the last trace is the sum of
    the singular values of A B^T. No covariance is formed and no matrix root taken, so the value is real, and exact
    with fewer clips than dimensions, where it is biased (`frechet_warning`).

    Args:
        x, y: of shape `(num_clips, dim)`; the two counts may differ.

    Source: Dowson and Landau 1982; FID, Heusel et al. 2017, arXiv 1706.08500; FAD, Kilgour et al. 2019,
    arXiv 1812.08466.
    """
    x, y = check_rows(x=x, y=y)
    (x_mean, x_root), (y_mean, y_root) = (
        mean_and_root(rows, weights) for rows, weights in ((x, x_weights), (y, y_weights))
    )
    cross = np.linalg.svd(x_root @ y_root.T, compute_uv=False).sum()
    distance = ((x_mean - y_mean) ** 2).sum() + (x_root**2).sum() + (y_root**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def mean_and_root(rows, weights):
    """Mean, and a matrix whose product with itself, `root.T @ root`, is the unbiased covariance."""
    weights = as_weights(weights, len(rows))
    rows, weights = rows[weights > 0], weights[weights > 0]
    if weights.sum() <= 1:
        return rows.mean(0), np.zeros((1, rows.shape[1]))
    mean = weights @ rows / weights.sum()
    root = np.sqrt(weights / (weights.sum() - 1))[:, None] * (rows - mean)
    return mean, np.linalg.qr(root, mode="r") if len(root) > root.shape[1] else root


def frechet_warning(num_x, num_y, dim):
    """A warning if the number of embeddings biases the Frechet distance, else None."""
    if min(num_x, num_y) <= dim:
        return (
            f"{min(num_x, num_y)} embeddings of {dim} dimensions: the covariance is singular and the distance far too "
            "large; compare it only with distances at the same counts"
        )
    return None


def gaussian_bandwidth(references):
    """Median distance between two of the references: the kernel's width in `kernel_distance`."""
    (references,) = check_rows(references=references)
    return float(np.median(pdist(references))) if len(references) > 1 else 1.0


def kernel_matrices(x, y, kernel="gaussian", bandwidth=None):
    """Kernel values within `x`, within `y` and between them, to compute once for all resamples.

    Args:
        kernel (`str`): `"gaussian"`: exp(-|a - b|^2 / (2 bandwidth^2)), as KAD. `"polynomial"`: (a.b / dim + 1)^3, as
            KID (Binkowski et al. 2018, arXiv 1801.01401).
        bandwidth (`float`, *optional*): of the Gaussian one; by default `gaussian_bandwidth(y)`.
    """
    x, y = check_rows(x=x, y=y)
    if kernel == "polynomial":
        return tuple((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    if kernel != "gaussian":
        raise ValueError(f"`kernel` must be 'gaussian' or 'polynomial', got {kernel!r}.")
    bandwidth = bandwidth or gaussian_bandwidth(y) or 1.0
    return tuple(np.exp(-cdist(a, b, "sqeuclidean") / (2 * bandwidth**2)) for a, b in ((x, x), (y, y), (x, y)))


def kernel_distance(matrices, x_weights=None, y_weights=None):
    """Kernel audio distance: 100 times the unbiased estimate of the squared maximum mean discrepancy.

    mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j). Unlike the Frechet
    distance it expects the same value at any count, so it may be negative where the sets are alike.

    Args:
        matrices: from `kernel_matrices`.

    Source: KAD, Chung et al. 2025, arXiv 2502.15602, with their factor 100; MMD, Gretton et al. 2012, eq. (3).
    """
    xx, yy, xy = matrices
    x_weights, y_weights = as_weights(x_weights, len(xx)), as_weights(y_weights, len(yy))
    within = 0.0
    for matrix, weights in ((xx, x_weights), (yy, y_weights)):
        pairs = weights.sum() ** 2 - (weights**2).sum()  # without pairs of a clip with itself
        if pairs <= 0:
            return math.nan
        within += (weights @ matrix @ weights - weights**2 @ np.diag(matrix)) / pairs
    between = x_weights @ xy @ y_weights / (x_weights.sum() * y_weights.sum())
    return float(100 * (within - 2 * between))


# Pairs


def kl_softmax(reference_logits, logits):
    """Divergence KL(reference || generated) of each pair, the class posteriors by softmax: sum of p log(p / q).

    The form that Tango's paper and AudioGen report, with the 1e-6 that audioldm_eval adds to q.

    Returns:
        Array of shape `(num_pairs,)`.
    """
    p, q = check_rows(reference_logits=reference_logits, logits=logits)
    p, q = softmax(p, axis=1), softmax(q, axis=1)
    return (xlogy(p, p) - p * np.log(q + KL_EPSILON)).sum(1)


def kl_sigmoid(reference_logits, logits):
    """The same for independent classes, by sigmoid: sum of p log(p / q) + (1 - p) log((1 - p) / (1 - q))."""
    p, q = check_rows(reference_logits=reference_logits, logits=logits)
    yes, no = expit(p), expit(-p)
    return (yes * (log_expit(p) - log_expit(q)) + no * (log_expit(-p) - log_expit(-q))).sum(1)


def kl_sigmoid_original(reference_logits, logits):
    """`kl_sigmoid` as audioldm_eval has it, to compare with published figures: the second half left out.

    It is not a divergence: it may be negative, and is lowest where q is largest.
    """
    p, q = check_rows(reference_logits=reference_logits, logits=logits)
    p, q = expit(p), expit(q)
    return (xlogy(p, p) - p * np.log(q + KL_EPSILON)).sum(1)


def clap_score(text_embeddings, embeddings):
    """Cosine between each text's embedding and its sound's. Source: CLAP, Wu et al. 2023, arXiv 2211.06687."""
    text, sound = check_rows(text_embeddings=text_embeddings, embeddings=embeddings)
    norms = np.linalg.norm(text, axis=1) * np.linalg.norm(sound, axis=1)
    return (text * sound).sum(1) / np.maximum(norms, np.finfo(float).tiny)


def nearest_similarity(embeddings, others):
    """The largest cosine between each embedding and one of the others: 1 for a copy."""
    first, second = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
        for rows in check_rows(embeddings=embeddings, others=others)
    )
    return (first @ second.T).max(1)


def class_recall(logits, classes, k=5):
    """Whether one of each clip's classes is among the `k` most probable ones: 1.0 or 0.0.

    Args:
        classes (`list[set[int]]`): the correct classes of each clip, of which any counts; NaN is returned where there
            are none.
    """
    (logits,) = check_rows(logits=logits)
    top = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    hits = [float(bool(right & set(row.tolist()))) for row, right in zip(top, classes, strict=True)]
    return np.where([bool(right) for right in classes], hits, math.nan)


def sequence_recall(logits, sequences, k=5):
    """Whether every event of each clip has one of its classes among the `k` most probable ones: 1.0 or 0.0.

    Args:
        sequences (`list[list[set[int]]]`): the classes of each event of each clip; NaN is returned where there are
            none.
    """
    (logits,) = check_rows(logits=logits)
    top = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    hits = [all(event & set(row.tolist()) for event in events) for row, events in zip(top, sequences, strict=True)]
    return np.where([bool(events) for events in sequences], np.array(hits, np.float64), math.nan)


def event_probabilities(patch_logits, sequence):
    """Probability of each event in each patch: that of its most probable class. A class that several events share does
    not count, unless an event has no other.

    Args:
        patch_logits (`np.ndarray` of shape `(num_patches, num_classes)`): in the order of time.
        sequence (`list[set[int]]`): the classes of each event.

    Returns:
        Array of shape `(num_events, num_patches)`.
    """
    probabilities = expit(np.asarray(patch_logits, np.float64))
    return np.stack([probabilities[:, sorted(own)].max(1) for own in own_classes(sequence)])


def own_classes(sequence):
    """The classes of each event that no other event has, or all of its classes where every one is shared."""
    return [
        classes - set().union(*sequence[:number], *sequence[number + 1 :]) or classes
        for number, classes in enumerate(sequence)
    ]


def in_sequence(patch_logits, sequence):
    """Whether the events of a clip follow each other in the given order: 1.0 or 0.0; NaN with fewer than two patches.

    The time of an event is the mean time of the patches, weighted by `event_probabilities`, whose arguments these are.
    """
    if len(patch_logits) < 2:
        return math.nan
    weights = event_probabilities(patch_logits, sequence)
    times = weights @ np.arange(weights.shape[1]) / weights.sum(1)
    return float((np.diff(times) > 0).all())


def begin_in_sequence(patch_logits, sequence):
    """Whether the events of a clip begin in the given order: 1.0 or 0.0; NaN with fewer than two patches.

    An event begins in the first patch with at least half of its largest probability in the clip. Where events begin in
    the same patch the value is the probability that they are in order by chance, so that the mean over clips without
    any order is 1 / n! for n events.

    Args: as of `event_probabilities`.
    """
    if len(patch_logits) < 2:
        return math.nan
    probabilities = event_probabilities(patch_logits, sequence)
    begins = np.argmax(probabilities >= 0.5 * probabilities.max(1, keepdims=True), axis=1)  # (num_events,)
    if (np.diff(begins) < 0).any():
        return 0.0
    _, counts = np.unique(begins, return_counts=True)
    return float(1 / np.prod([math.factorial(count) for count in counts]))


def event_scores(logits, patch_logits, sequence):
    """How well the events of a clip are heard, and how far they are in order: continuous, to rank clips by.

    Args:
        logits (`np.ndarray` of shape `(num_classes,)`): of the clip.
        patch_logits, sequence: as of `event_probabilities`; `patch_logits` may be None.

    Returns:
        `(heard, order)`: the log-probability of each event in the clip, `(num_events,)`; and the probability that a
        moment of each event precedes one of the next, the moments drawn by `event_probabilities`: the mean over
        consecutive events, 0.5 without any order; None without two events and two patches.
    """
    heard = np.array([log_expit(np.float64(max(logits[i] for i in own))) for own in own_classes(sequence)])
    if patch_logits is None or len(patch_logits) < 2 or len(sequence) < 2:
        return heard, None
    shares = event_probabilities(patch_logits, sequence)
    shares /= shares.sum(1, keepdims=True)
    # before the patch, and half of the patch itself
    before = np.cumsum(shares, 1) - 0.5 * shares
    return heard, float(np.mean([(earlier * later).sum() for earlier, later in zip(before, shares[1:])]))


# One set


def inception_score(logits, weights=None, num_splits=1):
    """exp of the mean KL(p(class | clip) || p(class)), posteriors by softmax: from 1 to the number of classes.

    High where the posteriors of each clip are concentrated and the classes of the set are many. It uses no reference,
    and grows with the number of clips: compare at the same count and the same `num_splits`.

    Args:
        num_splits (`int`): score parts of the set and average, as published figures do with 10. Clip i is in part
            i mod `num_splits`.

    Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    (logits,) = check_rows(logits=logits)
    if not 1 <= num_splits <= len(logits):
        raise ValueError(f"`num_splits` must be from 1 to the number of clips, {len(logits)}, got {num_splits}.")
    weights = as_weights(weights, len(logits))
    posteriors = softmax(logits, axis=1)
    entropies = (posteriors * log_softmax(logits, axis=1)).sum(1)  # negative
    scores = []
    for first in range(num_splits):
        part = slice(first, None, num_splits)
        if (total := weights[part].sum()) > 0:
            marginal = weights[part] @ posteriors[part] / total
            scores.append(math.exp(weights[part] @ entropies[part] / total - xlogy(marginal, marginal).sum()))
    return float(np.mean(scores))


def weighted_mean(values, weights=None):
    """Mean over the clips. NaN values are left out."""
    values = np.asarray(values, np.float64)
    weights = as_weights(weights, len(values)) * np.isfinite(values)
    return float(weights @ np.nan_to_num(values) / weights.sum()) if weights.sum() else math.nan


# Bootstrap


def resample(num_units, num_resamples, seed):
    """Bootstrap weights of shape `(num_resamples, num_units)`: how often each of `num_units` is drawn, with
    replacement, in as many draws. Equal arguments give equal weights, so that differences are paired."""
    rng = np.random.default_rng([seed, num_units])
    return rng.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_resamples)


def interval(value, resampled, confidence=0.95, centred=False):
    """Percentile bootstrap interval.

    Args:
        centred (`bool`): shift it by `value` minus the mean of the resampled values, for metrics that depend on the
            number of distinct clips (Frechet distance, inception score): a resample has only 63% of them, so that the
            percentiles themselves need not even contain `value`. The interval is then the variation with other clips
            at the same count, not the distance from the limit of many clips. For the Frechet distance of few clips it
            is mostly too wide, by a factor of up to 2, and was 7% too narrow at worst (measured on Gaussians).

    Returns:
        `(low, high)`, NaN where the resamples do not differ.

    Source: Efron and Tibshirani 1993, chapters 10 and 13.
    """
    resampled = np.asarray(resampled, np.float64)
    resampled = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or len(resampled) < 2 or resampled.min() == resampled.max():
        return math.nan, math.nan
    tail = 50 * (1 - confidence)
    low, high = np.percentile(resampled, [tail, 100 - tail]) + (value - resampled.mean() if centred else 0)
    return float(low), float(high)


def probability_better(difference, resampled, higher_is_better, centred=False):
    """Probability that the second of two systems is the better one, by paired bootstrap.

    Args:
        difference (`float`): its value minus that of the first, on all clips.
        resampled: the same on the resamples, which both systems share (`resample`).
        centred (`bool`): as in `interval`.

    Returns:
        Share of the resampled differences in favour of the second; ties count half.
    """
    resampled = np.asarray(resampled, np.float64)
    resampled = resampled[np.isfinite(resampled)]
    if not len(resampled) or not math.isfinite(difference):
        return math.nan
    resampled = (resampled + (difference - resampled.mean() if centred else 0)) * (1 if higher_is_better else -1)
    return float(((resampled > 0) + 0.5 * (resampled == 0)).mean())
