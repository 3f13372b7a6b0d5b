"""Failures against checkpoints: how often to save, and what a run loses.

The model is J. T. Daly's, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), after
J. W. Young's "A first order approximation to the optimum checkpoint interval" (1974): failures come at random with a
mean time between them, a save holds the run up, and after a failure the run starts again and repeats what came after
the last save.
"""

from __future__ import annotations

import math


def best_interval(stall_s: float, between_failures_s: float, *, least_s: float = 0.0) -> float:
    """Seconds of training between two saves that lose least: Daly's estimate, for short saves √(2·C·M).

    Args:
        stall_s: C, for which a save holds the run up.
        between_failures_s: M, the mean time between failures of the whole job.
        least_s: a save takes so long in the background; the next one would wait for it.
    """
    if stall_s >= 2 * between_failures_s:
        return max(between_failures_s, least_s)
    ratio = math.sqrt(stall_s / (2 * between_failures_s))
    interval = math.sqrt(2 * stall_s * between_failures_s) * (1 + ratio / 3 + ratio**2 / 9) - stall_s
    return max(interval, least_s, 0.0)


def lost_share(
    interval_s: float, *, stall_s: float, between_failures_s: float, restart_s: float, behind_s: float = 0.0
) -> float:
    """Share of the time that is not spent on steps that stay: saves, starts, and steps that are done again.

    Args:
        interval_s: of training between two saves.
        stall_s: for which a save holds the run up.
        between_failures_s: mean time between failures of the whole job.
        restart_s: from a failure to the next step.
        behind_s: a save counts only so long after the run has gone on: what it then covers is lost beside the interval.

    Returns:
        Between 0 and 1: Daly's expected time, e^(R/M) · M · (e^((T + C)/M) − 1) for T seconds of steps.
    """
    mean = between_failures_s
    exponent = (interval_s + stall_s) / mean
    if exponent > 700 or (restart_s + behind_s) / mean > 700:  # e^700 is the largest that a float holds
        return 1.0
    taken = math.exp((restart_s + behind_s) / mean) * mean * math.expm1(exponent)
    return 1.0 - interval_s / taken if taken > 0 else 0.0
