"""What all models of hrvlm share."""

from transformers import PreTrainedModel

from .configuration_hrvlm import HrvlmConfig


class HrvlmPreTrainedModel(PreTrainedModel):
  """What transformers has to know of all models."""

  config_class = HrvlmConfig
  base_model_prefix = ''
  main_input_name = 'input_ids'
  input_modalities = ('image', 'text')
  supports_gradient_checkpointing = True
  _supports_sdpa = True
  _supports_flash_attn = True
  _supports_flex_attn = True
  _supports_attention_backend = True
  # An encoder is one place: its parts read each other's weights. Its layers are for sharding.
  _no_split_modules = [
    'SingleViewVision', 'TiledVision', 'S2Vision', 'DynamicS2Vision', 'LlavaHrVision',
    'McLlavaVision', 'PheyeVision', 'PS3', 'ReducedVision', 'VilaHdVision', 'TextTower',
    'TowerLayer', 'LookLayer', 'PheyeLayer', 'CrossBlock']
  # Where to look closer is decided in float32 (see `ps3.Selection`).
  _keep_in_fp32_modules_strict = ['selection', 'prompt_head']
  _skip_keys_device_placement = ['past_key_values']

  def __init__(self, config):
    super().__init__(config)
    # The layers of the vision transformer stand in no model of their own that would be told.
    if config.vision_config is not None:
      config.vision_config._attn_implementation = config._attn_implementation

  def post_init(self):
    """Names only what is in this model: who shards by these names asks for each of them."""
    here = {type(module).__name__ for module in self.modules()}
    self._no_split_modules = [name for name in self._no_split_modules if name in here]
    super().post_init()
