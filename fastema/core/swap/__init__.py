"""The swap of averaged and live weights."""
