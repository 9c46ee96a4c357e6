import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.evaluation.metrics import (
    begin_in_sequence,
    clap_score,
    class_recall,
    event_scores,
    frechet_distance,
    frechet_warning,
    gaussian_bandwidth,
    in_sequence,
    inception_score,
    interval,
    kernel_distance,
    kernel_matrices,
    kl_sigmoid,
    kl_sigmoid_original,
    kl_softmax,
    nearest_similarity,
    probability_better,
    resample,
    sequence_recall,
    weighted_mean,
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def with_moments(mean, covariance, num_clips, seed=0):
    """Samples whose mean and unbiased covariance are exactly these."""
    x = normal(num_clips, len(mean), seed=seed)
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(np.asarray(covariance, float)).T + mean


def repeated(rows, weights):
    return np.repeat(rows, weights, axis=0)


# Frechet distance


def test_the_frechet_distance_of_known_gaussians_is_the_formulas():
    # commuting covariances: |m|^2 + sum of (sqrt(a) - sqrt(b))^2 over the common axes
    x = with_moments([0, 0, 0], np.diag([4.0, 1.0, 9.0]), 50)
    y = with_moments([1, 2, 2], np.diag([1.0, 1.0, 4.0]), 80, seed=1)
    assert frechet_distance(x, y) == pytest.approx(9 + 1 + 0 + 1, rel=1e-10)
    # of one dimension: (m - n)^2 + (s - t)^2
    x, y = normal(40, 1), 3 * normal(30, 1, seed=1) + 2
    expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [(40, 50), (200, 30), (300, 500)])
def test_the_frechet_distance_is_scipys(counts):
    x, y = (normal(count, 24, seed=i) @ normal(24, 24, seed=2 + i) for i, count in enumerate(counts))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_the_frechet_distance_is_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    x, y = torch.tensor(normal(60, 16)), torch.tensor(normal(90, 16, seed=1) * 1.7 + 0.3)
    expected = fid._compute_fid(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-8)


def test_with_fewer_clips_than_dimensions_the_frechet_distance_stays_exact():
    """Clips in a plane of a space of 500 dimensions: the distance within the plane."""
    x, y = normal(7, 2), normal(9, 2, seed=1) * [2, 0.5]
    plane = np.linalg.qr(normal(500, 2, seed=2))[0]
    assert frechet_distance(x @ plane.T, y @ plane.T) == pytest.approx(frechet_distance(x, y), rel=1e-10)
    assert frechet_distance(x @ plane.T, x[::-1] @ plane.T) == pytest.approx(0, abs=1e-12)
    assert "singular" in frechet_warning(9, 2000, 500) and frechet_warning(501, 2000, 500) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8), st.integers(0, 999))
def test_the_frechet_distance_is_a_metric_of_sets(num_x, num_y, dim, seed):
    x, y = normal(num_x, dim, seed=seed), normal(num_y, dim, seed=seed + 1) + 1
    distance = frechet_distance(x, y)
    assert distance >= 0 and distance == pytest.approx(frechet_distance(y, x), abs=1e-9)
    rotation = scipy.stats.ortho_group(dim, seed=seed).rvs() if dim > 1 else np.eye(1)
    assert frechet_distance(x @ rotation + 5, y @ rotation + 5) == pytest.approx(distance, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("dim", [3, 30])
def test_weights_are_repetitions(dim):
    x, y = normal(20, dim), normal(15, dim, seed=1)
    a, b = (np.random.default_rng(i).integers(0, 4, len(each)) for i, each in enumerate((x, y)))
    assert frechet_distance(x, y, a, b) == pytest.approx(frechet_distance(repeated(x, a), repeated(y, b)), rel=1e-9)
    logits = normal(20, 6)
    assert inception_score(logits, a) == pytest.approx(inception_score(repeated(logits, a)), rel=1e-12)
    assert weighted_mean(x[:, 0], a) == pytest.approx(repeated(x[:, 0], a).mean(), rel=1e-12)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((0, 3)), np.zeros((2, 3)), "`x` must be of shape"),
        (np.zeros((2, 3)), np.full((2, 3), math.nan), "`y` must be finite"),
        (np.zeros((2, 3)), np.zeros((2, 4)), "`x` has 3, `y` has 4"),
    ],
)
def test_what_is_no_set_of_embeddings_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(x, y)


# Kernel distance


