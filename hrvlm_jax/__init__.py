"""High-resolution vision-language models in JAX.

Importing the package alone loads no JAX; the rooms (`hrvlm_jax.core`, `hrvlm_jax.systems`, ...) do.
"""

__version__ = '0.1.0'
