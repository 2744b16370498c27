"""`hrvlm plan`: what a step would need and how fast it would be on chips that are not here."""

import argparse
import dataclasses
import json
import pathlib
import sys

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core.errors import UserError, unknown


def main(argv: list[str]) -> int:
  """Compiles the real step of a config for a TPU topology or a GPU mesh, without having one.

  Prints memory per device, operations, messages between devices, and the time of a step by what it
  is spent on, from an optimistic to a likely end. Status 1 when the step does not fit. With
  --explain FILE it reads a scheduled program that is stored in a file instead.
  """
  stored = _names_a_file(argv)
  released = any(word.partition('=')[0] == '--release' for word in argv)
  parser = Parser('plan', main.__doc__, config=True, config_required=not (stored or released))
  parser.add_argument('--release', metavar='NAME', help='instead of --config, for all steps but '
                      'train: a released model, as docs/answering.md lists them')
  parser.add_argument('--explain', type=pathlib.Path, nargs='?', const=True, metavar='FILE',
                      help='also time by source function and the ten dearest places; with FILE, a '
                      'scheduled program as text (.gz, .xz, .bz2 too), of that program alone')
  parser.add_argument('--chip', default='v5e', help='with --explain FILE: v5e, v5p, v6e, ...')
  asks = any(word.removeprefix('--step=') in ('answer', 'prefill', 'decode') for word in argv)
  parser.add_argument('--topology', required=not (stored or asks or released),
                      help='such as v5e:16x16, v5p:4x4x4, v6e:16x16, v4:2x2x4, tpu7x:4x4x4, gpu:8, '
                      'or cpu:8, which stands for no chip; without one, all steps but train say on '
                      'which smallest slices of v5e, v5p and v6e the model answers')
  parser.add_argument('--slices', type=int, default=1, help='equal slices joined by the network')
  parser.add_mesh()
  parser.add_argument('--step', choices=('train', 'prefill', 'decode', 'answer'), default='train',
                      help='answer: by arithmetic, on the topology or on the smallest slices')
  parser.add_argument('--length', type=int, help='places of a row; default: longest bucket')
  parser.add_argument('--rows', type=int, help='of all steps but train: prompts at a time; '
                      'default: one for each shard of the batch')
  parser.add_argument('--new-tokens', type=int, default=128, help='of all steps but train: the '
                      'cache has places for so many answered tokens beside the prompt')
  parser.add_argument('--image', type=size, default=(1024, 768), help='WIDTHxHEIGHT of the images')
  parser.add_argument('--images', type=int, default=1, help='images of an example')
  parser.add_argument('--search', action='store_true', help='try meshes, then for training '
                      'recomputation and micro-batches, keep the best; what cannot fit by '
                      'arithmetic is not compiled')
  parser.add_argument('--batches', type=numbers, default=(),
                      help='with --search: global batches to try, such as 128,256')
  parser.add_argument('--effort', choices=('arithmetic', 'scheduled', 'generated'),
                      help='scheduled (default): the compiler for TPUs at full effort, stopped '
                      'before it generates code; generated takes ten times as long and uses its '
                      'own cycles of products; arithmetic compiles nothing, and is the default for '
                      'GPUs, whose compiler is not here (scheduled partitions the step for '
                      'stand-ins of them)')
  parser.add_argument('--costs', type=pathlib.Path, metavar='FILE',
                      help='constants as `hrvlm bench tpu_calibrate` measures them, instead of '
                      'those of planning/costs.json')
  parser.add_argument('--compiler', type=option, action='append', default=[],
                      metavar='NAME=VALUE', help='option of the compiler for TPUs beside those of '
                      'the chip (parallel/compiler.json), several times')
  parser.add_argument('--program', type=pathlib.Path, metavar='FILE',
                      help='keep the scheduled program there (.gz, .xz, .bz2: compressed)')
  parser.add_argument('--json', type=pathlib.Path, help='write the report there')
  parser.add_argument('--timeout', type=float, default=1800, help='seconds for one compilation')
  arguments = parser.parse(argv)
  if stored:
    return _explain(arguments)

  from hrvlm_jax.core.config import to_dict
  from hrvlm_jax.parallel import fitting as parallel_fitting
  from hrvlm_jax.parallel.mesh import MeshConfig, mesh_config
  from hrvlm_jax.parallel.topology import parse
  from hrvlm_jax.planning import answering, plan, report as reports
  from hrvlm_jax.training import fitting, run_config
  from hrvlm_jax.training.config import RunConfig

  for name in ('rows', 'new_tokens'):
    flag, value = f'--{name.replace("_", "-")}', getattr(arguments, name)
    if value is not None and value < 1:
      raise UserError(f'{flag}: found {value}, expected at least 1')
    if arguments.step == 'train' and value != parser.get_default(name):
      instead = {'rows': 'its rows are --config.training.batch_size',
                 'new_tokens': 'it writes no new tokens, leave it out'}
      raise UserError(f'{flag} is of --step answer, prefill and decode, found --step train: '
                      f'{instead[name]}')
  mesh_config(arguments.mesh)  # a wrong axis is a sentence before anything is compiled
  if arguments.release is None:
    config = run_config.load(RunConfig, arguments.config, arguments.overrides)
  else:
    config = _release(arguments)
  if arguments.mesh is not None:
    config = dataclasses.replace(config, mesh=mesh_config(arguments.mesh))
  if arguments.step == 'answer' or arguments.topology is None:
    return _answering(config, arguments)
  topology = parse(arguments.topology, slices=arguments.slices)
  effort = arguments.effort
  if effort is None:
    plain = topology.chip.platform == 'gpu' and arguments.step == 'train' and not arguments.search
    effort = 'arithmetic' if plain else 'scheduled'
  if effort == 'arithmetic':
    return _arithmetic(config, topology, arguments)
  options = {'config': to_dict(config), 'length': arguments.length, 'image': arguments.image,
             'images': arguments.images}
  target = 'hrvlm_jax.planning.programs:train_program'
  if arguments.step != 'train':
    target = 'hrvlm_jax.planning.programs:serve_program'
    options |= {'what': arguments.step, 'rows': arguments.rows,
                'new_tokens': arguments.new_tokens}
  how = {'effort': effort, 'timeout': arguments.timeout, 'constants': arguments.costs,
         'compiler': dict(arguments.compiler)}
  if arguments.search:
    report = _search(arguments, target, options, how)
  else:
    mesh = to_dict(config.mesh)
    if arguments.step == 'train' and config.mesh == MeshConfig():
      choice = _chosen(config, topology, arguments)
      print('\n'.join(fitting.told(config, choice)))
      mesh = to_dict(choice.mesh)
    elif config.mesh == MeshConfig():
      choice = answering.answers_on(config.model, topology, dtype=config.training.dtype,
                                    rows=arguments.rows or 1, new_tokens=arguments.new_tokens)
      print(f'mesh {parallel_fitting.axes_of(choice.mesh)}: {choice.words}')
      mesh = to_dict(choice.mesh)
    report = plan.plan(target, options, arguments.topology, mesh=mesh, slices=arguments.slices,
                       keep=arguments.program, **how)
  print(reports.describe(report, dearest=arguments.explain is not None))
  if arguments.json is not None:
    _write(arguments.json, json.dumps(report, indent=2))
    print(f'written: {arguments.json}')
  return 0 if report['memory']['fits'] else 1


