"""What the authors of Scan and Snap and JoMA recorded: luckmatters, ssl/real-dataset, in its own digits."""

from __future__ import annotations

import numpy as np

# JoMA's Figure 4 has ten targets, sorted draws of 3 U(0, 1) + 1, and Euler steps from a small v.
JOMA_FIGURE_4_TARGETS = (1.2654, 1.3961, 1.9223, 2.3669, 2.4703, 2.4888, 2.8969, 2.9022, 3.3047, 3.6893)
JOMA_FIGURE_4_RATE, JOMA_FIGURE_4_START, JOMA_FIGURE_4_STEPS = 0.02, 0.05, 5000

# scan_snap/figure_4.log holds the loss of the batch before iterations 0, 2, 4, ..., 98 of one run, of seed 2.
FIGURE_4_EVERY = 2
# fmt: off
FIGURE_4_LOSSES = (
    3.5264, 2.3679, 0.73348, 0.1608, 0.044429, 0.012952, 0.0043863, 0.0018098, 0.0006407, 0.00041019,
    0.00020543, 0.00014804, 0.00012945, 8.0638e-05, 6.176e-05, 5.3012e-05, 5.0596e-05, 3.5792e-05,
    3.4495e-05, 3.0941e-05, 2.9111e-05, 2.9779e-05, 3.0864e-05, 2.4846e-05, 2.51e-05, 2.5783e-05,
    2.6793e-05, 2.2869e-05, 2.1117e-05, 2.5498e-05, 2.4302e-05, 2.2612e-05, 2.6726e-05, 2.2389e-05,
    2.2065e-05, 1.9949e-05, 2.2413e-05, 2.163e-05, 1.959e-05, 2.6874e-05, 2.1822e-05, 2.1991e-05,
    2.0961e-05, 2.1617e-05, 1.9688e-05, 2.2006e-05, 2.631e-05, 2.3653e-05, 2.2377e-05, 2.2224e-05,
)

# figure_6_data.pkl holds the entropy after 100 iterations, its mean and standard deviation over seeds 1 to
# 10. The axes are the number of queries, the learning rate of Z, and that of Y over that of Z.
FIGURE_6_QUERIES = (1, 3, 5, 10)
FIGURE_6_RATES = (0.5, 1.0, 2.0, 3.0)
FIGURE_6_RATIOS = (1.0, 2.0, 5.0, 10.0)
_MEAN = (
    1.971, 2.007, 2.066, 2.092, 1.871, 1.937, 2.022, 2.053,
    1.699, 1.810, 1.934, 1.900, 1.551, 1.708, 1.786, 1.825,
    2.019, 1.988, 2.031, 2.063, 1.963, 1.920, 1.982, 2.024,
    1.842, 1.809, 1.899, 1.955, 1.737, 1.715, 1.821, 1.839,
    2.026, 1.994, 2.020, 2.055, 1.995, 1.931, 1.971, 2.014,
    1.906, 1.816, 1.884, 1.926, 1.817, 1.718, 1.802, 1.831,
    2.033, 2.012, 2.018, 2.051, 2.027, 1.975, 1.976, 2.015,
    1.990, 1.888, 1.899, 1.947, 1.940, 1.805, 1.829, 1.875,
)
_STD = (
    0.028, 0.032, 0.017, 0.016, 0.052, 0.052, 0.036, 0.030,
    0.101, 0.099, 0.068, 0.200, 0.155, 0.152, 0.170, 0.331,
    0.010, 0.012, 0.007, 0.005, 0.015, 0.018, 0.009, 0.008,
    0.024, 0.027, 0.018, 0.020, 0.032, 0.038, 0.030, 0.100,
    0.005, 0.007, 0.007, 0.006, 0.007, 0.011, 0.010, 0.009,
    0.012, 0.022, 0.020, 0.025, 0.021, 0.032, 0.033, 0.050,
    0.004, 0.004, 0.004, 0.003, 0.003, 0.005, 0.006, 0.006,
    0.005, 0.009, 0.013, 0.015, 0.006, 0.013, 0.019, 0.023,
)
# fmt: on


def figure_6(queries: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Recorded means and standard deviations, (len(queries), 4, 4) each.

    Raises:
        ValueError: a number of queries was not recorded.
    """
    unknown = [number for number in queries if number not in FIGURE_6_QUERIES]
    if unknown:
        raise ValueError(f"queries must be among {FIGURE_6_QUERIES}, got {unknown[0]}")
    rows = [FIGURE_6_QUERIES.index(number) for number in queries]
    mean, std = (np.asarray(values).reshape(4, 4, 4)[rows] for values in (_MEAN, _STD))
    return mean, std
