"""MC-LLaVA-3B: three stages. configs/mc_llava.py:STAGE[,CROPS][,CHIPS]

full: everything learns; lora: LoRA on the decoder, vision tower and projector learn whole;
projector: the projector and the coordinate MLP learn, all else is frozen. crops_8: max_crops of
every training image is drawn from 0 to 8; one_view: it is 1 (one view of an image that is not
elongated), near what the original's data module does. CHIPS: a key of `CHIPS`. The first of each
where it is left out.

Command:  hrvlm convert --config configs/mc_llava.py:projector --part vision/tower=SIGLIP
            --part language=PHI2 --to weights/mc_llava_3b_start
          hrvlm train --config configs/mc_llava.py:projector --workdir runs/mc_llava_3b_projector
          hrvlm train --config configs/mc_llava.py:full --workdir runs/mc_llava_3b_full
          (`--config.training.init_from=weights/mc_llava_3b` goes on from the released checkpoint,
          as the original's script does)
          hrvlm convert --from MC-LLaVA-3b --to weights/mc_llava_3b
          hrvlm train --config configs/mc_llava.py:lora --workdir runs/mc_llava_3b_lora
Hardware: 8 x 80 GB (open: not published; ZeRO stage 3 there, the mesh of `gpu:8` here).
Time:     not published, not run here.
Expected: TextVQA 50.9, GQA 59.5, VQAv2 76.72, VizWiz 32.68 (the released model's card, `full`); not
          published for `lora`; the released model has no stage `projector` of its own.
Source:   `visheratin/mc-llava: train.py` and its data module. What the repository fixes: AdamW
          (8 bit there, float32 moments here) with the library's defaults, linear warm-up then
          cosine per step, bfloat16, one mean over all targets of the batch, 1000 ids of text, LoRA
          of rank 64. Crops in training: the article says varied resolutions and a dynamic number of
          crops; the class draws from 0 to `crops_limit`, 8 by default, its data module passes 1.
Open:     learning rates, batch size, epochs, warm-up and clipping are arguments of its command line
          and were not published: the values here are LLaVA-1.5's. Which limit of crops the
          released weights saw. The repository starts from the released checkpoint and
          has no projector stage; the stage is here so that the model can be made from its parts.
"""

from ml_collections import ConfigDict

from hrvlm_jax.training.recipe import words

# Never read: the encoder's final norm and pooling head (13 tensors of the checkpoint).
UNREAD = 'vision/tower/(post_norm|pool)/.*'
STAGES = {
  'full': dict(
    steps=5198, batch_size=128, learning_rate=2e-5, train='data/mc_llava.mixture.json', frozen=(),
    start='runs/mc_llava_3b_projector', fresh=()),
  # LoRA on all linear layers of the decoder but the head. The original's suffix match also wraps
  # the vision tower, whose own weights train beside the adapters; that pair is left out here.
  'lora': dict(
    steps=5198, batch_size=128, learning_rate=2e-4, train='data/mc_llava.mixture.json',
    frozen=(r'language/(?!.*lora_[ab]).*',),
    start='weights/mc_llava_3b', fresh=(r'language/.*lora_[ab].*',)),
  'projector': dict(
    steps=2181, batch_size=256, learning_rate=1e-3, train='data/mc_llava_align.json',
    frozen=('vision/tower/.*', 'language/.*'),
    start='weights/mc_llava_3b_start', fresh=('projector/.*', 'vision/coord_embed/.*', UNREAD)),
}
# max_crops of a training image: the range it is drawn from, or one value; answers use `answer`.
CROPS = {
  'crops_8': dict(draw=dict(max_crops=(0, 8)), answer=100),
  'one_view': dict(draw=dict(), answer=1),
}
CHIPS = {
  'gpu:8': dict(accumulate=8, mesh=dict(data=1, fsdp=-1, sequence=1, tensor=1, dcn_data=1)),
  # Not fsdp over all chips: libtpu then sums gradients whole on every one (docs/plans.md).
  'v5e:8x8': dict(accumulate=1, remat='dots',
                  mesh=dict(data=2, fsdp=32, sequence=1, tensor=1, dcn_data=1)),
}


def get_config(argument=''):
  stage, crops, chips = words(argument, STAGES, CROPS, CHIPS)
  numbers, machine = STAGES[stage], CHIPS[chips]
  config = ConfigDict()
  config.seed = 0
  config.mesh = machine['mesh']

  adapter = dict(rank=64, alpha=16.0, dropout=0.05)
  config.model = dict(
    system='mc_llava', chat='mc_llava', image_token='<image>',
    encoder=dict(
      max_crops=CROPS[crops]['answer'], num_tokens=728, window=384, growth=10, crop_cap=None,
      quirks='refuse', view_buckets=(1, 5, 9, 17, 33, 65, 105, 209),
      mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
      vision=dict(  # SigLIP SO400M, 384 pixels
        image_size=384, patch_size=14, channels=3, width=1152, depth=27, heads=16, mlp_width=4304,
        activation='gelu_tanh', norm_eps=1e-6, pool='map')),
    projector=dict(kind='mlp', n_in=1152, n_out=2560, depth=2, activation='gelu'),
    fusion=dict(kind='prefix'),
    text=dict(  # Phi-2
      family='phi', vocab_size=51200, width=2560, depth=32, heads=32, kv_heads=32, head_dim=80,
      mlp_width=10240, activation='gelu_tanh', norm='layernorm', norm_eps=1e-5,
      parallel_block=True, gated_mlp=False, rotary_dim=32, rope_theta=10000.0, max_positions=2048,
      qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, residual_dropout=0.1,
      init_std=0.02, lora=(adapter,) if stage == 'lora' else ()))

  config.data = dict(
    train=numbers['train'], tokenizer='weights/mc_llava_3b/tokenizer',
    lengths=(896, 1024, 1280, 1536, 1728), max_length=1000, exif='ignore',
    draw=CROPS[crops]['draw'])

  config.training = dict(
    steps=numbers['steps'], batch_size=numbers['batch_size'], accumulate=machine['accumulate'],
    loss_average='tokens', dtype='bfloat16', frozen_dtype='bfloat16',
    remat=machine.get('remat', 'layers'),
    attention='auto',
    groups=(*(dict(pattern=pattern, frozen=True) for pattern in (UNREAD, *numbers['frozen'])),
            dict(pattern='.*')),
    # Weight decay on everything: the default of the original's optimizer, one group.
    optimizer=dict(
      name='adamw', learning_rate=numbers['learning_rate'], schedule='cosine', warmup=0.03,
      b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.01, clip_norm=1.0),
    init_from=numbers['start'], init_allow=numbers['fresh'])
  return config
