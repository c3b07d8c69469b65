"""The reference segmentation trainer behind `fastema train`: a guest, which nothing else in fastema imports."""
