"""Models of hrvlm for transformers: an encoder, a projector, a language model of transformers.

The names of the modules are those of hrvlm_jax, except inside the parts that transformers brings
(language model, layers of the vision transformer).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_hrvlm import (
  AnyResConfig,
  DynamicS2Config,
  LlavaHrConfig,
  McLlavaConfig,
  PheyeConfig,
  Ps3Config,
  ReducedConfig,
  S2Config,
  SingleViewConfig,
  TilingConfig,
  VilaHdConfig,
)
from .fusion import NAME, CrossAttention, counts_of
from .modeling_base import HrvlmPreTrainedModel
from .ps3 import PS3
from .two_pass import NAME as VALID, look
from .vision_baselines import DynamicS2Vision, S2Vision, SingleViewVision, TiledVision
from .vision_llava_hr import LlavaHrVision
from .vision_mc_llava import McLlavaVision
from .vision_pheye import PheyeVision
from .vision_reduced import ReducedVision
from .vision_vila_hd import VilaHdVision

# Transformers 5.0 copies, of a local folder, only the files that this one names itself.
if TYPE_CHECKING:
  from .attention import attend as attend
  from .blocks import described as described
  from .convnext import convolved as convolved
  from .ps3_plan import Plan as Plan
  from .towers import Tower as Tower

VISION = {'anyres': TiledVision, 'llava_hr': LlavaHrVision, 'mc_llava': McLlavaVision,
          'pheye': PheyeVision, 'ps3': PS3, 's2': S2Vision, 's2_dynamic': DynamicS2Vision,
          'single_view': SingleViewVision, 'tiling': TiledVision,
          'vila_hd': VilaHdVision}
# What a processor gives beside `pixel_values`.
ARRAYS = ('coords', 'first_scales', 'grids', 'inner_counts', 'look', 'visual_counts',
          'visual_index')
IMAGES = ('pixel_values', 'image_features', 'image_repeats', 'image_skip', 'image_end', *ARRAYS)


def encoder_of(model, config):
  """The encoder of a model's settings; a reduced one around its inner one."""
  if model.system == 'reduced':
    return ReducedVision(model.encoder, config, VISION[model.encoder.inner], config.inner_width)
  return VISION[model.system](model.encoder, config)


def visual_tokens(vision, pixel_values, visual_index, inner_counts=None, **arrays):
  """Tokens [n d] of all images, one after the other, before the projector.

  Args:
    vision: of `encoder_of`; the others are what the processor gives for images.
  """
  found = vision(pixel_values, **arrays).flatten(0, -2)
  found = found[visual_index.to(found.device)]
  return found if inner_counts is None else vision.reduce(found, inner_counts)


_MORE = ('a further turn brings images, but {}: give the whole conversation to generate without '
         'past_key_values')


def begins(input_ids, cache):
  """Whether these ids are a prompt, or a further turn of one, and not a generated token."""
  if cache is None or input_ids is None or cache.get_seq_length() == 0:
    return True
  return input_ids.shape[1] > 1


@dataclass
class HrvlmOutput(ModelOutput):
  """What `forward` returns.

  Args:
    loss: mean cross entropy of the labels, float32.
    logits: [b t vocabulary].
    past_key_values: cache of the language model.
    image_hidden_states: [n width], the visual tokens of all images one after the other.
  """

  loss: torch.FloatTensor | None = None
  logits: torch.FloatTensor | None = None
  past_key_values: Cache | None = None
  hidden_states: tuple | None = None
  attentions: tuple | None = None
  image_hidden_states: torch.FloatTensor | None = None


class Projector(nn.Module):
  """fc1, activation, fc2, ...: from the encoder's width to the language model's."""

  def __init__(self, settings):
    super().__init__()
    self.depth = 1 if settings.kind == 'linear' else settings.depth
    name = settings.activation
    self.activation = ACT2FN[{'gelu_tanh': 'gelu_pytorch_tanh'}.get(name, name)]
    for number in range(self.depth):
      n_in = settings.n_out if number else settings.n_in
      setattr(self, f'fc{number + 1}', nn.Linear(n_in, settings.n_out))

  def forward(self, x):
    """[... i] -> [... o]."""
    for number in range(self.depth):
      x = getattr(self, f'fc{number + 1}')(self.activation(x) if number else x)
    return x


