"""Compute once: a step's folder is named by its version, config and inputs, and its manifest is written last."""

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import eq
from typing import Any, overload

from infra import storage, strict
from infra.artifact import BEGUN, Planned, Step
from infra.artifact import MANIFEST as MANIFEST
from infra.artifact import Artifact as Artifact
from infra.artifact import by_shard as by_shard
from infra.artifact import step as step
from infra.cluster import Cluster
from infra.config import fingerprint, from_dict, same, to_dict, with_floats
from infra.data.revision import revise
from infra.gauges import Gauges
from infra.lease import Lease
from infra.memory import MemoryWatch
from infra.metrics import Progress, duration
from infra.older import grow, look, regret
from infra.spent import CpuWatch
from infra.track import check_installed

# What its manifest does not vouch for: shards and their side files, which the ledger does, and what serves the making.
UNLISTED = (MANIFEST, BEGUN, "lease.json", "shards", "wide", "parts", "attempts", "checkpoints", "tensorboard")
# Fields that change a result, and hardly how long it takes.
TIMELESS = ("seed", "lr", "weight_decay", "guidance", "temperature", "top_k", "top_p", "min_words", "max_words", "name")
LIBRARIES = ("torch", "ray", "deepspeed", "transformers", "diffusers", "pyarrow", "pillow", "numpy")


class Store:
    """A folder, local or s3://, of artifacts by step and id: the plan, the run, the resume and the cache."""

    def __init__(self, root: str, cluster: Cluster, steps: int = 0) -> None:
        check_installed(cluster.track)
        self.root, self.cluster = as_folder(root), cluster
        self.made: list[Artifact] = []
        self._steps = steps  # of the whole run, for the progress line; 0: not known

    @overload
    def step(self, work: Step, config: None, *inputs: Artifact | None) -> None: ...
    @overload
    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Artifact: ...
    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Artifact | None:
        """The artifact of `work(config, *inputs)`: found if it is there, continued or made if it is not.

        In place of a config a text is the path of an artifact that is there already, and None leaves the step out. An
        input that is None is one that the step does without.
        """
        if config is None:
            return None
        number = f"[{len(self.made) + 1}/{self._steps}] " if self._steps else ""
        if isinstance(config, str):
            given = Artifact.open(storage.absolute(config))
            self._progress(work, given.id, number).close(f"given: {given.path}")
            return self._keep(given)
        identity, newest = _there(self.root, work, config, inputs)
        progress = self._progress(work, identity, number)
        if newest:
            progress.close(f"done already: {newest}")
            return self._keep(Artifact.open(newest))
        return self._keep(self._make(work, config, inputs, identity, progress))

    def retry(self, artifact: Artifact, work: Step, config: Any, only: Sequence[str] = ()) -> Artifact:
        """A new revision of an artifact, in which rows that failed for a reason in `only` (none: any) are tried again.

        ValueError where no row failed so, or where a newer revision is there already.
        """
        identity, _, revision = artifact.id.partition(".")
        newest = newest_revision(self.root, work.name, identity)
        if newest != artifact.path:
            raise ValueError(f"{artifact.path} has a newer revision: {newest}. Retry that one.")
        renewed = f"{identity}.{int(revision or 0) + 1}"
        path = storage.join(self.root, work.name, renewed)
        with _swept(path), Lease(path):
            revise(artifact.path, path, only, leave=(MANIFEST, BEGUN, "lease.json"))
        inputs = work.arranged(artifact.inputs, artifact.manifest.get("without", ()))
        return self._make(work, config, inputs, renewed, self._progress(work, renewed), fresh=False)

    def _progress(self, work: Step, identity: str, number: str = "") -> Progress:
        title, gauges = f"{number}{work.name:<15}", Gauges(work.name, identity)
        return Progress(title, gauges=gauges, stall_seconds=self.cluster.stall_seconds)

    def _make(
        self,
        work: Step,
        config: Any,
        inputs: Sequence[Artifact | None],
        identity: str,
        report: Progress,
        fresh: bool = True,
    ) -> Artifact:
        path, there = storage.join(self.root, work.name, identity), [each for each in inputs if each is not None]
        with _swept(path), Lease(path), MemoryWatch() as memory, CpuWatch() as spent, report:
            started = time.time()
            begun = {
                "step": work.name,
                "id": identity,
                "version": work.version,
                "config": to_dict(config),
                "key": work.key(config) if work.key else None,
                "inputs": [self._relative(artifact.path) for artifact in there],
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            }
            if without := [name for name, each in zip(work.input_names, inputs, strict=False) if each is None]:
                begun["without"] = without
            if work.shards:
                storage.write_json(storage.join(path, BEGUN), begun)
            counts, taken = grow(work, config, there, path, report.note) if fresh else ({}, {})
            summary = work.work(config, *inputs, out=path, cluster=self.cluster, report=report)
            regret(work, config, there, path, taken)
            manifest = begun | {
                "summary": summary,
                "files": _files(path),
                "taken": counts,
                "seconds": round(time.time() - started, 2),
                "cpu_seconds": round(spent.seconds(), 2),
                "peak_memory_gb": round(memory.peak_gb, 3),
                "cluster": to_dict(self.cluster),
                "libraries": libraries(),
            }
            storage.write_json(storage.join(path, MANIFEST), manifest, overwrite=False)
            if work.shards:
                storage.remove(storage.join(path, BEGUN))
        made = Artifact(path, manifest)
        nothing = work.told(config, there, made) if work.told and not manifest["files"] else []
        report.close("; ".join(nothing) or f"{manifest['seconds']:,.1f} s  {_brief(summary)}")
        return made

    def _keep(self, artifact: Artifact) -> Artifact:
        self.made.append(artifact)
        return artifact

    def _relative(self, path: str) -> str:
        """Inputs of the same store are named within it, so that a store can be moved."""
        return path.removeprefix(self.root + "/")


