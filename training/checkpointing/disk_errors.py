"""What happens when the disk is full, or something else keeps a run from writing.

- `Interrupted`: ends the command with one sentence; what was saved before is as it was
- `writing`: turns a failure to write into it
- `connected`: turns the loss of another process into one
"""

import contextlib
import errno
import re
from collections.abc import Iterator

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


class Interrupted(RuntimeError):
    """A run that cannot go on for a reason that the user can mend; its message says how."""


class Disconnected(Interrupted):
    """Another process of the run was lost; every machine that is left says so."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Raise `Disconnected` where something inside fails because another process does not answer any more."""
    try:
        yield
    except RuntimeError as error:
        import torch  # late: this module is imported before anything heavy

        lost = isinstance(error, torch.distributed.DistError) or re.search(r"gloo/.*(peer|[Tt]ime)", str(error))
        if not lost:
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise Disconnected(
            f"another process of this run ended or cannot be reached ({reason}): checkpoints that were complete before "
            "are intact; start all processes again with resume_from_checkpoint: auto."
        ) from error


@contextlib.contextmanager
def writing(folder: str) -> Iterator[None]:
    """Raise `Interrupted` where something inside fails because the disk of `folder` is full or cannot be written."""
    try:
        yield
    except Exception as error:
        reason = disk_failure(error)
        if reason is None:
            raise
        raise Interrupted(
            f"output_dir={folder!r} cannot be written ({reason}): checkpoints that were complete before are intact; "
            "make room, then run the same command with resume_from_checkpoint: auto."
        ) from error


def disk_failure(error: BaseException) -> str | None:
    """The system's reason why a file could not be written, if that is what `error` is about.

    torch reports one as a `RuntimeError` of its archive, safetensors as text, both perhaps after the real one.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK:
            return seen.strerror
        if match := re.search(r"I/O error: (.+?) \(os error (\d+)\)", _text(seen)):
            return match[1] if int(match[2]) in _DISK else None
        seen = seen.__cause__ or seen.__context__
    in_archive = any(words in _text(error) for words in ("inline_container", "iostream error", "PytorchStreamWriter"))
    return "a file could not be written to its end" if in_archive else None


def _text(error: BaseException) -> str:
    return str(error.args[0]) if error.args else ""
