"""The state of an installation: versions, devices, plugins, and missing optional parts."""

from __future__ import annotations

import os
import platform
from importlib import import_module, metadata, util

from mfuser.plugins.discovery import installed_components

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "accelerate",
    "pluggy",
    "pydantic",
    "numpy",
)
EXTRAS = {
    **{"numba": "cpu", "transformers": "hf", "mamba_ssm": "mamba"},
    **{name: name for name in ("tensorboard", "wandb", "mlflow", "ray")},
    **{"submitit": "slurm", "gradio": "app"},
}


def examine() -> dict[str, dict[str, str]]:
    """Sections of name -> finding."""
    import torch

    from mfuser.version import __version__

    report: dict[str, dict[str, str]] = {
        "versions": {"mfuser": __version__, "python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
        "devices": {
            "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
            "gpu": ", ".join(
                torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
            )
            or "none that torch sees",
        },
        "extras": {
            module: "installed"
            if util.find_spec(module)
            else f'missing: pip install "mfuser[{extra}]"'
            for module, extra in EXTRAS.items()
        },
    }
    components = installed_components()
    report["plugins"] = {b.plugin: f"failed to load: {b.cause}" for b in components.broken} or {
        "all": "loaded"
    }
    # Plugins may bring checks of their own; the framework names none of them.
    for entry in sorted(metadata.entry_points(group="mfuser.cli.doctor"), key=lambda e: e.name):
        module, _, function = entry.value.partition(":")
        report[entry.name] = dict(getattr(import_module(module), function)())
    return report
