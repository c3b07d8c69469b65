"""The parts of FastEMA and AveragedModel.

decay/           the decay of each update
model/           the tensors of a model, with the rule of each
swap/            the swap of averages and live weights
shadow/          FastEMA's averages: storages, updates, states
averaged_model/  AveragedModel's averages: pairs of tensors of two modules
"""