def brute_force_mmd(x, y, kernel):
    within = [
        np.mean([kernel(a, b) for a, b in itertools.permutations(rows, 2)])  # i != j
        for rows in (x, y)
    ]
    return within[0] + within[1] - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_the_kernel_distance_is_the_sum_over_pairs():
    x, y = normal(6, 4), normal(5, 4, seed=1) + 0.5
    width = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(y, 2)])
    assert gaussian_bandwidth(y) == pytest.approx(width)
    expected = brute_force_mmd(x, y, lambda a, b: math.exp(-((a - b) ** 2).sum() / (2 * width**2)))
    assert kernel_distance(kernel_matrices(x, y)) == pytest.approx(100 * expected, rel=1e-10)
    expected = brute_force_mmd(x, y, lambda a, b: (a @ b / 4 + 1) ** 3)
    assert kernel_distance(kernel_matrices(x, y, "polynomial")) == pytest.approx(100 * expected, rel=1e-10)


def test_the_polynomial_kernel_distance_is_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid", reason="torchmetrics is not installed")
    x, y = torch.tensor(normal(40, 8)), torch.tensor(normal(40, 8, seed=1) + 0.3)
    expected = 100 * float(kid.poly_mmd(x, y))
    assert kernel_distance(kernel_matrices(x, y, "polynomial")) == pytest.approx(expected, rel=1e-8)


def test_the_kernel_distance_of_gaussians_is_the_known_one_at_any_count():
    """Unbiased: the mean over many small sets is the value of endless ones, in closed form for the Gaussian kernel."""
    width, shift, dim = 2.0, 1.0, 3
    same = (width**2 / (width**2 + 2)) ** (dim / 2)
    expected = 100 * 2 * same * (1 - math.exp(-(shift**2) / (2 * (width**2 + 2))))
    for count in (5, 40):
        values = []
        for seed in range(600):
            x, y = normal(count, dim, seed=2 * seed), normal(count, dim, seed=2 * seed + 1)
            values.append(kernel_distance(kernel_matrices(x + [shift, 0, 0], y, bandwidth=width)))
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(len(values)))


def test_clips_drawn_twice_do_not_make_the_kernel_distance_larger():
    """A naive bootstrap counts a clip as its own neighbour, which adds about 1/n to every resampled figure."""
    x, y = normal(30, 8), normal(30, 8, seed=1)
    matrices = kernel_matrices(x, y)
    weights = resample(30, 800, 0), resample(30, 800, 1)
    resampled = [kernel_distance(matrices, *each) for each in zip(*weights, strict=True)]
    naive = [
        kernel_distance(kernel_matrices(repeated(x, a), repeated(y, b), bandwidth=gaussian_bandwidth(y)))
        for a, b in zip(*(each[:200] for each in weights), strict=True)
    ]
    error = 4 * np.std(resampled) / math.sqrt(800)
    assert np.mean(resampled) == pytest.approx(kernel_distance(matrices), abs=error)
    assert np.mean(naive) > kernel_distance(matrices) + 2


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="`kernel` must be 'gaussian' or 'polynomial'"):
        kernel_matrices(normal(3, 2), normal(3, 2), "cubic")


# Pairs


def test_kl_of_known_posteriors():
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.6, 0.3]])
    assert kl_softmax(np.log(p), np.log(q) + 7)[0] == pytest.approx(scipy.stats.entropy(p[0], q[0]), abs=2e-5)
    logit = scipy.special.logit
    each = [scipy.stats.entropy([a, 1 - a], [b, 1 - b]) for a, b in zip(p[0], q[0], strict=True)]
    assert kl_sigmoid(logit(p), logit(q))[0] == pytest.approx(sum(each), rel=1e-12)
    half = (p * np.log(p / (q + 1e-6))).sum()
    assert kl_sigmoid_original(logit(p), logit(q))[0] == pytest.approx(half, rel=1e-12)


def test_kl_is_torchs_as_audioldm_eval_calls_it():
    reference, generated = torch.tensor(normal(5, 11) * 4), torch.tensor(normal(5, 11, seed=1) * 4)
    softmax, sigmoid = (
        torch.nn.functional.kl_div((f(generated) + 1e-6).log(), f(reference), reduction="none").sum(1).numpy()
        for f in (lambda logits: logits.softmax(1), torch.sigmoid)
    )
    np.testing.assert_allclose(kl_softmax(reference, generated), softmax, rtol=1e-10)
    np.testing.assert_allclose(kl_sigmoid_original(reference, generated), sigmoid, rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0.1, 300))