def _release(arguments):
  """A run config of a released model, of which serving reads model, length and dtype."""
  from hrvlm_jax.planning import answering
  from hrvlm_jax.training.config import DataConfig, OptimizerConfig, RunConfig, TrainingConfig
  from hrvlm_jax.vlm.where import prompt_places

  if arguments.config is not None:
    raise UserError('--release and --config both name a model; give one of them')
  if arguments.step == 'train':
    raise UserError('--release names a model that answers: expected --step answer, prefill or '
                    'decode; a train step is of a recipe, --config')
  known = dict(answering.releases())
  if arguments.release not in known:
    raise UserError(unknown(arguments.release, known, what='release'))
  model = known[arguments.release]
  return RunConfig(
    model=model, data=DataConfig(train='none', lengths=(prompt_places(model),)),
    training=TrainingConfig(steps=1, batch_size=1, dtype='bfloat16',
                            optimizer=OptimizerConfig(learning_rate=1e-5)))


def _answering(config, arguments) -> int:
  """Where the model of a config answers."""
  from hrvlm_jax.parallel.mesh import mesh_config
  from hrvlm_jax.planning import answering

  if config.model.text is None:
    raise UserError(f'model.text is none: {config.model.system} alone answers no questions')
  step = f'--step {arguments.step}'
  if arguments.mesh is not None and arguments.topology is None:
    raise UserError(f'--mesh needs --topology with {step}; without both the smallest slices are '
                    'looked for')
  unread = [name for name in ('search', 'batches', 'effort', 'compiler', 'program', 'json', 'costs',
                              'explain', 'length') if getattr(arguments, name)]
  if arguments.topology is None and arguments.slices != 1:
    unread.append('slices')
  if unread:
    without = '' if arguments.step == 'answer' else ' without --topology'
    raise UserError(f'{step}{without} is arithmetic and compiles nothing; leave out '
                    f'{", ".join(f"--{name}" for name in unread)}')
  lines, fits = answering.describe(
    config.model, () if arguments.topology is None else (arguments.topology,),
    slices=arguments.slices, mesh=None if arguments.mesh is None else mesh_config(arguments.mesh),
    rows=arguments.rows or 1, new_tokens=arguments.new_tokens)
  print('\n'.join(lines))
  if arguments.step != 'answer':
    print(f'{step} --topology SLICE compiles the step itself')
  return 0 if fits else 1


