"""How single formats and parts lie in files: blocks, words of int32, packed floats, headers. Not here: whole files (`ptq.export.to_*`)."""
