"""Golden checks of PS3, by kind; importing the package registers them all."""

from tests.parity.cases.ps3 import encoder, preprocess, pretrain, text  # noqa: F401
