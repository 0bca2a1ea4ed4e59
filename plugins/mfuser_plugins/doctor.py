"""The entry of the selective scan in `mfuser doctor`."""

from __future__ import annotations

from mfuser_kernels import backends


def scan() -> dict[str, str]:
    """Backend -> "usable", or why it is not."""
    return {b.name: "usable" if b.usable else b.reason for b in backends()}