def test_kl_is_finite_and_not_negative_and_zero_only_for_equals(seed, scale):
    p, q = scale * normal(4, 7, seed=seed), scale * normal(4, 7, seed=seed + 1)
    for metric in (kl_softmax, kl_sigmoid):
        values = metric(p, q)
        assert np.isfinite(values).all() and (values > -1e-5).all() and np.abs(metric(p, p)).max() < 1e-5
        assert metric(p, q).max() > 1e-3


def test_clap_score_is_the_cosine():
    text, sound = np.array([[3.0, 4], [1, 0], [0, 0]]), np.array([[4.0, 3], [-2, 0], [1, 1]])
    np.testing.assert_allclose(clap_score(text, sound), [24 / 25, -1, 0])


def test_nearest_similarity_is_the_largest_cosine():
    others = np.array([[3.0, 0], [0, 2], [0, 0]])
    np.testing.assert_allclose(nearest_similarity([[0.5, 0], [1, 1], [-3, -4]], others), [1, math.sqrt(0.5), 0])
    with pytest.raises(ValueError, match="`embeddings` has 3, `others` has 2"):
        nearest_similarity(np.ones((1, 3)), others)


def test_class_recall_asks_for_any_right_class_among_the_k_best():
    logits = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3]])
    np.testing.assert_equal(class_recall(logits, [{1, 3}, {0, 1}, set()], k=2), [1, 0, math.nan])
    assert weighted_mean([1, 0, math.nan]) == 0.5  # what has no label does not count


def test_inception_score_of_known_sets():
    sure = 50 * np.eye(4)
    assert inception_score(sure) == pytest.approx(4)  # each clip of a class of its own
    assert inception_score(np.repeat(sure[:1], 5, 0)) == pytest.approx(1)  # all of one class
    assert inception_score(np.zeros((5, 4))) == pytest.approx(1)  # none of any
    assert inception_score(np.concatenate([sure, sure]), num_splits=2) == pytest.approx(
        2
    )  # 0, 2 and 1, 3 in the parts
    with pytest.raises(ValueError, match="`num_splits` must be from 1 to the number of clips, 4, got 5"):
        inception_score(sure, num_splits=5)


# Intervals


def test_resamples_are_the_same_for_the_same_numbers_and_draw_each_unit_once_on_average():
    weights = resample(50, 400, seed=3)
    assert (weights.sum(1) == 50).all() and (resample(50, 400, seed=3) == weights).all()
    assert (resample(50, 400, seed=4) != weights).any()
    assert weights.mean(0) == pytest.approx(1, abs=0.25)
    assert (weights == 0).mean() == pytest.approx(math.exp(-1), abs=0.01)


def test_the_interval_of_a_mean_is_scipys():
    values = normal(80) ** 2
    resampled = [weighted_mean(values, each) for each in resample(80, 4000, 0)]
    expected = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0)
    low, high = interval(values.mean(), resampled)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.03)
    assert interval(values.mean(), resampled, confidence=0.5)[1] < high
    assert all(map(math.isnan, interval(1.0, [1.0, 1.0])))


def test_the_interval_of_the_frechet_distance_says_how_much_other_clips_would_change_it():
    """Its width against the spread of the figure over many sets of fresh clips: not too narrow, at most twice as wide.
    The percentiles as they are would not even hold the figure."""
    count, dim = 60, 20
    draws = [
        frechet_distance(normal(count, dim, seed=2 * s), normal(count, dim, seed=2 * s + 1) * 1.3) for s in range(150)
    ]
    x, y = normal(count, dim), normal(count, dim, seed=1) * 1.3
    value = frechet_distance(x, y)
    weights = zip(resample(count, 300, 0), resample(count, 300, 1), strict=True)
    resampled = [frechet_distance(x, y, *each) for each in weights]
    low, high = interval(value, resampled, centred=True)
    assert low < value < high
    assert interval(value, resampled)[0] > value
    assert 0.9 < (high - low) / (2 * 1.96) / np.std(draws) < 2.2


def test_the_probability_of_being_better_is_that_of_a_test_on_pairs():
    first = normal(40)
    second = first + 0.1 + 0.5 * normal(40, seed=1)
    weights = resample(40, 4000, 0)
    resampled = weights @ (second - first) / 40
    difference = (second - first).mean()
    p_value = scipy.stats.ttest_rel(second, first, alternative="greater").pvalue
    assert probability_better(difference, resampled, True) == pytest.approx(1 - p_value, abs=0.02)
    assert probability_better(difference, resampled, False) == pytest.approx(p_value, abs=0.02)
    assert probability_better(0.0, [0.0, 0.0], True) == 0.5


