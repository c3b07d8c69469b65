"""What backends and core stand on: bytes of storages, planes, streams, steps that all happen or none."""
