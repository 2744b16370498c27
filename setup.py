"""The one thing pyproject.toml cannot say: the wheel holds configs/ as hrvlm_jax/configs.

In a checkout (and in an editable install) the recipes stay where they are; `training.recipe` looks
in both places.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py

KEPT = ('.py', '.json', '.md')  # not the pictures; results/ are of this repository's own runs


class BuildWithRecipes(build_py):
  """Copies configs/ into the package that is built."""

  def run(self):
    super().run()
    if self.editable_mode:
      return
    source, target = pathlib.Path('configs'), pathlib.Path(self.build_lib, 'hrvlm_jax', 'configs')
    shutil.rmtree(target, ignore_errors=True)  # of an earlier build
    for path in sorted(source.rglob('*')):
      inside = path.relative_to(source)
      if path.suffix in KEPT and not {'results', '__pycache__'} & set(inside.parts):
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / inside)


setup(cmdclass={'build_py': BuildWithRecipes})
