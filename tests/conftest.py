"""Shared fixtures: one thread, tiny pairings, registry files, data beside the project."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

TINY = """
[pairing.tiny]
image_size = [64, 96]
fusion     = { name = "mvfuser", state_size = 2 }
enhancer   = { name = "mtenhancer", width = 32 }
pyramid    = { width = 32 }
prompt     = { context = 2 }

[pairing.tiny.vfm]
name    = "timm"
model   = "vit_tiny_patch16_224"
weights = "random"
options = { embed_dim = 32, depth = 3, num_heads = 2 }

[pairing.tiny.vlm]
name    = "open_clip"
model   = "ViT-B-16"
weights = "random"

[pairing.tiny.vlm.options]
embed_dim  = 24
vision_cfg = { layers = 2, width = 48, head_width = 16, patch_size = 16 }
text_cfg   = { layers = 1, width = 32, heads = 2 }

[pairing.tiny.decoder]
name         = "text_mask2former"
width        = 32
pixel_layers = 1
pixel_ffn    = 32
layers       = 1
ffn          = 32
num_points   = 64

# The same without what takes time.
[pairing.plain]
extends  = "tiny"
fusion   = "none"
enhancer = "none"
decoder  = "linear"

[pairing.lone]
extends = "plain"
vlm     = "none"

[recipe.tiny]
source       = "toy"
targets      = ["toy", "toy-night"]
steps        = 4
batch_size   = 1
lr           = 1e-3
warmup       = 1
save_every   = 2
workers      = 0
test_images  = 2
augmentation = { scale = [1.0, 1.5], min_pixels = 0 }

[dataset.toy]
name  = "streets"
size  = [64, 96]
count = 6

[dataset.toy-night]
extends = "toy"
domain  = "night"
"""


# The same examples every time; a busy machine is not a failure.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    # As often as it would, the collector walks all that torch and its libraries hold: a seventh of
    # the time.
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionstart(session: pytest.Session) -> None:
    if getattr(session.config.option, "dist", "no") == "no":  # not where others run the tests
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """With --cov: the total, above the closing line."""
    if not config.getoption("cov_source", None) or not config.pluginmanager.hasplugin("_cov"):
        return
    from coverage import Coverage
    from coverage.exceptions import NoDataError

    measured = Coverage()
    measured.load()
    with contextlib.suppress(NoDataError):
        total = measured.report(file=io.StringIO(), output_format="total")
        terminalreporter.write_line(f"coverage of lines and branches: {total:.1f} %")


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Every test starts from one seed, and no process group or precision outlives it."""
    import torch

    # torch.manual_seed also formats a traceback for each kind of accelerator that is not here.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        # Private: Accelerate has no public way to put its state away.
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="session")
def _parsed_once() -> Iterator[None]:
    """The same TOML is parsed once in a process: the shipped registry comes with every load."""
    from mfuser.config import tables

    loads, kept = tables.tomllib.loads, {}

    def remembered(text: str) -> Any:
        if text not in kept:
            kept[text] = pickle.dumps(loads(text))
        return pickle.loads(kept[text])

    stand_in = SimpleNamespace(**{**vars(tables.tomllib), "loads": remembered})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "tomllib", stand_in)
        yield


@pytest.fixture(scope="session")
def tiny_toml() -> str:
    """A registry of pairings that build in a fraction of a second, and a recipe of four steps.

    `tiny` has every part (unequal depths, widths, joint width), `plain` the same encoders and a
    linear decoder, `lone` one encoder.
    """
    return TINY


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """`tiny_toml` as a loaded registry."""
    from mfuser import load_registry

    path = tmp_path_factory.mktemp("registry") / "tiny.toml"
    path.write_text(TINY, "utf-8")
    return load_registry(path)


@pytest.fixture
def write_registry(tmp_path: Path) -> Callable[..., Path]:
    """Writes a registry file: `tiny_toml` (unless `bare`) and the text given."""

    def write(text: str = "", name: str = "registry.toml", bare: bool = False) -> Path:
        path = tmp_path / name
        path.write_text(text if bare else TINY + text, "utf-8")
        return path

    return write


@pytest.fixture
def load_plugin(tmp_path: Path) -> Iterator[Callable[[str, str], Any]]:
    """`tiny_toml` as a registry, with the plugin file NAME.py of the text given, imported anew."""
    from mfuser import load_registry

    loaded: set[str] = set()

    def load(name: str, text: str) -> Any:
        (tmp_path / "r.toml").write_text(TINY, "utf-8")
        (tmp_path / f"{name}.py").write_text(text, "utf-8")
        loaded.add(f"mfuser_plugin_{name}")
        sys.modules.pop(f"mfuser_plugin_{name}", None)
        return load_registry(tmp_path / "r.toml", plugins=[str(tmp_path / f"{name}.py")])

    yield load
    for name in loaded:
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """The folder of a finished run of `plain`; copy it before writing into it."""
    from mfuser.config.run import RunSpec
    from mfuser.engine.train import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    pairing, recipe = tiny.pairing("plain"), tiny.recipe("tiny")
    train(tiny, RunSpec.of(tiny, "plain", "tiny", pairing=pairing, recipe=recipe), folder)
    return folder


@pytest.fixture
def begin(tiny):  # type: ignore[no-untyped-def]
    """Makes the RunSpec of a tiny pairing, with settings of its recipe."""
    from mfuser.config.run import RunSpec

    def make(pairing: str = "plain", *recipe: str, **kwargs: Any) -> RunSpec:
        return RunSpec.of(
            tiny,
            pairing,
            "tiny",
            pairing=tiny.pairing(pairing),
            recipe=tiny.recipe("tiny", recipe),
            **kwargs,
        )

    return make


class Outcome:
    """The result of a command line."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def mfuser(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        from mfuser.cli import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and its driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def real() -> Path:
    """Real weights and photographs, which lie beside the project or nowhere."""
    path = ROOT.parent / "shared" / "real"
    if not path.is_dir():
        pytest.skip("../shared/real is not beside the project")
    return path
