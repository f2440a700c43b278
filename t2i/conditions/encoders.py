"""Frozen text encoders of transformers, those of CLIP and T5: texts to features, padded and masked as their users do.

`transformers` is imported where an encoder is used: it takes seconds, and who reads cached features does without.

Shapes: B texts, S tokens, E width of the features, P width of a pooled vector.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

# A local path of what lies at an address, for as long as it is read. `t2i/priors/task.py` says how s3:// comes here.
fetched: Callable[[str], AbstractContextManager[str]] = nullcontext
# Around what an encoder computes, so that it is told apart where FLOPs are counted; the same file says which.
asked: Callable[[], AbstractContextManager[None]] = nullcontext

CLIP, T5 = "clip", "t5"
KINDS = {"clip": CLIP, "clip_text_model": CLIP, "t5": T5}  # by a config's model_type
MOST = 512  # tokens of a T5 whose tokenizer names no length: what it was trained on
POOLED = {"none": "", "plain": "pooler_output", "projected": "text_embeds"}  # what transformers calls it
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Which encoder, how much of a text it reads, and what of its features is taken.

    Stable Diffusion 1 takes CLIP as it stands here. Its version 2 takes `layer=2`; XL too, with `norm=False`, and of
    its second encoder also `pooled="projected"`. Flux takes of CLIP `pooled="plain"` alone (`tokens=False`), and with
    Stable Diffusion 3 T5 with `masked=False`; PixArt and DeepFloyd take T5 as it stands here.
    """

    model: str = ""  # a folder, local or s3://, or a hub's name and perhaps a folder: owner/name/text_encoder
    tokenizer: str = ""  # likewise, where it lies elsewhere: owner/name/tokenizer
    revision: str = ""  # of a model from a hub: a branch, a tag, or best a commit
    length: int = 0  # tokens of a text, at most, with those that open and close it; 0: all that the encoder takes
    masked: bool | None = None  # whether padding is hidden, from the encoder and from who hears it; None: T5's alone
    layer: int = 1  # counted from the last, which is 1
    norm: bool = True  # after the last layer, also where an earlier one is taken
    tokens: bool = True  # a vector a token
    pooled: Literal["none", "plain", "projected"] = "none"  # CLIP's vector of the whole text, beside
    precision: Literal["fp32", "bf16"] = "bf16"  # that it computes in; its features are rounded to bf16 in any case

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("A text encoder needs a model: give a hub's name or a folder.")
        if self.length < 0 or self.layer < 1:
            raise ValueError(f"length is no less than 0 and layer than 1, but they are {self.length} and {self.layer}.")
        if not self.tokens and self.pooled == "none":
            raise ValueError("Of a text encoder tokens or a pooled vector are taken, but neither is asked for.")


class Sizes(NamedTuple):
    """What an encoder's own config says."""

    kind: str
    length: int  # tokens of a text, at most
    width: int  # of a token's features
    pooled: int  # of the pooled vector that is asked for; 0: none is
    masked: bool


class Features(NamedTuple):
    """Of some texts; bf16."""

    tokens: torch.Tensor | None  # (B, S, E), 0 where not seen
    seen: torch.Tensor | None  # (B, S) bool; None: all are
    pooled: torch.Tensor | None  # (B, P)


@cache
def sizes_of(config: TextEncoderConfig) -> Sizes:
    """The sizes; OSError where the encoder cannot be had, ValueError where it is none or cannot be used so."""
    import transformers

    with found_at(config.model) as (name, folder):
        found: Any = transformers.AutoConfig.from_pretrained(
            name, **folder, revision=config.revision or None, trust_remote_code=False
        )
    kind = KINDS.get(found.model_type)
    if kind is None:
        raise ValueError(
            f"{config.model} holds a model of type '{found.model_type}'; features of texts are taken of CLIP and T5."
        )
    masked = kind == T5 if config.masked is None else config.masked
    if kind == CLIP:
        text = getattr(found, "text_config", found)
        most = int(text.max_position_embeddings)
        width, layers = int(text.hidden_size), int(text.num_hidden_layers)
        pooled = {"none": 0, "plain": width, "projected": int(text.projection_dim)}[config.pooled]
    else:
        named = _tokenizer(config).model_max_length
        most, width, layers, pooled = (named if named < 10**6 else MOST), int(found.d_model), int(found.num_layers), 0
        if config.pooled != "none":
            raise ValueError(f"{config.model} is a T5, which has no vector of a whole text. Leave pooled out.")
    if kind == CLIP and config.length > most:
        raise ValueError(f"{config.model} takes {most} tokens at most, but length is {config.length}.")
    if config.layer > layers:
        raise ValueError(f"{config.model} has {layers} layers, but layer is {config.layer}, counted from the last.")
    return Sizes(kind, config.length or most, width, pooled, masked)


class Tokens:
    """Texts to token ids."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self._tokenizer, self.sizes = _tokenizer(config), sizes_of(config)
        found = self._tokenizer
        self._padding = found.pad_token_id if found.pad_token_id is not None else found.eos_token_id

    def counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens texts have before they are cut, with those that open and close them."""
        return [len(ids) for ids in self._ids(texts)]

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
        """Ids (B, S) int64 and which of them are seen, (B, S) bool; None: all, and S is the length that is read.

        What is too long is cut, and closed like any other text.
        """
        found = self._ids(texts)
        if long := [row for row, ids in enumerate(found) if len(ids) > self.sizes.length]:
            cut = self._ids([texts[row] for row in long], truncation=True, max_length=self.sizes.length)
            for row, ids in zip(long, cut, strict=True):
                found[row] = ids
        longest = max(map(len, found)) if self.sizes.masked else self.sizes.length
        lengths = np.array([len(ids) for ids in found])
        ids_BS = np.full((len(found), longest), self._padding, np.int64)
        for row, ids in enumerate(found):
            ids_BS[row, : len(ids)] = ids
        return ids_BS, np.arange(longest) < lengths[:, None] if self.sizes.masked else None

    def _ids(self, texts: Sequence[str], **cut: Any) -> list[list[int]]:
        return self._tokenizer(list(texts), verbose=False, **cut)["input_ids"] if texts else []


