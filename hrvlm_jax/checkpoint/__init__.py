"""Weights on disk: the Orbax store and Hugging Face style folders, and the way between them."""
