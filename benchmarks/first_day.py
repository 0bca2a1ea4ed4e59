"""The first day with own photographs, by the clock: docs/own-data.md states what this prints.

    python benchmarks/first_day.py [--steps N] [--out FOLDER]            from a folder to ONNX
    python benchmarks/first_day.py listing [--files 25000]               mfuser data check
    python benchmarks/first_day.py report [--images 500]                 size and start of the page
    python benchmarks/first_day.py figure --run RUN                      docs/visualize.jpg
    python benchmarks/first_day.py half --run RUN                        masks in half precision

The first draws 40 photographs of gardens, of 1280x960, with masks of five classes; or takes
CamVid's (--camvid FOLDER with images/ and labels/), whose ids it turns into five classes of its
own. It runs six commands, none of them an editor, and ends with what they took and left. `report`
needs selenium and Chromium, and CamVid (../shared/real/camvid). Check the load of the machine first
(`uptime`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PHOTOS, NEW = 40, 4
"""Photographs with masks, and further ones without."""
LIMIT = 600.0
"""Seconds that the six commands may take on two quiet cores."""
GARDEN = {
    "sky": (120, 170, 230), "grass": (90, 150, 60), "path": (190, 170, 140), "shed": (150, 60, 50),
    "tree": (30, 80, 40),
}  # fmt: skip
"""Classes and their colors."""
CLASSES = "sky,house,ground,tree,traffic"
IDS = np.full(256, 255, np.uint8)
IDS[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]] = [0, 1, 1, 2, 2, 3, 1, 1, 4, 4, 4]
"""CamVid's sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist."""


def photographs(camvid: Path, folder: Path) -> None:
    """Images as JPEG and masks of the five classes, of days and places alike."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    found = sorted((camvid / "images").iterdir())
    for path in found[:: len(found) // PHOTOS][:PHOTOS]:
        with Image.open(path) as image:
            image.convert("RGB").save(folder / "images" / f"{path.stem}.jpg", quality=92)
        with Image.open(camvid / "labels" / path.with_suffix(".png").name) as mask:
            Image.fromarray(IDS[np.asarray(mask)]).save(folder / "masks" / f"{path.stem}.png")


def garden(seed: int, size: tuple[int, int] = (1280, 960)) -> tuple[Image.Image, Image.Image]:
    """A drawn photograph and its mask of ids."""
    rng = np.random.default_rng(seed)
    mask = Image.new("L", size, 0)
    pen, (width, height) = ImageDraw.Draw(mask), size
    horizon = int(height * rng.uniform(0.35, 0.55))
    pen.rectangle((0, horizon, width, height), fill=1)
    x = rng.uniform(0.2, 0.8) * width
    far, near = 0.03 * width, 0.2 * width
    ends = [(x - far, horizon), (x + far, horizon), (x + near, height), (x - near, height)]
    pen.polygon(ends, fill=2)
    for _ in range(2):
        x, wide = rng.uniform(0, width), rng.uniform(0.1, 0.2) * width
        pen.rectangle((x, horizon - 0.2 * height, x + wide, horizon + 0.1 * height), fill=3)
        x, r = rng.uniform(0, width), rng.uniform(0.06, 0.11) * width
        pen.ellipse((x - r, horizon - 2 * r, x + r, horizon + 0.06 * height), fill=4)
    ids = np.asarray(mask)
    tint = np.asarray(list(GARDEN.values())) + rng.normal(0, 12, (len(GARDEN), 3))
    light = rng.uniform(0.7, 1.1) + rng.normal(0, 0.07, (*ids.shape, 1))
    return Image.fromarray((tint[ids] * light).clip(0, 255).astype(np.uint8)), mask


def gardens(folder: Path, new: Path) -> None:
    """Drawn photographs as JPEG with masks as PNG, and further photographs."""
    for part in (folder / "images", folder / "masks", new):
        part.mkdir(parents=True)
    for seed in range(PHOTOS + NEW):
        picture, mask = garden(seed)
        known = seed < PHOTOS
        where = folder / "images" if known else new
        picture.save(where / f"{seed:03}.jpg", quality=92)
        if known:
            mask.save(folder / "masks" / f"{seed:03}.png")


def timed(arguments: list[str], where: Path) -> tuple[float, float]:
    """Run `mfuser …` in a folder; print and return wall and processor time. Raises if it fails."""
    program = Path(sys.executable).with_name("mfuser")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([str(program), *arguments], cwd=where, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    wall = time.monotonic() - started
    print(f"mfuser {' '.join(arguments)}: {wall:.0f} s, {cpu:.0f} s of processors", flush=True)
    return wall, cpu


def commands(camvid: Path | None, out: Path, steps: int | None) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if camvid is None:
        gardens(out / "photos", out / "new")
        classes, scale = ",".join(GARDEN), "0.4"  # as data new says
    else:
        photographs(camvid, out / "photos")
        (out / "new").symlink_to("photos/images")
        classes, scale = CLASSES, "1"
    few = ["--steps", str(steps)] if steps else []
    done = [
        timed(arguments, out)
        for arguments in (
            ["data", "new", "photos", "--name", "street", "--classes", classes],
            ["data", "check", "street"],
            ["train", "street", *few],
            ["predict", "runs/street", "new", "--out", "masks", "--scale", scale],
            ["visualize", "pca", "runs/street", "new"],
            ["export", "runs/street"],
        )
    ]
    run = out / "runs/street"
    for made in ("report.html", "report.md", "model.onnx"):
        print(f"runs/street/{made}: {(run / made).stat().st_size / 1e6:.2f} MB")
    masks = len(list((out / "masks").glob("*.mask.png")))
    average = json.loads((run / "report.json").read_text("utf-8"))["domains"]["street"]["miou"]
    wall, cpu = (sum(times) for times in zip(*done, strict=True))
    print(f"{masks} masks of new photographs; mIoU {average:.1%} on the held-out fifth")
    print(
        f"{len(done)} commands: {wall:.0f} s of at most {LIMIT:.0f}, {cpu:.0f} s of processors; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


def listing(files: int) -> None:
    """`data check` of a folder of so many pairs, which are names of one image and one mask."""
    with tempfile.TemporaryDirectory() as name:
        where = Path(name)
        for part in ("images", "masks"):
            (where / "many" / part).mkdir(parents=True)
        Image.new("RGB", (480, 360)).save(where / "image.jpg")
        mask = np.arange(480 * 360, dtype=np.uint32).reshape(360, 480) // 60000
        Image.fromarray(mask.astype(np.uint8)).save(where / "mask.png")
        for k in range(files):
            os.link(where / "image.jpg", where / f"many/images/{k:06d}.jpg")
            os.link(where / "mask.png", where / f"many/masks/{k:06d}.png")
        (where / "registry.toml").write_text(
            '[data]\nmany = "many"\n[dataset.many]\nname = "folder"\nclasses = ["a", "b", "c"]\n'
            "val_share = 0.1\n"
        )
        timed(["data", "check", "many"], where)


def report(camvid: Path, images: int, out: Path) -> None:
    """The page of an evaluation of so many images in one domain, opened five times."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    shutil.rmtree(out, ignore_errors=True)
    photographs(camvid, out / "few")
    for part in ("images", "masks"):
        (out / "many" / part).mkdir(parents=True)
        few = sorted((out / "few" / part).iterdir())
        for k in range(images):
            file = few[k % len(few)]
            os.link(file, out / "many" / part / f"{k:04d}{file.suffix}")
    names = CLASSES.replace(",", '", "')
    (out / "registry.toml").write_text(
        f'[data]\nmany = "many"\n[dataset.many]\nname = "folder"\nclasses = ["{names}"]\n'
        'split = "train"\ntest_size = [192, 144]\n'
        f'[pairing.many]\nextends = "demo-probe"\nclasses = ["{names}"]\n'
        '[recipe.many]\nextends = "demo"\nsource = "many"\ntargets = ["many"]\n'
        f"steps = 2\nwarmup = 1\nbatch_size = 1\ntest_images = {images}\n"
    )
    timed(["train", "many"], out)
    page = out / "runs/many/report.html"
    print(f"{page.name} of {images} images: {page.stat().st_size / 1e6:.2f} MB")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver"))) as chrome:
        for _ in range(5):
            chrome.get("about:blank")
            chrome.get(page.resolve().as_uri())
            millis = chrome.execute_script(
                "const t = performance.timing; return t.loadEventEnd - t.navigationStart"
            )
            rows = len(chrome.find_elements("css selector", "tr"))
            print(f"open in Chromium after {millis / 1000:.2f} s, {rows} table rows")


