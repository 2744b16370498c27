"""Golden checks of text and data: conversations, label masks, merging, samplers."""

from __future__ import annotations

import numpy as np

from hrvlm_jax.data.order import even_chunks, modality_grouped_order, word_count
from hrvlm_jax.language.chat import (
  ASSISTANT,
  IMAGE,
  USER,
  Message,
  encode_prompt,
  get_template,
  prompt_end,
  prompt_end_marker,
  question,
  render,
  rendered_text,
)
from hrvlm_jax.language.conversation import (
  encode_conversation,
  encode_llava,
  encode_vila,
  messages_from_llava,
  prepare,
)
from hrvlm_jax.language.prompt import pad_batch
from hrvlm_jax.language.tokenizer import ByteTokenizer, load_tokenizer
from hrvlm_jax.training.optimizer import learning_rate
from tests.language.released import merge_rows, parse
from tests.parity.cases.runner import OPERATOR, Case, check


@check('mc_llava', 'conversation')
def mc_llava_conversation(case: Case) -> None:
  """Training text, ids, labels and padding of MC-LLaVA with a byte tokenizer."""
  case.waive('config.json:toy_tokenizer/bytes', 'a sentence that describes the byte tokenizer')
  tokenizer = ByteTokenizer(case.config['toy_tokenizer']['specials'].plain())
  template, pad = get_template('mc_llava_train'), tokenizer.special('<pad>')
  for at, part in enumerate(case.config['cases']):
    messages = [Message((USER, ASSISTANT)[i % 2], text) for i, text in enumerate(part['messages'])]
    length = part['max_length']
    encoded = encode_conversation(messages, template, tokenizer,
                                  image_id=tokenizer.special(IMAGE), max_length=length)
    case.expect_json(('cases', at, 'text'), encoded.text)
    missing = length - len(encoded.ids)
    ids = np.array(encoded.ids + [pad] * missing)
    name = part['index']
    case.exact(f'{name}/input_ids', ids)
    case.exact(f'{name}/labels', np.array(encoded.labels + [-100] * missing))
    case.exact(f'{name}/attention_mask', (ids != pad).astype(np.int32))


@check('mc_llava', 'merge')
def mc_llava_merge(case: Case) -> None:
  """Features in the place of image tokens: positions, masks, labels, embeddings."""
  table = case.input('embed_tokens')
  case.waive('config.json:pad_id_in_rows', 'the pads stand in input_ids')
  for at, part in enumerate(case.config['cases']):
    name = part['name']
    ids, features = case.input(f'{name}/input_ids'), case.input(f'{name}/image_features')
    merged = merge_rows(
      ids, case.input(f'{name}/attention_mask') > 0, case.input(f'{name}/labels'),
      case.config['image_token_index'], tokens_per_image=features.shape[1],
      images=features.shape[0], pad_id=part['pad_token_id'])
    case.expect_json(('features_per_image',), features.shape[1])
    case.expect_json(('dim',), features.shape[2])
    case.expect_json(('cases', at, 'rows'), ids.shape[0])
    case.expect_json(('cases', at, 'length'), ids.shape[1])
    case.expect_json(('cases', at, 'out_length'), merged['tokens'].shape[1])
    visual, source = merged['visual_index'][..., None], merged['source'][..., None]
    flat = features.reshape(-1, features.shape[2])
    embedded = np.where(visual >= 0, flat[np.maximum(visual[..., 0], 0)],
                        np.where(source >= 0, table[merged['tokens']], np.float32(0)))
    case.expect(f'{name}/out_embeds', embedded, tol=OPERATOR)
    case.exact(f'{name}/out_mask', merged['valid'].astype(np.int64))
    case.exact(f'{name}/out_position_ids', merged['positions'])
    case.exact(f'{name}/out_labels', merged['labels'])


@check('vila_hd', 'text')
def vila_text(case: Case) -> None:
  """Chat text, ids, labels and the end of the question of VILA-HD."""
  case.waive('config.json:tokenizer', 'a sentence that describes tokenizer.json')
  case.waive('tokenizer.json:*', 'loaded as the tokenizer')
  tokenizer = load_tokenizer(case.folder)
  template = get_template(f'vila_{case.config["chat_template"]}')
  file = 'cases.json'
  content = case.json(file)
  names = {'image': IMAGE, 'video': '<vila/video>', 'sentinel': '<vila/sentinel>',
           'pad': '[PAD]', 'im_start': '<|im_start|>', 'im_end': '<|im_end|>'}
  for name in content['special']:
    case.expect_json(('special', name), tokenizer.special(names[name]), file=file)
  text, ids = prompt_end_marker(template, tokenizer)
  case.expect_json(('user_prompt_end_text',), text, file=file)
  case.expect_json(('user_prompt_end_ids',), ids, file=file)
  for at, part in enumerate(content['cases']):
    messages = messages_from_llava(part['conversation'].plain())
    system = '' if part['no_system_prompt'] else None
    encoded = encode_vila(messages, template, tokenizer, image_id=names_id(tokenizer),
                          system=system)
    asked = messages[:-1] if messages[-1].role == ASSISTANT else messages
    prompt = encode_prompt(asked, template, tokenizer, image_id=names_id(tokenizer), system=system)
    for key, value in (('text', encoded.text), ('generation_prompt', prompt.text),
                       ('input_ids', encoded.ids), ('labels', encoded.labels),
                       ('prompt_end_position', prompt_end(encoded.ids, template, tokenizer))):
      case.expect_json(('cases', at, key), value, file=file)


