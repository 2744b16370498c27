"""What the OpenAI client of lmms-eval 0.7.3 sends, recorded from it, and what `ask` says to it."""

import base64
import io
import json
import pathlib

from PIL import Image
import pytest

from hrvlm_jax.language.messages import dialogue
from tests.serving.running import NAME, Running, tiny_answerer

RECORDED = json.loads((pathlib.Path(__file__).parent / 'lmms_requests.json').read_text())


@pytest.fixture(scope='module')
def served():
  made = Running(tiny_answerer())
  yield made
  made.stop()


def test_its_requests_are_answered_as_ask_does(served):
  assert 'lmms-eval 0.7.3' in RECORDED['recorded'] and len(RECORDED['requests']) == 3
  for request in RECORDED['requests']:
    body = request['body']
    assert request['path'] == '/v1/chat/completions' and body['model'] == NAME
    headers = {name.title().replace('-', '_'): text for name, text in request['headers'].items()}
    status, _, found = served.post(body, **headers)
    assert status == 200, found
    said = found['choices'][0]['message']['content']
    assert found['usage']['completion_tokens'] <= body['max_tokens']
    if body['temperature']:  # drawn; the same again
      assert served.post(body, **headers)[2]['choices'] == found['choices']
      continue
    urls, spoken = dialogue(body['messages'])
    images = [Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2]))) for url in urls]
    asked = spoken if spoken.plain is None else spoken.plain
    assert said == served.answerer.answer([(images, asked)], max_new_tokens=body['max_tokens'])[0]
