"""Not written yet."""

from __future__ import annotations

import torch


def unusable() -> str:
    return "not written yet"


def refuses(device: str, dtype: torch.dtype, initial_state: bool) -> str:
    return ""
