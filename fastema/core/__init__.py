"""What the faces of fastema share."""
