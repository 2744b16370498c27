"""Files that nobody should have written, made of files that are right: one or two things changed.

All take a `random.Random`, so that a case is a function of its number.
"""

import copy
import io
import json
import random
import struct

from PIL import Image

# What stands in the place of a value: wrong kinds, edges of numbers, texts that are none.
ODD = (None, True, False, 0, -1, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**53 + 1, 10**30, 0.5, -0.0,
       1e308, float('nan'), float('inf'), '', ' ', 'x', 'é', '../x', '/', '\x00', 'half \ud83d',
       '9' * 400, [], [1], ['a', 'b'], [[]], {}, {'a': 1}, [None], [0, -1])
# What stands in the place of a value on the command line.
WORDS = ('', ' ', '0', '-1', '1', '2', 'nan', 'inf', '1e308', '99999999999999999999', 'x', 'x=y',
         '=', 'é', 'half \udcff', '../x', '/', '.', '/dev/null', 'none.json', '{}', '[1,', "'",
         '\n', 'a' * 5000, '%s', '{x}', '#', '?')


def places(value, path=()):
  """Paths of all values inside a JSON value."""
  if path:
    yield path
  inside = (value.items() if isinstance(value, dict) else
            enumerate(value) if isinstance(value, list) else ())
  for key, part in inside:
    yield from places(part, (*path, key))


def changed(value, rng: random.Random):
  """A JSON value with one to three places taken away, replaced, doubled or renamed."""
  value = copy.deepcopy(value)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    if not (found := list(places(value))):
      return rng.choice(ODD)
    *outer, last = rng.choice(found)
    holder = value
    for key in outer:
      holder = holder[key]
    act = rng.random()
    if act < 0.2:
      del holder[last]
    elif act < 0.3 and isinstance(holder, dict):
      holder[rng.choice(('', 'x', f'{last}s', str(last).upper()))] = holder.pop(last)
    elif act < 0.4:
      holder[last] = [holder[last]] if rng.random() < 0.5 else {'x': holder[last]}
    else:
      holder[last] = copy.deepcopy(rng.choice(ODD))
  return value


def as_json(value, rng: random.Random) -> bytes:
  """The bytes of a JSON value: mostly right ones, else cut, in another encoding, with a tail."""
  text = json.dumps(value)
  act = rng.random()
  if act < 0.8:
    return text.encode()
  if act < 0.84:
    return text[:rng.randrange(len(text) + 1)].encode()
  if act < 0.88:
    return text.encode(rng.choice(('utf-16', 'utf-32', 'utf-8-sig')))
  if act < 0.92:
    return (text + rng.choice(('}', '\n{}', '\x00', ' x'))).encode()
  if act < 0.96:
    return b'[' * rng.choice((10, 100_000))
  return rng.choice((b'', b'null', b'1e999', b'\xff\xfe', b'{"a":' + b'9' * 5000 + b'}'))


def flipped(data: bytes, rng: random.Random) -> bytes:
  """Bytes with some changed, cut away, doubled or put in."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 3, 20))):
    if not data:
      break
    place, act = rng.randrange(len(data)), rng.random()
    if act < 0.6:
      data[place] = rng.randrange(256)
    elif act < 0.75:
      del data[place:]
    elif act < 0.9:
      data[place:place] = bytes(rng.randrange(256) for _ in range(4))
    else:
      del data[place:place + rng.randrange(1, 9)]
  return bytes(data)


def safetensors(data: bytes, rng: random.Random) -> bytes:
  """A safetensors file whose header says something else, or whose bytes are cut."""
  size = struct.unpack('<Q', data[:8])[0]
  act = rng.random()
  if act < 0.6:
    header = json.loads(data[8:8 + size])
    names = rng.sample(sorted(header), min(6, len(header)))  # a part, so that each is often met
    part = changed({name: header.pop(name) for name in names}, rng)
    text = json.dumps(header | part if isinstance(part, dict) else part).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + size:]
  if act < 0.8:
    return struct.pack('<Q', rng.choice((0, 1, size - 1, size + 1, 2**40, 2**64 - 1))) + data[8:]
  return data[:rng.choice((0, 4, 8, 8 + size // 2, 8 + size, len(data) - 1))]


def picture(rng: random.Random) -> bytes:
  """A picture file, mostly a damaged one."""
  size = rng.choice(((1, 1), (3, 200), (64, 48), (200, 2)))
  mode = rng.choice(('RGB', 'L', 'P', 'RGBA', 'LA', '1', 'I;16', 'CMYK'))
  kind = {'CMYK': 'JPEG', 'P': rng.choice(('GIF', 'PNG'))}.get(mode, 'PNG')
  if mode == 'RGB':
    kind = rng.choice(('PNG', 'JPEG', 'BMP', 'WEBP', 'TIFF', 'GIF'))
  out = io.BytesIO()
  Image.new(mode, size, 7 if mode in ('L', 'P', '1', 'I;16') else None).save(out, kind)
  data = out.getvalue()
  act = rng.random()
  if act < 0.2:
    return data
  if act < 0.4 and kind == 'PNG':  # a size of the header that the data do not have
    return data[:16] + struct.pack('>II', *rng.choice(((0, 0), (2**31 - 1, 2**31 - 1), (90_000, 9),
                                                       (60_000, 60_000)))) + data[24:]
  if act < 0.5:
    return rng.choice((b'', b'\x89PNG', b'GIF89a', b'RIFF', b'%PDF-1.7', b'<svg/>', b'hello'))
  return flipped(data, rng)


def table(text: str, rng: random.Random) -> bytes:
  """A table (TSV, JSON lines) with lines and cells gone, doubled, quoted, in another encoding."""
  lines = text.split('\n')
  for _ in range(rng.choice((1, 2))):
    place, act = rng.randrange(len(lines)), rng.random()
    cells = lines[place].split('\t')
    if act < 0.2:
      del lines[place]
      lines = lines or ['']
    elif act < 0.4:
      lines.insert(place, lines[place])
    elif act < 0.6:
      cells[rng.randrange(len(cells))] = rng.choice(('', '"', '"a', 'nan', 'A', 'é', '-1', '\r'))
      lines[place] = '\t'.join(cells)
    elif act < 0.7:
      lines[place] = json.dumps(rng.choice(ODD))
    elif act < 0.85:
      cut = rng.randrange(len(lines[place]) + 1)
      lines[place] = lines[place][:cut]
    else:
      try:
        lines[place] = json.dumps(changed(json.loads(lines[place]), rng))
      except ValueError:
        lines[place] = '\t'.join(reversed(cells))
  return '\n'.join(lines).encode(rng.choice(('utf-8',) * 8 + ('utf-16', 'utf-8-sig')), 'replace')
