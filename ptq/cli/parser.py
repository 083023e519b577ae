"""The argument parser of every command: its complaints are one line."""

import argparse
from typing import NoReturn

from ptq.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` where argparse would print the usage and leave."""
        raise UserError(f"{message}: see --help")
