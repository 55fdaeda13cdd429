from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from test_statistics import drawn_objects, length_1, objects_of

from ssl_pretrain.errors import DataError
from ssl_pretrain.probe import retrieval
from ssl_pretrain.probe.objects import leave_one_out
from ssl_pretrain.probe.retrieval import average_precision, by_chance, precisions


def by_sklearn(objects, z_ND):
    """Average precision of each query, one at a time."""
    found = []
    for query in np.flatnonzero(objects.query_N):
        ranked = objects.train_N & (objects.unit_N != objects.unit_N[query])
        relevant = objects.label_N[ranked] == objects.label_N[query]
        similarity = z_ND[ranked].astype(np.float64) @ z_ND[query].astype(np.float64)
        found.append(average_precision_score(relevant, similarity) if relevant.any() else np.nan)
    return np.array(found)


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_sklearn(everything, seed):
    objects, z_ND = drawn_objects(seed, count=150, units=20, classes=5, dim=8)
    objects = leave_one_out(objects) if everything else objects
    ours, theirs = precisions(objects, z_ND)[0], by_sklearn(objects, z_ND)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    found = retrieval.judge(objects, z_ND).tally.intervals(20)
    assert found["map"].value == pytest.approx(theirs.mean())
    label_Q = objects.label_N[objects.query_N]
    assert found["map_balanced"].value == pytest.approx(np.mean([theirs[label_Q == c].mean() for c in range(5)]))


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_ties_are_broken_as_sklearn_does(seed):
    """Few distinct similarities, all exact: objects of one similarity share the last one's rank."""
    draw = np.random.default_rng(seed)
    similarity_BM = draw.integers(-2, 3, size=(6, 20)) / 4
    ranked_BM = draw.random((6, 20)) < 0.8
    relevant_BM = ranked_BM & (draw.random((6, 20)) < draw.choice([0.1, 0.5]))
    ours = average_precision(similarity_BM, relevant_BM, ranked_BM)
    for b in range(6):
        if relevant_BM[b].any():
            theirs = average_precision_score(relevant_BM[b, ranked_BM[b]], similarity_BM[b, ranked_BM[b]])
            assert ours[b] == pytest.approx(theirs)
        else:
            assert np.isnan(ours[b])


def test_collapsed_features_have_the_share_of_the_class():
    """All similarities equal: one tie, whose precision is the share of relevant objects."""
    objects, _ = drawn_objects(1)
    z_ND = np.full((80, 6), 1 / np.sqrt(6), np.float32)
    ours, theirs = precisions(objects, z_ND)[0], by_sklearn(objects, z_ND)
    np.testing.assert_allclose(ours, theirs)
    query = int(np.flatnonzero(objects.query_N)[0])
    ranked = objects.train_N & (objects.unit_N != objects.unit_N[query])
    assert ours[0] == pytest.approx((objects.label_N[ranked] == objects.label_N[query]).mean())


def test_by_hand():
    """Ranks 1 and 3 of three: (1 + 2/3) / 2; the nearest of all is the query's own unit and takes no part."""
    angle = np.array([0.0, 0.001, 0.1, 0.2, 0.3])
    z_ND = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    objects = objects_of(np.array([0, 1, 0, 1, 0]), np.array([0, 0, 1, 2, 3]), np.array([0, 1, 1, 1, 1], bool), 2)
    found, chance = precisions(objects, z_ND)
    assert found == pytest.approx([5 / 6])
    # two of three relevant: 1, 5/6 or (1/2 + 2/3) / 2, equally likely
    assert chance == pytest.approx([(1 + 5 / 6 + 7 / 12) / 3])


