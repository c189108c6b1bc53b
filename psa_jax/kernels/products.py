"""The products of a kernel, on the tensor cores that it is built for."""

from psa_jax.kernels import tcgen05, wgmma
from psa_jax.kernels import warpgroups as wg


def scratch(sizes: wg.Sizes):
  """What to allocate for the products of a block of threads."""
  return _kind(sizes).scratch(sizes)


def of(sizes: wg.Sizes, scratch, me) -> tcgen05.Products | wgmma.Products:
  """The products of warpgroup `me`, which has its part of `scratch`."""
  return _kind(sizes).of(sizes, scratch, me)


def _kind(sizes):
  return (tcgen05 if sizes.cores.blackwell else wgmma).Products
