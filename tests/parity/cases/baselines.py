"""Golden checks of the baselines: anyres/* and s2/*."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from hrvlm_jax.checkpoint.rows import Row, Table, identity, import_tensors, prefixed
from hrvlm_jax.core.layers import PatchEmbed, activation_name
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.language.prompt import expand, pad_batch
from hrvlm_jax.systems.baselines import anyres, layout, scaling, tiles
from hrvlm_jax.systems.baselines.anyres import AnyResConfig
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig, view as single_view
from hrvlm_jax.systems.baselines.tiled import TiledEncoder as AnyResEncoder
from hrvlm_jax.systems.contract import VisualTokens
from hrvlm_jax.vision import vit
from hrvlm_jax.vision.blocks import BlockProjector
from hrvlm_jax.vision.vit import ViT, ViTConfig
from hrvlm_jax.vlm.model import merge
from tests.parity.cases.runner import OPERATOR, Case, check


def _anyres(case: Case, side: int, *, vision_width: int = 8, **options) -> AnyResConfig:
  """The tile arithmetic of a case; the tower's other sizes play no part."""
  cfg = case.config
  tile = cfg['tile']
  vision = ViTConfig(image_size=tile, patch_size=tile // side, width=vision_width, depth=1, heads=1,
                     mlp_width=1)
  if vision.grid != side:
    raise ValueError(f'{side} patches per side do not divide a tile of {tile} pixels')
  pinpoints = tuple(map(tuple, cfg['grid_pinpoints_wh'].plain()))
  return AnyResConfig(vision=vision, layer=-1, pinpoints=pinpoints,
                      **{'projector': None, 'width': vision_width} | options)


@check('anyres', 'grid')
def grid(case: Case) -> None:
  """Resolution, content box, feature map and token count of every size."""
  config = _anyres(case, case.config['patches_per_side'])
  side = config.vision.grid
  for number, row in enumerate(case.config['cases']):
    width, height = row['size_wh'].plain()
    resolution = tiles.choose_resolution(width, height, config.pinpoints)
    columns, rows = anyres.tile_grid(width, height, config)
    shape = (rows * side, columns * side)
    down, across = tiles.content_cells(width, height, *shape)
    expected = {
      'best_resolution_wh': resolution, 'grid_wh': (columns, rows),
      'content_box_xyxy': tiles.content_box(width, height, resolution), 'feature_map_hw': shape,
      'unpadded_hw': (down.stop - down.start, across.stop - across.start),
      'unpadded_origin_yx': (down.start, across.start),
      'tokens_spatial_unpad': anyres.count(width, height, config).tokens}
    for key, value in expected.items():
      if key in row:
        case.expect_json(('cases', number, key), list(value) if isinstance(value, tuple) else value)


@check('anyres', 'crops')
def crops(case: Case) -> None:
  """Pixels of canvas, tiles and thumbnail; the older padding to a square."""
  cfg = case.config
  mean, std = (tuple(cfg[key].plain()) for key in ('mean', 'std'))
  config = _anyres(case, 1, mean=mean, std=std)
  case.waive('config.json:resize', 'describes what the pixels below show')
  square = SingleViewConfig(vision=config.vision, layer=-1, fit='pad', mean=mean, std=std)
  for number, row in enumerate(cfg['images']):
    image = case.image(row['file'])
    name = row['file'].rsplit('.', 1)[0]
    case.expect_json(('images', number, 'size_wh'), list(image.size))
    case.expect_json(('images', number, 'grid_wh'), list(anyres.tile_grid(*image.size, config)))
    case.exact(f'{name}.padded_uint8', np.asarray(anyres.canvas(image, config)))
    values = normalise_host(anyres.view_pixels(image, config), mean, std)
    case.expect(f'{name}.crops', values.transpose(0, 3, 1, 2), tol=OPERATOR)
    if case.has(f'{name}.pad_square'):
      values = normalise_host(np.asarray(single_view(image, square)), mean, std)
      case.expect(f'{name}.pad_square', values.transpose(2, 0, 1), tol=OPERATOR)


@check('anyres', 'dynamic_tiles')
def dynamic_tiles(case: Case) -> None:
  """Closest-aspect grids and the grids of dynamic S2."""
  cfg = case.config
  tile = cfg['tile']
  order = [tuple(pair) for pair in cfg['candidate_order_wh'].plain()]
  candidates = tiles.grid_candidates(cfg['min_tiles'], cfg['max_tiles'])
  case.expect_json(('candidate_order_wh',), [list(pair) for pair in candidates])
  scales = cfg['s2_scales'].plain()
  for number, row in enumerate(cfg['cases']):
    width, height = row['size_wh'].plain()
    columns, rows = tiles.closest_grid(width, height, tile, order)
    case.expect_json(('cases', number, 'grid_wh'), [columns, rows])
    case.expect_json(('cases', number, 'n_tiles'), columns * rows + int(columns * rows > 1))
    grids = tiles.scale_grids(width, height, scales, cfg['s2_tile'], cfg['s2_max_tiles'])
    case.expect_json(('cases', number, 'dynamic_s2_block_hw'), list(grids[-1]))
    case.expect_json(('cases', number, 'dynamic_s2_n_tiles'), sum(r * c for r, c in grids))


