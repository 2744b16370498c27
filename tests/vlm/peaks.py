"""Bytes of a device while a model of real width answers, as compiled, beside what they are for.

    python -m tests.vlm.peaks RELEASE DEPTH MESH ...

Nothing is computed and no weight is made: the programs of `language.generate` are compiled for fake
devices, with the widths of the release and DEPTH layers. Prints one JSON object: mesh -> program ->
{'peak': bytes, 'taken': bytes of arguments whose memory the results take, 'parts': {name: bytes}}.
The parts are counted by hand: the share of the language model's parameters, the cache, what goes in
and comes out, and the temporaries that a layer needs: its weights where they are spread and
gathered, and either its attention or its MLP. The program that encodes the views (`prompt`; of two
passes the first reads the prompt too) needs its pixels, and the dearest layer that it has.
"""

import argparse
import dataclasses
import json
import math
import sys

NEW = 32
SCORES = 2**27  # of one attention at a time on one device (`core.attention`)


def peak(lowered, arguments: int) -> dict[str, int]:
  """Bytes of one device beyond the encoder's parameters, which lie there in any case, and how many
  of them are arguments whose memory the results take.

  Args:
    arguments: bytes of the program's arguments, those parameters left out.
  """
  found = lowered.compile().memory_analysis()
  beside = max(found.argument_size_in_bytes - arguments, 0)
  total = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
  return {'peak': total - found.alias_size_in_bytes - beside, 'taken': found.alias_size_in_bytes}


