"""Processors of hrvlm models for transformers: text and pictures -> the arrays a model reads."""

from typing import TYPE_CHECKING

import numpy as np
from transformers import BaseImageProcessor, BatchFeature, ProcessorMixin
from transformers.image_utils import load_image

from .configuration_hrvlm import settings
from .pixels import normalise
from .ps3_plan import packed
from .views_baselines import (
  anyres,
  llava_hr,
  llava_next_size,
  pheye,
  ps3,
  reduced_tokens,
  s2,
  s2_dynamic,
  single_view,
  tiling,
  vila_hd,
)
from .views_mc_llava import view as mc_llava

# Transformers 5.0 copies, of a local folder, only the files that this one names itself.
if TYPE_CHECKING:
  from .blocks import described as described
  from .sizes_llava_next import told_size as told_size

# A picture and settings of the encoder -> `pixels` uint8 [v h w 3], `index` [t] of the tokens that
# stand in the prompt, `size`, the number of tokens they are taken from, `fixed`, how many learned
# tokens come first (0 unless given), and what the system has beside.
VIEWS = {'anyres': anyres, 'llava_hr': llava_hr, 'mc_llava': mc_llava, 'pheye': pheye,
         'ps3': ps3, 's2': s2, 's2_dynamic': s2_dynamic, 'single_view': single_view,
         'tiling': tiling, 'vila_hd': vila_hd}
# Settings of an encoder that a call can change: the model does not read them, or gets them with the
# pictures (`look`).
CALL = {'anyres': ('pinpoints',), 'llava_hr': ('aspect',),
        'mc_llava': ('max_crops', 'num_tokens', 'window', 'growth', 'crop_cap'), 'pheye': (),
        'ps3': ('looks', 'tokens', 'first_scales', 'smooth'), 'reduced': (), 's2': ('fit',),
        's2_dynamic': ('max_tiles',), 'single_view': ('fit', 'last_tokens'),
        'tiling': ('min_tiles', 'max_tiles', 'thumbnail'),
        'vila_hd': ('looks', 'tokens', 'budgets', 'smooth')}
# Classes of transformers that read the pictures, and what a call can change for them.
NEXT = 'LlavaNextForConditionalGeneration'
CLASSES = {'LlavaForConditionalGeneration': ('fit',), NEXT: ()}
IMAGE = '<image>'


def view_of(system, encoder, token_maps, image):
  """The views of one picture, as `VIEWS` describes them; behind a step that leaves fewer tokens
  also `tokens`, how many, and `inner_counts`, how many there were."""
  if system != 'reduced':
    return VIEWS[system](image, encoder)
  found = view_of(encoder.inner, encoder.encoder, None, image)
  left = reduced_tokens(encoder.step, token_maps)
  if encoder.step.kind == 'visionzip':
    found |= {'index': np.arange(left), 'size': left}
  return found | {'tokens': left, 'inner_counts': np.array([len(found['index'])])}


