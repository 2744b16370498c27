"""The PyTorch side of the cases; runs in the environment of scripts/peers.sh."""
