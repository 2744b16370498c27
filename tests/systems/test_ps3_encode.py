"""`hrvlm encode` on a tiny PS3: a released folder in, tokens and a selection map out."""

import dataclasses

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.cli.main import main
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.language.tokenizer import ByteTokenizer
from hrvlm_jax.systems.ps3.config import LookConfig, tiny
from hrvlm_jax.vlm import model as vlm


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('ps3')
  config = tiny()
  encoder = dataclasses.replace(config.encoder, look=LookConfig(looks=None, tokens=40))
  config = dataclasses.replace(config, encoder=encoder)
  params = jax.tree.map(np.asarray, jax.jit(vlm.build(config).init)(jax.random.key(0)))
  files = {f'tokenizer/{name}': data for name, data in ByteTokenizer({}).files.items()}
  store.save_params(path / 'checkpoint', params, {'model': to_dict(config)}, extra_files=files)
  pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
  Image.fromarray(pixels).save(path / 'image.png')
  return path


def run(folder, *arguments):
  return main(['encode', '--checkpoint', str(folder / 'checkpoint'), str(folder / 'image.png'),
               *arguments])


def test_tokens_and_overlay_follow_the_prompt(folder, capsys):
  outputs = []
  for name, prompt in (('a', ['--prompt', 'a red sign']), ('b', [])):
    assert run(folder, *prompt, '--out', str(folder / f'{name}.npy'),
               '--overlay', str(folder / f'{name}.png')) == 0
    outputs.append(np.load(folder / f'{name}.npy'))
  assert '65 tokens of width 64' in capsys.readouterr().out
  assert outputs[0].shape == (65, 64) and np.isfinite(outputs[0]).all()
  # The thumbnail's tokens do not depend on the prompt, the others do.
  np.testing.assert_allclose(outputs[0][:25], outputs[1][:25], atol=1e-5)
  assert np.abs(outputs[0][25:] - outputs[1][25:]).max() > 1e-3
  assert Image.open(folder / 'a.png').width == 2 * 512


def test_mistakes_are_one_sentence(folder, capsys):
  assert run(folder, '--prompt', ' ') == 2
  assert 'the text is empty' in capsys.readouterr().err
  assert run(folder, '--out', 'tokens.txt') == 2
  assert 'ends in .npy' in capsys.readouterr().err
