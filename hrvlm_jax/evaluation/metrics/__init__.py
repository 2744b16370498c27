"""Scorers in plain Python, without torch, network or Java.

Every number has a name that says how it was made (`vqa_accuracy_m4c`, `anls_strict`, ...); where
published codes disagree, each has its own function and none is called by the bare name.
"""
