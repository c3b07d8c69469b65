"""The model: which of its tensors are averaged, also where it is sharded or compiled."""
