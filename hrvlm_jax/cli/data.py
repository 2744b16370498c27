"""`hrvlm data show | check | build | questions`: data looked at, checked, made into other data."""

import json
import pathlib
import sys

from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, unknown

ACTIONS = {
    'show': 'a batch of a run config: shapes, ranges, text with its label mask, pictures',
    'check': 'every row of a data set; lists all that cannot be used, with their lines',
    'build': 'a data set as ArrayRecord shards: self-contained, resumable, checksummed',
    'questions': 'captioned boxes (hrvlm curate) as questions with boxes, for VILA-HD',
}


def main(argv: list[str]) -> int:
  """Looks at data before a run, checks whole data sets, makes them self-contained."""
  if not argv or argv[0] in ('-h', '--help'):
    print('usage: hrvlm data ACTION [options]        (hrvlm data ACTION --help lists them)\n')
    print('\n'.join(f'  {name:<9} {text}' for name, text in ACTIONS.items()))
    if not argv:
      return 0
    raise SystemExit(0)
  if argv[0] not in ACTIONS:
    raise UserError(unknown(argv[0], ACTIONS, what='data action'))
  return {'show': _show, 'check': _check, 'build': _build,
          'questions': _questions}[argv[0]](argv[1:])


def _show(argv: list[str]) -> int:
  parser = Parser('data show', ACTIONS['show'], config=True)
  parser.add_argument('--step', type=int, default=0, help='which batch (0 is the first)')
  parser.add_argument('--rows', type=int, default=4, help='how many rows are written out')
  parser.add_argument('--out', metavar='OUT.png', help='draw the images of these rows')
  parser.add_argument('--colour', choices=('auto', 'always', 'never'), default='auto')
  arguments = parser.parse(argv)
  if arguments.step < 0 or arguments.rows < 0:
    raise UserError(f'--step {arguments.step} --rows {arguments.rows}: expected no negative number')
  if arguments.out is not None:
    out = pathlib.Path(arguments.out)
    if out.suffix.lower() not in ('.png', '.jpg', '.webp') or not out.parent.is_dir():
      raise UserError(f'--out {out}: expected a name that ends in .png in an existing folder')

  from hrvlm_jax.data import show
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.config import RunConfig
  from hrvlm_jax.training.inspection import inspect_batch

  config = run_config.load(RunConfig, arguments.config, arguments.overrides)
  colour = arguments.colour == 'always' or (arguments.colour == 'auto' and sys.stdout.isatty())
  found = inspect_batch(config, arguments.step, rows=arguments.rows, draw=arguments.out is not None)
  print(f'batch {arguments.step} of {config.model.system}')
  print('\n'.join(show.shapes(found.batch)))
  for name, share in found.shares.items():
    print(f'{name:<22} {share:.1%}')
  for number, row in enumerate(found.rows):
    print(f'\nrow {number}')
    print(show.text_of_row(row, found.tokenizer, colour=colour))
  for fault in found.faults:
    print(f'\nnot used ({fault.kind}): {fault.message}')
  if arguments.out is not None:
    if not found.panels:
      raise UserError(f'--out {arguments.out}: the rows shown have no images')
    from hrvlm_jax.checkpoint.files import whole_file

    with whole_file(arguments.out) as part:
      show.sheet(found.panels).save(part)
    print(f'\ndrawn: {arguments.out}')
  return 0


def _source(parser: Parser, argv: list[str]):
  _data(parser)
  arguments = parser.parse(argv)

  from hrvlm_jax.data.sources import open_source

  return arguments, open_source(arguments.data, images=arguments.images, split=arguments.split)


def _data(parser: Parser, **options):
  parser.add_argument('data', help='LLaVA JSON, mixture, parquet, ArrayRecord, TFDS or a folder',
                      **options)
  parser.add_argument('--images', metavar='FOLDER', help='what image paths are relative to')
  parser.add_argument('--split', help='of a data set with several, such as train[:10%%] of TFDS; '
                      'default: train')


def _check(argv: list[str]) -> int:
  parser = Parser('data check', ACTIONS['check'] + '; status 1 when there are any. With --config '
                  'the batches of an epoch are made as that run makes them, of DATA or of its own '
                  'data.train.', config=True, config_required=False)
  parser.add_argument('--image', choices=('decode', 'header', 'none'),
                      help='how far images are checked without --config (default: decode)')
  parser.add_argument('--template', help='chat template the rows are meant for, without --config')
  _max_pixels(parser)
  parser.add_argument('--workers', type=int, help='processes; default: one per core for large sets')
  parser.add_argument('--out', metavar='FAULTS.jsonl', help='write all faults there')
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  _data(parser, nargs='?')
  arguments = parser.parse(argv)
  if arguments.data is None and arguments.config is None:
    raise UserError('data check: found no data; name a file or folder, or the run with --config')
  if arguments.config is not None and (arguments.image or arguments.template):
    raise UserError('--image and --template: the run of --config decides both; leave them out')
  if arguments.workers is not None and arguments.workers < 0:
    raise UserError(f'--workers {arguments.workers}: expected no negative number')
  report = _as_trained(arguments) if arguments.config is not None else _rows(arguments)
  for fault in report.faults:
    print(f'{fault.message} [{fault.kind}]')
  if arguments.out is not None:
    from hrvlm_jax.checkpoint.files import whole_file

    lines = (json.dumps({'row': fault.position, 'kind': fault.kind, 'message': fault.message})
             for fault in report.faults)
    with whole_file(arguments.out) as part:
      part.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
  print(report.summary())
  if arguments.config is None:
    print('what a run does with these rows (its template, lengths, crops) is checked with --config',
          file=sys.stderr)
  return 1 if report.faults else 0


