"""PS3 alone: image and text towers with the parameters of their sigmoid loss, as `AutoModel`."""

from dataclasses import dataclass
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.utils import ModelOutput

from .attention import Attention
from .configuration_hrvlm import Ps3Config
from .modeling_base import HrvlmPreTrainedModel
from .ps3 import PS3, ActivatedMlp, ProjectionHead, unit

# Transformers 5.0 copies, of a local folder, only the files that this one names itself.
if TYPE_CHECKING:
  from .convnext import convolved as convolved
  from .ps3_plan import Plan as Plan
  from .towers import Tower as Tower


@dataclass
class Ps3Output(ModelOutput):
  """What `forward` returns.

  Args:
    last_hidden_state: [n g*g+t d] output of the last layer, thumbnail first, then the chosen
      patches by scale and raster order.
    selection_maps: per high scale, 0/1 [n rows columns]: which patches were chosen.
    selection_probs: per high scale, [n rows columns]: what they were chosen by.
    pooler_output: [n o], the pool of the chosen patches (of the thumbnail without any).
  """

  last_hidden_state: torch.FloatTensor | None = None
  selection_maps: tuple | None = None
  selection_probs: tuple | None = None
  pooler_output: torch.FloatTensor | None = None


class TextBlock(nn.Module):
  """x += attn(norm1(x)); x += mlp(norm2(x)); no mask of any kind."""

  def __init__(self, c, config):
    super().__init__()
    norm = lambda: nn.LayerNorm(c.width, eps=c.norm_eps)
    self.norm1, self.norm2 = norm(), norm()
    self.attn = Attention(c.width, c.heads, config)
    self.mlp = ActivatedMlp(c.width, c.mlp_width, c.activation)

  def forward(self, x):
    """[n t d] -> [n t d]."""
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class TextTower(nn.Module):
  """Captions -> features, read at the last position, padding or not, and selection prompts."""

  def __init__(self, c, config):
    super().__init__()
    self.embed = nn.Embedding(c.vocab_size, c.width)
    self.pos_embed = nn.Parameter(torch.zeros(c.context, c.width))
    self.blocks = nn.ModuleList(TextBlock(c, config) for _ in range(c.depth))
    self.norm = nn.LayerNorm(c.width, eps=c.norm_eps)
    self.projection = nn.Linear(c.width, c.out)
    self.prompt_head = ProjectionHead(c.out, c.prompt_width, c.prompt_width)

  def forward(self, ids):
    """Rows of ids [n context] -> features of unit length [n o]."""
    x = self.embed(ids) + self.pos_embed[:ids.shape[1]]
    for block in self.blocks:
      x = block(x)
    return unit(self.projection(self.norm(x[:, -1])).float())


class Ps3Model(HrvlmPreTrainedModel):
  """The encoder with its text tower."""

  config_class = Ps3Config
  main_input_name = 'pixel_values'

  def __init__(self, config):
    super().__init__(config)
    c = config.settings.encoder
    self.c = c
    self.vision = PS3(c, config)
    self.text = TextTower(c.text, config.vision_config)
    self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    self.logit_bias = nn.Parameter(torch.tensor(-10.0))
    self.post_init()

  def get_text_features(self, input_ids):
    """Rows of ids, padded as the tower expects -> [n o] of unit length."""
    return self.text(input_ids)

  def forward(self, pixel_values, input_ids=None, prompt=None, **options):
    """Thumbnail and looks.

    Args:
      pixel_values: [n 3 S S] from the image processor.
      input_ids: [n context], a text per picture that says where to look.
      prompt: [n d] in place of it; neither: by saliency.
      options: of the settings `look`: looks (a number or 'all'), tokens, first_scales, smooth.

    Raises:
      ValueError: other options.
    """
    options.pop('return_dict', None)
    if input_ids is not None:
      prompt = self.text.prompt_head(self.text(input_ids))
    out = self.vision.encode(pixel_values, prompt, **options)
    last = out.hidden[self.c.vision.depth - 1]
    thumbnail = (self.c.scales[0] // self.c.vision.patch_size) ** 2
    read = last[:, thumbnail:] if last.shape[1] > thumbnail else last
    return Ps3Output(last_hidden_state=last, selection_maps=tuple(out.maps),
                     selection_probs=tuple(out.probs), pooler_output=self.vision.pool(read))