class HrvlmForConditionalGeneration(HrvlmPreTrainedModel, GenerationMixin):
  """Visual tokens stand in the prompt, one position each, or cross-attention blocks read them; or
  the language model looks twice."""

  _tied_weights_keys = {
    'language_model.lm_head.weight': 'language_model.model.embed_tokens.weight'}

  def __init__(self, config):
    super().__init__(config)
    model = config.settings
    self.vision = encoder_of(model, config)
    self.projector = None if model.projector is None else Projector(model.projector)
    self.language_model = AutoModelForCausalLM.from_config(config.text_config)
    self.fusion, self.two_pass = None, model.fusion.kind == 'two_pass'
    if model.fusion.kind == 'cross_attention':
      self.fusion = CrossAttention(model.fusion, model.text.width, model.text.depth, config)
      self.fusion.hook(self.language_model.model.layers)
    self.post_init()

  def merge_adapters(self):
    """Pheye: adds the low-rank set of the tiles to a copy of its tower's weights; for inference.
    The global view keeps the base and its own set, and the model is saved as it was. `train()`
    drops the copy; weights that were changed are merged anew by another call.

    Raises:
      ValueError: the encoder has no sets.
    """
    if not hasattr(self.vision, 'merge_adapters'):
      raise ValueError(f'{self.config.model_type} has no adapters in its encoder; LoRA of peft is '
                       'merged by merge_and_unload')
    self.vision.merge_adapters()

  def get_input_embeddings(self):
    """The embedding table of the language model."""
    return self.language_model.get_input_embeddings()

  def set_input_embeddings(self, value):
    """Replaces the embedding table of the language model."""
    self.language_model.set_input_embeddings(value)

  def get_output_embeddings(self):
    """The output layer of the language model."""
    return self.language_model.get_output_embeddings()

  def set_output_embeddings(self, value):
    """Replaces the output layer of the language model."""
    self.language_model.set_output_embeddings(value)

  def get_image_features(self, pixel_values, visual_index, inner_counts=None, **arrays):
    """Visual tokens of all images, one after the other: [n width of the language model].

    Args: what the processor gives for images.
    """
    found = visual_tokens(self.vision, pixel_values, visual_index, inner_counts, **arrays)
    return found if self.projector is None else self.projector(found)

  def places_of(self, input_ids, end=None):
    """bool [b t]: the places of visual tokens. A placeholder from the place `end` on was generated
    (an untrained model may say it), and is a token like others."""
    places = input_ids == self.config.image_token_id
    if end is not None:
      places[:, end:] = False
    return places

  def embed(self, input_ids, features, repeats=1, cache=None, skip=None, end=None):
    """Embeddings of the ids with the visual tokens in their places.

    Args:
      repeats: rows that follow each other and read the same images (beams, samples).
      cache: of the tokens before these; a single id behind them was generated, whatever it is.
      skip: [b] visual tokens of each row whose places are in the cache.
      end: see `places_of`.
    """
    if features is None and not begins(input_ids, cache):
      return self.get_input_embeddings()(input_ids)
    places = self.places_of(input_ids, end)
    # The placeholder may lie outside the table (it is no token of the language model).
    embeds = self.get_input_embeddings()(input_ids.masked_fill(places, 0))
    if features is None:
      if places.any():
        raise ValueError(f'{int(places.sum())} places for visual tokens in input_ids, but no '
                         'pixel_values')
      return embeds
    features = self._per_row(features, places, repeats, skip).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(places[..., None], features)

  def _look(self, input_ids, mask, pixel_values, first, asked, repeats, keep, end=None):
    """(visual tokens [n d], which of them are real [n], what the second pass shares of the first)
    of both passes; None without images."""
    if pixel_values is None or input_ids is None:
      return None, None, None
    mask = torch.ones_like(input_ids) if mask is None else mask
    tokens, valid, _, shared = look(self, input_ids[::repeats], mask[::repeats].bool(),
                                    pixel_values, first, asked, keep,
                                    self.places_of(input_ids[::repeats], end))
    return tokens, valid, shared

  def _readable(self, input_ids, mask, positions, valid, cache, repeats, end=None):
    """(mask, positions): places whose visual token is none are not read and shift nothing; the
    cache remembers them for the steps that follow."""
    before = getattr(cache, VALID, None)
    if valid is None and before is None:
      return mask, positions
    if mask is None:  # nothing is padded: generation leaves it out
      length = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
      mask = input_ids.new_ones(len(input_ids), length)
    mask = mask.clone()
    if before is not None:
      mask[:, :before.shape[1]] *= before.to(mask.dtype)
    if valid is not None:
      places = self.places_of(input_ids, end)
      real = self._per_row(valid[:, None].to(mask.device, mask.dtype), places, repeats)[:, 0]
      own = mask[:, -input_ids.shape[1]:]
      mask[:, -input_ids.shape[1]:] = own.masked_scatter(places, own[places] * real)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return mask, positions[:, -input_ids.shape[1]:]

  def _media(self, features, counts, cache):
    """Keys and values of the visual tokens, made once and kept with the cache."""
    if features is None:
      media = getattr(cache, NAME, None)
      if media is None:
        raise ValueError('this model reads images at every token; give pixel_values')
      return media
    return self.fusion.media(features, counts.tolist())

  def _per_row(self, features, places, repeats, skip=None):
    """The tokens in the order of the rows, without those that each row skips.

    Raises:
      ValueError: another number of places in the rows than of tokens.
    """
    counts = places[::repeats].sum(1).tolist()
    before = [0] * len(counts) if skip is None else skip[::repeats].tolist()
    counts = [own + early for own, early in zip(counts, before)]
    if sum(counts) != len(features):
      raise ValueError(f'{sum(counts)} places for visual tokens in input_ids, but the images have '
                       f'{len(features)}; use the processor of this folder for both')
    if repeats == 1 and not any(before):
      return features
    return torch.cat([part for row, early in zip(features.split(counts), before)
                      for part in [row[early:]] * repeats])

  def forward(self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None,
              past_key_values=None, inputs_embeds=None, labels=None, logits_to_keep=0,
              visual_index=None, visual_counts=None, coords=None, grids=None,
              first_scales=None, inner_counts=None, look=None, image_features=None,
              image_repeats=1, image_skip=None, image_end=None, **kwargs):
    """Logits of every position, and the loss of the labels.

    Args:
      input_ids: [b t], with a placeholder per visual token (none with cross-attention).
      pixel_values, visual_index, coords, grids, first_scales, inner_counts, look: of all images,
        from the processor.
      visual_counts: [b] visual tokens of each row, with cross-attention.
      labels: [b t], -100 where nothing is trained; unshifted.
      image_features: what `get_image_features` gave, in place of `pixel_values`.
      image_repeats: rows that follow each other and read the same images (beams, samples).
      image_skip: [b] visual tokens of each row whose places are in the cache already.
      image_end: place from which on a placeholder is a token that was generated.
    """
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError('give exactly one of input_ids and inputs_embeds')
    valid = shared = None
    if self.two_pass:
      # Generation asks for the last logits alone, so the places of both passes need not run twice.
      keep = (isinstance(logits_to_keep, int) and logits_to_keep > 0 and labels is None
              and not torch.is_grad_enabled() and not kwargs.get('output_attentions')
              and not kwargs.get('output_hidden_states'))
      if keep and past_key_values is None and kwargs.get('use_cache'):  # 5.0 leaves it to the model
        past_key_values = DynamicCache(config=self.config.text_config)
      keep = keep and type(past_key_values) is DynamicCache and not past_key_values.get_seq_length()
      image_features, valid, shared = self._look(
        input_ids, attention_mask, pixel_values, first_scales, look, image_repeats, keep,
        image_end)
      attention_mask, position_ids = self._readable(
        input_ids, attention_mask, position_ids, valid, past_key_values, image_repeats, image_end)
    elif image_features is None and pixel_values is not None:
      arrays = {'coords': coords, 'grids': grids, 'inner_counts': inner_counts, 'look': look}
      image_features = self.get_image_features(
        pixel_values, visual_index, **{k: v for k, v in arrays.items() if v is not None})
    media = None
    if self.fusion is not None:
      media = self._media(image_features, visual_counts, past_key_values)
      kwargs = kwargs | {'media': media}
      inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else (
        inputs_embeds)
    elif inputs_embeds is None:
      inputs_embeds = self.embed(input_ids, image_features, image_repeats, past_key_values,
                                 image_skip, image_end)
    if shared is not None:
      start = shared.fill(past_key_values, logits_to_keep, image_repeats)
      inputs_embeds, position_ids = inputs_embeds[:, start:], position_ids[:, start:]
      if kwargs.get('cache_position') is not None:  # transformers 5.0 hands it on
        kwargs = kwargs | {'cache_position': kwargs['cache_position'][start:]}
    out = self.language_model(
      inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
      past_key_values=past_key_values, logits_to_keep=logits_to_keep,
      **{k: v for k, v in kwargs.items() if k != 'num_items_in_batch'})
    if valid is not None and out.past_key_values is not None:
      setattr(out.past_key_values, VALID, attention_mask)
    if media is not None and out.past_key_values is not None:
      setattr(out.past_key_values, NAME, media)
    loss = None
    if labels is not None:
      kwargs.pop('media', None)
      loss = self.loss_function(out.logits, labels, self.config.text_config.vocab_size, **kwargs)
    return HrvlmOutput(
      loss=loss, logits=out.logits, past_key_values=out.past_key_values,
      hidden_states=out.hidden_states, attentions=out.attentions,
      image_hidden_states=image_features)

  def prepare_inputs_for_generation(self, input_ids, **kwargs):
    """Images go with the step that reads their places: the first one, and that of a further turn
    which brings more. Of a whole conversation's images, those with places in the cache are skipped.

    Raises:
      ValueError: more images in a further turn of a model for which they change what is in the
        cache.
    """
    inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
    ids, cache = inputs.get('input_ids'), inputs.get('past_key_values')
    begun = cache is not None and cache.get_seq_length() > 0
    if self.fusion is not None:
      read = not hasattr(cache, NAME)
      counts = inputs.get('visual_counts')
      if not read and counts is not None and counts.tolist() != counts_of(getattr(cache, NAME)):
        raise ValueError(_MORE.format('every token reads all images'))
    else:
      if ids is not None and inputs.get('image_end') is not None:  # among the ids of this step
        inputs['image_end'] = max(inputs['image_end'] - input_ids.shape[1] + ids.shape[1], 0)
      read = begins(ids, cache) and ids is not None and bool(
        self.places_of(ids, inputs.get('image_end')).any())
      if read and begun and self.two_pass:
        raise ValueError(_MORE.format('the first question decides where all images are looked at'))
      if read and begun:
        inputs['image_skip'] = (input_ids[:, :-ids.shape[1]] == self.config.image_token_id).sum(1)
    if not read:
      for name in IMAGES:
        inputs.pop(name, None)
    return inputs

  def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None,
                                    **kwargs):
    """Beams and samples read the images once (`_per_row`); what comes after the prompt is
    generated."""
    images = {name: kwargs.pop(name) for name in IMAGES if name in kwargs}
    if images:
      images['image_repeats'] = expand_size * images.get('image_repeats', 1)
      if input_ids is not None:
        images['image_end'] = input_ids.shape[1]
    input_ids, kwargs = super()._expand_inputs_for_generation(
      expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids,
      **kwargs)
    return input_ids, kwargs | images


