import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestCentroid
from test_statistics import drawn_objects, length_1, objects_of

from ssl_pretrain import rng
from ssl_pretrain.errors import DataError, UsageError
from ssl_pretrain.probe import few_shot
from ssl_pretrain.probe.objects import leave_one_out


def lines_of(objects, seed, draw):
    bank = objects.train_N
    key = rng.fold_in(rng.key(seed, "few-shot draws"), draw)
    return few_shot._lines(objects.label_N[bank], objects.unit_N[bank], len(objects.classes), key)


# --- the draw ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_a_line_holds_every_object_of_its_class_and_all_units_before_any_twice(seed):
    objects, _ = drawn_objects(seed, count=60, units=6, classes=4)
    label_M, unit_M = objects.label_N[objects.train_N], objects.unit_N[objects.train_N]
    lines = lines_of(objects, seed, 0)
    for c, line in enumerate(lines):
        np.testing.assert_array_equal(np.sort(line), np.flatnonzero(label_M == c))
        met: dict[int, int] = {}
        nth = []
        for unit in unit_M[line]:
            met[unit] = met.get(unit, 0) + 1
            nth.append(met[unit])
        assert nth == sorted(nth)


def test_draws_are_keyed_and_fair():
    objects = objects_of(np.zeros(12, int), np.arange(12), np.ones(12, bool), 1)
    first = [int(lines_of(objects, 0, draw)[0][0]) for draw in range(600)]
    # each of twelve objects stands first about 50 times; 4.5 standard deviations
    assert abs(np.bincount(first, minlength=12) - 50).max() < 31
    assert lines_of(objects, 0, 3)[0].tolist() == lines_of(objects, 0, 3)[0].tolist()
    assert lines_of(objects, 0, 3)[0].tolist() != lines_of(objects, 1, 3)[0].tolist()


# --- the probe --------------------------------------------------------------------------------------------------------


def by_hand(objects, z_ND, shots, draws, seed):
    """Hits (S, Q), means over draws, one query at a time: its examples are the first in line of other units."""
    bank = np.flatnonzero(objects.train_N)
    queries = np.flatnonzero(objects.query_N)
    hits_SQ = np.zeros((len(shots), len(queries)))
    for draw in range(draws):
        lines = [bank[line] for line in lines_of(objects, seed, draw)]
        for s, n in enumerate(shots):
            for q, query in enumerate(queries):
                taken = [line[objects.unit_N[line] != objects.unit_N[query]][:n] for line in lines]
                known = [c for c, line in enumerate(taken) if len(line)]
                means = length_1(np.stack([z_ND[taken[c]].astype(np.float64).mean(axis=0) for c in known]))
                hits_SQ[s, q] += known[int((means @ z_ND[query]).argmax())] == objects.label_N[query]
    return hits_SQ / draws


@pytest.mark.parametrize("everything", [False, True])
def test_equals_one_query_at_a_time(everything):
    objects, z_ND = drawn_objects(4, count=70, units=6, classes=4)
    objects = leave_one_out(objects) if everything else objects
    found = few_shot.judge(objects, z_ND, shots=(2, 1, 9), draws=3, seed=8)
    names = (
        "accuracy_2",
        "balanced_accuracy_2",
        "accuracy_1",
        "balanced_accuracy_1",
        "accuracy_9",
        "balanced_accuracy_9",
    )
    assert found.tally.names == names
    true_Q, unit_Q = objects.label_N[objects.query_N], objects.unit_N[objects.query_N]
    hits_SQ = by_hand(objects, z_ND, (2, 1, 9), 3, 8)
    intervals = found.tally.intervals(10)
    for hits_Q, n in zip(hits_SQ, (2, 1, 9), strict=True):
        assert intervals[f"accuracy_{n}"].value == pytest.approx(hits_Q.mean())
        balanced = np.mean([hits_Q[true_Q == c].mean() for c in np.unique(true_Q)])
        assert intervals[f"balanced_accuracy_{n}"].value == pytest.approx(balanced)
    for row, unit in zip(found.tally.sums_UM, np.unique(unit_Q), strict=True):
        np.testing.assert_array_equal(row[:4], np.bincount(true_Q[unit_Q == unit], minlength=4))
        for s, hits_Q in enumerate(hits_SQ):
            own = unit_Q == unit
            np.testing.assert_allclose(row[4 * s + 4 : 4 * s + 8], np.bincount(true_Q[own], hits_Q[own], minlength=4))
    # the confusion matrix is that of 9 shots, whatever the order
    assert np.trace(found.confusion_CC) == pytest.approx(hits_SQ[2].sum())
    np.testing.assert_allclose(found.confusion_CC.sum(axis=1), np.bincount(true_Q, minlength=4))
    assert found.settings == {"shots": [2, 1, 9], "draws": 3, "confusion_shots": 9}