class HrvlmImageProcessor(BaseImageProcessor):
  """Pictures -> views, by the rules of the system.

  Args:
    system: its name.
    token_maps: see `ReducedConfig`.
    model_class: of transformers, which reads the pictures; None: a model of this folder.
    encoder: its settings, as in config.json. Those of `CALL` can be given to a call, too
      (`max_crops`, `num_tokens`, ...).
  """

  def __init__(self, system=None, encoder=None, token_maps=None, model_class=None, **kwargs):
    super().__init__(**kwargs)
    self.system, self.encoder, self.token_maps = system, encoder, token_maps
    self.model_class = model_class

  @property
  def model_input_names(self):
    """What the model reads of pictures, at least."""
    return {None: ['pixel_values', 'visual_index'], NEXT: ['pixel_values', 'image_sizes']}.get(
      self.model_class, ['pixel_values'])

  def preprocess(self, images, return_tensors=None, **options):
    """pixel_values float32 [v 3 h w] of all pictures, visual_index int64 [n] (which tokens of the
    views stand in the prompt), `tokens` (visual tokens of each picture), and what the system
    has beside. For a class of transformers what it reads: pixel_values, of LlavaNext
    [n v 3 h w] with image_sizes int64 [n 2] (see `sizes_llava_next`), and `tokens`.

    Args:
      images: pictures, or their paths or addresses; a list, or a list of lists.
      options: settings of the encoder for this call, those of `CALL`.

    Raises:
      ValueError: an option that a call cannot change.
    """
    known = CLASSES.get(self.model_class, CALL[self.system])
    if unknown := sorted(set(options) - set(known)):
      raise ValueError(f'{self.system}: no settings of its encoder that a call can change: '
                       f'{", ".join(unknown)}; these are {", ".join(known) or "none"}, the others '
                       'belong to the model (config.json)')
    if 'looks' in options:
      options = {'tokens': None} | options  # tokens would win
    looks = options and self.system in ('ps3', 'vila_hd')
    if looks and self.system == 'ps3':
      options = {'look': self.encoder['look'] | options}
    encoder = settings(self.encoder | options)
    pixels = self.pixels(flat(images), encoder)
    if looks:
      pixels['look'] = np.array([packed(vars(getattr(encoder, 'look', encoder)))])
    colours = encoder
    while not hasattr(colours, 'mean'):
      colours = colours.tower if hasattr(colours, 'tower') else colours.encoder
    data = {'pixel_values': normalise(pixels.pop('pixels'), colours.mean, colours.std), **pixels}
    if self.model_class is not None:
      data = self._for_class(data)
    return BatchFeature(data, tensor_type=return_tensors)

  def _for_class(self, data):
    """What a class of transformers reads; tiles of LlavaNext filled up with zeros, as generation
    repeats arrays along their first axis for beams."""
    found = {name: data[name] for name in ('pixel_values', 'image_sizes', 'tokens') if name in data}
    if self.model_class == NEXT:
      counts, tiles = data['views'], data['pixel_values']
      whole = np.zeros((len(counts), max(counts), *tiles.shape[1:]), tiles.dtype)
      for row, part in zip(whole, np.split(tiles, np.cumsum(counts)[:-1])):
        row[:len(part)] = part
      found['pixel_values'] = whole
    return found

  def pixels(self, images, encoder=None):
    """What `preprocess` gives, with `pixels` uint8 [v h w 3] in place of normalised ones."""
    encoder = encoder or settings(self.encoder)
    images = [load_image(image) if isinstance(image, str) else image for image in images]
    found = [view_of(self.system, encoder, self.token_maps, image) for image in images]
    if self.model_class == NEXT:
      for one, image in zip(found, images):
        one['views'] = [len(one['pixels'])]
        one['image_sizes'] = [llava_next_size(image, encoder)]
    arrays, start = {'visual_index': []}, 0
    for one in found:
      fixed, index = one.get('fixed', 0), one['index']
      arrays['visual_index'].append(np.where(index < fixed, index, index + start))
      for name, value in one.items():
        if name not in ('index', 'size', 'fixed', 'tokens'):
          arrays.setdefault(name, []).append(value)
      start += one['size']
    joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
    return joined | {'tokens': np.array([one.get('tokens', len(one['index'])) for one in found])}


