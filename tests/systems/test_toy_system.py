"""A system of a folder outside the package: three files and one line, and every verb works."""

import json
import os
import textwrap

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.cli.main import main
from hrvlm_jax.lab.needle import NeedleConfig, write

FILES = {
  'config.py': """
    import dataclasses
    from hrvlm_jax.vision.vit import ViTConfig

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class FoveaConfig:
      vision: ViTConfig
      rings: int = 3
      mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
      std: tuple[float, float, float] = (0.5, 0.5, 0.5)
  """,
  'views.py': """
    import numpy as np
    from hrvlm_jax.systems.contract import Count

    def count(width, height, config):
      return Count(config.rings, config.rings * config.vision.grid**2)

    def rings(image, config):
      size, found = config.vision.image_size, []
      for ring in range(config.rings):
        x, y = (n * ring // (2 * config.rings) for n in image.size)
        crop = image.convert('RGB').crop((x, y, image.width - x, image.height - y))
        found.append(np.asarray(crop.resize((size, size))))
      return found

    def views(images, config):
      size = config.vision.image_size
      pixels = [view for image in images for view in rings(image, config)]
      each = count(1, 1, config).tokens
      return {'pixels': np.array(pixels, np.uint8).reshape(-1, size, size, 3),
              'tokens': np.full(len(images), each, np.int32)}
  """,
  'encoder.py': """
    import jax.numpy as jnp
    from fovea.config import FoveaConfig
    from fovea.views import count, views
    from hrvlm_jax.core.execution import HERE
    from hrvlm_jax.core.layers import normal
    from hrvlm_jax.core.module import Module, Param
    from hrvlm_jax.core.resample import normalise
    from hrvlm_jax.systems.contract import System, VisualTokens
    from hrvlm_jax.vision.vit import ViT

    class Encoder(Module):
      def __init__(self, config, *, param_dtype=jnp.float32, rngs):
        self.config = config
        self.tower = ViT(config.vision, param_dtype=param_dtype, rngs=rngs)
        shape = (config.rings, config.vision.width)
        self.rings = Param(normal(0.02)(rngs.params(), shape, param_dtype))

      def __call__(self, views, *, key=None, ex=HERE):
        c = self.config
        x = self.tower(normalise(views['pixels'], c.mean, c.std).astype(ex.dtype), key=key, ex=ex)
        x = x + self.rings[...].astype(x.dtype)[jnp.arange(len(x)) % c.rings][:, None]
        flat = x.reshape(-1, x.shape[-1])
        return VisualTokens(jnp.take(flat, views['index'], axis=0), views['valid'])

    SYSTEM = System(config=FoveaConfig, encoder=Encoder, count=count, views=views)
  """,
}
MODEL = """
    import ml_collections
    from fovea.config import FoveaConfig
    from hrvlm_jax.core.config import to_dict
    from hrvlm_jax.lab.needle import NeedleConfig
    from hrvlm_jax.language import config as language
    from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
    from hrvlm_jax.vision.vit import ViTConfig

    VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16,
                       pool='map')
    TEXT = language.phi(vocab_size=384, width=16, depth=1, heads=2, mlp_width=16,
                        max_positions=256)
    MODEL = to_dict(ModelConfig(system='fovea', encoder=FoveaConfig(vision=VISION), text=TEXT,
                                projector=ProjectorConfig(n_in=16, n_out=16)))
"""
RUN = MODEL + """
    def get_config():
      config = ml_collections.ConfigDict()
      config.model = MODEL
      config.data = dict(train=DATA, lengths=(128, 256))
      config.training = dict(steps=2, batch_size=8, log_every=1, checkpoint_every=1,
                             optimizer=dict(learning_rate=1e-3))
      return config
"""
COMPARE = MODEL + """
    def get_config():
      config = ml_collections.ConfigDict()
      config.task = to_dict(NeedleConfig.tiny())
      config.encoder = dict(vision=to_dict(VISION), window=80, last_tokens=2, steps=1)
      config.systems = {'fovea': MODEL}
      config.optimizer = dict(learning_rate=1e-3)
      config.update(train_images=4, eval_images=3, train_steps=2, batch_size=2, answer_batch=3,
                    latency_answers=1, lengths=(128, 256))
      return config
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The system's files, a data set and a work directory after two steps."""
  root = tmp_path_factory.mktemp('outside')
  (root / 'fovea').mkdir()
  for name, text in FILES.items():
    (root / 'fovea' / name).write_text(textwrap.dedent(text))
  data = write(NeedleConfig.tiny(), root / 'task', 8, seed=0, progress=False)
  (root / 'run.py').write_text(textwrap.dedent(RUN).replace('DATA', repr(str(data))))
  (root / 'compare.py').write_text(textwrap.dedent(COMPARE))
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(root)
    patch.setenv('PYTHONPATH', f'{root}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    patch.setenv('HRVLM_SYSTEMS', 'fovea=fovea.encoder')  # the one line
    assert main(['train', '--config', str(root / 'run.py'), '--workdir', str(root / 'w'),
                 '--quiet']) == 0
    yield root


def test_it_trains_and_goes_on(folder, capsys):
  argv = ['train', '--config', str(folder / 'run.py'), '--workdir', str(folder / 'w'), '--quiet',
          '--config.training.steps=3']
  assert main(argv) == 0
  assert 'finished at step 3' in capsys.readouterr().out
  lines = [json.loads(line) for line in (folder / 'w/metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert all(np.isfinite(line['loss']) for line in lines)


def test_it_answers_and_shows_a_picture(folder, capsys):
  image = next((folder / 'task').rglob('*.png'))
  assert main(['ask', '--checkpoint', str(folder / 'w'), str(image), 'What?', '--max-new-tokens',
               '3', '--overlay', str(folder / 'o.png')]) == 0
  assert Image.open(folder / 'o.png').size == Image.open(image).size


def test_it_evaluates(folder, capsys):
  assert main(['eval', '--benchmark', 'needle', '--data', str(folder / 'task'), '--checkpoint',
               str(folder / 'w'), '--max-new-tokens', '3', '--quiet', '--out',
               str(folder / 'scores')]) == 0
  assert 'needle (all), 8 samples: needle_accuracy = ' in capsys.readouterr().out


def test_it_exports_and_comes_back(folder):
  out, again = folder / 'exported', folder / 'again'
  assert main(['export', '--checkpoint', str(folder / 'w'), '--to', str(out)]) == 0
  values = json.loads((out / 'config.json').read_text())
  assert (values['model_type'], values['format']) == ('hrvlm_fovea', 'hrvlm-1')
  assert values['model']['encoder']['rings'] == 3
  assert main(['convert', '--from', str(out), '--to', str(again)]) == 0
  before = store.flatten(store.load_params(folder / 'w', shardings='host'))
  after = store.flatten(store.load_params(again, shardings='host'))
  assert before.keys() == after.keys() == set(hf.TensorFolder(out))  # our paths are the names
  for path in before:
    np.testing.assert_array_equal(before[path], after[path], err_msg=path)
  config = lambda place: json.loads((place / 'config.json').read_text())['model']
  assert config(folder / 'w') == config(again)


def test_another_version_of_the_layout_is_refused(folder, tmp_path, capsys):
  (tmp_path / 'config.json').write_text(json.dumps(
    {'model_type': 'hrvlm_fovea', 'format': 'hrvlm-2'}))
  assert main(['convert', '--from', str(tmp_path), '--to', str(tmp_path / 'new')]) == 2
  assert "format is 'hrvlm-2', expected 'hrvlm-1'" in capsys.readouterr().err


def test_it_is_compared(folder):
  assert main(['compare', '--config', str(folder / 'compare.py'), '--out',
               str(folder / 'comparison'), '--quiet']) == 0
  row = json.loads((folder / 'comparison/results.json').read_text())['systems']['fovea']
  assert (row['tokens'], row['views']) == (12, 3) and 0 <= row['accuracy'] <= 1


def test_it_is_planned(folder):
  """Also its parameter without a sharding rule, on eight devices."""
  report = folder / 'plan.json'
  assert main(['plan', '--config', str(folder / 'run.py'), '--topology', 'cpu:8', '--mesh',
               'data=2,fsdp=4', '--image', '64x64', '--json', str(report)]) == 0
  found = json.loads(report.read_text())
  assert found['memory']['fits'] is True and found['devices'] == 8
  assert found['mesh']['fsdp'] == 4 and found['model_flops'] > 0


def test_what_needs_a_map_is_refused(folder, capsys):
  """Three rings of 2 x 2: twelve tokens that are no map of the image, and nothing guesses one."""
  image = next((folder / 'task').rglob('*.png'))
  assert main(['ask', '--checkpoint', str(folder / 'w'), str(image), 'What?',
               '--vicrop.layer=0']) == 2
  assert 'needs a map of visual tokens that shows the whole image; fovea' in capsys.readouterr().err
