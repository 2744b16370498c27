"""lmms-eval plug-in: registration and everything that does not need lmms-eval to be installed.

    pip install -e '.[lmms]'
    lmms-eval --model hrvlm_jax --model_args checkpoint=DIR --tasks textvqa_val --batch_size 4

lmms-eval finds `manifest` through the entry point group `lmms_eval.models`; the model class is in
`lmms_eval_model`. Written against lmms-eval 0.7.3, whose chat requests carry (context,
doc_to_messages, generation settings, doc_id, task, split); older ones lack the context.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from typing import Any

from PIL import Image

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.vlm.answer import answer_all

MODEL_ID = 'hrvlm_jax'
CLASS_PATH = 'hrvlm_jax.evaluation.lmms_eval_model.HrvlmJax'

# What a sampling config of ours takes of lmms-eval's generation settings.
_DEFAULT_NEW_TOKENS = 1024


def manifest():
  """What the entry point gives to lmms-eval's registry."""
  from lmms_eval.models.registry_v2 import ModelManifest
  return ModelManifest(model_id=MODEL_ID, chat_class_path=CLASS_PATH)


@dataclasses.dataclass(frozen=True)
class Request:
  """A generation request in our terms.

  Attributes:
    images, question: the user's turn. sampling: fields of `Sampling`. until: texts at which the
      answer is cut. position: in lmms-eval's list of requests.
  """

  images: tuple[Image.Image, ...]
  question: str
  sampling: Mapping[str, Any]
  until: tuple[str, ...]
  position: int


def chat_request(arguments: Sequence[Any], documents: Mapping, position: int) -> Request:
  """An lmms-eval chat request as a `Request`.

  Args:
    arguments: `Instance.args` of a chat task. documents: the model's `task_dict`.

  Raises:
    UserError: a form of request that is not known; video or audio; more than one turn of a user.
  """
  arguments = list(arguments)
  if len(arguments) == 6:
    arguments = arguments[1:]
  if len(arguments) != 5 or not callable(arguments[0]):
    raise UserError(f'lmms-eval sent a request with {len(arguments)} arguments, expected '
                    '(doc_to_messages, settings, doc_id, task, split); versions 0.7 are supported')
  to_messages, settings, number, task, split = arguments
  images, question = user_turn(to_messages(documents[task][split][number]))
  sampling, until = sampling_of(settings)
  return Request(images, question, sampling, until, position)


def user_turn(messages: Iterable[Mapping]) -> tuple[tuple[Image.Image, ...], str]:
  """Images and text of a conversation that consists of one question.

  Texts of a system message come first. Images stand in front of the text, in their order, which is
  where this library's chat templates put them; text pieces are joined as they are.

  Raises:
    UserError: earlier answers in the conversation, video, audio, no text.
  """
  images: list[Image.Image] = []
  texts: list[str] = []
  system: list[str] = []
  users = 0
  for message in messages:
    role, content = message['role'], message['content']
    if role == 'assistant':
      raise UserError('the task sends a conversation with earlier answers; only single questions '
                      'are supported')
    users += role == 'user'
    pieces = [{'type': 'text', 'text': content}] if isinstance(content, str) else content
    for piece in pieces:
      if piece['type'] == 'text':
        (system if role == 'system' else texts).append(piece['text'])
      elif piece['type'] == 'image':
        images.append(_image(piece['url']))
      else:
        raise UserError(f'the task sends {piece["type"]}; only images and text are supported')
  if users != 1:
    raise UserError(f'the task sends {users} user messages, expected one question')
  text = ''.join(texts)
  if system:
    text = '\n'.join([*system, text])
  if not text.strip():
    raise UserError('the task sends a question without text')
  return tuple(images), text


def sampling_of(settings: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
  """(fields of `Sampling`, stop texts) of lmms-eval's generation settings.

  Greedy (with beams if asked) unless `do_sample` is set with a temperature above 0.
  """
  until = settings.get('until') or ()
  until = (until,) if isinstance(until, str) else tuple(until)
  options: dict[str, Any] = {
      'max_new_tokens': int(settings.get('max_new_tokens') or settings.get('max_gen_toks')
                            or _DEFAULT_NEW_TOKENS)}
  temperature = float(settings.get('temperature') or 0)
  if settings.get('do_sample') and temperature > 0:
    options['temperature'] = temperature
    if settings.get('top_p') not in (None, 1, 1.0):
      options['top_p'] = float(settings['top_p'])
  elif int(settings.get('num_beams') or 1) > 1:
    options['beams'] = int(settings['num_beams'])
  return options, until


def cut(text: str, until: Iterable[str]) -> str:
  """The answer before the first of the stop texts. Leading white space is never a stop."""
  body = text.lstrip()
  ends = [place for stop in until if stop and (place := body.find(stop)) >= 0]
  return body[:min(ends)] if ends else text


def groups(requests: Sequence[Request]) -> list[list[Request]]:
  """Requests of equal settings and number of images, by rising text length.

  Equal lengths next to each other keep the number of compiled shapes small.
  """
  found: dict[tuple, list[Request]] = {}
  for request in requests:
    key = (tuple(sorted(request.sampling.items())), len(request.images))
    found.setdefault(key, []).append(request)
  return [sorted(group, key=lambda request: (len(request.question), request.position))
          for group in found.values()]


Generate = Callable[[list[tuple[tuple[Image.Image, ...], str]], Mapping[str, Any]], Sequence[str]]


def run(requests: Sequence[Request], generate: Generate, *, batch_size: int,
        done: Callable[[int], None] = lambda count: None) -> list[str]:
  """Answers of all requests in their order.

  Args:
    generate: (pairs of images and question, sampling) -> texts. It always gets `batch_size` pairs;
      the last batch of a group is filled up by repetition.
    done: called after each batch with its number of requests.
  """
  texts: dict[int, str] = {}
  for group in groups(requests):
    ask = lambda batch, sampling=group[0].sampling: generate(
      [(request.images, request.question) for request in batch], sampling)
    for batch, answers in answer_all(ask, group, batch_size=batch_size):
      texts |= {request.position: cut(answer, request.until)
                for request, answer in zip(batch, answers)}
      done(len(batch))
  return [texts[request.position] for request in requests]


def _image(source: Any) -> Image.Image:
  if isinstance(source, Image.Image):
    return source
  raise UserError(f'the task sends an image as {type(source).__name__}, expected a decoded image')
