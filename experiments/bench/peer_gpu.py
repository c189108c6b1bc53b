"""PyTorch contenders on a GPU; imports no JAX and runs on JAX's GPU.

Started by `peers.py`. Prints one JSON line with the version, then reads one
JSON request a line,

  {"what": "lengths", "contender": "PyTorch SDPA, flash", "length": 65536,
   "heads": 16, "kv_heads": 4, "head_dim": 128, "batch": 8, "lists": "FILE.npz"}

and answers with one line: `rows`, a measurement each (`pass`, and `seconds` of
every round or an `error`). `what` may also be `decode`. `lists` has block ids
and counts for FlexAttention. Times are those of CUDA events.
"""

import functools
import json
import sys

import numpy as np
import torch
from torch.nn import attention
from torch.nn import functional as F

BACKENDS = {
  'PyTorch SDPA, flash': attention.SDPBackend.FLASH_ATTENTION,
  'PyTorch SDPA, cuDNN': attention.SDPBackend.CUDNN_ATTENTION,
}
ROUNDS, SAMPLE_SECONDS = 9, 0.02


def tensors(length, heads, kv_heads, head_dim):
  """q, k, v [1, heads, T, H] as a model has them, and the output's gradient."""
  torch.manual_seed(0)

  def normal(n):
    x = torch.randn(1, length, n, head_dim, device='cuda', dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()

  q, k, v = normal(heads), normal(kv_heads), normal(kv_heads)
  return (q, k, v), normal(heads).detach()


def milliseconds(function, calls):
  """Of one of `calls` calls."""
  begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  begin.record()
  for _ in range(calls):
    function()
  end.record()
  torch.cuda.synchronize()
  return begin.elapsed_time(end) / calls


def rounds(function):
  """Seconds of every round, after a warm-up."""
  milliseconds(function, 2)
  took = milliseconds(function, 1)
  calls = max(1, int(1000 * SAMPLE_SECONDS / max(took, 1e-3)))
  return [milliseconds(function, calls) / 1000 for _ in range(ROUNDS)]


def three_passes(attend, inputs, grad):
  """{pass: function}."""

  def forward():
    with torch.no_grad():
      attend(*inputs)

  out = attend(*inputs)

  def backward():
    torch.autograd.grad(out, inputs, grad, retain_graph=True)

  def both():
    torch.autograd.grad(attend(*inputs), inputs, grad)

  return {'forward': forward, 'backward': backward, 'forward+backward': both}


def measured(build):
  """Rows of the passes that `build` returns."""
  try:
    functions = build()
  except Exception as error:  # whatever it is, the others go on
    return [{'pass': 'every pass', 'error': reason(error)}]
  rows = []
  for which, function in functions.items():
    try:
      rows.append({'pass': which, 'seconds': rounds(function)})
    except Exception as error:
      rows.append({'pass': which, 'error': reason(error)})
  return rows


def reason(error):
  """An error in one line."""
  return f'{type(error).__name__}: {error}'.split('\n')[0][:200]


def sdpa(backend, inputs, grad):
  """The passes of one backend."""

  def attend(q, k, v):
    with attention.sdpa_kernel(backend):
      return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
      )

  return three_passes(attend, inputs, grad)


def flex(path, inputs, grad):
  """The passes of FlexAttention on the same block lists."""
  from torch.nn.attention import flex_attention as lib

  with np.load(path) as file:
    ids, counts, block_q, block_k = (
      file[x] for x in ('ids', 'counts', 'block_q', 'block_k')
    )
  block_q, block_k = int(block_q), int(block_k)
  q, k, _ = inputs
  group = q.shape[1] // k.shape[1]
  blocks = k.shape[2] // block_k
  ids = torch.from_numpy(ids).cuda()[None].repeat_interleave(group, 1)
  counts = torch.from_numpy(counts).cuda()[None].repeat_interleave(group, 1)
  counts = counts.int()
  # It wants room for every block in a list.
  ids = F.pad(ids.int(), (0, blocks - ids.shape[-1]))
  mask = lib.BlockMask.from_kv_blocks(
    counts,
    ids,
    BLOCK_SIZE=(block_q, block_k),
    mask_mod=lambda b, h, t, s: t >= s,
    seq_lengths=(q.shape[2], k.shape[2]),
  )
  run = torch.compile(lib.flex_attention)
  # Its own blocks must divide those of the lists.
  sizes = {f'BLOCK_M{i}': block_q for i in ('', '1', '2')}
  sizes |= {f'BLOCK_N{i}': block_k for i in ('', '1', '2')}

  def attend(q, k, v):
    return run(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=sizes)

  return three_passes(attend, inputs, grad)


def decode_graph(backend, inputs):
  """One query a row, replayed as a graph: no start from Python in it."""
  q, k, v = inputs

  def step():
    with attention.sdpa_kernel(backend):
      return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

  with torch.no_grad():
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      step()
  return {'decode': graph.replay}


def answer(request):
  """The rows of one contender."""
  shape = [request[x] for x in ('length', 'heads', 'kv_heads', 'head_dim')]
  backend = BACKENDS.get(request['contender'])
  if request['what'] == 'decode':
    inputs = cache(request['batch'], *shape)
    build = functools.partial(decode_graph, backend, inputs)
  elif backend is None:
    build = functools.partial(flex, request['lists'], *tensors(*shape))
  else:
    build = functools.partial(sdpa, backend, *tensors(*shape))
  return {'rows': measured(build)}


def cache(batch, length, heads, kv_heads, head_dim):
  """One query a row, and full caches; [batch, heads, T, H] as models have."""
  return [
    torch.randn(
      batch, t, n, head_dim, device='cuda', dtype=torch.bfloat16
    ).transpose(1, 2)
    for t, n in ((1, heads), (length, kv_heads), (length, kv_heads))
  ]


def main():
  """Reads requests, one JSON object a line, until the input ends."""
  print(json.dumps({'version': f'PyTorch {torch.__version__}'}), flush=True)
  for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
    torch.cuda.empty_cache()


if __name__ == '__main__':
  main()
