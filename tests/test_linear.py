import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.preprocessing import StandardScaler
from test_statistics import drawn_objects, length_1, objects_of

from ssl_pretrain.errors import DataError
from ssl_pretrain.probe import linear
from ssl_pretrain.probe.linear import LAMBDAS, fit
from ssl_pretrain.probe.objects import leave_one_out


def unequal_classes(seed=0, count=300, dim=12, classes=4):
    """Features of four classes, the rarest with a few objects, on channels of very unequal scale."""
    draw = np.random.default_rng(seed)
    label_N = np.minimum(draw.geometric(0.6, size=count) - 1, classes - 1)
    z_ND = draw.normal(size=(count, dim)) + draw.normal(size=(classes, dim))[label_N] + 3
    return (z_ND * np.logspace(-3, 0, dim)).astype(np.float32), label_N


# --- the closed form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", [linear.ROWS, 7])
def test_equals_sklearn_s_ridge(seed, rows, monkeypatch):
    monkeypatch.setattr(linear, "ROWS", rows)
    z_ND, label_N = unequal_classes(seed)
    ask_QD, _ = unequal_classes(seed + 10)
    ours = fit(z_ND, label_N)
    scaler = StandardScaler().fit(z_ND.astype(np.float64))
    x_ND, x_QD = scaler.transform(z_ND.astype(np.float64)), scaler.transform(ask_QD.astype(np.float64))
    count_C = np.bincount(label_N)
    weight_N = (len(label_N) / (4 * count_C))[label_N]
    for i, each in enumerate(LAMBDAS):
        theirs = Ridge(each * len(label_N)).fit(x_ND, np.eye(4)[label_N], sample_weight=weight_N)
        np.testing.assert_allclose(ours.w_DLC[:, i].T * scaler.scale_, theirs.coef_, atol=1e-9)
        np.testing.assert_allclose(ours.b_LC[i], theirs.intercept_, atol=1e-9)
        classifier = RidgeClassifier(each * len(label_N), class_weight="balanced").fit(x_ND, label_N)
        np.testing.assert_array_equal(ours.predict(ask_QD)[i], classifier.predict(x_QD))


def test_two_classes_and_one():
    z_ND, label_N = unequal_classes(3, classes=2)
    x_ND = StandardScaler().fit_transform(z_ND.astype(np.float64))
    theirs = RidgeClassifier(0.01 * len(label_N), class_weight="balanced").fit(x_ND, label_N)
    # numbers of classes that are absent are never predicted
    np.testing.assert_array_equal(fit(z_ND, 3 * label_N).predict(z_ND)[2], 3 * theirs.predict(x_ND))
    assert (fit(z_ND, np.full(300, 2)).predict(z_ND) == 2).all()


def test_the_scale_of_a_channel_and_a_constant_make_no_difference():
    z_ND, label_N = unequal_classes()
    plain = fit(z_ND, label_N).predict(z_ND)
    np.testing.assert_array_equal(
        plain,
        fit(z_ND * np.logspace(2, -2, 12).astype(np.float32) + 5, label_N).predict(
            z_ND * np.logspace(2, -2, 12).astype(np.float32) + 5
        ),
    )
    more = np.concatenate([z_ND, np.full((300, 2), 0.25, np.float32)], axis=1)
    model = fit(more, label_N)
    np.testing.assert_array_equal(plain, model.predict(more))
    # a channel that was constant in the bank says nothing of a query in which it is not
    more[:, 12:] += 1
    np.testing.assert_array_equal(plain, model.predict(more))


def test_rounding_is_not_blown_up_into_a_feature():
    """A collapsed backbone: all features equal but for the last digits, which here tell the classes apart."""
    label_N = np.arange(200) % 2
    z_ND = np.full((200, 16), 0.25, np.float32) + 3e-8 * label_N[:, None].astype(np.float32)
    model = fit(z_ND, label_N, lambdas=[1.0])
    assert abs(model.w_DLC * 3e-8).max() < 0.02, "a whole such step moves the score by little"


def test_more_channels_than_objects():
    draw = np.random.default_rng(0)
    z_ND, label_N = length_1(draw.normal(size=(30, 200))), np.arange(30) % 3
    model = fit(z_ND, label_N)
    assert np.isfinite(model.w_DLC).all()
    np.testing.assert_array_equal(model.predict(z_ND)[0], label_N)


# --- the probe --------------------------------------------------------------------------------------------------------


