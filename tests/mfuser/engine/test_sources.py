"""Several sources: their shares, their own statistics and classes, and runs that go on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import launch
from stopping import gone_in

from mfuser import Registry
from mfuser.data.loading import ClassMap, CropSource, TrainingStream, training_stream
from mfuser.data.sampling import (
    BLOCK,
    ClassStatistics,
    Mixture,
    RareClassSampler,
    ShuffledSampler,
    sample_rng,
)
from mfuser.data.transforms import Augmentation, AugmentationSpec
from mfuser.engine import checkpoints
from mfuser.engine.console import Console
from mfuser.engine.folder import RUN, read_run
from mfuser.engine.run import train as train_run
from mfuser.engine.source import Built, check_crops, count_classes, crop_sources, described
from mfuser.engine.train import Interrupted, Trainer, train
from mfuser.errors import CheckpointError, DataError
from mfuser.interfaces import IGNORE, Dataset, Sample

ALIEN = '''
import numpy as np
from mfuser import DatasetSpec, hookimpl
from mfuser.interfaces import Dataset, Sample


class Alien(Dataset):
    classes = ("sand", "lava")
    class_ids = (0, 1)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Sample(np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.int64), str(index))


class AlienSpec(DatasetSpec, name="alien"):
    """Another planet."""

    needs_root = False

    def build(self, root, split):
        return Alien()


@hookimpl
def mfuser_components():
    return [AlienSpec]
'''


class Plain(Dataset):
    """Images of one gray value each, of a single class; value and class tell what was read."""

    def __init__(self, classes: tuple[str, ...], shade: int, labels: list[int]) -> None:
        self.classes, self.class_ids = classes, tuple(range(len(classes)))
        self.shade, self.labels = shade, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        image = np.full((32, 32, 3), self.shade + index, np.uint8)
        return Sample(image, self.label(index), f"{self.shade}.{index}")

    def label(self, index: int) -> np.ndarray:
        return np.full((32, 32), self.labels[index], np.int64)


MODEL = ("road", "sky", "car")
FIXED = AugmentationSpec(scale=(1.0, 1.0), photometric=False, flip=0.0, min_pixels=0)


def stream(sources: list[CropSource], shares: list[float], **more: Any) -> TrainingStream:
    options = {"seed": 3, "steps": 40, "batch_size": 5} | more
    return training_stream(
        sources, Augmentation(FIXED, (32, 32)), shares=shares, skip_unreadable=False, **options
    )


def two() -> list[CropSource]:
    """The second one has its classes in another order, and one that the model lacks."""
    first = Plain(("road", "sky", "car"), 10, [0, 1, 2, 0])
    second = Plain(("moon", "car", "road"), 100, [1, 2, 0, 1, 1, 2])
    return [
        CropSource(d, ClassMap(d, MODEL), ShuffledSampler(len(d), k))
        for k, d in enumerate((first, second))
    ]


# ---- which crop is which


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([0.5, 0.5], [500, 500]),
        ([1 / 3] * 3, [334, 333, 333]),
        ([0.596, 0.224, 0.18], [596, 224, 180]),
        ([0.999, 0.001], [999, 1]),
        ([0.9994, 0.0003, 0.0003], [998, 1, 1]),
        ([1.0], [BLOCK]),
    ],
)
def test_every_block_of_crops_holds_the_shares(shares: list[float], counts: list[int]) -> None:
    mixture = Mixture(shares, seed=7)
    assert mixture.counts.tolist() == counts
    seen = [mixture.at(n) for n in range(3 * BLOCK)]
    for source, count in enumerate(counts):
        # The positions of a source count up without a gap: no image is left out or repeated.
        assert [p for s, p in seen if s == source] == list(range(3 * count))
        for block in range(3):
            part = seen[block * BLOCK : (block + 1) * BLOCK]
            assert sum(s == source for s, _ in part) == count
    # A crop follows from the seed and its number, whatever was asked before.
    again = Mixture(shares, seed=7)
    assert [again.at(n) for n in (2999, 5, 1500, 0)] == [seen[n] for n in (2999, 5, 1500, 0)]
    if len(shares) > 1:
        assert [s for s, _ in seen[:BLOCK]] != [s for s, _ in seen[BLOCK : 2 * BLOCK]]
        assert [Mixture(shares, 8).at(n) for n in range(BLOCK)] != seen[:BLOCK]


def test_one_source_is_read_as_before(tiny: Registry) -> None:
    """The draws of a crop written out as they were before there were several sources."""
    dataset = tiny.dataset("toy").build(None, "train")
    classes = tiny.pairing("plain").classes
    class_map = ClassMap(dataset, classes)
    augmentation = Augmentation(AugmentationSpec(), (64, 96))
    counted = ClassStatistics(
        np.array([np.bincount(dataset.label(i).ravel(), minlength=256)[:19] for i in range(6)])
    )
    rare = RareClassSampler(class_map.statistics(counted), 0.01, 50)
    for sampler in (ShuffledSampler(6), rare):
        source = CropSource(dataset, class_map, sampler)
        crops = training_stream([source], augmentation, seed=4, steps=5, batch_size=2).crops
        for number in range(10):
            rng = sample_rng(4, number)
            if isinstance(sampler, RareClassSampler):
                index, wanted = sampler.draw(rng)
            else:
                order = sample_rng(4, number // 6, 0x6F726465).permutation(6)
                index, wanted = int(order[number % 6]), None
            sample = dataset[index]
            image, label = augmentation(sample.image, class_map(sample.label), rng, wanted)
            crop = crops[number]
            assert isinstance(crop, tuple) and crop[3] == sample.name
            assert np.array_equal(crop[0].permute(1, 2, 0).numpy(), image)
            assert np.array_equal(crop[1].numpy(), label)


def test_each_source_has_its_own_classes_and_epochs() -> None:
    batches = list(stream(two(), [0.25, 0.75]))
    names = [name for batch in batches for name in batch.names]
    labels = [int(label.unique()) for batch in batches for label in batch.labels]
    truth = {"10": [0, 1, 2, 0], "100": [2, 0, IGNORE, 2, 2, 0]}  # in the model's classes
    for name, label in zip(names, labels, strict=True):
        shade, index = name.split(".")
        assert label == truth[shade][int(index)]
    for shade, size in (("10", 4), ("100", 6)):
        own = [int(n.split(".")[1]) for n in names if n.startswith(f"{shade}.")]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
    share = sum(n.startswith("10.") for n in names) / len(names)
    assert share == pytest.approx(0.25, abs=0.1)


def test_two_processes_and_a_later_start_share_one_stream() -> None:
    whole = [name for batch in stream(two(), [0.4, 0.6]) for name in batch.names]
    parts = [
        [batch.names for batch in stream(two(), [0.4, 0.6], rank=r, world=2, steps=20)]
        for r in range(2)
    ]
    shared = [name for pair in zip(*parts, strict=True) for names in pair for name in names]
    assert shared == whole
    later = [name for batch in stream(two(), [0.4, 0.6], start=31) for name in batch.names]
    assert later == whole[31 * 5 :]


def test_rare_classes_and_the_most_frequent_one(begin: Any) -> None:
    """Rare is what is rare in a source; most frequent is what covers most of the crops."""
    first = Plain(MODEL, 10, [0] * 9 + [1])
    second = Plain(MODEL, 100, [2, 2, 2, 0])
    run = begin("plain", "rare_classes={temperature=0.01, min_pixels=1}", source="toy,toy-night")
    spec = run.pairing.model_copy(update={"classes": MODEL})
    built = [Built(str(d.shade), d, ClassMap(d, MODEL)) for d in (first, second)]
    counted = [
        ClassStatistics(
            np.array([np.bincount(d.label(i).ravel(), minlength=3) for i in range(len(d))])
        )
        for d in (first, second)
    ]
    samplers = [s.sampler for s in crop_sources(built, run, counted)]
    for sampler, often in zip(samplers, ((1, 0), (0, 2)), strict=True):
        assert isinstance(sampler, RareClassSampler)
        chance = dict(zip(sampler.classes.tolist(), sampler.probabilities, strict=True))
        assert chance[often[0]] > 0.99 > 0.01 > chance[often[1]]
    for shares, frequent in (((0.5, 0.5), "road"), ((0.1, 0.9), "car")):
        sources = tuple(
            s.model_copy(update={"share": share})
            for s, share in zip(run.sources, shares, strict=True)
        )
        asked = run.model_copy(update={"sources": sources, "pairing": spec})
        assert described(asked, built, counted).most_frequent == frequent
        assert described(asked, built, counted).source_classes == MODEL


def test_what_no_label_shows_is_said(begin: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Plain(("road", "sky"), 10, [0, 1]), Plain(("road",), 100, [0])
    run = begin("plain", source="toy,toy-night")
    run = run.model_copy(update={"pairing": run.pairing.model_copy(update={"classes": MODEL})})
    built = [Built(n, d, ClassMap(d, MODEL)) for n, d in (("a", first), ("b", second))]
    counted = count_classes(built, run, Console())
    assert [c.pixels.sum(0).tolist() for c in counted] == [[1024, 1024, 0], [1024, 0, 0]]
    said = capsys.readouterr().err
    assert "source 'a' never labels car" in said and "source 'b' never labels sky, car" in said
    assert "no source labels car" in said
    count_classes(built[:1], run.model_copy(update={"sources": run.sources[:1]}), Console())
    assert "never labels" not in capsys.readouterr().err


def test_crops_of_one_source_that_show_nothing(begin: Any) -> None:
    run = begin("plain", source="toy,toy-night")
    sources = two()
    check_crops(stream(sources, [0.9, 0.1]), 0, run)
    moon = Plain(("moon", "road"), 100, [0, 0])
    sources[1] = CropSource(moon, ClassMap(moon, MODEL), ShuffledSampler(2, 1))
    with pytest.raises(DataError, match="dataset 'toy-night': its first 20 crops of 64x96"):
        check_crops(stream(sources, [0.9, 0.1]), 0, run)


# ---- whole runs


def test_a_run_on_two_sources(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    run = begin(
        "plain", source="toy=0.7,toy-night=0.3", targets=("toy", "toy-night", "streets:fog")
    )
    done = train_run(run, tmp_path / "r", registry=tiny, quiet=True)
    written = json.loads((tmp_path / "r" / RUN).read_text())
    assert [(s["name"], s["share"]) for s in written["sources"]] == [
        ("toy", 0.7),
        ("toy-night", 0.3),
    ]
    assert read_run(tiny, tmp_path / "r") == run
    report = done.report
    assert report is not None
    assert report.protocol["source"] == "toy 70 %, toy-night 30 %"
    assert "source toy 70 %, toy-night 30 %; " in report.summary()[0]
    assert [d.seen for d in report.domains.values()] == [True, True, False]
    unseen = report.domains["streets:fog"].miou
    seen = np.mean([report.domains[n].miou for n in ("toy", "toy-night")])
    assert report.average == unseen and report.gap == pytest.approx(seen - unseen)
    with pytest.raises(CheckpointError, match="source is 'toy 70 %, toy-night 30 %', not 'toy'"):
        train(tiny, begin("plain"), tmp_path / "r", resume=True)


def test_a_killed_run_on_two_sources_goes_on(
    tiny: Registry, begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MFUSER_CACHE_DIR", str(tmp_path / "cache"))
    changes = ("steps=5", "lr_scale.decoder=3", "weight_decay=0.1", "decay_schedule=cosine")
    rare = "rare_classes={min_pixels=50}"
    run = begin("plain", *changes, rare, source="toy,toy-night")
    seen: list[str] = []
    step = Trainer._step

    def stepped(self: Trainer, number: int, batches: Any) -> Any:
        seen.extend(name for batch in batches for name in batch.names)
        if asked and number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", stepped)
    asked = False
    train(tiny, run, tmp_path / "whole")
    whole, asked = list(seen), True
    seen.clear()
    with pytest.raises(Interrupted):
        train(tiny, run, tmp_path / "parts")
    asked = False
    train(tiny, run, tmp_path / "parts", resume=True)
    assert seen == whole
    one, other = (checkpoints.read(tmp_path / n / checkpoints.LAST) for n in ("whole", "parts"))
    for tensors, others in ((one.model, other.model), (one.optimizer, other.optimizer)):
        assert list(tensors) == list(others) and tensors
        assert all(torch.equal(tensors[k], others[k]) for k in tensors)


def test_two_processes_on_two_sources_are_one_run(
    tiny: Registry, begin: Any, write_registry: Any, tmp_path: Path
) -> None:
    changes = ("augmentation.photometric=false", "seed=3")
    run = begin("plain", "batch_size=2", *changes, source="toy,toy-night")
    train(tiny, run, tmp_path / "one")
    settings = [part for change in changes for part in ("--set-recipe", change)]
    ended = launch(
        [
            *("train", "plain", "--recipe", "tiny", "--device", "cpu", "--no-evaluate"),
            *("--source", "toy,toy-night", "--registry", write_registry()),
            *("--out", tmp_path / "two", *settings),
        ],
        tmp_path,
    )
    assert [e.code for e in ended] == [0, 0], ended
    logs = [(tmp_path / n / "log.jsonl").read_text().splitlines() for n in ("one", "two")]
    for mine, theirs in zip(*logs, strict=True):
        assert json.loads(mine)["loss"] == pytest.approx(json.loads(theirs)["loss"], rel=1e-4)


def test_a_source_that_does_not_fit(mfuser: Any, write_registry: Any, inside: Path) -> None:
    Path("alien.py").write_text(ALIEN, "utf-8")
    options = ("--recipe", "tiny", "--registry", write_registry(), "--plugin", "alien.py")
    end = mfuser("train", "plain", *options, "--source", "toy,alien", "--out", "run")
    assert end.code == 2 and not Path("run").exists()
    assert "source 'alien' labels none of the pairing's classes (road, sidewalk, " in end.err
    assert "; its own are sand, lava" in end.err


def test_ema_and_validation_on_two_sources(tiny: Registry, begin: Any, tmp_path: Path) -> None:
    """Images of each are held out, their mean is what is best, and a killed run goes on."""
    changes = ("steps=4", "save_every=1", "validate_every=2", "validate_images=2")
    run = begin("plain", *changes, "ema={decay=0.5}", source="toy,toy-night")
    train(tiny, run, tmp_path / "whole")
    with gone_in(4):
        train(tiny, run, tmp_path / "parts")
    train(tiny, run, tmp_path / "parts", resume=True)
    for name in (checkpoints.FINAL, checkpoints.AVERAGED, checkpoints.BEST, checkpoints.LAST):
        one, other = (checkpoints.read(tmp_path / n / name) for n in ("whole", "parts"))
        assert all(torch.equal(one.model[k], other.model[k]) for k in one.model) and one.model
        assert all(torch.equal(one.averaged[k], other.averaged[k]) for k in one.averaged)
        assert bool(one.averaged) == (name == checkpoints.LAST)
    lines = [
        json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    seen = [line["validation"] for line in lines if "validation" in line]
    assert [s["on"] for s in seen] == ["held-out images of toy and toy-night"] * 2
    for one in seen:
        assert set(one["domains"]) == {"toy", "toy-night"}
        assert one["miou"] == pytest.approx(np.mean(list(one["domains"].values())))
