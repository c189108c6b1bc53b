"""Numbers from what the compilers leave behind: HLO, LLO dumps, ptxas.

Everything here reads text, so that it is tested without a compiler.
"""

import collections
import pathlib
import re
import subprocess
from collections.abc import Iterable, Mapping

# A program's kernels of its own are counted, where it has any, and not what
# XLA puts round them.
PALLAS = 'tpu_custom_call'
LLO = re.compile(r'\d+-(.+)-\d+-final_hlo-static-per-bundle-utilization\.txt')
# What XLA writes for an operation that it cannot time.
UNKNOWN_CYCLES = 2**64 - 1


def cycles(hlo: str) -> int:
  """The sum of XLA's estimates for its own operations in a TPU program.

  A loop's body counts once, a Pallas kernel not at all.
  """
  found = map(int, re.findall(r'"estimated_cycles":"(\d+)"', hlo))
  return sum(number for number in found if number != UNKNOWN_CYCLES)


def pallas_kernels(hlo: str) -> list[str]:
  """Names of the Pallas kernels of a TPU program."""
  return re.findall(
    rf'^\s*(?:ROOT )?%?([^\s%]+) = [^\n]*custom_call_target="{PALLAS}"',
    hlo,
    re.MULTILINE,
  )


def bundles(utilization: str) -> dict[str, int]:
  """Instructions of one kernel, from its `per-bundle-utilization` file.

  Args:
    utilization: line 2 names the units of a core, line 3 says how many there
      are; after line 4 each row is one bundle (a very long instruction) with
      how many of each it uses.

  Returns:
    `bundles`, `mxu` slots, and register `spills` and `fills`; static counts, a
    loop's body once.
  """
  lines = utilization.split('\n')
  names = [name.strip() for name in lines[1].split(',')]
  rows = [[int(n) for n in line.split()] for line in lines[4:] if line.strip()]
  if any(len(row) != len(names) for row in rows):
    raise ValueError(f'rows do not have the {len(names)} columns {names}')
  used = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=False))
  return {
    'bundles': len(rows),
    'mxu': used.get('MXU', 0),
    'spills': used.get('VSTORE:SPILL', 0),
    'fills': used.get('VLOAD:FILL', 0),
  }


def read_llo(folder: pathlib.Path, kernels: Iterable[str]) -> dict[str, int]:
  """The sum of `bundles` over these kernels, or over all if there are none."""
  wanted = set(kernels)
  total = collections.Counter()
  for path in folder.iterdir():
    match = LLO.fullmatch(path.name)
    if match and (not wanted or match[1] in wanted):
      total.update(bundles(path.read_text()))
  return dict(total)


def ptxas(report: str) -> dict[str, int]:
  """Registers and spills from what `ptxas -v` says of one or more kernels.

  Returns:
    `registers` a thread and statically allocated `shared_bytes` a block of the
    hungriest kernel, and `spill_bytes` stored and loaded by all of them.
  """
  registers = [int(n) for n in re.findall(r'Used (\d+) registers', report)]
  shared = [int(n) for n in re.findall(r'(\d+) bytes smem', report)]
  spills = re.findall(r'(\d+) bytes spill (?:stores|loads)', report)
  return {
    'registers': max(registers, default=0),
    'shared_bytes': max(shared, default=0),
    'spill_bytes': sum(map(int, spills)),
  }


def read_ptx(folders: Mapping[str, pathlib.Path], assembler, arch):
  """`ptxas` of all PTX files of the first folder that has any.

  Args:
    folders: where kernels of a kind were dumped to, ours first.
    assembler: the program `ptxas`.
    arch: for example `sm_90a`.
  """
  for folder in folders.values():
    files = sorted(folder.rglob('*.ptx')) if folder.exists() else []
    if files:
      reports = [_assemble(assembler, arch, path) for path in files]
      found = ptxas('\n'.join(reports))
      asked = [_asked_at_launch(path) for path in files]
      found['shared_bytes'] = max(found['shared_bytes'], *asked)
      return {**found, 'kernels': len(files)}
  return {}


def launch_shared(passes: str) -> int:
  """Shared memory that a Mosaic kernel asks for when it is launched.

  Args:
    passes: the log of compiler passes that Mosaic leaves beside the PTX.
  """
  found = re.findall(r'dynamic_shared_memory_size %c(\d+)_i32', passes)
  return max(map(int, found), default=0)


def _asked_at_launch(path) -> int:
  log = path.with_suffix('.mlir-passes.log')
  return launch_shared(log.read_text()) if log.exists() else 0


def _assemble(assembler, arch, path) -> str:
  done = subprocess.run(
    [assembler, '-v', f'-arch={arch}', path, '-o', '/dev/null'],
    capture_output=True,
    text=True,
    check=True,
  )
  return done.stdout + done.stderr


def reason(error: Exception) -> str:
  """The first line of an error, without what differs from run to run."""
  line = (str(error).strip() or type(error).__name__).split('\n')[0]
  refusal = re.fullmatch(
    r'implementation .* cannot run here: (.*); use .*', line
  )
  line = refusal[1] if refusal else line
  line = re.sub(r'0x[0-9a-f]+', '0x...', line)
  line = re.sub(r'/[\w./-]*/([\w.-]+)', r'\1', line)
  return line[:200]
