"""Methods, one file each: `transforms` that keep a block's function, `solvers` that pick its quantized weights, and `tuners` that learn
on the finished network.

Modules that begin with an underscore are what methods share; what a method outside of this repository needs of them is
imported from here. Arithmetic on tensors alone is in `quantize` and `group_methods`.
"""

from ptq.config.options import option
from ptq.steps._solving import BlockInputs, captures_of, quantize_linear, specs_of
from ptq.steps._step import (
    CORRECTION,
    INPUT,
    KEY,
    OUTPUT,
    QUERY,
    REFERENCE,
    RESIDUAL,
    SAMPLES,
    STATISTICS,
    WEIGHT_INPUT,
    WEIGHT_OUTPUT,
    Context,
    Solver,
    Step,
    StepPlan,
    Transform,
    Tuner,
    Tuning,
)

__all__ = [
    "CORRECTION",
    "INPUT",
    "KEY",
    "OUTPUT",
    "QUERY",
    "REFERENCE",
    "RESIDUAL",
    "SAMPLES",
    "STATISTICS",
    "WEIGHT_INPUT",
    "WEIGHT_OUTPUT",
    "BlockInputs",
    "Context",
    "Solver",
    "Step",
    "StepPlan",
    "Transform",
    "Tuner",
    "Tuning",
    "captures_of",
    "option",
    "quantize_linear",
    "specs_of",
]