def figure(run: Path, out: Path) -> None:
    """Features and words of a run of `demo` on one image of each of four drawn domains."""
    from mfuser import load_registry
    from mfuser.config.run import domains
    from mfuser.reporting import draw

    (out / "shown").mkdir(parents=True, exist_ok=True)
    registry = load_registry()
    for name in ("game", "camera", "night", "snow"):
        sample = domains(registry, name)[0].build(registry, "val")[1]
        Image.fromarray(sample.image).save(out / "shown" / f"{name}.png")
    shared = ["shown", "--width", "190"]
    timed(["visualize", "pca", str(run), *shared], out)
    words = ["--text", "car", "--text", "a wet road", "--before"]
    timed(["visualize", "similarity", str(run), *shared, *words], out)
    sheets = [Image.open(out / f"pictures/all.{kind}.png") for kind in ("pca", "similarity")]
    draw.stacked(*sheets).save("docs/visualize.jpg", quality=88)


def half(run: Path) -> None:
    """The share of pixels whose class is that of float32: eight images of each of a run's domains,
    sources apart."""
    import torch

    import mfuser
    from mfuser.engine.folder import read_run

    registry = mfuser.load_registry()
    described, images = read_run(registry, run), {}
    sources = {source.name for source in described.sources}
    for domain in described.targets:
        dataset = domain.build(registry, "val")
        pixels = np.stack([dataset[i].image for i in range(min(8, len(dataset)))])
        images[domain.name] = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    wanted = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = mfuser.from_pretrained(run, registry=registry).to(dtype)
        masks = {name: model.segment(pixels).argmax(1) for name, pixels in images.items()}
        wanted = wanted or masks
        same = {n: (m == wanted[n]).float().mean((1, 2)) for n, m in masks.items()}
        for what, names in (("source", sources), ("unseen", set(same) - sources)):
            each = torch.cat([shares for name, shares in same.items() if name in names])
            print(f"{dtype}, {what}: {each.mean():.2%}, at least {each.min():.2%} of an image")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ["commands", "listing", "report", "figure", "half"]
    parser.add_argument("what", nargs="?", choices=kinds, default="commands")
    beside = Path(__file__).resolve().parents[2] / "shared/real/camvid"
    parser.add_argument("--camvid", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/first-day"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--files", type=int, default=25_000)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    given = parser.parse_args()
    if given.what == "commands":
        commands(given.camvid, given.out, given.steps)
    elif given.what == "figure":
        figure(given.run.resolve(), given.out)
    elif given.what == "half":
        half(given.run)
    elif given.what == "listing":
        listing(given.files)
    else:
        report(given.camvid or beside, given.images, given.out)


if __name__ == "__main__":
    main()
