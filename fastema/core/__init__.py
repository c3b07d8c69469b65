"""The parts that FastEMA and AveragedModel share: policy, storages, shadows, swap, state."""