@check('anyres', 'features')
def features(case: Case) -> None:
  """Projected and merged tokens of every image, and their places in the text."""
  cfg, weights = case.config, case.weights()
  sizes = cfg['sizes_wh'].plain()
  kind = 'linear' if 'mm_projector.weight' in weights else (
    f'mlp{sum(k.startswith("mm_projector.") and k.endswith(".weight") for k in weights)}x_gelu')
  width = case.input('tower_features.0').shape[-1]
  config = _anyres(case, cfg['patches_per_side'], vision_width=width,
                   width=len(weights['image_newline']), merge=cfg['mm_patch_merge_type'],
                   projector=kind)
  fn = Functional(lambda rngs: AnyResEncoder(config, rngs=rngs))
  params = {key: value for key, value in fn.abstract.items() if key != 'tower'}
  rows = layout.projector_rows(kind, 'mm_projector', ours='projector')
  names = {name: value for name, value in weights.items() if name.startswith('mm_projector')}
  if config.has_newline:
    rows.append(Row('newline', 'image_newline', identity))
    names['image_newline'] = weights['image_newline']
  params = import_tensors(names, Table(tuple(rows)), params)
  params['tower'] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
                                 fn.abstract['tower'])
  arrange = jax.jit(functools.partial(fn.apply, method='arrange'))
  tokens = []
  for number, (wide, high) in enumerate(sizes):
    index = anyres.gather_index(wide, high, config)
    case.expect_json(('tokens_per_image', number), len(index))
    found = np.asarray(arrange(params, case.input(f'tower_features.{number}'), index[None]))[0]
    case.expect(f'image_tokens.{number}', found)
    tokens.append(found)
  _insertion(case, tokens, weights['embed_tokens.weight'])


def _insertion(case: Case, tokens: list[np.ndarray], table: np.ndarray) -> None:
  """The tokens' places in the padded rows of text, through the library's own expansion."""
  cfg = case.config
  ids, labels = case.input('input_ids'), case.input('labels')
  real = case.input('attention_mask') > 0
  case.expect_json(('ignore_index',), -100)
  image_id, images, rows, used = cfg['image_token_index'], iter(tokens), [], []
  for row, keep in enumerate(real):
    own = [next(images) for _ in range(int((ids[row][keep] == image_id).sum()))]
    rows.append(expand(ids[row][keep], labels[row][keep], image_id, [len(x) for x in own]))
    used.append(np.concatenate([*own, np.zeros((1, table.shape[1]), table.dtype)]))
  batch = pad_batch(rows, max(len(row['tokens']) for row in rows), cfg['padding_side'])
  most = max(map(len, used))
  values = np.stack([np.pad(x, ((0, most - len(x)), (0, 0))) for x in used])
  visual = VisualTokens(jnp.asarray(values), jnp.ones(values.shape[:2], bool))
  embeds = np.asarray(merge(jnp.take(table, batch['tokens'], axis=0), visual,
                            batch['visual_index']))
  valid = batch['valid']
  positions = np.where(valid, np.cumsum(valid, axis=1) - 1, 0)
  like = lambda key, value: np.asarray(value).astype(case.input(key).dtype)
  case.expect('expanded.inputs_embeds', np.where(valid[..., None], embeds, 0))
  for key, value in (('labels', batch['labels']), ('attention_mask', valid),
                     ('position_ids', positions)):
    case.exact(f'expanded.{key}', like(f'expanded.{key}', value))


def _scale_sizes(variant, side: int) -> list[int]:
  if 'img_sizes' in variant:
    return variant['img_sizes'].plain()
  return [int(side * scale) for scale in variant['scales'].plain()]


def _variant(case: Case, name: str, encode, *, tokens: bool) -> None:
  """One setting of the wrapper: result and every intermediate."""
  cfg = case.config
  variant = cfg['variants'][name]
  x = jnp.asarray(case.input('input').transpose(0, 2, 3, 1))
  case.expect_json(('image_size',), x.shape[1])
  options = dict(split=variant.get('max_split_size'), output=variant.get('idx') or 0,
                 prefix=variant.get('npre') or 0, tokens=tokens)
  variant.get('split_forward')  # batching only
  sizes = _scale_sizes(variant, x.shape[1])

  @jax.jit
  def run(x):
    trace: dict[str, jax.Array] = {}
    return scaling.multi_scale(encode, x, sizes, trace=trace, **options), trace

  out, trace = run(x)
  for key, value in {'output': out, **trace}.items():
    full = f'{name}.{key}'
    value = np.asarray(value)
    if value.ndim == 4:
      value = value.transpose(0, 3, 1, 2)
    if case.has(full):
      case.expect(full, value)


