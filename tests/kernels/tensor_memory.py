"""Tensor memory and its products, added to the simulator of Mosaic GPU.

JAX 0.10's simulator knows neither. Here tensor memory is a buffer like shared
memory, whose accesses are checked for races like any. A product is carried out
as late as it may be, when its thread waits at its barrier: who overwrites an
operand or reads a sum before that gets a wrong result or a race. And what is
asynchronous on the hardware has to be waited for:

* what a thread stored to shared memory, by `commit_smem` before a product or
  a copy to global memory reads it,
* what it stored to tensor memory, by `commit_tmem` before a load or product
  reads it,
* what it loads from tensor memory, by `wait_load_tmem` before a store or a
  product overwrites it.

Not checked: layouts (of registers, of lanes and columns, swizzles), what shapes
the hardware can multiply, and how much memory there is; these are checked where
the code is generated and compiled. Nor a barrier that orders no tensor cores,
and waits by another thread than the product's own.
"""

import collections
import contextlib
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src import callback, core
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.state import types as state_types

Interpreter = jaxpr_interpret.JaxprInterpreter
_interpret = Interpreter.interpret
_get, _swap = gpu_callbacks._get, gpu_callbacks._swap
_wait, _to_global = gpu_callbacks._barrier_wait, gpu_callbacks.copy_smem_to_gmem


SPACES = ('smem', 'tmem')


class Place(NamedTuple):
  """A part of a buffer, as one thread sees it."""

  thread: int
  buffer: tuple[int, ...]
  range: tuple

  @classmethod
  def of(cls, thread, key, transforms):
    return cls(int(thread), _ints(key), utils.to_range(transforms))

  def meets(self, other) -> bool:
    """Whether both have elements in common."""
    pairs = zip(self.range, other.range, strict=False)
    same = self.buffer == other.buffer
    return same and all(_meet(a, b) for a, b in pairs)


def _meet(a, b):
  a, b = (x if isinstance(x, slice) else slice(x, x + 1) for x in (a, b))
  return a.start < b.stop and b.start < a.stop


def _ints(array):
  return tuple(int(x) for x in np.asarray(array).reshape(-1))


class State:
  """What is under way, and not waited for yet."""

  def __init__(self):
    self.products = {}  # by barrier, in order
    # Places by thread: a thread only touches its own.
    self.stored = {kind: collections.defaultdict(list) for kind in SPACES}
    self.loading = collections.defaultdict(list)
    # Raised at the end: an error in one thread leaves the others waiting.
    self.faults = []

  def need(self, kind: str, place: Place, what: str) -> None:
    """It is a fault if a store to the place was not committed."""
    if any(place.meets(x) for x in self.stored[kind][place.thread]):
      self.faults.append(f'{what} before commit_{kind}: {place}')

  def free(self, place: Place, what: str) -> None:
    """It is a fault if the place is still being loaded."""
    if any(place.meets(x) for x in self.loading[place.thread]):
      self.faults.append(f'{what} before wait_load_tmem: {place}')


_state = State()


def _static(transforms):
  """Indices as numbers, and whether the two axes are swapped at the end."""
  transforms = gpu_callbacks._remove_noop_transforms(tuple(transforms))
  turned = bool(transforms) and isinstance(
    transforms[-1], state_types.TransposeTransform
  )
  transforms = transforms[:-1] if turned else transforms
  return jax.tree.map(int, transforms), turned


class Ref(NamedTuple):
  """A buffer's key and the transforms of it."""

  key: jax.Array
  transforms: tuple

  def settled(self):
    transforms, turned = _static(self.transforms)
    return Ref(np.asarray(self.key), transforms), turned


def _call(interpreter, eqn, token, function, result, *args):
  """Calls back with (where, *args) after what `token` stands for."""

  def run(token, device, grid, thread, *args):
    where = dict(
      device_id=device,
      grid_point_coords=grid,
      thread_id=thread,
      source_info=eqn.source_info,
    )
    out = function(where, *args)
    return token if result is None else (token, out)

  shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
  made = callback.io_callback(
    run,
    shape if result is None else (shape, result),
    token,
    jax.numpy.int32(interpreter.device_info.device_id),
    interpreter.grid_point_coords,
    interpreter.thread_id,
    *args,
  )
  return (made, []) if result is None else made


def _read(where, ref: Ref):
  token, value = _get(
    token=0,
    allocation_key_as_array=ref.key,
    transforms=ref.transforms,
    **where,
  )
  del token
  return np.asarray(value)


def _write(where, ref: Ref, value):
  where = dict(where, token=0, mask=None, val=value)
  _swap(allocation_key_as_array=ref.key, transforms=ref.transforms, **where)


def _load(where, ref: Ref):
  ref, turned = ref.settled()
  assert not turned
  place = Place.of(where['thread_id'], *ref)
  _state.need('tmem', place, 'a load')
  _state.loading[place.thread].append(place)
  return _read(where, ref)


def _store(where, ref: Ref, value):
  ref, turned = ref.settled()
  assert not turned
  place = Place.of(where['thread_id'], *ref)
  _state.free(place, 'a store')
  _state.stored['tmem'][place.thread].append(place)
  _write(where, ref, value)


class Product(NamedTuple):
  """A product that was started."""

  where: dict
  total: Ref
  a: Ref
  a_turned: bool
  b: Ref
  b_turned: bool
  accumulate: bool

  def run(self):
    a, b = _read(self.where, self.a), _read(self.where, self.b)
    a, b = (a.T if self.a_turned else a), (b.T if self.b_turned else b)
    made = np.matmul(a.astype(np.float32), b.astype(np.float32))
    if self.accumulate:
      made = made + _read(self.where, self.total)
    _write(self.where, self.total, made)