class HrvlmProcessor(ProcessorMixin):
  """Text with `<image>` where pictures stand, and the pictures.

  Every picture takes as many positions as it has visual tokens; batches are padded on the left,
  which `padding_side='right'` changes for training.

  Args:
    image_token_id: stands for one visual token; None: pictures take no positions.
    image_token: in the vocabulary of the tokenizer, or only a mark in the text ('split'): then the
      pieces around it are tokenised alone.
    after_image: text behind the visual tokens of every picture.
  """

  def __init__(self, image_processor=None, tokenizer=None, chat_template=None, image_token_id=None,
               split=False, after_image='', **kwargs):
    self.image_token_id, self.split, self.after_image = image_token_id, split, after_image
    self.image_token = IMAGE
    super().__init__(image_processor, tokenizer, chat_template=chat_template)
    tokenizer.padding_side = 'left'
    if tokenizer.pad_token is None:
      tokenizer.pad_token = tokenizer.eos_token

  def __call__(self, images=None, text=None, return_tensors=None, padding=True, padding_side=None,
               add_special_tokens=True, text_kwargs=None, images_kwargs=None,
               processor_kwargs=None, **options):
    """input_ids and attention_mask [b t] of the texts, and the arrays of the pictures.

    Args:
      images: one picture, a list, or a list per text, in the order of the `<image>` in the texts.
      text: one text or a list.
      padding: as in tokenizers of transformers.
      add_special_tokens: the tokenizer's own begin token stands in front.
      options: settings of the encoder for this call (`max_crops`, ...), and `truncation`, which
        must be off: a prompt cut inside its visual tokens cannot be read.

    Raises:
      ValueError: another number of pictures than of `<image>` in the texts; a text with the
        character whose token stands for visual tokens.
    """
    # Chat templates of transformers 5.0 hand `processor_kwargs` on as it is.
    options |= (text_kwargs or {}) | (images_kwargs or {}) | (processor_kwargs or {})
    if options.pop('truncation', False):
      raise ValueError('truncation would cut visual tokens; shorten the text')
    max_length, to = options.pop('max_length', None), options.pop('pad_to_multiple_of', None)
    for name in ('return_token_type_ids', 'return_attention_mask', 'return_offsets_mapping',
                 'return_mm_token_type_ids', 'videos', 'audio'):
      options.pop(name, None)
    texts = [text] if isinstance(text, str) else list(text or [])
    pictures = [] if images is None else flat(images)
    data, counts = {}, []
    if pictures:
      data = dict(self.image_processor.preprocess(pictures, **options))
      counts = data.pop('tokens').tolist()
    if not texts:
      return BatchFeature(data, tensor_type=return_tensors)
    if self.image_token_id is None:  # pictures take no positions; how many, their nesting says
      marks = sum(one.count(IMAGE) for one in texts)
      if marks not in (0, len(pictures)):
        raise ValueError(f'{marks} {IMAGE} in the text, but {len(pictures)} images; expected one '
                         'for each image, or none: here images take no positions')
      texts = [one.replace(f'{IMAGE}\n', '').replace(IMAGE, '') for one in texts]
      places = self._nested(images, texts)
      ends = np.cumsum([0, *places])
      data['visual_counts'] = np.array([sum(counts[a:b]) for a, b in zip(ends, ends[1:])])
    else:
      places = [one.count(IMAGE) for one in texts]
      if sum(places) != len(pictures):
        raise ValueError(f'{sum(places)} {IMAGE} in the text, but {len(pictures)} images; expected '
                         'one for each image')
    rows, start = [], 0
    for one, n in zip(texts, places):
      rows.append(self._ids(one, counts[start:start + n], add_special_tokens))
      start += n
    if padding_side is not None:
      options = {'padding_side': padding_side}
    else:
      options = {}
    padded = self.tokenizer.pad({'input_ids': rows}, padding=padding, max_length=max_length,
                                pad_to_multiple_of=to, return_attention_mask=True, **options)
    return BatchFeature(dict(padded) | data, tensor_type=return_tensors)

  def apply_chat_template(self, conversation, *args, **kwargs):
    """As in transformers, of which 5.0 takes no message that is a text alone."""
    return super().apply_chat_template(in_parts(conversation), *args, **kwargs)

  def _nested(self, images, texts):
    """Pictures of each text."""
    one = self.image_processor.system == 'pheye'
    nested = isinstance(images, (list, tuple)) and len(images) == len(texts)
    found = [len(flat(part)) for part in images] if nested else (
      [len(flat(images))] if images is not None and len(texts) == 1 else [])
    if not found or min(found) < 1 or (one and max(found) > 1):
      raise ValueError(f'{"exactly one image" if one else "at least one image"} for each text '
                       f'is needed; give a list per text: found {found} for {len(texts)} texts')
    return found

  def _ids(self, text, counts, begin):
    """Ids of one text, every `<image>` as that many placeholders and what follows it."""
    encode = lambda piece: self.tokenizer(piece, add_special_tokens=False)['input_ids']
    ids = list(self.tokenizer('')['input_ids']) if begin else []
    after = encode(self.after_image) if self.after_image else []
    if self.split:
      pieces = [encode(piece) for piece in text.split(IMAGE)]
    else:
      mark, pieces = self.tokenizer.convert_tokens_to_ids(IMAGE), [[]]
      for one in encode(text):
        pieces.append([]) if one == mark else pieces[-1].append(one)
    if any(self.image_token_id in piece for piece in pieces):
      raise ValueError(f'the text holds {self.tokenizer.decode([self.image_token_id])!r}, whose '
                       'token stands for visual tokens in this folder; take it out')
    ids += pieces[0]
    for piece, n in zip(pieces[1:], counts):
      ids += [self.image_token_id] * n + after + piece
    return [int(one) for one in ids]

  @property
  def model_input_names(self):
    """What the model reads."""
    return ['input_ids', 'attention_mask', *self.image_processor.model_input_names]

  def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens=True, **kwargs):
    """Texts of ids, placeholders left out."""
    rows = [[int(one) for one in row if int(one) != self.image_token_id]
            for row in generated_outputs]
    return self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens, **kwargs)

  def to_dict(self):
    """For processor_config.json."""
    return super().to_dict() | {'image_token_id': self.image_token_id, 'split': self.split,
                                'after_image': self.after_image}


def flat(images):
  """Pictures of a list, or of a list of lists, in order."""
  if not isinstance(images, (list, tuple)):
    return [images]
  return [one for part in images for one in (flat(part) if part is not None else [])]


def in_parts(conversation):
  """Messages of a conversation, or of several, with texts as parts of a message."""
  if not isinstance(conversation, (list, tuple)):
    return conversation
  if conversation and isinstance(conversation[0], (list, tuple)):
    return [in_parts(one) for one in conversation]
  alone = lambda one: (isinstance(one, dict) and isinstance(one.get('content'), str)
                       and IMAGE not in one['content'])
  return [one | {'content': [{'type': 'text', 'text': one['content']}]} if alone(one) else one
          for one in conversation]
