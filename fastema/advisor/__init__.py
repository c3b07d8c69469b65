"""Advice from a run's own numbers: which decay, when to start, why an average is worse.

Nothing here knows the metric: noise and progress are estimated from the history itself.
"""

from fastema.advisor.diagnosis import Finding, diagnose
from fastema.advisor.outlook import Outlook, expect
from fastema.advisor.patterns import StartAdvice, should_start
from fastema.advisor.recommendation import Recommendation, recommend_decay
from fastema.advisor.windows import (
    distinct_decays,
    initial_share,
    lag,
    reflects_epoch,
    scaled_decay,
    settle_epochs,
    updates_per_epoch,
    window,
)

__all__ = [
    "Finding",
    "Outlook",
    "Recommendation",
    "StartAdvice",
    "diagnose",
    "distinct_decays",
    "expect",
    "initial_share",
    "lag",
    "recommend_decay",
    "reflects_epoch",
    "scaled_decay",
    "settle_epochs",
    "should_start",
    "updates_per_epoch",
    "window",
]
