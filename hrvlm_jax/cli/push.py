"""`hrvlm push`: see `interop.hub.push`."""

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Uploads an export as a model on the Hugging Face hub; `hf auth login` says who you are.

  `hrvlm_jax.load('owner/name')` and `hrvlm convert --from owner/name` read it back.
  """
  parser = Parser('push', main.__doc__)
  parser.add_argument('folder', help='what hrvlm export wrote')
  parser.add_argument('name', metavar='OWNER/NAME', help='made where it does not exist')
  parser.add_argument('--private', action='store_true', help='a model that is made now is private')
  parser.add_argument('--branch', help='to push to; default: main')
  parser.add_argument('--message', default='Upload by hrvlm push', help='of the commit')
  arguments = parser.parse(argv)

  from hrvlm_jax.interop import hub

  address, commit = hub.push(arguments.folder, arguments.name, private=arguments.private,
                             branch=arguments.branch, message=arguments.message)
  print(f'pushed {arguments.folder} to {address}\n'
        f"load it: hrvlm_jax.load('{arguments.name}@{commit}')")
  return 0
