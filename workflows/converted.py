"""`rescribe convert_dvae`: OpenAI's pickled dVAE becomes a folder that `--tokenizer` takes."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from infra import storage
from infra.trouble import explained
from t2i.tokenizers.pickled_dvae import load_pickled
from t2i.tokenizers.task import save_tokenizer
from workflows.commands import say


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """OpenAI's dVAE, two pickled modules, as a tokenizer's folder in our layout."""

    encoder: Path  # encoder.pkl
    decoder: Path  # decoder.pkl
    out: str  # folder to write to, local or s3://
    trust: bool = False  # read the pickles
    json: bool = False


def convert_dvae(arguments: list[str]) -> dict[str, Any]:
    """Make a tokenizer of OpenAI's pickled dVAE: `rescribe convert_dvae --encoder A --decoder B --out dvae --trust`."""
    options = tyro.cli(ConvertOptions, args=arguments, prog="rescribe convert_dvae")
    if not options.trust:
        raise ValueError(
            f"{options.encoder.name} and {options.decoder.name} are pickles, which may run code of whoever made them "
            "when they are read. They are read without their classes here, but give --trust only if they are OpenAI's."
        )
    if storage.exists(options.out):
        raise ValueError(f"{options.out} is there already: name a folder that is not.")
    tokenizer = load_pickled(options.encoder, options.decoder)
    with explained(options.out, local=True), tempfile.TemporaryDirectory() as local:
        save_tokenizer(tokenizer, local)
        storage.upload(local, options.out)
    say(f"Name it wherever a tokenizer is asked for: --tokenizer {options.out}")
    return {"tokenizer": options.out, "codes": tokenizer.codebook_size}
