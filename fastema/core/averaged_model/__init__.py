"""The averages of `fastema.swa_utils.AveragedModel`, which are a module of their own."""
