"""The built-in high-resolution tasks: texts that only a high-resolution model can read.

`needle` asks for one sign, `relate` for signs by where things stand, `page` for words by their
order.
"""

from hrvlm_jax.lab.needle.config import COLOURS, PLACES, SHAPES, NeedleConfig
from hrvlm_jax.lab.needle.crops import CUT, NOTHING, GlyphCrops, glyph_crops
from hrvlm_jax.lab.needle.describe import cue_description, description
from hrvlm_jax.lab.needle.generate import (
  NeedleExample,
  NeedlePlan,
  Plan,
  generate,
  paint,
  plan,
  record,
  single_turns,
)
from hrvlm_jax.lab.needle.signs import Sign
from hrvlm_jax.lab.needle.tasks import Cue, Question, TaskExample, TaskPlan, Thing
from hrvlm_jax.lab.needle.views import task_views
from hrvlm_jax.lab.needle.write import differing, read_records, write

__all__ = [
  'COLOURS', 'CUT', 'NOTHING', 'PLACES', 'SHAPES', 'Cue', 'GlyphCrops', 'NeedleConfig',
  'NeedleExample', 'NeedlePlan', 'Plan', 'Question', 'Sign', 'TaskExample', 'TaskPlan', 'Thing',
  'cue_description', 'description', 'differing', 'generate', 'glyph_crops', 'paint', 'plan',
  'read_records', 'record', 'single_turns', 'task_views', 'write',
]
