"""What a model of transformers is asked to do beside answering: share, stream, go on, compile."""

import dataclasses
import sys

import jinja2
import pytest
import torch

from tests import levels
from tests.interop.pytorch import LIMIT, Pair, near, picture
from tests.interop.tiny_models import SYSTEMS


def lengths(model, call):
  """(how many places each pass of the language model ran, what the call gave)."""
  found = []
  hook = model.language_model.model.layers[0].register_forward_pre_hook(
    lambda _, args, kwargs: found.append(
      (args[0] if args else kwargs['hidden_states']).shape[1]), with_kwargs=True)
  try:
    return found, call()
  finally:
    hook.remove()


@pytest.mark.parametrize('name', levels.rows(
  'interop', ['vila_hd', 'vila_hd/no_context'], first=['vila_hd']))
def test_both_passes_share_a_cache(name, pair):
  """Places in front of the first high-resolution token run once; all that both need is equal."""
  model, encoder = pair.model, pair.config.encoder
  for n, beams in ((1, 1), (4, 1), (2, 3)):
    inputs = pair.inputs(pair.items(n))
    options = dict(max_new_tokens=3, num_beams=beams, output_logits=True,
                   return_dict_in_generate=True)
    found, out = lengths(model, lambda: model.generate(**inputs, **options))  # noqa: B023
    ids, place = inputs['input_ids'], model.config.image_token_id
    first = (ids == place).int().argmax(1) + encoder.low_tokens  # of the places that differ
    assert found[1] == ids.shape[1] - int(first.min()) < ids.shape[1], found
    # Without: every place runs again, and a cache of another kind does.
    whole, again = lengths(model, lambda: model.generate(**inputs, **options, use_cache=False))  # noqa: B023
    assert whole[1] == ids.shape[1]
    assert torch.equal(out.sequences, again.sequences)
    for one, other in zip(out.logits, again.logits, strict=True):
      assert near(one, other) <= LIMIT
  with torch.no_grad():  # all logits are asked for
    assert model(**inputs, use_cache=True).logits.shape[1] == ids.shape[1]


CALLS = [
  ('vila_hd', dict(looks=1)), ('vila_hd', dict(looks='all')), ('vila_hd', dict(looks=0)),
  ('vila_hd', dict(tokens=31)), ('vila_hd', dict(looks=1, budgets=(12, 9))),
  ('ps3', dict(looks=1, smooth=False)), ('ps3', dict(tokens=31, first_scales=1))]


@pytest.mark.parametrize('name, options', levels.rows('interop', CALLS, first=CALLS[4:6]))
def test_looks_of_a_call(name, options, pair):
  """Looks, tokens and budgets of a call are those of a model with these settings.

  Not smoothed ones: a network of twenty channels rounds so that nearly equal cells change places.
  """
  encoder = pair.config.encoder
  if name == 'ps3':
    look = dataclasses.replace(encoder.look, looks=None) if 'tokens' in options else encoder.look
    encoder = dataclasses.replace(encoder, look=dataclasses.replace(look, **options))
  else:
    encoder = dataclasses.replace(encoder, **{'tokens': None} | options)
  other = Pair(dataclasses.replace(pair.config, encoder=encoder), pair.checkpoint, pair.folder)
  ours, inputs = other.logits(pair.items(2)), pair.inputs(pair.items(2), **options)
  valid = inputs['attention_mask'].bool()
  with torch.no_grad():
    assert near(pair.model(**inputs).logits[valid], ours) <= LIMIT
  ids = pair.model.generate(**inputs, max_new_tokens=2)
  assert ids.shape[1] == inputs['input_ids'].shape[1] + 2