def by_hand(objects, z_ND, seed):
    """The whole probe again, with sklearn and without any sharing of models: predictions, and what was chosen."""
    bank, query, label_N = objects.train_N, objects.query_N, objects.label_N
    fold_N, folds = linear._folds(objects.unit_N, bank, seed)

    def classifier(rows, each):
        scaler = StandardScaler().fit(z_ND[rows].astype(np.float64))
        model = RidgeClassifier(each * rows.sum(), class_weight="balanced")
        model.fit(scaler.transform(z_ND[rows].astype(np.float64)), label_N[rows])
        return lambda asked: model.predict(scaler.transform(z_ND[asked].astype(np.float64)))

    predicted_N, chosen = np.full(len(z_ND), -1), []
    for fold in np.unique(fold_N[query]):
        train = bank & (fold_N != fold)
        scores = []
        for each in LAMBDAS:
            inner_N = np.full(len(z_ND), -1)
            for other in set(range(folds)) - {fold}:
                inner_N[train & (fold_N == other)] = classifier(train & (fold_N != other), each)(
                    train & (fold_N == other)
                )
            scores.append(balanced_accuracy_score(label_N[train], inner_N[train]))
        chosen.append(LAMBDAS[max(i for i, score in enumerate(scores) if score == max(scores))])
        asked = query & (fold_N == fold)
        predicted_N[asked] = classifier(train, chosen[-1])(asked)
    return predicted_N[query], chosen


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("straddling", [False, True])
def test_the_nested_choice_equals_sklearn_one_model_at_a_time(everything, straddling):
    drawn, z_ND = drawn_objects(11, count=160, units=12)
    # two objects in three of the other classes are said to be of the first: accuracy would choose otherwise
    label_N = np.where(np.arange(160) % 3 > 0, 0, drawn.label_N)
    objects = objects_of(label_N, drawn.unit_N, drawn.train_N if straddling else drawn.unit_N < 24, 3)
    objects = leave_one_out(objects) if everything else objects
    found = linear.judge(objects, z_ND, seed=4)
    predicted_Q, chosen = by_hand(objects, z_ND, seed=4)
    true_Q = objects.label_N[objects.query_N]
    assert found.settings["lambda_over_n"] == chosen and len(set(chosen)) >= 1
    expected_CC = np.zeros((3, 3), int)
    np.add.at(expected_CC, (true_Q, predicted_Q), 1)
    np.testing.assert_array_equal(found.confusion_CC, expected_CC)
    assert found.tally.intervals(10)["accuracy"].value == pytest.approx((true_Q == predicted_Q).mean())
    assert found.settings["models"] == (5 if everything or straddling else 1) and found.notes == ()


@given(st.integers(0, 2**31), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_folds_keep_units_whole(seed, units):
    draw = np.random.default_rng(seed)
    unit_N, bank_N = draw.integers(units, size=60) * 7, draw.random(60) < 0.5
    fold_N, folds = linear._folds(unit_N, bank_N, seed)
    known = np.unique(unit_N[bank_N])
    assert folds == min(5, len(known))
    np.testing.assert_array_equal(fold_N >= 0, np.isin(unit_N, known))
    of_unit = {u: set(fold_N[unit_N == u]) for u in known}
    assert all(len(found) == 1 for found in of_unit.values())
    sizes = np.bincount([found.pop() for found in of_unit.values()], minlength=folds)
    assert len(known) == 0 or sizes.max() - sizes.min() <= 1


def test_the_seed_deals_the_folds():
    unit_N, bank_N = np.arange(40), np.ones(40, bool)
    dealt = [linear._folds(unit_N, bank_N, seed)[0].tolist() for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_regularisation_is_chosen_by_units_and_not_by_objects():
    """200 units of three objects; most channels know the unit, which has one class: only a fold of objects likes them.

    Chosen over objects, the smallest regularisation would win by knowing the units by heart.
    """
    draw, units = np.random.default_rng(1), 200
    unit_N = np.repeat(np.arange(units), 3)
    label_N = draw.integers(2, size=units)[unit_N]
    own = draw.normal(size=(units, 150))[unit_N]
    weak = 0.5 * (2.0 * label_N - 1)[:, None] + draw.normal(size=(units, 2))[unit_N]
    z_ND = np.concatenate([own, weak], axis=1).astype(np.float32)
    found = linear.judge(objects_of(label_N, unit_N, unit_N < 130, 2), z_ND)
    by_object = linear.judge(objects_of(label_N, np.arange(600), unit_N < 130, 2), z_ND)
    assert found.settings["lambda_over_n"][0] >= 1 > 0.01 >= by_object.settings["lambda_over_n"][0]


def test_separable_classes_are_told_apart_and_rare_ones_count():
    draw = np.random.default_rng(2)
    label_N, unit_N = (np.arange(400) % 40 == 0).astype(int), draw.integers(20, size=400)
    z_ND = length_1(draw.normal(size=(400, 8)) + 6 * np.eye(2, 8)[label_N])
    found = linear.judge(leave_one_out(objects_of(label_N, unit_N, unit_N < 10, 2)), z_ND)
    assert found.tally.intervals(10)["balanced_accuracy"].value > 0.97


def test_few_units():
    objects, z_ND = drawn_objects(3, units=2)
    found = linear.judge(leave_one_out(objects), z_ND)
    assert found.settings["lambda_over_n"] == [0.1, 0.1] and "too few units (2)" in found.notes[0]
    one = objects_of(objects.label_N, objects.unit_N, objects.unit_N == 0, 3)
    found = linear.judge(one, z_ND)
    assert found.settings["lambda_over_n"] == [0.1] and "too few units (1)" in found.notes[0]
    for bank_N in (np.arange(80) < 40, np.ones(80, bool), np.zeros(80, bool)):
        with pytest.raises(DataError, match="nothing to learn from"):
            linear.judge(objects_of(objects.label_N, np.zeros(80, int), bank_N, 3), z_ND)
