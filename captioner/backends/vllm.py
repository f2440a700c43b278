"""Captions by a model that vLLM runs within Ray Data: what it is asked, row by row, and how its engine is set up."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from captioner.backends.prompts import check_styles, prompt_of
from captioner.backends.requests import Encoding, data_uri, messages
from captioner.styles import Style


@dataclass(frozen=True, kw_only=True)
class VLLMConfig:
    """A chat model for vLLM, which batches requests as they come; it is installed with the extra `vllm`."""

    model: str  # a hub's name, or a folder in the Hugging Face layout: there is no other way to pin a revision
    trust_remote_code: bool = False  # run Python that comes with the model
    seed: int = 0
    max_side: int = 1024  # pixels; larger images are shrunk
    encoding: Encoding = "jpeg"
    batch: int = 32  # requests that are handed to the engine together
    gpus_per_engine: int = 1  # over which one model is split (tensor parallelism)
    max_length: int | None = None  # tokens of picture, prompt and caption; none: the model's own
    template_reads: Literal["parts", "text"] = "parts"  # what the model's chat template takes for a message's content

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("A captioner of vLLM needs a model: give a hub's name or a folder.")
        for name in ("max_side", "batch", "gpus_per_engine"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but it is {getattr(self, name)}.")

    def check(self, styles: Sequence[Style]) -> None:
        """ValueError where a style has no prompt, or asks for a decoder or beams."""
        check_styles(styles, self.model, cannot=("beams",), needs_prompt=True)

    def engine(self) -> dict[str, Any]:
        """The arguments of Ray Data's `vLLMEngineProcessorConfig` that this config decides."""
        length = {"max_model_len": self.max_length} if self.max_length else {}
        return {
            "model_source": self.model,
            "batch_size": self.batch,
            "engine_kwargs": {
                "tensor_parallel_size": self.gpus_per_engine,
                "trust_remote_code": self.trust_remote_code,
                "limit_mm_per_prompt": {"image": 1},
                "seed": self.seed,
                **length,
            },
            "prepare_multimodal_stage": {
                "enabled": True,
                "chat_template_content_format": "openai" if self.template_reads == "parts" else "string",
                # A stage of its own, which would read the model's config without what the engine was told.
                "model_config_kwargs": {"trust_remote_code": self.trust_remote_code, **length},
            },
        }


@dataclass(frozen=True)
class Questions:
    """Rows to requests: one for each style, with the picture in it. A pure function that can be sent to any process."""

    config: VLLMConfig
    styles: tuple[Style, ...]
    alt_column: str
    whole: bool = False  # pictures as the corpus has them
    reads: tuple[str, ...] = field(init=False)
    writes: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", ("pixels", self.alt_column))
        object.__setattr__(self, "writes", tuple(f"caption_{style.name}" for style in self.styles))

    def __call__(self, batch: dict[str, list]) -> dict[str, list[dict[str, Any]]]:
        """For each of `writes`, one request a row: `messages`, and `sampling_params` as vLLM names them."""
        uris = [data_uri(image, self.config.max_side, self.config.encoding) for image in batch["pixels"]]
        return {
            f"caption_{style.name}": [
                {"messages": messages(prompt_of(style, alt), uri), "sampling_params": self._sampling(style)}
                for uri, alt in zip(uris, batch[self.alt_column], strict=True)
            ]
            for style in self.styles
        }

    def _sampling(self, style: Style) -> dict[str, Any]:
        return {
            "temperature": 0.0,
            "min_tokens": style.min_tokens,
            "max_tokens": style.max_tokens,
            "seed": self.config.seed,
            "detokenize": False,  # a stage after the engine does it
        }
