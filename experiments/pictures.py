"""Draws the documentation's pictures of channel ranges again, from SmolLM2-135M on the text that is in every CPython.

    python -m experiments.pictures [docs]

Statistics are taken once; the transforms of two shipped recipes plan on them, and nothing is quantized or evaluated. Writes
``ranges.png`` (README.md), ``clusters.png`` and ``smoothing.png`` (docs/questions.md) into the folder.
"""

import argparse
import pathlib
import shutil
import tempfile

from ptq.cli.catalog import locate
from ptq.cli.compose.hydra_edge import compose_jobs
from ptq.errors import UserError
from ptq.report.channel_ranges import save_picture, save_transformed
from ptq.run.planning import open_context, plan_steps
from ptq.run.record.journal import Journal
from ptq.run.session import open_session
from ptq.steps._registry import build_steps
from ptq.steps._step import TRANSFORM

OPTIONS = ["data=docs", "calibration.samples=16", "calibration.length=512"]
TRANSFORMED = {"clusters.png": "smollm2-135m_w4a4", "smoothing.png": "smollm2-135m_w8a8_static"}
"""By picture, the recipe whose transforms it shows."""


def draw(folder: pathlib.Path) -> None:
    """Writes the pictures, and beside each the figures that `save_transformed` writes."""
    for name, config in TRANSFORMED.items():
        [job] = compose_jobs(locate(config), OPTIONS)
        steps = build_steps(job.recipe.steps)
        steps = {step: built for step, built in steps.items() if built.kind == TRANSFORM}
        with open_session(job.recipe, Journal()) as session:
            context = open_context(session, steps)
            taken = context.statistics
            plan_steps(session, steps, context)
            if taken is None or context.statistics is None:
                raise UserError(f"{config}: takes no statistics, of which there is no picture: name another recipe")
            save_picture(taken, folder / "ranges.png")
            save_transformed(taken, context.statistics, context.labels, folder / name)


def main() -> None:
    """Draws into the folder that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=pathlib.Path, default=pathlib.Path("docs"), help="where they go (docs)"
    )
    asked = parser.parse_args().folder
    if not asked.is_dir():
        raise UserError(f"{asked}: is no folder: name the one that the pictures go into")
    with tempfile.TemporaryDirectory() as folder:
        draw(pathlib.Path(folder))
        for picture in sorted(pathlib.Path(folder).glob("*.png")):
            shutil.copyfile(picture, asked / picture.name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
