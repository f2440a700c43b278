"""Tiny models with loud random weights in the published layout, one for each kind of image-text-to-text family."""

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from captioner.vocabulary import train_vocabulary

WORDS = "a the red blue green small large circle square dot on of and is what question answer user assistant : . ?"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
CHAT = (
    "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokenizer(image_token=True):
    """A word-level tokenizer that opens texts with <s>."""
    known = {token: index for index, token in enumerate(SPECIAL)}
    for word in WORDS.split():
        known.setdefault(word, len(known))
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789":
        known.setdefault(letter, len(known))
    raw = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece(prefix="##")
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    extra = {"extra_special_tokens": {"image_token": "<image>"}} if image_token else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **extra
    )


def loud(model):
    """Weights so large that an error of padding or position changes the words."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
            elif "norm" not in name.lower():
                weight.normal_(0, 0.1)
    return model.eval()


def llava(folder, chat=CHAT):
    words = tokenizer()
    config = transformers.LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            **SIZE,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(words),
            **SIZE,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            **IDS,
        },
        image_token_index=4,
        image_seq_length=4,
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(**size),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    ).save_pretrained(folder)
    loud(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return str(folder)


def blip2(folder):
    words = tokenizer(image_token=False)  # its processor keeps the token to itself
    config = transformers.Blip2Config(
        vision_config={
            **SIZE,
            "image_size": 16,
            "patch_size": 8,
        },
        qformer_config={
            **SIZE,
            "vocab_size": 40,
            "max_position_embeddings": 32,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(words),
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
            **IDS,
        },
        num_query_tokens=3,
        image_token_index=4,
    )
    images = transformers.BlipImageProcessorPil(size={"height": 16, "width": 16})
    transformers.Blip2Processor(images, words, num_query_tokens=3).save_pretrained(folder)
    loud(transformers.Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    return str(folder)


def florence2(folder):
    words = tokenizer()
    config = transformers.Florence2Config(
        vision_config={
            "depths": (1, 1),
            "patch_size": (7, 3),
            "patch_stride": (4, 2),
            "patch_padding": (3, 1),
            "patch_prenorm": (False, True),
            "embed_dim": (16, 32),
            "num_heads": (2, 2),
            "num_groups": (2, 2),
            "window_size": 2,
            "projection_dim": 32,
        },
        text_config={
            "model_type": "bart",
            "vocab_size": len(words),
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
            **IDS,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        image_token_id=4,
    )
    images = transformers.CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 patches and their mean
    transformers.Florence2Processor(images, words).save_pretrained(folder)
    loud(transformers.Florence2ForConditionalGeneration(config)).save_pretrained(folder)
    return str(folder)


def blip(folder):
    """Captioning weights as Salesforce publishes them, and their vocabulary."""
    vocabulary = train_vocabulary(["a large red circle on a white background"] * 5, 100)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    ids = {"bos_token_id": vocabulary.bos, "sep_token_id": vocabulary.sep, "pad_token_id": vocabulary.pad}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 16, **ids, **sizes}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **sizes})
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    vocabulary.save(folder)
    return str(folder)