def test_blocks_make_no_difference_to_the_last_digit(monkeypatch):
    """Near ties in plenty: rounding that went by the block's shape would turn them round."""
    draw = np.random.default_rng(0)
    objects, _ = drawn_objects(0, count=300, units=30)
    z_ND = length_1(1 + 1e-7 * draw.normal(size=(300, 40)))
    found = []
    for cells in (1, 1000, 7777, 4_000_000):
        monkeypatch.setattr(retrieval, "CELLS", cells)
        found.append(precisions(objects, z_ND)[0])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_similarities_are_exact():
    """Whatever the order of the channels, the rounded features have one and the same similarity."""
    draw = np.random.default_rng(1)
    z_ND = np.rint(length_1(draw.normal(size=(50, 2048))).astype(np.float64) / retrieval.STEP) * retrieval.STEP
    order = draw.permutation(2048)
    plain, mixed = z_ND @ z_ND.T, z_ND[:, order] @ z_ND[:, order].T
    np.testing.assert_array_equal(plain, mixed)
    np.testing.assert_array_equal(plain * 2.0**52 % 1, np.zeros((50, 50)))
    assert abs(plain - np.eye(50)).max() < 0.2 and abs(np.diag(plain) - 1).max() < 1e-6


def test_equal_similarities_are_equal():
    """To a query whose channels are all alike, one feature with its channels in any order: a tie, not rounding."""
    draw = np.random.default_rng(2)
    z_D = length_1(draw.normal(size=(1, 700)))[0]
    bank_MD = np.stack([z_D[draw.permutation(700)] for _ in range(40)])
    z_ND = np.concatenate([np.full((1, 700), 700**-0.5, np.float32), bank_MD])
    objects = objects_of(np.arange(41) % 4, np.arange(41), np.arange(41) > 0, 4)
    assert precisions(objects, z_ND)[0] == pytest.approx([0.25], abs=1e-15)


@given(st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_bank_makes_no_difference(seed):
    objects, z_ND = drawn_objects(seed)
    order = np.random.default_rng(seed).permutation(80)
    mixed = objects_of(objects.label_N[order], objects.unit_N[order], objects.train_N[order], 3)
    a, b = retrieval.judge(objects, z_ND), retrieval.judge(mixed, z_ND[order])
    np.testing.assert_allclose(a.tally.sums_UM, b.tally.sums_UM, atol=1e-12)


# --- chance -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranked, relevant", [(1, 1), (5, 1), (6, 3), (7, 7), (4, 2)])
def test_chance_is_the_mean_over_all_orders(ranked, relevant):
    values = []
    for places in combinations(range(1, ranked + 1), relevant):
        values.append(np.mean([(i + 1) / place for i, place in enumerate(places)]))
    assert by_chance(np.array([ranked]), np.array([relevant]))[0] == pytest.approx(np.mean(values))


def test_random_features_are_at_chance_and_perfect_ones_at_1():
    draw = np.random.default_rng(3)
    label_N, unit_N = np.minimum(draw.geometric(0.4, size=900) - 1, 4), np.arange(900) % 300
    objects = leave_one_out(objects_of(label_N, unit_N, unit_N < 9))
    found = retrieval.judge(objects, length_1(draw.normal(size=(900, 32))))
    intervals = found.tally.intervals(100)
    assert intervals["map"].value == pytest.approx(found.settings["chance_map"], abs=0.01)
    assert intervals["map_balanced"].value == pytest.approx(found.settings["chance_map_balanced"], abs=0.01)
    assert found.settings["chance_map"] > found.settings["chance_map_balanced"] + 0.05
    best = retrieval.judge(objects, np.eye(5, dtype=np.float32)[label_N]).tally.intervals(10)
    assert best["map"].value == best["map_balanced"].value == 1.0
    assert found.confusion_CC is None


def test_queries_with_nothing_to_find_do_not_count():
    label_N, unit_N = np.array([0, 0, 1, 1, 0, 2]), np.array([0, 1, 2, 2, 3, 4])
    objects = leave_one_out(objects_of(label_N, unit_N, unit_N < 2, 3))
    z_ND = length_1(np.random.default_rng(0).normal(size=(6, 4)))
    found = retrieval.judge(objects, z_ND)
    assert found.notes == ("3 queries have no object of their class to find and do not count in retrieval",)
    assert found.settings["queries"] == 3
    np.testing.assert_array_equal(found.tally.sums_UM[:, 3:], [[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    only = objects_of(np.arange(6), unit_N, unit_N < 2, 6)
    with pytest.raises(DataError, match="no query has an object of its class"):
        retrieval.judge(only, z_ND)
    with pytest.raises(DataError, match="no query has an object of its class"):
        retrieval.judge(objects_of(label_N, unit_N, np.zeros(6, bool), 3), z_ND)
