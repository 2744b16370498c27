"""The server over a real socket, asked by the official client of OpenAI."""

import base64
import json
import socket
import threading
import time

import openai
from PIL import Image
import pytest

from hrvlm_jax.serving.requests import Request
from tests.serving.running import LENGTH, NAME, Running, asks, encoded, png, tiny_answerer


@pytest.fixture(scope='module')
def served():
  """A server without a key."""
  made = Running(tiny_answerer())
  yield made
  made.stop()


@pytest.fixture(scope='module')
def client(served):
  return openai.OpenAI(base_url=served.url, api_key='any', max_retries=0, timeout=60)


def plain(served, question, *images, **options):
  """What the engine says by itself, and what `ask` says."""
  request = Request(images=images, question=question, **options)
  return next(served.engine.run([request]))


def test_one_image_in_one_answer_and_as_a_stream(served, client):
  picture = png()
  expected = plain(served, 'What?', picture, max_new_tokens=12)
  assert expected.text == served.answerer.answer([([picture], 'What?')], max_new_tokens=12)[0]
  found = client.chat.completions.create(model=NAME, messages=asks('What?', picture), max_tokens=12)
  assert found.choices[0].message.content == expected.text
  assert found.choices[0].finish_reason == expected.reason and found.id.startswith('chatcmpl-')
  assert found.usage.prompt_tokens == expected.prompt_tokens
  assert found.usage.completion_tokens == len(expected.tokens)
  assert found.usage.total_tokens == expected.prompt_tokens + len(expected.tokens)
  chunks = list(client.chat.completions.create(
    model=NAME, messages=asks('What?', picture), max_completion_tokens=12, stream=True,
    stream_options={'include_usage': True}))
  text = ''.join(c.choices[0].delta.content or '' for c in chunks if c.choices)
  assert text == expected.text and chunks[0].choices[0].delta.role == 'assistant'
  assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.reason
  assert chunks[-1].usage == found.usage and not chunks[-1].choices
  assert len({c.id for c in chunks}) == 1 and len(chunks) > 4


def test_two_turns_with_a_system_text(served, client):
  first = asks('What?', png())
  turns = [{'role': 'system', 'content': 'Be short.'}, *first,
           {'role': 'assistant', 'content': 'A sign.'}, {'role': 'user', 'content': 'Which?'}]
  two = client.chat.completions.create(model=NAME, messages=turns, max_tokens=8)
  one = client.chat.completions.create(model=NAME, messages=first, max_tokens=8)
  assert two.usage.prompt_tokens > one.usage.prompt_tokens + len('Be short.A sign.Which?')
  assert two.choices[0].message.content != one.choices[0].message.content
  again = client.chat.completions.create(model=NAME, messages=turns, max_tokens=8)
  assert again.choices[0].message == two.choices[0].message


def test_settings_reach_the_model(served, client):
  ask = dict(model=NAME, messages=asks('What?', png()), max_tokens=16)
  create = client.chat.completions.create
  greedy = create(**ask, logprobs=True, top_logprobs=3)
  content = greedy.choices[0].logprobs.content
  own = plain(served, 'What?', png(), max_new_tokens=16, logprobs=3)
  assert [c.logprob for c in content] == [
    r.logprob for r in own.reports if r.token not in served.answerer.text.stop_ids()]
  assert all(len(c.top_logprobs) == 3 and c.top_logprobs[0].token == c.token for c in content)
  warm = create(**ask, temperature=1.5, seed=3, n=2)
  same = create(**ask, temperature=1.5, seed=3, n=2)
  other = create(**ask, temperature=1.5, seed=4)
  texts = [choice.message.content for choice in warm.choices]
  assert texts == [c.message.content for c in same.choices] and texts[0] != texts[1]
  assert other.choices[0].message.content not in texts
  assert texts[0] == plain(served, 'What?', png(), max_new_tokens=16, temperature=1.5, seed=3).text
  assert warm.usage.completion_tokens > other.usage.completion_tokens / 2
  whole = greedy.choices[0].message.content
  stop = whole[3:5]
  cut = create(**ask, stop=[stop, 'nowhere'])
  assert cut.choices[0].message.content == whole[:whole.index(stop)].strip()
  assert cut.choices[0].finish_reason == 'stop'
  free = create(model=NAME, messages=asks('What?', png()))
  assert free.usage.completion_tokens <= LENGTH - free.usage.prompt_tokens


