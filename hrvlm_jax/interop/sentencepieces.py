"""A sentencepiece model as a `tokenizer.json` with the same ids, for transformers of today.

The slow LLaMA tokenizer in its legacy behaviour (every stretch between special tokens gets a dummy
space) is a BPE of the `tokenizers` library: merges follow from the pieces' scores. What it writes
is compared with the model before it is handed out.
"""

from __future__ import annotations

from hrvlm_jax.core.errors import UserError, raise_all
from hrvlm_jax.language.tokenizer import SentencePieceTokenizer

_SPACE = '\u2581'
_UNKNOWN, _USER = 2, 4  # types of pieces
_PROBES = ('Hello  world', ' a\nb\t<s>c</s>USER: é\u4f60\U0001f600 ', 'x' * 40, '', '  ',
           'A chat 12345.')


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> bytes:
  """The file.

  Raises:
    UserError: a model that is no plain BPE, or one whose ids come out different.
  """
  import tokenizers
  from tokenizers import decoders, models, normalizers, processors

  proto = _proto(tokenizer)
  pieces = [(piece.piece, piece.score) for piece in proto.pieces]
  vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
  unknown = next((p.piece for p in proto.pieces if p.type == _UNKNOWN), None)
  native = tokenizers.Tokenizer(models.BPE(
    vocab=vocabulary, merges=_merges(vocabulary, dict(pieces)), unk_token=unknown, fuse_unk=True,
    byte_fallback=proto.trainer_spec.byte_fallback))
  steps = [normalizers.Prepend(_SPACE)] if proto.normalizer_spec.add_dummy_prefix else []
  native.normalizer = normalizers.Sequence([*steps, normalizers.Replace(' ', _SPACE)])
  native.decoder = decoders.Sequence([
    decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(),
    decoders.Strip(' ', 1, 0)])
  special = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
  for token, index in special:
    kind = tokenizers.AddedToken(token, normalized=False, special=True)
    native.add_special_tokens([kind])
    if native.token_to_id(token) != index:
      raise UserError(f'tokenizer: {token!r} has id {index}, as a tokenizer.json it would have '
                      f'{native.token_to_id(token)}; export with --for original')
  if tokenizer.begin and tokenizer.bos_id is not None:
    begin = tokenizer.roles['bos']
    native.post_processor = processors.TemplateProcessing(
      single=f'{begin} $A', pair=f'{begin} $A {begin} $B',
      special_tokens=[(begin, tokenizer.bos_id)])
  for text in _PROBES:
    ours, theirs = tokenizer.encode(text), native.encode(text).ids
    if ours != theirs:
      raise UserError(f'tokenizer: {text!r} is {ours}, as a tokenizer.json it would be {theirs}; '
                      'export with --for original')
  return native.to_str().encode()


def _proto(tokenizer: SentencePieceTokenizer):
  try:
    from sentencepiece import sentencepiece_model_pb2
  except ImportError as error:
    raise UserError('tokenizer.model: rewriting it needs protobuf (pip install protobuf)'
                    ) from error
  proto = sentencepiece_model_pb2.ModelProto()
  name = next(name for name in ('tokenizer.model', 'spiece.model') if name in tokenizer.files)
  proto.ParseFromString(tokenizer.files[name])
  spec, problems = proto.normalizer_spec, []
  if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
    problems.append('it is no BPE')
  if spec.precompiled_charsmap or spec.remove_extra_whitespaces:
    problems.append('it rewrites its text (a normalising model)')
  if any(piece.type == _USER for piece in proto.pieces):
    problems.append('it has user-defined pieces')
  raise_all(f'{name}: has no equal tokenizer.json; export with --for original', problems)
  return proto


def _merges(vocabulary: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
  """Pairs of pieces whose join is a piece, by falling score of the join."""
  found = []
  for piece, score in scores.items():
    local = [(piece[:i], piece[i:]) for i in range(1, len(piece))
             if piece[:i] in vocabulary and piece[i:] in vocabulary]
    found += [(-score, *sorted_pair) for sorted_pair in sorted(
      local, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]
  return [(a, b) for _, a, b in sorted(found, key=lambda item: item[0])]
