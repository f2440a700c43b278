"""Tiny text encoders with loud random weights, and their tokenizers, in the published layout."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:"
WORDS = "a the red blue green small large circle square dot on of and is left right to"
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CAPTIONS = ["a red circle", "a large blue square on the left of a small green dot", "", "the dot is green"]
LONG = " ".join(["a small red circle"] * 8)  # 32 words: CLIP's places here are 12, T5's 20


def loud(model):
    """Weights so large that an error of padding or position changes the features."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
            elif "norm" not in name.lower():
                weight.normal_(0, 0.1)
    return model.eval()


def words(special, single):
    """A word-level tokenizer, in lower case, that opens and closes texts as `single` says."""
    known = {token: index for index, token in enumerate(special)}
    for word in [*WORDS.split(), *LETTERS]:
        known.setdefault(word, len(known))
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(token, known[token]) for token in special]
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return raw, known


def clip(folder, *, whole=False, pad="<|endoftext|>", length=12):
    """CLIP's text encoder, alone or (`whole`) as a part of CLIP."""
    special = ["<pad>", "<unk>", "<|startoftext|>", "<|endoftext|>"]
    raw, known = words(special, "<|startoftext|> $A <|endoftext|>")
    named = {"bos_token": special[2], "eos_token": special[3], "unk_token": "<unk>", "pad_token": pad}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=length, **named).save_pretrained(folder)
    ids = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": known[pad]}
    text = {"vocab_size": len(known), "max_position_embeddings": length, "projection_dim": 10, **SIZE, **ids}
    if whole:
        vision = {"image_size": 16, "patch_size": 8, "projection_dim": 10, **SIZE}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)
        model = transformers.CLIPModel(config)
    else:
        model = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text))
    loud(model).save_pretrained(folder)
    return str(folder)


def t5(folder, *, length=20):
    """T5's encoder."""
    raw, known = words(["<pad>", "</s>", "<unk>"], "$A </s>")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, model_max_length=length, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    config = transformers.T5Config(
        vocab_size=len(known), d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu"
    )
    loud(transformers.T5EncoderModel(config)).save_pretrained(folder)
    return str(folder)
