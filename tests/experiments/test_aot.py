"""What `make aot` reads out of dumps, and what it says of a change.

The samples are cut from real dumps. No compiler is needed here; that the table
can be built is checked by tracing its functions on this machine.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments.aot import cases, child, compare, measure, table
from psa_jax.kernels import dense

pytestmark = pytest.mark.tier('default')

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'aot'
# From libtpu 0.0.42.1; its misspelling is its own.
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
2 0 1 0 0 1 0 0 0 0
1 0 0 0 0 0 2 0 1 1

"""
HLO = """
  %fusion.1 = bf16[8]{0} fusion(%p), backend_config={"estimated_cycles":"100"}
  %splash_fwd.1 = (f32[8], /*index=5*/bf16[8]{0}) custom-call(%fusion.1, %i), \
custom_call_target="tpu_custom_call", backend_config={"body":"TUz"}
  %other = f32[8]{0} custom-call(%a), custom_call_target="Sharding"
  ROOT %rows.2 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %sum = f32[] add(%a, %b), backend_config={"estimated_cycles":"23"}
  %late = f32[] add(%a, %b), \
backend_config={"estimated_cycles":"18446744073709551615"}
"""
# From ptxas 13.5.
PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 8 bytes stack frame
ptxas info    : Compiling entry function 'fusion_2' for 'sm_90a'
ptxas info    : Function properties for fusion_2
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 4224 bytes smem
"""
# From the MLIR that Mosaic GPU of JAX 0.10.2 dumps.
LAUNCH = """
gpu.launch blocks(%a) dynamic_shared_memory_size %18 {
gpu.launch_func blocks in (%a) dynamic_shared_memory_size %c152632_i32 args(%b)
"""


def test_bundles_counts_the_rows_of_a_kernel():
  want = {'bundles': 3, 'mxu': 3, 'spills': 1, 'fills': 2}
  assert measure.bundles(UTILIZATION) == want


def test_bundles_refuses_another_format():
  with pytest.raises(ValueError, match='10 columns'):
    measure.bundles(UTILIZATION.replace('0 0 0 0 0 0 0 0 0 2', '0 2'))


def test_kernels_and_cycles_of_a_program():
  assert measure.pallas_kernels(HLO) == ['splash_fwd.1', 'rows.2']
  assert measure.cycles(HLO) == 123


def test_llo_of_pallas_kernels_or_else_of_everything(tmp_path):
  ending = 'final_hlo-static-per-bundle-utilization.txt'
  for name in ('1-mine.1-70', '2-fusion-64', '3-<late-finalization>-66'):
    (tmp_path / f'{name}-{ending}').write_text(UTILIZATION)
  early = ending.replace('final', 'pre-delay')
  (tmp_path / f'1-mine.1-68-{early}').write_text(UTILIZATION)
  assert measure.read_llo(tmp_path, ['mine.1'])['bundles'] == 3
  assert measure.read_llo(tmp_path, [])['bundles'] == 9
  assert measure.read_llo(tmp_path, ['absent']) == {}


def test_ptxas_takes_the_hungriest_kernel():
  assert measure.ptxas(PTXAS) == {
    'registers': 168,
    'shared_bytes': 4224,
    'spill_bytes': 16,
  }


def test_ptx_of_ours_comes_before_that_of_xla(tmp_path):
  assembler = tmp_path / 'ptxas'
  assembler.write_text(f"#!/bin/sh\ncat <<'E'\n{PTXAS}\nE\n")
  assembler.chmod(0o755)
  folders = {'ours': tmp_path / 'mosaic', 'xla': tmp_path / 'xla'}
  assert measure.read_ptx(folders, assembler, 'sm_90a') == {}
  folders['xla'].mkdir()
  for name in ('a.ptx', 'b.ptx'):
    (folders['xla'] / name).touch()
  found = measure.read_ptx(folders, assembler, 'sm_90a')
  assert (found['kernels'], found['registers']) == (2, 168)
  folders['ours'].mkdir()
  (folders['ours'] / 'c.ptx').touch()
  (folders['ours'] / 'c.mlir-passes.log').write_text(LAUNCH)
  found = measure.read_ptx(folders, assembler, 'sm_90a')
  assert (found['kernels'], found['shared_bytes']) == (1, 152632)


@pytest.mark.parametrize(
  'message, want',
  [
    (
      "implementation 'cudnn' cannot run here: no H = 60; use 'xla' or 'auto'",
      'no H = 60',
    ),
    ('at 0x7f12ab in /some/where/file.py:3\nand more', 'at 0x... in file.py:3'),
    ('', 'ValueError'),
  ],
)
def test_reasons_are_the_same_in_every_run(message, want):
  assert measure.reason(ValueError(message)) == want


def row(**numbers):
  return {'compiled': True, 'bundles': 100, 'flops': 7} | numbers


def refused(reason='too wide'):
  return {'compiled': False, 'reason': reason}


@pytest.mark.parametrize(
  'old, new, line',
  [
    (row(), row(bundles=150), 'worse: v5e, x: bundles 100 -> 150 (+50.0 %)'),
    (row(), row(bundles=50), 'better: v5e, x: bundles 100 -> 50 (-50.0 %)'),
    (row(spills=0), row(spills=2), 'worse: v5e, x: spills 0 -> 2'),
    (row(), row(flops=8), 'changed: v5e, x: flops 7 -> 8'),
    (row(), row(mxu=8), 'changed: v5e, x: mxu nothing -> 8'),
    (row(), refused(), 'worse: v5e, x: compiled, and now: too wide'),
    (refused(), row(), 'better: v5e, x: compiles, and did not: too wide'),
    (refused(), refused('odd'), 'changed: v5e, x: too wide -> odd'),
    (None, row(), 'changed: v5e, x: is not recorded yet'),
    (row(), None, 'worse: v5e, x: is recorded and was not tried'),
  ],
)
def test_a_difference_is_named(old, new, line):
  golden, now = ({'v5e': {} if x is None else {'x': x}} for x in (old, new))
  assert compare.differences(golden, now) == [line]


def test_nothing_is_said_of_what_is_equal_and_the_worst_comes_first():
  golden = {'v5e': {'a': row(), 'b': row()}, 'v4': {'a': row()}}
  assert compare.differences(golden, golden) == []
  now = {'v5e': {'a': row(), 'b': refused()}, 'v4': {'a': row(bundles=1)}}
  first, second = compare.differences(golden, now)
  assert first.startswith('worse: v5e, b') and second.startswith('better: v4')


def test_other_versions_compare_only_what_compiles():
  golden = {'v5e': {'a': row(), 'b': row(), 'c': refused()}}
  now = {'v5e': {'a': row(bundles=1), 'b': refused(), 'c': refused('odd')}}
  (line,) = compare.differences(golden, now, numbers=False)
  assert line.startswith('worse: v5e, b')


def test_what_an_op_does_not_have_is_left_out(monkeypatch):
  case = next(case for case in cases.CASES if case.op == 'dense')
  assert list(cases.tried(case, 'tpu')) == ['pallas_tpu', 'xla']
  assert list(cases.tried(case, 'gpu')) == ['cudnn', 'xla']
  # A copy: an entry that is put back would come last, where `auto` looks last.
  fewer = {k: v for k, v in dense.IMPLEMENTATIONS.items() if k != 'pallas_tpu'}
  monkeypatch.setattr(dense, 'IMPLEMENTATIONS', fewer)
  assert list(cases.tried(case, 'tpu')) == ['xla']
  assert list(cases.tried(case._replace(op='unheard_of'), 'tpu')) == []


@pytest.mark.parametrize('case', cases.CASES, ids=lambda case: case.name)
def test_every_case_traces(case):
  if 'xla' not in cases.tried(case, 'tpu'):
    pytest.skip(f'there is no {case.op} here')
  function, args = case.build('xla')
  args = [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for s, d in args]
  out = jax.eval_shape(function, *args)
  if 'backward' in case.name:
    grads = out[1]
    assert [g.shape for g in grads] == [a.shape for a in args[:3]]


def test_machines_are_described_to_the_compilers(tmp_path):
  gpu, tpu = cases.MACHINES['sm_100a'], cases.MACHINES['v5e']
  assert gpu.arch == 'sm_100a'
  assert 'major: 10 feature' in gpu.gpu_config
  assert '{' + '{' not in gpu.gpu_config
  env = child.environment(tpu, tmp_path)
  assert env['ALLOW_MULTIPLE_LIBTPU_LOAD'] == '1'
  assert str(tmp_path) in env['LIBTPU_INIT_ARGS']


def test_the_page_shows_what_is_recorded():
  golden = json.loads((FOLDER / 'golden.json').read_text())
  assert set(golden['results']) == set(cases.MACHINES)
  text = table.text(golden['results'], golden['versions'])
  kernels = FOLDER.parents[1] / 'psa_jax' / 'kernels'
  for folder in (FOLDER, kernels):
    assert text in (folder / 'README.md').read_text()


def test_the_table_points_to_reasons():
  results = {
    'v5e': {'a': row(temp_bytes=3 * 2**20, spills=5), 'b': refused()},
    'sm_90a': {'a': refused(), 'b': row()},
  }
  text = table.text(results, {'jax': '0.10.2'})
  assert '| a | yes, 5 spilled | no (1) |' in text
  assert '| b | no (1) | yes |' in text
  assert '1. too wide' in text and '| a | 3 |' in text
