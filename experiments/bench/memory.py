"""Bytes that a program or a process takes. Imports neither JAX nor PyTorch."""

import resource


def temporary_bytes(compiled) -> int:
  """What XLA says that a compiled program needs beside inputs and outputs."""
  analysis = compiled.memory_analysis()
  assert analysis is not None, 'this backend gives no account of memory'
  return analysis.temp_size_in_bytes


def peak_bytes() -> int:
  """Most memory that this process has had.

  Not `getrusage` where Linux tells better: its number is inherited from the
  process that started this one.
  """
  try:
    with open('/proc/self/status') as file:
      lines = [line for line in file if line.startswith('VmHWM')]
    return int(lines[0].split()[1]) * 1024
  except (OSError, IndexError):
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
