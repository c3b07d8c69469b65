"""The images and masks of a training: find, check, read, batch."""