def seen(config, rows: int, tensor: int) -> dict[str, int]:
  """What the views of a device's rows take while they are encoded, in bytes."""
  encoder = config.encoder
  if config.system == 'vila_hd':  # as floats, scaled, and normalised
    return {'pixels': 3 * 4 * rows * 3 * encoder.side**2}
  # A ConvNeXt's first stage has the most places: its stream, and its MLP before and after GELU.
  places, width = rows * (encoder.image_size // 4)**2, encoder.slow.widths[0]
  return {'stream of the first stage': 3 * 4 * places * width,
          'MLP of the first stage': 2 * 4 * places * 4 * width // tensor}


def prompt(g, config, layout, params, rows: int) -> tuple:
  """(the program that encodes views, lowered; bytes of its batch on a device; places)."""
  import jax

  from hrvlm_jax.parallel import fitting
  from hrvlm_jax.parallel.mesh import batch_sharding
  from hrvlm_jax.training.batches import batch_shapes
  from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
  from hrvlm_jax.training.program import placed
  from hrvlm_jax.vlm.where import prompt_places

  length = -(-(prompt_places(config) + 128) // 256) * 256
  training = TrainingConfig(steps=1, batch_size=1, optimizer=OptimizerConfig(learning_rate=1.0))
  run = RunConfig(model=config, data=DataConfig(train='x', lengths=(length,)), training=training)
  batch = batch_shapes(run, rows * layout.shards, length=length, image=(3840, 2160)).arrays
  del batch['labels']
  batch = placed(batch, batch_sharding(layout.mesh))
  leaves = jax.tree.leaves(batch)
  held = fitting.local_bytes(leaves, [leaf.sharding for leaf in leaves])
  return g._apply.lower(params, batch, method='prompt', ex=g.ex), held, length


def programs(release: str, depth: int, mesh: str, *, rows: int = 2, length: int = 512
             ) -> dict[str, dict]:
  """Each program of an answer: its peak, and its parts by arithmetic.

  Args:
    rows: of each shard.
    length: places of the prompt.
  """
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec as P

  from hrvlm_jax.cli.arguments import axes
  from hrvlm_jax.core import paths
  from hrvlm_jax.core.execution import Execution
  from hrvlm_jax.language import generate
  from hrvlm_jax.language.generate import Generator
  from hrvlm_jax.language.sampling import Sampling
  from hrvlm_jax.parallel import fitting, rules
  from hrvlm_jax.parallel.layout import Layout
  from hrvlm_jax.parallel.mesh import BATCH_AXES
  from hrvlm_jax.planning.answering import releases
  from hrvlm_jax.systems.contract import sharding_rules
  from hrvlm_jax.vlm import model as vlm

  config = dict(releases())[release]
  config = dataclasses.replace(config, text=dataclasses.replace(config.text, depth=depth))
  sizes = axes(mesh)
  layout = Layout(sizes, devices=jax.devices()[:math.prod(sizes.values())])
  ex, text = Execution(mesh=layout.mesh), config.text
  fn = vlm.build(config, unrolled=True)
  places = rules.param_shardings(fn.abstract, layout.mesh, rules=sharding_rules(config))
  params = layout.abstract(fn.abstract, places)
  held = {path: fitting.local_bytes([leaf], [leaf.sharding])
          for path, leaf in paths.flatten(params).items()}
  spoken = {path: leaf for path, leaf in paths.flatten(params).items()
            if path.startswith('language/')}
  shares = {path: held[path] for path in spoken}

  shards, tensor = layout.shards, layout.mesh.shape['tensor']
  batch, slots = rows * shards, length + NEW
  place = NamedSharding(layout.mesh, P(BATCH_AXES))
  row = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, *shape), dtype,
                                                               sharding=place)
  number = lambda dtype=jnp.int32: jax.ShapeDtypeStruct((), dtype)
  cut = NamedSharding(layout.mesh, P(BATCH_AXES, 'tensor' if text.kv_heads % tensor == 0 else None))
  cache = [{name: jax.ShapeDtypeStruct((batch, text.kv_heads, slots, text.head_dim), jnp.float32,
                                       sharding=cut) for name in 'kv'} for _ in range(depth)]
  cached = fitting.local_bytes(jax.tree.leaves(cache), [cut] * (2 * depth))
  layer = [path for path in spoken if '/blocks/0/' in path]
  table = max(math.prod(leaf.shape) for path, leaf in spoken.items() if '/blocks/' not in path)
  gathered = whole = 0
  if layout.mesh.shape['fsdp'] > 1:  # weights of a layer, or the output layer, as heads are cut
    whole = sum(shares[path] for path in layer) * layout.mesh.shape['fsdp']
    gathered = max(whole, 4 * table // tensor)
  heads = text.heads / tensor
  kv = text.kv_heads / (tensor if text.kv_heads % tensor == 0 else 1)

  def parts(queries: int, keys: int, *, inputs: int = 0) -> dict[str, int]:
    states = rows * queries * text.width
    scores = min(rows * queries * heads * keys, SCORES)
    attended = rows * queries * (heads + 2 * kv) * text.head_dim + 2 * scores
    attended += 2 * rows * keys * heads * text.head_dim  # keys and values as they are multiplied
    within = 3 * rows * queries * text.mlp_width / tensor
    return {'parameters': sum(shares.values()), 'cache': cached, 'inputs': inputs,
            'gathered weights': int(gathered), 'states': int(4 * 3 * states),
            'attention or MLP': int(4 * max(attended, within)),
            'logits': int(4 * 3 * rows * text.vocab_size)}

  g, found = Generator(fn, params, ex=ex), {}

  def keep(name, lowered, *, arguments, **how):
    found[name] = peak(lowered, sum(shares.values()) + arguments) | {'parts': parts(**how)}

  logits, valid = row(text.vocab_size), row(slots, dtype=bool)
  embeds = 4 * rows * length * text.width
  keep('prefill', g._prefill.lower(params, row(length, text.width), row(length, dtype=bool), {},
                                   slots=slots, ex=ex),
       arguments=embeds + rows * length, queries=length, keys=length, inputs=embeds)
  small = rows * (slots + 4 * text.vocab_size) + (1 << 12)
  key = jax.eval_shape(lambda: jax.random.key(0))
  keep('loop', g._loop.lower(params, logits, valid, cache, number(), number(), key, {},
                             sampling=Sampling(max_new_tokens=NEW, stop_ids=(2,)),
                             keep_logits=False, ex=ex),
       arguments=cached + small, queries=1, keys=slots)
  keep('step', g._step.lower(params, row(dtype=jnp.int32), valid, cache, number(), {}, ex=ex),
       arguments=cached + small, queries=1, keys=slots)
  lowered, inputs, places = prompt(g, config, layout, params, rows)
  # Of two passes the first reads the prompt, with all but the output layer; else only the table of
  # tokens is read. Views are encoded before that.
  first = config.system == 'vila_hd'
  used = {path: size for path, size in held.items() if path == 'language/embed/embedding' or
          path not in spoken or (first and not path.startswith('language/head'))}
  asked, dearest = parts(places, places), seen(config, rows, tensor)
  if first:
    dearest = {'pixels, or attention or MLP': max(*dearest.values(), asked['attention or MLP']),
               'gathered weights': int(gathered and whole)}
  found['prompt'] = peak(lowered, sum(used.values()) + inputs) | {
    'parts': {'parameters': sum(used.values()), 'inputs': inputs, 'states': asked['states'],
              **dearest}}
  # The rows of a shard are the beams of one prompt: what was and what becomes of it.
  prompts = jax.ShapeDtypeStruct((shards, rows), jnp.int32)
  lowered = generate._reorder.lower((valid, cache), prompts, ex=ex)
  found['beams'] = peak(lowered, cached + small) | {
    'parts': {'cache': cached, 'cache in its new order': cached}}
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('release')
  parser.add_argument('depth', type=int)
  parser.add_argument('meshes', nargs='+')
  parser.add_argument('--rows', type=int, default=2)
  arguments = parser.parse_args()
  print(json.dumps({mesh: programs(arguments.release, arguments.depth, mesh, rows=arguments.rows)
                    for mesh in arguments.meshes}, indent=1), flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
