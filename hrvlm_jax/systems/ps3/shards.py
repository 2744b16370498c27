"""Tar shards of images and JSON annotations in webdataset's form, read by index.

A sample is the members of a tar file that share a key: the name up to the first dot of its last
part. PS3's data are two such sets with equal shards and keys, images in one and annotations in the
other; one set that holds both is read as well. The tar files are indexed once, by the headers of
their members; nothing is ever unpacked to disk. Source: `NVlabs/PS3: train/README.md,
train/src/open_clip_train/data.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
import glob
import itertools
import os
import re
import tarfile

from hrvlm_jax.checkpoint.files import whole_file
from hrvlm_jax.core import json_text
from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.data.rows import BadRow, ImageRef, Row
from hrvlm_jax.data.sources import IMAGE_SUFFIXES
from hrvlm_jax.systems.ps3.records import from_published, region_row

_IMAGES = tuple(suffix.removeprefix('.') for suffix in IMAGE_SUFFIXES)
Place = tuple[int, int, int]  # shard, offset, size

# A shard's index: key -> extension -> place.
Index = dict[str, dict[str, Place]]


def expand(pattern: str) -> list[str]:
  """Paths of a pattern with ranges and lists in braces (`a-{000..012}.tar`, `{a,b}.tar`), `*` and
  `?`, or of a folder with tar files; in order.

  Raises:
    UserError: nothing there.
  """
  if os.path.isdir(pattern):
    pattern = os.path.join(pattern, '*.tar')
  parts = re.split(r'\{([^{}]+)\}', pattern)
  choices = [_alternatives(part) if i % 2 else [part] for i, part in enumerate(parts)]
  paths: list[str] = []
  for chosen in itertools.product(*choices):
    name = ''.join(chosen)
    found = sorted(glob.glob(name)) if any(c in name for c in '*?[') else [name]
    if not found or not os.path.isfile(found[0]):
      raise UserError(f'{name}: no such tar file')
    paths += found
  return paths


def _alternatives(part: str) -> list[str]:
  found = re.fullmatch(r'(\d+)\.\.(\d+)', part)
  if not found:
    return part.split(',')
  first, last = found.groups()
  if int(first) > int(last):
    raise UserError(f'{{{part}}}: the first number is larger than the last')
  return [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]


def index_shard(path: str, number: int) -> Index:
  """Key -> extension -> place of the members of a tar file.

  Members that are no regular files (links, devices) and names that lead out of a folder are an
  error: shards are data from elsewhere.

  Raises:
    UserError: not a tar file, cut short, compressed, unsafe or repeated members (all listed).
  """
  found: Index = {}
  problems = []
  try:
    size = os.path.getsize(path)
    with tarfile.open(path, 'r:') as tar:
      for member in tar:
        if member.isdir():
          continue
        name = member.name
        if not member.isfile():
          problems.append(f'member {name!r} is a link or a device, expected a file')
          continue
        if name.startswith('/') or '\\' in name or '..' in name.split('/') or '\0' in name:
          problems.append(f'member {name!r} leads out of the shard')
          continue
        if member.offset_data + member.size > size:
          problems.append(f'member {name!r} is cut short: the file ends before it')
          continue
        head, _, base = name.rpartition('/')
        key, _, extension = base.partition('.')
        entry = found.setdefault(f'{head}/{key}' if head else key, {})
        if extension.lower() in entry:
          problems.append(f'member {name!r} is there twice')
        entry[extension.lower()] = (number, member.offset_data, member.size)
  except tarfile.TarError as error:
    raise UserError(f'{path}: is not an uncompressed tar file ({error})') from error
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({error.strerror or error})') from error
  raise_all(path, problems)
  return found


class RegionShards:
  """Region records of tar shards: image and JSON under one key.

  Args:
    images: tar files with the images (see `expand`), and with the JSON unless `annotations` is
      given.
    annotations: tar files with the JSON: as many shards, with the same keys.

  Raises:
    UserError: no shards, shards or keys that do not match, samples without an image or without
      annotations (the first few are named).
  """

  def __init__(self, images: str | os.PathLike, annotations: str | os.PathLike | None = None):
    pictures = expand(os.fspath(images))
    texts = pictures if annotations is None else expand(os.fspath(annotations))
    if len(pictures) != len(texts):
      raise UserError(f'{images} has {len(pictures)} shards, {annotations} has {len(texts)}; '
                      'expected as many')
    self.paths = list(dict.fromkeys([*pictures, *texts]))
    number = {path: i for i, path in enumerate(self.paths)}
    self._rows: list[tuple[str, Place, Place]] = []
    for first, second in zip(pictures, texts, strict=True):
      left = index_shard(first, number[first])
      right = left if first == second else index_shard(second, number[second])
      self._join(left, right, first, second)
    if not self._rows:
      raise UserError(f'{images}: the shards hold no samples')

  def _join(self, left: Index, right: Index, first: str, second: str) -> None:
    problems = [f'{key}: only in {first if key in left else second}'
                for key in sorted(left.keys() ^ right.keys())]
    for key, members in left.items():
      image = next((members[e] for e in _IMAGES if e in members), None)
      text = right.get(key, {}).get('json')
      if key in right and image is None:
        problems.append(f'{key}: no image ({", ".join(members)})')
      if key in right and text is None:
        problems.append(f'{key}: no json ({", ".join(right[key])})')
      if image is not None and text is not None:
        self._rows.append((key, image, text))
    more = [] if len(problems) <= 8 else [f'and {len(problems) - 8} more']
    raise_all(f'{first} and {second}' if first != second else first, problems[:8] + more)

  def __len__(self):
    return len(self._rows)

  def __getitem__(self, index: int) -> Row:
    key, image, text = self._rows[index]
    where = f'{self.paths[image[0]]}, sample {key}'
    try:
      values = json_text.loads(self._read(text).decode('utf-8'))
    except UnicodeDecodeError as error:
      raise BadRow('encoding', where, f'its JSON is not UTF-8 text ({error.reason})') from error
    except (ValueError, RecursionError) as error:
      raise BadRow('json', where, f'not valid JSON ({error})') from error
    if not isinstance(values, dict):
      raise BadRow('form', where, f'its JSON is {type(values).__name__}, expected an object')
    try:
      regions = from_published(values)
    except UserError as error:
      raise BadRow('regions', where, str(error)) from error
    return region_row(key, ImageRef(key, data=self._read(image)), regions, where)

  def _read(self, place: Place) -> bytes:
    path, (_, offset, size) = self.paths[place[0]], place
    try:
      with open(path, 'rb') as file:
        file.seek(offset)
        data = file.read(size)
    except OSError as error:
      raise BadRow('path', path, f'cannot be read ({error.strerror or error})') from error
    if len(data) != size:
      raise BadRow('checksum', path, 'has changed since it was indexed')
    return data


def open_regions(path: str, *, annotations: str | None = None):
  """A source of region records: ArrayRecord shards, or tar shards in the original's form.

  Raises:
    UserError: nothing there, or annotations beside a kind of file that holds its own.
  """
  from hrvlm_jax.data.sources import open_source

  folder = os.path.isdir(path) and any(name.endswith('.tar') for name in os.listdir(path))
  if path.endswith('.tar') or folder:
    return RegionShards(path, annotations)
  if annotations is not None:
    raise UserError(f'{path}: annotations in a second set go with tar shards only')
  return open_source(path)


def write_shard(path: str | os.PathLike, samples: Sequence[tuple[str, dict[str, bytes]]]) -> None:
  """Writes (key, {extension: content}) samples as a tar shard; complete or absent."""
  import io

  with whole_file(path) as part, tarfile.open(part, 'w:') as tar:
    for key, files in samples:
      for extension, data in files.items():
        member = tarfile.TarInfo(f'{key}.{extension}')
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
