"""The original's side of scripts/originals.sh: its own code on the folder that we wrote.

    python scripts/originals/theirs.py SYSTEM CHECKOUT FOLDER

Runs in the original's environment and imports nothing of the package.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import pathlib
import sys
import types

import numpy as np
from PIL import Image
import torch

from benchmarks.peers.ps3 import TRUNK, register_trunk


def mc_llava(checkout, folder, asked):
  """A function (picture, ids) -> generated ids, of visheratin/mc-llava."""
  from modeling_mc_llava import LlavaConfig, LlavaForCausalLM
  from processing_mc_llava import MultiCropImageProcessor
  from safetensors.torch import load_file

  values = json.loads((folder / 'config.json').read_text())
  config = LlavaConfig(**values, image_token_index=asked['image_id'])
  model = LlavaForCausalLM(config).eval()
  fill(model, load_file(folder / 'model.safetensors'))
  crops, knobs = MultiCropImageProcessor(str(folder)), asked['model']['encoder']

  def answer(picture, ids):
    views = crops([picture], knobs['max_crops'])
    seen = model.vision_model(views['pixel_values'], views['coords'],
                              num_tokens=knobs['num_tokens'])
    features = model.multi_modal_projector(seen)
    out = model.generate(
      input_ids=ids, attention_mask=torch.ones_like(ids), image_features=features,
      max_new_tokens=asked['new'], do_sample=False, use_cache=True, eos_token_id=asked['stop'],
      pad_token_id=asked['stop'][0])
    return out[0, ids.shape[1]:]

  return answer


def to_tensor(image):
  """torchvision's: its wheels do not load beside a PyTorch for CPUs."""
  return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).float().div(255)


def normalize(mean, std):
  """torchvision's."""
  mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
  return lambda x: (x - mean) / std


def transforms():
  """The three parts of torchvision that Pheye uses."""

  def compose(parts):
    def run(x):
      for part in parts:
        x = part(x)
      return x
    return run

  module, inner = types.ModuleType('torchvision'), types.ModuleType('torchvision.transforms')
  inner.ToTensor, inner.Normalize, inner.Compose = lambda: to_tensor, normalize, compose
  module.transforms = inner
  sys.modules |= {'torchvision': module, 'torchvision.transforms': inner}


def pheye(checkout, folder, asked):
  """The same of miguelscarv/pheye; its backbones are named by folders, whose weights the checkpoint
  then replaces."""
  from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PhiConfig

  transforms()  # behind transformers, which looks for torchvision
  from pheye_builder import create_model_and_transforms

  model, encoder = asked['model'], asked['model']['encoder']
  vision, text, fusion = encoder['vision'], model['text'], model['fusion']
  tower, language = folder.parent / 'tower', folder.parent / 'language'
  CLIPModel(CLIPConfig(
    text_config={'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 1,
                 'intermediate_size': 8, 'vocab_size': 9},
    vision_config={'hidden_size': vision['width'], 'num_hidden_layers': vision['depth'],
                   'num_attention_heads': vision['heads'], 'image_size': vision['image_size'],
                   'intermediate_size': vision['mlp_width'], 'patch_size': vision['patch_size'],
                   'hidden_act': vision['activation'], 'layer_norm_eps': vision['norm_eps']},
    projection_dim=8)).save_pretrained(tower)
  PhiConfig(vocab_size=text['vocab_size'], hidden_size=text['width'],
            num_hidden_layers=text['depth'], num_attention_heads=text['heads'],
            intermediate_size=text['mlp_width'], max_position_embeddings=text['max_positions'],
            partial_rotary_factor=text['rotary_dim'] / text['head_dim'],
            layer_norm_eps=text['norm_eps']).save_pretrained(language)
  AutoTokenizer.from_pretrained(str(folder)).save_pretrained(folder.parent / 'tokenizer')
  whole, _ = create_model_and_transforms(
    clip_vision_encoder_path=str(tower), lang_decoder_path=str(language),
    tokenizer_path=str(folder.parent / 'tokenizer'), dtype=torch.float32,
    encoder_dtype=torch.float32, decoder_dtype=torch.float32, level=encoder['level'],
    cross_attn_every_n_layers=fusion['interval'], reduce_factor=fusion['reduce'],
    from_layer=fusion['from_layer'])
  if encoder['first'] is not None:
    whole.vision_encoder.add_first_level_adapter()
  whole.load_state_dict(torch.load(folder / 'checkpoint.pt', map_location='cpu'))
  whole.eval()

  def answer(picture, ids):
    out = whole.generate(
      vision_x=[picture], lang_x=ids, attention_mask=torch.ones_like(ids),
      max_new_tokens=asked['new'], eos_token_id=asked['stop'], pad_token_id=asked['stop'][0])
    return out[0, ids.shape[1]:]

  return answer


