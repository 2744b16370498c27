"""MC-LLaVA's encoder: one tower over all crops, and an embedding of every crop's centre."""

from torch import nn

from .towers import Mlp, Tower


class McLlavaVision(nn.Module):
  """Crops -> tokens; which tokens are kept is decided by the processor (`visual_index`)."""

  def __init__(self, encoder, config):
    super().__init__()
    width = encoder.vision.width
    self.tower = Tower(encoder.vision, config.vision_config)
    self.coord_embed = Mlp(2, width, width)

  def forward(self, pixel_values, coords):
    """pixels [v c h w], centres [v 2] -> [v p d]: the last layer's output plus the embedding of
    the centre; the rest of the selection is a gather."""
    patches = self.tower(pixel_values)
    return patches + self.coord_embed(coords.to(patches.dtype))[:, None]
