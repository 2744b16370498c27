"""The cases of `hrvlm bench`: every module lists its own in `CASES`."""