def llava_hr(checkout, folder, asked):
  """The same of luogen1996/LLaVA-HR; its ConvNeXt, whose sizes are fixed in code, is made small by
  the class that it is made of."""
  from llava_hr.constants import IMAGE_TOKEN_INDEX
  from llava_hr.mm_utils import process_images
  from llava_hr.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
  from llava_hr.model.multimodal_encoder import convnext, convnext_encoder
  from safetensors.torch import load_file

  encoder, tower = asked['model']['encoder'], folder.parent / 'tower'
  slow = encoder['slow']
  clip(encoder['fast'], tower)
  convnext_encoder.convnext_large_mlp = lambda name: convnext.ConvNeXt(
    depths=slow['depths'], dims=slow['widths'], num_classes=slow['classes'],
    head_hidden_size=slow['head_width'])
  values = json.loads((folder / 'config.json').read_text())
  values |= {'mm_vision_tower': str(tower), 'vision_tower_slow': 'convnext_large'}
  model = LlavaLlamaForCausalLM(LlavaConfig(**values)).eval().float()
  fill(model, load_file(folder / 'model.safetensors'))
  processor = model.get_vision_tower().image_processor

  def answer(picture, ids):
    images = process_images([picture], processor, model.config).float()
    ids = torch.where(ids == asked['image_id'], IMAGE_TOKEN_INDEX, ids)  # outside its vocabulary
    out = model.generate(ids, images=images, max_new_tokens=asked['new'], do_sample=False,
                         use_cache=True, eos_token_id=asked['stop'], pad_token_id=asked['stop'][0])
    return out[0, ids.shape[1]:]

  return answer


class StandIn(types.ModuleType):
  """A module in which every name exists, for packages that are imported and not used here."""

  __path__, __version__ = (), '0'

  def __getattr__(self, name):
    if name.startswith('__'):
      raise AttributeError(name)
    value = type(name, (), {'__init__': lambda self, *args, **options: None})  # a decorator too
    setattr(self, name, value)
    return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds every module of these packages."""

  def __init__(self, *packages):
    self.packages = packages

  def find_spec(self, fullname, path=None, target=None):
    if f'{fullname}.'.startswith(tuple(f'{name}.' for name in self.packages)):
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    return StandIn(spec.name)

  def exec_module(self, module):
    pass


def named_trunk(config):
  """PS3's settings with the name of our trunk in them: PS3 looks it up in timm."""
  return config | {'model_name': TRUNK, 'pretrained': False}


def resize(size, interpolation):
  """torchvision's `Resize`, as PS3's processor calls it."""
  return lambda image: image.resize(size[::-1], Image.Resampling.BICUBIC)


def ps3_pixels(folder):
  """PS3's processor with three stand-ins for torchvision."""
  import ps3.image_processing_ps3 as module

  module.Resize, module.ToTensor, module.Normalize = resize, lambda: to_tensor, normalize
  return module.PS3ImageProcessor(**json.loads((folder / 'preprocessor_config.json').read_text()))


def ps3(checkout, folder, asked):
  """A function (picture, ids) -> places of the chosen patches, of NVlabs/PS3; it writes the
  features of every picture."""
  register_trunk(asked['model']['encoder']['vision'])
  from ps3 import PS3Model

  path = folder / 'config.json'
  values = json.loads(path.read_text())
  values['vision_config'] = named_trunk(values['vision_config'])
  path.write_text(json.dumps(values))
  model, said = PS3Model.from_pretrained(str(folder), output_loading_info=True)
  known = dict(model.named_parameters()).keys() | {'logit_scale', 'logit_bias'}  # of its training
  if wrong := [name for name in said['missing_keys'] if name in known] + [
      name for name in said['unexpected_keys'] if name not in known]:
    raise SystemExit(f'theirs.py: names differ: {", ".join(wrong[:20])}')
  model, pixels, done = model.eval(), ps3_pixels(folder), []

  def answer(picture, ids):
    given = pixels(picture, return_tensors='pt')['pixel_values']
    out = model.vision_model(torch.stack(list(given)), output_hidden_states=True,
                             num_look_close=asked['model']['encoder']['look']['looks'])
    np.save(folder.parent / f'{len(done)}.theirs.npy', out.last_hidden_state[0].numpy())
    done.append(picture)
    return torch.cat([one[0].flatten() for one in out.selection_maps]).nonzero()[:, 0]

  return answer


# What NVlabs/VILA imports for training and other models; the last three are its own.
UNUSED = ('deepspeed', 'flash_attn', 'triton', 'bitsandbytes', 'datasets', 'cv2', 's2wrapper',
          'decord', 'pytorchvideo', 'llava.model.liger',
          'llava.model.language_model.fp8linearqwen2', 'llava.model.language_model.qllava_qllama')


