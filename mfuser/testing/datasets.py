"""Checks of a dataset."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np

from mfuser.data.images import read_image
from mfuser.errors import DataError, MFuserError, NoSplitError
from mfuser.interfaces import IGNORE, Dataset
from mfuser.specs import DatasetSpec
from mfuser.testing.verdict import Broken, NotTried

FEW = 5
"""Samples that are read."""


class DatasetBench:
    """A dataset's spec and the folder it is read from, which may be one of examples."""

    def __init__(self, spec: DatasetSpec, root: Path | None) -> None:
        self.spec = spec
        self.root = root
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.why = ""
        if root is None and spec.needs_root:
            self._folder = tempfile.TemporaryDirectory(prefix="mfuser-example-")
            try:
                spec.write_example(Path(self._folder.name))
                self.root = Path(self._folder.name)
            except NotImplementedError:
                self.why = "there is no data"

    def build(self, split: str = "train") -> Dataset:
        if self.why:
            name = self.spec.component()
            raise NotTried(
                self.why, f"give --data-root {name}=FOLDER, or define {name}'s write_example()"
            )
        dataset = self.spec.build(self.root, split)
        if not isinstance(dataset, Dataset):
            raise Broken(
                f"build(root, '{split}')", f"a {type(dataset).__name__}", "a mfuser.Dataset", ""
            )
        return dataset

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def samples(bench: DatasetBench) -> str:
    """The first samples"""
    dataset = bench.build()
    if len(dataset) < 1:
        raise Broken("len()", "0", "at least one image, or DataError", "raise DataError in build()")
    count = min(FEW, len(dataset))
    for index in range(count):
        sample = dataset[index]
        image, label = sample.image, sample.label
        what = f"sample {index} ('{sample.name}')"
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise Broken(
                what,
                f"an image of {image.dtype}, {image.shape}",
                "uint8 (H, W, 3), RGB",
                "read it with mfuser.data.images.read_image",
            )
        if label.dtype != np.int64 or label.shape != image.shape[:2]:
            raise Broken(
                what,
                f"a label of {label.dtype}, {label.shape}",
                f"int64 {image.shape[:2]}, as the image",
                "convert with .astype(np.int64); never resize labels smoothly",
            )
        unknown = sorted(set(np.unique(label).tolist()) - {*dataset.class_ids, IGNORE})
        if unknown:
            raise Broken(
                what,
                f"the label values {unknown[:5]}",
                f"values of class_ids, or {IGNORE} for ignored pixels",
                "map raw values to class ids on reading, the rest to 255",
            )
    return f"{count} of {len(dataset)} images, labels within {len(dataset.class_ids)} classes"


def consistent(bench: DatasetBench) -> str:
    """Names, labels and classes"""
    dataset = bench.build()
    if len(set(dataset.classes)) != len(dataset.classes):
        raise Broken("classes", "a name occurs twice", "each name once", "")
    if not dataset.class_ids or max(dataset.class_ids) >= len(dataset.classes):
        raise Broken(
            "class_ids",
            f"{dataset.class_ids}",
            f"at least one index into the {len(dataset.classes)} classes",
            "class_ids = tuple(range(len(classes))) where all occur",
        )
    names = [dataset.name(i) for i in range(len(dataset))]
    sample = dataset[0]
    if names[0] != sample.name:
        raise Broken(
            "name(0) and [0].name", f"'{names[0]}' and '{sample.name}'", "the same", "return one"
        )
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise Broken(
            "the names of all samples",
            f"'{twice}' twice",
            "unique names",
            "keep the part of the path that tells them apart",
        )
    if not np.array_equal(dataset.label(0), sample.label):
        raise Broken("label(0) and [0].label", "they differ", "the same array", "")
    path = dataset.image_file(0)
    if path is not None and not np.array_equal(read_image(path), sample.image):
        raise Broken(
            "image_file(0) and [0].image",
            "other pixels",
            "those that read_image gives for the file",
            "leave image_file out where images are changed after reading",
        )
    try:
        dataset[len(dataset)]
    except (IndexError, MFuserError):
        pass
    else:
        raise Broken("[len()]", "a sample", "IndexError", "index a list, or check the index")
    return f"{len(names)} unique names, label() agrees with the samples"


def repeatable(bench: DatasetBench) -> str:
    """A sample twice, a second build, and a pickled copy"""
    one, two = bench.build(), bench.build()
    copy = pickle.loads(pickle.dumps(one))
    index = len(one) - 1
    expected = one[index]
    for what, sample in (
        ("the same sample twice", one[index]),
        ("the sample of a second build", two[index]),
        ("the sample of a pickled copy, as in a loader's process", copy[index]),
    ):
        if not (
            np.array_equal(sample.image, expected.image)
            and np.array_equal(sample.label, expected.label)
        ):
            raise Broken(
                what,
                "another image or label",
                "the same: augmentation is the recipe's business",
                "let the sample depend on the index alone",
            )
    marks = {one.fingerprint(), two.fingerprint(), copy.fingerprint()}
    if len(marks) != 1:
        raise Broken(
            "fingerprint() of two builds",
            "they differ",
            "the same while the files are the same",
            "hash names, sizes and modification times",
        )
    return "samples and fingerprint are the same in a second build and in a pickled copy"


def missing_data(bench: DatasetBench) -> str:
    """No folder, one that does not exist, and an empty one"""
    spec = bench.spec
    if not spec.needs_root:
        raise NotTried("it needs no folder")
    with tempfile.TemporaryDirectory(prefix="mfuser-empty-") as folder:
        empty = Path(folder)
        for what, root in (
            ("no folder", None),
            ("a folder that does not exist", empty / "absent"),
            ("an empty folder", empty),
        ):
            try:
                try:
                    spec.build(root, "train")
                except NoSplitError:  # tests only
                    spec.build(root, "val")
            except DataError as error:
                if root is not None and str(root) not in str(error):
                    raise Broken(
                        what,
                        f"DataError: {error}",
                        f"a message that names {root}",
                        "say what was looked for, and where",
                    ) from error
            except Exception as error:
                raise Broken(
                    what,
                    f"{type(error).__name__}: {error}",
                    "DataError",
                    "check root in build() and raise mfuser.DataError with what is missing",
                ) from error
            else:
                raise Broken(
                    what,
                    "a dataset",
                    "DataError",
                    "look for the files in build(), not at the first sample",
                )
    return "each ends in a DataError that names the place"


def expands(bench: DatasetBench) -> str:
    """The domains it stands for as a target, and their labels in reports"""
    found = bench.spec.expand()
    if not found or not all(isinstance(s, DatasetSpec) for s in found):
        raise Broken("expand()", repr(found)[:100], "a list of dataset specs", "return [self]")
    labels = [s.label() for s in found]
    if len(set(labels)) != len(labels):
        raise Broken(
            "label() of what expand() returns",
            ", ".join(labels),
            "unique names",
            "name the variant: f'{self.component()}:{self.condition}'",
        )
    variant = type(bench.spec).variant
    if variant is not None and variant not in type(bench.spec).model_fields:
        raise Broken(
            "variant", f"'{variant}' is not an option", "the name of an option", "see DatasetSpec"
        )
    return ", ".join(labels)
