"""Folders for transformers: tiny models of every system beside ours, and the way back."""


import numpy as np
from PIL import Image
import pytest
import torch

from hrvlm_jax.core.resample import normalise
from hrvlm_jax.interop.convert import convert, recognise
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.vlm import model as vlm
from tests import levels
from tests.interop.pytorch import LIMIT, Pair, assert_same_views, near, picture
from tests.interop.tiny_models import FIRST, MODELS, PS3_ALONE

rows = lambda *first: levels.rows('interop', MODELS, first=first or FIRST)


def fuzz(config):
  """Odd pictures: modes, elongated, tiny."""
  rng = np.random.default_rng(3)
  long = 300 if 'mc_llava' in (config.system, getattr(config.encoder, 'inner', None)) else 900
  yield from (picture((int(w), int(h)), int(w)) for w, h in rng.integers(1, 260, (6, 2)))
  yield from (picture(size) for size in ((1, 1), (2, 97), (long, 3), (38, 38), (576, 577)))
  base = picture((71, 53))
  for mode in ('L', '1', 'P', 'RGBA', 'LA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'I', 'F'):
    yield base.convert('RGB').convert('L').convert(mode) if mode in ('I', 'F', 'LA') else (
      base.convert(mode))
  yield Image.fromarray(np.arange(71 * 53, dtype=np.uint16).reshape(53, 71) * 17)


@pytest.mark.parametrize('name', rows(*MODELS))
def test_the_processor_sees_what_we_see(name, tmp_path):
  """Pixels are equal bytes before they are normalised and within one unit in the last place
  after; token ids are equal, and so are the tokens that are taken."""
  pair = Pair.light(MODELS[name], tmp_path)
  config, processor = pair.config, pair.processor
  system, encoder = registry.get(config.system), config.encoder
  for image in fuzz(config):
    assert_same_views(config, processor.image_processor, image)
  items = pair.items(3)
  if config.fusion.in_prompt:
    items += [([], 'No picture here'), ([picture((40, 31)), picture((90, 60))], 'Two?')]
  for item in items:
    ids = pair.inputs([item])['input_ids'][0].numpy()
    row = pair.text.prompt(item[1], system.views(item[0], encoder)['tokens'].tolist())
    place = processor.image_token_id or 0
    np.testing.assert_array_equal(ids, np.where(row['visual_index'] >= 0, place, row['tokens']))


@pytest.mark.parametrize('n', levels.rows('interop', [1, 4], first=[4]))
@pytest.mark.parametrize('name', rows('mc_llava', 'pheye'))
def test_logits_loss_and_gradients_are_ours(name, n, pair):
  ours, theirs = pair.both_losses(n)
  assert abs(ours[0] - theirs[0]) <= LIMIT * max(abs(ours[0]), 1)
  assert near(ours[1], theirs[1]) <= LIMIT
  largest = max(np.max(np.abs(x)) for x in ours[2].values())
  used = {key for key, x in ours[2].items() if np.any(x)}
  assert used <= theirs[2].keys()
  for key, x in theirs[2].items():
    assert np.max(np.abs(ours[2][key] - x)) <= LIMIT * largest, key
    if np.max(np.abs(x)) > 1e-4 * largest:  # small ones by themselves
      assert near(ours[2][key], x) <= 1e-2, key


@pytest.mark.parametrize('name', rows('mc_llava', 'pheye'))
def test_greedy_tokens_are_ours(name, pair):
  """A batch of four unequal pictures, padded on the left, and each of them alone."""
  answerer, items = pair.answerer, pair.items(4)
  embeds, valid, extras = answerer.generator.prompt(answerer.batch(items))
  out = answerer.generator.generate(embeds, valid, answerer.sampling(max_new_tokens=6),
                                    extras=extras).rows()
  for part, expected in ((items, out), (items[:1], out[:1])):
    inputs = pair.inputs(part)
    found = pair.model.generate(**inputs, max_new_tokens=6)[:, inputs['input_ids'].shape[1]:]
    for row, wanted in zip(found.tolist(), expected, strict=True):
      assert row[:len(wanted)] == list(wanted)


@pytest.mark.parametrize('name', rows('mc_llava'))
def test_beams_samples_and_settings_at_call_time(name, pair):
  model, inputs = pair.model, pair.inputs(pair.items(3))
  length = inputs['input_ids'].shape[1]
  one = model.generate(**inputs, max_new_tokens=4, num_beams=3)
  single = model.generate(**pair.inputs(pair.items(1)), max_new_tokens=4, num_beams=3)
  assert one[0, length:].tolist()[:4] == single[0, -one[0, length:].numel():].tolist()[:4]
  torch.manual_seed(0)
  sampled = model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
  assert len(sampled) == 6 and torch.equal(sampled[0, :length], sampled[1, :length])
  plain = model.generate(**inputs, max_new_tokens=4, use_cache=False)
  assert torch.equal(plain, model.generate(**inputs, max_new_tokens=4))
  if pair.config.system == 'mc_llava':
    few = pair.inputs(pair.items(1), max_crops=0, num_tokens=9)
    assert len(few['pixel_values']) == 1 and few['visual_index'].numel() == 9
  if pair.native:
    with pytest.raises(ValueError, match='do not match'):
      model(**{**inputs, 'input_ids': inputs['input_ids'][:, :-1] * 0 + model.config.image_token_id,
               'attention_mask': inputs['attention_mask'][:, :-1]})
  two = pair.inputs(pair.items(1) * 2)
  if 'visual_index' in two and pair.config.fusion.kind == 'prefix':  # one picture for two rows
    half = len(two['visual_index']) // 2
    with pytest.raises(ValueError, match=f'{2 * half} places .* have {half}'):
      model(**{**two, 'visual_index': two['visual_index'][:half]})
  with pytest.raises(ValueError, match='a call can change: max_cropz'):
    pair.inputs(pair.items(1), max_cropz=0)
  with pytest.raises(ValueError, match='1 <image> in the text, but 2 images'):
    pair.processor(images=[picture((9, 9))] * 2, text='<image> ?')


@pytest.mark.parametrize('name', rows('mc_llava'))
def test_attention_checkpointing_and_pipeline(name, pair):
  from transformers import AutoModelForImageTextToText, pipeline

  inputs = pair.inputs(pair.items(2))
  real = inputs['attention_mask'].bool()
  expected = pair.model(**inputs).logits[real].detach()
  eager = AutoModelForImageTextToText.from_pretrained(
    pair.folder, trust_remote_code=True, attn_implementation='eager', dtype=torch.float32)
  assert near(eager(**inputs).logits[real].detach(), expected) < 1e-5
  for model, kind in ((pair.model, 'sdpa'), (eager, 'eager')):
    fusion = getattr(model, 'fusion', None)
    lists = () if fusion is None else (type(fusion),)
    kinds = {m.config._attn_implementation for m in model.modules()
             if type(m).__name__.endswith('Attention')
             # Of SigLIP's pooling, and the list of our blocks, whose attention has its own.
             and not isinstance(m, (torch.nn.MultiheadAttention, *lists))}
    assert kinds == {kind}
  labels = inputs['input_ids'].clone()
  labels[:, :-4] = -100
  gradients = []
  for checkpointing in (False, True):
    eager.train()
    (eager.gradient_checkpointing_enable if checkpointing else
     eager.gradient_checkpointing_disable)()
    eager.zero_grad()
    torch.manual_seed(0)  # dropout
    eager(**inputs, labels=labels).loss.backward()
    gradients.append({k: p.grad for k, p in eager.named_parameters() if p.grad is not None})
  assert gradients[0].keys() == gradients[1].keys()
  for key, value in gradients[0].items():
    torch.testing.assert_close(gradients[1][key], value, rtol=1e-4, atol=1e-6)
  ask = pipeline('image-text-to-text', model=str(pair.folder), trust_remote_code=True,
                 dtype=torch.float32)
  image, question = pair.items(1)[0][0][0], pair.items(1)[0][1]
  chat = [{'role': 'user', 'content': [{'type': 'image', 'image': image},
                                       {'type': 'text', 'text': question}]}]
  answer = ask(text=chat, max_new_tokens=5)[0]['generated_text'][-1]['content']
  alone = pair.inputs(pair.items(1))
  ids = pair.model.generate(**alone, max_new_tokens=5)[:, alone['input_ids'].shape[1]:]
  assert answer == pair.processor.post_process_image_text_to_text(ids)[0]


@pytest.mark.parametrize('name', rows('mc_llava'))
def test_three_steps_in_pytorch_and_back(name, pair, tmp_path):
  from transformers import AutoModelForImageTextToText

  model = AutoModelForImageTextToText.from_pretrained(pair.folder, trust_remote_code=True,
                                                      dtype=torch.float32)
  inputs = pair.inputs(pair.items(2))
  labels = inputs['input_ids'].clone()
  labels[:, :-4] = -100
  optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
  for _ in range(3):
    optimizer.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
  model.save_pretrained(tmp_path / 'tuned')
  pair.processor.save_pretrained(tmp_path / 'tuned')
  assert recognise(tmp_path / 'tuned') == pair.config
  convert(tmp_path / 'tuned', tmp_path / 'back')
  back = Pair(pair.config, tmp_path / 'back', tmp_path / 'tuned')
  valid = inputs['attention_mask'].bool().numpy()
  read = back.read(inputs)[valid]
  model.eval()
  with torch.no_grad():
    theirs = model(**inputs).logits.numpy()[valid]
    before = pair.model(**inputs).logits.numpy()[valid]
  assert near(back.logits(pair.items(2))[read], theirs[read]) <= LIMIT < near(before, theirs)
  # What PyTorch saved opens like what it was made from, processor included.
  again = back.inputs(pair.items(2))
  assert all(torch.equal(again[key], value) for key, value in inputs.items())
  with torch.no_grad():
    assert near(back.model(**again).logits.numpy()[valid], theirs) < 1e-6


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', rows('mc_llava'))
def test_half_precision_is_near(name, kind, pair):
  """Logits move by what the format resolves; what decides where to look stays in float32, also
  in a model that was cast by hand."""
  from transformers import AutoModelForImageTextToText

  inputs = pair.inputs(pair.items(2))
  real = inputs['attention_mask'].bool()
  load = lambda **options: AutoModelForImageTextToText.from_pretrained(
    pair.folder, trust_remote_code=True, **options).eval()
  with torch.no_grad():
    expected = pair.model(**inputs).logits[real]
    for model in (load(dtype=kind), load(dtype=torch.float32).to(kind)):
      found = model(**inputs).logits[real]
      assert found.isfinite().all()
      if getattr(pair.config.encoder, 'looks_closer', pair.config.system == 'ps3'):
        # Other patches may be chosen.
        selections = [m for n, m in model.named_modules() if n.endswith('selection')]
        assert {p.dtype for m in selections for p in m.parameters()} == {torch.float32}
      else:
        difference = (found.float() - expected).abs().mean() / expected.abs().mean()
        assert difference < 20 * torch.finfo(kind).eps, difference


LOOKS = [dict(looks=1), dict(looks='all'), dict(looks=0), dict(looks=None, tokens=31),
         dict(looks=2, first_scales=1)]


@pytest.mark.parametrize('options', levels.rows('interop', LOOKS, first=LOOKS[3:4]))
def test_ps3_alone_with_its_selection_maps(options, pair_of):
  from transformers import AutoImageProcessor, AutoModel

  pair = pair_of('ps3_alone')
  model = AutoModel.from_pretrained(pair.folder, trust_remote_code=True, dtype=torch.float32).eval()
  images = AutoImageProcessor.from_pretrained(pair.folder, trust_remote_code=True)
  pictures = [picture((61, 47)), picture((33, 201), 1)]
  encoder = PS3_ALONE.encoder
  ours = registry.get('ps3').views(pictures, encoder)['pixels']
  pixels = images(pictures, return_tensors='pt')['pixel_values']
  plan = make_plan(*ours.shape[1:3], encoder, num_looks=options['looks'],
                   num_tokens=options.get('tokens'), first_scales=options.get('first_scales'))
  ids = np.random.default_rng(0).integers(0, 271, (2, 9))
  module = vlm.build(PS3_ALONE).bind(pair.params)
  floats = normalise(ours, encoder.mean, encoder.std)
  for text in (None, ids):
    prompt = None if text is None else module.prompt(text)
    found = module.vision.encode(floats, plan, prompt=prompt)
    with torch.no_grad():
      out = model(pixels, None if text is None else torch.tensor(text), **options)
    assert near(out.last_hidden_state.numpy(), found.last) <= LIMIT
    assert len(out.selection_maps) == len(found.maps)
    for mine, theirs in zip(found.maps, out.selection_maps):
      np.testing.assert_array_equal(mine, theirs.numpy())
    start = plan.grids[0][0] * plan.grids[0][1]
    pooled = module.vision.pool(found.last[:, start:] if plan.looks else found.last)
    assert near(out.pooler_output.numpy(), pooled) <= LIMIT
  with pytest.raises(ValueError, match='no settings of a look: lokks'):
    model(pixels, lokks=1)


@pytest.mark.parametrize('name', [
  'mc_llava', pytest.param('vila_hd', marks=pytest.mark.full('interop')),
  pytest.param('reduced/pool', marks=pytest.mark.full('interop'))])
def test_a_generated_placeholder_is_a_token_like_others(name, pair):
  """A model that answers with the placeholder of its prompts (an untrained one may) goes on."""
  inputs, place = pair.inputs(pair.items(2)), pair.model.config.image_token_id
  length = inputs['input_ids'].shape[1]
  processors = [
    lambda ids, scores: torch.full_like(scores, -1e4).index_fill(
      1, torch.tensor([place]), 0.0) if ids.shape[1] == length + 1 else scores]
  out = pair.model.generate(**inputs, max_new_tokens=3, logits_processor=processors)
  assert (out[:, length + 1] == place).all() and out.shape[1] == length + 3
  # Without a cache every step reads the whole row again, and what it said is still no picture.
  again = pair.model.generate(**inputs, max_new_tokens=3, use_cache=False,
                              logits_processor=processors)
  assert torch.equal(again, out)
  with pytest.raises(ValueError, match='but no pixel_values'):
    pair.model(input_ids=inputs['input_ids'])
