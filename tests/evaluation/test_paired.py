"""Differences paired over seeds."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fastlt.evaluation.paired import bootstrap, corrected, paired, sign_flips


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_sign_flips_are_all_ways_counted(count):
    values = np.random.default_rng(count).normal(0.5, 1, count)
    ways = [np.mean(values * signs) for signs in itertools.product((-1, 1), repeat=count)]
    share = np.mean([abs(mean) >= abs(values.mean()) - 1e-12 for mean in ways])
    assert sign_flips(values) == pytest.approx(share)
    found = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flips(values) == pytest.approx(found.pvalue)


def test_of_many_seeds_ways_are_drawn():
    values = np.random.default_rng(0).normal(0.4, 1, 25)
    assert sign_flips(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.03)


def test_the_interval_is_that_of_the_bootstrap():
    values = np.random.default_rng(1).normal(2, 1, 12)
    found = stats.bootstrap((values,), np.mean, method="percentile", random_state=1)
    low, high = bootstrap(values)
    assert low == pytest.approx(found.confidence_interval.low, abs=0.05)
    assert high == pytest.approx(found.confidence_interval.high, abs=0.05)


def test_seeds_that_both_have_are_paired():
    found = paired({0: 3.0, 1: 5.0, 2: 9.0}, {0: 1.0, 1: 2.0, 7: 0.0})
    assert (found.mean, found.seeds, found.p) == (2.5, 2, 0.5)
    assert found.t == pytest.approx(stats.ttest_rel([3, 5], [1, 2]).statistic)
    assert paired({0: 1.0}, {0: 0.0}) is None
    equal = paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0})
    assert np.isnan(equal.t) and equal.low == equal.high == 1.0


def test_a_family_is_corrected():
    far = {seed: float(seed % 3) + 10 for seed in range(6)}
    near = {seed: float(seed % 3) for seed in range(6)}
    found = {"a": paired(far, near), "b": paired(near, {**near, 0: 1.0}), "c": paired({}, near)}
    assert corrected(found)["a"] == pytest.approx(2 * found["a"].p) and "c" not in corrected(found)
