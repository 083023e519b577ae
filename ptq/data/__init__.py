"""Texts by name, the token windows drawn from them and kept in the store, and whether two sets of windows share tokens."""
