"""The tables of studies, the variants they expand to, and errors found before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mfuser import load_registry
from mfuser.config.run import RunSpec
from mfuser.config.study import AdapterStudySpec, PaperReference, StudySpec
from mfuser.errors import CheckpointError, MFuserError, RegistryError
from mfuser.study import adapters, grid, paper, runs

STUDY = """
[study.s]
base    = "plain"
recipe  = "tiny"
seeds   = [0, 1]
"""


def study_of(write_registry, axes: str, more: str = ""):  # type: ignore[no-untyped-def]
    """The registry and the study `s` with these axes."""
    registry = load_registry(write_registry(f"{STUDY}{more}\n[study.s.axes]\n{axes}\n"))
    return registry, registry.study("s")


def labels(write_registry, axes: str, more: str = "") -> list[str]:  # type: ignore[no-untyped-def]
    registry, study = study_of(write_registry, axes, more)
    return [v.label for v in grid.variants(registry, "s", study)]


def test_every_combination_is_a_variant(write_registry) -> None:  # type: ignore[no-untyped-def]
    registry, study = study_of(
        write_registry,
        """
        fusion = ["none", { name = "mvfuser", state_size = 4 }]
        recipe.lr = [1e-3, 2e-3]
        """,
    )
    found = grid.variants(registry, "s", study)
    assert [v.label for v in found] == [
        "none, lr=0.001",
        "none, lr=0.002",
        "mvfuser state_size=4, lr=0.001",
        "mvfuser state_size=4, lr=0.002",
    ]
    last = found[-1]
    assert last.pairing.fusion.model_dump()["state_size"] == 4
    assert last.choices == {"fusion": "mvfuser state_size=4", "recipe.lr": "lr=0.002"}
    assert {s: (r.seed, r.recipe.lr) for s, r in last.runs.items()} == {
        0: (0, 0.002),
        1: (1, 0.002),
    }
    assert last.trained is not None and found[0].trained is not None
    assert last.trained > found[0].trained
    assert len({v.slug for v in found}) == 4
    assert not any(set(v.slug) & set("/ ,") for v in found)


def test_a_labeled_value_changes_more_than_one_key(write_registry) -> None:  # type: ignore[no-untyped-def]
    registry, study = study_of(
        write_registry,
        """
        parts = [
          { label = "both" },
          { label = "VFM only", set = { vlm = "none" }, recipe = { lr = 5e-4 } },
          { label = "another base", pairing = "lone" },
        ]
        """,
    )
    both, vfm, lone = grid.variants(registry, "s", study)
    assert both.pairing.vlm is not None and vfm.pairing.vlm is None
    assert vfm.runs[0].recipe.lr == 5e-4 and both.runs[0].recipe.lr == 1e-3
    assert lone.pairing == registry.pairing("lone")


def test_settings_lie_under_the_axes(write_registry) -> None:  # type: ignore[no-untyped-def]
    more = 'settings = { fusion = { name = "mvfuser", state_size = 2 }, image_size = 64 }'
    registry, study = study_of(write_registry, "fusion.state_size = [2, 4]", more)
    found = grid.variants(registry, "s", study)
    assert [v.pairing.fusion.model_dump()["state_size"] for v in found] == [2, 4]
    assert {v.pairing.image_size for v in found} == {(64, 64)}


def test_pairings_and_recipes_by_name(write_registry) -> None:  # type: ignore[no-untyped-def]
    assert labels(write_registry, 'pairing = ["plain", "lone"]') == ["plain", "lone"]
    assert labels(write_registry, 'recipe = ["tiny"]\nfusion = ["none"]') == ["tiny, none"]


def test_an_axis_is_replaced_and_nested_and_dotted_keys_are_one(write_registry) -> None:  # type: ignore[no-untyped-def]
    registry, _ = study_of(write_registry, "fusion.every = [8, 4]")
    study = registry.study("s", {"axes": {"fusion.every": [1]}, "seeds": [3]})
    assert isinstance(study, StudySpec)
    assert study.axes == {"fusion.every": (1,)} and study.seeds == (3,)


@pytest.mark.parametrize(
    ("axes", "more", "words"),
    [
        ('fuson = ["none"]', "", ["axis 'fuson'", "did you mean 'fusion'"]),
        ('fusion = ["none", "mvfusr"]', "", ["fusion = mvfusr", "did you mean 'mvfuser'"]),
        (
            'fusion = [{ name = "mvfuser", state_size = -1 }]',
            "",
            ["fusion = mvfuser state_size=-1", "greater than 0"],
        ),
        ("recipe.lrr = [1e-3]", "", ["recipe.lrr", "did you mean 'lr'"]),
        ("recipe.warmup = [1, 10]", "", ["recipe.warmup = 10", "steps = 4"]),
        ("recipe.seed = [1]", "", ["seeds = "]),
        ("fusion = []", "", ["axis 'fusion' has no values"]),
        ('fusion = ["none", "none"]', "", ["two variants", "label"]),
        ('p = [{ label = "x", sett = {} }]', "", ["'sett'", "label, set, pairing, recipe"]),
        ('p = [{ label = "x", set = 3 }]', "", ["'set' is a table"]),
        (
            'p = [{ label = "x", set = { vlm = "none", decoder = "text_mask2former" } }]',
            "",
            ["p = x", "class queries from text"],
        ),
        ("taps = [[0, 0, 0, 30]]", "", ["taps = 0,0,0,30", "beyond the 2 positions"]),
        ('fusion = ["none"]', 'targets = ["nowhere"]', ["no dataset is called 'nowhere'"]),
        ('fusion = ["none"]', "paper = { table = 12 }", ["paper.table = 12"]),
        ('fusion = ["none"]', 'reference = "nne"', ["reference 'nne'", "did you mean 'none'"]),
        (
            'fusion = ["none"]',
            'paper = { table = 4, rows = { none = "nne" } }',
            ["'nne'", "did you mean 'none'"],
        ),
    ],
)
def test_refused_before_anything_runs(write_registry, axes: str, more: str, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RegistryError) as error:
        labels(write_registry, axes, more)
    text = str(error.value)
    assert "[study.s]" in text and "\n" not in text
    for word in words:
        assert word in text


def test_seeds_must_differ(write_registry) -> None:  # type: ignore[no-untyped-def]
    registry, _ = study_of(write_registry, 'fusion = ["none"]')
    with pytest.raises(RegistryError, match="none twice"):
        registry.study("s", {"seeds": [1, 1]})


def test_unknown_study_and_kind(write_registry) -> None:  # type: ignore[no-untyped-def]
    registry = load_registry(write_registry('[study.s]\nkind = "adapter"\n'))
    with pytest.raises(RegistryError, match="did you mean 'adapters'"):
        registry.study("s")
    with pytest.raises(RegistryError, match="did you mean 'fusion'"):
        registry.study("fuson")


def test_a_folder_holds_one_study(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.open_study(out, "a", {"x": {"recipe": {"lr": 1}}})
    runs.open_study(out, "a", {"y": {"recipe": {"lr": 2}}})  # a variant more
    runs.check_study(out, "a", {"x": {"recipe": {"lr": 1}}, "z": {}})
    with pytest.raises(CheckpointError, match="another study, 'a', not 'b'"):
        runs.check_study(out, "b", {})
    with pytest.raises(CheckpointError, match=r"recipe\.lr is 1, not 3 \(variant x\)"):
        runs.check_study(out, "a", {"x": {"recipe": {"lr": 3}}})
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="holds no study"):
        runs.check_study(other, "a", {})
    (out / "study.json").write_text("[", "utf-8")
    with pytest.raises(CheckpointError, match="cannot be read"):
        runs.check_study(out, "a", {})


def test_shares_cover_every_run_once(tmp_path: Path) -> None:
    jobs = [runs.Job(str(i), tmp_path / str(i), (), {}) for i in range(7)]
    parts = [runs.share(jobs, i, 3) for i in range(3)]
    assert sorted(j.label for part in parts for j in part) == [str(i) for i in range(7)]
    with pytest.raises(MFuserError, match="from 0 to 2"):
        runs.share(jobs, 3, 3)


# ---- the paper's figures stand only where they belong


def paper_run(registry, row: str = "mvfuser", **changes):  # type: ignore[no-untyped-def]
    study = registry.study("fusion")
    pairing = changes.pop("pairing", {"fusion": {"name": row}})
    recipe = registry.recipe(study.recipe, changes.pop("recipe", {}))
    return RunSpec.of(
        registry,
        "p",
        "paper",
        pairing=registry.pairing(study.base, pairing),
        recipe=recipe,
        source=changes.get("source", study.source),
        targets=changes.get("targets", study.targets),
    )


@pytest.fixture(scope="module")
def shipped():  # type: ignore[no-untyped-def]
    return load_registry()


def row(name: str):  # type: ignore[no-untyped-def]
    found = paper.row(PaperReference(table=4), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["mvfuser", "none", "convolution", "separate_mvfuser"])
def test_the_shipped_protocol_is_the_papers(shipped, name: str) -> None:  # type: ignore[no-untyped-def]
    assert paper.differences(shipped, paper_run(shipped, name), row(name)) == []


def test_every_shipped_pairing_of_table_5_is_the_papers(shipped) -> None:  # type: ignore[no-untyped-def]
    study = shipped.study("foundation_models")
    names = [p for p in study.axes["pairing"] if isinstance(p, str)]
    assert len(names) == 7
    for name in names:
        wanted = paper.row(study.paper, name)
        run = RunSpec.of(
            shipped,
            name,
            "paper",
            pairing=shipped.pairing(name),
            recipe=shipped.recipe("paper"),
            source="gta",
            targets=study.targets,
        )
        assert paper.differences(shipped, run, wanted) == [], name


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {"steps": 19999}},
        {"recipe": {"batch_size": 4}},
        {"recipe": {"precision": "bf16"}},
        {"recipe": {"test_images": 100}},
        {"recipe": {"augmentation": {"flip": 0.0}}},
        {"source": "synthia"},
        {"pairing": {"image_size": 448}},
        {"pairing": {"vfm": {"model": "vit_base_patch14_dinov2.lvd142m"}}},
        {"pairing": {"vfm": {"weights": "random"}}},
        {"pairing": {"fusion": {"state_size": 8}}},
        {"pairing": {"decoder": {"layers": 3}}},
    ],
)
def test_another_protocol_or_scale_keeps_the_paper_out(shipped, changes) -> None:  # type: ignore[no-untyped-def]
    run = paper_run(shipped, **changes)
    assert len(paper.differences(shipped, run, row("mvfuser"))) >= 1


def test_accumulated_batches_and_local_weights_are_the_same_protocol(shipped) -> None:  # type: ignore[no-untyped-def]
    run = paper_run(
        shipped,
        recipe={
            "batch_size": 1,
            "accumulate": 2,
            "seed": 5,
            "workers": 0,
            "prefetch": 4,
            "shard": True,
        },
        pairing={"vfm": {"weights": "dinov2.pth"}},
    )
    assert paper.differences(shipped, run, row("mvfuser")) == []


def test_figures_of_whole_domains_only() -> None:
    images = {"cityscapes": 500, "bdd100k": 1000, "mapillary": 2000}
    assert paper.miou(row("mvfuser"), images) == {
        "cityscapes": 70.19,
        "bdd100k": 63.13,
        "mapillary": 71.28,
        "average": 68.20,
    }
    assert paper.miou(row("mvfuser"), {**images, "bdd100k": 998}) == {
        "cityscapes": 70.19,
        "mapillary": 71.28,
    }
    assert "average" not in paper.miou(row("mvfuser"), {**images, "acdc:fog": 100})


# ---- adapters


def adapter_study(**changes):  # type: ignore[no-untyped-def]
    return AdapterStudySpec.model_validate({"adapters": ["mvfuser"], **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": ["mvfusr"]}, "did you mean 'mvfuser'"),
        ({"adapters": ["none"]}, "no adapter"),
        ({"adapters": [{"name": "mvfuser", "state_size": -1}]}, "state_size"),
        ({"adapters": ["mvfuser", "mvfuser"]}, "two adapters are called"),
        ({"width": 33}, "33"),
    ],
)
def test_adapters_are_validated_first(write_registry, changes, words: str) -> None:  # type: ignore[no-untyped-def]
    registry = load_registry(write_registry())
    with pytest.raises(RegistryError, match=words):
        adapters.adapters(registry, "s", adapter_study(**changes))


def test_the_paper_column_of_adapters_needs_its_sizes(shipped) -> None:  # type: ignore[no-untyped-def]
    validate = shipped.components.validate
    default = validate(("fusion",), "mvfuser")
    study = shipped.study("adapter_efficiency")
    assert paper.adapter_row(study, "mvfuser", default, shipped) == {
        "params_m": 1.67,
        "gflops": 17.21,
    }
    small = validate(("fusion",), {"name": "mvfuser", "state_size": 8})
    assert paper.adapter_row(study, "mvfuser", small, shipped) is None
    narrow = shipped.study("adapter_efficiency", {"width": 768})
    assert paper.adapter_row(narrow, "mvfuser", default, shipped) is None
