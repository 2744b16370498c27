"""What the four systems are compared with: one folder per baseline."""
