"""Golden checks of PS3, by kind; importing the package registers them all."""

from hrvlm_jax.verify.ps3 import encoder, preprocess, pretrain, text  # noqa: F401
