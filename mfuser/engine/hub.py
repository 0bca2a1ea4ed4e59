"""Models on the Hugging Face hub: one repository each, the files of `engine.pretrained`."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec
from mfuser.engine import checkpoints, pretrained
from mfuser.engine.checkpoints import FINAL
from mfuser.engine.folder import check_unlocked
from mfuser.errors import CheckpointError, HubError, brief
from mfuser.files import check_writable
from mfuser.plugins.origins import origins
from mfuser.reporting.card import local_files
from mfuser.reporting.report import REPORT, Report, checkpoint_of
from mfuser.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Pushed:
    """files: name -> bytes. private: of the repository. url: of the commit; None after a dry run.
    notes: what whoever publishes should know."""

    repo: str
    files: dict[str, int]
    private: bool
    url: str | None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(
    registry: Registry,
    run: Path,
    repo: str,
    *,
    full: bool = False,
    public: bool = False,
    license: str | None = None,
    settings: Sequence[str] = (),
    weights: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Publish a run as one commit of the repository "owner/name", which is made if need be, or in
    a folder ("./garden"), which is made, too.

    A new repository is private unless `public`. full: all weights, the encoders' too. license: of
    the trained weights, for the card. weights: which of the run's, as for `load_model`. dry_run:
    write the files and throw them away, ask nobody.

    Raises CheckpointError for the run, HubError for what the hub refuses; a repository that is
    public already is one, unless `public`.
    """
    target = in_folder(repo)
    if target is None:
        check_name(repo)
    else:
        _check_free(target)
    if run.is_dir():
        check_unlocked(run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        notes = _write(registry, run, folder, repo, full, license, settings, weights)
        files = {name: (folder / name).stat().st_size for name in pretrained.FILES}
        if dry_run:
            return Pushed(repo, files, not public, None, notes)
        if target is not None:
            _copy(folder, target)
            return Pushed(repo, files, True, target.resolve().as_uri(), notes)
        with asking(repo):
            api = _api(None)
            private = _made(api, repo, public)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=f"{run.name or run.resolve().name}, by mfuser {__version__}",
            )
        return Pushed(repo, files, private, str(commit.commit_url), notes)


def pull(repo: str, folder: Path, *, revision: str | None = None) -> checkpoints.Checkpoint:
    """Bring a repository (or a folder such as "./garden") into a folder, which commands take as a
    run; returns its checkpoint.

    Raises HubError, and CheckpointError for a folder that is not empty or not a model.
    """
    _check_free(folder)
    held = in_folder(repo) or download(repo, revision=revision)
    checkpoint = checkpoints.read(held / FINAL)
    pretrained.check_config(held, checkpoint)
    _copy(held, folder)
    return checkpoint


def in_folder(repo: str) -> Path | None:
    """The folder, for names that cannot be a repository: ./garden, ../garden, ~/garden, garden/, or
    an absolute path."""
    if repo.startswith((".", "/", "~")) or repo.endswith("/"):
        return Path(repo).expanduser()
    return None


def _check_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there and not empty; choose another folder")
    check_writable(folder)


