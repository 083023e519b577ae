"""Stages of a recipe, one file a method."""