class Plan:
    """Stands where a Store stands and makes nothing: it writes down what would run, and why.

    `before`, artifacts by `<step>/<id>`, are what it is compared with; without them it is the newest of each step that
    is not `apart`.
    """

    def __init__(self, root: str, before: Collection[str] = (), apart: Collection[str] = ()) -> None:
        self.root, self._before, self._apart = as_folder(root), before, apart
        self.lines: list[tuple[str, str, str]] = []  # step, id, "done" or the reason to run
        self.told: dict[str, list[str]] = {}  # by id, what a step says besides

    @overload
    def step(self, work: Step, config: None, *inputs: Artifact | None) -> None: ...
    @overload
    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Artifact: ...
    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Artifact | None:
        """Note whether `work(config, *inputs)` is done; returns what stands for its artifact."""
        if config is None:
            return None
        if isinstance(config, str):
            made = Artifact.open(storage.absolute(config))
            self.lines.append((made.step, made.id, "done"))
            self.told[made.id] = [f"given: {made.path}"]
            return made
        there = [artifact for artifact in inputs if artifact is not None]
        identity, newest = _there(self.root, work, config, inputs)
        path = newest or storage.join(self.root, work.name, identity)
        identity = storage.name(path)
        made_of = {"step": work.name, "id": identity, "version": work.version, "config": to_dict(config), "summary": {}}
        made_of["inputs"] = [artifact.path.removeprefix(self.root + "/") for artifact in there]
        reason = self._reason(path, work, made_of)
        if reason == "done":
            self.lines.append((work.name, identity, reason))
            made = Artifact.open(path)
            self.told[identity] = work.told(config, there, made) if work.told else []
            return made
        wanted, found = look(work, config, there, path)
        if found:
            reason += f"; {len(wanted) - len(found)} of {len(wanted)} shards are new"
        self.lines.append((work.name, identity, reason))
        self.told[identity] = work.told(config, there, None) if work.told else []
        if not found and not storage.list_names(path) and (seconds := self._last(work, made_of)) >= 1:
            self.told[identity].append(f"about {duration(seconds)}, as last time")
        foreseen = {name: found[name].record if name in found else None for name in wanted} if work.shards else None
        return Planned(path, made_of, foreseen)

    def _last(self, work: Step, wanted: dict[str, Any]) -> float:
        """The seconds that as much work of the step took when it was done last in this store; 0 where it never was."""
        if not storage.is_local(self.root):  # machines of all kinds may share another
            return 0.0
        alike = [each for each in self._finished(work) if _as_much(each, wanted)]
        return max(alike, key=lambda manifest: manifest["started"], default={}).get("seconds", 0.0)

    def _finished(self, work: Step) -> list[dict[str, Any]]:
        """The manifests of what a step made in this store."""
        folder = storage.join(self.root, work.name)
        urls = [storage.join(folder, name, MANIFEST) for name in storage.list_names(folder)]
        made = [storage.read_json(url) for url in urls if storage.exists(url)]
        for each in made:
            with suppress(TypeError, ValueError):  # fields that came later have their defaults
                each["config"] = to_dict(from_dict(work.config_class, each["config"]))
        return made

    def _reason(self, path: str, work: Step, wanted: dict[str, Any]) -> str:
        if storage.exists(storage.join(path, MANIFEST)):
            return "done"
        if storage.list_names(path):
            return "was cut: continues"
        finished = self._finished(work)
        finished = [each for each in finished if f"{each['step']}/{each['id']}" not in self._apart]
        if not finished:
            return "first time"
        own = [each for each in finished if f"{each['step']}/{each['id']}" in self._before]
        newest = max(own or finished, key=lambda manifest: manifest["started"])
        return _difference(newest, wanted)


