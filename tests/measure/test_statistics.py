"""Means and quantiles against distributions whose errors are known."""

import math

import numpy as np
import pytest

from ggpy.measure.statistics import mean, proportion, quantile, root_mean_square

N = 200_000


@pytest.fixture(scope="module")
def normal():
    return np.random.default_rng(0).normal(3.0, 2.0, N)


def test_mean_of_normal_values(normal):
    value, error = mean(normal)
    assert abs(value - 3) < 4 * error and math.isclose(error, 2 / math.sqrt(N), rel_tol=0.01)


def test_error_of_the_median_is_that_of_normal_values(normal):
    value, error = quantile(normal, 0.5)
    assert abs(value - 3) < 4 * error and math.isclose(error, 2 * math.sqrt(math.pi / 2 / N), rel_tol=0.05)


def test_error_of_a_high_quantile_follows_the_density(normal):
    value, error = quantile(normal, 0.99)
    z = 2.3263478740408408
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi) / 2
    assert abs(value - (3 + 2 * z)) < 4 * error
    assert math.isclose(error, math.sqrt(0.99 * 0.01 / N) / density, rel_tol=0.1)


def test_proportion_has_the_binomial_error():
    value, error = proportion(np.arange(1000) < 300)
    assert value == 0.3 and math.isclose(error, math.sqrt(0.3 * 0.7 / 999))


def test_root_mean_square_of_many_samples_varies_as_its_error_says():
    samples = np.random.default_rng(1).normal(0, 1, (400, 500))
    results = np.array([root_mean_square(s) for s in samples])
    assert math.isclose(results[:, 0].std(), results[:, 1].mean(), rel_tol=0.15)


def test_few_values_have_no_error():
    assert math.isnan(mean(np.array([1.0]))[1])
    assert root_mean_square(np.zeros(5)) == (0.0, 0.0)
