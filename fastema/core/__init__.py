"""The parts of FastEMA and AveragedModel, a file an idea. Read in this order:

tensors, sharded, policy         which tensors a model has, the parts of sharded ones, and the rule of each
pairs, storages, averages        a tensor and its averages: the one record; their memory; all of a model's
engine                           what stands under FastEMA and the adapters: averages that follow their model
given                            averages in memory that another module owns: AveragedModel's
plans, offload                   one launch a device; averages in host memory
swap                             averages and live weights change places
decays, counters                 the decay of each update; the steps, counted on the host or on the device
state, writing                   averages by name: saved, loaded, carried over; files
hooks, compiled, checks          optimizers' steps; what a compiler keeps; arguments
"""
