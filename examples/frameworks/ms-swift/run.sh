# ms-swift trains a random Qwen2.5-VL on drawn pictures, from the repository's root.
set -e
python -m examples.tiny_folder runs/tiny
swift sft examples/frameworks/ms-swift/train.yaml
