"""The implementations that are measured: ours, plain torch, other packages."""
