"""The needle task and the miniature experiments."""
