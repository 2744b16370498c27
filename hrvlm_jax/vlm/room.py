"""Whether a prompt and its answer have room: in the memory of the devices, and in the positions
that the language model was made for."""

from __future__ import annotations

import logging
import math

import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.language.config import DecoderConfig
from hrvlm_jax.language.sampling import Sampling
from hrvlm_jax.parallel import fitting

_log = logging.getLogger(__name__)


def check_memory(text: DecoderConfig, rows: int, prompt: int, sampling: Sampling, *,
                 ex: Execution) -> None:
  """Refuses answers whose keys and values no device could hold, before anything is compiled.

  Args:
    rows, prompt: size of the padded batch.

  Raises:
    UserError: with the number of new tokens that fit.
  """
  each = rows * sampling.beams * 2 * text.depth * text.kv_heads * text.head_dim
  each *= jnp.dtype(ex.dtype).itemsize * 2  # a step writes a new cache from the old one
  devices = [] if ex.mesh is None else list(ex.mesh.devices.flat)
  together = len({device.process_index for device in devices}) > 1
  limit = fitting.device_bytes(shared=together) * max(len(devices), 1)
  need = each * (prompt + sampling.max_new_tokens)
  if need > limit:
    fit = limit // each - prompt
    raise UserError(
      f'max_new_tokens {sampling.max_new_tokens}: keys and values of {rows} x {sampling.beams} '
      f'answers that long take {fitting.size(need)}, there are {fitting.size(limit)}; '
      + (f'at most {fit} new tokens fit' if fit > 0 else
         'ask about fewer or smaller images at a time, with fewer beams'))


class Context:
  """Says once when prompts or answers leave the positions that a language model was made for.

  They are answered as `transformers` answers them: rotary positions go on beyond the last one that
  training has seen. (LLaVA's own code cuts such a prompt, and its question with it.)
  """

  def __init__(self, text: DecoderConfig | None):
    self.most = math.inf if text is None else text.max_positions
    self._said: set[str] = set()

  def check(self, valid, new_tokens: int = 0) -> None:
    """Looks at the longest row.

    Args:
      valid: bool [b t], real positions of the prompts.
      new_tokens: of the longest answer.
    """
    longest = int(np.asarray(valid).sum(axis=1).max()) if math.prod(valid.shape) else 0
    if longest > self.most:
      self._say('prompt', f'a prompt has {longest} positions, the language model was made for '
                f'{self.most}: answers to it may make no sense; ask with less text, fewer images '
                'or fewer crops')
    elif longest + new_tokens > self.most:
      self._say('answer', f'a prompt and its answer have {longest + new_tokens} positions, the '
                f'language model was made for {self.most}: the end of the answer may make no sense')

  def _say(self, kind: str, text: str) -> None:
    if kind not in self._said:
      self._said.add(kind)
      _log.warning('%s', text)
