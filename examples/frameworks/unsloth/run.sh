# Unsloth trains a random Llama, from the repository's root: without a GPU it takes no pictures.
set -e
python -m examples.frameworks.unsloth.train
