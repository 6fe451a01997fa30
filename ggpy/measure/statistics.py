"""Means and quantiles with their standard errors."""

import math

import numpy as np


def mean(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error.

    Parameters
    ----------
    values : float array (n,)
        Independent samples.
    """
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))


def quantile(values: np.ndarray, share: float) -> tuple[float, float]:
    """A quantile and its standard error, half the distance of the values whose ranks are one standard deviation of the
    binomial distribution below and above (Woodruff 1952)."""
    n = len(values)
    spread = math.sqrt(share * (1 - share) / n)
    low, middle, high = np.quantile(values, np.clip((share - spread, share, share + spread), 0, 1))
    return float(middle), float(high - low) / 2


def proportion(hits: np.ndarray) -> tuple[float, float]:
    """The share of true values in a bool array (n,), and its standard error."""
    return mean(hits.astype(np.float64))


def root_mean_square(values: np.ndarray) -> tuple[float, float]:
    """The root of the mean of squares; its error by the first order of the root."""
    square, error = mean(np.square(values))
    root = math.sqrt(square)
    return root, error / (2 * root) if root else 0.0
