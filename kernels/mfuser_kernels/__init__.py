"""The selective scan for any device, from pip alone: only torch is required, the rest is optional.

>>> from mfuser_kernels import selective_scan
>>> y = selective_scan(u, delta, A, B, C, D, layout="bld")
"""

from mfuser_kernels.errors import ScanError
from mfuser_kernels.scan.api import selective_scan
from mfuser_kernels.scan.backends import Backend, backends

__all__ = ["Backend", "ScanError", "backends", "selective_scan"]
