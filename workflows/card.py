"""The card of an exported dataset: what the Hub reads in its head, and what a person has to know below."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment

from infra import strict
from infra.store import Artifact
from workflows.exported import METADATA

CARD = "README.md"
SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7))
SIZES += (("10M<n<100M", 10**8), ("100M<n<1B", 10**9), ("1B<n<10B", 10**10), ("10B<n<100B", 10**11))
LARGEST = "100B<n<1T"
LISTED = 50  # files that the card names with their sources
CHOSEN = {
    "kept": "those that the mixture keeps",
    "accepted": "those that were captioned",
    "all": "all that there are, with their states",
}


def write_card(
    manifest: Mapping[str, Any],
    artifacts: Sequence[Artifact],
    styles: Sequence[str],
    files: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, str] | None = None,
) -> str:
    """The card as Markdown under a YAML header, of an export's manifest, the artifacts in it and its data files.

    `scores` are the lists of scores of all texts of a picture by the columns of the first's; None where none has two.
    """
    config, summary, captions = manifest["config"], manifest["summary"], artifacts[1].summary
    shards = {name: file for name, file in files.items() if "rows" in file}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["cell"] = _cell
    environment.filters["tojson"] = strict.dumps  # a text of JSON is one of YAML
    text = resources.files("workflows").joinpath("card.md.jinja").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        manifest=manifest,
        config=config,
        summary=summary,
        size=sum(file["size"] for file in files.values()),
        files=dict(list(shards.items())[:LISTED]),
        unlisted=max(0, len(files) - min(len(shards), LISTED)),
        styles=styles,
        scores=scores,
        corpus=_corpus(artifacts[0].manifest["config"]["corpus"]),
        category=next((name for name, below in SIZES if summary["exported"] < below), LARGEST),
        paths=_paths(config["format"], files),
        chosen=CHOSEN[config["only"]],
        before=f"{config['prefix']}." if config["prefix"] else "",
        mixed=artifacts[2].summary if len(artifacts) > 2 else None,
        made=_made(captions, styles),
        faults=captions.get("faults"),
        collapse=captions.get("collapse"),
    )


def _paths(form: str, files: Mapping[str, Any]) -> list[str]:
    """Patterns of the files that `datasets` is to read."""
    if form != "folder":
        return ["data/*.tar" if form == "webdataset" else "data/*.parquet"]
    endings = {f"*.{name.rpartition('.')[2]}" for name in files if not name.endswith((".txt", METADATA))}
    return [f"data/*/{name}" for name in (*sorted(endings), METADATA)]


def _made(captions: Mapping[str, Any], styles: Sequence[str]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each style, one for each attempt; of captions without them, what their manifest says."""
    told = captions.get("provenance") or {}
    asked = {style["name"]: style for style in captions.get("styles", ())}
    known = {name: captions.get(name) for name in ("captioner", "weights_sha256", "precision", "seed")}
    found = {style: told.get(style) or known | {"style": asked.get(style, style)} for style in styles}
    return {style: [records] if isinstance(records, Mapping) else list(records) for style, records in found.items()}


def _corpus(given: Any) -> str:
    """What was captioned, without the folders in which it lay: `photos`, `photos/*.tar`, `shapes`."""
    if not isinstance(given, str):
        return "shapes"
    parts = given.rstrip("/").split("/")
    first = next((number for number, part in enumerate(parts) if any(c in part for c in "*?[{")), len(parts))
    return "/".join(parts[max(0, first - 1) :])


def _cell(value: Any) -> str:
    """Plain data as a line of text that ends no cell and no code."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} {each}" for name, each in value.items()) or "none"
    return " ".join(str(value).replace("|", "\\|").replace("`", "'").split())
