"""Answers of a tiny model on one device and on meshes, from a checkpoint, as `hrvlm ask` loads it.

    python -m tests.vlm.meshes SYSTEM CHECKPOINT MESH ... [--processes HOST:PORT,N,I]

SYSTEM is a system, whose tiny model it is, or one of `RELEASES`: then the language model has the
heads of that release and a sixteenth of its widths. MESH is `one` or what `--mesh` takes. Prints
one JSON object: mesh -> answers to five questions, at once and one by one, greedy, with beams and
streamed. A checkpoint that is not there is made.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

RELEASES = {'llava_hr_x_13b': 'llava_hr', 'vila_hd_8b_4k_siglip': 'vila_hd'}


def small(name: str):
  """The config of a tiny model: of a system, or with the ratios of a release's language model."""
  from hrvlm_jax.systems import registry

  if name not in RELEASES:
    return registry.get(name).tiny()
  system = registry.get(RELEASES[name])
  config, text = system.tiny(), system.released[name].text
  sizes = {size: getattr(text, size) // 16
           for size in ('width', 'head_dim', 'rotary_dim', 'mlp_width')}
  own = dataclasses.replace(config.text, heads=text.heads, kv_heads=text.kv_heads, **sizes)
  if config.projector is not None:
    projector = dataclasses.replace(config.projector, n_out=own.width)
    return dataclasses.replace(config, text=own, projector=projector)
  encoder = dataclasses.replace(config.encoder, width=own.width)
  return dataclasses.replace(config, text=own, encoder=encoder)


def make(system: str, folder: pathlib.Path) -> None:
  """A checkpoint of a tiny model with random weights, large enough that answers differ."""
  import jax
  import numpy as np

  from hrvlm_jax.checkpoint import store
  from hrvlm_jax.core import paths
  from hrvlm_jax.core.config import to_dict
  from hrvlm_jax.interop.export import export
  from hrvlm_jax.language.prompt import tokenizer_of
  from hrvlm_jax.vlm import model as vlm

  config = small(system)
  # Larger than at the start of a training: what comes next depends on what came before. Pheye's
  # prompts end alike and its picture is seen through gates: its attention must look at few places.
  sharp = system == 'pheye'
  scale = lambda path: (20 if path.endswith('embed/embedding') else
                        30 if sharp and path.endswith(('/q/kernel', '/k/kernel')) else
                        4 if path.endswith('kernel') else 1)
  params = paths.map_with_path(lambda path, leaf: scale(path) * np.asarray(leaf),
                               vlm.build(config).init(jax.random.key(0)))
  store.save_params(folder, params, {'model': to_dict(config)})
  (folder / 'tokenizer').mkdir()
  tokenizer_of('byte').save(folder / 'tokenizer')
  export(folder, f'{folder}_export')


def check_tensors(params, checkpoint: str, layout) -> None:
  """An original's tensors, laid straight from their files: the same arrays in the same places."""
  import jax
  import numpy as np

  from hrvlm_jax.core import paths
  from hrvlm_jax.interop.convert import Release
  from hrvlm_jax.vlm import laid

  release = Release(f'{checkpoint}_export')
  found = paths.flatten(laid.load_tensors(release.tensors, release.table, release.config, layout))
  wanted = paths.flatten(params)
  assert found.keys() == wanted.keys()
  for path, leaf in wanted.items():
    assert leaf.sharding.is_equivalent_to(found[path].sharding, leaf.ndim), path
    for a, b in zip(leaf.addressable_shards, found[path].addressable_shards, strict=True):
      np.testing.assert_array_equal(a.data, b.data, err_msg=path)
  largest = max(jax.tree.leaves(params), key=lambda leaf: leaf.nbytes)
  assert layout.mesh.shape['fsdp'] * layout.mesh.shape['tensor'] == 1 or (
    largest.addressable_shards[0].data.nbytes < largest.nbytes)


def answers(checkpoint: str, mesh: str, *, beams: int = 2) -> dict[str, list[list[int]]]:
  """Tokens of the answers, by how they were asked."""
  import jax
  import numpy as np
  from PIL import Image

  from hrvlm_jax.cli.arguments import axes
  from hrvlm_jax.parallel.layout import Layout
  from hrvlm_jax.vlm.answer import Answerer

  # Of more devices than the mesh has places the first are taken, as `hrvlm ask` does.
  layout = None if mesh == 'one' else Layout(
    axes(mesh), devices=jax.devices()[:math.prod(axes(mesh).values())])
  model = Answerer.load(checkpoint, layout=layout)
  if layout is not None:
    check_tensors(model.generator.params, checkpoint, layout)
    held = {leaf.sharding.mesh for leaf in jax.tree.leaves(model.generator.params)}
    assert held == {layout.mesh}
  ids: list[list[int]] = []
  model.decode = lambda row: list(map(int, row))
  rng = np.random.default_rng(1)
  items = [([Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 90 - 7 * i, 3), dtype=np.uint8))],
            f'What is {i}?') for i in range(5)]
  options = dict(max_new_tokens=6)
  found = {'at once': model.answer(items, **options),
           'beams': model.answer(items, beams=beams, **options),
           'one': model.answer(items[:1], **options),
           'one, beams': model.answer(items[:1], beams=beams, **options)}
  opened = model.placed(model.shown([model.opened(items[0])]))
  embeds, valid, extras = model.generator.prompt(opened)
  for token in model.generator.stream(embeds, valid, model.sampling(**options), extras=extras):
    ids.append(int(token[0]))
  found['streamed'] = [ids]
  if layout is not None:
    g = model.generator
    _, cache = g._prefill(g.params, embeds, valid, extras, slots=valid.shape[1] + 16, ex=g.ex)
    shards = layout.shards
    for leaf in jax.tree.leaves(cache):
      local = leaf.sharding.shard_shape(leaf.shape)
      assert local[0] == leaf.shape[0] // shards, (leaf.shape, local)
      tensor = layout.mesh.shape['tensor']
      assert leaf.shape[1] % tensor or local[1] == leaf.shape[1] // tensor, (leaf.shape, local)
  return found


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('system')
  parser.add_argument('checkpoint', type=pathlib.Path)
  parser.add_argument('meshes', nargs='+')
  parser.add_argument('--processes')
  arguments = parser.parse_args()
  import jax

  jax.config.update('jax_default_matmul_precision', 'highest')
  if arguments.processes:
    from hrvlm_jax.parallel import distributed

    address, number, own = arguments.processes.split(',')
    distributed.initialize(coordinator=address, num_processes=int(number), process_id=int(own))
  elif not arguments.checkpoint.exists():
    make(arguments.system, arguments.checkpoint)
  found = {mesh: answers(str(arguments.checkpoint), mesh) for mesh in arguments.meshes}
  print(json.dumps(found), flush=True)
  if arguments.processes:
    jax.distributed.shutdown()
  return 0


if __name__ == '__main__':
  sys.exit(main())
