import json
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score

from ssl_pretrain.errors import UsageError
from ssl_pretrain.probe import few_shot, knn, linear, retrieval, statistics
from ssl_pretrain.probe.objects import Objects, leave_one_out
from ssl_pretrain.probe.statistics import Interval, Tally, bootstrap, confusion, counts, figures, paired, tally, verdict

PROBES = {
    "knn": partial(knn.judge, k=60),  # more than some queries have in other units
    "linear": linear.judge,
    "few_shot": partial(few_shot.judge, shots=(1, 5), draws=6),
    "retrieval": retrieval.judge,
}


def objects_of(label_N, unit_N, train_N, classes=5):
    """Objects without pixels: probes look at features only."""
    count = len(label_N)
    return Objects(
        crops_NSSC=np.zeros((count, 1, 1, 3), np.uint8), label_N=label_N, image_N=unit_N, unit_N=unit_N,
        train_N=train_N, square_N3=np.zeros((count, 3)), classes=tuple("abcdefgh"[:classes]), source="", rule="",
        split="", seed=0, fingerprint="", unreadable_images=0, degenerate_objects=0, problems=(),
    )  # fmt: skip


def length_1(z_ND):
    return (z_ND / np.linalg.norm(z_ND, axis=1, keepdims=True)).astype(np.float32)


def drawn_objects(seed, count=80, units=9, classes=3, dim=6):
    """Objects of random units, labels and sides, and features that say something of their labels."""
    draw = np.random.default_rng(seed)
    label_N, unit_N = draw.integers(classes, size=count), 3 * draw.integers(units, size=count)
    z_ND = length_1(draw.normal(size=(count, dim)) + 1.5 * np.eye(classes, dim)[label_N])
    return objects_of(label_N, unit_N, draw.random(count) < 0.7, classes), z_ND


# --- the figures and their intervals ----------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_figures_equal_sklearn(seed):
    draw = np.random.default_rng(seed)
    true_Q = draw.integers(6, size=50) // draw.integers(1, 3)  # at times only the lower half of the classes
    predicted_Q = np.where(draw.random(50) < 0.6, true_Q, draw.integers(6, size=50))
    ours = figures(counts(true_Q, predicted_Q, np.zeros(50, int), 8)[0])
    assert ours[0] == pytest.approx((true_Q == predicted_Q).mean())
    assert ours[2] == pytest.approx(f1_score(true_Q, predicted_Q, average="macro", zero_division=0))
    # sklearn warns, but rightly leaves it out, when a class was predicted that no query has
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert ours[1] == pytest.approx(balanced_accuracy_score(true_Q, predicted_Q))
    np.testing.assert_array_equal(
        confusion(true_Q, predicted_Q, 8), confusion_matrix(true_Q, predicted_Q, labels=range(8))
    )


def predictions(images, objects_each, share=0.7, clustered=False, seed=0):
    """True and predicted labels and images; errors at random, or whole images at a time."""
    draw = np.random.default_rng(seed)
    image_Q = np.repeat(np.arange(images), objects_each)
    true_Q = draw.integers(3, size=len(image_Q))
    hit_Q = (draw.random(images) < share)[image_Q] if clustered else draw.random(len(image_Q)) < share
    return true_Q, np.where(hit_Q, true_Q, (true_Q + 1) % 3), image_Q


def widths(true_Q, predicted_Q, unit_Q):
    intervals = bootstrap(counts(true_Q, predicted_Q, unit_Q, 3), 1000, 0)
    assert all(x.low <= x.value <= x.high for x in intervals)
    return np.array([x.high - x.low for x in intervals])


def test_interval_of_a_perfect_prediction():
    true_Q, _, image_Q = predictions(20, 5)
    assert {(x.value, x.low, x.high) for x in bootstrap(counts(true_Q, true_Q, image_Q, 3), 200, 0)} == {
        (1.0, 1.0, 1.0)
    }


def test_interval_is_wider_with_fewer_images_and_with_clustered_errors():
    many, few = widths(*predictions(200, 10)), widths(*predictions(20, 10))
    assert (few > 2 * many).all()
    # 200 objects at random: about 1.96 * 2 * sqrt(.7 * .3 / 200)
    assert few[0] == pytest.approx(0.127, abs=0.04)
    true_Q, predicted_Q, image_Q = predictions(40, 20, clustered=True)
    by_image, by_object = widths(true_Q, predicted_Q, image_Q), widths(true_Q, predicted_Q, np.arange(800))
    assert (by_image > 2.5 * by_object).all()  # sqrt(20) = 4.5 for perfectly clustered errors


