"""What the small experiment shows and asks: pictures, scenes, questions, words, examples and batches."""