def _start(where, total: Ref, a: Ref, b: Ref, accumulate, barrier):
  total, turned = total.settled()
  assert not turned
  (a, a_turned), (b, b_turned) = a.settled(), b.settled()
  thread = where['thread_id']
  for ref in (a, b, total):
    for kind in SPACES:
      _state.need(kind, Place.of(thread, *ref), 'a product')
  _state.free(Place.of(thread, *total), 'a product')
  made = Product(where, total, a, a_turned, b, b_turned, bool(accumulate))
  _state.products.setdefault(_ints(barrier), []).append(made)


def _wait_for_products(token, device_id, grid, thread_id, key, **kwargs):
  for product in _state.products.pop(_ints(key), []):
    if int(product.where['thread_id']) != int(thread_id):
      raise NotImplementedError('a wait for the product of another thread')
    product.run()
    gpu_callbacks._barrier_arrive(0, device_id, grid, thread_id, key)
  return _wait(token, device_id, grid, thread_id, key, **kwargs)


def _noted_swap(*args, **kw):
  if args:  # a copy hands over names only
    _, _, _, thread, key, transforms, *_ = args
    place = Place.of(thread, key, _static(transforms)[0])
    _state.stored['smem'][place.thread].append(place)
  return _swap(*args, **kw)


def _checked_copy(**kw):
  ref, _ = Ref(
    kw['src_allocation_key_as_array'], kw['src_transforms']
  ).settled()
  _state.need('smem', Place.of(kw['thread_id'], *ref), 'a copy')
  return _to_global(**kw)


def _on_load(interpreter, eqn, token, ref, *leaves):
  ref = Ref(ref, jax.tree.unflatten(eqn.params['tree'], leaves))
  result = eqn.outvars[0].aval
  token, out = _call(interpreter, eqn, token, _load, result, ref)
  return token, [out]


def _on_store(interpreter, eqn, token, ref, value, *leaves):
  ref = Ref(ref, jax.tree.unflatten(eqn.params['tree'], leaves))
  return _call(interpreter, eqn, token, _store, None, ref, value)


def _on_product(interpreter, eqn, token, total, a, b, accumulate, *rest):
  if not eqn.params['arrive'] or eqn.params['scaled'] or eqn.params['sparse']:
    raise NotImplementedError('products without a barrier, scaled or sparse')
  barrier, *leaves = rest
  names = ('acc', 'a', 'b', 'barrier')
  trees = [
    eqn.params[f'{name}_transforms_tree'] or jax.tree.structure(())
    for name in names
  ]
  cut = np.cumsum([0, *(tree.num_leaves for tree in trees)])
  moves = [
    jax.tree.unflatten(tree, leaves[i:j])
    for tree, i, j in zip(trees, cut[:-1], cut[1:], strict=True)
  ]
  refs = [Ref(*x) for x in zip((total, a, b), moves[:3], strict=True)]
  barrier = jaxpr_interpret._get_barrier_allocation_key_from_inval(
    barrier, trees[3], leaves[cut[3] : cut[4]]
  )
  return _call(
    interpreter, eqn, token, _start, None, *refs, accumulate, barrier
  )


def _on_commit(places):
  def handler(interpreter, eqn, token):
    def forget(where):
      places()[int(where['thread_id'])].clear()

    return _call(interpreter, eqn, token, forget, None)

  return handler


HANDLERS = {
  primitives.async_load_tmem_p: _on_load,
  primitives.async_store_tmem_p: _on_store,
  primitives.tcgen05_mma_p: _on_product,
  primitives.commit_tmem_p: _on_commit(lambda: _state.stored['tmem']),
  primitives.commit_smem_p: _on_commit(lambda: _state.stored['smem']),
  primitives.wait_load_tmem_p: _on_commit(lambda: _state.loading),
}


def _interpret_with_tensor_memory(self, jaxpr, token, *args):
  """The simulator's loop over operations, with those that it lacks."""
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

  def read(x):
    return x.val if isinstance(x, core.Literal) else values[x]

  for eqn in jaxpr.eqns:
    outs = [x for x in eqn.outvars if not isinstance(x, core.DropVar)]
    handler = HANDLERS.get(eqn.primitive)
    if handler is None:
      names = [x for x in eqn.invars if not isinstance(x, core.Literal)]
      names = list(dict.fromkeys(names))
      one = core.Jaxpr((), names, outs, [eqn], eqn.effects, jaxpr.debug_info)
      token, results = _interpret(self, one, token, *map(read, names))
    else:
      token, results = handler(self, eqn, token, *map(read, eqn.invars))
    values.update(zip(outs, results, strict=True))
  return token, [read(x) for x in jaxpr.outvars]


def _allow(space):
  spaces = gpu_core.MemorySpace
  known = (None, spaces.GMEM, spaces.SMEM, spaces.REGS, spaces.TMEM)
  if space not in known:
    raise NotImplementedError(f'memory space {space}')


@contextlib.contextmanager
def simulated():
  """The simulator knows tensor memory inside; fails for what was forgotten."""
  global _state
  _state = State()
  with contextlib.ExitStack() as stack:
    for owner, name, replacement in (
      (Interpreter, 'interpret', _interpret_with_tensor_memory),
      (jaxpr_interpret, '_raise_if_unsupported_memory_space', _allow),
      (gpu_callbacks, '_barrier_wait', _wait_for_products),
      (gpu_callbacks, '_swap', _noted_swap),
      (gpu_callbacks, 'copy_smem_to_gmem', _checked_copy),
    ):
      stack.enter_context(mock.patch.object(owner, name, replacement))
    yield
  assert not _state.faults, _state.faults[0]
  assert not _state.products, 'a product that nobody waited for'
