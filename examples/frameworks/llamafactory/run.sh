# LLaMA-Factory trains a random Qwen2.5-VL on drawn pictures, from the repository's root.
set -e
python -m examples.tiny_folder runs/tiny
python -m torch_mdgd.integrations.llamafactory examples/frameworks/llamafactory/train.yaml
