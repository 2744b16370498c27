"""High-resolution vision-language models in JAX.

    import hrvlm_jax
    model = hrvlm_jax.load('runs/quickstart/checkpoint')
    print(model.ask('photo.png', 'What does the red sign say?'))

The public names are those of `hrvlm_jax.api`, with `Model`, `Chat` and `UserError`. Importing the
package loads no JAX; the first call does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from hrvlm_jax.api import convert, evaluate, export, finetune, load, train
  from hrvlm_jax.core.errors import UserError
  from hrvlm_jax.front.model import Chat, Model

__version__ = '0.1.0'
_NAMES = {
  'Chat': 'hrvlm_jax.front.model', 'Model': 'hrvlm_jax.front.model',
  'UserError': 'hrvlm_jax.core.errors',
  **dict.fromkeys(('convert', 'evaluate', 'export', 'finetune', 'load', 'train'),
                  'hrvlm_jax.api')}
__all__ = ['Chat', 'Model', 'UserError', 'convert', 'evaluate', 'export', 'finetune', 'load',
           'train']


def __getattr__(name: str) -> Any:
  """The public names, each imported when it is first used."""
  if name not in _NAMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
