"""Lists of the names and shapes of released checkpoints: a JSON file `{config, tensors}` each.

The file's name is that of the release; `NAME.vision.json` and `NAME.text.json` list a part of it.
Our weight table has to give the same names and shapes, no more and no fewer.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from hrvlm_jax.checkpoint.rows import Table, entries
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as language
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.ps3 import weights as ps3_weights
from hrvlm_jax.vlm import model as vlm

# The keys of this head depend on its type, which the lists leave open (release_keys/README.md).
OPEN = 'mm_projector/top_down_prompt_head.'


def is_list(path: pathlib.Path) -> bool:
  """Whether a JSON file lists a release: settings, and shapes by tensor name."""
  try:
    values = json.loads(path.read_text())
  except ValueError:
    return False
  return isinstance(values, dict) and set(values) == {'config', 'tensors'}


def compare(path: pathlib.Path) -> dict[str, str]:
  """What differs between a list and our table, by tensor name; empty when nothing does.

  Raises:
    UserError: no release of this name.
  """
  listed = json.loads(path.read_text())
  shapes = {name: tuple(shape) for name, shape in listed['tensors'].items()}
  release, _, part = path.stem.partition('.')
  table, abstract = _model(release, listed['config'])
  ours = {name: tuple(entry.shape) for entry in entries(table, abstract) for name in entry.names
          if name.startswith(f'{part}_model.' if part else '') and not name.startswith(OPEN)}
  theirs = {name: shape for name, shape in shapes.items() if not table.is_ignored(name)}
  say = lambda shapes, name: str(shapes.get(name, 'absent'))
  return {name: f'{say(ours, name)} by our table, {say(theirs, name)} in the list'
          for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)}


def _model(release: str, settings: dict[str, Any]) -> tuple[Table, Any]:
  """Weight table and abstract parameters of a release, of a system or a language model."""
  for name in registry.names():
    system = registry.get(name)
    if (config := system.released.get(release)) is None:
      continue
    if config.text is None:  # PS3: the list's own settings, of its vision or its text part
      text = config.encoder.text
      if 'ps3_scales' not in settings:
        text = ps3_weights.text_from_hf(settings)
      config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, text=text))
    return system.table(config), vlm.build(config).abstract
  if (text := language.RELEASED.get(release)) is not None:
    # Rows of the table follow the weights: VILA-HD's Qwen2 has more of them than Qwen2.
    text = dataclasses.replace(text, vocab_size=settings.get('vocab_size', text.vocab_size))
    return language.table(text), Functional(lambda rngs: Decoder(text, rngs=rngs)).abstract
  known = sorted({*language.RELEASED, *(release for name in registry.names()
                                        for release in registry.get(name).released)})
  raise UserError(f'{release}: a list of a release that is not known here; known: {known}')