def test_sixteen_at_once_are_sixteen_alone(served, client):
  expected = [plain(served, f'Question {n}?', png(n), max_new_tokens=4 + n).text for n in range(16)]
  found = [None] * 16

  def ask(n):
    made = client.chat.completions.create(
      model=NAME, messages=asks(f'Question {n}?', png(n)), max_tokens=4 + n)
    found[n] = made.choices[0].message.content

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert found == expected
  assert served.driver.snapshot().busy == 0


def test_a_cut_connection_frees_its_slot(served, client):
  ask = dict(model=NAME, messages=asks('What?', png()), max_tokens=400, temperature=3.0, seed=1)
  before = served.driver.snapshot()
  stream = client.chat.completions.create(**ask, stream=True)
  next(iter(stream))
  stream.close()
  assert served.idle()
  body = json.dumps(ask).encode()
  head = (f'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
          f'application/json\r\nContent-Length: {len(body)}\r\n\r\n').encode()
  for sent in (head[:20], head + body[:50], head + body):  # at every stage, without a stream
    with socket.create_connection(('127.0.0.1', served.port)) as raw:
      raw.sendall(sent)
      time.sleep(0.3)
  assert served.idle()
  after = served.driver.snapshot()
  assert after.cancelled - before.cancelled >= 1 and after.busy == 0
  assert after.counts.tokens - before.counts.tokens < 700  # not all 800 were drawn


def test_what_is_refused_and_how(served, client):
  create = client.chat.completions.create
  with pytest.raises(openai.APIStatusError, match='longer than 1048576 bytes') as error:
    create(model=NAME, messages=asks('What?', b'x' * (3 << 20)))
  assert error.value.status_code == 413
  with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4o' here"):
    create(model='gpt-4o', messages=asks())
  bad = {
    'messages': ([], [{'role': 'user'}], [{'role': 'robot', 'content': 'x'}], 'What?',
                 [{'role': 'user', 'content': '  '}], asks('What?', png(), png(), png()),
                 asks('What?', b'no image'), asks('What?', png()[:300]),
                 asks('What?', encoded(Image.new('RGB', (2000, 600)))),
                 [{'role': 'user', 'content': [{'type': 'image', 'image': '/etc/passwd'},
                                               {'type': 'text', 'text': 'What?'}]}],
                 [{'role': 'user', 'content': [
                   {'type': 'image_url', 'image_url': {'url': 'http://example.com/a.png'}},
                   {'type': 'text', 'text': 'What?'}]}],
                 [{'role': 'assistant', 'content': 'x'}], asks('x' * 5000), asks('x' * 500_000)),
    'max_tokens': (0, -1, 'many', LENGTH, 2**40), 'temperature': (-1, 'hot', 1e9),
    'top_p': (0, 2), 'n': (0, 100), 'stop': (['a'] * 5, ''), 'top_logprobs': (3, 99),
    'seed': (2**80,), 'tools': ([{'type': 'function'}],), 'presence_penalty': (1.0,),
    'response_format': ({'type': 'json_object'},), 'stream': ('perhaps',)}
  good = {'model': NAME, 'messages': asks('What?', png()), 'max_tokens': 1}
  for field, values in bad.items():
    for value in values:
      status, _, body = served.post({**good, field: value})
      error = body['error']
      assert status == 400, (field, value)
      assert error['type'] == 'invalid_request_error' and error['message'], (field, value)
      assert '/etc' not in error['message'] and 'Traceback' not in error['message']
  for body in (b'', b'{', b'[]', b'null', b'\xff\xfe', b'{"model": NaN}', b'[' * 100000):
    assert served.post(body)[0] == 400, body[:20]
  assert served.post(good, Content_Type='text/plain')[0] == 415
  assert served.post(good, Host='evil.example')[0] == 400
  assert served.get('/v1/nowhere')[0] == 404 and served.get('/v1/chat/completions')[0] == 405
  assert json.loads(served.get('/v1/nowhere')[2])['error']['type'] == 'invalid_request_error'
  assert served.post(good)[0] == 200 and served.idle()


