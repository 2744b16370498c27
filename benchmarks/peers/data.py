"""The originals' image processors, one JPEG at a time; run by the peers' interpreter.

    python -m benchmarks.peers.data        reads commands, answers in JSON, one line each

transformers' CLIP and SigLIP processors and ps3-torch's are the published code. What stands around
them in the originals (cutting, padding) is written here from its description: it lives in research
repositories, not in packages. torchvision's three operations in ps3-torch's processor are given by
the same calls to Pillow and PyTorch that it makes (its wheel fails beside a CPU-only PyTorch).
"""

from __future__ import annotations

import io
import json
import sys
import time

import numpy as np
from PIL import Image
import torch

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def opened(data: bytes) -> Image.Image:
  """As all the originals open an image."""
  return Image.open(io.BytesIO(data)).convert('RGB')


def clip(size: int, **options):
  """The CLIP processor of so many pixels."""
  from transformers import CLIPImageProcessor

  return CLIPImageProcessor(size={'shortest_edge': size}, crop_size={'height': size, 'width': size},
                            image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD), **options)


def ps3(settings):
  """ps3-torch's processor."""
  import ps3.image_processing_ps3 as module

  class Resize:
    def __init__(self, size, interpolation):
      self.size, self.how = size, interpolation.value

    def __call__(self, image):
      return image.resize(self.size[::-1], getattr(Image.Resampling, self.how.upper()))

  class ToTensor:
    def __call__(self, image):
      array = torch.from_numpy(np.array(image, np.uint8, copy=True))
      return array.permute((2, 0, 1)).contiguous().to(torch.float32).div(255)

  class Normalize:
    def __init__(self, mean, std):
      self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def __call__(self, x):
      return x.clone().sub_(self.mean).div_(self.std)

  module.Resize, module.ToTensor, module.Normalize = Resize, ToTensor, Normalize
  module._convert_to_rgb = lambda image: image.convert('RGB')
  processor = module.PS3ImageProcessor(settings['size'], (0.5,) * 3, (0.5,) * 3)
  return lambda data: [processor.preprocess(opened(data))['pixel_values'][0]], (0.5,), (0.5,)


def llava_hr(settings):
  """LLaVA-HR: padded to a square, then the CLIP processor at the high resolution."""
  processor = clip(settings['size'])

  def run(data):
    image = opened(data)
    side = max(image.size)
    if image.width != image.height:
      page = Image.new('RGB', (side, side), tuple(int(x * 255) for x in CLIP_MEAN))
      page.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
      image = page
    return [processor.preprocess(image, return_tensors='pt')['pixel_values'][0]]

  return run, CLIP_MEAN, CLIP_STD


def mc_llava(settings):
  """MC-LLaVA: crops of the image, then the SigLIP processor on all of them."""
  from transformers import SiglipImageProcessor

  processor = SiglipImageProcessor(size={'height': settings['size'], 'width': settings['size']},
                                   image_mean=[0.5] * 3, image_std=[0.5] * 3)

  def run(data):
    image = opened(data)
    crops = [image.crop(box) for box in settings['boxes']]
    return list(processor(crops, return_tensors='pt')['pixel_values'])

  return run, (0.5,), (0.5,)


def pheye(settings):
  """Pheye: the whole image and the tiles of an enlarged copy, to tensors one by one."""
  size, level = settings['size'], settings['level']
  mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (CLIP_MEAN, CLIP_STD))

  def tensor(image):
    array = torch.from_numpy(np.array(image, np.uint8)).permute((2, 0, 1)).contiguous()
    return array.to(torch.float32).div(255).sub_(mean).div_(std)

  def run(data):
    image = opened(data)
    large = image.resize((size * level, size * level), Image.Resampling.BICUBIC)
    tiles = [large.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
             for x in range(level) for y in range(level)]
    return [tensor(x) for x in (image.resize((size, size), Image.Resampling.BICUBIC), *tiles)]

  return run, CLIP_MEAN, CLIP_STD


def anyres(settings):
  """AnyRes: thumbnail and padded tiles, each through the CLIP processor."""
  size, (wide, high) = settings['size'], settings['canvas']
  processor = clip(size)

  def run(data):
    image = opened(data)
    x0, y0, x1, y1 = settings['content']
    page = Image.new('RGB', (wide, high), (0, 0, 0))
    page.paste(image.resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), (x0, y0))
    tiles = [page.crop((x, y, x + size, y + size)) for y in range(0, high, size)
             for x in range(0, wide, size)]
    whole = image.resize((size, size), Image.Resampling.BICUBIC)
    return [processor.preprocess(tile, return_tensors='pt')['pixel_values'][0]
            for tile in (whole, *tiles)]

  return run, CLIP_MEAN, CLIP_STD


KINDS = {'ps3': ps3, 'vila_hd': ps3, 'llava_hr': llava_hr, 'mc_llava': mc_llava, 'pheye': pheye,
         'anyres': anyres}


def to_bytes(tensors, mean, std) -> np.ndarray:
  """The normalised tensors as the uint8 pixels they came from, [n h w 3]."""
  mean, std = (np.float64(x).reshape(-1, 1, 1) for x in (mean, std))
  pixels = [np.asarray(t, np.float64) * std + mean for t in tensors]
  return np.rint(np.stack(pixels) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def main() -> None:
  """Answers commands: {'kind', 'settings'} prepares, {'run'} times one call, {'save'} writes."""
  torch.set_num_threads(1)
  data = run = out = None
  for line in sys.stdin:
    command, answer = json.loads(line), {}
    if 'image' in command:
      with open(command['image'], 'rb') as file:
        data = file.read()
    if 'kind' in command:
      run, mean, std = KINDS[command['kind']](command['settings'])
      answer['shape'] = [len(run(data))]
    if 'run' in command:
      out = None
      cpu, wall = time.process_time(), time.perf_counter()
      out = run(data)
      answer |= {'cpu': time.process_time() - cpu, 'wall': time.perf_counter() - wall}
    if 'save' in command:
      np.save(command['save'], to_bytes(out, mean, std))
    print(json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
