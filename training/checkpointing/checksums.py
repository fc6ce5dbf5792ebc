"""Checksums of a checkpoint's files, so that damage is seen before a run resumes from it.

- `write_checksums`: notes all files of a folder in its `checksums.json`, after they have reached the disk
- `changed_files`: those that are gone, or not as they were noted
"""

import hashlib
import json
import os

CHECKSUMS = "checksums.json"


def write_checksums(folder: str) -> None:
    """Bring all files below `folder` to the disk and note their SHA-256 in `checksums.json`."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            found[os.path.relpath(path, folder)] = _checksum(path)
    with open(os.path.join(folder, CHECKSUMS), "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def changed_files(folder: str) -> list[str]:
    """Names of files that are missing or differ from what was noted; none where nothing was noted."""
    path = os.path.join(folder, CHECKSUMS)
    if not os.path.isfile(path):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            noted = json.load(file)
        return [name for name, checksum in noted.items() if not _fits(os.path.join(folder, name), checksum)]
    except (ValueError, AttributeError, TypeError):
        return [CHECKSUMS]


def _checksum(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _fits(path: str, noted: str) -> bool:
    try:
        return _checksum(path) == noted
    except OSError:
        return False
