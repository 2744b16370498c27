"""`hrvlm curate`: see `systems.ps3.curate`."""

import json
import pathlib

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.cli.arguments import Parser
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all


def main(argv: list[str]) -> int:
  """Finds and captions salient regions of images and writes them as records for PS3's pre-training.

  Without --segmenter and --captioner it needs no model: regions are where edges are dense, captions
  name place and colours.
  """
  parser = Parser('curate', main.__doc__)
  parser.add_argument('images', help='folder of images, or any data set `hrvlm train` reads; with '
                      '--kind documents also PDF files (extra pdf)')
  parser.add_argument('--out', required=True, help='folder for the ArrayRecord shards')
  parser.add_argument('--kind', choices=('photographs', 'documents'), default='photographs',
                      help='documents: lines of text are the captions')
  parser.add_argument('--segmenter', metavar='MODULE:FUNCTION',
                      help='(image, MaskConfig) -> masks bool [h w] (or SAM records); '
                      'default: density of edges')
  parser.add_argument('--captioner', metavar='MODULE:FUNCTION',
                      help='(image, box or None) -> text; default: place and colours')
  parser.add_argument('--ocr', metavar='MODULE:FUNCTION',
                      help='documents: (image, row) -> [(box, text)]; default: the JSON beside '
                      'each image, {"lines": [{"box", "text"}]}')
  parser.add_argument('--page-side', type=int, default=2000,
                      help='documents: pixels of the longer side of a PDF page')
  parser.add_argument('--config', metavar='FILE.json', help='values of CurateConfig; masks.* are '
                      "the segmenter's, by default those of the paper")
  parser.add_argument('--shard-rows', type=int, default=1000)
  parser.add_argument('--name', default='regions', help='first part of the file names')
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  arguments = parser.parse(argv)

  from hrvlm_jax.core.config import from_dict, to_dict
  from hrvlm_jax.core.registry import load_callable
  from hrvlm_jax.data.build import build_records
  from hrvlm_jax.data.pdf import PdfPages, are_pdfs
  from hrvlm_jax.data.sources import open_source
  from hrvlm_jax.systems.ps3 import curate
  from hrvlm_jax.systems.ps3.records import RegionCheck

  config = curate.CurateConfig()
  if arguments.config is not None:
    try:
      values = json_text.loads(pathlib.Path(arguments.config).read_text('utf-8'))
    except (OSError, ValueError) as error:
      raise UserError(f'--config {arguments.config}: expected a JSON file ({error})') from error
    config = from_dict(curate.CurateConfig, values, title=arguments.config)
  if arguments.shard_rows < 1:
    raise UserError(f'--shard-rows: expected at least 1, got {arguments.shard_rows}')
  functions = {}
  for field, option in (('segmenter', 'segmenter'), ('captioner', 'captioner'), ('reader', 'ocr')):
    if spec := getattr(arguments, option):
      functions[field] = load_callable(spec, f'--{option}')
  if arguments.kind == 'documents' and (arguments.segmenter or arguments.captioner):
    raise UserError('--kind documents: captions are lines of text; --segmenter and --captioner are '
                    'for photographs')
  if arguments.kind == 'photographs' and arguments.ocr:
    raise UserError('--ocr goes with --kind documents')
  pdf = are_pdfs(arguments.images)
  if pdf and arguments.kind != 'documents':
    raise UserError(f'{arguments.images}: PDF goes with --kind documents')
  if pdf and not arguments.ocr:
    functions['reader'] = curate.page_lines
  folder = pathlib.Path(arguments.out)
  _claim(folder, folder / f'{arguments.name}.curate.json', {
    'images': arguments.images, 'kind': arguments.kind, 'segmenter': arguments.segmenter,
    'captioner': arguments.captioner, 'ocr': arguments.ocr, 'config': to_dict(config),
    **({'page_side': arguments.page_side} if pdf else {})})
  source = curate.Curated(
    source=PdfPages(arguments.images, side=arguments.page_side) if pdf else
    open_source(arguments.images), config=config, kind=arguments.kind, **functions)
  manifest = build_records(source, arguments.out, name=arguments.name, check=RegionCheck(),
                           shard_rows=arguments.shard_rows, progress=not arguments.quiet)
  shards = json_text.loads(manifest.read_text())['shards']
  bad = [fault for shard in shards for fault in shard['bad']]
  rows = sum(shard['rows'] for shard in shards)
  if not rows:
    raise UserError(f'none of the {len(bad)} images can be used, {manifest} lists why (the first: '
                    f'{bad[0]["message"]})')
  print(f'{rows} records in {len(shards)} shards, {len(bad)} '
        f'images left out: {manifest}')
  for fault in bad[:5]:
    print(f'  {fault["message"]}')
  if len(bad) > 5:
    print(f'  and {len(bad) - 5} more, listed in the manifest')
  return 0


def _claim(folder: pathlib.Path, path: pathlib.Path, settings: dict) -> None:
  """Notes how the records of a folder are made; a build that was stopped goes on only so.

  Raises:
    UserError: the folder holds records made in another way, or cannot be made.
  """
  settings = json.loads(json.dumps(settings))
  if path.exists():
    found = json_text.loads(path.read_text('utf-8'))
    raise_all(f'{path}: other records are there under this name; choose another --out or --name', [
      f'{key} was {found.get(key)!r}, is {value!r}' for key, value in settings.items()
      if found.get(key) != value])
    return
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
      part.write_text(json.dumps(settings, indent=2), 'utf-8')
  except OSError as error:
    raise UserError(f'--out {folder}: cannot be written ({error.strerror or error})') from error
