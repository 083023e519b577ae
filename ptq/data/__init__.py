"""Texts, and the token windows drawn from them."""