class AnyResForConditionalGeneration(HrvlmForConditionalGeneration):
  """AnyRes (LLaVA-1.6)."""

  config_class = AnyResConfig


class DynamicS2ForConditionalGeneration(HrvlmForConditionalGeneration):
  """Dynamic S2 (NVILA)."""

  config_class = DynamicS2Config


class LlavaHrForConditionalGeneration(HrvlmForConditionalGeneration):
  """LLaVA-HR."""

  config_class = LlavaHrConfig


class McLlavaForConditionalGeneration(HrvlmForConditionalGeneration):
  """MC-LLaVA."""

  config_class = McLlavaConfig


class PheyeForConditionalGeneration(HrvlmForConditionalGeneration):
  """Pheye."""

  config_class = PheyeConfig


class Ps3ForConditionalGeneration(HrvlmForConditionalGeneration):
  """PS3 in front of a language model."""

  config_class = Ps3Config


class ReducedForConditionalGeneration(HrvlmForConditionalGeneration):
  """Any encoder and a step that leaves fewer tokens."""

  config_class = ReducedConfig


class S2ForConditionalGeneration(HrvlmForConditionalGeneration):
  """S2."""

  config_class = S2Config


class SingleViewForConditionalGeneration(HrvlmForConditionalGeneration):
  """Plain LLaVA."""

  config_class = SingleViewConfig


class TilingForConditionalGeneration(HrvlmForConditionalGeneration):
  """Closest-aspect tiling."""

  config_class = TilingConfig


class VilaHdForConditionalGeneration(HrvlmForConditionalGeneration):
  """VILA-HD."""

  config_class = VilaHdConfig
