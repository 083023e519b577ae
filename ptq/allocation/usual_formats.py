"""The candidate formats of a command that names none; knows no torch, so that ``--help`` is quick."""

DEFAULTS = ("int2_g64", "int3_g64", "int4_g64", "int8_g64", "fp4")
"""The formats of ``ptq sensitivity``."""
ALLOCATED = (
    "int2_g64", "int3_g192", "int3_g128", "int3_g64", "int3_g32", "int4_g192", "int4_g128", "int4_g64", "int4_g32",
    "int5_g192", "int5_g128", "int5_g64", "int6_g192", "int6_g128", "int8_g64",
)  # fmt: skip
"""The formats of ``ptq allocate``. Few models have channels that both 128 and 192 divide: a bit more in wider groups is worth more
than narrow groups with a bit less.
"""