def _copy(held: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in pretrained.FILES:
        if (held / name).is_file():
            shutil.copyfile(held / name, folder / name)


def download(repo: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder in the hub's cache that holds a repository's files. Raises HubError."""
    check_name(repo)
    with asking(repo, revision):
        held = Path(
            _api(token).snapshot_download(
                repo, revision=revision, allow_patterns=list(pretrained.FILES)
            )
        )
    if not (held / FINAL).is_file():
        raise HubError(f"the repository '{repo}' holds no model of this project: no {FINAL}")
    return held


def check_name(repo: str) -> None:
    """Raises HubError for what is neither a folder nor a name of the hub."""
    if not NAME.fullmatch(repo):
        raise HubError(
            f"there is no folder {repo}, and a repository of the hub is called owner/name"
        )


def _write(
    registry: Registry,
    run: Path,
    folder: Path,
    repo: str,
    full: bool,
    license: str | None,
    settings: Sequence[str],
    weights: str | None,
) -> tuple[str, ...]:
    """The files of a run; returns what whoever publishes should know. The frozen encoders are
    loaded only where they are to be written."""
    file = checkpoints.find(run, weights)
    given = checkpoints.chosen(checkpoints.read(file), weights, file)
    spec = checkpoints.saved_spec(registry, given, settings, file)
    if full or settings:
        model, _ = checkpoints.load_model(run, registry, list(settings), weights)
        checkpoint, spec = pretrained.snapshot(model, full), model.spec
    else:
        meta = {k: v for k, v in given.meta.items() if k != "scaler"}
        meta = {**meta, "origins": origins(spec)}
        checkpoint = checkpoints.Checkpoint(given.model, {}, meta)
    report, notes = _report(registry, run, checkpoint)
    complete = checkpoint.meta.get("complete")
    for key, path in ({} if complete else local_files(spec)).items():
        notes.append(f"{key} is a file of this machine ({path}), which others do not have: --full")
    plugins = checkpoint.meta["run"].get("plugins") or ()
    if plugins:
        notes.append(f"it needs --plugin {' --plugin '.join(plugins)}, which is not uploaded")
    if license is None:
        notes.append("the card states no license for what was trained: --license")
    pretrained.write_folder(
        checkpoint,
        spec,
        folder,
        name=(in_folder(repo) or Path(repo)).resolve().name,
        report=report,
        license=license,
        repo=repo if in_folder(repo) is None else None,
    )
    return tuple(notes)


def _report(
    registry: Registry, run: Path, checkpoint: checkpoints.Checkpoint
) -> tuple[Report | None, list[str]]:
    """The report of a run, where there is one of these weights."""
    file = run / REPORT
    if not file.is_file():
        return None, [f"there is no {file}: the card holds no figures (mfuser evaluate)"]
    report = Report.read(file)
    recipe = RunSpec.read(registry, checkpoint.meta["run"], str(run)).recipe
    which = checkpoint_of(recipe, checkpoint.step, checkpoint.meta.get("weights", {}))
    if report.protocol.get("checkpoint") != which:
        return None, [f"{file} is of other weights: the card holds no figures (mfuser evaluate)"]
    return report, []


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="mfuser", library_version=__version__)


def _made(api: HfApi, repo: str, public: bool) -> bool:
    """Whether the repository, which is there afterwards, is private."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    if get_token() is None:
        raise LocalTokenNotFoundError
    try:
        private = bool(api.model_info(repo).private)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        return not public
    if not private and not public:
        raise HubError(
            f"the repository '{repo}' is public already: say --public, or make it private on its "
            "page first"
        )
    return private


LOGIN = "log in (hf auth login) or set HF_TOKEN"


@contextlib.contextmanager
def asking(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raises HubError for whatever the hub or the way to it refuses, in one sentence."""
    from huggingface_hub import errors

    # HTTPError of httpx, whichever of its versions the client is built on.
    transport: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        with _progress():
            yield
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"uploading needs a login: {LOGIN}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"the repository '{repo}' is gated: ask for access on its page, then {LOGIN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"there is no folder {repo}, and the hub has no repository '{repo}' or does not show "
            f"it to this login: check the name; if it is private, {LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"the repository '{repo}' has no revision '{revision}'") from error
    except errors.HfHubHTTPError as error:
        raise HubError(_refusal(repo, error)) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(_unreached(repo, error)) from error
    except (transport, ConnectionError, TimeoutError) as error:
        raise HubError(_unreached(repo, error)) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise HubError(f"'{repo}' on the hub: {brief(error)}") from error


@contextlib.contextmanager
def _progress() -> Iterator[None]:
    """The client's bars are for terminals."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


def _refusal(repo: str, error: Any) -> str:
    status = error.response.status_code
    if status == 401:
        return f"the hub does not accept this login: {LOGIN}"
    if status == 403:
        return (
            f"this login may not do that with '{repo}': use an account or a token that may write "
            "there"
        )
    said = error.server_message or brief(error)
    return f"the hub refuses ({status}): {' '.join(said.split())}"


def _unreached(repo: str, error: Exception) -> str:
    """Offline by choice, or not connected."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"'{repo}' is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE=1 "
            "forbids asking: unset it, or give a folder"
        )
    return (
        f"the hub cannot be reached for '{repo}' ({constants.ENDPOINT}, "
        f"{type(error.__cause__ or error).__name__}): "
        "check the connection, or give a folder"
    )
