"""How the small LLaVA is fine-tuned and measured, and the runs that make up the study and what was tried beside it."""
