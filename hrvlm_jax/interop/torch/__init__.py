"""Model code of exported folders (`hrvlm export --for transformers`), in PyTorch and transformers.

Written from the papers' and the originals' specifications; nothing here imports JAX or the rest of
the package, so that the files work copied into a folder as they are. `interop.folder` copies them.
"""
