"""Load a published image-text-to-text model and its processor, and say plainly why where that cannot be."""

from typing import Any

import torch
import transformers

from captioner.hub import asked

ENDPOINT = "serve it elsewhere and caption through its endpoint"


def load(
    name: str, revision: str, trust_remote_code: bool, kind: torch.dtype
) -> tuple[Any, "transformers.PreTrainedModel"]:
    """The processor, with images processed by Pillow where the family can, and the model in the number format `kind`.

    Raises what `asked` does where it cannot be had, ValueError where it is of another sort, lacks weights, needs
    torchvision, or brings code that was not asked for.
    """
    chosen = {"revision": revision or None, "trust_remote_code": trust_remote_code}
    try:
        with asked(name, "model"):
            config = transformers.AutoConfig.from_pretrained(name, **chosen)
            _check_kind(name, config)
            processor = _processor(name, chosen)
            loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
                name, config=config, dtype=kind, output_loading_info=True, **chosen
            )
    except (ImportError, ValueError) as error:
        if (said := _explained(name, str(error), trust_remote_code)) is None:
            raise
        raise ValueError(said) from error
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{name} lacks {len(report['missing_keys'])} weights of its model, such as {min(report['missing_keys'])}; "
            "without them it would speak at random."
        )
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(f"{name} has no processor for both images and text; choose a model that was saved with one.")
    return processor, model.eval()


def _processor(name: str, chosen: dict[str, Any]) -> Any:
    """Pillow is chosen even where torchvision is installed, so that all machines see the same pixels."""
    try:
        return transformers.AutoProcessor.from_pretrained(name, backend="pil", **chosen)
    except ImportError:  # a processor of videos takes the choice for its own, and has nothing but torchvision
        return transformers.AutoProcessor.from_pretrained(name, **chosen)


def _check_kind(name: str, config: "transformers.PreTrainedConfig") -> None:
    if config.model_type == "blip":
        raise ValueError(f"{name} is a BLIP captioner, which is decoded by code of our own; give no other backend.")
    known = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    remote = "AutoModelForImageTextToText" in getattr(config, "auto_map", {})
    if type(config) not in known and not remote:
        raise ValueError(
            f"{name} holds a model of type '{config.model_type}', which does not turn an image and a text into text; "
            "choose one that does, such as BLIP-2, LLaVA or Florence-2."
        )


def _explained(name: str, error: str, trusted: bool) -> str | None:
    if "torchvision" in error.lower():
        return (
            f"The processor of {name} needs torchvision, which is not installed; install the one for your torch, "
            f"or {ENDPOINT}, or choose a family that does without, such as BLIP-2, LLaVA or Florence-2."
        )
    if "trust_remote_code" in error and not trusted:
        return (
            f"{name} brings Python code of its own, which is not run unless asked for; "
            f"read it and set trust_remote_code, or {ENDPOINT}."
        )
    return None
