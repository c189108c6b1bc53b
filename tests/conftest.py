"""What every test runs under; set before anything imports JAX.

* CPU with eight fake devices, so that every mesh can be built. PJRT_NPROC is
  needed with them: on a machine with fewer cores than devices, a collective
  otherwise waits for ever for a thread (JAX 0.10).
* One compile cache for all workers and runs, in `.jax_cache`; processes that
  tests start inherit it, with the devices.
* One data folder a session, outside the user's own.
* Shapes and types of psa_jax's annotations are checked at run time by
  jaxtyping and beartype; `PSA_JAX_TYPECHECK=0` turns that off.
* A broadcast between arrays of different rank is an error.
* XLA compiles without LLVM's optimisation, which took most of the suite's
  time. PSA_JAX_TEST_OPTIMIZED=1 compiles as `make train` does. A flag that
  XLA_FLAGS already names is left as it is.
* `tests/tiers.py` says which tests run.
* A process that has compiled so much that it nears the kernel's limit on
  memory mappings drops its programs: beyond it JAX ends with a fault.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 8

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['PJRT_NPROC'] = str(2 * DEVICES)
XLA_FLAGS = {'xla_force_host_platform_device_count': DEVICES}
if os.environ.get('PSA_JAX_TEST_OPTIMIZED') != '1':
  XLA_FLAGS |= {
    'xla_backend_optimization_level': 0,
    'xla_cpu_parallel_codegen_split_count': 1,
  }
  # XLA ends the process at a flag that it does not know, and that of jaxlib
  # 0.12 knows this one no more.
  if importlib.metadata.version('jaxlib').startswith('0.10.'):
    XLA_FLAGS['xla_cpu_use_fusion_emitters'] = 'false'
given = os.environ.get('XLA_FLAGS', '')  # workers inherit it
os.environ['XLA_FLAGS'] = ' '.join(
  [given, *(f'--{k}={v}' for k, v in XLA_FLAGS.items() if k not in given)]
).strip()
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(ROOT / '.jax_cache')
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

IS_WORKER = 'PYTEST_XDIST_WORKER' in os.environ
if not IS_WORKER:  # a session's first process; its workers inherit the folder
  os.environ['PSA_JAX_DATA_DIR'] = tempfile.mkdtemp(prefix='psa_jax_tests_')

if os.environ.get('PSA_JAX_TYPECHECK', '1') != '0':
  import jaxtyping

  jaxtyping.install_import_hook('psa_jax', 'beartype.beartype')

import hypothesis  # noqa: E402
import jax  # noqa: E402
from absl import flags  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

from tests.tiers import (  # noqa: E402, F401
  pytest_addoption,
  pytest_collection_modifyitems,
  pytest_configure,
  pytest_runtest_logreport,
  pytest_runtest_logstart,
  pytest_runtest_makereport,
  pytest_sessionfinish,
  pytest_terminal_summary,
)

flags.FLAGS.mark_as_parsed()

# No deadline and no complaint about slow data: a shared machine is slow.
hypothesis.settings.register_profile(
  'psa_jax',
  deadline=None,
  derandomize=True,
  database=None,
  max_examples=20,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('psa_jax')


MAPS = pathlib.Path('/proc/self/maps')
MOST_MAPS = 30_000  # the limit is 65,530 on most machines
_since_count = 0


def pytest_runtest_teardown():
  """Counts the memory mappings after every tenth test."""
  global _since_count
  _since_count += 1
  if _since_count < 10 or not MAPS.exists():
    return
  _since_count = 0
  if MAPS.read_bytes().count(b'\n') > MOST_MAPS:
    jax.clear_caches()
    gc.collect()


def pytest_unconfigure():
  """Removes the session's data folder, once, after the workers are gone."""
  if not IS_WORKER:
    shutil.rmtree(os.environ['PSA_JAX_DATA_DIR'], ignore_errors=True)
