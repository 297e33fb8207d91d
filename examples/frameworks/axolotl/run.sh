# Axolotl trains a random Qwen2.5-VL on drawn pictures, from the repository's root.
set -e
export DO_NOT_TRACK=1 # Axolotl tells its makers of every run otherwise
python -m examples.tiny_folder runs/tiny
python -m axolotl.cli.train examples/frameworks/axolotl/train.yaml
