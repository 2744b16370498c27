"""What answering costs: tokens, operations, memory and time of one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core.images import open_image
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.vlm.answer import Answerer


def cost(answerer: Answerer, items: Sequence[tuple[str, str]], *, answers: int,
         max_new_tokens: int) -> dict[str, Any]:
  """What answering costs, one question at a time.

  Returns:
    tokens and views (means over the images), encoder_gflops (vision and projector of one image,
    products and convolutions as traced, padding included), peak_memory_mb (arguments, results and
    temporaries of encoder and prefill as one compiled program), latency_ms (median time of an
    answer after one that is not counted).
  """
  config, system = answerer.config, answerer.system
  opened = [open_image(path) for path, _ in items]
  counts = [system.count(*image.size, config.encoder) for image in opened]
  batch = answerer.batch([([opened[0]], items[0][1])])
  held = answerer.generator
  encode = lambda params, views: held.fn.apply(params, views, method='encode').values
  abstract = lambda tree: jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.asarray(leaf).dtype), tree)
  flops = count_flops(encode, abstract(held.params), abstract(batch['views']))

  def first_token(params, batch):
    embeds, valid, extras = held.fn.apply(params, batch, method='prompt')
    slots = valid.shape[1] + max_new_tokens  # two passes embed only what the second adds
    return held.fn.apply(params, embeds, valid, slots=slots, method='prefill', **extras)[0]

  memory = _memory(first_token, held.params, batch)
  times = []
  for image, (_, question) in list(zip(opened, items, strict=True))[:answers + 1]:
    clock = time.perf_counter()
    answerer.answer([([image], question)], max_new_tokens=max_new_tokens)
    times.append(time.perf_counter() - clock)
  timed = times[1:] or times
  return {'tokens': float(np.mean([c.tokens for c in counts])),
          'views': float(np.mean([c.views for c in counts])), 'encoder_gflops': flops / 1e9,
          'peak_memory_mb': memory / 2**20, 'latency_ms': 1e3 * float(np.median(timed))}


def _memory(fn: Callable, *args: Any) -> float:
  """Bytes of arguments, results and temporaries of a compiled program."""
  found = jax.jit(fn).lower(*args).compile().memory_analysis()
  return float(found.argument_size_in_bytes + found.output_size_in_bytes
               + found.temp_size_in_bytes)