def one_by_one(image_Q, units, rounds, seed):
    """The objects of each round, resampled image by image."""
    times_RU = np.concatenate(list(statistics.resamples(units, rounds, seed)))
    assert times_RU.shape == (rounds, units) and (times_RU.sum(axis=1) == units).all()
    for times_U in times_RU.astype(int):
        drawn = [np.flatnonzero(image_Q == u) for u, times in enumerate(times_U) for _ in range(times)]
        yield np.concatenate(drawn)


def test_bootstrap_equals_resampling_the_images_one_by_one():
    true_Q, predicted_Q, image_Q = predictions(12, 6)
    rounds = []
    for drawn in one_by_one(image_Q, 12, 50, 3):
        t, p = true_Q[drawn], predicted_Q[drawn]
        rounds.append([(t == p).mean(), balanced_accuracy_score(t, p), f1_score(t, p, average="macro")])
    low, high = np.percentile(rounds, [2.5, 97.5], axis=0)
    for interval, a, b in zip(bootstrap(counts(true_Q, predicted_Q, image_Q, 3), 50, 3), low, high, strict=True):
        assert (interval.low, interval.high) == (pytest.approx(a), pytest.approx(b))


def test_resampling_is_seeded_and_in_blocks():
    again = [np.concatenate(list(statistics.resamples(30, 40, seed))) for seed in (0, 0, 1)]
    assert (again[0] == again[1]).all() and (again[0] != again[2]).any()
    blocks = list(statistics.resamples(1_500_000, 3, 0))
    assert [len(block) for block in blocks] == [2, 1]
    assert (blocks[0][0] != blocks[1][0]).any()


def test_known_intervals_stay_to_the_last_digit():
    """As first published: whoever scored a backbone before gets the same figures again."""
    intervals = bootstrap(counts(*predictions(12, 6), 3), 200, 7)
    assert [(x.low, x.value, x.high) for x in intervals] == [
        (0.4722222222222222, 0.5972222222222222, 0.6944444444444444),
        (0.49192620650953983, 0.6042490842490843, 0.6932914653784219),
        (0.4727213515967316, 0.5987472766884532, 0.6906680424601317),
    ]


# --- tallies ----------------------------------------------------------------------------------------------------------


def test_a_tally_is_its_counts_by_ascending_unit():
    true_Q, predicted_Q, unit_Q = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1]), np.array([9, 2, 9, 2])
    found = tally(true_Q, predicted_Q, unit_Q, 2)
    assert found.names == ("accuracy", "balanced_accuracy", "macro_f1")
    np.testing.assert_array_equal(found.unit_U, [2, 9])
    # objects, predictions and hits by class: unit 2 has one of each class, both wrong
    np.testing.assert_array_equal(found.sums_UM, [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    assert found.sums_UM.dtype == np.float64
    assert tuple(found.intervals(100, 4).values()) == bootstrap(counts(true_Q, predicted_Q, unit_Q, 2), 100, 4)
    assert {x.value for x in found.intervals(5).values()} == {0.5}


def test_draws_side_by_side_are_their_mean():
    true_Q, first_Q, unit_Q = predictions(15, 4, seed=1)
    other_Q = np.roll(first_Q, 1)
    both = tally(np.tile(true_Q, 2), np.concatenate([first_Q, other_Q]), np.tile(unit_Q, 2), 3, weight=0.5)
    one, two = (tally(true_Q, predicted_Q, unit_Q, 3).intervals(10) for predicted_Q in (first_Q, other_Q))
    for name in ("accuracy", "balanced_accuracy"):
        assert both.intervals(10)[name].value == pytest.approx((one[name].value + two[name].value) / 2)
    assert both.sums_UM[:, :3].sum() == 60
    # an object that weighs less than 1 is not counted as less than itself
    light = tally(np.array([0, 1]), np.array([0, 0]), np.array([0, 1]), 2, weight=0.05).intervals(10)
    assert (light["accuracy"].value, light["balanced_accuracy"].value) == (0.5, 0.5)


def test_rounds_with_nothing_to_judge_do_not_count():
    """One unit of four has anything to say: in a third of the rounds it is not drawn."""
    sums_UM = np.array([[0.3, 1.0], [0, 0], [0, 0], [0, 0]])
    found = Tally(("map", "map_balanced"), sums_UM, retrieval.means).intervals(200)
    assert found["map"] == found["map_balanced"] == Interval(0.3, 0.3, 0.3)


# --- differences and verdicts -----------------------------------------------------------------------------------------


def test_paired_equals_resampling_both_one_by_one():
    true_Q, mine_Q, image_Q = predictions(12, 6)
    other_Q = np.where(np.arange(72) % 5 == 0, (true_Q + 2) % 3, mine_Q)
    rounds = [
        balanced_accuracy_score(true_Q[drawn], mine_Q[drawn]) - balanced_accuracy_score(true_Q[drawn], other_Q[drawn])
        for drawn in one_by_one(image_Q, 12, 50, 3)
    ]
    found = paired(tally(true_Q, mine_Q, image_Q, 3), tally(true_Q, other_Q, image_Q, 3), 50, 3)["balanced_accuracy"]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(rounds, [2.5, 97.5])))
    expected = balanced_accuracy_score(true_Q, mine_Q) - balanced_accuracy_score(true_Q, other_Q)
    assert found.value == pytest.approx(expected)


