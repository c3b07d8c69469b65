"""Figures of a run: history, curves, pictures, the summary at the end."""