def as_folder(root: str) -> str:
    """Where a store is, absolute; NotADirectoryError where a file is."""
    if storage.is_local(root) and os.path.isfile(root.removeprefix("file://")):
        raise NotADirectoryError(f"{root} is a file. Give a folder.")
    return storage.absolute(root)


@contextmanager
def _swept(path: str) -> Iterator[None]:
    """What ends before anything was made leaves no folder, neither its own nor those that were made for it."""
    try:
        yield
    except BaseException:
        with suppress(OSError, ValueError):
            there: list[storage.File] = []
            with suppress(FileNotFoundError):
                there = storage.listing(path)
            if {storage.name(file.url) for file in there} <= {BEGUN}:
                storage.remove(path)
                for folder in (os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
                    if storage.is_local(path) and folder != os.getcwd():
                        os.rmdir(folder)  # unless it holds something
        raise


def _there(root: str, work: Step, config: Any, inputs: Sequence[Artifact | None]) -> tuple[str, str | None]:
    """The id of `work(config, *inputs)`, and where its newest finished revision lies, if there is one.

    One that was made of the same config, read from a file before 0.2, will do.
    """
    ids, older = [work.identity(config, inputs)], with_floats(config)
    if fingerprint(older) != fingerprint(config):
        ids.append(work.identity(older, inputs))
    return ids[0], next(filter(None, (newest_revision(root, work.name, each) for each in ids)), None)


def newest_revision(root: str, step: str, identity: str) -> str | None:
    """Where the newest finished revision of an artifact lies: `<id>`, or `<id>.1`, `<id>.2`, ... after retries."""
    found = [re.fullmatch(rf"{identity}(?:\.(\d+))?", name) for name in storage.list_names(storage.join(root, step))]
    numbered = sorted(((int(match[1] or 0), match[0]) for match in found if match), reverse=True)
    for _, name in numbered:
        path = storage.join(root, step, name)
        if storage.exists(storage.join(path, MANIFEST)):
            return path
    return None


def _files(path: str) -> dict[str, dict[str, Any]]:
    """Size and hash of each file that the manifest vouches for, by its path within the artifact."""
    named = [(file.url.removeprefix(path).lstrip("/"), file.url) for file in storage.listing(path)]
    return {name: storage.digest(url) for name, url in named if not set(name.split("/")[:-1] or [name]) & {*UNLISTED}}


def libraries() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def _as_much(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a former run did as much: of a config that differs in what takes no time, and of the same corpus."""
    changed = {name.rpartition(".")[2] for name, _, _ in _changes(old["config"], new["config"], same)}
    first, second = ([path for path in each["inputs"] if "ingest" in path.split("/")] for each in (old, new))
    return old["version"] == new["version"] and not old.get("taken") and changed <= {*TIMELESS} and first == second


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    if old["version"] != new["version"]:
        return f"version {old['version']} -> {new['version']}"
    if changes := _changes(old["config"], new["config"], eq):
        return _told(changes)
    if fresh := [path.split("/")[-2] for path in new["inputs"] if path not in old["inputs"]]:
        return f"new input: {', '.join(fresh)}"
    return _told(_changes(old["config"], new["config"], same)) or "what it reads has changed"  # 1 or 1.0, at last


def _told(changes: list[tuple[str, str, str]]) -> str:
    told = ", ".join(f"{name} {was} -> {now}" for name, was, now in changes[:3])
    return told + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


def _changes(old: Any, new: Any, equal: Callable[[Any, Any], bool], name: str = "") -> list[tuple[str, str, str]]:
    """Leaves that differ, by dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = {key: f"{name}.{key}" if name else key for key in [*old, *new]}
        return [each for key, full in inner.items() for each in _changes(old.get(key), new.get(key), equal, full)]
    return [] if equal(old, new) else [(name, strict.dumps(old)[:40], strict.dumps(new)[:40])]


def _brief(summary: dict[str, Any]) -> str:
    plain = {key: value for key, value in summary.items() if isinstance(value, (int, float, str)) and key != "seconds"}
    shown = [f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()]
    return "  ".join(shown[:8])