def test_sequence_recall_asks_for_every_event_among_the_k_best():
    logits = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [3, 2, 1, 0]])
    sequences = [[{0}, {1, 3}], [{0}, {3}], []]
    np.testing.assert_array_equal(sequence_recall(logits, sequences, k=2), [1.0, 0.0, math.nan])


def test_events_are_in_order_if_each_comes_later_than_the_one_before():
    logits = np.full((10, 4), -9.0)
    logits[1:3, 0] = logits[4:6, 1] = logits[8:, 2] = 3
    assert in_sequence(logits, [{0}, {1}, {2}]) == 1 and in_sequence(logits, [{0}, {2}, {1}]) == 0
    assert in_sequence(logits, [{1}, {0}]) == 0
    logits[7:, 3] = 5  # a class that both events have says nothing about which of them it is
    assert in_sequence(logits, [{1, 3}, {0, 3}]) == 0 and in_sequence(logits, [{0, 3}, {1, 3}]) == 1
    assert in_sequence(logits, [{0}, {0}]) == 0  # the same time is no order
    assert math.isnan(in_sequence(logits[:1], [{0}, {1}]))


def test_noise_is_in_order_as_often_as_chance():
    rng = np.random.default_rng(0)
    for sequence, chance in (([{0, 1}, {2}], 1 / 2), ([{0}, {1}, {2}], 1 / 6)):
        orders = [in_sequence(rng.normal(-3, 2, (9, 6)), sequence) for _ in range(3000)]
        assert np.mean(orders) == pytest.approx(chance, abs=0.03)


def test_events_begin_in_order_if_each_reaches_half_of_its_peak_later():
    logits = np.full((10, 4), -9.0)
    logits[1:, 0] = logits[4:6, 1] = logits[8:, 2] = 3  # the first goes on behind the others
    assert begin_in_sequence(logits, [{0}, {1}, {2}]) == 1 and begin_in_sequence(logits, [{1}, {0}]) == 0
    assert in_sequence(logits, [{0}, {1}]) == 0  # its mean time is later, though it begins first
    assert begin_in_sequence(logits, [{0}, {0}]) == 1 / 2  # at once: one order of two
    assert begin_in_sequence(logits, [{0}, {0}, {0}]) == pytest.approx(1 / 6)
    assert begin_in_sequence(logits, [{0}, {1}, {1}]) == 1 / 2 and begin_in_sequence(logits, [{1}, {1}, {0}]) == 0
    assert math.isnan(begin_in_sequence(logits[:1], [{0}, {1}]))


def test_sounds_without_an_order_begin_in_it_as_often_as_chance():
    rng = np.random.default_rng(0)
    for sequence, chance in (([{0, 1}, {2}], 1 / 2), ([{0}, {1}, {2}], 1 / 6)):
        orders = [begin_in_sequence(rng.normal(-1, 1, (9, 6)), sequence) for _ in range(3000)]
        # two classes reach their peak sooner than one: only events alike have no order
        assert np.mean(orders) == pytest.approx(chance, abs=0.03 if len(sequence) == 3 else 0.12)


def test_events_score_by_their_probabilities_and_their_order():
    logits = np.full((4, 3), -40.0)
    logits[:2, 0] = logits[2:, 1] = 0  # one half each, with probability 0.5
    clip = np.array([0.0, -1.0, 5.0])
    heard, order = event_scores(clip, logits, [{0}, {1}])
    np.testing.assert_allclose(heard, np.log(1 / (1 + np.exp([0.0, 1.0]))))
    assert order == pytest.approx(1) and event_scores(clip, logits, [{1}, {0}])[1] == pytest.approx(0)
    assert event_scores(clip, logits, [{0}, {0}])[1] == pytest.approx(0.5)
    assert event_scores(clip, logits, [{0}, {1}, {0}])[1] == pytest.approx(0.5)  # one in order, one not
    # a class of both counts for neither; of two own ones the most probable does
    np.testing.assert_allclose(event_scores(clip, logits, [{0, 2}, {1, 2}])[0], heard)
    assert event_scores(clip, logits, [{0, 1}])[0] == pytest.approx([math.log(0.5)])
    for patches, events in ((None, [{0}, {1}]), (logits[:1], [{0}, {1}]), (logits, [{0}])):
        assert event_scores(clip, patches, events)[1] is None
