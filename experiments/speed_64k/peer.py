"""PyTorch's attention as a timing server; runs in its own environment.

Reads one JSON request a line on standard input, `{"what": "forward", "T":
65536, "H": 64}`, and answers with the seconds that one call took. It keeps its
inputs between requests, so that `run.py` can interleave it with others.
"""

import json
import sys
import time

import torch
from torch.nn import functional as F


def main():
  """Serves until standard input ends."""
  torch.set_num_threads(int(sys.argv[1]))
  print(json.dumps({'version': f'PyTorch {torch.__version__}'}), flush=True)
  shape, inputs = None, []
  for line in sys.stdin:
    request = json.loads(line)
    if shape != (request['T'], request['H']):
      shape = request['T'], request['H']
      torch.manual_seed(0)
      inputs = [torch.randn(1, 1, *shape, requires_grad=True) for _ in range(3)]
    began = time.perf_counter()
    if request['what'] == 'forward':
      with torch.no_grad():
        F.scaled_dot_product_attention(*inputs, is_causal=True)
      seconds = time.perf_counter() - began
    else:
      out = F.scaled_dot_product_attention(*inputs, is_causal=True)
      grad = torch.ones_like(out)
      began = time.perf_counter()
      torch.autograd.grad(out, inputs, grad)
      seconds = time.perf_counter() - began
    print(json.dumps({'seconds': seconds}), flush=True)


if __name__ == '__main__':
  main()
