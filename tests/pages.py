"""Every command and snippet of the pages: fenced blocks, inline commands, headers of configs."""

from collections.abc import Iterator
import dataclasses
import pathlib
import re
import shlex
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
STANDINS = tomllib.loads((ROOT / 'tests' / 'pages.toml').read_text())
OURS = ('hrvlm ', 'python -m hrvlm_jax.cli ')


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block of a page."""

  page: str
  language: str
  text: str

  @property
  def first(self) -> str:
    return self.text.splitlines()[0]

  def of(self, kind: str) -> dict | None:
    """Its entry of pages.toml."""
    return next((entry for entry in STANDINS[kind]
                 if (entry['page'], entry['first']) == (self.page, self.first)), None)


def pages() -> list[pathlib.Path]:
  """Every page of the repository that people read."""
  found = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'tpu').glob('*.md'),
           *(ROOT / 'configs').rglob('*.md'), *(ROOT / 'hrvlm_jax').rglob('*.md')]
  return sorted(path for path in found if path.name != 'CHANGELOG.md')


def blocks(path: pathlib.Path, text: str | None = None) -> list[Block]:
  """The fenced blocks of a page."""
  text = path.read_text() if text is None else text
  found = re.findall(r'^ *```(\w*)\n(.*?)^ *```', text, re.MULTILINE | re.DOTALL)
  name = path.relative_to(ROOT).as_posix()
  return [Block(name, language, body) for language, body in found]


def inline(path: pathlib.Path) -> list[str]:
  """Commands in the running text and in tables: `hrvlm ...`. Of a config, in its docstring."""
  text = re.sub(r'^ *```.*?^ *```', '', path.read_text(), flags=re.MULTILINE | re.DOTALL)
  return [' '.join(span.split()) for span in re.findall(r'`([^`]+)`', text)
          if re.match(r'hrvlm \w', span)]


def commands(text: str) -> Iterator[list[str]]:
  """The simple commands of a piece of shell, as words: no comments, pipes and lists cut."""
  text = re.sub(r'\\\n\s*', ' ', text)
  for line in text.splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars='|&;')
    lexer.whitespace_split = True
    command: list[str] = []
    for word in [*lexer, ';']:
      if set(word) <= set('|&;'):
        if command:
          yield command
        command = []
      else:
        command.append(word)


def header(path: pathlib.Path) -> list[list[str]]:
  """The commands below `Command:` in the docstring of a config; a loop over stages is unrolled."""
  doc = re.match(r'\s*"""(.*?)"""', path.read_text(), re.DOTALL)
  section = re.search(r'^Command:(.*?)(?=^\w+:|\Z)', doc[1] if doc else '', re.M | re.S)
  if section is None:
    return []
  found: list[str] = []
  stages = ['']
  for line in section[1].splitlines():
    line = line.strip().rstrip('\\').strip()
    if loop := re.fullmatch(r'for stage in (.*); do', line):
      stages = loop[1].split()
    elif line.startswith('hrvlm '):
      found.append(line)
    elif line.startswith('--') and found:
      found[-1] += f' {line}'
  return [shlex.split(line.replace('$stage', stage)) for line in found
          for stage in (stages if '$stage' in line else stages[:1])]


def substituted(words: list[str]) -> list[str]:
  """The words with the stand-ins of pages.toml."""
  return [STANDINS['words'].get(word, word) for word in words]


def own(words: list[str]) -> list[str] | None:
  """The arguments of `hrvlm` in a command, wherever they begin; None: another program's."""
  for start in (['hrvlm'], ['python', '-m', 'hrvlm_jax.cli']):
    for at in range(len(words)):
      if words[at:at + len(start)] == start:
        return words[at + len(start):]
  return None
