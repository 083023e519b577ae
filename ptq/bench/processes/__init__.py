"""Runtimes in processes of their own, and what speaks to them."""