def test_models_health_and_metrics(served, client):
  assert [model.id for model in client.models.list()] == [NAME]
  assert client.models.retrieve(NAME).id == NAME
  with pytest.raises(openai.NotFoundError):
    client.models.retrieve('other')
  assert json.loads(served.get('/health')[2]) == {'status': 'ok'}
  before = numbers(served)
  client.chat.completions.create(model=NAME, messages=asks('What?', png()), max_tokens=5)
  after = numbers(served)
  gone_up = {name: after[name] - before.get(name, 0) for name in after}
  assert gone_up['hrvlm_requests_total{status="200"}'] == 1
  assert 1 <= gone_up['hrvlm_generated_tokens_total'] <= 5
  assert gone_up['hrvlm_decode_steps_total'] == gone_up['hrvlm_generated_tokens_total'] - 1
  assert gone_up['hrvlm_compilations_total'] == 0 < after['hrvlm_compilations_total']
  assert gone_up['hrvlm_time_to_first_token_seconds_count'] == 1
  assert after['hrvlm_slots'] == 4 and after['hrvlm_slots_busy'] == after['hrvlm_pending'] == 0


def numbers(served):
  lines = served.get('/metrics')[2].decode().splitlines()
  return {name: float(value) for name, value in (
    line.rsplit(' ', 1) for line in lines if not line.startswith('#'))}


def test_keys_and_a_full_queue():
  served = Running(tiny_answerer(), slots=1, queue=1, keys=('first-key', 'second-key'))
  try:
    ask = dict(model=NAME, messages=asks('What?'), max_tokens=2)
    for key in ('wrong', 'first-ke', 'first-key2', ''):
      client = openai.OpenAI(base_url=served.url, api_key=key or 'x', max_retries=0)
      with pytest.raises(openai.AuthenticationError, match='no valid API key') as error:
        client.chat.completions.create(**ask)
      assert 'first-key' not in str(error.value) and error.value.code == 'invalid_api_key'
      with pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert served.get('/metrics')[0] == 401 and served.get('/health')[0] == 200
    assert served.get('/metrics', Authorization='Bearer second-key')[0] == 200
    # What a browser asks its user for: a key as the password; the API takes no such thing.
    basic = lambda text: 'Basic ' + base64.b64encode(text.encode()).decode()
    assert served.get('/metrics', Authorization=basic('me:second-key'))[0] == 200
    for text in ('me:wrong', 'second-key', ':', ''):
      assert served.get('/metrics', Authorization=basic(text))[0] == 401
    assert served.get('/metrics', Authorization='Basic ?')[0] == 401
    assert served.get('/v1/models', Authorization=basic('me:second-key'))[0] == 401
    assert served.get('/metrics')[1]['WWW-Authenticate'].startswith('Basic ')
    # A page of another address may not ask outside the API.
    here = f'http://127.0.0.1:{served.port}'
    for origin, status in ((here, 200), ('http://evil.example', 403), ('null', 403)):
      assert served.get('/health', Origin=origin, Host=here[7:])[0] == status
    client = openai.OpenAI(base_url=served.url, api_key='second-key', max_retries=0)
    assert client.chat.completions.create(**ask).choices
    long = {**ask, 'max_tokens': 300, 'temperature': 3.0, 'stream': True, 'seed': 1}
    streams = [client.chat.completions.create(**long) for _ in range(2)]
    next(iter(streams[0]))
    with pytest.raises(openai.RateLimitError, match='too many requests are waiting') as error:
      client.chat.completions.create(**ask)
    assert error.value.response.headers['retry-after'] == '1'
    with pytest.raises(openai.RateLimitError):  # not half of the choices
      client.chat.completions.create(**ask, n=2)
    [stream.close() for stream in streams]
    assert served.idle()
    assert client.chat.completions.create(**ask).choices
  finally:
    served.stop()


def test_the_model_may_fail_and_the_next_request_is_answered(served, client, monkeypatch):
  ask = dict(model=NAME, messages=asks('What?', png()), max_tokens=8)
  right = client.chat.completions.create(**ask).choices[0].message.content
  step, failed = served.engine.step, []

  def fails(state):
    if not failed:
      failed.append(True)
      step(state)  # the slots are gone
      raise RuntimeError('the device is out of memory')
    return step(state)

  monkeypatch.setattr(served.engine, 'step', fails)
  with pytest.raises(openai.InternalServerError, match='the model failed') as error:
    client.chat.completions.create(**ask)
  assert 'memory' not in str(error.value)
  assert client.chat.completions.create(**ask).choices[0].message.content == right
  assert served.driver.snapshot().failures == 1
