"""The command lines of which bits where: ``ptq sensitivity`` and ``ptq allocate``."""