def names_id(tokenizer) -> int:
  """The id of the image token."""
  return tokenizer.special(IMAGE)


@check('llava_hr', 'data_format')
def llava_data(case: Case) -> None:
  """Templates, ids, masks, collation, word counts, samplers, learning rates of LLaVA-HR."""
  case.waive('config.json:tokenizer', 'a sentence that describes tokenizer.model')
  case.waive('records_*.json:*', 'identifiers and file names of records, and what they say, which '
                                 'is compared as prompts and ids')
  tokenizer, config, file = load_tokenizer(case.folder), case.config, 'expected.json'
  for role in ('unk', 'bos', 'eos'):
    case.expect_json((role,), tokenizer.role_id(role))
  expected = case.json(file)
  image_id, pad = config['image_token_index'], config['pad']
  case.expect_json(('ignore_index',), -100)
  for name in ('v1', 'plain'):
    template = get_template({'v1': 'vicuna_v1'}.get(name, name))
    records = case.json(f'records_{name}.json').plain()
    encoded = [_record(record, template, tokenizer, image_id, pad) for record in records]
    values = [{'id': record['id'], 'prompt': one.text, 'input_ids': one.ids, 'labels': one.labels}
              for record, one in zip(records, encoded, strict=True)]
    case.expect_json((name,), values, file=file)
    if name == 'v1':
      _collated(case, file, expected['collated_maxlen'], records, tokenizer, image_id, pad)
      words = [word_count(messages_from_llava(r['conversations'])) for r in records]
      shown = ['image' in record for record in records]
      case.expect_json(('modality_lengths',), [n if s else -n for n, s in zip(words, shown)],
                       file=file)
      case.expect_json(('lengths',), [n + 128 * s for n, s in zip(words, shown)], file=file)
  _prompts(case, file, expected['eval_prompts'], tokenizer, image_id)
  _samplers(case, file, expected)
  for stage, part in expected['lr'].items():
    rate = learning_rate('cosine', peak=part['peak'], total_steps=part['total_steps'],
                         warmup_steps=part['warmup_steps'])
    for at, (step, _) in enumerate(part['lr_at_step']):
      case.expect_json(('lr', stage, 'lr_at_step', at, 1), float(rate(step)), file=file, tol=1e-9)


def _record(record, template, tokenizer, image_id, pad, max_length=None):
  images = int('image' in record)
  messages = prepare(messages_from_llava(record['conversations']), template, images,
                     insert=False)
  return encode_llava(messages, template, tokenizer, image_id=image_id if images else None,
                      max_length=max_length, pad_id=pad)


def _collated(case, file, part, records, tokenizer, image_id, pad):
  length, template = part['model_max_length'], get_template('vicuna_v1')
  rows = [_record(records[row], template, tokenizer, image_id, pad, length) for row in part['rows']]
  width = max(len(row.ids) for row in rows)
  batch = pad_batch([{'tokens': np.array(row.ids), 'visual_index': np.zeros(len(row.ids)),
                      'labels': np.array(row.labels)} for row in rows], width)
  ids = np.where(batch['valid'], batch['tokens'], pad)
  for key, value in (('input_ids', ids), ('labels', batch['labels']),
                     ('attention_mask', (ids != pad).astype(int))):
    case.expect_json(('collated_maxlen', key), value.tolist(), file=file)


def _prompts(case, file, prompts, tokenizer, image_id):
  """A prompt of one turn is made from its question; longer ones only store the text."""
  template = get_template('vicuna_v1')
  for at, part in enumerate(prompts):
    messages = [question(template, part['question'], 1)]
    _, stored = parse(template, part['prompt'])
    if len(stored) > 1:
      messages = stored
    case.expect_json(('eval_prompts', at, 'prompt'),
                     rendered_text(render(template, messages, generation=True)), file=file)
    prompt = encode_prompt(messages, template, tokenizer, image_id=image_id)
    case.expect_json(('eval_prompts', at, 'input_ids'), prompt.ids, file=file)


def _samplers(case, file, expected):
  part = expected['sampler']
  drawn = part['permutations_in_call_order']
  # The original draws for images, then for text, then for the megabatches.
  draws = iter([drawn[name].plain() for name in drawn])
  order = modality_grouped_order(part['lengths'].plain(), batch=part['batch_size'],
                                 world=part['world_size'], permute=lambda n: next(draws))
  case.expect_json(('sampler', 'indices'), order, file=file)
  part = expected['split_to_even_chunks']
  chunks = even_chunks(part['indices'].plain(), part['lengths'].plain(), part['num_chunks'])
  case.expect_json(('split_to_even_chunks', 'chunks'), chunks, file=file)
