"""Metrics, and the evaluation of a checkpoint."""
