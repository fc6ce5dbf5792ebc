"""Checkpoints on a hub: fetched into the cache of `huggingface_hub`, from where they load like any other folder.

- `config_folder`: where a checkpoint's `config.json` is; of one on a hub nothing else is fetched
- `checkpoint_folder`: where all is that loading reads
- `commit_of`: which commit of a checkpoint on a hub a folder in the cache holds
- `looks_local`: whether a name can only mean a folder

A folder that exists is itself. What else is well formed is the name of a model on the hub, or with `HF_HUB_OFFLINE` in
its cache. `access` are arguments of `huggingface_hub`: `cache_dir`, `token`, `local_files_only`, `force_download`.
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_KINDS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken")
"""Weights, settings and tokenizers; chat templates come besides, and no pickles."""
_FOLDER = "give the folder of an L2D checkpoint"


def config_folder(
    name: str | os.PathLike, revision: str | None = None, subfolder: str | None = None, **access: Any
) -> str:
    """Folder of checkpoint `name` that holds its `config.json` at least. Raises `ValueError`."""
    name = os.fspath(name)
    if _is_folder(name, revision):
        return os.path.join(name, subfolder) if subfolder else name
    from huggingface_hub import hf_hub_download

    with _one_sentence(name, revision, access):
        return os.path.dirname(
            hf_hub_download(name, "config.json", subfolder=subfolder or None, revision=revision, **access)
        )


def checkpoint_folder(
    name: str | os.PathLike,
    revision: str | None = None,
    subfolder: str | None = None,
    at: str | None = None,
    **access: Any,
) -> str:
    """Folder of checkpoint `name` with all that loading reads, as far as the checkpoint has it.

    `at`: where its `config.json` was fetched to, which fixes the commit. Raises `ValueError`.
    """
    name = os.fspath(name)
    folder = at or config_folder(name, revision, subfolder, **access)
    if os.path.isdir(name):
        return folder
    from huggingface_hub import constants, snapshot_download

    # Releases before 2 ask the hub what a commit holds, offline or not.
    offline = {"local_files_only": True} if constants.HF_HUB_OFFLINE else {}
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [*(f"{prefix}{kind}" for kind in _KINDS), f"{prefix}*.jinja", f"{prefix}recipe.yaml"]
    ignored = [*(f"{prefix}*/{kind}" for kind in _KINDS), f"{prefix}trainer_state.json"]
    commit = commit_of(folder)
    with _one_sentence(name, revision, access):
        snapshot = snapshot_download(
            name, revision=commit or revision, allow_patterns=patterns, ignore_patterns=ignored, **access | offline
        )
    folder = os.path.join(snapshot, subfolder) if subfolder else snapshot
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(
            f"pretrained={name!r} has no safetensors, neither on the hub nor in its cache: {_FOLDER}, or fetch it once "
            "with access to the hub."
        )
    return folder


def commit_of(folder: str | os.PathLike) -> str | None:
    """The commit whose files `folder`, a part of the hub's cache, holds; `None` for other folders."""
    pairs = itertools.pairwise(Path(folder).parts)
    return next((name for above, name in pairs if above == "snapshots" and re.fullmatch("[0-9a-f]{40}", name)), None)


def looks_local(name: str | os.PathLike) -> bool:
    """Whether `name` is written as a path: no model on a hub is named so."""
    return os.fspath(name).startswith(("/", "./", "../", "~")) or os.fspath(name).count("/") > 1


def _is_folder(name: str, revision: str | None) -> bool:
    """Whether `name` is a folder; `ValueError` if it can be nothing else, or has no revisions."""
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} does not apply to the directory {name!r}: leave it out, or give a name on the "
                "hub."
            )
        return True
    if looks_local(name) or os.path.exists(name):
        raise ValueError(f"pretrained={name!r} is not a directory: {_FOLDER}.")
    return False


@contextlib.contextmanager
def _one_sentence(name: str, revision: str | None, access: dict[str, Any]) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a `ValueError` that says what to do."""
    from huggingface_hub import constants, errors

    version = "" if revision is None else f" at revision={revision!r}"
    shown = f"pretrained={name!r}{version}"
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(
            f"pretrained={name!r} is neither a directory nor a name on the hub: {_FOLDER}, or its OWNER/NAME."
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{shown} is gated: ask for access on its page on the hub, then run hf auth login or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{shown} is not a directory, and the hub shows no model of that name: {_FOLDER}, correct the name, or run "
            "hf auth login if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{shown} is not on the hub: give a branch, a tag or a whole commit hash.") from error
    except errors.LocalEntryNotFoundError as error:
        cached_only = "local_files_only" if access.get("local_files_only") else "HF_HUB_OFFLINE"
        offline = constants.HF_HUB_OFFLINE or access.get("local_files_only")
        why = f"and {cached_only} forbids fetching it" if offline else "and the hub cannot be reached"
        raise ValueError(
            f"{shown} is neither a directory nor complete in the hub's cache, {why}: {_FOLDER}, or fetch it once with "
            "access to the hub."
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{shown} is not an L2D checkpoint: it holds no config.json on the hub.") from error
    except OSError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{shown} could not be fetched ({reason}): try again, or {_FOLDER}.") from error
