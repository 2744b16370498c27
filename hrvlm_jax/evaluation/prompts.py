"""Prompt templates: one per benchmark, with a system's own version where it has one.

They are texts in `prompts.toml`: `[<system>] <benchmark>` wins over `[default] <benchmark>`.
Placeholders: `{question}`, `{options}` (lines `A. text`), `{hint}`, `{ocr}`. The chat wrapper of a
language model is not part of a template; it belongs to the system.
"""

import dataclasses
import hashlib
from importlib import resources
from pathlib import Path
import re
import tomllib

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.evaluation.benchmarks.base import Sample
from hrvlm_jax.evaluation.metrics.choice import letters

DEFAULT = 'default'
_PLACEHOLDER = re.compile(r'\{(\w*)\}')
_KNOWN = ('question', 'options', 'hint', 'ocr')


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt template and where it came from."""

  text: str
  source: str

  def __post_init__(self):
    unknown = sorted(set(_PLACEHOLDER.findall(self.text)) - set(_KNOWN))
    if unknown:
      raise UserError(f'prompt {self.source}: unknown placeholders '
                      f'{", ".join("{" + u + "}" for u in unknown)}; known: '
                      f'{", ".join("{" + k + "}" for k in _KNOWN)}')

  @property
  def hash(self) -> str:
    """SHA-256 of the template's text."""
    return hashlib.sha256(self.text.encode()).hexdigest()

  def render(self, sample: Sample) -> str:
    """The instruction for one sample.

    Raises:
      UserError: the template asks for a field that the sample lacks.
    """
    if sample.prompt is not None:
      return sample.prompt
    values = {'question': sample.question, 'hint': '', **sample.fields}
    if sample.choices:
      pairs = zip(letters(len(sample.choices)), sample.choices)
      values['options'] = '\n'.join(  # a gap keeps its letter, and is not offered
        f'{letter}. {choice}' for letter, choice in pairs if choice)

    def value(match: re.Match) -> str:
      name = match.group(1)
      if name not in values:
        raise UserError(f'prompt {self.source}: sample {sample.id} has no {name!r}')
      return values[name]
    return _PLACEHOLDER.sub(value, self.text)


def load(name: str, system: str = DEFAULT, *, path: str | Path | None = None) -> Template:
  """The template of a benchmark for a system, or the one in the file `path`.

  Raises:
    UserError: no such template or file; unknown placeholder.
  """
  if path is not None:
    try:
      return Template(Path(path).read_text('utf-8-sig'), str(path))
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f'{path}: cannot be read as a prompt template ({error})') from error
  tables = tomllib.loads((resources.files(__package__) / 'prompts.toml').read_text('utf-8'))
  for table in (system, DEFAULT):
    if name in tables.get(table, {}):
      return Template(tables[table][name], f'{table}/{name}')
  raise UserError(f'no prompt template for {name}; give one as a file')