def test_a_difference_is_surer_than_two_figures_and_turns_round():
    """Whole images are hard for both; one of the two is right in a few more."""
    true_Q, mine_Q, image_Q = predictions(60, 10, share=0.5, clustered=True)
    other_Q = np.where(np.arange(600) % 12 == 0, (true_Q + 1) % 3, mine_Q)
    mine, other = tally(true_Q, mine_Q, image_Q, 3), tally(true_Q, other_Q, image_Q, 3)
    there, back = paired(mine, other), paired(other, mine)
    for name, x in there.items():
        assert (x.value, x.low, x.high) == pytest.approx((-back[name].value, -back[name].high, -back[name].low))
    figure, reference = mine.intervals()["accuracy"], other.intervals()["accuracy"]
    difference = there["accuracy"]
    assert difference.value == pytest.approx(figure.value - reference.value)
    assert figure.low < reference.high, "their intervals overlap"
    assert difference.low > 0, "and yet one is better"
    same = paired(mine, mine)
    assert set(same.values()) == {Interval(0.0, 0.0, 0.0)}


def test_what_cannot_be_paired():
    true_Q, mine_Q, unit_Q = predictions(6, 4)
    mine = tally(true_Q, mine_Q, unit_Q, 3)
    with pytest.raises(UsageError, match="same query images"):
        paired(mine, tally(true_Q, mine_Q, unit_Q + 1, 3))
    with pytest.raises(UsageError, match="same query images"):
        paired(mine, Tally(mine.names, mine.sums_UM[:5], mine.figures))
    with pytest.raises(UsageError, match="accuracy, balanced_accuracy, macro_f1 and map"):
        paired(mine, Tally(("map",), mine.sums_UM, mine.figures))
    assert paired(mine, Tally(mine.names, mine.sums_UM, mine.figures))["accuracy"].value == 0


def test_a_single_unit_proves_nothing():
    true_Q = np.array([0, 1, 0, 1])
    mine, other = tally(true_Q, true_Q, np.zeros(4, int), 2), tally(true_Q, 1 - true_Q, np.zeros(4, int), 2)
    found = paired(mine, other)["accuracy"]
    assert found == Interval(1.0, -1.0, 1.0)
    assert "not distinguishable" in verdict(found, "mine", "other", "accuracy")


@pytest.mark.parametrize(
    "interval, sentence",
    [
        ((0.102, 0.071, 0.13), "a is better than b in macro f1 by 10.2 points [7.1, 13.0]"),
        ((-0.102, -0.13, -0.071), "a is worse than b in macro f1 by 10.2 points [7.1, 13.0]"),
        ((0.01, 0.0004, 0.02), "a is better than b in macro f1 by 1.00 points [0.04, 2.00]"),
        ((0.01, 0.001, 0.02), "a is better than b in macro f1 by 1.0 points [0.1, 2.0]"),
        ((0.012, -0.008, 0.031), "at most 3.1 points better, at most 0.8 points worse"),
        ((0.012, 0.0, 0.031), "at most 3.1 points better, at most 0.0 points worse"),
        ((-0.012, -0.031, 0.0), "at most 0.0 points better, at most 3.1 points worse"),
        ((0.0, 0.0, 0.0), "a is not distinguishable from b in macro f1 with this much data: at most 0.0 points better"),
        ((1e-17, 1e-17, 2e-17), "not distinguishable"),
    ],
)
def test_verdicts(interval, sentence):
    assert sentence in verdict(Interval(*interval), "a", "b", "macro_f1")


