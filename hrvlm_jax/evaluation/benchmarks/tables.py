"""Tables with images inside: VLMEvalKit's TSV files and Hugging Face parquet files.

Images stay on disk: a TSV row is read again by its byte range, a parquet cell by its row group.
"""

import base64
import binascii
from collections.abc import Iterator
import csv
import functools
import io
from pathlib import Path
from typing import Any

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.images import ImageError
from hrvlm_jax.evaluation.benchmarks.base import ImageSource

# Shorter strings in a TSV's image column are the index of the row that holds the image.
_MAX_REFERENCE = 64


def read_tsv(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
  """(place, row) of a tab separated file with a header and quoted fields that may span lines.

  The value of the column `image` is an `ImageSource` (or, for a short value, the text itself, which
  names another row); all others are text, and absent where the cell is empty.
  """
  csv.field_size_limit(2**31 - 1)
  with path.open('rb') as file:
    header: list[str] | None = None
    for number, (start, size, cells) in enumerate(_records(file, path)):
      if header is None:
        header = cells
        if 'index' not in header:
          raise UserError(f'{path}: has no column index; its columns are {", ".join(header)}')
        continue
      where = f'{path.name} row {number}'
      if len(cells) != len(header):
        problems.append(f'{where}: has {len(cells)} columns, the header has {len(header)}')
        continue
      if _swallows(cells, header.index('index')):
        problems.append(f'{where}: a cell that begins with a quotation mark goes on over the next '
                        'row; double the mark and put the cell into quotation marks')
        continue
      row = {key: cell for key, cell in zip(header, cells) if cell != ''}
      if len(row.get('image', '')) > _MAX_REFERENCE:
        row['image'] = _tsv_image(path, start, size, header.index('image'), where)
      yield where, row
  if header is None:
    raise UserError(f'{path}: is empty, expected a header with tab separated column names')


def _records(file, path: Path) -> Iterator[tuple[int, int, list[str]]]:
  """(offset, bytes, cells) of each record; one goes on over lines while a quoted cell is open.

  A quotation mark opens a quoted cell at its beginning only: in `a 5" disk` it is a character.
  """
  taken: list[bytes] = []

  def lines() -> Iterator[str]:
    for number, line in enumerate(file, 1):
      taken.append(line)
      yield _text(line, f'{path}, line {number}')

  start, first = 0, 1
  for cells in csv.reader(lines(), delimiter='\t'):
    record = b''.join(taken)
    if record.count(b'"') % 2 and _is_open(record, path):
      raise UserError(f'{path}: a quoted field that begins in line {first} is never closed (the '
                      'file is cut off, or a cell begins with a quotation mark of its own: double '
                      'it and put the cell into quotation marks)')
    if record.strip():
      yield start, len(record), cells
    start, first = start + len(record), first + len(taken)
    taken.clear()


def _swallows(cells: list[str], index: int) -> bool:
  """Whether a quoted cell holds the beginning of the next row: its number, then a tab."""
  if not cells[index].isdigit():
    return False
  following = f'{int(cells[index]) + 1}\t'
  return any(f'\n{following}' in cell for cell in cells)


def _text(line: bytes, where: str) -> str:
  try:
    return line.removeprefix(b'\xef\xbb\xbf').decode('utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{where}: is not UTF-8 text ({error})') from error


def _is_open(record: bytes, path: Path) -> bool:
  """Whether a record ends inside a quoted cell."""
  try:
    text = io.StringIO(_text(record, str(path)), newline='')
    next(csv.reader(text, delimiter='\t', strict=True))
  except csv.Error as error:
    return 'unexpected end of data' in str(error)
  return False


def _cells(record: bytes, path: Path) -> list[str]:
  return next(csv.reader(io.StringIO(_text(record, str(path)), newline=''), delimiter='\t'))


def _tsv_image(path: Path, start: int, size: int, column: int, where: str) -> ImageSource:
  def read() -> bytes:
    with path.open('rb') as file:
      file.seek(start)
      cell = _cells(file.read(size), path)[column]
    return decode_base64(cell, where)
  return ImageSource(where, read)


def decode_base64(text: str, where: str) -> bytes:
  """Bytes of a base64 string.

  Raises:
    UserError: it is not base64.
  """
  try:
    return base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise UserError(f'{where}: the image is not base64 ({error})') from error


def read_parquet(paths: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
  """(place, row) of parquet files; image columns (structs with `bytes`) become `ImageSource`."""
  import pyarrow as pa
  import pyarrow.parquet as pq
  for path in paths:
    try:
      file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
      raise UserError(f'{path}: is not a parquet file ({error})') from error
    schema = file.schema_arrow
    pictures = [name for name in schema.names if _is_image(schema.field(name).type)]
    plain = [name for name in schema.names if name not in pictures]
    for group in range(file.num_row_groups):
      try:
        table = file.read_row_group(group, columns=plain)
        rows = table.to_pylist()
      except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f'{path}: row group {group} is damaged ({error})') from error
      sizes = {name: _group_column(path, group, name) for name in pictures}
      for i, row in enumerate(rows):
        where = f'{path.name} group {group} row {i}'
        for name in pictures:
          present = sizes[name][i].as_py() is not None
          row[name] = _parquet_image(path, group, i, name, where) if present else None
        yield where, row


def _is_image(kind) -> bool:
  import pyarrow as pa
  return pa.types.is_struct(kind) and kind.get_field_index('bytes') >= 0


@functools.lru_cache(maxsize=2)
def _group_column(path: Path, group: int, name: str):
  import pyarrow as pa
  import pyarrow.parquet as pq
  try:
    return pq.ParquetFile(path).read_row_group(group, columns=[name]).column(name)
  except (pa.ArrowException, OSError) as error:
    raise ImageError('damaged', f'{path}: column {name} of row group {group} is damaged ({error})'
                     ) from error


def _parquet_image(path: Path, group: int, row: int, name: str, where: str) -> ImageSource:
  def read() -> bytes:
    data = _group_column(path, group, name)[row].as_py().get('bytes')
    if not data:
      raise ImageError('empty', f'{where}: column {name} has no image bytes')
    return data
  return ImageSource(f'{where} {name}', read)
