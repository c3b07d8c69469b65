"""Variants of the update kernel that are worth a try, timed beside the kernel as it is. Nothing of it has run yet."""
