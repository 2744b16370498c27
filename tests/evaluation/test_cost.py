"""The cost model: Pheye's numbers, published counts, and what a traced program multiplies."""

import jax
import jax.numpy as jnp
import pytest

from hrvlm_jax.core.module import Functional
from hrvlm_jax.evaluation.analysis import complexity, cost
from hrvlm_jax.language.config import phi
from hrvlm_jax.language.decoder import Decoder
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.vision.vit import ViT, ViTConfig

VIT_H = ViTConfig(image_size=224, patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120,
                  class_token=True, patch_bias=False, pre_norm=True)
SIGLIP = ViTConfig(image_size=378, patch_size=14, width=1152, depth=27, heads=16, mlp_width=4304)


def test_equations_to_the_last_digit():
  assert complexity.vit_layer(2305, 1280) == 52_118_816_000
  assert complexity.pheye_encoder_layer(10, 257, 1280) == 51_373_683_200
  assert complexity.pheye_encoder_layer(10, 256, 1280) == 51_170_508_800
  assert complexity.pheye_encoder_layer(10, 2570, 1280) == 10 * 58_982_528_000
  assert complexity.llava_lm_layer(65, 2305, 2048) == 130_789_416_960
  assert complexity.pheye_lm_layer(65, 2305, 2048, 1280, 2).total == 10_839_198_720
  assert complexity.pheye_lm_layer(65, 2305, 2048, 1280, 4).total == 7_059_704_320
  pieces = complexity.pheye_lm_layer(65, 2305, 2048, 1280, 2)
  assert (pieces.base, pieces.keys_values, pieces.queries_out, pieces.attention,
          pieces.feed_forward) == (3_280_209_920, 12_084_838_400, 545_259_520, 306_841_600,
                                   2_181_038_080)
  assert complexity.sub_image_tokens(2305, 10) == 257
  with pytest.raises(ValueError, match='not a multiple'):
    complexity.sub_image_tokens(2304, 10)


@pytest.mark.parametrize('quantity,value,digits,agrees', [
  ("(1) / (2), N' = 257", 1.0145, 4, False),
  ("(1) / (2), N' = 256", 1.0185, 4, True),
  ("(1) / (2), N = 2304, N' = 256", 1.0180, 4, True),
  ("(1) / (2), N' = 2570 as the text says", 0.088, 3, False),
  ("(1) / (2), N' = 2570 without the factor P", 0.884, 3, False),
  ("(1) / (2) at 448: N = 1025, P = 5, N' = 257", 0.837, 3, None),
  ('(3) / (4), I = 2', 12.066, 3, True),
  ('(3) / (4), I = 4', 18.526, 3, True),
  ('(3) / (4), I = 2, Ni = 2305 and 2570', 11.32, 2, None),
  ('(3) / (4), I = 4, Ni = 2305 and 2570', 17.64, 2, None),
  ('(3) / (4), I = 2, Ni = 2570 on both sides', 12.71, 2, None),
  ('(3) / (4), I = 4, Ni = 2570 on both sides', 19.80, 2, None),
])
def test_table_of_ratios(quantity, value, digits, agrees):
  row, = (row for row in complexity.table() if row.quantity == quantity)
  assert round(row.value, digits) == value
  assert row.agrees is agrees


def test_exact_convention_costs_more():
  assert complexity.vit_layer(257, 1280, convention='exact') - complexity.vit_layer(257, 1280) == \
    1280 * 257**2
  assert complexity.pheye_encoder_layer_exact(10, 257, 1280) > \
    complexity.pheye_encoder_layer(10, 257, 1280, convention='exact')
  with pytest.raises(ValueError, match="'paper' or 'exact'"):
    complexity.vit_layer(1, 1, convention='half')
  # The generic counts agree with the equations where both speak of the same thing.
  exact = cost.vit(VIT_H, 256, views=10)
  assert exact.linear + exact.attention == \
    32 * complexity.pheye_encoder_layer(10, 257, 1280, convention='exact')
  with_lora = cost.vit(VIT_H, 256, lora_rank=8) + cost.vit(VIT_H, 256, views=9,
                                                                         lora_rank=16)
  assert with_lora.linear + with_lora.attention == \
    32 * complexity.pheye_encoder_layer_exact(10, 257, 1280)


def test_published_counts():
  view = cost.vit(SIGLIP, 729)
  assert 2 * view.linear == pytest.approx(0.6e12, rel=0.01)  # MC-LLaVA: 0.6 + 0.07 TFLOP a view
  assert 2 * view.attention == pytest.approx(0.07e12, rel=0.06)
  phi_2 = phi(width=2560, depth=32, heads=32, mlp_width=10240, rotary_factor=0.4)
  assert cost.cache_bytes(phi_2, 1) == 327_680
  phi_15 = phi()
  assert cost.decoder_parameters(phi_15) == 1_418_270_720
  assert cost.decoder(phi_15, 1, logits=0).linear == pytest.approx(1.2e9, rel=0.01)
  assert cost.vit_parameters(VIT_H, 257, patch_bias=False, pre_norm=True,
                                    post_norm=True) == 630_766_080
  block = cost.cross_attention(2048, 1280, tokens=0, image_tokens=2570, blocks=1)
  assert block.multiply_adds == pytest.approx(13.5e9, rel=0.01)
  cached = cost.cross_attention(2048, 1280, tokens=1, image_tokens=2570, blocks=12,
                                       cached=True)
  assert cached.multiply_adds < 12 * block.multiply_adds / 100


def test_answer_adds_up():
  text = phi(vocab_size=64, width=32, depth=2, heads=4, mlp_width=64)
  vision = cost.mlp((16, 32, 32), 10)
  assert vision.multiply_adds == 10 * (16 * 32 + 32 * 32)
  found = cost.prefix_answer(text, vision, image_tokens=10, text_tokens=5, new_tokens=3)
  assert found.positions == 17 and found.cache_bytes == cost.cache_bytes(text, 17)
  steps = [cost.decoder(text, 1, past=15), cost.decoder(text, 1, past=16)]
  assert found.decode == steps[0] + steps[1]
  assert found.flops == 2 * (vision.multiply_adds + found.prefill.multiply_adds
                            + found.decode.multiply_adds)


def test_formula_equals_traced_vit():
  config = ViTConfig(image_size=28, patch_size=7, width=24, depth=3, heads=2, mlp_width=40,
                     class_token=True, patch_bias=False)
  model = Functional(lambda rngs: ViT(config, rngs=rngs))
  pixels = jax.ShapeDtypeStruct((5, 28, 28, 3), jnp.float32)
  found = count_flops(model.apply, model.abstract, pixels)
  assert found == cost.vit(config, 16, views=5).flops


def test_formula_equals_traced_decoder():
  config = phi(vocab_size=50, width=32, depth=3, heads=4, mlp_width=48)
  model = Functional(lambda rngs: Decoder(config, rngs=rngs))
  ids, mask = jax.ShapeDtypeStruct((2, 7), jnp.int32), jax.ShapeDtypeStruct((2, 7), bool)

  def forward(params, tokens, valid):
    module = model.bind(params)
    return module.logits(module(module.embed(tokens), valid))

  found = count_flops(forward, model.abstract, ids, mask)
  assert found == 2 * cost.decoder(config, 7, logits=7).flops  # two rows
