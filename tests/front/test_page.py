"""The page in a real browser: Debian's Chromium, driven by Playwright (`test_full.sh browser`)."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).parents[2]
ASKED = 'What does the red sign say?'
pytestmark = pytest.mark.full('browser')


@pytest.fixture(scope='module')
def folder(world):
  return world / 'runs/quickstart'


@pytest.fixture(scope='module')
def place(folder):
  """The address of a server with two models side by side."""
  checkpoint = str(folder / 'checkpoint')
  command = [sys.executable, '-m', 'hrvlm_jax.cli.main', 'serve', checkpoint, '--port', '0',
             '--name', 'tiny', '--beside', checkpoint, '--slots', '4']
  server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
  server.stdout.readline()
  line = server.stdout.readline()
  yield re.search(r'http://127\.0\.0\.1:\d+', line)[0]
  server.terminate()
  assert server.wait(60) == 0


@pytest.fixture(scope='module')
def browser():
  from playwright.sync_api import sync_playwright

  program = shutil.which('chromium') or shutil.which('chromium-browser')
  assert program, 'Chromium is needed: apt-get install chromium'
  with sync_playwright() as playwright:
    with contextlib.closing(playwright.chromium.launch(
        executable_path=program, args=['--no-sandbox'])) as made:
      yield made


@pytest.fixture
def opened(browser, place):
  """A function: (width, address) -> a page that records what it asks others for."""
  made = []

  def open_page(width=1280, address=None):
    page = browser.new_page(viewport={'width': width, 'height': 900})
    made.append((page, elsewhere := []))
    page.on('request', lambda request: elsewhere.append(request.url) if not request.url.startswith(
      (place, 'data:', 'blob:')) else None)
    page.set_default_timeout(120_000)
    page.goto(address or place)
    page.wait_for_selector('#ask')
    return page

  yield open_page
  for page, elsewhere in made:
    page.close()
    assert not elsewhere


def drop(page, path):
  """Drops a picture; one that comes before the page listens is dropped again."""
  for _ in range(10):
    page.set_input_files('#picture input[type=file]', str(path))
    try:
      page.wait_for_selector('#picture img', timeout=5_000)
      return
    except Exception as error:  # noqa: BLE001 - of Playwright, which only this part has
      last = error
  raise last


def asks(page, question, turn=1):
  """Asks, and waits for the answers of both models."""
  page.fill('#question textarea', question)
  page.click('#ask')
  for number in (0, 1):
    page.wait_for_function(
      """([n, turn]) => document.querySelectorAll(`#answers-${n} .bot.message`).length >= turn
         && document.querySelector('#question textarea').value === ''""", arg=[number, turn])


def letters(text):
  """What fonts and white space cannot change."""
  return ''.join(c for c in text if c.isascii() and c.isalnum())


def post(address, body, **headers):
  asked = urllib.request.Request(address, json.dumps(body).encode(), {
    'Content-Type': 'application/json', **headers})
  try:
    with urllib.request.urlopen(asked) as answer:
      return answer.status, json.loads(answer.read())
  except urllib.error.HTTPError as error:
    return error.code, error.read()


@pytest.mark.parametrize('width', [1280, 390])
def test_upload_ask_look_and_ask_again(opened, place, folder, width, model):
  page = opened(width)
  picture = folder / 'data/eval/images/000000.png'
  drop(page, picture)
  asks(page, ASKED)
  for number in (0, 1):
    page.wait_for_selector(f'#overlay-{number} img')
    said = page.locator(f'#answers-{number} .bot.message').last.inner_text()
    assert letters(said) == letters(model.ask(picture, ASKED, max_new_tokens=64))
  width_of = 'document.querySelector("#overlay-0 img").naturalWidth'
  assert page.evaluate(width_of) == 400
  asks(page, 'And the blue one?', turn=2)
  messages = [{'role': 'user', 'content': [{'type': 'image', 'image': str(picture)},
                                           {'type': 'text', 'text': ASKED}]},
              {'role': 'assistant', 'content': model.ask(picture, ASKED, max_new_tokens=64)},
              {'role': 'user', 'content': 'And the blue one?'}]
  said = page.locator('#answers-0 .bot.message').last.inner_text()
  assert letters(said) == letters(model.ask(messages, max_new_tokens=64))
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.click('#new')
  page.wait_for_function('!document.querySelector("#answers-0 .bot.message")')


def test_tokens_appear_as_they_come(opened, folder):
  page = opened()
  drop(page, folder / 'data/eval/images/000000.png')
  page.evaluate("""() => {
    window.seen = new Set();
    const look = () => { const all = document.querySelectorAll('#answers-0 .bot.message');
      if (all.length) window.seen.add(all[all.length - 1].innerText); };
    new MutationObserver(look).observe(document.body,
      {childList: true, subtree: true, characterData: true}); }""")
  asks(page, ASKED)
  seen = page.evaluate('[...window.seen].map(text => text.length)')
  assert len(set(seen)) >= 3, seen


def test_mistakes_are_said_kindly(opened, folder, tmp_path):
  page = opened()
  page.click('#ask')
  page.wait_for_selector('#problem')
  assert page.inner_text('#problem') == 'Write a question first.'
  (tmp_path / 'broken.png').write_bytes((folder / 'data/eval/images/000000.png').read_bytes()[:200])
  page.set_input_files('#picture input[type=file]', str(tmp_path / 'broken.png'))
  page.wait_for_selector('#picture img', state='attached')
  page.fill('#question textarea', ASKED)
  page.click('#ask')
  page.wait_for_function('document.querySelector("#problem")?.innerText.includes("picture")')
  assert 'Traceback' not in page.inner_text('body') and page.input_value(
    '#question textarea') == ASKED
  page.click('#knobs button')
  page.fill('#knobs input[type=text], #knobs textarea', 'many')
  page.click('#ask')
  page.wait_for_function(
    'document.querySelector("#problem")?.innerText.includes("expected a whole number")')


def test_a_knob_and_a_marked_part(opened, folder, model):
  from PIL import Image

  page = opened()
  picture = folder / 'data/eval/images/000000.png'
  drop(page, picture)
  page.click('#knobs button')
  page.get_by_label('max_crops').fill('4')
  page.get_by_label('num_tokens').fill('20')
  asks(page, ASKED)
  said = page.locator('#answers-0 .bot.message').last.inner_text()
  coarse = model.with_encoder(max_crops=4, num_tokens=20)
  assert letters(said) == letters(coarse.ask(picture, ASKED, max_new_tokens=64))
  page.click('#new')
  page.get_by_label('max_crops').fill('15')
  page.get_by_label('num_tokens').fill('32')
  box = page.locator('#picture img').bounding_box()
  for number, share in enumerate((0.25, 0.75)):  # the picture is a band in the middle of its place
    page.mouse.click(box['x'] + share * box['width'],
                     box['y'] + box['height'] / 2 + (share - 0.5) * 30)
    page.wait_for_function('n => document.querySelector("#marked")?.innerText.includes(n)',
                           arg=('One corner', 'Looks at')[number])
  found = [int(n) for n in re.findall(r'\d+', page.inner_text('#marked').partition('Click')[0])]
  assert len(found) == 4
  asks(page, ASKED)
  said = page.locator('#answers-0 .bot.message').last.inner_text()
  part = Image.open(picture).convert('RGB').crop(found)
  assert letters(said) == letters(model.ask(part, ASKED, max_new_tokens=64))


def test_a_link_brings_the_question_back(opened, folder):
  page = opened()
  drop(page, folder / 'data/eval/images/000000.png')
  page.click('#knobs button')
  page.get_by_label('max_crops').fill('4')
  page.fill('#question textarea', ASKED)
  page.click('#share')
  page.wait_for_selector('#link textarea, #link input')
  address = page.locator('#link textarea, #link input').first.input_value()
  other = opened(390, address)
  other.wait_for_selector('#picture img')
  assert other.input_value('#question textarea') == ASKED
  other.click('#knobs button')
  assert other.get_by_label('max_crops').input_value() == '4'
  gone = opened(390, re.sub('picture=[0-9a-f]+', 'picture=' + '0' * 32, address))
  gone.wait_for_function('document.querySelector("#problem")?.innerText.includes("no longer kept")')


def test_what_the_page_does_not_do(place):
  """No API of its own, no files of the server, no calls of pages that lie elsewhere."""
  status, answer = post(f'{place}/v1/chat/completions', {
    'model': 'tiny', 'max_tokens': 2, 'messages': [{'role': 'user', 'content': 'What?'}]})
  assert status == 200 and answer['choices']
  assert post(f'{place}/v1/nowhere', {})[0] == 404
  with urllib.request.urlopen(f'{place}/config') as config:
    dependencies = json.loads(config.read())['dependencies']
  assert not [d for d in dependencies if d.get('api_visibility') == 'public']
  for path in ('/gradio_api/file=/etc/passwd', f'/gradio_api/file={ROOT}/pyproject.toml',
               '/gradio_api/file=pyproject.toml', '/gradio_api/proxy=http://127.0.0.1:1/', '/docs',
               '/openapi.json'):
    with pytest.raises(urllib.error.HTTPError) as error:
      urllib.request.urlopen(place + path)
    assert error.value.code in (403, 404, 400), path
  assert post(f'{place}/gradio_api/queue/join', {}, Origin='http://evil.example')[0] == 403
