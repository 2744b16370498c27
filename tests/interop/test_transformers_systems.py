"""What the surroundings of transformers do with a model of every system: adapters of peft, devices,
a picture in a later turn; and the way back of PS3 alone."""

import numpy as np
import pytest
import torch

from hrvlm_jax.core.resample import normalise
from hrvlm_jax.interop.convert import convert
from hrvlm_jax.interop.export import export
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.vlm import model as vlm
from tests import levels
from tests.interop.half_precision import KINDS, moved
from tests.interop.pytorch import LIMIT, Pair, near, picture
from tests.interop.tiny_models import MODELS, PS3_ALONE, SYSTEMS

rows = lambda *first: levels.rows('interop', SYSTEMS, first=first)
# The set is of the language model: one of every system, and of every way to it.
LORA = [name for name in SYSTEMS if '/' not in name] + ['reduced/pool', 'mc_llava/cross_attention']


def tuned(model, inputs, steps=3):
  """Steps on the last four tokens of every row."""
  labels = inputs['input_ids'].clone()
  labels[:, :-4] = -100
  optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
  for _ in range(steps):
    optimizer.zero_grad()
    model(**inputs, labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@pytest.mark.parametrize('name', levels.rows('interop', LORA, first=()))
def test_lora_of_peft_comes_back_as_a_set(name, tmp_path):
  """Three steps of an adapter of peft, `convert --adapter`, equal logits; and out again."""
  import peft
  from transformers import AutoModelForImageTextToText

  pair = Pair.make(MODELS[name], tmp_path / 'pair')
  inputs = pair.inputs(pair.items(2))
  with torch.no_grad():
    before = pair.model(**inputs).logits.numpy()
  torch.manual_seed(0)
  model = peft.get_peft_model(pair.model, peft.LoraConfig(
    r=3, lora_alpha=6, target_modules=r'(model\.)?language_model\..*(q_proj|fc1|gate_proj)',
    init_lora_weights=False))
  tuned(model, inputs)
  model.save_pretrained(tmp_path / 'adapter')
  config = convert(pair.folder, tmp_path / 'back', adapter=tmp_path / 'adapter')
  assert config.text.lora[0].rank == 3
  back = Pair(config, tmp_path / 'back', pair.folder)
  valid = inputs['attention_mask'].bool().numpy()
  with torch.no_grad():
    theirs = model(**inputs).logits.numpy()[valid]
  assert near(before[valid], theirs) > LIMIT
  assert near(back.logits(pair.items(2)), theirs) <= LIMIT
  export(tmp_path / 'back', tmp_path / 'again', layout='transformers')
  placed = AutoModelForImageTextToText.from_pretrained(
    tmp_path / 'again', trust_remote_code=True, dtype=torch.float32, device_map='auto')
  again = peft.PeftModel.from_pretrained(placed, tmp_path / 'again' / 'adapter').eval()
  with torch.no_grad():
    assert near(again(**inputs).logits.numpy()[valid], theirs) < 1e-6


@pytest.mark.parametrize('name', rows())
def test_device_maps(name, pair, tmp_path):
  """`auto`; parts of the language model, and all of it, on a disk until they run; what does not fit
  into memory there. Encoders are placed whole."""
  from accelerate import infer_auto_device_map
  from transformers import AutoModelForImageTextToText

  inputs = pair.inputs(pair.items(2))
  # With gradients: without, towers that no hook watches take few rows at a time, in another order.
  expected = pair.model(**inputs).logits.detach()
  ids = pair.model.generate(**inputs, max_new_tokens=3)
  depth = pair.config.text.depth
  if pair.native:
    outer, head, text, layers = pair.model.model, 'lm_head', 'model.language_model', (
      'model.language_model.layers')
    stays = {f'model.{part}': 'cpu' for part, _ in outer.named_children()}
    stays |= {f'model.{part}': 'cpu' for part, _ in outer.named_parameters(recurse=False)}
    stays = stays | {'lm_head': 'cpu'}
  else:
    outer, head, text, layers = pair.model, 'language_model.lm_head', 'language_model', (
      'language_model.model.layers')
    stays = {part: 'cpu' for part, _ in outer.named_children()}
  stays.pop(text)
  halves = stays | {head: 'cpu'} | {
    f'{layers.removesuffix(".layers")}.{part}': 'cpu'
    for part, _ in pair.language.named_children() if part != 'layers'}
  halves |= {f'{layers}.{i}': 'disk' if i >= depth // 2 else 'cpu' for i in range(depth)}
  size = sum(p.numel() * 4 for p in pair.model.parameters())
  blocks = infer_auto_device_map(pair.model, {0: int(0.9 * size), 1: int(0.9 * size), 'cpu': size},
                                 no_split_module_classes=pair.model._no_split_modules)
  assert pair.native or 'vision' in blocks
  assert len(set(blocks.values())) > 1, blocks
  for where in ('auto', 'cpu', halves, stays | {text: 'disk'}):
    model = AutoModelForImageTextToText.from_pretrained(
      pair.folder, trust_remote_code=True, dtype=torch.float32, device_map=where,
      offload_folder=tmp_path / 'disk').eval()
    away = {n for n, p in model.named_parameters() if p.device.type == 'meta'}
    assert bool(away) == isinstance(where, dict), where
    assert near(model(**inputs).logits.detach(), expected) < 1e-6, where
    assert torch.equal(model.generate(**inputs, max_new_tokens=3), ids), where


@pytest.mark.parametrize('name', rows())
def test_a_picture_in_a_later_turn(name, pair):
  """On the cache of the first turn, where a picture changes nothing in front of it; refused by name
  where it does. A class of transformers is given the arrays of the new picture alone."""
  model, turn = pair.model, lambda text, image: {'role': 'user', 'content': [
    {'type': 'image', 'image': image}, {'type': 'text', 'text': text}]}
  ask = lambda *chats: pair.processor.apply_chat_template(
    chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors='pt')
  first, then = turn('What?', picture((61, 47))), turn('And this?', picture((97, 60), 1))
  chat = [first, {'role': 'assistant', 'content': 'A cat'}, then]
  if pair.config.system == 'pheye':
    with pytest.raises(ValueError, match='exactly one image'):
      pair.processor(images=[[picture((9, 9))] * 2], text=['What?'])
    return
  if pair.config.chat == 'pheye':  # one question: a picture more in it
    chat = [{'role': 'user', 'content': [*then['content'][:1], *first['content']]}]
  after, options = ask(chat), dict(max_new_tokens=4, min_new_tokens=4,
                                   return_dict_in_generate=True)
  for beams in (1, 2):
    whole = model.generate(**after, **options, num_beams=beams).sequences
    cache = model.generate(**ask([first]), **options, num_beams=beams).past_key_values
    ids = ask([first])['input_ids']
    assert torch.equal(after['input_ids'][:, :ids.shape[1]], ids)
    common = min(ids.shape[1], after['input_ids'].shape[1] - 1)
    cache.crop(common - cache.get_seq_length())
    if pair.config.fusion.kind == 'two_pass':
      cache.hrvlm_valid = cache.hrvlm_valid[:, :common]
    given = after
    if pair.native:
      if beams > 1:  # it counts the places of the pictures in front, too
        continue
      given = {**after, **pair.pictures_of(pair.inputs([([picture((97, 60), 1)], 'And this?')]))}
    further = lambda: model.generate(
      **given, **options, num_beams=beams, past_key_values=cache).sequences  # noqa: B023
    if pair.config.fusion.kind == 'prefix':
      assert torch.equal(further(), whole)
    else:
      with pytest.raises(ValueError, match='a further turn brings images.*whole conversation'):
        further()


MEASURED = ['mc_llava', 'llava_hr', 'llava_hr/concat', 'pheye', 'ps3', 'vila_hd', 'single_view']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', levels.rows('interop', MEASURED, first=()))
def test_half_precision_moves_no_more_than_pytorch_does(name, kind, pair):
  """The table in docs/weights.md: JAX beside PyTorch within 1.5 times what PyTorch itself moves."""
  found = moved(pair, kind)
  assert found.half > 0.5 and found.order > 0.5  # half precision did act, in two orders
  assert found.ours <= 1.5 * max(found.half, found.order), found


@pytest.mark.full('interop')
def test_ps3_alone_is_tuned_and_comes_back(tmp_path):
  """Three steps, also with gradient checkpointing, then equal features, maps and scales."""
  from transformers import AutoModel

  pair = Pair.make(PS3_ALONE, tmp_path / 'pair')
  load = lambda **options: AutoModel.from_pretrained(
    pair.folder, trust_remote_code=True, dtype=torch.float32, **options)
  encoder = PS3_ALONE.encoder
  pictures = [picture((61, 47)), picture((33, 201), 1)]
  ours = registry.get('ps3').views(pictures, encoder)['pixels']
  floats = normalise(ours, encoder.mean, encoder.std)
  pixels = torch.tensor(np.asarray(floats).transpose(0, 3, 1, 2).copy())
  texts = torch.tensor(np.random.default_rng(0).integers(0, 271, (2, 9)))

  def loss_of(model):
    out = model(pixels, texts, looks=2)
    features = torch.nn.functional.normalize(out.pooler_output, dim=-1)
    scores = features @ model.get_text_features(texts).T * model.logit_scale.exp()
    return -torch.nn.functional.logsigmoid((scores + model.logit_bias) * (
      2 * torch.eye(2) - 1)).sum()

  gradients = []
  for checkpointing in (False, True):
    model = load(attn_implementation='eager' if checkpointing else 'sdpa').train()
    if checkpointing:
      model.gradient_checkpointing_enable()
    loss_of(model).backward()
    gradients.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
  assert gradients[0].keys() == gradients[1].keys()
  for key, value in gradients[0].items():
    torch.testing.assert_close(gradients[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
  model = load().train()
  optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
  for _ in range(3):
    optimizer.zero_grad()
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
  model.eval().save_pretrained(tmp_path / 'tuned')
  for path in pair.folder.glob('preprocessor_config.json'):
    (tmp_path / 'tuned' / path.name).write_bytes(path.read_bytes())
  assert convert(tmp_path / 'tuned', tmp_path / 'back') == PS3_ALONE
  back = Pair(PS3_ALONE, tmp_path / 'back', tmp_path / 'tuned')
  module = vlm.build(PS3_ALONE).bind(back.params)
  plan = make_plan(*ours.shape[1:3], encoder, num_looks=2)
  found = module.vision.encode(floats, plan, prompt=module.prompt(texts.numpy()))
  with torch.no_grad():
    out, before = model(pixels, texts, looks=2), load().eval()(pixels, texts, looks=2)
  assert near(found.last, out.last_hidden_state) <= LIMIT
  assert near(before.last_hidden_state, out.last_hidden_state) > LIMIT
  for mine, theirs in zip(found.maps, out.selection_maps, strict=True):
    np.testing.assert_array_equal(mine, theirs.numpy())
  flat = back.params.get('params', back.params)
  assert float(flat['logit_scale']) == float(model.logit_scale.detach())
