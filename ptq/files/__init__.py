"""Files: written whole or not at all, the store of earlier results, headers of safetensors and GGUF files.

Not here: models and their weights (`ptq.models`).
"""