def _chosen(config, topology, arguments):
  """The mesh of a config on a topology, by arithmetic."""
  from hrvlm_jax.planning import training

  return training.trains_on(config, topology, length=arguments.length, image=arguments.image,
                            images=arguments.images)


def _arithmetic(config, topology, arguments) -> int:
  """What a train step needs, without a compiler: status 1 where it does not fit."""
  from hrvlm_jax.planning import training
  from hrvlm_jax.training import fitting

  if arguments.step != 'train' or arguments.search:
    raise UserError('--effort arithmetic knows the train step of one mesh; leave it out for '
                    f'{"--search" if arguments.search else "--step " + arguments.step}')
  choice = _chosen(config, topology, arguments)
  print(f'{topology.slices} x {topology.name}: {topology.chips} chips; BY ARITHMETIC, nothing was '
        'compiled: state is exact, what a step works on is estimated')
  print('\n'.join(fitting.told(config, choice)))
  print(fitting.batch_words(config, choice.mesh.shape))
  print(choice.verdict)
  if arguments.json is not None:
    report = training.report(topology, choice)
    _write(arguments.json, json.dumps(report, indent=2))
    print(f'written: {arguments.json}')
  return 0 if choice.need.total <= choice.limit else 1


def _write(path: pathlib.Path, text: str) -> None:
  from hrvlm_jax.checkpoint.files import whole_file

  with whole_file(path) as part:
    part.write_text(text + '\n')


def _names_a_file(argv: list[str]) -> bool:
  """Whether --explain is followed by a file: then nothing is compiled."""
  for word, after in zip(argv, [*argv[1:], '--']):
    if word.startswith('--explain=') or (word == '--explain' and not after.startswith('-')):
      return True
  return False


def _explain(arguments) -> int:
  """Prints what a stored program spends its time on; `--json` keeps the tables."""
  from hrvlm_jax.planning import explain, schedule
  from hrvlm_jax.planning.costs import costs

  reading = schedule.read(explain.load(arguments.explain), costs(arguments.chip, arguments.costs))
  print(explain.describe(reading))
  if arguments.json is not None:
    _write(arguments.json, json.dumps(explain.summary(reading), indent=2))
    print(f'written: {arguments.json}')
  return 0


def _search(arguments, target, options, how):
  """The best of several meshes, and for training of recomputation, batch and micro-batches.

  A mesh cuts a micro-batch into data x fsdp parts. Where the config's has too few rows for them,
  fewer micro-batches are taken, the global batch staying what it is.
  """
  from hrvlm_jax.parallel.topology import parse
  from hrvlm_jax.planning.search import Search, mesh_candidates

  if arguments.program is not None:
    raise UserError('--program keeps one program; plan what --search found to keep it')
  topology = parse(arguments.topology, slices=arguments.slices)
  meshes = [arguments.mesh] if arguments.mesh else mesh_candidates(topology)
  found = Search(target, options, topology, **how,
                 say=lambda text: print(text, file=sys.stderr, flush=True))
  best = found.best(meshes, batches=arguments.batches, trains=arguments.step == 'train')
  if best is None:
    raise UserError(f'none of {len(found.reports)} candidates fits {arguments.topology}; try more '
                    'chips, a smaller batch (--batches), or training.accumulate')
  return best


def size(text: str) -> tuple[int, int]:
  """`1024x768` -> (1024, 768)."""
  try:
    width, height = (int(part) for part in text.split('x'))
  except ValueError:
    raise argparse.ArgumentTypeError(f"found '{text}', expected WIDTHxHEIGHT") from None
  return width, height


def numbers(text: str) -> tuple[int, ...]:
  """`128,256` -> (128, 256)."""
  try:
    return tuple(int(part) for part in text.split(','))
  except ValueError:
    raise argparse.ArgumentTypeError(f"found '{text}', expected numbers with commas") from None


def option(text: str) -> tuple[str, str]:
  """`xla_x=true` -> ('xla_x', 'true')."""
  name, equals, value = text.partition('=')
  if not (name and equals and value):
    raise argparse.ArgumentTypeError(f"found '{text}', expected NAME=VALUE")
  return name, value
