"""The built-in high-resolution task: signs whose text only a high-resolution model can read."""

from hrvlm_jax.lab.needle.config import COLOURS, PLACES, SHAPES, NeedleConfig
from hrvlm_jax.lab.needle.crops import CUT, NOTHING, GlyphCrops, glyph_crops
from hrvlm_jax.lab.needle.generate import (
  NeedleExample,
  NeedlePlan,
  generate,
  paint,
  plan,
  record,
  single_turns,
)
from hrvlm_jax.lab.needle.signs import Sign
from hrvlm_jax.lab.needle.write import read_records, write

__all__ = [
  'COLOURS', 'CUT', 'NOTHING', 'PLACES', 'SHAPES', 'GlyphCrops', 'NeedleConfig',
  'NeedleExample', 'NeedlePlan', 'Sign', 'generate', 'glyph_crops',
  'paint', 'plan', 'read_records', 'record', 'single_turns', 'write',
]
