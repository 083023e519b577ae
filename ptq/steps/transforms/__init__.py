"""Transforms, one file each: they rewrite a block and keep its function, so that a solver after them loses less."""
