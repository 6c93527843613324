"""Tracking: metrics.jsonl (the truth), the console, W&B, and pictures of a run for people."""

from mae_et.tracking.console import ConsoleTracker
from mae_et.tracking.jsonl import JsonlTracker, read_metrics, truncate_metrics
from mae_et.tracking.tracker import MultiTracker, Tracker
from mae_et.tracking.wandb import WandbTracker

__all__ = [
    "ConsoleTracker",
    "JsonlTracker",
    "MultiTracker",
    "Tracker",
    "WandbTracker",
    "read_metrics",
    "truncate_metrics",
]