def vila_hd(checkout, folder, asked):
  """A function (picture, ids) -> generated ids, of NVlabs/VILA with NVlabs/PS3."""
  import timm  # noqa: F401  before the stand-ins, as transformers: both look for packages
  import transformers  # noqa: F401
  sys.meta_path.insert(0, Finder(*UNUSED))
  from llava.mm_utils import process_images
  from llava.model.configuration_llava import LlavaConfig  # noqa: F401
  from llava.model.language_model.llava_topdown_llama import (
    LlavaTopDownLlamaConfig,
    LlavaTopDownLlamaModel,
  )
  from ps3.modeling_ps3 import PS3VisionEncoder

  PS3VisionEncoder.s3_scales = property(lambda self: self.ps3_scales)  # renamed since in PS3
  register_trunk(asked['model']['encoder']['tower']['vision'])
  path = folder / 'vision_tower/config.json'
  path.write_text(json.dumps(named_trunk(json.loads(path.read_text()))))
  ps3_pixels(folder / 'vision_tower')
  values = json.loads((folder / 'config.json').read_text())
  config = LlavaTopDownLlamaConfig(**values)
  config._name_or_path = config.resume_path = str(folder)  # as `llava.load` sets it
  config.model_dtype = 'torch.float32'
  config.chat_template = 'qwen2'  # of a tokenizer that has none
  model = LlavaTopDownLlamaModel(config).eval().float()

  def answer(picture, ids):
    images = process_images([picture], model.vision_tower.image_processor, model.config).float()
    place, = (ids[0] == asked['image_id']).nonzero()[0].tolist()
    ids[0, place] = model.tokenizer.media_token_ids['image']
    after = model.tokenizer('\n').input_ids  # which its encoder puts behind a picture itself
    assert ids[0, place + 1:place + 1 + len(after)].tolist() == after
    ids = torch.cat([ids[:, :place + 1], ids[:, place + 1 + len(after):]], dim=1)
    out = model.generate(
      input_ids=ids, media={'image': [images[0]]}, media_config={'image': {}},
      max_new_tokens=asked['new'], do_sample=False, eos_token_id=asked['stop'],
      pad_token_id=asked['stop'][0])
    return out[0]

  return answer


def llava(checkout, folder, asked):
  """The same of haotian-liu/LLaVA: one view, AnyRes, S2."""
  from llava.constants import IMAGE_TOKEN_INDEX
  from llava.mm_utils import process_images
  from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
  from safetensors.torch import load_file

  tower, vision = folder.parent / 'tower', asked['model']['encoder']['vision']
  clip(vision, tower, vision['image_size'])
  values = json.loads((folder / 'config.json').read_text())
  values |= {'mm_vision_tower': str(tower)}
  model = LlavaLlamaForCausalLM(LlavaConfig(**values)).eval().float()
  model.get_vision_tower().load_model()
  fill(model, load_file(folder / 'model.safetensors'))
  processor = model.get_vision_tower().image_processor

  def answer(picture, ids):
    images = process_images([picture], processor, model.config).float()
    ids = torch.where(ids == asked['image_id'], IMAGE_TOKEN_INDEX, ids)  # outside its vocabulary
    out = model.generate(ids, images=images, image_sizes=[picture.size],
                         max_new_tokens=asked['new'], do_sample=False, use_cache=True,
                         eos_token_id=asked['stop'], pad_token_id=asked['stop'][0])
    return out[0, 1:]  # made from embeddings: a start token, not the prompt

  return answer


def clip(vision, folder, size=None):
  """A CLIP tower of these sizes and its processor, as a folder of transformers."""
  from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

  CLIPVisionModel(CLIPVisionConfig(
    hidden_size=vision['width'], num_hidden_layers=vision['depth'],
    num_attention_heads=vision['heads'], image_size=vision['image_size'],
    intermediate_size=vision['mlp_width'], patch_size=vision['patch_size'],
    hidden_act=vision['activation'], layer_norm_eps=vision['norm_eps'])).save_pretrained(folder)
  sizes = {} if size is None else {'size': {'shortest_edge': size},
                                   'crop_size': {'height': size, 'width': size}}
  CLIPImageProcessor(**sizes).save_pretrained(folder)


def fill(model, tensors):
  """Every parameter gets its tensor, and every tensor has its parameter.

  Raises:
    SystemExit: names that only one side has.
  """
  missing, unexpected = model.load_state_dict(tensors, strict=False)
  known = dict(model.named_parameters())
  # safetensors gives its tensors in no order of their own.
  wrong = [f'missing {name}' for name in sorted(missing) if name in known]
  if wrong := wrong + [f'unexpected {name}' for name in sorted(unexpected)]:
    raise SystemExit(f'theirs.py: names differ: {", ".join(wrong[:20])}')


def main(name, checkout, work):
  """Writes `theirs.json`: generated ids of every question, and the versions."""
  sys.path.insert(0, checkout)
  place = pathlib.Path(work)
  asked = json.loads((place / 'asked.json').read_text())
  with torch.no_grad():
    make = {'mc_llava': mc_llava, 'pheye': pheye, 'llava_hr': llava_hr, 'ps3': ps3,
            'vila_hd': vila_hd}.get(name, llava)
    answer = make(checkout, place / 'original', asked)
    found = [answer(Image.open(place / one['picture']).convert('RGB'), torch.tensor([one['ids']]))
             for one in asked['asked']]
  versions = {p: importlib.metadata.version(p) for p in ('torch', 'transformers', 'pillow')}
  (place / 'theirs.json').write_text(json.dumps({
    'tokens': [[int(one) for one in row] for row in found], 'versions': versions}))


if __name__ == '__main__':
  main(*sys.argv[1:])