@pytest.mark.parametrize('name', levels.rows('interop', ['pheye', 'pheye/3'], first=['pheye']))
def test_merged_adapters_of_the_encoder(name, pair, tmp_path):
  inputs = pair.inputs(pair.items(2))
  model = type(pair.model).from_pretrained(pair.folder, dtype=torch.float32).eval()
  with torch.no_grad():
    expected = model(**inputs).logits
    model.merge_adapters()
    assert near(model(**inputs).logits, expected) < 1e-5
    tower = model.vision.tower.encoder.layers[0].mlp.fc1
    tower.lora_b_second.zero_()  # not read any more
    assert near(model(**inputs).logits, expected) < 1e-5
  names = set(model.state_dict())
  assert names == set(pair.model.state_dict())
  with torch.no_grad():
    model.train()  # the sets act by themselves, and what was merged is gone
    assert near(model(**inputs).logits, expected) > 1e-5
    assert near(model.eval()(**inputs).logits, expected) > 1e-5


def test_merging_adds_one_copy_of_the_weights(pair_of):
  """Of the tiles, all views but one; the base stays for the global view, and to be saved."""
  pair = pair_of('pheye')
  model = type(pair.model).from_pretrained(pair.folder, dtype=torch.float32).eval()
  before = {key: value.clone() for key, value in model.state_dict().items()}
  model.merge_adapters()
  kept = [b for name, b in model.vision.named_buffers() if name.endswith('.merged')]
  layers = model.vision.tower.encoder.layers
  weights = [model.vision.tower.embeddings.patch_embedding, *(
    part for layer in layers for part in layer.modules() if isinstance(part, torch.nn.Linear))]
  assert sum(b.nbytes for b in kept) == sum(part.weight.nbytes for part in weights)
  after = model.state_dict()
  assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


FEW = ['s2_dynamic', 'llava_hr', 'mc_llava', 'pheye', 'pheye/3', 'ps3', 's2', 'tiling', 'vila_hd']


@pytest.mark.parametrize('name', levels.rows('interop', FEW, first=['llava_hr', 'pheye', 'ps3']))
def test_few_rows_at_a_time(name, pair, monkeypatch):
  """Without gradients on a CPU, layers take few rows at a time (tiny models fit at once)."""
  inputs = pair.inputs(pair.items(2))
  model = type(pair.model).from_pretrained(pair.folder, dtype=torch.float32).eval()
  expected = model(**inputs).logits.detach()  # with gradients: all rows at once
  towers = sys.modules[type(model.vision).__module__.rpartition('.')[0] + '.towers']
  norms = [m for m in model.vision.modules() if isinstance(m, torch.nn.LayerNorm)]
  calls = []
  for norm in norms:
    norm.register_forward_hook(lambda _, args, out: calls.append(len(out)))
  counts = []
  for size in (towers.FEW, 3000, 1):
    monkeypatch.setattr(towers, 'FEW', size)
    calls.clear()
    with torch.no_grad():
      assert near(model(**inputs).logits, expected) < 1e-5
    counts.append(len(calls))
  assert counts[0] < counts[1] <= counts[2], counts
  if hasattr(model.vision, 'merge_adapters'):
    model.merge_adapters()
    with torch.no_grad():
      assert near(model(**inputs).logits, expected) < 1e-5


@pytest.mark.parametrize('name', ['mc_llava'])
def test_models_without_sets_say_so(name, pair):
  with pytest.raises(ValueError, match='hrvlm_mc_llava has no adapters'):
    pair.model.merge_adapters()
  with pytest.raises(ValueError, match=r'change: vision; these are max_crops.*config\.json'):
    pair.inputs(pair.items(1), vision={})


class Heard:
  """A streamer that keeps what it is given."""

  def __init__(self):
    self.ids, self.ended = [], False

  def put(self, value):
    """Ids of the prompt, then of each step."""
    self.ids += value.flatten().tolist()

  def end(self):
    """After the last."""
    self.ended = True