def _rows(arguments):
  from hrvlm_jax.data.checks import RowCheck, check_source
  from hrvlm_jax.data.sources import open_source
  from hrvlm_jax.language.chat import get_template

  source = open_source(arguments.data, images=arguments.images, split=arguments.split)
  template = None if arguments.template is None else get_template(arguments.template)
  check = RowCheck(image=arguments.image or 'decode', template=template,
                   **_limit(arguments))
  return check_source(source, check, workers=arguments.workers, progress=not arguments.quiet)


def _max_pixels(parser: Parser) -> None:
  parser.add_argument('--max-pixels', type=int, metavar='N',
                      help='refuse larger images, before they are decoded (default: 178956970, or '
                      'data.max_pixels of the run)')


def _limit(arguments) -> dict[str, int]:
  if arguments.max_pixels is None:
    return {}
  if arguments.max_pixels < 1:
    raise UserError(f'--max-pixels {arguments.max_pixels}: expected at least 1')
  return {'max_pixels': arguments.max_pixels}


def _as_trained(arguments):
  from hrvlm_jax.data.checks import check_batches
  from hrvlm_jax.training import run_config
  from hrvlm_jax.training.batches import make_batches
  from hrvlm_jax.training.config import RunConfig

  overrides = [('data.bad_rows', 'skip')]
  _limit(arguments)
  for key in ('images', 'workers', 'max_pixels', 'split'):
    if getattr(arguments, key) is not None:
      overrides.append((f'data.{key}', str(getattr(arguments, key))))
  if arguments.data is not None:
    overrides.append(('data.train', arguments.data))
  config = run_config.load(RunConfig, arguments.config, [*arguments.overrides, *overrides])
  return check_batches(make_batches(config), progress=not arguments.quiet)


def _build(argv: list[str]) -> int:
  parser = Parser('data build', ACTIONS['build'] + '; run again, it goes on where it was stopped')
  parser.add_argument('--out', required=True, metavar='FOLDER')
  parser.add_argument('--name', default='data', help='beginning of the file names')
  parser.add_argument('--shard-rows', type=int, default=1000, help='rows per file')
  parser.add_argument('--bad-rows', choices=('skip', 'fatal'), default='skip',
                      help='leave bad rows out and list them in the manifest, or stop')
  _max_pixels(parser)
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  arguments, source = _source(parser, argv)
  if arguments.shard_rows < 1:
    raise UserError(f'--shard-rows {arguments.shard_rows}: expected at least 1')

  from hrvlm_jax.data.build import build_records, verify_records
  from hrvlm_jax.data.checks import RowCheck

  manifest = build_records(source, arguments.out, name=arguments.name,
                           shard_rows=arguments.shard_rows, bad_rows=arguments.bad_rows,
                           check=RowCheck(**_limit(arguments)),
                           progress=not arguments.quiet)
  verify_records(manifest)
  shards = json_text.loads(manifest.read_text())['shards']
  rows, bad = sum(s['rows'] for s in shards), sum(len(s['bad']) for s in shards)
  print(f'{rows} rows in {len(shards)} files, checksums verified; {bad} bad rows left out')
  print(f'written: {manifest}')
  return 0


def _questions(argv: list[str]) -> int:
  parser = Parser('data questions', ACTIONS['questions'] + '. Without --asker the question says '
                  'where on the picture, the caption answers.')
  parser.add_argument('records', help='region records: ArrayRecord of hrvlm curate, tar shards')
  parser.add_argument('--annotations', help='tar shards with the JSON, where it is not beside the '
                      'images')
  parser.add_argument('--out', required=True, metavar='FOLDER', help='train.json and images/')
  parser.add_argument('--asker', metavar='MODULE:FUNCTION',
                      help='(caption, box, (width, height), type) -> (question, answer); a '
                      'language model belongs here')
  arguments = parser.parse(argv)

  from hrvlm_jax.core.registry import load_callable
  from hrvlm_jax.systems.ps3 import ask_boxes
  from hrvlm_jax.systems.ps3.shards import open_regions

  ask = ask_boxes.template_question
  if arguments.asker:
    ask = load_callable(arguments.asker, '--asker')
  rows, bad = ask_boxes.write_questions(
    open_regions(arguments.records, annotations=arguments.annotations), arguments.out, ask=ask)
  print(f'{rows} questions, {len(bad)} records left out: {arguments.out}/train.json '
        '(--config.data.boxes=True trains on the boxes)')
  for fault in bad[:5]:
    print(f'  {fault}')
  return 0
