"""The network: a timm backbone, a pyramid decoder, mixtures of experts."""
