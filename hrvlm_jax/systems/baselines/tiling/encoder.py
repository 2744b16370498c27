"""Closest-aspect tiling on the device: see `systems.baselines.tiled`."""

from hrvlm_jax.systems.baselines.tiled import TiledEncoder as Encoder

__all__ = ['Encoder']