@pytest.mark.parametrize('name', levels.rows('interop', SYSTEMS, first=['mc_llava', 'vila_hd']))
def test_streams_and_further_turns(name, pair):
  """A stream says what is answered; a second turn on the cache of the first says what the whole
  conversation does (`test_transformers_systems` has one with a picture). Pheye's template has one
  question."""
  model, processor = pair.model, pair.processor
  turn = lambda text, *images: {'role': 'user', 'content': [
    *({'type': 'image', 'image': image} for image in images), {'type': 'text', 'text': text}]}
  ask = lambda chat: processor.apply_chat_template(
    [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
  chat, heard = [turn('What?', picture((61, 47)))], Heard()
  inputs = ask(chat)
  options = dict(max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
  out = model.generate(**inputs, streamer=heard, **options)
  assert heard.ended and heard.ids == out.sequences[0].tolist()
  answer = processor.post_process_image_text_to_text(
    out.sequences[:, inputs['input_ids'].shape[1]:])[0]
  chat += [{'role': 'assistant', 'content': answer}, turn('And where?')]
  if pair.config.chat == 'pheye':
    with pytest.raises(jinja2.TemplateError, match='one question and one answer'):
      ask(chat)
    return
  after = ask(chat)
  whole = model.generate(**after, **options).sequences
  # Random ids rarely decode to a text that has the same ids: the cache is used where they agree.
  seen = out.past_key_values.get_seq_length()
  start = after['input_ids'].clone()
  common = int((start[0, :seen] == out.sequences[0, :seen]).int().cumprod(0).sum())
  if common < seen:
    out.past_key_values.crop(common - seen)
  if pair.config.fusion.kind == 'two_pass':  # what may be read is kept beside the cache
    valid = out.past_key_values.hrvlm_valid
    out.past_key_values.hrvlm_valid = valid[:, :common]
  if pair.native:  # its places are in the cache
    after = {key: after[key] for key in after.keys() - pair.pictures_of(after).keys()}
  found = model.generate(**after, past_key_values=out.past_key_values, **options).sequences
  assert torch.equal(found, whole)


COMPILED = [(name, 'eager') for name in SYSTEMS] + [
  (name, 'inductor') for name in ('mc_llava', 'llava_hr', 'pheye', 'vila_hd')]


@pytest.mark.parametrize('name, backend', levels.rows(
  'interop', COMPILED, first=[('mc_llava', 'eager')]))
def test_compiled_towers(name, backend, pair):
  """torch.compile of the layers of the towers, without breaks of the graph; of a tower of
  transformers as a whole, whose layers tell what they gave to the call around them."""
  inputs = pair.inputs(pair.items(2))
  model = type(pair.model).from_pretrained(pair.folder, dtype=torch.float32).eval()
  if pair.native:
    layers = [model.model.vision_tower]
  else:
    kinds = ('TowerLayer', 'PheyeLayer', 'LookLayer', 'Block')
    layers = [m for m in model.vision.modules() if type(m).__name__ in kinds]
    assert len(layers) >= 3
  with torch.no_grad():
    expected = model(**inputs).logits
    for layer in layers:
      layer.compile(fullgraph=True, backend=backend)
    assert near(model(**inputs).logits, expected) < 1e-5
  torch._dynamo.reset()


@pytest.mark.parametrize('name', ['mc_llava'])
def test_attention_by_name(name, pair):
  """Whatever transformers' attention interface knows, one of one's own included."""
  from transformers import AttentionInterface, AutoModelForImageTextToText
  from transformers.integrations.sdpa_attention import sdpa_attention_forward
  from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

  called = []

  def own(module, *args, **kwargs):
    called.append(type(module).__name__)
    return sdpa_attention_forward(module, *args, **kwargs)

  AttentionInterface.register('hrvlm_test', own)
  AttentionMaskInterface.register('hrvlm_test', sdpa_mask)
  inputs = pair.inputs(pair.items(2))
  real = inputs['attention_mask'].bool()
  model = AutoModelForImageTextToText.from_pretrained(
    pair.folder, trust_remote_code=True, attn_implementation='hrvlm_test', dtype=torch.float32)
  with torch.no_grad():
    expected = pair.model(**inputs).logits[real]
    assert near(model.eval()(**inputs).logits[real], expected) < LIMIT
  assert {'SiglipAttention', 'PhiAttention'} <= set(called)
