"""What model families call things: one table each. General rules come first, see ``models.parts`` and ``models.tap``.

A word is needed here where a rule cannot tell.
"""

# Between the vision tower and the text decoder, where it does not stand beside the decoder: inside the tower, mostly.
CONNECTORS = (
    "multi_modal_projector",  # LLaVA, LLaVA-NeXT, LLaVA-OneVision, Gemma3, PaliGemma, InternVL
    "connector",  # Idefics2, Idefics3, SmolVLM; Granite-Docling, inside its vision tower
    "merger",  # Qwen-VL, inside its vision tower; MiniCPM-V
    "deepstack_merger_list",  # Qwen3-VL, beside its merger: what enters the first decoder layers from earlier ones
    "merger_list",  # the same of Qwen3-Omni
    "patch_merger",
    "aligner",  # Janus, DeepSeek-VL
    "resampler",  # MiniCPM-V 2
    "mm_projector",  # LLaVA as first published
    "img_projection_up",  # Phi-4-multimodal, inside its decoder's embeddings
    "img_projection_down",
    "visual_projection",  # GIT, inside its decoder
)
# What looks at pictures.
TOWERS = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "visual",
    "vpm",
    "image_tower",  # Video-LLaVA
    "video_tower",
    "high_res_vision_model",  # DeepSeek-VL
    "image_encoder",  # GIT
    "img_processor",  # Phi-4-multimodal
)
# In names of what stands beside a text decoder and has nothing to do with pictures that are read.
NO_PICTURES = ("audio", "speech", "generation", "vqmodel", "action")
# What holds experts that a router sends tokens to.
EXPERTS = "experts"
# In configurations: the token that stands for a piece of a picture or of a film.
TOKENS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "image_patch_id",  # Molmo 2
    "img_context_token_id",
    "media_placeholder_token_id",
)
# In batches: what marks image tokens by itself, and the numbers that mean a picture or a film there.
MARKS = {"image_embeds_position_mask": (1,), "mm_token_type_ids": (1, 2)}
# In batches: pictures and films.
PICTURES = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",  # Video-LLaVA
    "image_pixel_values",  # Phi-4-multimodal
    "flattened_patches",  # Kosmos-2.5
    "image_patches",  # Fuyu
    "images",
)
# Families in which no picture enters the decoder's sequence: text attends to pictures from outside it.
CROSS_ATTENTION = ("mllama", "idefics", "blip", "evolla")
# Families that put pictures in front of the sequence of tokens, where no token stands for them.
IN_FRONT = ("git",)
