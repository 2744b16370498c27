"""A tiny model of ours beside its export in transformers, for tests."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.checkpoint.rows import export_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.interop import folder, native
from hrvlm_jax.interop.export import export
from hrvlm_jax.interop.torch import processing_hrvlm
from hrvlm_jax.language.prompt import pad_batch, tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.training.losses import token_cross_entropy
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, text_of
from tests.interop.releases import random_params

LIMIT = 1e-4  # of the largest magnitude
SIZES = ((61, 47), (150, 90), (33, 201), (97, 96))
QUESTIONS = ('What?', 'How many cats are there in the picture?', 'Où est "A"?', 'Read it to me')


def picture(size, seed=0):
  """An odd picture: noise over a slope."""
  rng = np.random.default_rng(seed)
  slope = np.linspace(0, 200, size[0])[None, :, None]
  noise = rng.integers(0, 56, (size[1], size[0], 3))
  return Image.fromarray((slope + noise).astype(np.uint8))


def pictures():
  """Four of unequal sizes."""
  return [picture(size, seed) for seed, size in enumerate(SIZES)]


def near(ours, theirs):
  """The largest difference over the largest magnitude."""
  ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
  assert ours.shape == theirs.shape
  return np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-30)


@dataclasses.dataclass
class Pair:
  """A checkpoint, its folder, and both models."""

  config: object
  checkpoint: object
  folder: object

  @classmethod
  def make(cls, config, place, *, scale=4.0, **options):
    """Random parameters, larger than a start's so that every part is felt."""
    place = pathlib.Path(place)
    flat = {path: x * (scale if path.endswith('kernel') else 1)
            for path, x in paths.flatten(random_params(config)).items()}
    files = {f'tokenizer/{n}': data for n, data in tokenizer_of('byte').files.items()}
    store.save_params(place / 'c', paths.unflatten(flat), {'model': to_dict(config)},
                      extra_files=files)
    export(place / 'c', place / 'f', layout='transformers', **options)
    return cls(config, place / 'c', place / 'f')

  @classmethod
  def light(cls, config, place):
    """A folder without weights."""
    hf.write_extra(pathlib.Path(place), folder.files(config, tokenizer_of('byte')))
    return cls(config, None, pathlib.Path(place))

  @functools.cached_property
  def answerer(self):
    """Ours."""
    return Answerer.load(self.checkpoint)

  @functools.cached_property
  def text(self):
    """How our text is written."""
    return text_of(self.config, tokenizer_of('byte'))

  @functools.cached_property
  def params(self):
    """Ours, stacked."""
    return store.load_params(self.checkpoint, vlm.build(self.config).abstract)

  @functools.cached_property
  def native(self):
    """Whether the model's class is transformers' own."""
    return native.is_native(hf.read_json(self.folder / 'config.json'))

  @functools.cached_property
  def table(self):
    """Names of the folder's tensors."""
    return (native if self.native else folder).table(self.config)

  @property
  def language(self):
    """Their language model without its output layer."""
    return self.model.model.language_model if self.native else self.model.language_model.model

  def pictures_of(self, inputs):
    """The arrays of pictures among a processor's."""
    return {key: value for key, value in inputs.items()
            if key not in ('input_ids', 'attention_mask')}

  @functools.cached_property
  def processor(self):
    """Of the folder."""
    return AutoProcessor.from_pretrained(self.folder, trust_remote_code=True)

  @functools.cached_property
  def model(self):
    """Of the folder, in float32."""
    model, said = AutoModelForImageTextToText.from_pretrained(
      self.folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    assert not any(said[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    return model.eval()

  def items(self, n):
    """n questions about a picture each."""
    return [([image], question) for image, question in zip(pictures()[:n], QUESTIONS)]

  def inputs(self, items, **options):
    """Theirs of (images, question)s, by the chat template."""
    chats = [[{'role': 'user', 'content': [
      *({'type': 'image', 'image': image} for image in images),
      {'type': 'text', 'text': question}]}] for images, question in items]
    return self.processor.apply_chat_template(
      chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt',
      processor_kwargs=options)

  def batch(self, items):
    """Ours, padded on the left to the longest row."""
    system, encoder = registry.get(self.config.system), self.config.encoder
    views = [system.views(images, encoder) for images, _ in items]
    rows = [self.text.prompt(question, view['tokens'].tolist())
            for (_, question), view in zip(items, views)]
    length = max(len(row['tokens']) for row in rows)
    return pad_batch(rows, length, 'left') | {'views': system.batch(views, encoder)}

  def logits(self, items):
    """Ours of (images, question)s at real places [n v], as one program."""
    batch, fn = self.batch(items), vlm.build(self.config)

    def run(params, batch):
      module = fn.bind(params)
      return module.logits(module(batch))

    return np.asarray(jax.jit(run)(self.params, jax.tree.map(jnp.asarray, batch)))[batch['valid']]

  def read(self, inputs):
    """[b t] places that later ones read: not the padding, and of VILA-HD not those for blocks that
    it did not choose, which hold nothing."""
    mask = inputs['attention_mask'].bool().clone()
    if self.config.fusion.kind == 'two_pass':
      with torch.no_grad():
        _, valid, _ = self.model._look(
          inputs['input_ids'], inputs['attention_mask'], inputs['pixel_values'],
          inputs.get('first_scales'), None, 1, False)
      if valid is not None:
        mask[inputs['input_ids'] == self.model.config.image_token_id] = valid.flatten().bool()
    return mask.numpy()

  def both_losses(self, n):
    """(loss, logits at real places, gradients by their names) of ours and of theirs; labels are
    the last six tokens of every row."""
    items = self.items(n)
    batch, inputs = self.batch(items), self.inputs(items)
    ids, mask = inputs['input_ids'].numpy(), inputs['attention_mask'].numpy().astype(bool)
    place = self.model.config.image_token_id
    labels = np.where(mask & (ids != place if place else True), ids, -100)
    labels[:, :-6] = -100
    batch = {key: jax.tree.map(jnp.asarray, value) for key, value in batch.items()}
    batch['labels'] = jnp.asarray(labels)
    fn = vlm.build(self.config)

    def loss(params):
      module = fn.bind(params)
      logits = module.logits(module(batch))
      total, count = token_cross_entropy(logits, batch['labels'])
      return total / count, logits

    (ours, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.params)
    gradients = dict(export_tensors(jax.device_get(gradients), self.table))
    self.model.zero_grad()
    out = self.model(**inputs, labels=torch.tensor(labels))
    out.loss.backward()
    named = native.canonical if self.native else str
    theirs = {named(name): p.grad.numpy() for name, p in self.model.named_parameters()
              if p.grad is not None}
    read = self.read(inputs)
    return ((float(ours), np.asarray(logits)[read], gradients),
            (float(out.loss.detach()), out.logits.detach().numpy()[read], theirs))


def views_of(images, config):
  """Ours; a reduced system's are those of its inner one."""
  found = registry.get(config.system).views(images, config.encoder)
  return {name.removeprefix('0/') if name != '0/tokens' else 'inner': value
          for name, value in found.items()}


def assert_same_views(config, theirs, image):
  """Bytes before they are normalised, floats after, how many tokens there are and which."""
  system, encoder = registry.get(config.system), config.encoder
  own = processing_hrvlm.HrvlmImageProcessor(theirs.system, theirs.encoder, theirs.token_maps)
  ours, found = views_of([image], config), own.pixels([image])
  np.testing.assert_array_equal(found['pixels'], ours['pixels'], err_msg=f'{image}')
  assert found['tokens'].tolist() == ours['tokens'].tolist(), image
  if 'coords' in ours:
    np.testing.assert_array_equal(found['coords'], ours['coords'])
  # The others count pictures, or the text reads all tokens.
  if config.system not in ('single_view', 's2', 's2_dynamic', 'pheye', 'reduced'):
    packed = system.batch([ours], encoder)
    np.testing.assert_array_equal(found['visual_index'], packed['index'][packed['valid']])
  normal, colours = own.preprocess([image])['pixel_values'], encoder
  while not hasattr(colours, 'mean'):
    colours = getattr(colours, 'encoder', None) or colours.tower
  expected = normalise_host(ours['pixels'], colours.mean, colours.std).transpose(0, 3, 1, 2)
  np.testing.assert_array_max_ulp(normal, np.ascontiguousarray(expected), maxulp=1)