# --- what every probe promises ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES)
@given(st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_nothing_of_its_own_unit_speaks_for_a_query(name, seed):
    """Other features and labels of a unit's bank objects change nothing in that unit's row, to the last digit."""
    objects, z_ND = drawn_objects(seed)
    judge, draw = PROBES[name], np.random.default_rng(seed + 1)
    before = judge(objects, z_ND).tally
    row = int(draw.integers(len(before.unit_U)))
    own = np.flatnonzero(objects.train_N & (objects.unit_N == before.unit_U[row]))
    # all of class 0 beside the unit's own queries: whoever asks them is led astray
    spoilt_z, spoilt_y = z_ND.copy(), objects.label_N.copy()
    queries = np.flatnonzero(objects.query_N & (objects.unit_N == before.unit_U[row]))
    spoilt_z[own] = length_1(z_ND[draw.choice(queries, len(own))] + 0.01 * draw.normal(size=(len(own), 6)))
    spoilt_y[own] = draw.integers(3, size=len(own))
    spoilt = objects_of(spoilt_y, objects.unit_N, objects.train_N, 3)
    after = judge(spoilt, spoilt_z).tally
    np.testing.assert_array_equal(after.unit_U, before.unit_U)
    np.testing.assert_array_equal(after.sums_UM[row], before.sums_UM[row])


HITS = {"knn": 2, "linear": 2, "few_shot": 1, "retrieval": 0}
"""Which block of a row's sums by class tells how the queries of a class fared."""


@pytest.mark.parametrize("name", PROBES)
@given(st.integers(0, 2**31))
@settings(max_examples=12, deadline=None)
def test_nor_without_a_split(name, seed):
    """Everything is bank and query: the other classes of a unit do not matter to a class in it."""
    objects, z_ND = drawn_objects(seed)
    objects, judge = leave_one_out(objects), PROBES[name]
    before = judge(objects, z_ND).tally
    row = seed % len(before.unit_U)
    here = objects.unit_N == before.unit_U[row]
    kept = objects.label_N[here][0]
    others = np.flatnonzero(here & (objects.label_N != kept))
    spoilt = z_ND.copy()
    spoilt[others] = z_ND[np.flatnonzero(here & (objects.label_N == kept))[0]]
    after = judge(objects, spoilt).tally
    column = 3 * HITS[name] + kept
    assert after.sums_UM[row, column] == before.sums_UM[row, column]


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("everything", [False, True])
def test_a_probe_repeats_itself_and_speaks_json(name, everything):
    objects, z_ND = drawn_objects(5)
    objects = leave_one_out(objects) if everything else objects
    first, again = (PROBES[name](objects, z_ND, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.tally.sums_UM, again.tally.sums_UM)
    assert json.loads(json.dumps(first.settings, allow_nan=False)) == again.settings and first.notes == again.notes
    units = np.unique(objects.unit_N[objects.query_N])
    assert first.tally.sums_UM.dtype == np.float64 and len(first.tally.sums_UM) == len(units)
    np.testing.assert_array_equal(first.tally.unit_U, units)
    found = first.tally.intervals(50)
    assert tuple(found) == first.tally.names and all(0 <= x.low <= x.value <= x.high <= 1 for x in found.values())
    if name != "retrieval":
        truth_C = np.bincount(objects.label_N[objects.query_N], minlength=3)
        np.testing.assert_allclose(first.confusion_CC.sum(axis=1), truth_C)


@pytest.mark.parametrize("name", PROBES)
def test_features_that_only_know_their_unit_are_worth_nothing(name):
    """Every unit has a colour of its own and objects of one class: a leak would answer all, and chance is a fourth."""
    draw, units = np.random.default_rng(0), 120
    unit_N = np.repeat(np.arange(units), 5)
    label_N = draw.permutation(np.arange(units) % 4)[unit_N]
    z_ND = length_1(np.eye(units)[unit_N] + 0.05 * draw.normal(size=(600, units)))
    objects = leave_one_out(objects_of(label_N, unit_N, np.ones(600, bool), 4))
    found = PROBES[name](objects, z_ND)
    first = found.tally.intervals(10)[found.tally.names[1]].value
    assert first == pytest.approx(0.25, abs=0.08)


def test_the_k_nn_of_a_protocol_is_the_score():
    objects, z_ND = drawn_objects(2)
    judged, found = (
        knn.judge(objects, z_ND, k=500, temperature=0.1),
        knn.score(objects, z_ND, "x", k=500, temperature=0.1),
    )
    intervals = judged.tally.intervals()
    expected = (found.accuracy, found.balanced_accuracy, found.macro_f1)
    assert tuple(intervals[name] for name in knn.FIGURES) == expected
    np.testing.assert_array_equal(judged.confusion_CC, found.confusion_CC)
    assert judged.settings == {"k": 500, "temperature": 0.1} and "k [500]" in judged.notes[0]
    for wrong in ({"k": 0}, {"temperature": 0.0}, {"temperature": np.inf}):
        with pytest.raises(UsageError, match="k is 1 or more"):
            knn.judge(objects, z_ND, **wrong)
