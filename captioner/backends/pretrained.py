"""Captions by any image-text-to-text model of transformers, as it was published."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from captioner.backends.prompts import check_styles, prompt_of
from captioner.backends.protocol import CaptionError, Outcome
from captioner.styles import Style

if TYPE_CHECKING:
    import transformers

_KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """A model of transformers that turns an image and a text into text: BLIP-2, LLaVA, Florence-2 and their like.

    `batch` images are captioned together; where memory does not suffice, fewer.
    """

    model: str  # a hub's name or a folder in the Hugging Face layout
    revision: str = ""  # of a model from a hub: a branch, a tag, or best a commit
    trust_remote_code: bool = False  # run Python that comes with the model
    batch: int = 16

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("A captioner of transformers needs a model: give a hub's name or a folder.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")

    def check(self, styles: Sequence[Style]) -> None:
        """ValueError where a style names a decoder: these models have one."""
        check_styles(styles, self.model)

    def build(self, styles: Sequence[Style], device: str, precision: str, actors: int) -> "Transformers":
        """Load the model; FileNotFoundError if it is not there, ValueError with a way out if it cannot be used."""
        from captioner.backends.loading import load  # transformers, slow to import: `plan` does without

        model: Any
        processor, model = load(self.model, self.revision, self.trust_remote_code, _KINDS[precision])
        backend = Transformers(processor, model.to(device), styles, self.batch)
        if backend.template is not None:
            check_styles(styles, self.model, needs_prompt=True)
        return backend


class Transformers:
    """A processor and its model. How the family wants to be asked is found out by asking it."""

    def __init__(
        self, processor: Any, model: "transformers.PreTrainedModel", styles: Sequence[Style], batch: int
    ) -> None:
        self._processor, self._model, self._styles, self._batch = processor, model, styles, batch
        self._generates: Any = model  # a model that can generate, which its type does not say
        self._tokenizer = processor.tokenizer
        # New tokens follow the last of a prompt, so padding goes before it; but an encoder's positions count from 0.
        self._encodes = bool(model.config.is_encoder_decoder)
        self._tokenizer.padding_side = "right" if self._encodes else "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._image_token = str(getattr(processor, "image_token", None) or "")
        added = self._tokenizer.added_tokens_decoder.values()
        self._control = [str(token) for token in added if token.special] + [self._image_token] * bool(self._image_token)
        self._asks_in_parts = self._template_takes_parts()
        self._places_image = bool(self._image_token) and self._wants_image_token()

    def caption(self, images: Sequence[np.ndarray], alts: Sequence[str | None]) -> list[list[Outcome]]:
        """Captions by greedy or beam search, in batches; a batch that fails is halved until the row is found."""
        pictures = [Image.fromarray(image) for image in images]
        plain = [self._without_control(alt) for alt in alts]
        return [self._in_style(style, pictures, plain) for style in self._styles]

    def _in_style(self, style: Style, pictures: list[Image.Image], alts: list[str]) -> list[Outcome]:
        texts = [self._asked(prompt_of(style, alt)) for alt in alts]
        outcomes: list[Outcome] = []
        while (start := len(outcomes)) < len(texts):
            part = slice(start, start + self._batch)
            outcomes += self._halving(pictures[part], texts[part], style)
        return outcomes

    def _halving(self, pictures: list[Image.Image], texts: list[str], style: Style) -> list[Outcome]:
        half = (len(texts) + 1) // 2
        if len(texts) <= self._batch:
            try:
                return list(self._generate(pictures, texts, style))
            except Exception as error:
                full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
                failure = CaptionError("oom" if full else "error", f"{type(error).__name__}: {error}")
            if full:  # out here, where the exception no longer keeps the tensors of its frames alive
                self._batch = half
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            if len(texts) == 1:
                return [failure]
        first = self._halving(pictures[:half], texts[:half], style)
        return first + self._halving(pictures[half:], texts[half:], style)

    @torch.no_grad()
    def _generate(self, pictures: list[Image.Image], texts: list[str], style: Style) -> list[str]:
        inputs = self._inputs(pictures, texts)
        length = inputs["input_ids"].shape[1]
        self._check_room(length + (0 if self._encodes else style.max_tokens))
        output = self._generates.generate(
            **inputs.to(self._model.device, self._model.dtype),
            do_sample=False,
            num_beams=style.beams,
            min_new_tokens=style.min_tokens,
            max_new_tokens=style.max_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        # Some families repeat the prompt, some do not.
        repeats = not self._encodes and torch.equal(output[:, :length].cpu(), inputs["input_ids"].cpu())
        tokens = output[:, length:] if repeats else output
        return [text.strip() for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, pictures: list[Image.Image], texts: list[str]) -> Any:
        # A template that writes <s> itself is not to get a second one.
        opened = bool(self.template and self._tokenizer.bos_token and texts[0].startswith(self._tokenizer.bos_token))
        return self._processor(
            images=pictures,
            text=texts,
            padding=True,
            return_tensors="pt",
            **({"add_special_tokens": False} if opened else {}),
        )

    def _check_room(self, tokens: int) -> None:
        """Past a learned position the model fails, and on a GPU it takes the whole process with it."""
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if limit and tokens > limit:
            raise ValueError(f"the prompt and the caption need {tokens} tokens, and the model ends at {limit}")

    @property
    def template(self) -> Any:
        """The chat template of a model that was tuned for conversation; None if it has none."""
        return getattr(self._processor, "chat_template", None) or self._tokenizer.chat_template

    def _asked(self, prompt: str) -> str:
        """The whole text that asks for a caption."""
        if self.template is not None:
            return self._conversation(self._parts(prompt) if self._asks_in_parts else self._with_image_token(prompt))
        return self._with_image_token(prompt) if self._places_image else prompt

    def _parts(self, prompt: str) -> list[dict[str, str]]:
        return [{"type": "image"}, {"type": "text", "text": prompt}]

    def _with_image_token(self, prompt: str) -> str:
        return prompt if self._image_token in prompt else f"{self._image_token}\n{prompt}"

    def _conversation(self, content: Any) -> str:
        owner = self._processor if getattr(self._processor, "chat_template", None) else self._tokenizer
        turn = [{"role": "user", "content": content}]
        return owner.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    def _template_takes_parts(self) -> bool:
        """Templates of tokenizers are often for text alone, and know no parts of a message."""
        if self.template is None:
            return False
        try:
            asked = self._conversation(self._parts("x"))
        except Exception:  # whatever the template does with a list that it takes for a text
            return False
        return "{" not in asked and (not self._image_token or self._image_token in asked)

    def _wants_image_token(self) -> bool:
        """Whether a prompt has to say where the picture goes: some processors put it there themselves."""
        picture = Image.new("RGB", (64, 64))
        try:
            inputs = self._inputs([picture], ["a"])
        except ValueError:  # it counts them
            return True
        token = getattr(self._model.config, "image_token_id", None)
        return token is not None and token not in inputs["input_ids"]

    def _without_control(self, alt: str | None) -> str:
        """A corpus must not speak to the model in control tokens; those in the prompt are the recipe's own."""
        text = alt or ""
        for token in self._control:
            text = text.replace(token, " ")  # a space, so that what stood around it makes no other one
        return text
