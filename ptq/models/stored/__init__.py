"""Tensors that a model holds otherwise than its checkpoint: stacked out of many, or packed in a format; read from where they lie.

Not here: tensors that lie in a file as they are (`ptq.files.safetensors_file`).
"""
