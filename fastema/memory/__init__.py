"""The ground of backends and core: bytes of storages, planes, streams, steps that all happen or none."""
