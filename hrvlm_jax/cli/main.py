"""`hrvlm VERB ...`: finds the verb, imports only its module, and turns user errors into a sentence.

Every verb is a thin wrapper around a documented function. A verb module offers one function
`(argv: list[str]) -> int | None`; its result is the exit status (None is 0).

Exit status: 0 done; 1 done, and the answer is no (`convert --check`, `doctor`); 2 a mistake of the
user, printed as one sentence on standard error; anything unexpected keeps its traceback.
"""

from collections.abc import Sequence
import importlib
import os
import pathlib
import re
import sys

from hrvlm_jax import __version__
from hrvlm_jax.core import heap
from hrvlm_jax.core.errors import UserError, unknown

# verb -> (module:function, what it does). A new verb is one line here.
VERBS: dict[str, tuple[str, str]] = {
    'train': ('hrvlm_jax.cli.train:main', 'train any stage of any system; resumes by itself'),
    'finetune': ('hrvlm_jax.cli.finetune:main', 'tune a model on your own questions and answers'),
    'sweep': ('hrvlm_jax.cli.sweep:main', 'several runs of a config: a grid or a file; one table'),
    'ask': ('hrvlm_jax.cli.ask:main', 'ask a question about an image'),
    'chat': ('hrvlm_jax.cli.chat:main', 'a conversation about images, in the terminal'),
    'encode': ('hrvlm_jax.cli.ask:encode', 'run a vision encoder alone; draw its selection'),
    'serve': ('hrvlm_jax.cli.serve:main', 'answer over HTTP as an OpenAI-compatible server'),
    'eval': ('hrvlm_jax.cli.evaluate:main', 'run a benchmark and write the score'),
    'analyse': ('hrvlm_jax.cli.evaluate:analyse', "the papers' analyses: curves, sizes, ..."),
    'compare': ('hrvlm_jax.cli.compare:main', 'several systems on the same task: table and plot'),
    'export': ('hrvlm_jax.cli.convert:export', 'checkpoint -> the original weight layout'),
    'push': ('hrvlm_jax.cli.push:main', 'an export -> the Hugging Face hub'),
    'convert': ('hrvlm_jax.cli.convert:main', 'original weights -> checkpoint'),
    'quickstart': ('hrvlm_jax.cli.quickstart:main', 'train, compare, ask and export a tiny model'),
    'tiny': ('hrvlm_jax.cli.tiny:main', 'train and score a config of configs/tiny from nothing'),
    'data': ('hrvlm_jax.cli.data:main', 'show a batch, check a data set, build ArrayRecord shards'),
    'curate': ('hrvlm_jax.cli.curate:main', 'find and caption regions of images (PS3 records)'),
    'needle': ('hrvlm_jax.cli.needle:main', 'write the built-in reading task to disk'),
    'plan': ('hrvlm_jax.cli.plan:main', 'compile a step for chips that are not here; memory, time'),
    'bench': ('hrvlm_jax.cli.bench:main', 'measure beside the PyTorch originals'),
    'params': ('hrvlm_jax.cli.params:main', 'list parameters: path, shape, type, count'),
    'completion': ('hrvlm_jax.cli.completion:main', 'completion of these verbs for bash or zsh'),
    'doctor': ('hrvlm_jax.cli.doctor:main', 'check this machine and installation'),
}

# Verbs that compute: on a CPU they begin once more, with huge pages (`core.heap`).
COMPUTING = {'train', 'finetune', 'sweep', 'ask', 'chat', 'encode', 'serve', 'eval', 'analyse',
             'compare', 'quickstart', 'tiny', 'bench'}

# Verbs of earlier releases, and what takes their place.
GONE = {'verify': 'HRVLM_GOLDENS=FOLDER pytest tests/parity --parity-report FILE (in a checkout)'}


def cache_folder() -> pathlib.Path:
  """Where downloads and compiled programs are kept: $HRVLM_CACHE, else the user's cache folder."""
  if folder := os.environ.get('HRVLM_CACHE'):
    return pathlib.Path(folder)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'hrvlm_jax'


def usage() -> str:
  """The text of `hrvlm --help`."""
  width = max(map(len, VERBS))
  lines = [f'  {verb:<{width}}  {text}' for verb, (_, text) in VERBS.items()]
  return '\n'.join([
      'usage: hrvlm VERB [options]        (hrvlm VERB --help lists the options)', '',
      *lines, '',
      '--config takes a Python file with get_config(), or the name of a recipe such as',
      'pheye:x2_448,stage1; --config.a.b=VALUE changes one key of it.',
  ])


def run(argv: Sequence[str]) -> int:
  """Runs one verb; raises `UserError` for mistakes of the user. See `main` for the exit status."""
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    return 0
  if argv[0] in ('-V', '--version'):
    print(f'hrvlm_jax {__version__}')
    return 0
  verb = argv[0]
  if verb in GONE:
    raise UserError(f'the verb {verb} is gone; its place takes {GONE[verb]}')
  if verb not in VERBS:
    raise UserError(f'{unknown(verb, VERBS, what="verb")}; hrvlm --help lists them all')
  # A command that is repeated does not compile again; JAX_ENABLE_COMPILATION_CACHE=0 prevents it.
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache_folder() / 'jax'))
  module, function = VERBS[verb][0].split(':')
  return getattr(importlib.import_module(module), function)(list(argv[1:])) or 0


def main(argv: Sequence[str] | None = None) -> int:
  """The console script. Returns the exit status, see the head of this module."""
  own, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
  if own and argv and argv[0] in COMPUTING:
    heap.start_again_with_huge_pages()
  try:
    status = run(argv)
    sys.stdout.flush()  # a full disk behind it is known here, and not at the end of Python
    return status
  except UserError as error:
    name = f'hrvlm {argv[0]}' if argv and argv[0] in VERBS else 'hrvlm'
    print(f'{name}: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('hrvlm: interrupted', file=sys.stderr)
    return 130
  except BrokenPipeError:  # the reader (head, less) went away: not an error of ours
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except Exception as error:  # where no verb has said it better; all else keeps its traceback
    from hrvlm_jax.checkpoint.files import cause

    text = ' '.join(str(error).split())[:200]
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search('RESOURCE_EXHAUSTED|[Oo]ut of memory', text)):
      said = (f'there is not enough memory for that ({text}); take smaller batches, images or '
              'numbers, or a larger machine')
    elif isinstance(error, (FileNotFoundError, IsADirectoryError)) and error.filename:
      said = f'{error.filename}: {error.strerror}'
    elif (found := cause(error)) is not None:
      said = f'{getattr(error, "filename", None) or text}: {found}'
    else:
      raise
    try:
      sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and complain in its own way
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f'hrvlm {argv[0]}: {said}', file=sys.stderr)
    return 2


if __name__ == '__main__':
  sys.exit(main())
