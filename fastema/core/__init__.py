"""What the public modules are built on; import `fastema`, not this."""
