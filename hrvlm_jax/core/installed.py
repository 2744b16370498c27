"""How this package was installed, for the advice that errors give about optional packages.

No release is on a package index, and a name that nobody owns there is not one to send people to:
the advice is always the checkout or the wheel that this installation came from.
"""

import importlib.metadata
import pathlib
import urllib.parse
import urllib.request

from hrvlm_jax import __version__
from hrvlm_jax.core import json_text

NAME = 'hrvlm-jax'
PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def checkout() -> pathlib.Path | None:
  """The checkout this package runs from; None: it was installed from a wheel."""
  folder = PACKAGE.parent
  return folder if (folder / 'pyproject.toml').is_file() and (folder / 'scripts').is_dir() else None


def add(extra: str) -> str:
  """The command that adds an extra of pyproject.toml to this installation.

  Such as `pip install -e '.[torch]' in /home/me/hrvlm_jax` or `pip install
  '/tmp/hrvlm_jax-0.2.0-py3-none-any.whl[torch]'` (where pip recorded that file, PEP 610).
  """
  if found := checkout():
    return f"pip install -e '.[{extra}]' in {found}"
  source = _source()
  if source is not None and source.is_dir():
    return f"pip install '.[{extra}]' in {source}"
  return f"pip install '{source or f'hrvlm_jax-{__version__}-py3-none-any.whl'}[{extra}]'"


def _source() -> pathlib.Path | None:
  """The wheel or folder that pip was given, where that is known and still there."""
  try:
    text = importlib.metadata.distribution(NAME).read_text('direct_url.json')
  except importlib.metadata.PackageNotFoundError:
    return None
  url = urllib.parse.urlparse(json_text.loads(text)['url']) if text else None
  if url is None or url.scheme != 'file':
    return None
  path = pathlib.Path(urllib.request.url2pathname(url.path))
  return path if path.exists() else None
