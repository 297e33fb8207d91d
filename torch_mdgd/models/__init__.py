"""Vision-language models: what families call their parts, the parts, their features."""
