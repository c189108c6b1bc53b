"""PyTorch contenders as a timing server; runs in its own environment.

Started by `peers.py` with three words: NAME, a key of `CONTENDERS`, THREADS,
and GIB, the memory that the process may take. Prints one JSON line with the
version, then reads one JSON request a line on standard input,

  {"what": "forward", "T": 65536, "calls": 1, "threads": 2}

and answers with the seconds of one call, or with an error if it cannot be
made. `threads` may be left out for THREADS, `H`, the width of a head, for 64;
`heads` are query heads that share one of keys and values, 1 if left out; `what`
is `forward`, `backward`,
`forward+backward`, `decode` or `peak` (bytes of memory that the process has
had at most). Inputs stay between requests, so that another program can
interleave several of these.
"""

import importlib.metadata
import json
import resource
import sys
import time

import torch
from torch.nn import functional as F

from experiments.bench import memory


class Sdpa:
  """`scaled_dot_product_attention`, [B, N, T, H] with one kv head."""

  name = f'PyTorch {torch.__version__}'
  sizes = 'one head'

  def __init__(self, T, H, heads=1):
    """Makes inputs; the graph of a backward pass is kept once it is made."""
    self.inputs = [
      torch.randn(1, n, T, H, requires_grad=True) for n in (heads, 1, 1)
    ]
    self.grad = torch.randn(1, heads, T, H)
    self.out = None

  def attend(self):
    """The output, with a graph if gradients are on."""
    q, k, v = self.inputs
    k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))  # no copy
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

  def forward(self):
    """Without a graph."""
    with torch.no_grad():
      self.attend()

  def backward(self):
    """Gradients of the kept graph."""
    torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)

  def prepare_backward(self):
    """Makes the graph that `backward` uses; not timed."""
    if self.out is None:
      self.out = self.attend()

  def both(self):
    """A forward pass with a graph, and its gradients."""
    torch.autograd.grad(self.attend(), self.inputs, self.grad)

  def decode(self):
    """The last query over all keys."""
    q, k, v = self.inputs
    with torch.no_grad():
      F.scaled_dot_product_attention(q[:, :, -1:], k, v)


class NativeSparse:
  """The whole NSA module, projections and gates included.

  The paper's sizes: compression blocks of 32 every 16, selection of 16 blocks
  of 64, a window of 512; one head, model width = head width.
  """

  name = 'native-sparse-attention-pytorch'
  sizes = (
    'whole module, one head: l=32 d=16, n=16 blocks of 64 (and the own), w=512'
  )
  L, D, BLOCK, SELECTED, W = 32, 16, 64, 16, 512

  def __init__(self, T, H, heads=1):
    """Makes the module and its input."""
    import native_sparse_attention_pytorch as nsa

    self.module = nsa.SparseAttention(
      dim=heads * H,
      dim_head=H,
      heads=heads,
      kv_heads=1,
      causal=True,
      sliding_window_size=self.W,
      compress_block_size=self.L,
      compress_block_sliding_stride=self.D,
      selection_block_size=self.BLOCK,
      num_selected_blocks=self.SELECTED,
    )
    self.width = H
    self.x = torch.randn(1, T, heads * H, requires_grad=True)
    self.grad = torch.randn(1, T, heads * H)
    weights = [p for p in self.module.parameters() if p.requires_grad]
    self.leaves = [self.x, *weights]
    self.out = None

  def forward(self):
    """Without a graph."""
    with torch.no_grad():
      self.module(self.x)

  def prepare_backward(self):
    """A graph for one backward pass: keeping it would double the memory."""
    self.out = self.module(self.x)

  def backward(self):
    """Gradients of input and weights."""
    self.both(self.out)
    self.out = None

  def both(self, out=None):
    """A forward pass with a graph, and its gradients."""
    out = self.module(self.x) if out is None else out
    torch.autograd.grad(out, self.leaves, self.grad, allow_unused=True)

  def decode(self):
    """One token over a cache of random keys of the right shapes."""
    with torch.no_grad():
      self.module(self.x[:, -1:], cache=self.cache(), return_cache=True)

  def cache(self):
    """All keys but the last; the last window of compression is part full."""
    if not hasattr(self, 'kept'):
      T, H = self.x.shape[1], self.width

      def pair(n):
        return torch.randn(1, 1, n, H), torch.randn(1, 1, n, H)

      part = self.L - self.D + (T - 1) % self.D
      self.kept = pair(T - 1), (pair((T - 1) // self.D), pair(part))
    return self.kept


CONTENDERS = {'sdpa': Sdpa, 'nsa': NativeSparse}


def seconds(contender, what, calls):
  """Seconds of one of `calls` calls."""
  total = 0.0
  for _ in range(calls):
    if what == 'backward':
      contender.prepare_backward()
    function = contender.both if what == 'forward+backward' else None
    function = function or getattr(contender, what)
    began = time.perf_counter()
    function()
    total += time.perf_counter() - began
  return total / calls


def answer(kept, request, make):
  """The reply to a request; `kept` holds the contender of the last length."""
  if torch.get_num_threads() != request['threads']:
    torch.set_num_threads(request['threads'])
  if request['what'] == 'peak':
    return {'bytes': memory.peak_bytes()}
  shape = request['T'], request.get('H', 64), request.get('heads', 1)
  try:
    if shape not in kept:
      kept.clear()
      torch.manual_seed(0)
      kept[shape] = make(*shape)
    calls = request.get('calls', 1)
    return {'seconds': seconds(kept[shape], request['what'], calls)}
  except (RuntimeError, MemoryError) as error:
    kept.clear()
    return {'error': (str(error) or repr(error)).split('\n')[0]}


def about(make):
  """Version of the package and what is run."""
  version = make.name
  if make is NativeSparse:
    version = f'{importlib.metadata.version(make.name)} on {Sdpa.name}'
  return {'version': version, 'sizes': make.sizes}


def main():
  """Serves until standard input ends."""
  name, threads, gib = sys.argv[1:]
  torch.set_num_threads(int(threads))
  limit = int(float(gib) * 2**30)
  resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
  make = CONTENDERS[name]
  try:
    print(json.dumps(about(make)), flush=True)
  except ImportError as error:
    print(json.dumps({'error': str(error)}), flush=True)
    return
  kept = {}
  for line in sys.stdin:
    request = {'threads': int(threads), **json.loads(line)}
    print(json.dumps(answer(kept, request, make)), flush=True)


if __name__ == '__main__':
  main()
