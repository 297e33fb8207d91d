"""The small LLaVA: its network and checkpoints, how it is pre-trained, and how it answers."""