@cache
def tokens_of(config: TextEncoderConfig) -> Tokens:
    """One a process: a feed makes many batches."""
    return Tokens(config)


class TextEncoder:
    """An encoder and its tokenizer. No module, so that who holds it neither trains it nor saves it."""

    def __init__(self, config: TextEncoderConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.tokens, self.sizes = config, tokens_of(config), sizes_of(config)
        self._model: Any = _model(config, self.sizes.kind).to(device)
        self._device = torch.device(device)

    def read(self, texts: Sequence[str]) -> Features:
        """Features of texts."""
        ids_BS, seen_BS = self.tokens(texts)
        return self(torch.from_numpy(ids_BS), None if seen_BS is None else torch.from_numpy(seen_BS))

    @torch.no_grad()
    def __call__(self, ids_BS: torch.Tensor, seen_BS: torch.Tensor | None) -> Features:
        """Features of token ids (B, S); what `seen_BS` (B, S) hides, no token looks at."""
        config = self.config
        ids_BS = ids_BS.to(self._device)
        seen_BS = None if seen_BS is None else seen_BS.to(self._device)
        with asked(), torch.autocast(self._device.type, enabled=False):  # alike within a training and without
            out = self._model(
                input_ids=ids_BS,
                attention_mask=None if seen_BS is None else seen_BS.long(),
                output_hidden_states=config.layer > 1 or not config.norm,
            )
            tokens_BSE = self._tokens_of(out) if config.tokens else None
            pooled_BP = getattr(out, POOLED[config.pooled], None)
        if tokens_BSE is not None:
            tokens_BSE = tokens_BSE.bfloat16()
            tokens_BSE = tokens_BSE if seen_BS is None else tokens_BSE * seen_BS[..., None]
        return Features(tokens_BSE, seen_BS, None if pooled_BP is None else pooled_BP.bfloat16())

    def _tokens_of(self, out: Any) -> torch.Tensor:
        if self.config.layer == 1 and self.config.norm:
            return out.last_hidden_state
        hidden_BSE = out.hidden_states[-self.config.layer]
        return self._norm(hidden_BSE) if self.config.norm else hidden_BSE

    def _norm(self, hidden_BSE: torch.Tensor) -> torch.Tensor:
        held = self._model.encoder if self.sizes.kind == T5 else getattr(self._model, "text_model", self._model)
        return held.final_layer_norm(hidden_BSE)


def _model(config: TextEncoderConfig, kind: str) -> Any:
    import transformers

    whole = "CLIPTextModelWithProjection" if config.pooled == "projected" else "CLIPTextModel"
    found: Any = getattr(transformers, whole if kind == CLIP else "T5EncoderModel")
    with found_at(config.model) as (name, folder), quiet():  # not all weights of a whole CLIP are wanted
        model, report = found.from_pretrained(
            name,
            **folder,
            revision=config.revision or None,
            dtype=PRECISIONS[config.precision],
            output_loading_info=True,
        )
    if report["missing_keys"]:
        raise ValueError(
            f"{config.model} lacks {len(report['missing_keys'])} weights of its text encoder, such as "
            f"{min(report['missing_keys'])}; without them its features would say nothing."
        )
    return model.eval().requires_grad_(False)


@cache
def _tokenizer(config: TextEncoderConfig) -> Any:
    import transformers

    named = config.tokenizer or config.model
    revision = config.revision if place_of(named)[0] == place_of(config.model)[0] else ""
    with found_at(named) as (name, folder):
        return transformers.AutoTokenizer.from_pretrained(
            name, **folder, revision=revision or None, trust_remote_code=False
        )


def place_of(named: str) -> tuple[str, Mapping[str, str]]:
    """A folder, or the name of a hub's repository and the folder in it."""
    parts = named.split("/")
    if os.path.isdir(named) or len(parts) < 3 or parts[0] in ("", ".", "..", "~"):
        return named, {}
    return "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is told of weights while they are loaded: those that lack are an error, and others no matter."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def found_at(named: str, what: str = "text encoder") -> Iterator[tuple[str, Mapping[str, str]]]:
    """What transformers finds a model by; what it says of a missing file is told in our words, once."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    with fetched(named) if "://" in named else nullcontext(named) as local:
        logging.set_verbosity_error()  # a hub that does not answer is told of at the end, not at each try
        try:
            yield place_of(local)
        except OSError as error:
            raise _absent(named, what, error) from error
        finally:
            logging.set_verbosity(level)


def _absent(named: str, what: str, error: OSError) -> OSError:
    """Why a model cannot be had: as `captioner/hub.py` has it, which neither package takes from the other."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error.__cause__, LocalEntryNotFoundError) and not os.path.isdir(named):
        away = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        return ConnectionError(
            f"{named} is not on this machine, and the Hugging Face hub cannot be asked for it: {away}. Mend that, or "
            "fetch it elsewhere and give the folder instead."
        )
    said = str(error).strip().split("\n")[0][:300]
    return FileNotFoundError(f"There is no {what} at {named}, or it lacks a file: {said}")
