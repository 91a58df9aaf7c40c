"""Evaluation: does the baked model answer as the prompted one, and what became of everything else."""

from jaxbake.evaluate.cells import FourCells, four_cells, recovered
from jaxbake.evaluate.fidelity import Fidelity, fidelity
from jaxbake.evaluate.items import Item, accuracy, from_smallworld, is_correct, load_items, register_rule
from jaxbake.evaluate.measure import Evaluation, measure
from jaxbake.evaluate.plot import plot
from jaxbake.evaluate.report import render, summary_markdown
from jaxbake.evaluate.retention import Material, Retention, retention, smallworld_material

__all__ = [
    "Evaluation", "Fidelity", "FourCells", "Item", "Material", "Retention", "accuracy", "fidelity", "four_cells",
    "from_smallworld", "is_correct", "load_items", "measure", "plot", "recovered", "register_rule", "render",
    "retention", "smallworld_material", "summary_markdown",
]  # fmt: skip
