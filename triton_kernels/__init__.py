"""The Triton kernels; installed as `fastema.triton_kernels`, because another project owns the top-level name.

Nothing imports Triton until `fastema.backends.triton` asks for `fastema.triton_kernels.kernels`.
"""
