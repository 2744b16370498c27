"""Plans of programs compiled ahead of time: memory, traffic and time before a run."""
