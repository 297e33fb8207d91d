"""What model families call things: one table each. A new family is a new word in a row."""

# Between the vision tower and the text decoder.
CONNECTORS = (
    "multi_modal_projector",  # LLaVA, LLaVA-NeXT, LLaVA-OneVision, Gemma3, PaliGemma, InternVL
    "connector",  # Idefics2, Idefics3, SmolVLM
    "merger",  # Qwen-VL, inside its vision tower; MiniCPM-V
    "deepstack_merger_list",  # Qwen3-VL, beside its merger: what enters the first decoder layers from earlier ones
    "resampler",  # MiniCPM-V 2
    "mm_projector",  # LLaVA as first published
)
# What looks at pictures.
TOWERS = ("vision_tower", "vision_model", "vision_encoder", "visual", "vpm")
# In configurations: the token that stands for a piece of a picture or of a film.
TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# In batches: pictures and films.
PICTURES = ("pixel_values", "pixel_values_videos", "images")
# Families whose configuration names an image token although no picture enters the decoder's sequence, and why.
WITHOUT_IMAGE_TOKENS = {"mllama": "it attends to pictures from outside its token sequence"}
