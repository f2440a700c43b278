"""Which of the files that a pattern matches may belong to a corpus: none that is hidden, is ours, or leads out."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from infra import storage

HIDDEN, OURS, LINKS = "hidden files", "what Rescribe made", "links that leave the corpus"
_JUNK = frozenset(["__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "$recycle.bin", "lost+found", "@eadir"])
# Of an artifact, at any stage of its making: `<step>/<id>/...`, and what lies directly in it.
_ARTIFACT = re.compile(r"((?:.*/)?[a-z_]+/[0-9a-f]{16}(?:\.\d+)?)/.+")
_MARKS = ("manifest.json", "lease.json", "shards.json", "ledger.json", "finished.json")
_EXPORT = re.compile(r"((?:.*/)?)(?:work/export\.json|manifest\.json)")
_MOST_MANIFESTS = 1000  # that are opened to see whether they are an export's


@dataclass
class Listing:
    """The files below `root` that may belong to a corpus, by path, and the paths passed over, by kind."""

    root: str
    files: dict[str, storage.File]
    passed: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, kind: str, paths: list[str]) -> None:
        """Note paths that do not count, and leave them out of the files."""
        if paths:
            self.passed.setdefault(kind, []).extend(paths)
        for path in paths:
            self.files.pop(path, None)


def list_files(pattern: str, follow_links: bool = False) -> Listing:
    """List what a pattern matches. FileNotFoundError where nothing does.

    Symbolic links are followed where they stay within the corpus: below its root, or below the repository's folder in
    a hub's cache, where `snapshots` links to `blobs`; others only with `follow_links`.
    """
    root = find_root(pattern)
    listed, out = _listed(pattern, root, follow_links)
    paths = {file.url.removeprefix(root).lstrip("/"): file for file in listed}
    found = Listing(root, dict(sorted(paths.items())))
    found.pass_over(LINKS, [path.removeprefix(root).lstrip("/") for path in out])
    found.pass_over(HIDDEN, [path for path in paths if is_hidden(path)])
    found.pass_over(OURS, list(_ours(found)))
    return found


def is_hidden(path: str) -> bool:
    """Whether a path, or a folder on it, is one that systems and editors hide."""
    parts = path.split("/")
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in _JUNK for part in parts)


def find_root(pattern: str) -> str:
    """The folder that the paths within a corpus are relative to: what comes before the first wildcard."""
    url = storage.absolute(pattern)
    if storage.is_local(url):
        return storage.folder_of(url)
    scheme, _, path = url.rpartition("://")
    parts = path.split("/")
    plain = next((number for number, part in enumerate(parts) if any(c in part for c in "*?[{")), None)
    if plain is None:
        # S3 has no folders: a name with something below it is one.
        plain = len(parts) if storage.list_names(url) not in ([], [parts[-1]]) else len(parts) - 1
    return f"{scheme}://{'/'.join(parts[:plain])}"


def _listed(pattern: str, root: str, follow_links: bool) -> tuple[list[storage.File], list[str]]:
    """The files, and local links that are not followed."""
    if not storage.is_local(pattern):
        return storage.listing(pattern), []
    home, out = _home(root), list[str]()

    def follows(link: str) -> bool:
        real = os.path.realpath(link)
        followed = os.path.exists(real) and (follow_links or real == home or real.startswith(home + "/"))
        if not followed:
            out.append(link)
        return followed

    try:
        return storage.listing(storage.absolute(pattern), follows), out
    except FileNotFoundError:
        if not out:
            raise
        raise FileNotFoundError(
            f"{pattern} matches no file but {len(out)} symbolic links that lead out of {home}, or to nothing, such as "
            f"{out[0]} -> {os.readlink(out[0])}. To read where they lead, follow them: --follow-links."
        ) from None


def _home(root: str) -> str:
    """What links may lead to: the root, or the repository in whose `snapshots` it lies."""
    real = os.path.realpath(root)
    parts = real.split("/")
    for place in (number for number, part in enumerate(parts) if part == "snapshots"):
        repository = "/".join(parts[:place])
        if os.path.isdir(f"{repository}/blobs"):
            return repository
    return real


def _ours(found: Listing) -> Iterator[str]:
    """Paths of stores and of exports: a corpus may lie around them."""
    artifacts: dict[str, bool] = {}
    exports: set[str] = set()
    for path in found.files:
        match = _EXPORT.fullmatch(path)
        if match and match[1] and len(exports) < _MOST_MANIFESTS and _is_export(found, path):
            exports.add(match[1])  # an export that is given as the corpus itself is one
        if match := _ARTIFACT.fullmatch(path):
            folder = match[1]
            if folder not in artifacts:
                artifacts[folder] = any(
                    f"{folder}/{mark}" in found.files or storage.exists(storage.join(found.root, folder, mark))
                    for mark in _MARKS
                )
    for path in found.files:
        match = _ARTIFACT.fullmatch(path)
        if (match and artifacts[match[1]]) or any(path.startswith(folder) for folder in exports):
            yield path


def _is_export(found: Listing, path: str) -> bool:
    file = found.files[path]
    if path.endswith("work/export.json"):
        return True
    try:
        manifest = storage.read_json(file.url) if file.size < 2**26 else None
    except ValueError:
        return False
    return isinstance(manifest, dict) and manifest.get("step") == "export" and "id" in manifest
