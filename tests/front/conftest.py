"""A folder as `quickstart.sh` leaves one, with a model that was not trained: the same shapes."""

import http.server
import json
import threading

import jax
import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.lab import quickstart
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.vlm import model as vlm


def picture(width, height, seed=0):
  pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return Image.fromarray(pixels)


@pytest.fixture(scope='session')
def world(tmp_path_factory):
  """Folder with runs/quickstart/{checkpoint,data/eval}, photo.png, other.png, own.jsonl, run.py."""
  root = tmp_path_factory.mktemp('front')
  config = quickstart.model(15)
  params = jax.jit(vlm.build(config).init)(jax.random.key(0))
  # Larger weights than at initialisation, so that answers depend on image and question.
  params['language'] = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params['language'])
  folder = root / 'runs/quickstart'
  files = {f'tokenizer/{name}': data for name, data in tokenizer_of('byte').files.items()}
  store.save_params(folder / 'checkpoint', params, {'model': to_dict(config)}, extra_files=files)
  (folder / 'data/eval/images').mkdir(parents=True)
  picture(400, 80).save(folder / 'data/eval/images/000000.png')
  picture(120, 90).save(root / 'photo.png')
  picture(300, 80, 1).save(root / 'other.png')
  rows = [{'id': str(n), 'image': name, 'question': 'What is written?', 'answer': 'STOP'}
          for n, name in enumerate(('photo.png', 'other.png', 'photo.png'))]
  (root / 'own.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  turns = [{'from': 'human', 'value': '<image>\nWhat?'}, {'from': 'gpt', 'value': 'STOP'}]
  (root / 'train.json').write_text(json.dumps([
    {'id': str(n), 'image': 'photo.png', 'conversations': turns} for n in range(4)]))
  (root / 'run.py').write_text(
    'import ml_collections\n'
    'from hrvlm_jax.core.config import to_dict\n'
    'from hrvlm_jax.lab import quickstart\n'
    'def get_config():\n'
    '  config = ml_collections.ConfigDict()\n'
    '  config.model = to_dict(quickstart.model(15))\n'
    "  config.data = dict(train='train.json', lengths=(96,))\n"
    '  config.training = dict(steps=4, batch_size=2, log_every=1,\n'
    '                         optimizer=dict(learning_rate=1e-3))\n'
    '  return config\n')
  return root


@pytest.fixture(scope='session')
def model(world):
  """The loaded model of `world`, one for all tests, so that its programs are compiled once."""
  import hrvlm_jax

  return hrvlm_jax.load(world / 'runs/quickstart/checkpoint', urls=True)


@pytest.fixture(scope='session')
def make_picture():
  return picture


@pytest.fixture
def server():
  """A function: {path: bytes} -> (address of a server on this machine, the paths asked for)."""
  running = []

  def start(files):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_GET(self):
        asked.append(self.path)
        data = files.get(self.path)
        self.send_response(404 if data is None else 200)
        self.end_headers()
        self.wfile.write(data or b'')

      def log_message(self, *_):
        pass

    made = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    running.append((made, thread))
    return f'http://localhost:{made.server_address[1]}', asked

  yield start
  for made, thread in running:
    made.shutdown()
    made.server_close()
    thread.join()
