"""Chat templates of `language.chat` in Jinja, as tokenizers and processors of transformers take."""

from __future__ import annotations

import json

from hrvlm_jax.language.chat import IMAGE, Template

_BODY = """\
{%- macro body(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro images(message) -%}
{%- if message['content'] is string -%}{{ MARK * message['content'].count(IMAGE) }}
{%- else -%}
{{ MARK * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) }}
{%- endif -%}
{%- endmacro -%}
"""


def chat_template(template: Template) -> str:
  """The Jinja form; it renders what `language.chat.render` does.

  Pictures of a message stand in front of its text, as `language.chat.question` puts them.
  """
  text = json.dumps  # a string of JSON is one of Jinja
  before, after = template.user.split('{text}')
  opened, closed = template.answer.split('{text}')
  asked = "''" if template.drop_question else f'body(message) | replace({text(IMAGE)}, "") | trim'
  answered = f'body(message) | replace({text(IMAGE)}, "")' + (' | trim' if template.strip else '')
  user = f'{text(before)} ~ images(message) ~ ({asked}) ~ {text(after)}'
  if template.strip:
    user = f'{text(before)} ~ ((images(message) ~ ({asked})) | trim) ~ {text(after)}'
  lines = [_BODY.replace('MARK', text(template.image)).replace('IMAGE)', f'{text(IMAGE)})')]
  lines.append("{%- set first = messages[0]['role'] == 'system' -%}\n")
  if template.system_format:
    head, tail = template.system_format.split('{text}')
    given = f'{{{{ {text(head)} ~ body(messages[0]) ~ {text(tail)} }}}}'
    default = '' if template.system is None else (
      f'{{%- else -%}}{{{{ {text(head + template.system + tail)} }}}}')
    lines.append(f'{{%- if first -%}}{given}{default}{{%- endif -%}}\n')
  else:
    lines.append("{%- if first -%}{{ raise_exception('this template has no system text') }}"
                 '{%- endif -%}\n')
  if template.first_turn_only:
    lines.append('{%- if (messages | length) - first > 2 -%}{{ raise_exception('
                 "'this template has one question and one answer') }}{%- endif -%}\n")
  lines += [
    '{%- for message in (messages[1:] if first else messages) -%}\n',
    "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
    "{{ raise_exception('questions and answers must alternate, beginning with a question') }}",
    '{%- endif -%}\n',
    "{%- if message['role'] == 'user' -%}", f'{{{{ {user} }}}}\n', '{%- else -%}',
    f'{{{{ {text(template.header)} ~ {text(opened)} ~ ({answered}) ~ {text(closed)} ~ '
    f'{text(template.after)} }}}}\n', '{%- endif -%}\n', '{%- endfor -%}\n',
    f'{{%- if add_generation_prompt -%}}{{{{ {text(template.header)} }}}}{{%- endif -%}}']
  return ''.join(lines).replace('}}\n{%-', '}}{%-').replace('-%}\n{{', '-%}{{')