@check('s2', 'linear_patch')
def linear_patch(case: Case) -> None:
  """The wrapper over a patch convolution."""
  cfg, weights = case.config, case.weights()
  kernel = weights['proj.weight'].transpose(2, 3, 1, 0)
  case.expect_json(('patch_size',), kernel.shape[0])
  case.expect_json(('channels',), kernel.shape[-1])
  for key in ('encoder', 'interpolation'):
    case.waive(f'config.json:{key}', 'says in words what the tensors are compared for')
  patch = Functional(lambda rngs: PatchEmbed(kernel.shape[0], kernel.shape[2], kernel.shape[3],
                                             bias=True, rngs=rngs))
  params = {'kernel': kernel.reshape(patch.abstract['kernel'].shape), 'bias': weights['proj.bias']}
  for name in cfg['variants']:
    shape = cfg['variants'][name].get('shape') or 'bnc'
    tokens = shape != 'bchw'
    encode = lambda x, tokens=tokens: (
      patch.apply(params, x) if tokens else scaling.square_map(patch.apply(params, x)))
    _variant(case, name, encode, tokens=tokens)


@check('s2', 'clip_vit')
def clip_vit(case: Case) -> None:
  """The wrapper over a CLIP tower."""
  cfg, weights = case.config, case.weights()
  c = cfg['clip']
  vision = ViTConfig(
    image_size=c['image_size'], patch_size=c['patch_size'], width=c['hidden_size'],
    depth=c['num_hidden_layers'], heads=c['num_attention_heads'], mlp_width=c['intermediate_size'],
    activation=activation_name(cfg['hidden_act']), norm_eps=cfg['layer_norm_eps'],
    class_token=True, patch_bias=False, pre_norm=True)
  case.waive('config.json:clip/projection_dim', 'of the text and image projection, not used')
  fn = Functional(lambda rngs: ViT(vision, rngs=rngs))
  rows = prefixed(vit.clip_table(vision), theirs='vision_model.')
  params = import_tensors(weights, rows, fn.abstract)
  depth = vision.depth
  for name in cfg['variants']:
    feature = cfg['variants'][name]['feature']
    if feature == 'last_hidden_state':
      encode = lambda x: fn.apply(params, x)
    elif feature == 'penultimate_patch':
      layer = cfg['select_layer']
      encode = lambda x, layer=layer: fn.apply(params, x, stop=depth + 1 + layer)[:, 1:]
    else:
      raise ValueError(f'variant {name}: unknown feature {feature!r}')
    _variant(case, name, encode, tokens=True)
  case.waive('config.json:select_layer', 'no variant reads it')


@check('s2', 'dynamic_s2')
def dynamic_s2(case: Case) -> None:
  """Tiles of several scales to one map, projected block by block."""
  cfg = case.config
  scales, output = cfg['scales'].plain(), cfg['resize_output_to_scale_idx']
  features, kind = case.input('block_features'), cfg['projector']
  case.expect_json(('grid_per_block',), math.isqrt(features.shape[1]))
  case.expect_json(('channels',), features.shape[-1])
  case.waive('config.json:order', 'says in words what the tensors are compared for')
  width = cfg['hidden_size']
  fn = Functional(lambda rngs: BlockProjector(kind, features.shape[-1] * len(scales), width,
                                              rngs=rngs))
  rows = [Row(row.ours.removeprefix('/'), row.theirs.removeprefix('x.'), row.op)
          for row in layout.projector_rows(kind, 'x', ours='')]
  params = import_tensors(case.weights(), Table(tuple(rows)), fn.abstract)
  start = 0
  for number, block in enumerate(cfg['block_sizes'].plain()):
    square = [(scale // scales[0],) * 2 for scale in scales[:-1]]
    if block is None:
      grids, count, after = [(1, 1)] * len(scales), 1, (1, 1)
    else:
      grids = [*square, tuple(block)]
      count, after = sum(r * c for r, c in grids), scaling.output_grid(grids, output)
    case.expect_json(('blocks_after', number), list(after))

    @jax.jit
    def run(tiles, grids=grids, after=after):
      merged = scaling.dynamic_map(tiles, grids, output=output)
      return merged, scaling.project_blocks(merged, after, lambda x: fn.apply(params, x))

    merged, tokens = run(features[start:start + count])
    case.expect(f'image{number}.merged_map', np.asarray(merged).transpose(2, 0, 1)[None])
    case.expect(f'image{number}.tokens', tokens)
    start += count
  if start != len(features):
    raise ValueError(f'{len(features)} tiles, {start} used')
