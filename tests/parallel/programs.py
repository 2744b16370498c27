"""A small scanned transformer step for the tests of `parallel.plan`."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import HERE, Execution
from hrvlm_jax.parallel import rules
from hrvlm_jax.parallel.flops import count_flops
from hrvlm_jax.parallel.mesh import batch_sharding
from hrvlm_jax.planning.program import Program


def forward(params, x, *, heads, ex):
  """[b t d] -> [b t d] through stacked attention and MLP blocks in bfloat16."""

  def attention(p, x):
    b, t, d = x.shape
    q, k, v = ((x @ p[n]['kernel'].astype(x.dtype)).reshape(b, t, heads, -1) for n in 'qkv')
    scores = jnp.einsum('bthd,bshd->bhts', q, k).astype(jnp.float32)
    y = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores, axis=-1).astype(x.dtype), v)
    return y.reshape(b, t, d) @ p['out']['kernel'].astype(x.dtype)

  def block(x, p):
    x = ex.constrain('hidden', x)
    x = x + attention(p['attn'], x)
    hidden = jax.nn.gelu(x @ p['mlp']['fc1']['kernel'].astype(x.dtype))
    return x + hidden @ p['mlp']['fc2']['kernel'].astype(x.dtype), None

  body = jax.checkpoint(block) if ex.remat == 'layers' else block
  return jax.lax.scan(body, x, params['blocks'])[0]


def step(params, x, *, heads, ex):
  def loss(params):
    return (forward(params, x.astype(jnp.bfloat16), heads=heads, ex=ex) ** 2).mean()

  value, grads = jax.value_and_grad(loss)(params)
  return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), value


def transformer(
  mesh, *, depth=4, width=256, heads=2, batch=16, length=128, remat='layers', wrong=False,
  platform=None,
):
  """The target: a step of that size on the mesh."""
  if wrong:
    raise UserError('the options were wrong')
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  kernel = lambda n_in, n_out: {'kernel': leaf(depth, n_in, n_out)}
  attn = {name: kernel(width, width) for name in ('q', 'k', 'v', 'out')}
  mlp = {'fc1': kernel(width, 4 * width), 'fc2': kernel(4 * width, width)}
  params = {'blocks': {'attn': attn, 'mlp': mlp}}
  shardings = rules.param_shardings(params, mesh)
  x = leaf(batch, length, width)
  model = count_flops(lambda p, x: step(p, x, heads=heads, ex=HERE), params, x)
  ex = Execution(mesh=mesh, platform=platform, remat=remat)
  put = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
  return Program(
    fn=lambda params, x: step(params, x, heads=heads, ex=ex),
    args=(jax.tree.map(put, params, shardings), put(x, batch_sharding(mesh))),
    donate=(0,),
    out_shardings=(shardings, NamedSharding(mesh, P())),
    model_flops=model,
    examples=batch,
    tokens=batch * length,
    notes=(f'{depth} layers of width {width}, {len(paths.flatten(params))} leaves',),
  )


def fails(mesh, *, platform):
  raise RuntimeError('a fault of the library')
