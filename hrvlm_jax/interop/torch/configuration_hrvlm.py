"""Configurations of hrvlm models for transformers: one class per system, all alike (transformers
looks classes up by their `model_type`, and gives a class without `__init__` another one).

`model` holds the whole model in the words of hrvlm_jax (`hrvlm params` shows the same keys);
`text_config` and `vision_config` say of its language model and its vision transformer what
transformers needs to know.
"""

from types import SimpleNamespace

from transformers import AutoConfig, PretrainedConfig, SiglipVisionConfig

FORMAT = 'hrvlm-1'


def low_resolution(image_size):
  """LLaVA-HR: side in pixels of the ViT's picture; its grid at patch 14 equals the ConvNeXt's at
  stride 32, but the side is at least 336."""
  return max(int(image_size / 32 * 14), 336)


def settings(values):
  """A mapping, and all mappings inside it, as objects with attributes."""
  if isinstance(values, dict):
    return SimpleNamespace(**{key: settings(value) for key, value in values.items()})
  if isinstance(values, (list, tuple)):
    return [settings(value) for value in values]
  return values


class HrvlmConfig(PretrainedConfig):
  """What all systems share.

  Args:
    model: the model of hrvlm_jax: system, encoder, text, projector, fusion, ...
    format: of the folder.
    layout: of the tensor names, 'transformers'.
    text_config: of the language model; None for an encoder alone.
    vision_config: of the vision transformer; None where there is none.
    image_token_id: stands for one visual token in `input_ids`; None where images take no positions.
    prompt_marker: ids that follow a question (two-pass models: its state says where to look).
  """

  model_type = 'hrvlm'
  sub_configs = {'text_config': AutoConfig, 'vision_config': SiglipVisionConfig}

  def __init__(self, model=None, format=FORMAT, layout='transformers', text_config=None,
               vision_config=None, image_token_id=None, prompt_marker=None, **kwargs):
    if format != FORMAT:
      raise ValueError(f'config.json: format is {format!r}, this code reads {FORMAT!r}; export the '
                       'checkpoint again')
    self.model, self.format, self.layout = model or {}, format, layout
    self.image_token_id, self.prompt_marker = image_token_id, prompt_marker
    if isinstance(text_config, dict):
      text_config = AutoConfig.for_model(**text_config)
    if isinstance(vision_config, dict):
      vision_config = SiglipVisionConfig(**vision_config)
    self.text_config, self.vision_config = text_config, vision_config
    kwargs.setdefault('tie_word_embeddings', bool(
      text_config is not None and text_config.tie_word_embeddings))
    super().__init__(**kwargs)

  @property
  def settings(self):
    """`model` with attributes in place of keys."""
    return settings(self.model)


class AnyResConfig(HrvlmConfig):
  """AnyRes (LLaVA-1.6)."""

  model_type = 'hrvlm_anyres'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class DynamicS2Config(HrvlmConfig):
  """Dynamic S2 (NVILA)."""

  model_type = 'hrvlm_s2_dynamic'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class LlavaHrConfig(HrvlmConfig):
  """LLaVA-HR."""

  model_type = 'hrvlm_llava_hr'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class McLlavaConfig(HrvlmConfig):
  """MC-LLaVA."""

  model_type = 'hrvlm_mc_llava'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class PheyeConfig(HrvlmConfig):
  """Pheye."""

  model_type = 'hrvlm_pheye'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class Ps3Config(HrvlmConfig):
  """PS3."""

  model_type = 'hrvlm_ps3'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class ReducedConfig(HrvlmConfig):
  """Any encoder and a step that leaves fewer tokens.

  Args:
    token_maps: (rows, columns) of the maps that the inner encoder's tokens are, if they are any.
    inner_width: of its tokens.
  """

  model_type = 'hrvlm_reduced'

  def __init__(self, token_maps=None, inner_width=None, **kwargs):
    self.token_maps, self.inner_width = token_maps, inner_width
    super().__init__(**kwargs)


class S2Config(HrvlmConfig):
  """S2."""

  model_type = 'hrvlm_s2'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class SingleViewConfig(HrvlmConfig):
  """Plain LLaVA."""

  model_type = 'hrvlm_single_view'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class TilingConfig(HrvlmConfig):
  """Closest-aspect tiling."""

  model_type = 'hrvlm_tiling'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)


class VilaHdConfig(HrvlmConfig):
  """VILA-HD."""

  model_type = 'hrvlm_vila_hd'

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
