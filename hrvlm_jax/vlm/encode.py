"""Running a vision encoder alone: visual tokens of an image, and a picture of its choices."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint import averages
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, VisualTokens
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config


class ImageEncoder:
  """The encoder of a checkpoint, with the text tower that prompts it where the model has one.

  Args:
    params: parameters of `vlm.build(config)`.
    tokenizer: for prompts; None: none can be given.
  """

  def __init__(self, config: ModelConfig, params: dict[str, Any], tokenizer=None):
    self.config, self.params, self.tokenizer = config, params, tokenizer
    self.system = registry.get(config.system)
    fn = Functional(lambda rngs: self.system.encoder(config.encoder, rngs=rngs))
    self._run = jax.jit(lambda p, views, more, ex: fn.bind(p)(views, ex=ex, **more),
                        static_argnames='ex')
    self._prompt = jax.jit(
        lambda p, ids, ex: vlm.build(config).apply(p, ids, method='prompt', ex=ex),
        static_argnames='ex')

  @classmethod
  def load(cls, checkpoint: str | os.PathLike, *, prompted: bool = False,
           encoder_options: dict[str, Any] | None = None,
           weights: str | None = None) -> ImageEncoder:
    """From a checkpoint folder or the work directory of a run.

    Args:
      prompted: a tokenizer is needed.
      encoder_options: settings of the encoder to override (`look`, `max_crops`, ...).
      weights: 'raw' or 'ema', see `checkpoint.averages.which`.

    Raises:
      UserError: no checkpoint, tensors that do not fit, no tokenizer for a prompt.
    """
    config = model_config(checkpoint, encoder_options)
    params = averages.load_params(checkpoint, vlm.build(config).abstract, weights=weights)
    return cls(config, params, find_tokenizer(checkpoint) if prompted else None)

  def __call__(self, image: Image.Image, prompt: str | None = None, *,
               ex: Execution = HERE) -> VisualTokens:
    """Tokens [1 n d] of one image, before any projector.

    Args:
      prompt: text that says where to look (systems with a text tower: PS3).

    Raises:
      UserError: a prompt for a model without a text tower.
    """
    encoder = self.config.encoder
    batch = self.system.batch([self.system.views([image], encoder)], encoder)
    options = {} if prompt is None else {'prompt': self.prompt(prompt, ex=ex)}
    return self._run(self.params['vision'], batch, options, ex=ex)

  def compilations(self) -> int:
    """How many programs were compiled so far."""
    return self._run._cache_size() + self._prompt._cache_size()

  def prompt(self, text: str, *, ex: Execution = HERE) -> jax.Array:
    """The selection prompt [1 d] of a text.

    Raises:
      UserError: the model has no text tower.
    """
    ids = None
    if self.config.text is None and self.tokenizer is not None:
      ids = self.system.prompt_ids([text], self.tokenizer, self.config.encoder)
    if ids is None:
      raise UserError(f'--prompt: a model of system {self.config.system} without a text tower and '
                      'its tokenizer takes no prompt')
    if not text.strip():
      raise UserError('--prompt: the text is empty')
    return self._prompt(self.params, ids, ex=ex)

  def overlay(self, image: Image.Image, tokens: VisualTokens) -> Image.Image:
    """What the encoder looked at, drawn on the image."""
    info = jax.tree.map(np.asarray, tokens.info)
    return self.system.overlay(image, self.config.encoder, info)
