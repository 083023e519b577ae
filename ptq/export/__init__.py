"""Formats that other runtimes load, one file an exporter."""