def test_all_of_the_bank_as_examples_is_sklearn_s_nearest_centroid():
    """On a circle around the means' common length, the nearest by distance is the most similar by cosine."""
    draw = np.random.default_rng(0)
    label_N = np.arange(200) % 4
    offset = draw.normal(size=(25, 8))
    # every class is the same cloud turned about: the means have one length
    turned = [np.roll(offset + 3 * np.eye(8)[0], 2 * c, axis=1) for c in range(4)]
    bank_z = length_1(np.stack(turned, axis=1).reshape(100, 8))
    query_z = length_1(draw.normal(size=(100, 8)) + 2 * np.eye(8)[2 * label_N[:100]])
    objects = objects_of(label_N, np.arange(200), np.arange(200) < 100, 4)
    found = few_shot.judge(objects, np.concatenate([bank_z, query_z]), shots=(25,), draws=2)
    predicted_Q = NearestCentroid().fit(bank_z, label_N[:100]).predict(query_z)
    accuracy = (predicted_Q == label_N[100:]).mean()
    assert 0.5 < accuracy < 1 and found.tally.intervals(5)["accuracy_25"].value == pytest.approx(accuracy)


def test_more_examples_help_and_a_rare_class_counts_as_much():
    draw = np.random.default_rng(1)
    label_N = (np.arange(600) % 15 == 0).astype(int)
    z_ND = length_1(draw.normal(size=(600, 16)) + 1.5 * np.eye(2, 16)[label_N])
    objects = objects_of(label_N, np.arange(600) % 50, np.arange(600) % 50 < 25, 2)
    found = few_shot.judge(objects, z_ND).tally.intervals(10)
    assert found["balanced_accuracy_1"].value < found["balanced_accuracy_5"].value < found["balanced_accuracy_10"].value


def test_a_class_in_one_unit_cannot_be_found_there_and_short_ones_are_named():
    draw = np.random.default_rng(2)
    label_N, unit_N = np.array([0] * 20 + [1] * 3), np.array([*np.arange(20), 30, 30, 30])
    z_ND = length_1(draw.normal(size=(23, 4)) + 8 * np.eye(2, 4)[label_N])
    found = few_shot.judge(leave_one_out(objects_of(label_N, unit_N, unit_N < 9, 3)), z_ND, shots=(1, 5), draws=2)
    np.testing.assert_array_equal(found.confusion_CC, [[20, 0, 0], [3, 0, 0], [0, 0, 0]])
    short, shared = found.notes
    assert short == "fewer than 5 objects in the bank, so all they have are examples: b (3)"
    assert "queries themselves" in shared
    # with a class of nobody's left out, no note at all
    found = few_shot.judge(objects_of(label_N, np.arange(23), np.arange(23) % 2 == 0, 3), z_ND, shots=(1,), draws=2)
    assert found.notes == ()


def test_a_bank_of_one_unit_and_settings_that_make_no_sense():
    objects, z_ND = drawn_objects(3)
    for bank_N in (np.ones(80, bool), np.arange(80) < 9, np.zeros(80, bool)):
        with pytest.raises(DataError, match="no examples"):
            few_shot.judge(objects_of(objects.label_N, np.zeros(80, int), bank_N, 3), z_ND)
    for wrong in ({"shots": (0, 1)}, {"shots": (5, 5)}, {"draws": 0}):
        with pytest.raises(UsageError, match="few-shot"):
            few_shot.judge(objects, z_ND, **wrong)
