"""Modality-decoupled gradient descent for torch: fine-tune a vision-language model without blinding it."""
