"""Vision-language models of transformers with a few random weights, and inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, IMAGE = 64, 60  # the last few ids are special tokens
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = {**TEXT, "num_key_value_heads": 2}
LEFT = torch.tensor([[1] * 20, [0] * 5 + [1] * 15])
RIGHT = LEFT.flip(1)


@dataclass(frozen=True)
class Tiny:
    """A model and its inputs, and what of its output counts (padded positions do not)."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    masks: set[str]  # what attention_mask() must return: "none", "kv_range", "dense"
    peer: str = "sdpa"

    def output(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        out = model(**inputs)
        if hasattr(out, "image_embeds"):
            return torch.cat((out.image_embeds, out.text_embeds))
        if hasattr(out, "logits"):
            return out.logits[inputs["attention_mask"].bool()]
        return out.last_hidden_state


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(mask: Tensor, image_tokens: int = 0, image_token: int = IMAGE) -> Tensor:
    """Random ids with `image_tokens` image tokens from position 6 on, and 0 where the mask is 0."""
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(2))
    ids[:, 6 : 6 + image_tokens] = image_token
    return ids * mask


def clip(mask: Tensor) -> dict[str, Tensor]:
    ids = tokens(mask)
    ids[torch.arange(2), mask.sum(1) - 1] = VOCABULARY - 1  # where CLIP reads the text's feature
    return {"pixel_values": images(2, 3, 16, 16), "input_ids": ids, "attention_mask": mask}


def llava(mask: Tensor) -> dict[str, Tensor]:
    ids = tokens(mask, 9 + 7)
    ids[:, :6] = tokens(mask)[:, :6]
    return {"pixel_values": images(2, 3, 16, 16), "input_ids": ids, "attention_mask": mask}


def build_llava() -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION),
            text_config=transformers.LlamaConfig(**GQA),
            image_token_index=IMAGE,
            vision_feature_layer=-1,
        )
    )


def build_idefics3() -> Any:
    return transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(
            vision_config=VISION,
            text_config=transformers.LlamaConfig(**GQA),
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )
    )


def idefics3() -> dict[str, Tensor]:
    """Two images a text, the second of each half padding."""
    mask = torch.tensor([[1] * 20, [0] * 3 + [1] * 17])
    ids = tokens(mask, 8)
    pixels = torch.ones(2, 2, 16, 16, dtype=torch.long)
    pixels[:, 1, 8:] = 0
    return {
        "pixel_values": images(2, 2, 3, 16, 16),
        "pixel_attention_mask": pixels,
        "input_ids": ids,
        "attention_mask": mask,
    }


def build_qwen() -> Any:
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 16,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
            },
            text_config={
                **GQA,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
            },
            image_token_id=IMAGE,
            video_token_id=IMAGE + 1,
            vision_start_token_id=IMAGE - 1,
        )
    )


def qwen() -> dict[str, Tensor]:
    """An image of 8 x 12 patches in one text, of 4 x 4 in the other: 24 and 4 tokens."""
    mask = torch.tensor([[1] * 34, [0] * 12 + [1] * 22])
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    ids[0, 3], ids[1, 13] = IMAGE - 1, IMAGE - 1
    ids[0, 4:28], ids[1, 14:18] = IMAGE, IMAGE
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": images(8 * 12 + 4 * 4, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 12], [1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def build_gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config={
                **GQA,
                "head_dim": 8,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            boi_token_id=IMAGE + 1,
            eoi_token_id=IMAGE + 2,
        )
    )


def gemma3() -> dict[str, Tensor]:
    """Two images of 4 tokens in each text, the second text padded."""
    ids = tokens(LEFT)
    ids[:, 7:11] = ids[:, 13:17] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": LEFT,
        "token_type_ids": (ids == IMAGE).long(),
        "pixel_values": images(4, 3, 16, 16),
    }


def build_paligemma() -> Any:
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION),
            text_config=transformers.GemmaConfig(**GQA, head_dim=8),
            image_token_id=IMAGE,
            projection_dim=32,
        )
    )


def paligemma() -> dict[str, Tensor]:
    """16 image tokens and 3 of text as the prefix, 4 to predict; the second text padded."""
    mask = torch.tensor([[1] * 23, [1] * 21 + [0] * 2])
    ids = torch.randint(3, 50, mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    ids[:, :16] = IMAGE
    types = torch.zeros_like(ids)
    types[:, 19:] = 1
    types *= mask
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "pixel_values": images(2, 3, 16, 16),
    }


def build_siglip2() -> Any:
    vision = {name: size for name, size in VISION.items() if name != "image_size"}
    return transformers.Siglip2Model(
        transformers.Siglip2Config(text_config=TEXT, vision_config={**vision, "num_patches": 16})
    )


def siglip2() -> dict[str, Tensor]:
    """Images of 4 x 4 and 3 x 4 patches, the second padded to 16."""
    return {
        **clip(RIGHT),
        "pixel_values": images(2, 16, 3 * 4 * 4),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 12 + [0] * 4]),
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }


def build_mllama() -> Any:
    return transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 16,
                "patch_size": 4,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2]],
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
            },
            text_config={
                **GQA,
                "cross_attention_layers": [1],
                "rope_scaling": {"rope_type": "default"},
            },
            image_token_index=IMAGE,
        )
    )


def mllama() -> dict[str, Tensor]:
    """Images of one and of two tiles, which the text sees through a float mask of its own."""
    ids = tokens(LEFT)
    ids[:, 6] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": LEFT,
        "pixel_values": images(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
        "cross_attention_mask": torch.ones(2, 20, 1, 2).long(),
    }


def build_gemma2() -> Any:
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **GQA,
            head_dim=8,
            sliding_window=5,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=2,
        )
    )


def build_t5() -> Any:
    """Its position bias is learned."""
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        )
    )


def t5() -> dict[str, Tensor]:
    return {
        "input_ids": tokens(RIGHT),
        "attention_mask": RIGHT,
        "decoder_input_ids": tokens(torch.ones(2, 20).long()),
    }


MODELS = {
    "vit": Tiny(
        lambda: transformers.ViTModel(transformers.ViTConfig(**VISION), add_pooling_layer=False),
        lambda: {"pixel_values": images(2, 3, 16, 16)},
        {"none"},
    ),
    "clip": Tiny(
        lambda: transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config={**TEXT, "eos_token_id": VOCABULARY - 1},
                vision_config=VISION,
                projection_dim=16,
            )
        ),
        lambda: clip(RIGHT),
        {"kv_range"},
    ),
    "siglip": Tiny(
        lambda: transformers.SiglipModel(
            transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
        ),
        lambda: clip(RIGHT),
        {"kv_range"},
    ),
    # a single query that pools gets the dense mask, which that model repeats itself
    "siglip2": Tiny(build_siglip2, siglip2, {"kv_range", "dense"}),
    "llava": Tiny(build_llava, lambda: llava(torch.ones(2, 30).long()), {"none"}),
    "llava-right": Tiny(
        build_llava,
        lambda: llava(torch.tensor([[1] * 30, [1] * 25 + [0] * 5])),
        {"kv_range"},
    ),
    "llava-left": Tiny(
        build_llava,
        lambda: llava(torch.tensor([[1] * 30, [0] * 2 + [1] * 28])),
        {"kv_range"},
    ),
    "idefics3": Tiny(build_idefics3, idefics3, {"kv_range"}),
    "qwen2_5_vl": Tiny(build_qwen, qwen, {"kv_range"}),
    "gemma3": Tiny(build_gemma3, gemma3, {"kv_range"}),
    "paligemma": Tiny(build_paligemma, paligemma, {"kv_range"}),
    "mllama": Tiny(build_mllama, mllama, {"kv_range"}),
    "gemma2": Tiny(  # sdpa has no softcap, and eager in fp64 makes padding NaN
        build_gemma2,
        lambda: {
            "input_ids": tokens(torch.ones(2, 20).long()),
            "attention_mask": torch.ones(2, 20),
        },
        {"none", "kv_range"},
        "eager",
    ),
    "t5": Tiny(build_t5, t5, {"none", "kv_range"}),
}
